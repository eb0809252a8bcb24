"""What the searches have in common: quiet settings, schedulers left out, everything put back at the end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from tempfile import TemporaryDirectory
from types import MethodType
from typing import Any, Final, cast

from torch import nn

from lightdeco import launch, seeds
from lightdeco.attach import attach
from lightdeco.errors import LaunchError, SettingsError, nearest, warn
from lightdeco.hooks import read
from lightdeco.joined import joined
from lightdeco.optim import read_optimizers
from lightdeco.settings import Settings, resolve

from .state import kept

#: What a search decides by itself, besides `root_dir`: nothing is kept, shown or stopped.
_QUIET: Final[dict[str, Any]] = {
    "max_epochs": None,
    "min_epochs": None,
    "min_steps": None,
    "max_time": None,
    "on_nan": "ignore",
    "fast_dev_run": False,
    "num_sanity_val_steps": 0,
    "val_check_interval": None,
    "check_val_every_n_epoch": 1,
    "logger": False,
    "checkpoint": False,
    "resume": None,
    "name": None,
    "overwrite": False,
    "hparams": None,
    "log_gradients": False,
    "progress_bar": False,
    "summary": False,
    "profiler": None,
}


@contextmanager
def searching(
    verb: str,
    model: nn.Module,
    data: Any,
    callback: object,
    settings: Settings | None,
    overrides: Mapping[str, object],
    own: Mapping[str, Any],
) -> Iterator[tuple[Settings, Callable[[], None]]]:
    """The settings of a search, and what puts everything back, which also happens at the end."""
    resolved = _on_one_process(verb, resolve(settings, overrides))
    decided = _QUIET | dict(own)
    for name, value in overrides.items():
        if name in decided or name == "root_dir":
            warn(f"{name}={value!r} has no effect in ld.{verb}")
    given = resolved.callbacks
    callbacks = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    with ExitStack() as stack:
        decided["root_dir"] = stack.enter_context(TemporaryDirectory(prefix="lightdeco-"))  # fit writes its records
        stack.enter_context(seeds.preserved())
        snapshot = stack.enter_context(kept([model, *callbacks], [data]))
        yield replace(resolved, callbacks=[*callbacks, callback], **decided), snapshot.restore


def _on_one_process(verb: str, settings: Settings) -> Settings:
    """The settings for a search in this process alone.

    Raises:
        LaunchError: a launcher started this process as one of several; and whatever `devices` cannot have.
    """
    if joined():
        raise LaunchError(f"ld.{verb} searches in one process, and a launcher started several; run it without one")
    devices = settings.devices
    if launch.count(settings) == 1:
        return settings
    if devices not in ("auto", -1):
        warn(f"devices={devices!r} has no effect in ld.{verb}, which searches in one process")
    return replace(settings, devices=devices[:1] if isinstance(devices, list) else 1)


def without_schedulers(model: nn.Module) -> None:
    """Hide the schedulers that `configure_optimizers` returns; the snapshot of the model takes this back."""
    hook = next((hook for hook in read(model, "model") if hook.role.name == "configure_optimizers"), None)
    if hook is None:
        return  # fit says what is missing
    configure, where = cast(MethodType, hook.method).__func__, hook.where

    @wraps(configure)
    def optimizers_alone(*args: Any, **kwargs: Any) -> Any:
        found = read_optimizers(configure(*args, **kwargs), where)
        return found[""].optimizer if list(found) == [""] else {n: optim.optimizer for n, optim in found.items()}

    attach(model, configure_optimizers=optimizers_alone)


def check_count(verb: str, name: str, value: object, least: int) -> None:
    """Refuse what is no integer of at least `least`, as a `SettingsError`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SettingsError(f"{verb}: {name} is {value!r}; allowed: an integer of at least {least}")


def check_choice(verb: str, mode: object, allowed: tuple[str, ...]) -> None:
    """Refuse a mode that is none of the allowed ones, as a `SettingsError`."""
    if mode not in allowed:
        names = ", ".join(map(repr, allowed))
        raise SettingsError(f"{verb}: mode is {mode!r}; allowed: {names}{nearest(str(mode), allowed)}")
