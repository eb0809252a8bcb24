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
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast, runtime_checkable

from lightdeco.errors import LoggerError, nearest, warn

from .masking import mask

if TYPE_CHECKING:
    from .csv import CSV
    from .tensorboard import TensorBoard

__all__ = ["CSV", "Logger", "Loggers", "TensorBoard", "create", "register"]

# Name -> module, class, and what to install for it; imported when it is asked for.
_BUILT_IN = {
    "tensorboard": ("lightdeco.loggers.tensorboard", "TensorBoard", "tensorboard"),
    "csv": ("lightdeco.loggers.csv", "CSV", ""),
}
_NOT_YET = ("wandb", "comet", "neptune", "mlflow", "aim", "clearml", "dvclive", "swanlab", "trackio")
_GROUP = "lightdeco.loggers"
_registered: dict[str, Callable[[], "Logger"]] = {}


@runtime_checkable
class Logger(Protocol):
    """What a logger must have: `log_metrics`. What it may have besides, each called where it exists:

    - `open(directory: Path)`: once before all others, with the directory of the run;
    - `cut(step: int)`: after `open`, when a run is resumed: what was logged after `step` is void;
    - `log_hparams(hparams: Mapping[str, object])`: plain values, secrets masked;
    - `log_image`, `log_figure`, `log_histogram`, `log_text`, `log_table`, each `(name: str, value: Any, step: int)`;
    - `log_artifact(path: Path)`: a file to keep;
    - `close(status: str)`: once, last; "finished", "failed" or "interrupted".

    All are called in the main process only. Only making and opening a logger may fail a run.
    """

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name; `step` counts optimizer steps. Values may be NaN."""


class Loggers(Mapping[str, Logger]):
    """The loggers of a run by name; a call goes to each that has the method, and never raises.

    The first failing call of a logger is one `LightdecoWarning`, later ones are silent; its next calls are still
    tried. A logger that cannot show an image, figure, histogram, text or table says so once per kind.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)
        self._failed: set[str] = set()
        self._left_out: set[tuple[str, str]] = set()
        self._closed = False

    def __getitem__(self, name: str) -> Logger:
        return self._loggers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loggers)

    def __len__(self) -> int:
        return len(self._loggers)

    def cut(self, step: int) -> None:
        """Make void what was logged after `step`, when a run is resumed there."""
        self._call("cut", step)

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Record hyperparameters as plain values, secrets masked."""
        if self._loggers:
            self._call("log_hparams", mask(hparams))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name."""
        self._call("log_metrics", metrics, step)

    def log_image(self, name: str, value: object, step: int) -> None:
        """Record an image: a tensor or array, HxW, CxHxW or HxWxC, floats in 0..1 or uint8."""
        self._show("log_image", name, value, step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Record a matplotlib figure."""
        self._show("log_figure", name, value, step)

    def log_histogram(self, name: str, value: object, step: int) -> None:
        """Record the distribution of a tensor's or array's values."""
        self._show("log_histogram", name, value, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Record a text (markdown, where the logger can show it)."""
        self._show("log_text", name, value, step)

    def log_table(self, name: str, value: object, step: int) -> None:
        """Record a table: a dict of columns, a list of dicts, or a data frame."""
        self._show("log_table", name, value, step)

    def log_artifact(self, path: str | Path) -> None:
        """Keep a file with the loggers that can; it stays where it is."""
        self._call("log_artifact", Path(path))

    def close(self, status: str) -> None:
        """Close every logger with "finished", "failed" or "interrupted"; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._call("close", status)

    def _show(self, method: str, name: str, value: object, step: int) -> None:
        for key, logger in self._loggers.items():
            if not _has(logger, method) and (key, method) not in self._left_out:
                self._left_out.add((key, method))
                warn(f"the logger {key!r} has no {method}: {name!r} and others of its kind are left out there")
        self._call(method, name, value, step)

    def _call(self, method: str, *arguments: object) -> None:
        for key, logger in self._loggers.items():
            if not _has(logger, method):
                continue
            try:
                getattr(logger, method)(*arguments)
            except Exception as error:  # the contract: a logger never stops training
                if key not in self._failed:
                    self._failed.add(key)
                    warn(
                        f"the logger {key!r} failed in {method} ({type(error).__name__}: {error}); training goes on "
                        "and the logger is still tried; its later failures are not reported"
                    )


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


def create(given: object, directory: Path) -> dict[str, Logger]:
    """Make and open the loggers that the setting `logger` asks for.

    Args:
        given: True ("tensorboard"), False or None (none), a name, an object, or a list of names and objects.
        directory: the directory of the run, which must exist.

    Returns:
        The loggers by name; an object's name is that of its class in lower case, with a number where it is taken.

    Raises:
        LoggerError: a name is unknown or given twice, a package is missing, an object is no logger, or making or
            opening it failed. The loggers that were opened before are closed.
    """
    made: dict[str, Logger] = {}
    try:
        for item in _items(given):
            key, logger = _make(item) if isinstance(item, str) else (type(item).__name__.lower(), item)
            if key in made and isinstance(item, str):
                raise LoggerError(f"the logger {key!r} is given twice; give it once, or objects with a directory each")
            checked = _checked(logger, key)
            _open(checked, key, directory)
            made[_unique(key, made)] = checked
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


def _make(name: str) -> tuple[str, object]:
    """The logger of a name: a registered one, a built-in one, or an entry point's, in that order."""
    package = ""
    try:
        if name in _registered:
            return name, _registered[name]()
        if name in _BUILT_IN:
            module, attribute, package = _BUILT_IN[name]
            return name, getattr(importlib.import_module(module), attribute)()
        for entry in importlib.metadata.entry_points(group=_GROUP):
            if entry.name == name:
                return name, entry.load()()
    except Exception as error:
        raise _failure(name, error, package) from error
    raise _unknown(name)


def _open(logger: Logger, key: str, directory: Path) -> None:
    if not _has(logger, "open"):
        return
    try:
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
    if name in _NOT_YET:
        return LoggerError(f"the logger {name!r} is not available yet; {available}")
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


def __getattr__(name: str) -> object:
    """The classes of the built-in loggers, imported when they are first asked for."""
    for module, attribute, _ in _BUILT_IN.values():
        if name == attribute:
            return getattr(importlib.import_module(module), attribute)
    raise AttributeError(f"module 'lightdeco.loggers' has no attribute {name!r}")
