"""Weighted means: values stay on the device and are read when they are recorded.

From the CPU a value is read at once, since there is nothing to wait for; on another device it is copied into a buffer
there, which costs one small kernel; on XLA, where each place in a buffer would be a program of its own, copies are kept
one by one. Nothing waits for the device but `Means.window`, `Means.epoch` and `Means.first_bad`, which read all metrics
at once; sums are made on the host, in float64.
"""

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from itertools import islice
from operator import add, mul
from typing import Any, Final, Literal, TypeVar

import torch
from torch import Tensor

from . import metric_objects, xla
from .errors import StepError
from .group import Group
from .scalars import FOLD, check, fold
from .steps import is_metric, is_scalar

Scope = Literal["window", "epoch"]
T = TypeVar("T")

#: How it is reduced, the total, and its weight.
Total = tuple[str, float, float]

_CAPACITY: Final = 64  # values in one buffer

_item: Final = Tensor.item  # looked up once: it is on the way of every step


def waits(device: torch.device) -> bool:
    """Whether to read a value from the device is to wait until its work is done."""
    return device.type != "cpu"


def _dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _copied(weight: Tensor) -> Any:
    """A tensor of one element as it is now: a number where that does not wait."""
    return weight.detach().clone() if waits(weight.device) else _item(weight)


