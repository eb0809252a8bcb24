"""Setting up and ending a verb: from its arguments to everything that the loop calls by name.

`prepare` checks what can be checked without running anything; `opened` makes model, optimizer and loaders ready, in the
order of the lines, and ends them again.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from . import launch, loggers, seeds
from .data import loaders, split, to_device
from .data.loader import Loader
from .errors import DataError, MarkError, SettingsError, StepError, warn
from .limits import accumulation, expected
from .loggers.masking import mask
from .optim import Optim, clip, needs_closure, read_optimizers, step_scheduler
from .plan import Plan, discover, is_marked
from .roles import STAGE_LOADER, STAGE_STEP, TRANSFER, VERB_STAGE
from .run import Run, active
from .settings import Settings
from .steps import Steps, modes_of, restore_modes

Call = Callable[..., Any]


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
    closure: bool = False
    """Whether the optimizer's step gets a closure."""
    steps_before: int = 0
    """`global_step` when the last epoch ended."""
    checked_batch: int = 0
    """Batches of the epoch that were done when losses were last checked; `checked_step` likewise."""
    checked_step: int = 0
    step_seed: Callable[[int], int] = field(init=False)
    """The seed of a training step by its micro-batch."""

    def validates(self) -> bool:
        """Whether this epoch has a validation."""
        return "val" in self.loaders and (self.run.epoch + 1) % self.settings.check_val_every_n_epoch == 0

    def heard(self, event: str) -> Call | None:
        """What to call for an event, or None where nobody listens."""
        return self.call[event] if self.plan.all(event) else None

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


def prepare(verb: str, model: nn.Module, data: object, settings: Settings) -> tuple[Plan, dict[str, object]]:
    """The plan, and the loaders given for each stage; runs nothing of the user's but `configure_callbacks`.

    Raises:
        MarkError, SettingsError, DataError: whatever is wrong with marks, settings or the form of `data`.
    """
    settings.check_for(verb)
    marked = data if data is not None and is_marked(data) else None
    given = {} if marked is not None else split(data, verb)
    callbacks = _callbacks(settings, verb)
    plan = discover(verb, model, marked, callbacks)
    hook = plan.one("configure_callbacks")
    if hook is not None:
        more = hook.method(*[model for _ in hook.positional])
        plan = discover(verb, model, marked, [*_as_list(more), *callbacks])
    stage = VERB_STAGE[verb]
    if stage not in given and plan.one(STAGE_LOADER[stage]) is None:
        raise DataError(
            f"ld.{verb} has no {stage} data: give a loader, a dict with {stage!r}, or an object with a method marked "
            f"@ld.{STAGE_LOADER[stage]}"
        )
    if "val" in given and verb == "fit" and plan.one("validation_step") is None:
        warn(f"val data was given, but {type(model).__name__} marks no @validation_step, so it is not used")
    return plan, given


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _callbacks(settings: Settings, verb: str) -> list[object]:
    """The user's callbacks, then those that the settings ask for."""
    found = _as_list(settings.callbacks)
    if settings.summary and verb == "fit":
        from .callbacks.model_summary import ModelSummary

        found.append(ModelSummary(depth=1 if settings.summary is True else settings.summary))
    if settings.progress_bar:
        from .callbacks.progress_bar import ProgressBar

        found.append(ProgressBar())
    return found


@contextmanager
def opened(plan: Plan, given: Mapping[str, object], settings: Settings, writes: bool) -> Iterator[Session]:
    """Make everything ready, hand it over, and end it whatever happens; `writes`: with a directory and loggers."""
    process = launch.Process(settings)
    with process.entered():
        seed = settings.seed if settings.seed is not None else int(torch.randint(2**32, ()))
        seeds.seed_everything(seed)  # `setup` and the configure roles begin from the run's seed too
        run = Run(plan.verb, plan.model, settings, seed)
        call = plan.bind(run, run.progress.calls)
        session = Session(plan, settings, given, run, call, process)
        stack = ExitStack()
    status = "failed"
    try:
        with process.entered(), active(run):
            _set_up(session, writes, stack)
        yield session
        status = "finished"
    except BaseException as error:
        status = "interrupted" if isinstance(error, (KeyboardInterrupt, GeneratorExit)) else "failed"
        if not isinstance(error, GeneratorExit):
            with process.entered(), active(run):
                call["on_exception"](error)
        raise
    finally:
        with process.entered(), active(run):
            stack.close()
            run.close(status)


