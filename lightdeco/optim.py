"""Optimizers and schedulers: the forms that `configure_optimizers` may return, accumulation, clipping, schedules."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from .dtensor import local, whole
from .errors import MarkError, SettingsError, nearest, warn


@dataclass(frozen=True)
class Optim:
    """An optimizer with its scheduler and when the scheduler steps.

    Args:
        optimizer: any `torch.optim.Optimizer`.
        scheduler: anything with `step()` and `state_dict()`, such as those of `torch.optim.lr_scheduler`.
        interval: "epoch" or "step" (an optimizer update).
        every: the scheduler steps at every n-th epoch or update.
        monitor: the metric that `ReduceLROnPlateau` gets; None: "val/loss", or without validation "train/loss"
            (of several optimizers: "train/<name>/loss").

    Raises:
        SettingsError: one of them is of the wrong kind.

    >>> import torch, lightdeco as ld
    >>> adam = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])
    >>> ld.Optim(adam, torch.optim.lr_scheduler.StepLR(adam, 10), interval="step").every
    1
    """

    optimizer: Optimizer
    scheduler: Any = None
    interval: Literal["epoch", "step"] = "epoch"
    every: int = 1
    monitor: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.optimizer, Optimizer):
            raise SettingsError(f"Optim(optimizer={_kind(self.optimizer)}); allowed: a torch.optim.Optimizer")
        if self.scheduler is not None and not is_scheduler(self.scheduler):
            raise SettingsError(
                f"Optim(scheduler={_kind(self.scheduler)}); allowed: an object with step(), state_dict()"
            )
        if self.interval not in ("epoch", "step"):
            hint = nearest(str(self.interval), ("epoch", "step"))
            raise SettingsError(f"Optim(interval={self.interval!r}); allowed: 'epoch', 'step'{hint}")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingsError(f"Optim(every={self.every!r}); allowed: an integer of at least 1")
        if self.monitor is not None and not (isinstance(self.monitor, str) and self.monitor):
            raise SettingsError(f"Optim(monitor={self.monitor!r}); allowed: the name of a metric, such as 'val/loss'")


def _kind(thing: object) -> str:
    return thing.__name__ + " (the class)" if isinstance(thing, type) else type(thing).__name__


def is_scheduler(thing: object) -> bool:
    """Whether it can be stepped and saved as a scheduler, and is an object, not a class."""
    steps = all(callable(getattr(thing, name, None)) for name in ("step", "state_dict"))
    return steps and not isinstance(thing, (type, Optimizer, nn.Module))


# ---- the forms of configure_optimizers -------------------------------------------------------------------------------

_FORMS = (
    "allowed: an optimizer, (optimizer, scheduler), ld.Optim(…), "
    '{"optimizer": …, "lr_scheduler": …}, ([optimizer], [scheduler]), or a dict of names to these'
)


def read_optimizers(returned: object, where: str) -> dict[str, Optim]:
    """What `configure_optimizers` returned, as `Optim` by name ("" for a single one without a name).

    Raises:
        MarkError: it is none of the forms, or a scheduler drives another optimizer.
    """
    found = _read(returned, where)
    if not found:
        raise MarkError(f"{where} returned no optimizer; {_FORMS}")
    if len({id(optim.optimizer) for optim in found.values()}) < len(found):
        raise MarkError(
            f"{where} returned the same optimizer twice; make one for each name, with parameters of its own"
        )
    for optim in found.values():
        driven = getattr(optim.scheduler, "optimizer", optim.optimizer)
        if driven is not optim.optimizer:
            raise MarkError(f"{where} returned a scheduler that was made for another optimizer than the one beside it")
        if optim.scheduler is None and optim != Optim(optim.optimizer):
            warn(f"{where} returned no scheduler, without which interval, every and monitor have no effect")
    return found


def _read(returned: object, where: str) -> dict[str, Optim]:
    if isinstance(returned, Mapping) and "optimizer" not in returned:
        if not all(isinstance(name, str) and name for name in returned):
            raise MarkError(f"{where} returned a dict whose keys are not all names; {_FORMS}")
        return {name: _one(value, where) for name, value in returned.items()}
    if isinstance(returned, Sequence) and not isinstance(returned, str):
        if len(returned) == 2 and isinstance(returned[0], Optimizer) and is_scheduler(returned[1]):
            return {"": Optim(returned[0], returned[1])}
        first, second = returned if len(returned) == 2 else (None, None)
        if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
            return _numbered(_zip(first, second, where))
        if len(returned) == 2 and isinstance(first, Optimizer) and not _may_be_optimizer(second):
            raise MarkError(
                f"{where} returned {_kind(second)} beside an optimizer, which is neither a scheduler nor an optimizer; "
                f"{_FORMS}"
            )
        return _numbered([_one(value, where) for value in returned])
    return {"": _one(returned, where)}


def _may_be_optimizer(value: object) -> bool:
    return isinstance(value, (Optimizer, Optim, Mapping, tuple))


def _numbered(optims: list[Optim]) -> dict[str, Optim]:
    return {"": optims[0]} if len(optims) == 1 else {str(i): optim for i, optim in enumerate(optims)}


def _zip(optimizers: Sequence[Any], schedulers: Sequence[Any], where: str) -> list[Optim]:
    if len(schedulers) > len(optimizers):
        raise MarkError(f"{where} returned {len(optimizers)} optimizers and {len(schedulers)} schedulers; {_FORMS}")
    padded = [*schedulers, *[None] * (len(optimizers) - len(schedulers))]
    return [_one({"optimizer": o, "lr_scheduler": s}, where) for o, s in zip(optimizers, padded, strict=True)]


def _one(value: object, where: str) -> Optim:
    if isinstance(value, Optim):
        return value
    if isinstance(value, Optimizer):
        return Optim(value)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], Optimizer) and is_scheduler(value[1]):
        return Optim(value[0], value[1])
    if isinstance(value, Mapping) and isinstance(value.get("optimizer"), Optimizer):
        return _lightning(value, where)
    raise MarkError(f"{where} returned {_kind(value)}, which is no optimizer; {_FORMS}")


def _lightning(value: Mapping[str, Any], where: str) -> Optim:
    """Lightning's `{"optimizer": …, "lr_scheduler": scheduler or {"scheduler": …, "interval": …, …}}`."""
    _known(value, ("optimizer", "lr_scheduler", "monitor"), where)
    given = value.get("lr_scheduler")
    if not isinstance(given, Mapping):
        _scheduler(given, where)
        return Optim(value["optimizer"], given, monitor=value.get("monitor"))
    _known(given, ("scheduler", "interval", "frequency", "monitor", "strict", "name", "reduce_on_plateau"), where)
    _scheduler(given.get("scheduler"), where)
    monitor = given.get("monitor", value.get("monitor"))
    interval, every = given.get("interval", "epoch"), given.get("frequency", 1)
    return Optim(value["optimizer"], given.get("scheduler"), interval, every, monitor)


