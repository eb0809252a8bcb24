"""`Session`: everything that the loop works with while one verb runs. `opening.py` makes it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Protocol

import torch

from . import launch
from .callbacks.model_checkpoint import ModelCheckpoint
from .data.loader import Loader
from .errors import StepError
from .limits import accumulation
from .metrics import Means
from .optim import Optim, Window
from .plan import Plan
from .run import Run
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
    steps: Steps = field(init=False)
    """The steps as evaluation calls them: under autocast, outside of DDP."""
    wrapped: Callable[..., Any] = field(init=False)
    """The steps as training calls them: whatever accelerate made of `steps`."""
    optim: Optim = field(init=False)
    loaders: dict[str, tuple[Loader, ...]] = field(default_factory=dict)
    transfer: Call | None = None
    """Moves (batch, device, dataloader_idx); None when the batch is already where it belongs."""
    reseed: Callable[[int], object] = torch.default_generator.manual_seed

    gradients: tuple[Callable[[], object], Callable[[Any], object]] = field(init=False)
    """How gradients are cleared, and made from a loss: torch's own functions, or the overrides."""
    plain_update: bool = False
    """Whether an update of one batch is `optimizer.step()` and nothing else."""
    closure: bool = False
    """Whether the optimizer's step gets a closure."""
    means: Means = field(init=False)
    """The metrics of training."""
    saver: Saving | None = None
    """Writes checkpoints; None where none are wanted."""
    signals: Signals = field(default_factory=Signals)
    window: Window | None = None
    """The micro-batches of the present update."""
    first_micro_batch: int | None = None
    """`micro_batch` when the epoch began; None while an epoch is being ended."""
    finished: str | None = None
    """The reason for which the run, which may have been resumed, has come to its end."""
    started: float = field(default_factory=monotonic)
    """When training would have begun, had it not been interrupted."""
    steps_before: int = 0
    """`global_step` when the last epoch ended."""
    checked_batch: int = 0
    """Batches of the epoch that were done when losses were last checked; `checked_step` likewise."""
    checked_step: int = 0

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
        """What to call for an event, or None where nobody listens."""
        return self.call[event] if self.plan.all(event) else None

    def seconds(self) -> float:
        """Time in training, that before an interruption included."""
        return monotonic() - self.started

    def between_steps(self) -> bool:
        """Whether nothing is half done, so that the run can be continued from here."""
        progress = self.run.progress
        within = self.window is not None and self.window.count > 0
        return not within and progress.micro_batch - progress.batch == self.first_micro_batch

    def refuse_nan(self) -> None:
        """Check the losses since the last check together. Waits for the device.

        Raises:
            StepError: one was not finite, and `on_nan` is "raise"; the message names the first.
        """
        batch, step, run = self.checked_batch, self.checked_step, self.run
        self.checked_batch, self.checked_step = run.progress.batch, run.global_step
        if self.settings.on_nan != "raise":
            return
        bad = run.means.first_bad()
        if bad is not None:
            step += bad // accumulation(self.settings, run.epoch) + 1
            raise StepError(
                f"the training loss was not finite (NaN or infinite) at batch {batch + bad} of epoch {run.epoch}, "
                f"global_step {step}; detect_anomaly=True finds the operation, on_nan='skip' leaves such updates out"
            )

    def refuse_no_progress(self) -> None:
        """Refuse an epoch in which every update was skipped: with `max_steps` alone such a run would never end.

        Raises:
            StepError: no update of the epoch that just ended was made.
        """
        before, self.steps_before = self.steps_before, self.run.global_step
        if self.run.progress.skipped_updates and self.run.global_step == before:
            raise StepError(
                f"on_nan='skip' left out every update of epoch {self.run.epoch - 1}; the weights or the data are not "
                "finite: see which with on_nan='raise' and detect_anomaly=True"
            )

    def where(self, role: str) -> str:
        """`Class.method (file:line)` of the hook with this role."""
        hook = self.plan.one(role)
        assert hook is not None
        return hook.where
