"""Measured stand-ins for the functions that the loop calls, and how they are put into an object and out again."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lightdeco.data.loader import Loader

if TYPE_CHECKING:
    from . import Profiler

Call = Callable[..., Any]


class Timed:
    """Makes measured functions of functions: `timed("backward", function)`."""

    def __init__(self, profiler: "Profiler") -> None:
        self.start, self.stop = profiler.start, profiler.stop

    def __call__(self, action: str, function: Call) -> Call:
        """A function that does the same and is one action. It is one frame more in tracebacks."""
        start, stop = self.start, self.stop

        def measured(*args: Any, **kwargs: Any) -> Any:
            start(action)
            try:
                return function(*args, **kwargs)
            finally:
                stop(action)

        return measured


def shadow(thing: object, name: str, value: object, undone: ExitStack) -> None:
    """Shadow a method of one object, and put back at the end what was there, unless someone has built on it."""
    attributes = vars(thing)
    had, before = name in attributes, attributes.get(name)
    attributes[name] = value

    def put_back() -> None:
        if attributes.get(name) is not value:
            return
        if had:
            attributes[name] = before
        else:
            del attributes[name]

    undone.callback(put_back)


def optimizer_step(optimizer: Optimizer, timed: Timed, action: str) -> MethodType:
    """The optimizer's `step`, measured; a bound method with its marks, since schedulers look for both."""
    before, start, stop = optimizer.step, timed.start, timed.stop

    @wraps(before)
    def step(_: Optimizer, *args: Any, **kwargs: Any) -> Any:
        start(action)
        try:
            return before(*args, **kwargs)
        finally:
            stop(action)

    return MethodType(step, optimizer)


class Loaders(dict[str, tuple[Loader, ...]]):
    """The loaders by stage; whatever is put in, at the beginning or when they are made anew, is measured."""

    def __init__(self, loaders: dict[str, tuple[Loader, ...]], timed: Timed) -> None:
        super().__init__()
        self._timed = timed
        for stage, several in loaders.items():
            self[stage] = several

    def __setitem__(self, stage: str, several: tuple[Loader, ...]) -> None:
        for loader in several:
            batches = loader.batches
            vars(loader)["batches"] = lambda *given, batches=batches: _Batches(
                batches(*given), f"{stage}_data", self._timed
            )
        super().__setitem__(stage, several)


class _Batches:
    """An iterator over batches whose `next` is measured. It holds no batch, so that none lives longer than without."""

    def __init__(self, batches: Any, action: str, timed: Timed) -> None:
        self._next, self.close = batches.__next__, batches.close
        self._action, self._start, self._stop = action, timed.start, timed.stop

    def __iter__(self) -> "_Batches":
        return self

    def __next__(self) -> Any:
        self._start(self._action)
        try:
            return self._next()
        finally:
            self._stop(self._action)