def _known(given: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in allowed:
            hint = nearest(str(key), allowed)
            raise MarkError(f"{where} returned a dict with {key!r}; allowed: {', '.join(allowed)}{hint}")


def _scheduler(thing: object, where: str) -> None:
    if thing is not None and not is_scheduler(thing):
        raise MarkError(f"{where} returned {_kind(thing)} as a scheduler; allowed: an object with step(), state_dict()")


# ---- updates ---------------------------------------------------------------------------------------------------------


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """Every parameter that the optimizer updates."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gradients_of(optimizer: Optimizer) -> list[Tensor]:
    """The gradients of those that have one."""
    return [p.grad for p in parameters_of(optimizer) if p.grad is not None]


def divide(optimizer: Optimizer, by: Any) -> None:
    """Divide the gradients of the optimizer's parameters, of each the part of this process."""
    torch._foreach_div_([local(grad) for grad in gradients_of(optimizer)], by)


def needs_closure(optimizer: Optimizer) -> bool:
    """Whether `optimizer.step` cannot be called without a closure (LBFGS)."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    return closure is not None and closure.default is inspect.Parameter.empty


def clip(optimizer: Optimizer, value: float, algorithm: str) -> None:
    """Clip the gradients of the optimizer's parameters by their common norm, or each value. Does not wait."""
    if algorithm == "norm":
        nn.utils.clip_grad_norm_(parameters_of(optimizer), value)
    elif grads := [local(grad) for grad in gradients_of(optimizer)]:
        torch._foreach_clamp_min_(grads, -value)
        torch._foreach_clamp_max_(grads, value)


def finite_gradients(optimizer: Optimizer) -> Tensor:
    """Whether the norm of all gradients is finite: a 0-dim bool on their device."""
    grads = gradients_of(optimizer)
    return torch.isfinite(whole(nn.utils.get_total_norm(grads)))


# ---- schedules -------------------------------------------------------------------------------------------------------


def is_plateau(scheduler: object) -> bool:
    """Whether the scheduler's `step` wants a metric."""
    return isinstance(scheduler, ReduceLROnPlateau)


def monitored(optim: Optim, metrics: Mapping[str, float], loss: str = "train/loss") -> float | None:
    """The metric that the scheduler gets, or None when it wants none; `loss` is the name of the optimizer's own.

    Raises:
        SettingsError: the monitored metric was never recorded.
    """
    if optim.monitor is None and not is_plateau(optim.scheduler):
        return None
    default = "val/loss" if "val/loss" in metrics else loss
    name = optim.monitor or default
    if name not in metrics:
        known = ", ".join(sorted(metrics)) or "none yet"
        raise SettingsError(f"Optim(monitor={name!r}) was never recorded; recorded: {known}{nearest(name, metrics)}")
    return metrics[name]


def step_scheduler(scheduler: Any, metric: float | None) -> None:
    """Step a scheduler, with the metric if it is one that wants it."""
    if is_plateau(scheduler):
        scheduler.step(metric)
    else:
        scheduler.step()
