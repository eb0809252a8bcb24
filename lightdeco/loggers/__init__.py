"""Loggers: where a run's metrics are shown, found by name and called through one small protocol.

>>> import tempfile
>>> from pathlib import Path
>>> from lightdeco import loggers
>>> with tempfile.TemporaryDirectory() as folder:
...     made = loggers.Loggers(loggers.create("csv", Path(folder)))
...     made.log_metrics({"train/loss": 0.5}, step=1)
...     made.close("finished")
...     print((Path(folder) / "metrics.csv").read_text())
step,train/loss
1,0.5
<BLANKLINE>
"""

import importlib
import importlib.metadata
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lightdeco import lazy, seeds
from lightdeco.errors import LoggerError, nearest

from .protocol import Logger
from .several import Loggers

if TYPE_CHECKING:
    from .comet import Comet
    from .csv import CSV
    from .mlflow import MLflow
    from .neptune import Neptune
    from .tensorboard import TensorBoard
    from .tracker import Tracker
    from .wandb import WandB

__all__ = [
    "CSV",
    "Comet",
    "Logger",
    "Loggers",
    "MLflow",
    "Neptune",
    "TensorBoard",
    "Tracker",
    "WandB",
    "create",
    "register",
]

# Name -> module, class, and what to install for it; imported when it is asked for.
_BUILT_IN = {
    "tensorboard": ("lightdeco.loggers.tensorboard", "TensorBoard", "tensorboard"),
    "csv": ("lightdeco.loggers.csv", "CSV", ""),
    "wandb": ("lightdeco.loggers.wandb", "WandB", "wandb"),
    "comet": ("lightdeco.loggers.comet", "Comet", "comet-ml"),
    "neptune": ("lightdeco.loggers.neptune", "Neptune", "neptune-client"),
    "mlflow": ("lightdeco.loggers.mlflow", "MLflow", "mlflow"),
}
# These go through accelerate's class of the same name.
_TRACKERS = ("aim", "clearml", "dvclive", "swanlab", "trackio")
_BUILT_IN |= {name: ("lightdeco.loggers.tracker", "Tracker", name) for name in _TRACKERS}
_GROUP = "lightdeco.loggers"
_registered: dict[str, Callable[[], "Logger"]] = {}


def register(name: str, factory: Callable[[], Logger]) -> None:
    """Make `logger=name` call `factory()` for a logger; a later registration replaces an earlier one.

    A class is a factory too. Packages can do the same with an entry point of the group `lightdeco.loggers`.

    Raises:
        LoggerError: the name is no text, or the factory cannot be called.
    """
    if type(name) is not str or not name:
        raise LoggerError(f"register({name!r}, …): the name of a logger is a text that is not empty")
    if not callable(factory):
        raise LoggerError(f"register({name!r}, {factory!r}): give a function or a class that makes the logger")
    _registered[name] = factory


def create(
    given: object, directory: Path, state: Mapping[str, Mapping[str, object]] | None = None
) -> dict[str, Logger]:
    """Make and open the loggers that the setting `logger` asks for.

    Args:
        given: True ("tensorboard"), False or None (none), a name, an object, or a list of names and objects.
        directory: the directory of the run, which must exist.
        state: what `Loggers.state_dict` gave, when a run is resumed; loggers that it does not name start anew.

    The random state of Python, NumPy and torch stays as it is, whatever a vendor draws.

    Returns:
        The loggers by name; an object's name is that of its class in lower case, with a number where it is taken.

    Raises:
        LoggerError: a name is unknown or given twice, a package is missing, an object is no logger, or making or
            opening it failed. The loggers that were opened before are closed.
    """
    made: dict[str, Logger] = {}
    try:
        for item in _items(given):
            kind = item if isinstance(item, str) else type(item).__name__.lower()
            if kind in made and isinstance(item, str):
                raise LoggerError(f"the logger {kind!r} is given twice; give it once, or objects with a directory each")
            key = _unique(kind, made)
            with seeds.preserved():
                logger = _checked(_make(item) if isinstance(item, str) else item, kind)
                _open(logger, kind, directory, (state or {}).get(key))
            made[key] = logger
    except LoggerError:
        Loggers(made).close("failed")
        raise
    return made


def _items(given: object) -> list[object]:
    if given is None or given is False:
        return []
    if given is True:
        return ["tensorboard"]
    return list(given) if isinstance(given, list | tuple) else [given]


def _make(name: str) -> object:
    """The logger of a name: a registered one, a built-in one, or an entry point's, in that order."""
    package = ""
    try:
        if name in _registered:
            return _registered[name]()
        if name in _BUILT_IN:
            module, attribute, package = _BUILT_IN[name]
            made = getattr(importlib.import_module(module), attribute)
            return made(name) if name in _TRACKERS else made()
        for entry in importlib.metadata.entry_points(group=_GROUP):
            if entry.name == name:
                return entry.load()()
    except Exception as error:
        raise _failure(name, error, package) from error
    raise _unknown(name)


def _open(logger: Logger, key: str, directory: Path, state: Mapping[str, object] | None) -> None:
    try:
        if state is not None and _has(logger, "load_state_dict"):
            cast(Any, logger).load_state_dict(state)
        if _has(logger, "open"):
            cast(Any, logger).open(directory)
    except Exception as error:
        raise _failure(key, error, _BUILT_IN.get(key, ("", "", ""))[2]) from error


def _failure(name: str, error: Exception, package: str) -> LoggerError:
    if isinstance(error, LoggerError):
        return error
    if isinstance(error, ImportError):
        missing = package or (error.name or "").partition(".")[0]
        install = f"; install it with `pip install {missing}`" if missing else ""
        return LoggerError(f"the logger {name!r} needs a package that cannot be imported ({error}){install}")
    return LoggerError(f"the logger {name!r} could not be made ({type(error).__name__}: {error})")


def _unknown(name: str) -> LoggerError:
    entries = importlib.metadata.entry_points(group=_GROUP).names
    known = sorted({*_BUILT_IN, *_registered, *entries})
    available = f"available: {', '.join(known)}, or an object with log_metrics(metrics, step)"
    return LoggerError(f"there is no logger {name!r}{nearest(name, known)}; {available}")


def _checked(value: object, key: str) -> Logger:
    if isinstance(value, type):
        raise LoggerError(f"the logger {value.__name__} is a class; give an instance: {value.__name__}(...)")
    if not _has(value, "log_metrics"):
        present = ", ".join(name for name in dir(value) if name.startswith("log")) or "none that starts with 'log'"
        raise LoggerError(
            f"the logger {key!r} ({value!r}) has no method log_metrics(metrics, step); methods that it has: {present}. "
            "It may also have open(directory), log_hparams(hparams), log_image, log_figure, log_histogram, log_text "
            "and log_table(name, value, step), log_artifact(path), close(status)"
        )
    return cast(Logger, value)


def _unique(key: str, taken: Mapping[str, Logger]) -> str:
    number, name = 1, key
    while name in taken:
        number += 1
        name = f"{key}_{number}"
    return name


def _has(logger: object, method: str) -> bool:
    return callable(getattr(logger, method, None))


if not TYPE_CHECKING:  # or a misspelt name would be no error
    __getattr__ = lazy.importer(__name__, {name: module for module, name, _ in _BUILT_IN.values()})
