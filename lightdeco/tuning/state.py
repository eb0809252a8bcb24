"""What a search must leave as it was: a snapshot of a model, its data and its callbacks, and the way back.

The snapshot follows references from the objects that it is given. Every tensor, container and object keeps its
identity; only what is in it is put back. Where it does not go: into locks, files, threads and other objects of the
standard library, and into objects of installed packages, other than modules, optimizers, schedulers, loaders, samplers
and datasets. An iterator cannot be put back.
"""

import contextlib
import random
import sys
import types
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

import numpy
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset, Sampler

_FOLLOWED: Final = (nn.Module, Optimizer, LRScheduler, DataLoader, Sampler, Dataset, types.SimpleNamespace, Namespace)
_ATOMS: Final = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType)
#: Where a loader keeps its workers, which a verb ends: the next iteration starts new ones.
_WORKERS: Final = "_iterator"


class Snapshot:
    """Weights, buffers, gradients, modes, attributes and generators of some objects, as they were when it was made.

    Args:
        copied: objects whose tensors and arrays are copied, to the CPU (the model, callbacks).
        shared: objects whose tensors and arrays are data: they are kept, but what is in them is not copied.
    """

    def __init__(self, copied: Iterable[object], shared: Iterable[object]) -> None:
        self._seen: dict[int, object] = {}  # holds the objects, so that no id is used twice
        self._undo: list[Callable[[], object]] = []
        self._left: deque[tuple[Any, bool]] = deque()
        for roots, copies in ((copied, True), (shared, False)):
            for root in roots:
                self._visit(root, copies)
                self._follow(root, copies)  # whatever class it has: it was given
            while self._left:
                self._visit(*self._left.popleft())

    def restore(self) -> None:
        """Put everything back, in place. May be called again."""
        with torch.no_grad():
            for undo in self._undo:
                undo()

    def _visit(self, thing: Any, copies: bool) -> None:
        if isinstance(thing, _ATOMS) or id(thing) in self._seen:
            return
        if isinstance(thing, (Tensor, numpy.ndarray)):
            if copies:
                self._seen[id(thing)] = thing
                self._array(thing)
        elif isinstance(thing, (dict, list, set, deque)):
            self._container(thing, copies)
        elif isinstance(thing, (tuple, frozenset)):
            self._seen[id(thing)] = thing
            self._left.extend((part, copies) for part in thing)
        elif isinstance(thing, types.MethodType):
            self._left.append((thing.__self__, copies))
        elif (undo := _generator(thing)) is not None:
            self._seen[id(thing)] = thing
            self._undo.append(undo)
        elif _is_followed(thing):
            self._follow(thing, copies)

    def _follow(self, thing: Any, copies: bool) -> None:
        """Keep the attributes of an object, and what they hold."""
        if id(thing) in self._seen or isinstance(thing, (*_ATOMS, Tensor, numpy.ndarray)):
            return
        self._seen[id(thing)] = thing
        copies = copies and not isinstance(thing, (Dataset, DataLoader))
        names = vars(thing) if hasattr(thing, "__dict__") else {}
        kept = {name: value for name, value in names.items() if not _is_workers(thing, name)}
        slots = {name: getattr(thing, name) for name in _slots(thing) if hasattr(thing, name)}
        self._undo.append(partial(_put_attributes, thing, kept, slots))
        self._left.extend((value, copies) for value in (*kept.values(), *slots.values()))

    def _array(self, thing: Any) -> None:
        if isinstance(thing, numpy.ndarray):
            if thing.flags.writeable:
                self._undo.append(partial(numpy.copyto, thing, thing.copy()))
            return
        overlaps = thing.layout is torch.strided and any(
            n > 1 and s == 0 for n, s in zip(thing.shape, thing.stride(), strict=True)
        )
        copy = None if nn.parameter.is_lazy(thing) or overlaps else thing.detach().to("cpu", copy=True)
        # The storage itself is kept besides its copy: the model may be moved to another device meanwhile.
        storage = None if copy is None else thing.data
        grad = thing.grad if thing.is_leaf else None
        self._undo.append(partial(_put_tensor, thing, storage, copy, thing.requires_grad, grad))
        self._left.append((grad, True))

    def _container(self, thing: Any, copies: bool) -> None:
        self._seen[id(thing)] = thing
        if isinstance(thing, dict):
            self._undo.append(partial(_put_items, thing, list(thing.items())))
            self._left.extend((key, copies) for key in thing if not isinstance(key, _ATOMS))
            parts: Iterable[Any] = thing.values()
        else:
            self._undo.append(partial(_put_parts, thing, list(thing)))
            parts = thing
        self._left.extend((part, copies) for part in parts if not isinstance(part, _ATOMS))


