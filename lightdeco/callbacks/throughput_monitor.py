"""How fast training is: samples, tokens, steps and FLOPs per second, with the records of training."""

import math
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from lightdeco.data import batch_size_of
from lightdeco.errors import DataError, SettingsError, nearest, wrong_argument
from lightdeco.marks import on_train_batch_end, on_train_start, on_validation_end, on_validation_start
from lightdeco.steps import is_scalar

if TYPE_CHECKING:
    from lightdeco.run import Run

_wrong = partial(wrong_argument, "ThroughputMonitor")

#: Dense FLOP/s of a device, by a pattern of the name that torch gives it: (16 bits, tf32, float32), in 1e12; None: not
#: supported. The makers' numbers, without sparsity.
_PEAKS: Final[dict[str, tuple[float, float | None, float]]] = {
    r"B200$": (2250, 1125, 75),
    r"H200$": (989.4, 494.7, 66.9),
    r"H100 80GB HBM3$": (989.4, 494.7, 66.9),
    r"H100 PCIe$": (756, 378, 51.2),
    r"A100[ -].*": (312, 156, 19.5),
    r"L40S$": (362, 183, 91.6),
    r"L4$": (121, 60, 30.3),
    r"A10$": (125, 62.5, 31.2),
    r"A10G$": (70, 35, 31.2),
    r"T4$": (65, None, 8.1),
    r"V100-SXM2.*": (125, None, 15.7),
    r"RTX 4090$": (165.2, 82.6, 82.6),
    r"RTX 3090$": (71, 35.6, 35.6),
}


class _Row(NamedTuple):
    """What was done when a batch ended, and what the batch held."""

    seconds: float
    step: int
    samples: Any
    tokens: Any
    flops: float


class ThroughputMonitor:
    """Logs how fast training was over the last `window` batches, without the time of validations.

    The values join the record that training writes every `log_every_n_steps`, from the second batch on:

    - `throughput/steps_per_s`: updates;
    - `throughput/samples_per_s`: where the number of samples is known;
    - `throughput/tokens_per_s`: with `tokens`;
    - `throughput/flops_per_s`: with `flops`; and `throughput/peak_share`, the share of what the run's device can do at
      the run's precision, 0 to 1, where that is known.

    A step takes from the end of the batch before to the end of this one on the host: loading, transfers and events are
    in it. Nothing waits for the device but the record itself, which does so in every window: windows shorter than
    `log_every_n_steps` may tell how fast the host hands out work. Samples, tokens and FLOPs are those of all processes,
    each taken to do as much as this one.

    Args:
        window: batches over which is averaged, at least 1.
        batch_size: the name under which the number of samples is found; default: "batch_size" in what the step returns,
            or else the first dimension of the batch's first tensor.
        tokens: the name under which the number of tokens is found.
        flops: FLOPs of one batch in training (forward and backward) on one process: a number, or a function of the
            batch.

    A name is looked up in what the step returns, then in the batch. A number, or a tensor of one element, counts as it
    is; a larger tensor, such as token ids, counts its elements as tokens, or its first dimension as samples.

    Raises:
        SettingsError: an argument has a wrong value; or a name is neither in what the step returns nor in the batch.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> quiet = {"log_every_n_steps": 4, "logger": False, "progress_bar": False, "summary": False}
    >>> monitor = ThroughputMonitor(window=2, flops=6 * 4 * 2)
    >>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)] * 4, max_epochs=1, callbacks=[monitor], **quiet)
    >>> round(run.metrics["throughput/samples_per_s"] / run.metrics["throughput/steps_per_s"], 3)
    4.0
    """

    def __init__(
        self,
        window: int = 50,
        batch_size: str | None = None,
        tokens: str | None = None,
        flops: float | Callable[[Any], float] | None = None,
    ) -> None:
        if type(window) is not int or window < 1:
            raise _wrong("window", window, "an integer of at least 1")
        for argument, name in (("batch_size", batch_size), ("tokens", tokens)):
            if name is not None and (not isinstance(name, str) or not name):
                raise _wrong(argument, name, "a name in what the step returns or in the batch, None")
        if flops is not None and not callable(flops) and not _is_count(flops):
            raise _wrong("flops", flops, "a finite number above 0, a function of the batch that returns one, None")
        self.window, self.batch_size, self.tokens, self.flops = window, batch_size, tokens, flops
        self._rows: deque[_Row] = deque(maxlen=window + 1)
        self._left_out = self._paused_at = 0.0
        self._step = 0
        self._peak: float | None = None

    @on_train_start
    def _start(self, run: "Run") -> None:
        self._rows.clear()
        self._left_out, self._step = 0.0, run.global_step
        self._peak = peak_flops(run.device, run.settings.precision)

    @on_validation_start
    def _pause(self) -> None:
        self._paused_at = perf_counter()

    @on_validation_end
    def _resume(self) -> None:
        self._left_out += perf_counter() - self._paused_at

    @on_train_batch_end
    def _batch_end(self, batch: Any, outputs: Any, run: "Run") -> None:
        step = run.global_step
        self._rows.append(
            _Row(
                perf_counter() - self._left_out,
                step,
                self._samples(batch, outputs),
                None if self.tokens is None else _found("tokens", self.tokens, outputs, batch, Tensor.numel),
                self._flops_of(batch),
            )
        )
        if step != self._step and step % run.settings.log_every_n_steps == 0:
            self._log(run)
        self._step = step

    def _samples(self, batch: Any, outputs: Any) -> Any:
        if self.batch_size is not None:
            return _found("batch_size", self.batch_size, outputs, batch, len)
        given = outputs.get("batch_size") if isinstance(outputs, Mapping) else None
        return batch_size_of(batch) if given is None else given

    def _flops_of(self, batch: Any) -> float:
        if not callable(self.flops):
            return self.flops or 0.0
        flops = self.flops(batch)
        if not _is_count(flops):
            raise DataError(f"ThroughputMonitor(flops=…) returned {flops!r} for a batch; allowed: a number above 0")
        return float(flops)

    def _log(self, run: "Run") -> None:
        first, *rows = self._rows
        seconds = rows[-1].seconds - first.seconds if rows else 0.0
        if seconds <= 0:
            return
        rates: dict[str, Any] = {"steps_per_s": (rows[-1].step - first.step) / seconds}
        for name, counts in (("samples_per_s", [r.samples for r in rows]), ("tokens_per_s", [r.tokens for r in rows])):
            if None not in counts:
                rates[name] = _sum(counts) * (run.world_size / seconds)
        if self.flops is not None:
            flops = sum(row.flops for row in rows) / seconds
            rates["flops_per_s"] = flops * run.world_size
            if self._peak is not None:
                rates["peak_share"] = flops / self._peak
        for name, value in rates.items():
            run.log(f"throughput/{name}", value, on_epoch=False, reduce="last")


