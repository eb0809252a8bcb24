"""Weighted means on the device: a value is copied into a buffer when it is logged and read when it is recorded.

Logging costs one small kernel. Nothing waits for the device but `Means.window`, `Means.epoch` and `Means.first_bad`,
which read all metrics at once and go on with sums on the host.
"""

import math
from collections.abc import Callable
from typing import Any, Final, Literal, get_args

import torch
from torch import Tensor

from .errors import StepError, nearest
from .steps import is_metric, is_scalar

Reduce = Literal["mean", "sum", "min", "max", "last"]

_CAPACITY: Final = 64  # values that are kept before they are folded into one, on the device

# How two partial results (of several values each) become one, on the device and on the host.
_MERGE: Final[dict[str, Callable[[Any, Any], Any]]] = {
    "mean": lambda old, new: old + new,  # weighted sums
    "sum": lambda old, new: old + new,
    # min() and max() keep a NaN only when it comes first.
    "min": lambda old, new: (
        torch.minimum(old, new) if isinstance(old, Tensor) else new if new != new else min(old, new)
    ),
    "max": lambda old, new: (
        torch.maximum(old, new) if isinstance(old, Tensor) else new if new != new else max(old, new)
    ),
    "last": lambda old, new: new,
}
_REDUCE: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "sum": torch.sum,
    "min": torch.min,
    "max": torch.max,
    "last": lambda values: values[-1],
}


class Series:
    """One metric of one stage: single values in a buffer on the device, and what was read of the earlier ones."""

    __slots__ = (
        "_bad", "_buffer", "_folded", "_kept", "_remote", "_seen", "_slots", "_totals", "_watched", "_weights",
        "finite_only", "on_epoch", "on_step", "reduce",
    )  # fmt: skip

    def __init__(self, device: torch.device, reduce: str, on_step: bool, on_epoch: bool, watched: bool) -> None:
        self.reduce, self.on_step, self.on_epoch, self._watched = reduce, on_step, on_epoch, watched
        dtype = torch.float32 if device.type == "mps" else torch.float64
        with torch.inference_mode(False):  # begun in inference mode, it could not be written outside of it
            self._buffer = torch.zeros(_CAPACITY, dtype=dtype, device=device)
            self._slots = list(self._buffer.unbind())
        self._remote = not self._buffer.is_cpu
        #: Leave values that are NaN or infinite out of the mean: their updates were skipped.
        self.finite_only = False
        self._weights: list[Any] = []
        self._folded: tuple[Tensor, Any] | None = None  # (partial result, weight) of full buffers
        self._kept: list[Tensor] = []  # full buffers since the last read, of a watched series
        self._totals: dict[str, tuple[float, float]] = {}  # on the host, by scope: "window", "epoch"
        self._seen = 0  # values read since the last question for a bad one
        self._bad: int | None = None

    def add(self, value: Any, weight: Any) -> None:
        """Copy a scalar (a number or a tensor of one element, on any device) with its weight. Does not wait."""
        n = len(self._weights)
        if n == _CAPACITY:
            self._fold()
            n = 0
        if not isinstance(value, Tensor):
            self._slots[n].fill_(float(value))
        elif self._remote and value.is_cpu:
            self._slots[n].fill_(value.item())  # read from where it is; to copy it would wait for the device
        else:
            self._slots[n].copy_(value.detach() if value.dim() == 0 else value.detach().reshape(()))
        self._weights.append(weight.detach().clone() if isinstance(weight, Tensor) else weight)

    def _fold(self) -> None:
        if self._watched:
            self._kept.append(self._buffer.clone())
        self._folded, self._weights = self.pending(), []

    def pending(self) -> tuple[Tensor, Any] | None:
        """What was logged since the last read: the partial result (0-dim, on the device) and its weight."""
        n = len(self._weights)
        if n == 0:
            return self._folded
        values: Tensor = self._buffer[:n]
        weight: Any = n
        if self.reduce != "mean":
            partial = _REDUCE[self.reduce](values)
        elif self.finite_only:
            good = torch.isfinite(values)
            weights = self._moved_weights() * good
            partial, weight = torch.dot(torch.where(good, values, 0.0), weights), weights.sum()
        elif any(isinstance(w, Tensor) for w in self._weights):
            weights = self._moved_weights()
            partial, weight = torch.dot(values, weights), weights.sum()  # in double: theirs may be a half
        elif len(set(self._weights)) == 1:
            partial, weight = values.sum() * self._weights[0], self._weights[0] * n
        else:
            partial, weight = torch.dot(values, self._moved_weights()), sum(self._weights)
        if self._folded is None:
            return partial, weight
        return _MERGE[self.reduce](self._folded[0], partial), self._folded[1] + weight

    def _moved_weights(self) -> Tensor:
        """The weights of the buffered values, on the device, without waiting for it."""
        like = self._buffer
        if any(isinstance(w, Tensor) for w in self._weights):
            weights = (w if isinstance(w, Tensor) else like.new_full((), w) for w in self._weights)
            return torch.stack([w.to(like, non_blocking=like.is_cuda).reshape(()) for w in weights])
        host = torch.tensor(self._weights, dtype=like.dtype)
        # From memory that is not pinned, the copy would begin with waiting for all work on the device.
        return host.pin_memory().to(like.device, non_blocking=True) if like.is_cuda else host.to(like.device)

    def settle(self, partial: float, weight: float) -> None:
        """Take over what was pending as it was read, and begin a new buffer."""
        for scope in ("window", "epoch"):
            old = self._totals.get(scope)
            merged = partial if old is None else _MERGE[self.reduce](old[0], partial)
            self._totals[scope] = float(merged), weight + (0 if old is None else old[1])
        values = [*self._kept, self._buffer[: len(self._weights)]]
        if self._watched and self._bad is None and not math.isfinite(partial):
            bad = (~torch.isfinite(torch.cat(values))).nonzero()
            self._bad = self._seen + int(bad[0]) if len(bad) else None
        self._seen += sum(len(part) for part in values)
        self._weights, self._folded, self._kept = [], None, []

    def take(self, scope: Literal["window", "epoch"]) -> float | None:
        """The value since the last take of this scope, and begin anew; None without values."""
        total = self._totals.pop(scope, None)
        if total is None or self.reduce != "mean":
            return None if total is None else total[0]
        return total[0] / total[1] if total[1] else math.nan

    def first_bad(self) -> int | None:
        """The index of the first value since the last call that was NaN or infinite, of those that were read."""
        bad, self._bad, self._seen = self._bad, None, 0
        return bad


