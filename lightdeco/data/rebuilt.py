"""A DataLoader of torch read so that order and randomness are functions of (seed, epoch, batch).

The user's loader is not changed: a copy of it reads the same dataset by the same sampler, both wrapped.

    epoch e of a map-style DataLoader             where it happens
    ------------------------------------------    ------------------------------------------
    seed all by order_seed(seed, e)               this process
    iter(sampler), draw torch's base seed         this process
    for batch k: index = next(sampler)            this process
        seed all by data_seed(seed, e, k)         where the batch is read: a worker or this process; left out
                                                  where torch alone puts the batch together from tensors
        dataset[...] and collate_fn               where the batch is read
"""

from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from itertools import chain, count, islice
from typing import Any

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterDataPipe,
    MapDataPipe,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
    default_convert,
)

from lightdeco import seeds

from .fetch import Fetch, SeededDataset, SeededStream, WorkerInit
from .sharing import Share

Batches = Generator[Any, None, None]
_SAMPLER = 6
_DRAW_ONCE = (RandomSampler, SequentialSampler, WeightedRandomSampler, SubsetRandomSampler, DistributedSampler)
_REBUILT = ("__iter__", "_get_iterator", "_index_sampler", "_auto_collation", "dataset", "sampler", "batch_sampler")


def rebuildable(loader: Any) -> bool:
    """Whether a copy with another dataset and sampler is read as the author of its class wrote it."""
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterDataPipe | MapDataPipe):
        return False
    if getattr(loader, "worker_method", "multiprocessing") != "multiprocessing":
        return False
    return all(getattr(type(loader), name, None) is getattr(DataLoader, name, None) for name in _REBUILT)


def is_stream(loader: Any) -> bool:
    """Whether a DataLoader reads an IterableDataset."""
    return bool(loader._dataset_kind == torch.utils.data._DatasetKind.Iterable)


class _Order:
    """The user's (batch) sampler, each index with the seed under which its batch is to be read."""

    def __init__(self, loader: Any, share: Share) -> None:
        self._sampler, self._share = loader._index_sampler, share
        self._generator = loader.generator
        self._draws_once = _draws_once(self._sampler)
        self.place: tuple[int, int, int] = (0, 0, 0)

    def __iter__(self) -> Iterator[Fetch]:
        # With workers, torch calls this twice and reads from the second: nothing may happen before the first next().
        return self.fetches(*self.place)

    def fetches(self, seed: int, epoch: int, start: int) -> Iterator[Fetch]:
        """What this process reads of an epoch, from its batch `start` on; of torch's samplers 64 at a time: faster."""
        indices = self._indices(seed, epoch)
        numbered = enumerate(indices) if self._share.size == 1 else self._share.own(indices)
        one_by_one = (Fetch(seeds.data_seed(seed, epoch, k), index) for k, index in islice(numbered, start, None))
        if not self._draws_once:
            return one_by_one
        return chain.from_iterable(iter(lambda: list(islice(one_by_one, 64)), []))

    def _indices(self, seed: int, epoch: int) -> Iterator[Any]:
        seeds.seed_all(seeds.order_seed(seed, epoch))
        indices = iter(self._sampler)
        # The base seed that a DataLoader draws here, so that the sampler finds the same state in a hand-written loop.
        torch.empty((), dtype=torch.int64).random_(generator=self._generator)
        for k in count():
            if k and not self._draws_once:
                seeds.seed_all(seeds._mix(_SAMPLER, seed, epoch, k))
            try:
                yield next(indices)
            except StopIteration:
                return


def _draws_once(sampler: Any) -> bool:
    """Whether a sampler draws from the global generators at most before its first index, as torch's own do."""
    if type(sampler) is BatchSampler:
        return _draws_once(sampler.sampler)
    return type(sampler) in (*_DRAW_ONCE, list, tuple, range)


def _only_tensors(loader: Any) -> bool:
    """Whether a batch is put together from tensors by torch alone, so that nothing random happens to it."""
    dataset = loader.dataset
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return type(dataset) is TensorDataset and loader.collate_fn in (default_collate, default_convert)


