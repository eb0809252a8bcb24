"""The same data in batches of another size."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, Final

from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightdeco.data import CombinedLoader, split
from lightdeco.errors import DataError, nearest
from lightdeco.hooks import is_marked

#: Arguments of DataLoader that are decided here; the others are taken over.
_OWN: Final = ("dataset", "batch_size", "shuffle", "sampler", "batch_sampler")


class Sized:
    """Data that can be had in batches of any size: an object with an attribute, or DataLoaders that are made anew.

    Attributes:
        samples: how many samples the training data have, or None where that is not known beforehand.
        where: what the size is written on, for messages.
        reads: whether it is the attribute of an object, of which nobody knows whether its loaders read it.

    Raises:
        DataError: the batch size of `data` cannot be changed; the message says what to do.
    """

    def __init__(self, model: nn.Module, data: Any, attribute: str) -> None:
        self._data, self._attribute = data, attribute
        self.samples: int | None = None
        self._owner = _owner(model, data, attribute)
        self.reads = self._owner is not None
        if self._owner is not None:
            self.where = f"{type(self._owner).__name__}.{attribute}"
            return
        self._given = {stage: given for stage, given in split(data, "fit").items() if stage in ("train", "val")}
        for stage, given in self._given.items():
            for loader in parts(given):
                _check(loader, stage)
        counts = [_samples(loader) for loader in parts(self._given.get("train"))]
        known = [count for count in counts if count is not None]
        self.samples = max(known) if known and len(known) == len(counts) else None
        self.where = "the DataLoader"

    def at(self, size: int) -> Any:
        """What a verb gets as its data, in batches of `size` samples, or of all that there are."""
        if self._owner is None:
            return {stage: _resized(given, size) for stage, given in self._given.items()}
        try:
            setattr(self._owner, self._attribute, size)
        except AttributeError as error:
            raise DataError(f"{self.where} cannot be set ({error}); make it an ordinary attribute") from error
        return self._data


def _owner(model: nn.Module, data: Any, attribute: str) -> Any:
    """The object whose attribute the loaders read, or None where loaders were given."""
    if data is not None and not is_marked(data):
        return None
    owners = [owner for owner in (data, model) if owner is not None]
    for owner in owners:
        if hasattr(owner, attribute):
            return owner
    names = [name for owner in owners for name in vars(owner) if not name.startswith("_")]
    kinds = " and ".join(type(owner).__name__ for owner in owners)
    raise DataError(
        f"{kinds} has no attribute {attribute!r} for ld.find_batch_size to set; keep the batch size in one that the "
        f"loaders read (`attribute=` names it), or give DataLoaders{nearest(attribute, names)}"
    )


def parts(given: Any) -> Iterator[Any]:
    """Each single loader in what one stage was given; a list of batches is one loader."""
    if isinstance(given, CombinedLoader):
        given = given.loaders
    if isinstance(given, Mapping):
        for part in given.values():
            yield from parts(part)
    elif isinstance(given, (list, tuple)) and given and all(isinstance(part, DataLoader) for part in given):
        yield from given
    elif given is not None:
        yield given


def _check(loader: Any, stage: str) -> None:
    what = f"the batch size of the {stage} loader, a {type(loader).__name__},"
    instead = "or a data object whose loaders read an attribute `batch_size`"
    if type(loader) is not DataLoader:
        raise DataError(f"{what} cannot be changed; give a plain torch.utils.data.DataLoader, {instead}")
    if loader.batch_size is None:
        reason = "it has a batch_sampler of its own, or none"
        raise DataError(f"{what} cannot be changed: {reason}; give one with DataLoader(…, batch_size=n), {instead}")


def _samples(loader: Any) -> int | None:
    """How many samples one pass over a DataLoader reads, or None."""
    if isinstance(loader.dataset, IterableDataset):
        return None
    for counted in (loader.sampler, loader.dataset):
        with suppress(TypeError, NotImplementedError):
            return len(counted)
    return None


def _resized(given: Any, size: int) -> Any:
    if isinstance(given, DataLoader):
        return _rebuilt(given, size)
    if isinstance(given, CombinedLoader):
        return CombinedLoader(_resized(given.loaders, size), given.mode)
    if isinstance(given, Mapping):
        return {name: _resized(part, size) for name, part in given.items()}
    return [_resized(part, size) for part in given]


def _rebuilt(loader: Any, size: int) -> Any:
    """A DataLoader like this one in batches of `size`, at most of all samples: `drop_last` must leave a batch."""
    samples = _samples(loader)
    names = [name for name in inspect.signature(DataLoader).parameters if name not in _OWN and hasattr(loader, name)]
    taken = {name: getattr(loader, name) for name in names}
    if not taken.get("pin_memory_device"):
        taken.pop("pin_memory_device", None)  # deprecated: torch warns of it even when it is empty
    if not isinstance(loader.dataset, IterableDataset):
        taken["sampler"] = loader.sampler
    return DataLoader(loader.dataset, batch_size=size if samples is None else max(1, min(size, samples)), **taken)
