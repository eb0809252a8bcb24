"""`Loggers`: all loggers of a run behind one object, which never fails and never waits."""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy
from torch import nn

from lightdeco.errors import LoggerError, warn

from . import values
from .masking import mask
from .protocol import Logger
from .worker import Worker

_SHOWS: Final = ("log_image", "log_figure", "log_histogram", "log_text", "log_table")
_METHODS: Final = ("cut", "rewind", "log_provenance", "log_hparams", "log_metrics", *_SHOWS, "log_artifact", "close")
_CLOSE_TIMEOUT: Final = 10.0


class Loggers(Mapping[str, Logger]):
    """The loggers of a run by name; a call is handed to each that has the method, and comes back at once.

    Each logger is called on a thread of its own, in order. The first failing call of a logger is one
    `LightdecoWarning`, given at the next call here or at `close`; later ones are silent, and its next calls are still
    tried. Calls that a slow logger has no room for are dropped, counted, and told at `close`. A logger that cannot show
    an image, figure, histogram, text or table says so once per kind.

    In a process that was forked from the one that made it (a worker of a `DataLoader`), calls do nothing.
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)
        self._workers = {name: Worker(name, logger) for name, logger in self._loggers.items()}
        self._has = {name: {m for m in _METHODS if _has(logger, m)} for name, logger in self._loggers.items()}
        self._told: set[str] = set()
        self._left_out: set[tuple[str, str]] = set()
        self._closed = False
        self._pid = os.getpid()

    def __getitem__(self, name: str) -> Logger:
        return self._loggers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loggers)

    def __len__(self) -> int:
        return len(self._loggers)

    def watch(self, model: nn.Module) -> None:
        """Show the model to the loggers that were asked to watch gradients or to draw its graph; before training.

        Raises:
            LoggerError: one of them could not.
        """
        for key, logger in self._loggers.items():
            if _has(logger, "watch"):
                try:
                    _any(logger).watch(model)
                except Exception as error:
                    raise LoggerError(
                        f"the logger {key!r} could not watch the model ({type(error).__name__}: {error})"
                    ) from error

    def state_dict(self) -> dict[str, dict[str, object]]:
        """What a checkpoint keeps of each logger that has a state: plain values, such as the id of a vendor's run."""
        return {key: dict(_any(logger).state_dict()) for key, logger in self.items() if _has(logger, "state_dict")}

    def cut(self, step: int) -> None:
        """Make void what was logged after `step`, when a run is resumed there."""
        self._call("cut", step)

    def rewind(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """What stays of the records, (step, metrics) each, when a run is resumed; called after `cut`."""
        self._call("rewind", records)

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Record what the run was made with (see `lightdeco.provenance`), secrets masked; before `log_hparams`."""
        if self._loggers:
            self._call("log_provenance", mask(provenance))

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Record hyperparameters as plain values, secrets masked."""
        if self._loggers:
            self._call("log_hparams", mask(hparams))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record numbers by name."""
        if self._loggers:
            self._call("log_metrics", dict(metrics), step)

    def log_image(self, name: str, value: object, step: int) -> None:
        """Record an image: a tensor or array, HxW, CxHxW or HxWxC, floats in 0..1 or uint8; it is copied here.

        This and its like raise `StepError` for a value of another kind.
        """
        self._show("log_image", name, value, step)

    def log_figure(self, name: str, value: object, step: int) -> None:
        """Record a matplotlib figure; it is drawn here, so that it may be changed or closed at once."""
        self._show("log_figure", name, value, step)

    def log_histogram(self, name: str, value: object, step: int) -> None:
        """Record the distribution of a tensor's or array's values, which are copied here."""
        self._show("log_histogram", name, value, step)

    def log_text(self, name: str, value: object, step: int) -> None:
        """Record a text (markdown, where the logger can show it)."""
        self._show("log_text", name, value, step)

    def log_table(self, name: str, value: object, step: int) -> None:
        """Record a table: a dict of columns, a list of dicts, or a data frame."""
        self._show("log_table", name, value, step)

    def log_artifact(self, path: str | Path) -> None:
        """Keep a file or directory with the loggers that can; it is read later, so it must stay until the run ends."""
        self._call("log_artifact", values.check_file(path))

    def close(self, status: str) -> None:
        """Close every logger with "finished", "failed" or "interrupted"; a second call does nothing.

        Waits until everything is logged, but for each logger at most its `close_timeout` (10 s).
        """
        if self._closed or os.getpid() != self._pid:
            return
        self._closed = True
        start = time.monotonic()
        here = {key for key in self if getattr(self[key], "closes_on_training_thread", False)}
        for key, worker in self._workers.items():
            worker.finish(status, "close" in self._has[key] and key not in here)
        lost = [
            worker.join(start + float(getattr(self[key], "close_timeout", _CLOSE_TIMEOUT)))
            for key, worker in self._workers.items()
        ]
        for key in here:
            self._workers[key].close_here(status)
        self._tell_failures()
        for sentence in filter(None, lost):
            warn(f"{sentence}; metrics.jsonl in the run's directory has every record")

    def _show(self, method: str, name: str, value: object, step: int) -> None:
        values.check(method, name, value)
        if not self._loggers or os.getpid() != self._pid:
            return
        able = [key for key in self._loggers if method in self._has[key]]
        for key in self._loggers:
            if key not in able and (key, method) not in self._left_out:
                self._left_out.add((key, method))
                warn(f"the logger {key!r} has no {method}: {name!r} and others of its kind are left out there")
        if able:
            plain = values.plain(method, value)
            size = plain.nbytes if isinstance(plain, numpy.ndarray) else 64 * len(name)
            self._call(method, name, plain, step, size=size)

    def _call(self, method: str, *arguments: object, size: int = 0) -> None:
        if self._closed or os.getpid() != self._pid:
            return
        for key, worker in self._workers.items():
            if method in self._has[key]:
                worker.put(method, *arguments, size=size)
            if worker.failure is not None and key not in self._told:
                self._tell_failures()

    def _tell_failures(self) -> None:
        for key, worker in self._workers.items():
            if worker.failure is not None and key not in self._told:
                self._told.add(key)
                method, error = worker.failure
                warn(
                    f"the logger {key!r} failed in {method} ({type(error).__name__}: {error}); training goes on "
                    "and the logger is still tried; its later failures are not reported"
                )


def _has(logger: object, method: str) -> bool:
    return callable(getattr(logger, method, None))


def _any(logger: object) -> Any:
    return logger
