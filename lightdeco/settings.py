"""Settings: every option of the verbs, its default, and its check.

`Settings` holds them; `Overrides` is the same list as a `TypedDict`, for `**overrides: Unpack[Overrides]` in the verbs,
so that editors complete the names and type checkers see the types. What each may be is in `settings_checks.py`.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import timedelta
from typing import Any, Literal, TypedDict

from .errors import SettingsError, nearest
from .settings_checks import (
    CHECKS,
    Accelerator,
    Clip,
    OnNan,
    Oom,
    Precision,
    Profiler,
    Strategy,
    seconds,
    shown,
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every setting of a verb; immutable, and checked when it is made.

    Raises:
        SettingsError: a value is not allowed. The message names the setting and what is allowed.

    >>> Settings(max_epochs=3, precision="bf16").precision
    'bf16-mixed'
    """

    # How long (no limit is None, never -1)
    max_epochs: int | None = None
    """Epochs to train at most, >= 1."""
    max_steps: int | None = None
    """Optimizer steps to train at most, >= 1."""
    min_epochs: int | None = None
    """Epochs to train at least, >= 1, whatever asks to stop; at most `max_epochs`."""
    min_steps: int | None = None
    """Optimizer steps to train at least, >= 1, whatever asks to stop; at most `max_steps`."""
    max_time: int | float | timedelta | str | None = None
    """Time to train at most: seconds, a timedelta, or "DD:HH:MM:SS"."""

    # Where
    accelerator: Accelerator = "auto"
    """Kind of device; "gpu" and "cuda" are one, so are "tpu" and "xla"."""
    devices: Literal["auto"] | int | list[int] | tuple[int, ...] = "auto"
    """"auto" (all; on a CPU one process), a number, a list of indices, or -1 (all)."""
    num_nodes: int = 1
    """Machines, >= 1."""
    strategy: Strategy | object = "auto"
    """How processes share the work: a name, or a plugin of accelerate."""
    precision: Precision = "32-true"
    """Number format; "fp16" and "bf16" stand for the mixed ones and are kept as "16-mixed" and "bf16-mixed"."""
    sync_batchnorm: bool = False
    """Compute BatchNorm's statistics over all processes."""
    use_distributed_sampler: bool = True
    """Split the data over the processes."""
    compile: bool | dict[str, Any] = False
    """`torch.compile` the model's forward; a dict holds its options."""
    benchmark: bool | None = None
    """`torch.backends.cudnn.benchmark` during the run; None leaves it as it is."""
    deterministic: bool | Literal["warn"] = False
    """Deterministic algorithms only; "warn" warns about the others instead of failing."""
    process_timeout: int | float | None = None
    """Minutes without progress on a process after which the run ends, > 0."""
    inference_mode: bool = True
    """Evaluate under `torch.inference_mode` rather than `torch.no_grad`."""

    # Optimising
    accumulate_grad_batches: int | dict[int, int] = 1
    """Batches per optimizer step, >= 1, or {epoch: batches from this epoch on}."""
    gradient_clip_val: int | float | None = None
    """Largest norm or value of the gradients, > 0; None clips nothing."""
    gradient_clip_algorithm: Clip = "norm"
    """Clip the norm over all parameters, or each value."""
    detect_anomaly: bool = False
    """Run under `torch.autograd.detect_anomaly` (slow)."""
    on_nan: OnNan = "raise"
    """What a loss that is not finite does: end the run, skip its update, or nothing."""
    oom: Oom = "raise"
    """What running out of memory does: end the run, or split the batch into micro-batches."""

    # How much data (an int counts batches, a float in (0, 1] is a share: 1 is one batch, 1.0 all)
    limit_train_batches: int | float | None = None
    """Training batches per epoch, >= 1, or their share."""
    limit_val_batches: int | float | None = None
    """Batches per validation, or their share; 0 switches validation off."""
    limit_test_batches: int | float | None = None
    """Batches per test, >= 0, or their share."""
    limit_predict_batches: int | float | None = None
    """Batches to predict, >= 0, or their share."""
    overfit_batches: int | float | None = None
    """Train on the same few batches, >= 1, or a share of them."""
    fast_dev_run: bool | int = False
    """Try everything on one batch, or on n."""
    num_sanity_val_steps: int = 2
    """Validation batches to try before training, >= 0."""
    val_check_interval: int | float | None = None
    """Training batches between validations, >= 1, or a share of the epoch; None: at its end."""
    check_val_every_n_epoch: int = 1
    """Epochs between validations, >= 1."""
    reload_dataloaders_every_n_epochs: int | None = None
    """Epochs after which the loaders are made anew, >= 1; None: never."""

    # Keeping
    logger: bool | str | object | Sequence[str | object] = True
    """A logger's name or object, or a list of them; True is "tensorboard", False none."""
    log_every_n_steps: int = 50
    """Optimizer steps between records, >= 1."""
    checkpoint: bool | object = True
    """True (the last and the best), False, or a `ModelCheckpoint(...)`."""
    resume: str | os.PathLike[str] | None = None
    """Where to go on: None (start anew), "auto", "last", "best", or a checkpoint's path."""
    root_dir: str | os.PathLike[str] = "runs"
    """Directory under which every run gets its own."""
    name: str | None = None
    """The run's directory below `root_dir`; None: `<Class>/version_<n>`."""
    overwrite: bool = False
    """Replace a run of the same name."""
    hparams: Mapping[str, Any] | None = None
    """Hyperparameters to record, with string keys."""
    log_gradients: bool = False
    """Record the norms of the gradients, of all and of each module."""
    seed: int | None = None
    """Seed of all that is random in the run, 0 to 2**32 - 1."""
    callbacks: object | Sequence[object] | None = None
    """An object with marked methods, or a list of them."""
    progress_bar: bool = True
    """Show progress in the terminal."""
    summary: bool | int = True
    """Print the model's layers before training; a number is the depth, >= 1."""
    profiler: Profiler | object | None = None
    """A profiler's name or object."""

    def __post_init__(self) -> None:
        """Check and normalise every field."""
        for setting, check in CHECKS.items():
            object.__setattr__(self, setting, check(setting, getattr(self, setting)))
        _check_order("min_epochs", self.min_epochs, "max_epochs", self.max_epochs)
        _check_order("min_steps", self.min_steps, "max_steps", self.max_steps)

    @property
    def max_seconds(self) -> float | None:
        """`max_time` in seconds."""
        return seconds(self.max_time)

    def check_for(self, verb: str) -> None:
        """Check what only one verb asks for: `fit` needs an end.

        Raises:
            SettingsError: `verb` is "fit", and neither `max_epochs`, `max_steps`, `max_time` nor `fast_dev_run` is set.
        """
        no_end = self.max_epochs is None and self.max_steps is None and self.max_time is None
        if verb == "fit" and no_end and self.fast_dev_run is False:
            raise SettingsError(
                "fit needs an end, but max_epochs, max_steps and max_time are all None; give one of them"
            )