class IndexedSource:
    """A DataLoader over a map-style dataset."""

    exact = True
    dataloader_idx = 0

    def __init__(self, loader: Any, share: Share = Share()) -> None:  # noqa: B008 (immutable)
        self._loader = loader
        self._order = _Order(loader, share)
        sampler = "sampler" if loader.batch_sampler is None else "batch_sampler"
        dataset = SeededDataset(loader.dataset, seeded=not _only_tensors(loader))
        self._clone = _clone(loader, dataset, **{sampler: self._order})

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        """The batches of an epoch from `start` on."""
        order = seeds.order_seed(seed, epoch)
        with prepared(self._loader, epoch, order):
            self._order.place = seed, epoch, start
            yield from _read(self._clone, order)

    def count(self, seed: int, epoch: int) -> int:
        """How many batches the epoch has, from the sampler alone."""
        with prepared(self._loader, epoch, seeds.order_seed(seed, epoch)):
            return sum(1 for _ in self._order.fetches(seed, epoch, 0))

    def close(self) -> None:
        """End the workers that persist."""
        end_workers(self._clone)


class StreamedSource:
    """A DataLoader over an IterableDataset."""

    exact = False
    dataloader_idx = 0

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self.workers = loader.num_workers
        self._stream = SeededStream(loader.dataset, loader.batch_size or 1, shared=loader.num_workers > 0)
        self._clone = _clone(loader, self._stream)

    def batches(self, seed: int, epoch: int, start: int) -> Batches:
        """The batches of an epoch from `start` on."""
        order = seeds.order_seed(seed, epoch)
        with prepared(self._loader, epoch, order), closing(_read(self._clone, order)) as batches:
            self._stream.move(seed, epoch)  # before the first next(), which starts the stream
            for _ in islice(batches, start):
                pass
            yield from batches

    def count(self, seed: int, epoch: int) -> int:
        """How many batches the epoch has; reads them all."""
        return sum(1 for _ in self.batches(seed, epoch, 0))

    def close(self) -> None:
        """End the workers that persist."""
        end_workers(self._clone)


def _clone(loader: Any, dataset: Any, **sampler: Any) -> Any:
    """A second DataLoader of the same class and settings that reads `dataset`; it keeps its own workers."""
    clone = object.__new__(type(loader))
    # Not setattr: DataLoader refuses a change of these after __init__.
    clone.__dict__.update(
        loader.__dict__,
        dataset=dataset,
        worker_init_fn=WorkerInit(loader.worker_init_fn),
        generator=torch.Generator(),
        _iterator=None,
        _IterableDataset_len_called=None,
        **sampler,
    )
    return clone


def _read(clone: Any, order: int) -> Batches:
    # Its own generator draws the base seed of the workers, the number that the global one would give after `order`.
    clone.generator.manual_seed(order)
    iterator = iter(clone)
    try:
        yield from iterator
    except (ConnectionError, EOFError, FileNotFoundError) as error:
        _tell_dead(iterator, error)
        raise
    finally:
        release(iterator, clone)


def _tell_dead(iterator: Any, error: Exception) -> None:
    """Say it as torch does when a worker died, also where it died while it sent a batch: torch then names a socket.

    Raises:
        RuntimeError: a worker is no longer alive.
    """
    for worker in getattr(iterator, "_workers", ()):
        worker.join(timeout=0.5)  # the kernel closes the socket of one that is killed before it is seen to be dead
        if not worker.is_alive():
            raise RuntimeError(
                f"DataLoader worker (pid {worker.pid}) exited unexpectedly with status {worker.exitcode}, "
                "while it sent a batch"
            ) from error


def release(iterator: Any, loader: Any) -> None:
    """End the workers of a DataLoader's iterator, unless they persist."""
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None and not getattr(loader, "persistent_workers", False):
        shutdown()


def end_workers(loader: Any) -> None:
    """End the workers of a DataLoader that persist; its next iteration starts new ones."""
    iterator = getattr(loader, "_iterator", None)
    shutdown = getattr(iterator, "_shutdown_workers", None)
    if shutdown is not None:
        shutdown()
        loader._iterator = None


def _inside(loader: Any) -> list[Any]:
    """The objects in a loader that may carry an epoch or a generator, each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    found = [loader]
    if isinstance(loader, DataLoader):
        found += [loader.sampler, batch_sampler, getattr(batch_sampler, "sampler", None), loader.dataset]
    return list({id(each): each for each in found if each is not None}.values())


@contextmanager
def prepared(loader: Any, epoch: int, order: int) -> Iterator[None]:
    """Tell the epoch to all that want to know, and seed the user's generators as long as the epoch is read."""
    inside = _inside(loader)
    for each in inside:
        set_epoch = getattr(each, "set_epoch", None)
        if callable(set_epoch):
            set_epoch(epoch)
    dataset = getattr(loader, "dataset", None)
    candidates = [getattr(each, "generator", None) for each in inside if each is not dataset]
    generators: list[Any] = [each for each in candidates if isinstance(each, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    for generator in generators:
        generator.manual_seed(order)
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
