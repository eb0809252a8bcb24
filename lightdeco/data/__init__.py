"""What `data` may be: from what the user gives to the loaders of each stage, and what is in a batch."""

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from itertools import accumulate
from numbers import Number
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightdeco.errors import DataError, nearest

from .combined import CombinedLoader as CombinedLoader
from .combined import check_loader, is_array, is_several
from .loader import Loader
from .sharing import Share

_ALL = Share()
STAGES = {"fit": "train", "validate": "val", "test": "test", "predict": "predict"}


def split(data: object, verb: str) -> dict[str, object]:
    """What each stage ("train", "val", "test", "predict") was given, where `data` is no marked data object.

    Args:
        data: None; a loader for the verb's own stage; a two-tuple (train, val); or a dict from stage to loader(s).
        verb: "fit", "validate", "test" or "predict".

    Raises:
        DataError: `data` is none of these; the message says what was given and what to do.

    >>> split([1, 2], "validate"), split(([1], [2]), "fit")
    ({'val': [1, 2]}, {'train': [1], 'val': [2]})
    """
    if data is None:
        return {}
    stage = STAGES[verb]
    if isinstance(data, dict):
        return _stages(data)
    if isinstance(data, tuple) and len(data) == 2 and not all(map(is_array, data)):
        if stage not in ("train", "val"):
            raise DataError(
                f"data is a two-tuple, which means (train, val); {verb} needs a {stage} loader: "
                f"give the loader alone, or {{{stage!r}: loader}}"
            )
        return {name: given for name, given in zip(("train", "val"), data, strict=True) if given is not None}
    if isinstance(data, tuple) and len(data) != 2 and is_several(data):
        raise DataError(
            f"data is a tuple of {len(data)} loaders; allowed: two, (train, val). "
            "Name them instead: {'train': …, 'val': …, 'test': …}"
        )
    if not is_several(data):
        check_loader(data, "data")
    return {stage: data}


def _stages(data: dict[Any, Any]) -> dict[str, object]:
    stages = list(STAGES.values())
    for key in data:
        if key not in stages:
            raise DataError(
                f"data is a dict with the key {key!r}; allowed: {', '.join(map(repr, stages))}"
                f"{nearest(str(key), stages)}"
            )
    return {stage: given for stage, given in data.items() if given is not None}


def loaders(given: Any, stage: str, seed: int, share: Share = _ALL) -> tuple[Loader, ...]:
    """Check what one stage was given, and make it ready to be read.

    Args:
        given: training: one loader. Other stages also: a list of loaders, named "0", "1", …, or a dict of them.
        stage: "train", "val", "test" or "predict".
        seed: the run's seed (32 bits).
        share: the part of this process.

    Raises:
        DataError: it is no loader, too many of them, or an empty one.

    >>> [loader.name for loader in loaders({"a": [1], "b": [2]}, "val", seed=0)]
    ['a', 'b']
    """
    named: list[tuple[str, Any]]
    if isinstance(given, Mapping):
        named = _named(given, stage)
    elif is_several(given):
        named = [(str(i), loader) for i, loader in enumerate(given)]
    else:
        return (_loader(given, f"the {stage} loader", seed, None, share),)
    if stage == "train":
        raise DataError(
            f"train was given {len(named)} loaders in a {type(given).__name__}; training reads one: "
            "join them with CombinedLoader(loaders, mode='min_size')"
        )
    return tuple(_loader(loader, f"the {stage} loader {name!r}", seed, name, share) for name, loader in named)


def _named(given: Mapping[Any, Any], stage: str) -> list[tuple[str, Any]]:
    if not given:
        raise DataError(f"{stage} was given an empty {type(given).__name__}; give a loader, or a dict of them")
    for name in given:
        if not isinstance(name, str) or not name or "/" in name:
            raise DataError(
                f"a {stage} loader has the name {name!r}; allowed: a string without '/', "
                f"since its metrics are called '{stage}/<name>/…'"
            )
    return list(given.items())


def _loader(given: Any, what: str, seed: int, name: str | None, share: Share) -> Loader:
    check_loader(given, what)
    loader = Loader(given, seed, name, share)
    if loader.total == 0:
        hint = "give one with batches" if what.startswith("the train ") else "leave it out"
        hint = "with drop_last=True a dataset smaller than one batch gives none" if _drops(given) else hint
        raise DataError(f"{what} is empty: its length is 0; {hint}")
    return loader


def _drops(given: Any) -> bool:
    return isinstance(given, DataLoader) and bool(given.drop_last)