class Series:
    """One metric of one stage: the values since the last read, and what was read of the earlier ones."""

    __slots__ = (
        "_bad", "_buffer", "_device", "_kept", "_seen", "_slots", "_totals", "_watched", "finite_only",
        "on_epoch", "on_step", "reduce", "values", "weights",
    )  # fmt: skip

    def __init__(self, device: torch.device, reduce: str, on_step: bool, on_epoch: bool, watched: bool) -> None:
        self.reduce, self.on_step, self.on_epoch, self._watched = reduce, on_step, on_epoch, watched
        self._device = device if waits(device) else None
        #: Leave values that are NaN or infinite out of the mean: their updates were skipped.
        self.finite_only = False
        #: The values since the last read, copies on the device on XLA; those of another device are in `buffers`.
        self.values: list[Any] = []
        #: Their weights, numbers or tensors of one element.
        self.weights: list[Any] = []
        self._slots: list[Tensor] = []
        self._kept: list[Tensor] = []  # full buffers since the last read
        self._totals: dict[str, tuple[float, float]] = {}  # by scope, "window" and "epoch"
        self._seen = 0  # values read since the last question for a bad one
        self._bad: int | None = None

    def add(self, value: Any, weight: Any) -> None:
        """Copy a scalar (a number or a tensor of one element, on any device) with its weight. Does not wait."""
        if self._device is None:
            self.values.append(float(_item(value) if isinstance(value, Tensor) else value))
        else:
            self._copy(value, self._device)
        self.weights.append(_copied(weight) if isinstance(weight, Tensor) else weight)

    def rewind(self, count: int) -> None:
        """Forget what was added since there were `count` values; none may have been read meanwhile."""
        del self.values[count:], self.weights[count:]
        while len(self._kept) > max(0, count - 1) // _CAPACITY:
            self._buffer.copy_(self._kept.pop())

    def _copy(self, value: Any, device: torch.device) -> None:
        """Copy a value into the buffer on the device."""
        if device.type == "xla":
            self.values.append(_copied(value) if isinstance(value, Tensor) else value)
            return
        n = len(self.weights) % _CAPACITY
        if not self._slots:
            with torch.inference_mode(False):  # begun in inference mode, it could not be written outside of it
                self._buffer = torch.zeros(_CAPACITY, dtype=_dtype(device), device=device)
                self._slots = list(self._buffer.unbind())
        elif n == 0 and self.weights:
            self._kept.append(self._buffer.clone())
        if isinstance(value, Tensor) and value.device.type == device.type:
            # .data: only read here, and cheaper than .detach(), which makes a view that autograd tracks
            self._slots[n].copy_(value.data if value.dim() == 0 else value.detach().reshape(()))
        else:  # read from where it is; to copy it would wait for the device
            self._slots[n].fill_(float(_item(value) if isinstance(value, Tensor) else value))

    def buffers(self) -> list[Tensor]:
        """What waits on the device: vectors of 64 values, the last one filled as far as there are weights."""
        return [*self._kept, self._buffer] if self._slots and self.weights else []

    def settle(self, values: list[float], weights: list[float]) -> None:
        """Take over what waited as it was read, and begin anew."""
        seen, self._seen = self._seen, self._seen + len(values)
        self.values, self.weights, self._kept = [], [], []
        if self._watched and not math.isfinite(sum(values)):
            good = [i for i, value in enumerate(values) if math.isfinite(value)]
            if self._bad is None and len(good) < len(values):
                self._bad = seen + next(i for i, value in enumerate(values) if not math.isfinite(value))
            if self.finite_only:
                values, weights = [values[i] for i in good], [weights[i] for i in good]
        if not values:
            return
        by, amounts = FOLD[self.reduce], list(map(mul, values, weights)) if self.reduce == "mean" else values
        for scope in ("window", "epoch"):
            old, weight = self._totals.get(scope, (None, 0))
            total = reduce(by, amounts) if old is None else reduce(by, amounts, old)
            self._totals[scope] = total, weights[-1] if self.reduce == "last" else reduce(add, weights, weight)

    def take(self, scope: Scope) -> Total | None:
        """How it is reduced, the total since the last take of this scope and its weight; begin anew."""
        total = self._totals.pop(scope, None)
        return None if total is None else (self.reduce, *total)

    def state_dict(self) -> dict[str, Any]:
        """How it is reduced, and the totals of what was read."""
        totals = {scope: list(total) for scope, total in self._totals.items()}
        return {"reduce": self.reduce, "on_step": self.on_step, "on_epoch": self.on_epoch, "totals": totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the totals that `state_dict` returned."""
        self._totals = {scope: (total, weight) for scope, (total, weight) in state["totals"].items()}

    def first_bad(self) -> int | None:
        """The index of the first value since the last call that was NaN or infinite, of those that were read."""
        bad, self._bad, self._seen = self._bad, None, 0
        return bad


def _value(how: str, total: float, weight: float) -> float:
    if how != "mean":
        return total
    return total / weight if weight else math.nan


def _present(taken: Mapping[str, Total | None]) -> dict[str, Total]:
    return {name: total for name, total in taken.items() if total is not None}


def _merged(everywhere: Sequence[Mapping[str, Total]]) -> dict[str, float]:
    """The values of what was taken on all processes, by name; a name may be there on some of them only."""
    merged: dict[str, Total] = {}
    for name, (how, total, weight) in (item for totals in everywhere for item in totals.items()):
        old = merged.get(name)
        merged[name] = (how, total, weight) if old is None else (how, *fold(how, old[1:], (total, weight)))
    return {name: _value(*total) for name, total in merged.items()}


class Means:
    """All metrics of one stage, by name; `watch` names the one that `first_bad` can be asked about.

    `group`: the processes of the run; the means are those of all samples, on each of them.
    """

    def __init__(
        self,
        device: torch.device,
        watch: str | None = None,
        elsewhere: "Means | None" = None,
        group: Group | None = None,
    ) -> None:
        self._device, self._watch, self._group = device, watch, group or Group()
        self.series: dict[str, Series] = {}
        if watch is not None:
            self.series[watch] = Series(device, "mean", True, True, watched=True)
        #: torchmetrics objects that were logged since the last epoch's record.
        self.metrics: dict[str, Any] = {}
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
                if self._elsewhere is not None and any(value is other for other in self._elsewhere.metrics.values()):
                    raise StepError(
                        f"{name!r} is a {type(value).__name__} that training is using too, in the middle of its epoch; "
                        "make one object for each stage"
                    )
                self.metrics[name] = value
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
        return self.window_and(None)[0]

    def window_and(self, note: T) -> tuple[dict[str, float], list[T]]:
        """`window`, and what each process says beside it, in one message."""
        self.settle()
        taken = {name: s.take("window") for name, s in self.series.items() if s.on_step}
        everywhere = self._group.gather((_present(taken), note))
        return _merged([totals for totals, _ in everywhere]), [each for _, each in everywhere]

    def epoch(self, suffix: str = "") -> dict[str, float]:
        """The means since the last call, of what is recorded by epoch; torchmetrics objects are computed and reset.

        Names of what is also recorded by step get the suffix. Waits for the device.
        """
        self.settle()
        taken = {n + suffix if s.on_step else n: s.take("epoch") for n, s in self.series.items() if s.on_epoch}
        everywhere = self._group.gather((_present(taken), list(self.metrics)))
        values = _merged([totals for totals, _ in everywhere])
        values |= metric_objects.values(self.metrics, [names for _, names in everywhere], self._group)
        self.metrics.clear()
        return values

    def forget(self) -> None:
        """Reset torchmetrics objects without a record, at the end of an epoch that was cut short."""
        for metric in self.metrics.values():
            metric.reset()
        self.metrics.clear()

    def state_dict(self) -> dict[str, Any]:
        """What was logged since the last records, as plain values; torchmetrics objects keep their own. Waits."""
        self.settle()
        return {name: series.state_dict() for name, series in self.series.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        for name, values in state.items():
            if name not in self.series:
                self.series[name] = Series(self._device, values["reduce"], values["on_step"], values["on_epoch"], False)
            self.series[name].load_state_dict(values)

    def first_bad(self) -> int | None:
        """The index of the first NaN or infinite value of the watched metric since the last call. Waits."""
        self.settle()
        return None if self._watch is None else self.series[self._watch].first_bad()

    def settle(self) -> None:
        """Read everything that waits: the values of all metrics at once, and the weights that are tensors."""
        waiting = [series for series in self.series.values() if series.weights]
        if self._device.type == "xla":
            read_xla = iter(xla.numbers([v for s in waiting for v in (*s.values, *s.weights)]))
            for s in waiting:
                count = len(s.weights)
                s.settle(list(islice(read_xla, count)), list(islice(read_xla, count)))
            return
        buffers = [buffer for series in waiting for buffer in series.buffers()]
        rows = iter(torch.stack(buffers).tolist() if len(buffers) > 1 else [b.tolist() for b in buffers])
        tensors = [w.reshape(()).to(_dtype(w.device)) for s in waiting for w in s.weights if isinstance(w, Tensor)]
        read = iter(torch.stack(tensors).tolist() if tensors else ())
        for series in waiting:
            weights = (
                [next(read) if isinstance(w, Tensor) else w for w in series.weights] if tensors else series.weights
            )
            buffered = [value for _ in series.buffers() for value in next(rows)]
            series.settle(buffered[: len(weights)] if buffered else series.values, weights)
