"""Early stopping: end a run when a metric no longer improves."""

import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal

from lightdeco.errors import SettingsError, nearest, warn, wrong_argument
from lightdeco.marks import (
    on_fit_start,
    on_train_end,
    on_train_epoch_end,
    on_validation_end,
    on_validation_start,
    teardown,
)

if TYPE_CHECKING:
    from lightdeco.run import Run

_MODES: Final = ("min", "max")
_wrong = partial(wrong_argument, "EarlyStopping")


class EarlyStopping:
    """Ends a run when a metric has not improved for `patience` validations.

    A metric that validation records is looked at after each validation, also where an epoch has several; the sanity
    check is not one. Any other metric is looked at when a training epoch ends. A validation that does not record the
    metric does not count. `min_epochs` and `min_steps` hold the end off; improving meanwhile takes it back.
    `run.stop_reason` says what happened.

    A second `fit` with the same object starts anew, unless `load_state_dict` was called before it: then it goes on, and
    a run that was ended is ended again.

    Args:
        monitor: the name of the metric, as in `run.metrics`.
        mode: "min" or "max": what is better.
        patience: validations without improvement that end the run, at least 1.
        min_delta: how much better than the best a value must be to count as improved, at least 0.
        check_finite: end the run at a value that is NaN or infinite; otherwise NaN counts as not improved.
        stopping_threshold: end the run once the metric is as good as this or better.
        divergence_threshold: end the run once the metric is worse than this.

    Raises:
        SettingsError: an argument has a wrong value; or, in the run, the metric was not recorded: a name that begins
            with "val/" after the first validation, any other at the end of the first epoch.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     @ld.validation_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> data = ([torch.ones(4, 2)], [torch.ones(4, 2)])
    >>> early = EarlyStopping(stopping_threshold=1e-3)
    >>> run = ld.fit(Net(2, 1), data, max_epochs=99, callbacks=[early], logger=False, progress_bar=False, summary=False)
    >>> print(run.stop_reason.partition(" has reached")[0])
    early stopping: val/loss
    """

    def __init__(
        self,
        monitor: str = "val/loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
    ) -> None:
        if not isinstance(monitor, str) or not monitor:
            raise _wrong("monitor", monitor, "the name of a metric, such as 'val/loss'")
        if mode not in _MODES:
            raise _wrong("mode", mode, "'min', 'max'" + nearest(str(mode), _MODES))
        if type(patience) is not int or patience < 1:
            raise _wrong("patience", patience, "an integer of at least 1")
        if not _is_finite(min_delta) or min_delta < 0:
            raise _wrong("min_delta", min_delta, "a finite number of at least 0")
        if not isinstance(check_finite, bool):
            raise _wrong("check_finite", check_finite, "True, False")
        for name, value in (("stopping_threshold", stopping_threshold), ("divergence_threshold", divergence_threshold)):
            if value is not None and not _is_finite(value):
                raise _wrong(name, value, "a finite number, None")
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self.check_finite = check_finite
        self.stopping_threshold, self.divergence_threshold = stopping_threshold, divergence_threshold
        self._sign = 1 if mode == "min" else -1
        self._first_record = 0  # of the present validation
        #: The best value so far; None before the first.
        self.best: float | None = None
        #: How many times in a row the metric has not improved.
        self.waited = 0
        self._unit: str | None = None  # "validation" or "epoch", whichever the metric comes from
        self._asked: str | None = None  # the reason for which this object has asked to stop
        self._loaded = False

    def state_dict(self) -> dict[str, Any]:
        """The best value, how long it was waited for a better one, and what was decided, as plain values."""
        return {"best": self.best, "waited": self.waited, "unit": self._unit, "asked": self._asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned: the next `fit` goes on from there."""
        self.best, self.waited = state["best"], state["waited"]
        self._unit, self._asked = state["unit"], state["asked"]
        self._loaded = True

    def _forget(self) -> None:
        self.best, self.waited, self._unit, self._asked = None, 0, None, None

    @on_fit_start
    def _fit_start(self, run: "Run") -> None:
        if not self._loaded:
            self._forget()
        elif self._asked is not None:
            run.should_stop, run.stop_reason = True, self._asked

    @teardown
    def _fit_over(self, stage: str) -> None:
        self._loaded = self._loaded and stage != "fit"

    @on_validation_start
    def _validation_start(self, run: "Run") -> None:
        self._first_record = len(run.history)

    @on_validation_end
    def _validation_end(self, run: "Run") -> None:
        if run.verb != "fit" or run.stage == "sanity" or self._unit == "epoch":
            return
        for record in run.history[self._first_record :]:
            if self.monitor in record:
                self._unit = "validation"
                self._judge(record[self.monitor], run)
                return
        if self._unit is None and self.monitor.startswith("val/"):
            raise self._unknown(run)

    @on_train_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if self._unit == "validation":
            return
        # Until a validation was due, a metric may still turn out to come from there.
        due = (run.epoch + 1) % run.settings.check_val_every_n_epoch == 0
        if not due and not self.monitor.startswith("train/"):
            return
        values = run.metrics | (run.collected or {})
        if self.monitor not in values:
            raise self._unknown(run)
        self._unit = "epoch"
        self._judge(values[self.monitor], run)

    @on_train_end
    def _train_end(self, run: "Run") -> None:
        if self._unit is None:
            warn(
                f"EarlyStopping(monitor={self.monitor!r}) had no effect: the run ended before a validation or an epoch "
                "that records it"
            )

    def _judge(self, value: float, run: "Run") -> None:
        """Count a new value of the metric, and stop the run if that is enough."""
        reason = self._reason(value)
        if run.should_stop and run.stop_reason not in (None, self._asked):
            return  # somebody else has asked to stop, and said why
        if reason is not None:
            self._asked = f"early stopping: {self.monitor} {reason}"
            run.should_stop, run.stop_reason = True, self._asked
        elif self._asked is not None and run.stop_reason == self._asked:
            run.should_stop, run.stop_reason, self._asked = False, None, None

    def _reason(self, value: float) -> str | None:
        """Why to stop at this value, or None."""
        if self.check_finite and not math.isfinite(value):
            return f"is {value}"
        sign = self._sign
        if not math.isnan(value) and (self.best is None or sign * value < sign * self.best - self.min_delta):
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        if self.stopping_threshold is not None and sign * value <= sign * self.stopping_threshold:
            return f"has reached {value:.6g}, the stopping_threshold is {self.stopping_threshold:.6g}"
        if self.divergence_threshold is not None and sign * value > sign * self.divergence_threshold:
            return f"has come to {value:.6g}, the divergence_threshold is {self.divergence_threshold:.6g}"
        if self.waited < self.patience:
            return None
        times = f"{self.waited} {self._unit}{'s' if self.waited > 1 else ''}"
        if self.best is None:
            return f"has been nan for {times}"
        by = f" by more than {self.min_delta:g}" if self.min_delta else ""
        return f"has not improved on {self.best:.6g}{by} for {times}"

    def _unknown(self, run: "Run") -> SettingsError:
        known = run.metrics | (run.collected or {})
        names = ", ".join(sorted(known)) or "none"
        return SettingsError(
            f"EarlyStopping(monitor={self.monitor!r}) was not recorded; recorded: {names}{nearest(self.monitor, known)}"
        )


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
