"""Loss spikes: find, name, and if wanted end a run at, values far above the last ones."""

import math
from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import torch

from lightdeco.errors import SettingsError, nearest, warn
from lightdeco.marks import (
    on_fit_start,
    on_train_batch_end,
    on_train_end,
    on_train_epoch_end,
    on_train_start,
    on_validation_end,
    teardown,
)
from lightdeco.steps import is_scalar

if TYPE_CHECKING:
    from lightdeco.run import Run

_ACTIONS: Final = ("warn", "stop")


class Spike(NamedTuple):
    """A value far above those before it."""

    step: int
    """`global_step`."""
    value: float
    mean: float
    """Of the values before it; `std` likewise."""
    std: float


class SpikeDetection:
    """Warns of values of a metric that lie far above the last ones, or ends the run at one.

    A spike is more than `threshold` standard deviations above the mean of the last `window` values, and more than
    `min_rise` of the mean; so is a value that is NaN or infinite. It enters the window as the largest value that would
    have been none: spikes do not hide each other, and a level that stays becomes the usual one.

    What the step returns ("train/loss", "train/acc", "train/gen/loss") is looked at batch by batch, whatever is
    recorded; any other metric record by record. From a GPU the values are read with the next record: nothing waits for
    it before. One warning tells of all spikes since the last record, and `<monitor>_spikes` is logged: their number.

    A second `fit` with the same object starts anew, unless `load_state_dict` was called before it.

    Args:
        monitor: the name of the metric, as in `run.metrics`; lower is better.
        window: values to compare with, at least 2.
        threshold: standard deviations above their mean, greater than 0.
        min_rise: share of the mean by which a spike must be above it, at least 0: 0.1 is a tenth.
        warmup: values before the first that may be a spike, from 2 to `window`.
        action: "warn", or "stop": also end the run; `run.stop_reason` says why.

    Raises:
        SettingsError: an argument has a wrong value.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).mean() * 0 + batch.mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> batches = [torch.full((4, 2), value) for value in [1.0, 1.2, 0.9, 1.1, 0.8, 9.0, 1.0]]
    >>> spikes = SpikeDetection(warmup=5, action="stop")
    >>> quiet = {"logger": False, "progress_bar": False, "summary": False}
    >>> import warnings
    >>> with warnings.catch_warnings():
    ...     warnings.simplefilter("ignore")
    ...     run = ld.fit(Net(2, 1), batches, max_epochs=1, callbacks=[spikes], **quiet)
    >>> print(run.stop_reason)
    train/loss was 9 at step 6, and 1 ± 0.141 before
    """

    def __init__(
        self,
        monitor: str = "train/loss",
        window: int = 100,
        threshold: float = 6.0,
        min_rise: float = 0.1,
        warmup: int = 20,
        action: Literal["warn", "stop"] = "warn",
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise _wrong("monitor", monitor, "the name of a metric, such as 'train/loss'")
        if type(window) is not int or window < 2:
            raise _wrong("window", window, "an integer of at least 2")
        if not _is_number(threshold) or threshold <= 0:
            raise _wrong("threshold", threshold, "a number greater than 0")
        if not _is_number(min_rise) or min_rise < 0:
            raise _wrong("min_rise", min_rise, "a number of at least 0")
        if type(warmup) is not int or not 2 <= warmup <= window:
            raise _wrong("warmup", warmup, f"an integer from 2 to window, which is {window}")
        if action not in _ACTIONS:
            raise _wrong("action", action, "'warn', 'stop'" + nearest(str(action), _ACTIONS))
        self.monitor, self.window, self.threshold, self.min_rise = monitor, window, threshold, min_rise
        self.warmup, self.action = warmup, action
        #: The spikes so far.
        self.spikes: list[Spike] = []
        self._values = deque[float](maxlen=window)
        self._waiting: list[tuple[int, torch.Tensor]] = []  # (step, value) on a device
        self._told = self._logged = 0  # of `spikes`
        self._records = 0  # of the history that were looked at
        self._by_batch: bool | None = None  # None: not known yet
        self._any = self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The window and the spikes, as plain values."""
        self._read()
        return {"values": list(self._values), "spikes": [list(spike) for spike in self.spikes]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned: the next `fit` goes on from there."""
        self._forget()
        self._values.extend(state["values"])
        self.spikes = [Spike(*spike) for spike in state["spikes"]]
        self._told = self._logged = len(self.spikes)
        self._loaded = True

    def _forget(self) -> None:
        self._values.clear()
        self.spikes, self._waiting, self._told, self._logged = [], [], 0, 0

    # ---- events ------------------------------------------------------------------------------------------------------

    @on_fit_start
    def _fit_start(self) -> None:
        if not self._loaded:
            self._forget()

    @on_train_start
    def _train_start(self, run: "Run") -> None:
        self._records, self._by_batch, self._any = len(run.history), None, False

    @on_train_batch_end
    def _batch_end(self, run: "Run", outputs: Any) -> None:
        if self._by_batch is not False:
            found = _returned(outputs, self.monitor.removeprefix("train/").split("/"))
            if self._by_batch is None:
                self._by_batch = bool(found) and self.monitor.startswith("train/")
            if self._by_batch:
                self._take(run, found)
        self._look(run)
        if run.global_step % run.settings.log_every_n_steps == 0:
            self._read()
            run.log(f"{self.monitor}_spikes", len(self.spikes) - self._logged, on_epoch=False, reduce="sum")
            self._logged = len(self.spikes)
        self._tell(run)

    @on_validation_end
    @on_train_epoch_end
    @on_train_end
    def _boundary(self, run: "Run") -> None:
        if run.stage != "sanity" and run.verb == "fit":
            self._read()
            self._look(run)
            self._tell(run)

    @on_train_end
    def _train_end(self, run: "Run") -> None:
        if not self._any:
            names = ", ".join(sorted(run.metrics)) or "none"
            warn(
                f"SpikeDetection(monitor={self.monitor!r}) had no effect: there was no such metric; recorded: "
                f"{names}{nearest(self.monitor, run.metrics)}"
            )

    @teardown
    def _over(self, stage: str) -> None:
        self._loaded = self._loaded and stage != "fit"

    # ---- values ------------------------------------------------------------------------------------------------------

    def _take(self, run: "Run", found: list[Any]) -> None:
        for value in found:
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                self._waiting.append((run.global_step, value.detach().reshape(()).clone()))
            else:
                self._judge(run.global_step, float(value.detach() if isinstance(value, torch.Tensor) else value))

    def _read(self) -> None:
        """Judge what waits on the device, all at once; called where the loop is about to wait for it anyway."""
        if self._waiting:
            values = torch.stack([value.to(torch.float32) for _, value in self._waiting]).tolist()
            steps, self._waiting = [step for step, _ in self._waiting], []
            for step, value in zip(steps, values, strict=True):
                self._judge(step, value)

    def _look(self, run: "Run") -> None:
        """Judge what was recorded since the last look, where the metric is looked at record by record."""
        if self._by_batch is False and len(run.history) > self._records:
            for record in run.history[self._records :]:
                if self.monitor in record:
                    self._judge(record["step"], record[self.monitor])
            self._records = len(run.history)

    def _judge(self, step: int, value: float) -> None:
        self._any = True
        values = self._values
        if len(values) < self.warmup:
            if math.isfinite(value):
                values.append(value)
            return
        mean = sum(values) / len(values)
        std = math.sqrt(sum([(each - mean) ** 2 for each in values]) / len(values))
        limit = mean + max(self.threshold * std, self.min_rise * abs(mean))
        if not value <= limit or math.isinf(value):  # NaN too
            self.spikes.append(Spike(step, value, mean, std))
            value = limit
        values.append(value)

    def _tell(self, run: "Run") -> None:
        new = self.spikes[self._told :]
        if not new:
            return
        self._told = len(self.spikes)
        first, more = new[0], f"; {len(new) - 1} more since then" if len(new) > 1 else ""
        text = (
            f"{self.monitor} was {first.value:.6g} at step {first.step}, and {first.mean:.3g} ± {first.std:.3g} before"
        )
        warn(f"a spike: {text}{more}", everywhere=True)
        if self.action == "stop" and run.stop_reason is None:  # somebody else may have asked, or training be over
            run.should_stop, run.stop_reason = True, text


def _returned(outputs: Any, path: list[str]) -> list[Any]:
    """The scalars that a step returned under a name; several where a batch has parts."""
    if isinstance(outputs, list):
        return [value for each in outputs for value in _returned(each, path)]
    if isinstance(outputs, Mapping):
        return _returned(outputs.get(path[0]), path[1:]) if path else []
    return [outputs] if path in ([], ["loss"]) and is_scalar(outputs) else []


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _wrong(name: str, value: object, allowed: str) -> SettingsError:
    return SettingsError(f"SpikeDetection({name}={value!r}); allowed: {allowed}")