class Means:
    """All metrics of one stage, by name; `watch` names the one that `first_bad` can be asked about."""

    def __init__(self, device: torch.device, watch: str | None = None, elsewhere: "Means | None" = None) -> None:
        self._device, self._watch = device, watch
        #: The watched metric, a mean by step and by epoch.
        self.watched = Series(device, "mean", True, True, watched=True)
        self.series: dict[str, Series] = {} if watch is None else {watch: self.watched}
        self._metrics: dict[str, Any] = {}
        self._elsewhere = elsewhere  # the stage around this one, which is not finished

    def add(
        self, name: str, value: Any, weight: Any, reduce: str = "mean", on_step: bool = True, on_epoch: bool = True
    ) -> None:
        """Log one scalar with its weight, or a torchmetrics object, which is computed and reset at the epoch's end.

        Raises:
            StepError: the value is no scalar, or `reduce` is no way to reduce.
        """
        series = self.series.get(name)
        if series is None:
            if is_metric(value):
                if self._elsewhere is not None and any(value is other for other in self._elsewhere._metrics.values()):
                    raise StepError(
                        f"{name!r} is a {type(value).__name__} that training is using too, in the middle of its epoch; "
                        "make one object for each stage"
                    )
                self._metrics[name] = value
                return
            check(name, value, reduce)
            series = self.series[name] = Series(self._device, reduce, on_step, on_epoch, watched=False)
        elif not is_scalar(value):
            check(name, value, reduce)
        elif series.reduce != reduce:
            check(name, value, reduce)
            raise StepError(f"ld.log({name!r}, reduce={reduce!r}): it was logged with reduce={series.reduce!r} before")
        series.add(value, weight)

    def add_mean(self, name: str, value: Any, weight: Any) -> None:
        """`add` of what is known to be a scalar, as a mean by step and by epoch: on the way of every step."""
        series = self.series.get(name)
        if series is None:
            self.add(name, value, weight)
        else:
            series.add(value, weight)

    def window(self) -> dict[str, float]:
        """The means since the last call, of what is recorded by step. Waits for the device once."""
        self._read()
        found = {name: s.take("window") for name, s in self.series.items() if s.on_step}
        return {name: value for name, value in found.items() if value is not None}

    def epoch(self, suffix: str = "") -> dict[str, float]:
        """The means since the last call, of what is recorded by epoch; torchmetrics objects are computed and reset.

        Names of what is also recorded by step get the suffix. Waits for the device.
        """
        self._read()
        found = {n + suffix if s.on_step else n: s.take("epoch") for n, s in self.series.items() if s.on_epoch}
        values = {name: value for name, value in found.items() if value is not None}
        for name, metric in self._metrics.items():
            values[name] = computed(name, metric)
            metric.reset()
        self._metrics.clear()
        return values

    def forget(self) -> None:
        """Reset torchmetrics objects without a record, at the end of an epoch that was cut short."""
        for metric in self._metrics.values():
            metric.reset()
        self._metrics.clear()

    def first_bad(self) -> int | None:
        """The index of the first NaN or infinite value of the watched metric since the last call. Waits."""
        self._read()
        return self.watched.first_bad()

    def _read(self) -> None:
        """Read everything that is pending, at once."""
        waiting = [(s, pending) for s in self.series.values() if (pending := s.pending()) is not None]
        if not waiting:
            return
        on_device = [t for _, pair in waiting for t in pair if isinstance(t, Tensor)]
        read = torch.stack(on_device).tolist() if len(on_device) > 1 else [on_device[0].item()]
        numbers = iter(read)
        for series, (_, weight) in waiting:
            series.settle(next(numbers), next(numbers) if isinstance(weight, Tensor) else weight)


def check(name: str, value: object, reduce: str) -> None:
    """Refuse what cannot be logged as a scalar.

    Raises:
        StepError: the value is no scalar, or `reduce` is no way to reduce.
    """
    if reduce not in _MERGE:
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
