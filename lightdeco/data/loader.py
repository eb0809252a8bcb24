"""One loader of the user, read from any position, whatever kind it is."""

from collections.abc import Iterator
from contextlib import closing
from itertools import count, islice
from types import GeneratorType
from typing import Any, Protocol

from torch.utils.data import DataLoader, DistributedSampler

from lightdeco import seeds

from .combined import CombinedLoader, rounds
from .rebuilt import Batches, IndexedSource, StreamedSource, end_workers, is_stream, prepared, rebuildable, release
from .sharing import Share

_PART = 7
_ALL = Share()


class _Source(Protocol):
    """How one kind of loader is read; `seed` is given at each call, because a part that cycles has several."""

    exact: bool
    dataloader_idx: int

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        """The batches of an epoch from `start` on."""
        ...

    def count(self, seed: int, epoch: int) -> int:
        """How many batches the epoch has; where `exact`, without reading any data."""
        ...

    def close(self) -> None:
        """End the workers that persist."""
        ...


class Loader:
    """One loader of one stage, as the loop reads it.

    Attributes:
        name: the name the user gave, or None for a single loader.
        length: what `len()` says, or None where it is not known. It is a claim: iteration decides.
        exact: whether a position is reached without reading the data before it.
        batch_sizes: samples in a batch, for each part of a `CombinedLoader`; None where the loader does not tell.
        one_shot: whether it can be read only once (a generator, say).
        stream_workers: of an iterable dataset, the number of workers: its order depends on it. Otherwise None.
        several: whether batches come from several loaders one after another, so that `dataloader_idx` changes.

    >>> loader = Loader([10, 20, 30], seed=0)
    >>> list(loader.batches(epoch=0, start=1)), loader.length
    ([20, 30], 3)
    """

    def __init__(self, loader: Any, seed: int, name: str | None = None, share: Share = _ALL) -> None:
        self.name = name
        share = _ALL if _shares_itself(loader) else share
        self.total = _length(loader)
        self.length = None if self.total is None else share.length(self.total)
        self.batch_sizes = tuple(map(_batch_size, loader.parts if isinstance(loader, CombinedLoader) else [loader]))
        self.one_shot = _one_shot(loader)
        self.several = isinstance(loader, CombinedLoader) and loader.mode == "sequential"
        self._seed = seed
        self._source = _source(loader, share)
        # An indexed source reads its own part alone; of other sources all is read, and the rest is dropped.
        self._share = _ALL if isinstance(self._source, (IndexedSource, _Listed)) else share
        self.exact = self._source.exact
        self.stream_workers: int | None = getattr(self._source, "workers", None)

    @property
    def dataloader_idx(self) -> int:
        """Which loader of a sequential `CombinedLoader` the last batch came from; 0 for every other loader."""
        return self._source.dataloader_idx

    @property
    def first(self) -> Any:
        """The first batch of a list or tuple, which is there unread; None for every other loader."""
        return self._source.first if isinstance(self._source, _Listed) else None

    def batches(self, epoch: int, start: int = 0) -> Batches:
        """The batches of an epoch from position `start` on, as a generator; closing it ends non-persistent workers.

        Errors of the user's code pass through unchanged.
        """
        if self._share.size == 1:
            return self._source.batches(self._seed, epoch, start)
        return self._own(epoch, start)

    def _own(self, epoch: int, start: int) -> Batches:
        with closing(self._source.batches(self._seed, epoch, 0)) as batches:
            for _, batch in islice(self._share.own(batches), start, None):
                yield batch

    def close(self) -> None:
        """End the workers that persist over epochs; a later `batches` starts them again."""
        self._source.close()


def _length(loader: Any) -> int | None:
    called = getattr(loader, "_IterableDataset_len_called", None)
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None
    finally:
        # torch would warn later that the length, which nobody but us asked for, is wrong.
        if isinstance(loader, DataLoader):
            loader._IterableDataset_len_called = called


def _batch_size(loader: Any) -> int | None:
    sizes = (getattr(each, "batch_size", None) for each in (loader, getattr(loader, "batch_sampler", None)))
    return next((size for size in sizes if type(size) is int), None)


def _one_shot(loader: Any) -> bool:
    if isinstance(loader, CombinedLoader):
        return any(map(_one_shot, loader.parts))
    return isinstance(loader, Iterator)


