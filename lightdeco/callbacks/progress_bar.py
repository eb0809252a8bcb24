"""The progress bar: drawn at most a few times a second in a terminal or notebook, a few plain lines elsewhere."""

import math
from collections import deque
from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, ClassVar

from lightdeco.errors import SettingsError, lost
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
from .progress_layout import Bar, clock, speed

if TYPE_CHECKING:
    from lightdeco.run import Run

_TITLES = {"sanity": "sanity check", "val": "validate"}


class ProgressBar:
    """Shows how far a run is: epoch, batches, rate, time left, and the values logged with `prog_bar=True`.

    In a terminal or a notebook, one bar for training that starts anew each epoch, and one below it during an
    evaluation. Elsewhere (a file, a pipe) plain lines: one per epoch, ever fewer in a long run, about 20 in all.
    Colours follow `NO_COLOR`. Only the main process shows anything, and of two nested verbs only the outer one.

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
        self._due = math.inf  # when the next batch may draw
        self._forget()

    def _forget(self) -> None:
        self._in_fit = False
        self._started = perf_counter()
        self._share: float | None = None  # of the whole run, when it started: not 0 where it was resumed
        self._epoch_started: float | None = None
        self._epoch_first_step = 0
        self._evaluation = ""  # its title while one runs
        self._evaluated = 0
        self._evaluation_started = self._evaluating_s = 0.0
        self._train_rate, self._evaluation_rate = _Rate(), _Rate()

    # ---- training ----------------------------------------------------------------------------------------------------

    @on_fit_start
    def _fit_start(self, run: "Run") -> None:
        self._open(run)
        self._in_fit, self._share = True, _share(run)

    @on_train_epoch_start
    def _epoch_start(self, run: "Run") -> None:
        self._epoch_started, self._epoch_first_step = perf_counter(), run.global_step

    @on_train_batch_end
    def _train_batch(self, run: "Run") -> None:
        if perf_counter() >= self._due and self._display is not None:
            self._draw(run, self._display)

    @on_train_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if self._display is not None and self._epoch_started is not None:
            seconds, steps = perf_counter() - self._epoch_started, run.global_step - self._epoch_first_step
            rate = speed(steps / seconds, "steps/s", "s/step")
            facts = [_epoch(run), f"step {run.global_step:,}", _duration(seconds), rate]
            self._display.epoch_line("  ".join([*facts, *_facts(_shown_values(run))]))

    @on_fit_end
    def _fit_end(self, run: "Run") -> None:
        after = f"{_count(run.epoch, 'epoch')}, {_count(run.global_step, 'step')}"
        last = f"{_ending(run.stop_reason)} after {after} in {_duration(perf_counter() - self._started)}{_files(run)}"
        self._close(last, "  ".join(_facts(_shown_values(run))))

    # ---- evaluation --------------------------------------------------------------------------------------------------

    @on_validation_start
    @on_test_start
    @on_predict_start
    def _evaluation_start(self, run: "Run") -> None:
        self._open(run)
        self._evaluation, self._evaluated = _TITLES.get(run.stage, run.stage), 0
        self._evaluation_started, self._evaluation_rate = perf_counter(), _Rate()

    @on_validation_batch_end
    @on_test_batch_end
    @on_predict_batch_end
    def _evaluation_batch(self, run: "Run", dataloader_idx: int) -> None:
        self._evaluated += 1
        if perf_counter() >= self._due and self._display is not None:
            self._evaluation = _evaluation_title(run, dataloader_idx)
            self._draw(run, self._display)

    @on_validation_end
    @on_test_end
    @on_predict_end
    def _evaluation_end(self, run: "Run") -> None:
        seconds = perf_counter() - self._evaluation_started
        self._evaluation = ""
        self._evaluating_s += seconds
        if not self._in_fit:
            where = f" on rank 0 of {run.world_size}" if run.world_size > 1 else ""
            done = f"{_TITLES.get(run.stage, run.stage)} finished: {_count(self._evaluated, 'batch', 'batches')}{where}"
            last = f"{done} in {_duration(seconds)}{_files(run)}"
            self._close("  ".join([last, *_facts(run.metrics)]))

    # ---- other ends --------------------------------------------------------------------------------------------------

    @on_exception
    def _fail(self, run: "Run", exception: BaseException) -> None:
        how = "failed" if isinstance(exception, Exception) else "interrupted"
        what = "another process of the run has ended," if lost(exception) else type(exception).__name__
        self._close(f"{how}: {what} in {self._place(run)}{_files(run)}")

    # A generator of `predict` that is left half-way.
    @teardown
    def _abandon(self) -> None:
        self._close()

    def _place(self, run: "Run") -> str:
        """Where the run is, for a person."""
        epoch = " ".join(_epoch(run).split())
        evaluation = f"{self._evaluation} after {_of(self._evaluated, run.num_eval_batches)}"
        if not self._in_fit:
            return evaluation
        if self._epoch_started is None:
            return evaluation if self._evaluation else "the start of fit"
        training, step = (
            f"{epoch} after {_of(run.progress.batch, run.num_train_batches)}",
            f"step {run.global_step:,}",
        )
        return f"{evaluation} ({epoch}, {step})" if self._evaluation else f"{training}, {step}"

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def _draw(self, run: "Run", display: Display) -> None:
        now, bars = perf_counter(), []
        if self._epoch_started is not None:
            if not self._evaluation:
                self._train_rate.add(now - self._evaluating_s, run.progress.micro_batch)
            total, seconds = run.num_train_batches, now - self._epoch_started
            bars.append(_bar(_epoch(run), run.progress.batch, total, seconds, self._train_rate))
        if self._evaluation:
            self._evaluation_rate.add(now, self._evaluated)
            total, seconds = run.num_eval_batches, now - self._evaluation_started
            bars.append(_bar(self._evaluation, self._evaluated, total, seconds, self._evaluation_rate))
        display.draw(bars, [*self._whole_run(run, now), *_facts(_shown_values(run))])
        self._due = perf_counter() + display.pause_s

    def _whole_run(self, run: "Run", now: float) -> list[str]:
        """The step, and how long the whole fit will take where that is more than the present epoch."""
        if self._epoch_started is None:
            return []
        found, seconds, share = [f"step {run.global_step:,}"], now - self._started, _share(run)
        lefts = []
        if share is not None and self._share is not None and share > self._share and self._train_rate.per_second:
            lefts.append(seconds * (1 - share) / (share - self._share))
        if run.settings.max_seconds is not None:
            lefts.append(run.settings.max_seconds - seconds)
        if lefts and (run.max_epochs != 1 or len(lefts) > 1):
            found.append(f"fit {clock(max(0, min(lefts)))} left")
        return found

    def _open(self, run: "Run") -> None:
        if ProgressBar._shown is not None or not run.is_main:
            return
        ProgressBar._shown = self
        self._forget()
        self._display = display(self.refresh_s)
        self._due = 0.0

    def _close(self, last: str = "", values: str = "") -> None:
        if self._display is not None:
            self._display.close(last, values)
            self._display, ProgressBar._shown = None, None
        self._due = math.inf
        self._forget()


class _Rate:
    """Batches per second over the last 75 drawings, half a minute."""

    def __init__(self) -> None:
        self._samples: deque[tuple[float, int]] = deque(maxlen=75)

    def add(self, seconds: float, batches: int) -> None:
        self._samples.append((seconds, batches))

    @property
    def per_second(self) -> float | None:
        """None until two drawings show some progress."""
        if not self._samples:
            return None
        (start, first), (end, last) = self._samples[0], self._samples[-1]
        return (last - first) / (end - start) if last > first and end > start else None


def _bar(title: str, done: int, total: int | None, seconds: float, rate: _Rate) -> Bar:
    # A length that turned out to be wrong is as good as none.
    return Bar(title, done, None if total is not None and done > total else total, seconds, rate.per_second)


def _share(run: "Run") -> float | None:
    """How much of a fit is done, by epochs or steps; None where neither is limited."""
    shares = []
    if run.max_epochs:
        batch, total = run.progress.batch, run.num_train_batches
        shares.append((run.epoch + (min(1.0, batch / total) if total else 0)) / run.max_epochs)
    if run.settings.max_steps:
        shares.append(run.global_step / run.settings.max_steps)
    return max(shares, default=None)


# ---- wording ---------------------------------------------------------------------------------------------------------


def _epoch(run: "Run") -> str:
    if run.max_epochs is None:
        return f"epoch {run.epoch + 1}"
    return f"epoch {run.epoch + 1:>{len(str(run.max_epochs))}}/{run.max_epochs}"


def _evaluation_title(run: "Run", dataloader_idx: int) -> str:
    names: tuple[str | None, ...] = run.eval_loaders
    if len(names) < 2 or run.stage == "sanity":
        return _TITLES.get(run.stage, run.stage)
    return f"{run.stage}/{names[dataloader_idx]} ({dataloader_idx + 1} of {len(names)})"  # as its metrics are called


def _shown_values(run: "Run") -> dict[str, float]:
    """What was logged for the bar, and the losses of the validation."""
    losses = {name: value for name, value in run.metrics.items() if name.startswith("val/") and name.endswith("/loss")}
    return run.prog_bar | losses


def _facts(values: Mapping[str, float]) -> list[str]:
    return [f"{name} {value:.4g}" for name, value in values.items()]


def _ending(reason: str | None) -> str:
    if reason is None:
        return "finished"
    if reason in ("max_epochs", "max_steps", "max_time"):
        return f"finished: {reason} reached"
    return "stopped: run.should_stop was set," if reason == "should_stop" else f"stopped: {reason},"


def _files(run: "Run") -> str:
    return f"; files in {run.dir}" if run.has_dir else ""


def _count(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _of(done: int, total: int | None) -> str:
    return _count(done, "batch", "batches") if total is None else f"{done:,} of {_count(total, 'batch', 'batches')}"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{minutes} min {int(seconds) % 60} s" if not hours else f"{hours:,} h {minutes % 60} min"