def _set_up(s: Session, writes: bool, stack: ExitStack) -> None:
    run, call, settings, model = s.run, s.call, s.settings, s.plan.model
    if "teardown" in call:
        stack.callback(call["teardown"], s.plan.verb)
    call.get("prepare_data", _nothing)()
    call.get("setup", _nothing)(s.plan.verb)
    call.get("configure_model", _nothing)()
    stack.callback(restore_modes, modes_of(model))

    configured = call.get("configure_accelerator", _nothing)()
    arguments = launch.accelerator_arguments(s.plan.one("configure_accelerator"), configured)
    accelerator = run.accelerator = launch.make_accelerator(settings, arguments)
    run.device = accelerator.device
    s.steps = Steps(model, {role: s.plan.step(role, run) for role in STAGE_STEP.values() if role in call})
    wrapped = accelerator.prepare_model(s.steps)
    # Not wrapped, it has no hooks of its own either: its `__call__` would only cost time.
    s.wrapped = s.steps.forward if wrapped is s.steps else wrapped
    s.reseed = seeds.reseeder(run.device)
    s.step_seed = seeds.StepSeeds(run.seed, run.rank)
    if run.device.type != "cpu" or any(s.plan.all(role) for role in TRANSFER):
        s.transfer = s.plan.transfer(run, run.progress.calls, _move)

    for stage in _stages(s):
        load(s, stage)
    stack.callback(close_loaders, s)
    if s.plan.verb == "fit":
        run.num_train_batches = expected(settings, s.loaders["train"], "train")
        _optimization(s)
        if not model.training:
            warn(f"{type(model).__name__} was in eval mode; it is put into train() as a whole for training")
            model.train()
        if settings.reload_dataloaders_every_n_epochs and all(stage in s.given for stage in s.loaders):
            warn("reload_dataloaders_every_n_epochs has no effect: the loaders were given, not made by a marked method")
    if writes:
        run.hparams = mask({**getattr(model, "hparams", {}), **(settings.hparams or {})})
        directory = launch.make_directory(settings, type(model).__name__)
        run.open(directory, loggers.Loggers(loggers.create(settings.logger, directory)))
        run.loggers.log_hparams(run.hparams)


def _nothing(*given: object) -> None:
    pass


# ---- data ------------------------------------------------------------------------------------------------------------


def _stages(s: Session) -> list[str]:
    """The stages of the data that the verb reads."""
    if s.plan.verb != "fit":
        return [VERB_STAGE[s.plan.verb]]
    validates = "validation_step" in s.call and ("val" in s.given or "val_dataloader" in s.call)
    return ["train", "val"] if validates and s.settings.limit_val_batches != 0 else ["train"]


def load(s: Session, stage: str) -> None:
    """Make the loaders of a stage, from what was given or by calling its role."""
    role = STAGE_LOADER[stage]
    given = s.given[stage] if stage in s.given else s.call[role]()
    if given is None:
        raise DataError(f"{s.where(role)}, marked @{role}, returned None; return a loader")
    s.loaders[stage] = loaders(given, stage, s.run.seed)


def reload(s: Session) -> None:
    """Make the loaders of a new epoch anew when `reload_dataloaders_every_n_epochs` says so."""
    every = s.settings.reload_dataloaders_every_n_epochs
    if every and s.run.epoch and s.run.epoch % every == 0:
        close_loaders(s)
        for stage in s.loaders:
            if stage not in s.given:
                load(s, stage)


def close_loaders(s: Session) -> None:
    """Release the workers of every loader."""
    for several in s.loaders.values():
        for loader in several:
            loader.close()


def _move(batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    return to_device(batch, device, non_blocking=True)


# ---- optimisation ----------------------------------------------------------------------------------------------------


def _optimization(s: Session) -> None:
    where, call, settings = s.where("configure_optimizers"), s.call, s.settings
    found = read_optimizers(call["configure_optimizers"](), where)
    if len(found) > 1:
        raise MarkError(f"{where} returned {len(found)} optimizers; several optimizers are not available yet")
    s.run.optims = found
    (s.optim,) = found.values()
    value, algorithm = settings.gradient_clip_val, settings.gradient_clip_algorithm
    if value is None and algorithm != "norm":
        warn("gradient_clip_algorithm has no effect without gradient_clip_val")
    if value is not None and "clip_gradients" not in call:
        call["clip_gradients"] = lambda optimizer: clip(optimizer, value, algorithm)
    s.gradients = _gradients(call, s.optim.optimizer)
    call.setdefault("lr_scheduler_step", step_scheduler)
    s.closure = "optimizer_step" in call or needs_closure(s.optim.optimizer)
    call.setdefault("optimizer_step", lambda optimizer, closure: optimizer.step(closure))
    if needs_closure(s.optim.optimizer) and settings.accumulate_grad_batches != 1:
        kind = type(s.optim.optimizer).__name__
        raise SettingsError(
            f"accumulate_grad_batches: {kind} evaluates each batch several times, so it cannot accumulate"
        )


def _gradients(call: dict[str, Call], optimizer: Optimizer) -> tuple[Callable[[], object], Callable[[Any], object]]:
    clear: Callable[[], object] = optimizer.zero_grad
    if "optimizer_zero_grad" in call:
        clear = partial(call["optimizer_zero_grad"], optimizer)
    if "backward" not in call:
        return clear, torch.Tensor.backward
    override = call["backward"]
    return clear, lambda loss: override(loss, optimizer)
