"""The progress bar: drawn at most a few times a second on a terminal, a few plain lines elsewhere."""

import math
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from lightdeco.errors import SettingsError
from lightdeco.marks import (
    on_exception,
    on_fit_end,
    on_fit_start,
    on_predict_batch_end,
    on_predict_end,
    on_predict_start,
    on_test_batch_end,
    on_test_end,
    on_test_start,
    on_train_batch_end,
    on_train_epoch_end,
    on_train_epoch_start,
    on_validation_batch_end,
    on_validation_end,
    on_validation_start,
    teardown,
)

from .progress_display import Display, display

if TYPE_CHECKING:
    from lightdeco.run import Run

_TITLES = {"sanity": "sanity check", "val": "validate"}


class ProgressBar:
    """Shows how far a run is: epoch, batches, rate, time left, and the values logged with `prog_bar=True`.

    On a terminal, one bar for training that starts anew each epoch, and one below it during an evaluation. Elsewhere
    (a file, a pipe, a notebook) plain lines: one per epoch, ever fewer in a long run, about 20 in all. Colours follow
    `NO_COLOR`. Only the main process shows anything, and of two nested verbs only the outer one.

    Args:
        refresh_s: seconds between two drawings at least, > 0. A batch without one costs less than a microsecond.

    Raises:
        SettingsError: `refresh_s` is no positive number.

    >>> ProgressBar(refresh_s=1.0).refresh_s
    1.0
    """

    # The bar that is on the screen: a verb inside a verb must not draw over it.
    _shown: ClassVar["ProgressBar | None"] = None

    def __init__(self, refresh_s: float = 0.4) -> None:
        if type(refresh_s) not in (int, float) or not refresh_s > 0:
            raise SettingsError(f"ProgressBar(refresh_s={refresh_s!r}); allowed: a number of seconds above 0")
        self.refresh_s = refresh_s
        self._display: Display | None = None
        self._in_fit = False
        self._due = math.inf  # when the next batch may draw
        self._started = self._epoch_started = 0.0
        self._epoch = self._first_step = self._done = self._evaluated = 0

    @on_fit_start
    def _fit_start(self, run: "Run") -> None:
        self._in_fit = True
        self._open(run)

    @on_train_epoch_start
    def _epoch_start(self, run: "Run") -> None:
        self._epoch, self._first_step, self._epoch_started = run.epoch + 1, run.global_step, perf_counter()

    @on_train_batch_end
    def _train_batch(self, run: "Run") -> None:
        if perf_counter() >= self._due and self._display is not None:
            self._done = run.batch_idx + 1
            self._draw(run, self._display)

    @on_train_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if self._display is not None:
            seconds, steps = perf_counter() - self._epoch_started, run.global_step - self._first_step
            rate = f"{seconds:.1f} s  {steps / seconds:.4g} steps/s"
            self._display.epoch_line(
                f"{self._title(run)}  step {run.global_step}  {rate}  {_values(_shown_values(run))}"
            )

    @on_validation_start
    @on_test_start
    @on_predict_start
    def _evaluation_start(self, run: "Run") -> None:
        self._done, self._evaluated = run.batch_idx + 1, 0
        self._open(run)

    @on_validation_batch_end
    @on_test_batch_end
    @on_predict_batch_end
    def _evaluation_batch(self, run: "Run") -> None:
        self._evaluated += 1
        if perf_counter() >= self._due and self._display is not None:
            self._display.evaluate(_TITLES.get(run.stage, run.stage), self._evaluated, run.num_eval_batches)
            self._draw(run, self._display)

    @on_validation_end
    @on_test_end
    @on_predict_end
    def _evaluation_end(self, run: "Run") -> None:
        if self._display is not None:
            self._display.end_evaluation()
            if not self._in_fit:
                title = _TITLES.get(run.stage, run.stage)
                seconds = perf_counter() - self._started
                count = _count(self._evaluated, "batch", "batches")
                self._close(f"{title}: {count}, {seconds:.1f} s  {_values(run.metrics)}".rstrip())

    @on_fit_end
    def _fit_end(self, run: "Run") -> None:
        seconds = perf_counter() - self._started
        reason = f"stopped ({run.stop_reason})" if run.stop_reason else "stopped"
        epochs, steps = _count(run.epoch, "epoch", "epochs"), _count(run.global_step, "step", "steps")
        where = f"; {run.dir}" if run.has_dir else ""
        last = f"{reason} after {epochs}, {steps}, {seconds:.1f} s{where}"
        self._close(last, _values(_shown_values(run)))

    @on_exception
    def _fail(self, run: "Run", exception: BaseException) -> None:
        where = f"; {run.dir}" if run.has_dir else ""
        self._close(f"stopped by {type(exception).__name__} in epoch {run.epoch}, step {run.global_step}{where}")

    # A generator of `predict` that is left half-way.
    @teardown
    def _abandon(self) -> None:
        self._close()

    def _draw(self, run: "Run", display: Display) -> None:
        if self._epoch:
            display.train(self._title(run), self._done, run.num_train_batches, _values(_shown_values(run)))
        display.draw()
        self._due = perf_counter() + self.refresh_s

    def _open(self, run: "Run") -> None:
        if ProgressBar._shown is not None or not run.is_main:
            return
        ProgressBar._shown = self
        self._display = display(self.refresh_s)
        self._started = perf_counter()
        self._due = 0.0 if self._display.refresh_s < math.inf else math.inf

    def _close(self, last: str = "", values: str = "") -> None:
        if self._display is not None:
            self._display.close(last, values)
            self._display, ProgressBar._shown = None, None
        self._due, self._in_fit, self._epoch = math.inf, False, 0

    def _title(self, run: "Run") -> str:
        return f"epoch {self._epoch}" + (f"/{run.max_epochs}" if run.max_epochs is not None else "")


def _shown_values(run: "Run") -> dict[str, float]:
    """What was logged for the bar, and the validation's loss."""
    return run.prog_bar | {name: run.metrics[name] for name in ("val/loss",) if name in run.metrics}


def _values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items())


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
