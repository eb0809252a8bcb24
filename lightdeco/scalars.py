"""What can be logged as a metric, and how its values become one."""

from collections.abc import Callable
from operator import add
from typing import Any, Final, Literal, get_args

from torch import Tensor

from .errors import StepError, nearest
from .steps import is_scalar

Reduce = Literal["mean", "sum", "min", "max", "last"]

#: How two values become one. Values are folded from left to right, so that when they are read changes no bit.
FOLD: Final[dict[str, Callable[[float, float], float]]] = {
    "mean": add,  # of values times weights
    "sum": add,
    "min": lambda a, b: a if a != a or a < b else b,  # a NaN stays
    "max": lambda a, b: a if a != a or a > b else b,
    "last": lambda a, b: b,
}

#: A total and its weight: that of a mean; for "last" the place of the value in the order of the batches.
Part = tuple[float, float]


def fold(how: str, old: Part, new: Part) -> Part:
    """The parts of two processes as one, `new` of the higher rank."""
    if how == "last":
        return max(old, new, key=lambda part: part[1]) if old[1] != new[1] else new
    return FOLD[how](old[0], new[0]), old[1] + new[1]


def check(name: str, value: object, reduce: str) -> None:
    """Refuse what cannot be logged as a scalar.

    Raises:
        StepError: the value is no scalar, or `reduce` is no way to reduce.
    """
    if reduce not in FOLD:
        allowed = get_args(Reduce)
        raise StepError(f"ld.log({name!r}, reduce={reduce!r}); allowed: {allowed}{nearest(str(reduce), allowed)}")
    if not is_scalar(value):
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise StepError(
            f"ld.log({name!r}) got {shown}; allowed: a number, a tensor of one element, a torchmetrics Metric"
        )


def computed(name: str, metric: Any) -> float:
    """The value of a torchmetrics object. Waits for the device.

    Raises:
        StepError: it has several values.
    """
    value = metric.compute()
    if not is_scalar(value):
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise StepError(
            f"{name!r} is a {type(metric).__name__} whose compute() returned {shown}; log one that returns a single "
            "number, or log its parts by name"
        )
    return float(value)
