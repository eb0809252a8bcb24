"""`Run`: what events and steps get when they ask for `run`, and what `fit` returns. `Progress`: where it stands."""

import importlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import metrics, scalars
from .data import batch_size_of
from .errors import DataError, LightdecoError, StepError, warn
from .loggers import Loggers
from .loggers.metrics_file import METRICS, MetricsFile, read
from .optim import Optim
from .settings import Settings
from .steps import is_metric

if TYPE_CHECKING:
    from accelerate import Accelerator
    from matplotlib.figure import Figure

#: Fields of every record, which no metric can be named.
RESERVED_NAMES = ("stage", "epoch", "step", "time")


@dataclass(slots=True)
class Progress:
    """Where a run stands: the few integers that drive the loop, are what is logged, and are what a checkpoint saves."""

    epoch: int = 0
    """Finished epochs."""
    batch: int = 0
    """Batches done in the present epoch."""
    global_step: int = 0
    """Batches after which an optimizer was updated; the x axis of every record."""
    micro_batch: int = 0
    """Training batches done in the whole run, their events included; decides torch's randomness in the next step."""
    validated: int = 0
    """Batches done in the present epoch when it was last validated."""
    seconds: float = 0.0
    """Time in training up to the last checkpoint."""
    skipped_updates: int = 0
    """Updates left out because a loss or a gradient was not finite."""
    updates: dict[str, int] = field(default_factory=dict)
    """Updates of each optimizer, by name, as far as something depends on them."""
    calls: dict[str, int] = field(default_factory=dict)
    """How often each event with `every` has happened."""
    part_sizes: dict[str, int] = field(default_factory=dict)
    """The most samples that a training step gets at once since memory ran out, by optimizer."""