def _shares_itself(loader: Any) -> bool:
    """Whether the user's sampler gives each process its own part."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return any(
        isinstance(each, DistributedSampler)
        for each in (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    )


def _source(loader: Any, share: Share = _ALL) -> _Source:
    if isinstance(loader, CombinedLoader):
        return _Combined(loader)
    if type(loader) in (list, tuple):
        return _Listed(loader, share)
    if not rebuildable(loader):
        return _Opaque(loader)
    return StreamedSource(loader) if is_stream(loader) else IndexedSource(loader, share)


class _Listed:
    """A list or tuple of batches: nothing happens when one is read, so nothing is seeded."""

    exact = True
    dataloader_idx = 0

    def __init__(self, given: list[Any] | tuple[Any, ...], share: Share) -> None:
        self._given, self._share = given, share

    @property
    def first(self) -> Any:
        return self._given[0] if self._given else None

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        own = self._share.part(self._given)
        yield from own[start:] if start else own

    def count(self, seed: int, epoch: int) -> int:
        return len(self._given)

    def close(self) -> None:
        pass


class _Opaque:
    """Any other iterable; it is read only through its own `iter()` and `next()`."""

    exact = False
    dataloader_idx = 0

    def __init__(self, given: Any) -> None:
        self._given = given

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        order = seeds.order_seed(seed, epoch)
        with prepared(self._given, epoch, order):
            seeds.seed_all(order)
            iterator = iter(self._given)
            try:
                for k in count():
                    if k:
                        seeds.seed_all(seeds.data_seed(seed, epoch, k))
                    try:
                        batch = next(iterator)
                    except StopIteration:
                        return
                    if k >= start:
                        yield batch
                    del batch  # else two batches are held while the next one is read
            finally:
                # A generator that the user made stays open: it may be read on in the next epoch.
                if isinstance(iterator, GeneratorType) and iterator is not self._given:
                    iterator.close()
                release(iterator, self._given)

    def count(self, seed: int, epoch: int) -> int:
        return sum(1 for _ in self.batches(seed, epoch, 0))

    def close(self) -> None:
        if isinstance(self._given, DataLoader):
            end_workers(self._given)


class _Combined:
    """A CombinedLoader: each part is read as it would be alone, under a seed of its own."""

    def __init__(self, given: CombinedLoader) -> None:
        self._given = given
        self._parts = [_source(part) for part in given.parts]
        self.exact = all(part.exact for part in self._parts)
        self.dataloader_idx = 0

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        read = self._one_by_one if self._given.mode == "sequential" else self._side_by_side
        replayed = 0 if self.exact else start
        with closing(read(seed, epoch, start - replayed)) as batches:
            for _ in islice(batches, replayed):
                pass
            yield from batches

    def _one_by_one(self, seed: int, epoch: int, start: int) -> Batches:
        for i, part in enumerate(self._parts):
            part_seed = _part_seed(seed, i, cycle=0)
            size = part.count(part_seed, epoch) if start else 0
            if start and start >= size:
                start -= size
                continue
            self.dataloader_idx = i
            yield from part.batches(part_seed, epoch, start)
            start = 0

    def _side_by_side(self, seed: int, epoch: int, start: int) -> Batches:
        ended = [False] * len(self._parts)
        opened: dict[int, Batches] = {}
        cycles = [self._cycles(i, seed, epoch, start, ended, opened) for i in range(len(self._parts))]
        try:
            yield from map(self._given.pack, rounds(self._given.mode, cycles, ended))
        finally:
            for iterator in reversed(opened.values()):
                iterator.close()

    def _cycles(
        self, i: int, seed: int, epoch: int, start: int, ended: list[bool], opened: dict[int, Batches]
    ) -> Iterator[Batches]:
        """Open part `i`, again and again; the first time at the place where it is after `start` rounds."""
        part = self._parts[i]
        for cycle in count():
            part_seed = _part_seed(seed, i, cycle)
            if start and self._given.mode == "max_size_cycle":
                size = part.count(part_seed, epoch)
                if start >= size > 0:
                    ended[i] = True
                    start -= size
                    continue
            opened[i] = part.batches(part_seed, epoch, start)
            start = 0
            yield opened[i]

    def count(self, seed: int, epoch: int) -> int:
        sizes = [part.count(_part_seed(seed, i, cycle=0), epoch) for i, part in enumerate(self._parts)]
        return self._given.size(sizes)

    def close(self) -> None:
        for part in self._parts:
            part.close()


def _part_seed(seed: int, i: int, cycle: int) -> int:
    """The seed of part `i` of a CombinedLoader: two shuffled loaders of one length must not be paired the same way."""
    return seeds._mix(_PART, seed, i, cycle) if i or cycle else seed