@contextlib.contextmanager
def kept(copied: Iterable[object], shared: Iterable[object]) -> Iterator[Snapshot]:
    """A snapshot that is restored at the end, whatever happens."""
    snapshot = Snapshot(copied, shared)
    try:
        yield snapshot
    finally:
        snapshot.restore()


def _is_followed(thing: object) -> bool:
    """Whether the attributes of an object are its author's state: an object of the user's, or one of `_FOLLOWED`."""
    if isinstance(thing, _FOLLOWED):
        return True
    name = type(thing).__module__
    package = name.partition(".")[0]
    file = getattr(sys.modules.get(name), "__file__", None) or ""
    installed = "site-packages" in file or "dist-packages" in file or package == "torch"
    return package == "lightdeco" or not (installed or package in sys.stdlib_module_names)


def _is_workers(thing: object, name: str) -> bool:
    return name == _WORKERS and isinstance(thing, DataLoader)


def _slots(thing: object) -> list[str]:
    named = (vars(cls).get("__slots__", ()) for cls in type(thing).__mro__)
    names = (name for names in named for name in ((names,) if isinstance(names, str) else names))
    return [name for name in names if name not in ("__dict__", "__weakref__")]


def _generator(thing: Any) -> Callable[[], object] | None:
    """What puts a generator of random numbers back, or None where it is none."""
    if isinstance(thing, torch.Generator):
        return partial(thing.set_state, thing.get_state())
    if isinstance(thing, random.Random):
        return partial(thing.setstate, thing.getstate())
    if isinstance(thing, numpy.random.RandomState):
        return partial(thing.set_state, thing.get_state())
    if isinstance(thing, numpy.random.Generator):
        return partial(setattr, thing.bit_generator, "state", thing.bit_generator.state)
    return None


def _put_attributes(thing: Any, kept: dict[str, Any], slots: dict[str, Any]) -> None:
    for name in _slots(thing):
        if name in slots and getattr(thing, name, None) is not slots[name]:
            object.__setattr__(thing, name, slots[name])
        elif name not in slots and hasattr(thing, name):
            object.__delattr__(thing, name)
    if not hasattr(thing, "__dict__"):
        return
    now = vars(thing)
    workers = {name: value for name, value in now.items() if _is_workers(thing, name)}
    if not _same(now.items(), [*kept.items(), *workers.items()]):
        now.clear()
        now.update(kept | workers)


def _put_tensor(tensor: Tensor, storage: Any, copy: Any, requires_grad: bool, grad: Any) -> None:
    if storage is not None:
        tensor.data = storage
        storage.copy_(copy)
    if tensor.is_leaf:
        if tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)
        if tensor.grad is not grad:
            tensor.grad = grad


def _put_items(thing: Any, items: list[tuple[Any, Any]]) -> None:
    if not _same(thing.items(), items):
        kind = OrderedDict if isinstance(thing, OrderedDict) else dict  # past what a subclass may do in them
        kind.clear(thing)
        for key, value in items:
            kind.__setitem__(thing, key, value)


def _put_parts(thing: Any, parts: list[Any]) -> None:
    if len(thing) != len(parts) or any(a is not b for a, b in zip(thing, parts, strict=True)):
        thing.clear()
        (thing.update if isinstance(thing, set) else thing.extend)(parts)


def _same(items: Iterable[tuple[Any, Any]], others: list[tuple[Any, Any]]) -> bool:
    """Whether two lists of keys and values are the same objects in the same order."""
    now = list(items)
    if len(now) != len(others):
        return False
    return all(a is c and b is d for (a, b), (c, d) in zip(now, others, strict=True))