class Overrides(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments of the verbs; see there for what they mean."""

    max_epochs: int | None
    max_steps: int | None
    min_epochs: int | None
    min_steps: int | None
    max_time: int | float | timedelta | str | None
    accelerator: Accelerator
    devices: Literal["auto"] | int | list[int] | tuple[int, ...]
    num_nodes: int
    strategy: Strategy | object
    precision: Precision
    sync_batchnorm: bool
    use_distributed_sampler: bool
    compile: bool | dict[str, Any]
    benchmark: bool | None
    deterministic: bool | Literal["warn"]
    process_timeout: int | float | None
    inference_mode: bool
    accumulate_grad_batches: int | dict[int, int]
    gradient_clip_val: int | float | None
    gradient_clip_algorithm: Clip
    detect_anomaly: bool
    on_nan: OnNan
    oom: Oom
    limit_train_batches: int | float | None
    limit_val_batches: int | float | None
    limit_test_batches: int | float | None
    limit_predict_batches: int | float | None
    overfit_batches: int | float | None
    fast_dev_run: bool | int
    num_sanity_val_steps: int
    val_check_interval: int | float | None
    check_val_every_n_epoch: int
    reload_dataloaders_every_n_epochs: int | None
    logger: bool | str | object | Sequence[str | object]
    log_every_n_steps: int
    checkpoint: bool | object
    resume: str | os.PathLike[str] | None
    root_dir: str | os.PathLike[str]
    name: str | None
    overwrite: bool
    hparams: Mapping[str, Any] | None
    log_gradients: bool
    seed: int | None
    callbacks: object | Sequence[object] | None
    progress_bar: bool
    summary: bool | int
    profiler: Profiler | object | None


def resolve(settings: Settings | None, overrides: Mapping[str, object]) -> Settings:
    """The settings of one verb: `settings` (None: the defaults) with the overrides put in, checked anew.

    Raises:
        SettingsError: an override is no setting or has a wrong value, or `settings` is no `Settings`.

    >>> resolve(Settings(max_epochs=3), {"seed": 1}).max_epochs
    3
    """
    if settings is not None and not isinstance(settings, Settings):
        raise SettingsError(f"settings is {shown(settings)}; allowed: a Settings(…) or None")
    for setting in overrides:
        if setting not in CHECKS:
            near = nearest(str(setting), CHECKS) or f"; the settings are {', '.join(CHECKS)}"
            raise SettingsError(f"{setting} is no setting{near}")
    changes: dict[str, Any] = dict(overrides)
    return replace(Settings() if settings is None else settings, **changes)


def explicit(settings: Settings) -> dict[str, object]:
    """The settings that differ from their defaults, by name, in the order of the fields.

    >>> explicit(Settings(max_epochs=3, logger=True))
    {'max_epochs': 3}
    """
    values = ((field, getattr(settings, field.name)) for field in fields(settings))
    return {field.name: value for field, value in values if not _same(value, field.default)}


def _check_order(low_name: str, low: int | None, high_name: str, high: int | None) -> None:
    if low is not None and high is not None and low > high:
        raise SettingsError(f"{low_name} is {low}; allowed: at most {high_name}, which is {high}")


def _same(one: object, other: object) -> bool:
    """Whether two values are equal and of one type: `1` is not `True`, and no foreign `__eq__` is asked."""
    return type(one) is type(other) and bool(one == other)
