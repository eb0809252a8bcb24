"""How long and how much: when a run stops, how many batches are read, when validation is due."""

from collections.abc import Sequence

from .alone import Alone
from .data.loader import Loader
from .errors import SettingsError, warn
from .settings import Settings

_OWN = ("max_epochs", "max_steps", "max_time")


class Limits:
    """Whether training has come to its end, and why."""

    def __init__(self, settings: Settings, peers: Alone, finished: str | None) -> None:
        self._settings, self._peers, self._signals = settings, peers, peers.signals
        self._run, self._progress = peers.run, peers.run.progress
        # What ended a run that is resumed ends it again, unless it was a limit, which may have been raised.
        self._finished = None if finished in _OWN else finished
        self._max_steps = float("inf") if settings.max_steps is None else settings.max_steps
        self._max_seconds = settings.max_seconds

    def reached(self) -> str | None:
        """Asked after each batch: the reason to stop now, or None."""
        if self._signals.received is not None:
            return self._signals.name
        if self._progress.global_step >= self._max_steps:
            return "max_steps"
        if self._max_seconds is not None and self._peers.seconds() >= self._max_seconds:
            return "max_time"
        if self._peers.stop and self._enough():
            return self._run.stop_reason or "should_stop"
        return None

    def between_epochs(self) -> str | None:
        """Asked before each epoch: the reason to stop now, or None."""
        self._peers.agree()
        if self._finished is not None:
            return self._finished
        limit = self._run.max_epochs
        if limit is not None and self._run.epoch >= limit:
            return self.reached() or "max_epochs"
        return self.reached()

    def _enough(self) -> bool:
        settings, run = self._settings, self._run
        return run.epoch >= (settings.min_epochs or 0) and run.global_step >= (settings.min_steps or 0)


def accumulation(settings: Settings, epoch: int) -> int:
    """Batches per update in an epoch."""
    given = settings.accumulate_grad_batches
    if isinstance(given, int):
        return given
    return given[max(first for first in given if first <= epoch)] if any(first <= epoch for first in given) else 1


def cut(settings: Settings, loader: Loader, stage: str, done: int = 0, sanity: bool = False) -> int | None:
    """Batches to read from a loader before its own end, `done` of them left out; None: no limit.

    Raises:
        SettingsError: the limit is a share and the loader has no length.
    """
    name, limit = _setting(settings, stage, sanity)
    if limit is None:
        return None
    if isinstance(limit, float):
        if loader.length is None:
            raise SettingsError(
                f"{name}={limit} is a share, but the {stage} loader has no length; give a number of batches"
            )
        limit = max(1, int(loader.length * limit))
    return limit - done


def _setting(settings: Settings, stage: str, sanity: bool) -> tuple[str, int | float | None]:
    if settings.fast_dev_run:
        return "fast_dev_run", int(settings.fast_dev_run)
    name = f"limit_{stage}_batches"
    limit: int | float | None = getattr(settings, name)
    if settings.overfit_batches is not None and stage in ("train", "val"):
        name, limit = "overfit_batches", settings.overfit_batches
    if sanity:
        steps = settings.num_sanity_val_steps
        return "num_sanity_val_steps", steps if not isinstance(limit, int) else min(limit, steps)
    return name, limit


def expected(settings: Settings, loaders: Sequence[Loader], stage: str, sanity: bool = False) -> int | None:
    """Batches of one pass over a stage as far as the lengths tell, or None."""
    total = 0
    for loader in loaders:
        limit = cut(settings, loader, stage, sanity=sanity)
        known = [n for n in (limit, loader.length) if n is not None]
        if not known:
            return None
        total += min(known)
    return total


def val_interval(settings: Settings, validates: bool, batches: int | None) -> int | None:
    """Training batches between validations, or None: at the end of each epoch.

    `batches` are those of one epoch, None when unknown.

    Raises:
        SettingsError: it is a share of an unknown length, or more than an epoch has.
    """
    given = settings.val_check_interval
    if not validates:
        for name, default in (("val_check_interval", None), ("check_val_every_n_epoch", 1)):
            if getattr(settings, name) != default:
                warn(f"{name}={getattr(settings, name)} has no effect: there is no validation in this run")
        return None
    if given is None or (isinstance(given, float) and given == 1.0):
        return None
    if isinstance(given, float):
        if batches is None:
            raise SettingsError(
                f"val_check_interval={given} is a share, but the train loader has no length; give a number of batches"
            )
        return max(1, int(batches * given))
    if batches is not None and given > batches:
        raise SettingsError(
            f"val_check_interval={given} is more than the {batches} batches of an epoch: validation would never run; "
            "to validate every few epochs, set check_val_every_n_epoch"
        )
    return given