class Run:
    """One call of a verb: its progress and results, and what callbacks need.

    Results: `dir`, `global_step`, `epoch`, `stop_reason`, `metrics` (the latest value by name), `history` (the
    records), `best_checkpoint`, `best_score`, `last_checkpoint`, `hparams`, `plot()`. While it runs also: `rank`,
    `world_size`, `is_main`, `device`, `model`, `loggers`, `stage`, `should_stop` (set it to end the run at the next
    step), `log`, `print`, `all_gather`, `broadcast`, `barrier`.
    """

    def __init__(self, verb: str, model: nn.Module, settings: Settings, seed: int) -> None:
        self.verb, self.model, self.settings, self.seed = verb, model, settings, seed
        self.progress = Progress()
        self.stop_reason: str | None = None
        self.should_stop = False
        self.metrics: dict[str, float] = {}
        self.history: list[dict[str, Any]] = []
        self.hparams: dict[str, Any] = {}
        self.best_checkpoint: Path | None = None
        self.best_score: float | None = None
        self.last_checkpoint: Path | None = None
        self.rank, self.world_size = 0, 1
        self.device = torch.device("cpu")
        self.loggers = Loggers({})
        #: What runs now: "train", "val", "test" or "predict", and "sanity" during the sanity check.
        self.stage = ""
        #: Batches of one training epoch, or None when the loader does not tell.
        self.num_train_batches: int | None = None
        #: Batches of the evaluation that runs now (all loaders), or None.
        self.num_eval_batches: int | None = None
        #: The names of that evaluation's loaders; None for a single one.
        self.eval_loaders: tuple[str | None, ...] = (None,)
        #: Index of the present batch in its epoch and loader.
        self.batch_idx = 0
        self.place = 0  # of the batch among all of the evaluation that runs now, as each process counts
        #: The latest values for the progress bar.
        self.prog_bar: dict[str, float] = {}
        self.optims: dict[str, Optim] = {}
        #: What `ld.backward` and the like do in a run with a manual training step; None in others.
        self.manual: Any = None
        #: Under which names the losses of training are logged.
        self.loss_names = {"train/loss"}
        self.accelerator: Accelerator | None = None
        self.means = metrics.Means(self.device)
        self.batch: Any = None  # the present batch, for its size; None outside of batches
        self.collected: dict[str, float] | None = None  # takes what is logged while an epoch's record is made
        self._dir: Path | None = None
        self._file: MetricsFile | None = None
        self._shown = {"train/loss", "val/loss"}

    # ---- where it stands ---------------------------------------------------------------------------------------------

    @property
    def dir(self) -> Path:
        """The run's directory.

        Raises:
            LightdecoError: this run writes nothing (`fast_dev_run`, or an evaluation without `logger=`).
        """
        if self._dir is None:
            raise LightdecoError(f"this run of ld.{self.verb} writes no files, so it has no directory")
        return self._dir

    @property
    def has_dir(self) -> bool:
        """Whether this run writes files, in `dir`."""
        return self._dir is not None

    @property
    def global_step(self) -> int:
        """Batches so far after which an optimizer was updated."""
        return self.progress.global_step

    @property
    def epoch(self) -> int:
        """Finished epochs: 0 during the first, `max_epochs` at the end."""
        return self.progress.epoch

    @property
    def max_epochs(self) -> int | None:
        """The limit of epochs, or None."""
        return 1 if self.settings.fast_dev_run else self.settings.max_epochs

    @property
    def is_main(self) -> bool:
        """Whether this is the main process (rank 0)."""
        return self.rank == 0

    # ---- recording ---------------------------------------------------------------------------------------------------

    def open(self, directory: Path, loggers: Loggers) -> None:
        """Begin to write: records go to `metrics.jsonl` in the directory and to the loggers."""
        self._dir, self.loggers = directory, loggers
        self._file = MetricsFile(directory / METRICS) if self.is_main else None

    @property
    def records_size(self) -> int:
        """The length of `metrics.jsonl` in bytes."""
        return 0 if self._file is None else self._file.size

    def cut_records(self, size: int) -> None:
        """Go back to the records that `metrics.jsonl` held when it was `size` bytes long."""
        if self._file is not None:
            self._file.cut(size)
            self.history = read(self._file.path)

    def close(self, status: str) -> None:
        """End the loggers; `status` is "finished", "failed" or "interrupted". Nothing of the run's time is kept."""
        self.loggers.close(status)
        if self._file is not None:
            self._file.close()
        self.accelerator, self.means, self.batch, self.optims = None, metrics.Means(self.device), None, {}
        self.manual = None

    def record(self, stage: str, values: Mapping[str, float]) -> None:
        """Write one record to the history, `metrics.jsonl` and the loggers."""
        if not values:
            return
        self.show(values)
        where = {"stage": stage, "epoch": self.epoch, "step": self.global_step, "time": round(time.time(), 3)}
        self.history.append(where | dict(values))
        if self._file is not None:
            self._file.write(self.history[-1])
        self.loggers.log_metrics(values, self.global_step)

    def show(self, values: Mapping[str, float]) -> None:
        """Make values the latest of `metrics` and of the progress bar, without a record."""
        self.metrics.update(values)
        self.prog_bar.update({name: value for name, value in values.items() if name in self._shown | self.loss_names})

    @contextmanager
    def collecting(self, values: dict[str, float]) -> Iterator[None]:
        """Put what is logged meanwhile into `values`, the record that is being made."""
        self.collected = values
        try:
            yield
        finally:
            self.collected = None

    @contextmanager
    def forgetting(self) -> Iterator[None]:
        """Put metrics and the counts of events back at the end, as if nothing had happened meanwhile."""
        lives: list[dict[str, Any]] = [self.metrics, self.prog_bar, self.progress.calls]
        kept = [(live, live.copy()) for live in lives]
        try:
            yield
        finally:
            for live, before in kept:
                live.clear()
                live.update(before)

    @contextmanager
    def during(self, stage: str, means: metrics.Means) -> Iterator[None]:
        """Make a stage and its means the present ones; those before come back at the end."""
        before = self.stage, self.means, self.batch, self.batch_idx
        self.stage, self.means, self.batch, self.batch_idx = stage, means, None, 0
        try:
            yield
        finally:
            self.stage, self.means, self.batch, self.batch_idx = before

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: scalars.Reduce = "mean",
        batch_size: int | None = None,
    ) -> None:
        """Log a scalar; see `lightdeco.log`."""
        _check_name(name)
        if on_step is False and on_epoch is False:
            raise StepError(
                f"ld.log({name!r}, on_step=False, on_epoch=False) would record nothing; leave one of them out"
            )
        if prog_bar:
            self._shown.add(name)
        if self.batch is None:
            self._log_now(name, value, reduce)
            return
        training = self.stage == "train"
        if training and name in self.loss_names:
            raise StepError(f"ld.log({name!r}): the loss that the step returns is logged under this name; log no other")
        if is_metric(value) and on_epoch is False:
            raise StepError(f"ld.log({name!r}, on_epoch=False): a torchmetrics object is recorded once per epoch")
        if on_step and not training:
            warn(f"ld.log({name!r}, on_step=True) has no effect in a {self.stage} step: evaluations are recorded once")
        by_step = training and on_step is not False and not (on_step is None and is_metric(value))
        weight = self.progress.micro_batch if training else self.place  # by which the processes know the last value
        if reduce == "mean":
            weight = 1 if is_metric(value) else self.size_of_batch(batch_size)
        self.means.add(name, value, weight, reduce, by_step, on_epoch is not False)

    def _log_now(self, name: str, value: Any, reduce: str) -> None:
        """Outside of batches: into the record that is being made, or as a record of its own."""
        if is_metric(value):
            number = scalars.computed(name, value)
        else:
            scalars.check(name, value, reduce)
            number = float(value.detach() if isinstance(value, torch.Tensor) else value)
        if self.collected is not None:
            self.collected[name] = number
        elif self.stage != "sanity":
            self.record(self.stage or "train", {name: number})

    def size_of_batch(self, given: int | None = None) -> int:
        """The number of samples of the present batch.

        Raises:
            DataError: nothing was given and the batch holds no tensor.
        """
        if given is not None:
            if isinstance(given, bool) or not isinstance(given, int) or given < 1:
                raise StepError(f"batch_size is {given!r}; allowed: an int of at least 1")
            return given
        size = batch_size_of(self.batch)
        if size is None:
            raise DataError(
                f"a {self.stage} batch holds no tensor, so its number of samples is unknown; return it from the step "
                'under "batch_size", and give it to ld.log(…, batch_size=n) where that is used'
            )
        return size

    # ---- for callbacks -----------------------------------------------------------------------------------------------

    def print(self, *values: object) -> None:
        """`print` on the main process alone."""
        if self.is_main:
            print(*values)

    def all_gather(self, value: Any) -> Any:
        """The tensors (any nesting) of all processes, stacked in the order of ranks: shape (world_size, *shape)."""
        from accelerate.utils import gather, recursively_apply

        return gather(recursively_apply(lambda tensor: tensor.unsqueeze(0), value))

    def broadcast(self, value: Any, src: int = 0) -> Any:
        """The value (anything) that rank `src` gives, on every process."""
        from accelerate.utils import broadcast_object_list

        box = [value]
        broadcast_object_list(box, from_process=src)
        return box[0]

    def barrier(self) -> None:
        """Wait until every process is here."""
        if self.accelerator is not None:
            self.accelerator.wait_for_everyone()

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The curves of this run as a matplotlib figure, also saved when a path is given.

        Raises:
            LightdecoError: matplotlib is not installed (`pip install lightdeco[plot]`).
        """
        from .plot import plot

        return plot(self.history, path)

    def report(self, path: str | Path | None = None) -> Path:
        """Everything known of this run as one HTML page (default: `report.html` in its directory); see docs/report.md.

        Raises:
            LightdecoError: plotly is not installed (`pip install lightdeco[report]`), or there is no directory and no
                path.
        """
        made: Path = importlib.import_module("lightdeco.reporting").report(self, path)  # it imports what imports this
        return made

    def __repr__(self) -> str:
        ended = f", stopped by {self.stop_reason}" if self.stop_reason else ""
        return f"<Run of {type(self.model).__name__}: epoch {self.epoch}, step {self.global_step}{ended}>"


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name or name in RESERVED_NAMES:
        raise StepError(f"ld.log got the name {name!r}; allowed: a str that is not empty and none of {RESERVED_NAMES}")
