"""`Session`: everything that the loop works with while one verb runs. `opening.py` makes it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch
from torch import nn

from . import launch, strategies
from .alone import Alone, Bad
from .branch import Branch, others
from .callbacks.model_checkpoint import ModelCheckpoint
from .data.loader import Loader
from .errors import StepError
from .group import Group
from .held import Held
from .limits import accumulation
from .metrics import Means
from .optim import parameters_of
from .plan import Plan
from .run import Run
from .scaling import Scaler
from .settings import Settings
from .signals import Signals
from .steps import Steps

Call = Callable[..., Any]


class Saving(Protocol):
    """What the loop asks of `saving.Saver`."""

    policy: ModelCheckpoint
    directory: Path

    def validated(self, metrics: Mapping[str, float]) -> None:
        """A validation has ended."""

    def epoch_ends(self) -> None:
        """The metrics of an epoch are about to be taken."""

    def boundary(self, epoch: int | None = None) -> None:
        """Between two steps, or after an epoch."""

    def finish(self) -> None:
        """At the end of the run."""

    def fail(self, error: BaseException) -> None:
        """On an error."""

    def saved(self) -> bool:
        """Whether a checkpoint holds the run as it is now."""
        ...

    def show(self) -> None:
        """Tell the run which checkpoints there are."""


@dataclass
class Session:
    """All that one verb works with. The loop reads it from top to bottom; nothing here decides anything."""

    plan: Plan
    settings: Settings
    given: Mapping[str, object]
    run: Run
    call: dict[str, Call]
    """Every role and event by name, as a function of what the table offers; overrides default to torch's own way."""
    process: "launch.Process"
    group: Group
    """The processes of the run; one, where there are no others."""
    stack: ExitStack = field(default_factory=ExitStack)
    """What is undone at the end."""
    steps: Steps = field(init=False)
    """The steps as evaluation calls them: under autocast, outside of DDP."""
    wrapped: Callable[..., Any] = field(init=False)
    """The steps as training calls them: whatever accelerate made of `steps`."""
    bare: bool = False
    """Whether nothing wraps the steps, so that training may call them without the way round."""
    branches: list[Branch] = field(default_factory=list)
    """The training steps in the order of calling, each with its optimizer."""
    parted: bool = False
    """Whether a batch is more than one plain training step: `stepping.train_batch` trains it."""
    part_size: int | None = None
    """The `size` of `split_batch`."""
    loaders: dict[str, tuple[Loader, ...]] = field(default_factory=dict)
    transfer: Call | None = None
    """Moves (batch, device, dataloader_idx); None when the batch is already where it belongs."""
    reseed: Callable[[int], object] = torch.default_generator.manual_seed

    scalers: dict[str, Scaler] = field(default_factory=dict)
    """Of the losses, by the name of the optimizer; empty but with fp16."""
    plain_update: bool = False
    """Whether an update is `optimizer.step()` and nothing else, but for a mean over its window before."""
    means: Means = field(init=False)
    """The metrics of training."""
    saver: Saving | None = None
    """Writes checkpoints; None where none are wanted."""
    unkept: set[str] = field(default_factory=set)
    """Metrics that a checkpoint could not hold, and that a warning has named."""
    signals: Signals = field(default_factory=Signals)
    peers: Alone = field(init=False)
    """The other processes of the run, or nobody."""
    held: Held = field(default_factory=Held)
    """How the model and the optimizers' state lie on the processes."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """What the run was made with, for loggers and checkpoints; empty where nothing is written."""
    counted: int = -1
    """The `micro_batch` that was counted in `global_step` last."""
    first_micro_batch: int | None = None
    """`micro_batch` when the epoch began; None while an epoch is being ended."""
    finished: str | None = None
    """The reason for which the run, which may have been resumed, has come to its end."""
    steps_before: int = 0
    """`global_step` when the last epoch ended."""
    checked_batch: int = 0
    """Batches of the epoch that were done when losses were last checked; `checked_step` likewise."""
    checked_step: int = 0

    @property
    def inference(self) -> bool:
        """Whether evaluations run in torch's inference mode, which neither fp8 nor FSDP nor DeepSpeed can do."""
        settings = self.settings
        return settings.inference_mode and settings.precision != "fp8" and strategies.name_of(settings) == "ddp"

    def checks_sanity(self) -> bool:
        """Whether a few batches of validation run before training; never from an iterator, which would lose them."""
        settings, loaders = self.settings, self.loaders.get("val", ())
        wanted = bool(loaders) and settings.num_sanity_val_steps > 0 and not settings.fast_dev_run
        return wanted and not any(loader.one_shot for loader in loaders)

    def validates(self) -> bool:
        """Whether this epoch has a validation."""
        return "val" in self.loaders and (self.run.epoch + 1) % self.settings.check_val_every_n_epoch == 0

    def validation_due(self, interval: int | None) -> bool:
        """Whether to validate within the epoch; what is due inside of an accumulation window waits for its end."""
        if not interval:
            return False
        progress = self.run.progress
        return progress.batch // interval > progress.validated // interval and self.validates()

    def heard(self, event: str) -> Call | None:
        """What to call for an event, or None where nobody listens and nothing is launched with it."""
        return self.call[event] if self.plan.all(event) or self.run.device.type == "xla" else None

    def seconds(self) -> float:
        """Time in training, that before an interruption included."""
        return monotonic() - self.peers.started

    @property
    def pending(self) -> bool:
        """Whether gradients of some window wait for the batches that follow."""
        manual = self.run.manual
        return any(branch.window.count for branch in self.branches) or (manual is not None and manual.pending)

    def parameters(self) -> list[nn.Parameter]:
        """Every parameter of the model and of the optimizers, each once."""
        held = [p for optim in self.run.optims.values() for p in parameters_of(optim.optimizer)]
        return list({id(p): p for p in (*self.plan.model.parameters(), *held)}.values())

    def begin_windows(self) -> None:
        """Begin the windows of an epoch, and look which parameters each training step leaves alone."""
        size = accumulation(self.settings, self.run.epoch)
        several = len(self.branches) > 1
        self.peers.refresh()
        for branch in self.branches:
            branch.window = self.peers.window(size)
            branch.others = others(branch.optimizer, self.parameters()) if several else []
        if self.run.manual is not None:
            self.run.manual.begin_epoch()

    def count_step(self) -> None:
        """Count the present batch in `global_step`, once, however many optimizers it updates."""
        progress = self.run.progress
        if self.counted != progress.micro_batch:
            self.counted = progress.micro_batch
            progress.global_step += 1

    def between_steps(self) -> bool:
        """Whether nothing is half done, so that the run can be continued from here."""
        progress = self.run.progress
        return not self.pending and progress.micro_batch - progress.batch == self.first_micro_batch

    def refuse_nan(self) -> None:
        """Check the losses since the last check, of all processes. Waits for the device.

        Raises:
            StepError: one was not finite, and `on_nan` is "raise"; the message names the first.
        """
        bad = self.bad()
        if self.settings.on_nan == "raise":
            self.refuse(self.group.gather(bad))

    def bad(self) -> Bad | None:
        """The first loss of this process that was not finite since the last check, where `on_nan` is "raise"."""
        batch, step, run = self.checked_batch, self.checked_step, self.run
        self.checked_batch, self.checked_step = run.progress.batch, run.global_step
        if self.settings.on_nan != "raise":
            return None
        if self.parted:
            return self._bad_of_branches()
        bad = run.means.first_bad()
        if bad is None:
            return None
        return Bad(batch + bad, step + bad // accumulation(self.settings, run.epoch) + 1, "training loss")

    def refuse(self, everywhere: Sequence[Bad | None]) -> None:
        """Raise a StepError for the first of these losses, which the processes have found."""
        run = self.run
        every = [(found, rank) for rank, found in enumerate(everywhere) if found is not None]
        for found, rank in sorted(every, key=lambda each: each[0].batch)[:1]:
            which = f"{found.which} on rank {rank}" if len(everywhere) > 1 else found.which
            raise StepError(
                f"the {which} was not finite (NaN or infinite) at batch {found.batch} of epoch {run.epoch}, "
                f"global_step {found.step}; detect_anomaly=True finds the operation, on_nan='skip' leaves such updates "
                "out"
            )

    def _bad_of_branches(self) -> Bad | None:
        """Where each training step has losses of its own: the earliest bad one."""
        means, found = self.means, []
        means.settle()
        for branch in self.branches:
            rows, branch.rows = branch.rows, []
            bad = means.series[f"{branch.prefix}loss"].first_bad()
            if bad is not None:
                which = f"training loss of the optimizer {branch.name!r}" if branch.name else "training loss"
                found.append(Bad(*rows[bad], which))
        return min(found, key=lambda each: each.batch, default=None)

    def refuse_no_progress(self) -> None:
        """Refuse an epoch in which every update was skipped: with `max_steps` alone such a run would never end.

        Raises:
            StepError: no update of the epoch that just ended was made.
        """
        before, self.steps_before = self.steps_before, self.run.global_step
        if self.run.progress.skipped_updates and self.run.global_step == before:
            if any(scaler.factor >= 1 for scaler in self.scalers.values()):
                return  # the factor is still on its way down
            how = "on_nan='skip'" if self.settings.on_nan == "skip" else f"precision={self.settings.precision!r}"
            raise StepError(
                f"{how} left out every update of epoch {self.run.epoch - 1}; the weights or the data are not "
                "finite: see which with on_nan='raise' and detect_anomaly=True"
            )

    def where(self, role: str) -> str:
        """`Class.method (file:line)` of the hook with this role."""
        hook = self.plan.one(role)
        assert hook is not None
        return hook.where
