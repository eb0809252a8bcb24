"""From the arguments of a verb to its plan: what can be checked without running anything."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from .data import split
from .errors import DataError, LightdecoWarning, MarkError, warn
from .plan import Plan, discover, is_marked
from .roles import STAGE_LOADER, VERB_STAGE
from .settings import Settings

#: What only training reads.
_FIT_ONLY: Final = frozenset(
    {
        "max_epochs",
        "max_steps",
        "min_epochs",
        "min_steps",
        "max_time",
        "num_sanity_val_steps",
        "log_every_n_steps",
        "accumulate_grad_batches",
        "gradient_clip_val",
        "gradient_clip_algorithm",
        "log_gradients",
        "on_nan",
        "oom",
        "limit_train_batches",
        "val_check_interval",
        "check_val_every_n_epoch",
        "reload_dataloaders_every_n_epochs",
        "resume",
    }
)

#: Takes the next plan, which was made and warned of before, in another process.
_again: list[Plan] | None = None


def without_effect(verb: str, overrides: Mapping[str, object]) -> list[str]:
    """The settings given to `validate`, `test` or `predict` that only another verb reads.

    >>> without_effect("test", {"max_epochs": 3, "limit_test_batches": 2, "limit_val_batches": 2})
    ['max_epochs', 'limit_val_batches']
    """
    limits = {f"limit_{stage}_batches" for stage in ("val", "test", "predict") if stage != VERB_STAGE[verb]}
    return [name for name in overrides if name in _FIT_ONLY | limits]


@contextmanager
def again() -> Iterator[list[Plan]]:
    """In a started process: the next plan is the caller's, who had its warnings; it is put into the list."""
    global _again
    _again = plans = list[Plan]()
    try:
        yield plans
    finally:
        _again = None


def prepare(verb: str, model: nn.Module, data: object, settings: Settings) -> tuple[Plan, dict[str, object]]:
    """The plan, and the loaders given for each stage; runs nothing of the user's but `configure_callbacks`.

    Raises:
        MarkError, SettingsError, DataError: whatever is wrong with marks, settings or the form of `data`.
    """
    if _again is None or _again:  # in it already: this is a verb within the verb
        return _prepare(verb, model, data, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LightdecoWarning)
        plan, given = _prepare(verb, model, data, settings)
    _again.append(plan)
    return plan, given


def _prepare(verb: str, model: nn.Module, data: object, settings: Settings) -> tuple[Plan, dict[str, object]]:
    settings.check_for(verb)
    if settings.profiler is not None:
        from . import profilers

        profilers.create(settings.profiler)
    marked = data if data is not None and is_marked(data) else None
    given = {} if marked is not None else split(data, verb)
    callbacks = _callbacks(settings, verb)
    plan = discover(verb, model, marked, callbacks)
    hook = plan.one("configure_callbacks")
    if hook is not None:
        if "run" in (*hook.positional, *hook.keywords):
            raise MarkError(
                f"{hook.where}, marked @configure_callbacks, asks for `run`; there is no run yet: take `model`"
            )
        method, select = plan.step(hook, None)
        positional, keywords = select(())
        more = method(*positional, **keywords)
        plan = discover(verb, model, marked, [*_as_list(more), *callbacks])
    stage = VERB_STAGE[verb]
    if stage not in given and plan.one(STAGE_LOADER[stage]) is None:
        raise DataError(
            f"ld.{verb} has no {stage} data: give a loader, a dict with {stage!r}, or an object with a method marked "
            f"@ld.{STAGE_LOADER[stage]}"
        )
    if "val" in given and verb == "fit" and plan.one("validation_step") is None:
        warn(f"val data was given, but {type(model).__name__} marks no @validation_step, so it is not used")
    return plan, given


def warn_without_effect(verb: str, overrides: Mapping[str, object]) -> None:
    """Warn of settings in the call of an evaluation that only training reads."""
    for name in without_effect(verb, overrides):
        warn(f"{name}={overrides[name]!r} has no effect in ld.{verb}")


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _callbacks(settings: Settings, verb: str) -> list[object]:
    """The user's callbacks, then those that the settings ask for and the user did not give."""
    found = _as_list(settings.callbacks)
    given = {type(callback) for callback in found}
    if settings.log_gradients and verb == "fit":
        from .callbacks.gradient_norms import GradientNorms

        found.append(GradientNorms())
    if settings.summary and verb == "fit":
        from .callbacks.model_summary import ModelSummary

        if ModelSummary not in given:
            found.append(ModelSummary(depth=1 if settings.summary is True else settings.summary))
    if settings.progress_bar:
        from .callbacks.progress_bar import ProgressBar

        if ProgressBar not in given:
            found.append(ProgressBar())
    return found