def peak_flops(device: torch.device, precision: str) -> float | None:
    """What a device can do at most at a precision of the settings, in FLOP/s; None where that is not known.

    >>> peak_flops(torch.device("cpu"), "32-true")
    """
    if device.type != "cuda":
        return None
    return peak_by_name(torch.cuda.get_device_name(device), precision, bool(torch.backends.cuda.matmul.allow_tf32))


def peak_by_name(name: str, precision: str, tf32: bool = False) -> float | None:
    """`peak_flops` by the name that torch gives a device; `tf32`: whether float32 products are computed so.

    >>> peak_by_name("NVIDIA H200", "bf16-mixed")
    989400000000000.0
    """
    rows = [row for pattern, row in _PEAKS.items() if re.search(rf"\b{pattern}", name)]
    if not rows or "MIG" in name:
        return None
    half, tensor32, single = rows[0]
    if precision.startswith(("16-", "bf16", "fp16")):
        return half * 1e12
    if precision == "32-true":
        return (tensor32 if tf32 and tensor32 is not None else single) * 1e12
    return None


def _found(argument: str, name: str, outputs: Any, batch: Any, count: Callable[[Tensor], int]) -> Any:
    """The count under a name in what a step returned, or else in the batch."""
    for holder in (outputs, batch):
        if isinstance(holder, Mapping) and name in holder:
            value = holder[name]
            if is_scalar(value):
                return _copied(value) if isinstance(value, Tensor) else value
            if isinstance(value, Tensor) and value.dim() > 0:
                return count(value)
            raise SettingsError(
                f"ThroughputMonitor({argument}={name!r}): the value there is a {type(value).__name__}; allowed: a "
                "number or a tensor"
            )
    known = [str(key) for holder in (outputs, batch) if isinstance(holder, Mapping) for key in holder]
    raise SettingsError(
        f"ThroughputMonitor({argument}={name!r}) is neither in what the step returned nor in the batch; names there: "
        f"{', '.join(known) or 'none'}{nearest(name, known)}"
    )


def _copied(value: Tensor) -> Any:
    """A tensor of one element as it is now: a number where that does not wait for the device."""
    return value.item() if value.device.type == "cpu" else value.detach().clone()


def _sum(counts: Sequence[Any]) -> Any:
    """The sum of numbers and tensors of one element; a tensor, not waited for, where there is one."""
    tensors = [count.reshape(()) for count in counts if isinstance(count, Tensor)]
    numbers = sum(count for count in counts if not isinstance(count, Tensor))
    return torch.stack(tensors).sum() + numbers if tensors else numbers


def _is_count(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
