"""What counts as a loader, and several loaders read as one."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Any, Literal, get_args

import numpy
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightdeco.errors import DataError, nearest
from lightdeco.roles import STAGE_LOADER

Mode = Literal["min_size", "max_size", "max_size_cycle", "sequential"]
_END = object()


class CombinedLoader:
    """Several loaders read as one; an ordinary iterable, also outside lightdeco.

    A batch is a list or a dict of the loaders' batches, as the loaders were given. `mode` says when it ends:

    - `"min_size"`: with the shortest loader;
    - `"max_size"`: with the longest; a loader that has ended gives None;
    - `"max_size_cycle"`: with the longest; a loader that has ended starts again;
    - `"sequential"`: one loader after the other; a batch is then the loader's own.

    Raises:
        DataError: an unknown mode, no loader, or something that is no loader.

    >>> list(CombinedLoader({"a": [1, 2], "b": [3]}, mode="max_size"))
    [{'a': 1, 'b': 3}, {'a': 2, 'b': None}]
    >>> list(CombinedLoader([[1, 2], [3]], mode="sequential"))
    [1, 2, 3]
    """

    def __init__(self, loaders: Sequence[Any] | Mapping[str, Any], mode: Mode = "min_size") -> None:
        modes = get_args(Mode)
        if mode not in modes:
            raise DataError(
                f"CombinedLoader got mode={mode!r}; allowed: {', '.join(map(repr, modes))}{nearest(str(mode), modes)}"
            )
        if not isinstance(loaders, list | tuple | dict) or not loaders:
            raise DataError(f"CombinedLoader takes a list or a dict of loaders, and got {_short(loaders)}")
        self.loaders = loaders
        self.mode: Mode = mode
        named = loaders.items() if isinstance(loaders, dict) else enumerate(loaders)
        for name, loader in named:
            check_loader(loader, f"loader {name!r} of the CombinedLoader")

    @property
    def parts(self) -> list[Any]:
        """The loaders in the order in which they are read."""
        return list(self.loaders.values()) if isinstance(self.loaders, dict) else list(self.loaders)

    def pack(self, batches: list[Any]) -> list[Any] | dict[str, Any]:
        """Give one round of batches the form in which the loaders were given."""
        return dict(zip(self.loaders, batches, strict=True)) if isinstance(self.loaders, dict) else batches

    def size(self, lengths: Sequence[int]) -> int:
        """The number of batches, from that of each loader."""
        measures: dict[str, Callable[[Sequence[int]], int]] = {"min_size": min, "sequential": sum}
        return measures.get(self.mode, max)(lengths)

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the loaders once, as `mode` says."""
        if self.mode == "sequential":
            return chain.from_iterable(self.parts)
        cycles = [_reopened(part) for part in self.parts]
        return map(self.pack, rounds(self.mode, cycles, [False] * len(cycles)))

    def __len__(self) -> int:
        """The number of batches; a TypeError where one of the loaders does not know its own."""
        return self.size([len(part) for part in self.parts])


def rounds(mode: Mode, cycles: Sequence[Iterator[Iterator[Any]]], ended: list[bool]) -> Iterator[list[Any]]:
    """Read several loaders side by side: one list of batches a round.

    Each of `cycles` gives a loader's iterator, and a fresh one whenever it is asked again. `ended` says which loaders
    have already been read to their end; it is read after the first iterators were opened.

    Raises:
        DataError: a loader gave nothing when it was started again.
    """
    current = [next(cycle) for cycle in cycles]
    while not all(ended):
        batches: list[Any] = [None] * len(current)
        for i in range(len(current)):
            if not ended[i]:
                batches[i] = next(current[i], _END)
                ended[i] = batches[i] is _END
                if ended[i] and mode == "min_size":
                    return
        # The loaders that have ended come second: none is started again only to find that the others end here too.
        if all(ended):
            return
        for i in range(len(current)):
            if ended[i]:
                batches[i] = _again(i, current, cycles[i]) if mode == "max_size_cycle" else None
        yield batches


def _again(i: int, current: list[Iterator[Any]], cycle: Iterator[Iterator[Any]]) -> Any:
    batch = next(current[i], _END)
    if batch is _END:
        current[i] = next(cycle)
        batch = next(current[i], _END)
    if batch is _END:
        raise DataError(
            f"loader {i} of the CombinedLoader gave nothing when it was started again for 'max_size_cycle'; "
            "give a loader that can be iterated more than once (a generator cannot), or use 'min_size' or 'max_size'"
        )
    return batch


def _reopened(loader: Any) -> Iterator[Iterator[Any]]:
    return (iter(loader) for _ in count())


def check_loader(given: object, what: str) -> None:
    """Refuse what cannot be one loader.

    Raises:
        DataError: says `what` it is that was refused, what was given and what to do.
    """
    problem = _problem(given)
    if problem:
        raise DataError(f"{what} is {problem}")


def _problem(given: Any) -> str | None:
    name = type(given).__name__
    wrap = "wrap it: torch.utils.data.DataLoader(dataset, batch_size=…)"
    if given is None:
        return "None; give (or return) a loader"
    if isinstance(given, type):
        return f"the class {given.__name__}; give an instance of it: {given.__name__}(…)"
    if isinstance(given, str | bytes):
        return f"the {name} {given!r}; give a loader, such as a torch.utils.data.DataLoader, not a name or a path"
    if is_array(given):
        return f"a {name}, not a loader; {_TENSORS}"
    if isinstance(given, tuple) and len(given) == 2 and all(map(is_array, given)):
        return f"a tuple of two arrays ({type(given[0]).__name__}, {type(given[1]).__name__}); {_TENSORS}"
    if is_several(given):
        return f"a {name} of {len(given)} loaders, where one loader is needed"
    if isinstance(given, torch.nn.Module):
        return f"the module {name}; the order of arguments is (model, data)"
    if isinstance(given, Dataset) and not isinstance(given, IterableDataset):
        return f"the dataset {name}, which gives single samples; {wrap}"
    if isinstance(given, Mapping):
        return f"a {name} with the keys {list(given)}, where one loader is needed"
    if not hasattr(type(given), "__iter__"):
        method = next((role for role in STAGE_LOADER.values() if callable(getattr(type(given), role, None))), None)
        if method is not None:
            return f"a {name}, which has a method `{method}` that is not decorated; add @ld.{method}"
        if hasattr(type(given), "__getitem__"):
            return f"a {name}, which has __getitem__ but no __iter__, as a dataset has; {wrap}"
        return f"a {name}, which cannot be iterated; give a DataLoader or another iterable of batches"
    return None


_TENSORS = "make a loader of it: DataLoader(TensorDataset(x, y), batch_size=…), both from torch.utils.data"


def is_several(given: Any) -> bool:
    """Whether it is a list of loaders, rather than a list of batches."""
    return type(given) in (list, tuple) and bool(given) and all(map(_may_be_loader, given))


def _may_be_loader(given: object) -> bool:
    if isinstance(given, DataLoader | CombinedLoader):
        return True
    if is_array(given) or isinstance(given, list | tuple | Mapping | str | bytes):
        return False
    # What can be moved to a device is a batch (a graph, a packed sequence), even if it can be iterated.
    return isinstance(given, Iterable) and not hasattr(given, "to")


def is_array(given: object) -> bool:
    """Whether it is a tensor or a NumPy array."""
    return isinstance(given, torch.Tensor | numpy.ndarray)


def _short(given: object) -> str:
    text = repr(given)
    return text if len(text) <= 80 else f"a {type(given).__name__}"