def batch_size_of(batch: Any) -> int | None:
    """The first dimension of the first tensor in the batch, or None where there is no tensor.

    Looks into lists, tuples, mappings and dataclasses, depth first. A tensor without dimensions counts 1.

    >>> batch_size_of({"name": "a", "x": [torch.zeros(4, 2)]}), batch_size_of("a")
    (4, None)
    """
    kind = type(batch)
    if (kind is tuple or kind is list) and batch and isinstance(batch[0], Tensor):
        batch = batch[0]  # the usual (x, y): 0.3 µs
    if isinstance(batch, Tensor):
        shape = batch.shape  # one question, and not two: between two steps each costs 1 µs
        return shape[0] if shape else 1
    if isinstance(batch, (list, tuple)):
        parts: Iterable[Any] = batch
    elif isinstance(batch, Mapping):
        parts = batch.values()
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        parts = (getattr(batch, field.name) for field in dataclasses.fields(batch))
    else:
        return None
    for part in parts:
        size = batch_size_of(part)
        if size is not None:
            return size
    return None


def cut_batch(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """The batch in parts of so many samples, along the first dimension of its tensors and arrays, in its structure.

    What has no tensor in it is cut too where it is a list or tuple of as many things as there are samples; otherwise
    it, and a tensor without dimensions, belongs to every part.

    Raises:
        DataError: a tensor has another first dimension, or there is an object that nobody knows how to cut.

    >>> cut_batch({"x": torch.arange(3), "names": ["a", "b", "c"], "task": "sum"}, [2, 1])[1]
    {'x': tensor([2]), 'names': ['c'], 'task': 'sum'}
    """
    ends = list(accumulate(sizes))
    return [_part(batch, end - size, end, ends[-1]) for size, end in zip(sizes, ends, strict=True)]


def _part(value: Any, begin: int, end: int, total: int) -> Any:
    def part(inner: Any) -> Any:
        return _part(inner, begin, end, total)

    if isinstance(value, Tensor) or is_array(value):
        if not value.shape:
            return value
        if value.shape[0] != total:
            raise DataError(f"one tensor has the shape {tuple(value.shape)}, another begins with {total} samples")
        return value[begin:end]
    if isinstance(value, (list, tuple)) and len(value) == total and batch_size_of(value) is None:
        return value[begin:end]
    if value is None or isinstance(value, (str, bytes, Number)):
        return value
    if isinstance(value, (list, tuple, Mapping)) or dataclasses.is_dataclass(value):
        return _rebuilt(value, part)
    raise DataError(f"nobody knows how to cut a {type(value).__name__}; use lists, tuples, dicts or dataclasses")


def to_device(
    batch: Any, device: torch.device | str, non_blocking: bool = False, dtype: torch.dtype | None = None
) -> Any:
    """The batch with its tensors on `device`, in the same structure; what holds no tensor is left as it is.

    Looks into lists, tuples, mappings and dataclasses; other objects are moved by their own `to(device)`, if any. With
    `dtype`, tensors of floating numbers get it.

    >>> to_device((torch.zeros(1), "name"), "cpu")
    (tensor([0.]), 'name')
    """

    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            wanted = dtype if value.is_floating_point() else None
            return value.to(device=device, dtype=wanted, non_blocking=non_blocking)
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([move(part) for part in value])
        if kind is dict:
            return {key: move(part) for key, part in value.items()}
        if not isinstance(value, type) and callable(getattr(value, "to", None)):
            moved = value.to(device)
            return value if moved is None else moved
        return _rebuilt(value, move)

    return move(batch)


def _rebuilt(batch: Any, move: Callable[[Any], Any]) -> Any:
    """Move what is in a subclass of list or tuple, in another mapping, or in a dataclass."""
    copied: Any
    make: Any = getattr(batch, "_make", type(batch))  # a named tuple's own __new__ may take other arguments
    if isinstance(batch, tuple):
        return make([move(part) for part in batch])
    if isinstance(batch, list):
        copied = copy.copy(batch)
        copied[:] = [move(part) for part in batch]
        return copied
    if isinstance(batch, Mapping):
        items = {key: move(part) for key, part in batch.items()}
        if not isinstance(batch, MutableMapping):
            return make(items)
        copied = copy.copy(batch)
        copied.update(items)
        return copied
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        copied = copy.copy(batch)
        for field in dataclasses.fields(batch):
            object.__setattr__(copied, field.name, move(getattr(batch, field.name)))  # frozen ones too
        return copied
    return batch
