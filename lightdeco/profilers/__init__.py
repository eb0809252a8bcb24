"""Profilers: where the time of a verb goes, found by name or given as an object.

>>> from lightdeco import profilers
>>> profiler = profilers.create("simple")
>>> profiler.start("reading"); profiler.stop("reading")
>>> profiler.actions["reading"].calls
1
"""

import inspect
from collections.abc import Callable
from typing import Final, Protocol, cast

from lightdeco.errors import SettingsError, nearest

from .advanced import Advanced
from .pytorch import PyTorch
from .simple import Action, Simple

__all__ = ["Action", "Advanced", "Profiler", "PyTorch", "Simple", "create"]


class Profiler(Protocol):
    """What a profiler must have.

    It may also have `summary()`, whose text is printed at the end of the verb on the main process and written as
    `profile.txt` into the run's directory, and `close()`, which is called last.
    """

    def start(self, action: str) -> object:
        """An action begins; the first of a verb has the verb's name. Actions lie inside each other."""

    def stop(self, action: str) -> object:
        """The action that began last ends, whether it failed or not."""


_NAMES: Final[dict[str, Callable[[], Profiler]]] = {"simple": Simple, "advanced": Advanced, "pytorch": PyTorch}


def create(given: object) -> Profiler:
    """The profiler that the setting `profiler` asks for: a new one for a name, or the object itself.

    Raises:
        SettingsError: no such name, or the object is no profiler.
    """
    if isinstance(given, str):
        if given not in _NAMES:
            raise SettingsError(
                f"profiler is {given!r}; allowed: {', '.join(map(repr, _NAMES))}, an object{nearest(given, _NAMES)}"
            )
        return _NAMES[given]()
    if isinstance(given, type):
        raise SettingsError(f"profiler is the class {given.__name__}; give an object: {given.__name__}()")
    for name in ("start", "stop"):
        _check(given, name)
    for name in ("summary", "close"):
        if getattr(given, name, None) is not None:
            _check(given, name, arguments=0)
    return cast(Profiler, given)


def _check(given: object, name: str, arguments: int = 1) -> None:
    """Refuse a profiler whose method is missing or cannot be called with so many arguments."""
    kind, wanted = type(given).__name__, f"{name}({'action' if arguments else ''})"
    method = getattr(given, name, None)
    if not callable(method):
        raise SettingsError(f"profiler is a {kind} without {wanted}; a profiler has start(action) and stop(action)")
    try:
        inspect.signature(method).bind(*["action"] * arguments)
    except ValueError:  # written in C, without a signature
        return
    except TypeError as error:
        raise SettingsError(f"profiler is a {kind} that cannot be called as {wanted}: {error}") from error
