"""Weighted means on the device: a value is copied into a buffer when it is logged and read when it is recorded.

Nothing here waits for the device but `Means.window`, `Means.epoch` and `Means.first_bad`, which read all at once.
"""

from collections.abc import Callable, Iterable
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from .errors import StepError, nearest
from .steps import is_metric, is_scalar

Reduce = Literal["mean", "sum", "min", "max", "last"]

_CAPACITY: Final = 64  # values that are kept before they are folded into sums: one small kernel each, no read

# For each way to reduce: (values, weights) -> two partial results, and how two partial results combine.
_PARTIAL: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": lambda v, w: torch.stack([(v * w).sum(), w.sum()]),
    "sum": lambda v, w: torch.stack([v.sum(), torch.ones_like(v[0])]),
    "min": lambda v, w: torch.stack([v.min(), torch.ones_like(v[0])]),
    "max": lambda v, w: torch.stack([v.max(), torch.ones_like(v[0])]),
    "last": lambda v, w: torch.stack([v[-1], torch.ones_like(v[0])]),
}


_MERGE: Final[dict[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "mean": torch.add,  # both the weighted sum and the weights
    "sum": lambda old, new: torch.stack([old[0] + new[0], new[1]]),
    "min": torch.minimum,
    "max": torch.maximum,
    "last": lambda old, new: new,
}


class Series:
    """One metric of one stage: a buffer of single values and the sums of those folded before."""

    def __init__(self, device: torch.device, reduce: str, on_step: bool, on_epoch: bool) -> None:
        self.reduce, self.on_step, self.on_epoch = reduce, on_step, on_epoch
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._buffer = torch.zeros(_CAPACITY, dtype=dtype, device=device)
        self._slots = list(self._buffer.unbind())
        self._weights: list[Any] = []
        self._window: Tensor | None = None
        self._epoch: Tensor | None = None
        self._seen = 0  # values since the last check for NaN
        self._bad: Tensor | None = None  # the index of the first bad one among them, on the device

    def add(self, value: Any, weight: Any) -> None:
        """Copy a scalar (a number or a tensor of one element, on any device) with its weight. Does not wait."""
        n = len(self._weights)
        if n == _CAPACITY:
            self._fold()
            n = 0
        if isinstance(value, Tensor):
            value = value.detach()
            self._slots[n].copy_(value if value.dim() == 0 else value.reshape(()))
        else:
            self._slots[n].fill_(value)
        self._weights.append(weight.detach().clone() if isinstance(weight, Tensor) else weight)

    def _fold(self) -> None:
        n = len(self._weights)
        if n == 0:
            return
        values = self._buffer[:n]
        if any(isinstance(w, Tensor) for w in self._weights):
            weights = torch.stack(
                [torch.as_tensor(w, dtype=values.dtype, device=values.device).reshape(()) for w in self._weights]
            )
        else:
            weights = torch.tensor(self._weights, dtype=values.dtype, device=values.device)
        partial = _PARTIAL[self.reduce](values, weights)
        self._window = partial if self._window is None else _MERGE[self.reduce](self._window, partial)
        self._epoch = partial if self._epoch is None else _MERGE[self.reduce](self._epoch, partial)
        places = torch.arange(self._seen, self._seen + n, dtype=values.dtype, device=values.device)
        bad = torch.where(torch.isfinite(values), torch.inf, places).min()
        self._bad = bad if self._bad is None else torch.minimum(self._bad, bad)
        self._seen += n
        self._weights = []

    def take(self, scope: Literal["window", "epoch"]) -> Tensor | None:
        """The value (0-dim, on the device) since the last take of this scope, and begin anew; None without values."""
        self._fold()
        if scope == "window":
            partial, self._window = self._window, None
        else:
            partial, self._epoch = self._epoch, None
        return None if partial is None else partial[0] / partial[1]

    def first_bad(self) -> int | None:
        """The index of the first value since the last call that was NaN or infinite. Waits for the device."""
        self._fold()
        bad, self._bad, self._seen = self._bad, None, 0
        found = float("inf") if bad is None else bad.item()
        return None if found == float("inf") else int(found)


class Means:
    """All metrics of one stage, by name."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._series: dict[str, Series] = {}
        self._metrics: dict[str, Any] = {}

    def add(
        self, name: str, value: Any, weight: Any, reduce: str = "mean", on_step: bool = True, on_epoch: bool = True
    ) -> None:
        """Log one scalar with its weight, or a torchmetrics object, which is computed and reset at the epoch's end.

        Raises:
            StepError: the value is no scalar, or `reduce` is no way to reduce.
        """
        series = self._series.get(name)
        if series is None:
            if is_metric(value):
                self._metrics[name] = value
                return
            check(name, value, reduce)
            series = self._series[name] = Series(self._device, reduce, on_step, on_epoch)
        elif not is_scalar(value):
            check(name, value, reduce)
        series.add(value, weight)

    def window(self) -> dict[str, float]:
        """The means since the last call, of what is recorded by step. Waits for the device once."""
        return _read((name, s.take("window")) for name, s in self._series.items() if s.on_step)

    def epoch(self, suffix: str = "") -> dict[str, float]:
        """The means since the last call, of what is recorded by epoch; torchmetrics objects are computed and reset.

        Names of what is also recorded by step get the suffix. Waits for the device.
        """
        named = ((n + suffix if s.on_step else n, s.take("epoch")) for n, s in self._series.items() if s.on_epoch)
        values = _read(named)
        for name, metric in self._metrics.items():
            values[name] = float(metric.compute())
            metric.reset()
        self._metrics.clear()
        return values

    def first_bad(self, name: str) -> int | None:
        """The index of the first bad value of one metric since the last call. Waits for the device."""
        return self._series[name].first_bad() if name in self._series else None


def check(name: str, value: object, reduce: str) -> None:
    """Refuse what cannot be logged as a scalar.

    Raises:
        StepError: the value is no scalar, or `reduce` is no way to reduce.
    """
    if reduce not in _PARTIAL:
        allowed = get_args(Reduce)
        raise StepError(f"ld.log({name!r}, reduce={reduce!r}){nearest(str(reduce), allowed)}; allowed: {allowed}")
    if not is_scalar(value):
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise StepError(
            f"ld.log({name!r}) got {shown}; allowed: a number, a tensor of one element, a torchmetrics Metric"
        )


def _read(pairs: Iterable[tuple[str, Tensor | None]]) -> dict[str, float]:
    found = [(name, value) for name, value in pairs if value is not None]
    if not found:
        return {}
    numbers = torch.stack([value for _, value in found]).tolist()  # the one read
    return dict(zip((name for name, _ in found), numbers, strict=True))
