"""Setting up and ending a verb: `opened` makes model, optimizer and loaders ready, in the order of the lines."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import launch, loggers, seeds, xla
from .branching import prepare_optimizers
from .compiling import compile_forward
from .current import active
from .data import loaders
from .data.moving import mover
from .errors import DataError, warn
from .limits import expected
from .loggers.masking import mask
from .metrics import Means
from .plan import Plan
from .roles import BATCH_ENDS, STAGE_LOADER, TRANSFER, VERB_STAGE
from .run import Run
from .session import Session
from .settings import Settings
from .steps import Steps, modes_of, restore_modes

if TYPE_CHECKING:
    from .resuming import Resumed, Weights


@contextmanager
def opened(
    plan: Plan, given: Mapping[str, object], settings: Settings, writes: bool, weights: "Weights" = None
) -> Iterator[Session]:
    """Make everything ready, hand it over, and end it whatever happens.

    Args:
        plan, given, settings: what `prepare` made of the arguments of the verb.
        writes: make a directory and loggers.
        weights: the checkpoint whose weights an evaluation uses.
    """
    from . import requeue, resuming  # here and below: what has to do with checkpoints is imported when a verb runs

    process = launch.Process(settings)
    resumed = resuming.look(plan, settings, writes, weights)
    with process.entered():
        seed = settings.seed if settings.seed is not None else int(torch.randint(2**32, ()))
        seed = resuming.seed_of(resumed, settings, seed)
        seeds.seed_everything(seed)  # `setup` and the configure roles begin from the run's seed too
        run = Run(plan.verb, plan.model, settings, seed)
        call = plan.bind(run, run.progress.calls)
        session = Session(plan, settings, given, run, call, process)
        session.signals.requeues = requeue.wanted() if plan.verb == "fit" else None
        stack = ExitStack()
    status = "failed"
    try:
        with process.entered(), active(run):
            _set_up(session, writes, stack, resumed)
            resumed = None  # its tensors are copied
        yield session
        status = "finished"
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
        status = "interrupted" if interrupted else "failed"
        if not isinstance(error, GeneratorExit):
            with process.entered(), active(run):
                try:
                    call["on_exception"](error)
                finally:
                    if session.saver is not None:
                        session.saver.fail(error)
        raise
    finally:
        with process.entered(), active(run):
            stack.close()
            run.close(status)
        if status == "interrupted":
            requeue.requeue(session.signals, run, settings, session.saver)


def _set_up(s: Session, writes: bool, stack: ExitStack, resumed: "Resumed | None") -> None:
    from . import resuming
    from .directory import locked
    from .state import restore

    run, call, settings, model = s.run, s.call, s.settings, s.plan.model
    if writes and resumed is not None and resumed.directory is not None:
        stack.enter_context(locked(resumed.directory))
    if "teardown" in call:
        stack.callback(call["teardown"], s.plan.verb)
    call.get("prepare_data", _nothing)()
    call.get("setup", _nothing)(s.plan.verb)
    call.get("configure_model", _nothing)()
    stack.callback(restore_modes, modes_of(model))
    if resumed is not None:
        resuming.load_first(s, resumed)

    if settings.precision in launch.TRUE:
        model.to(launch.TRUE[settings.precision])
    configured = call.get("configure_accelerator", _nothing)()
    arguments = launch.accelerator_arguments(s.plan.one("configure_accelerator"), configured)
    accelerator = run.accelerator = launch.make_accelerator(settings, arguments)
    run.device = accelerator.device
    if settings.compile is not False:
        stack.callback(compile_forward(model, settings.compile))
    s.steps = Steps(model, {key: s.plan.step(hook, run) for key, hook in s.plan.steps().items()})
    with xla.same_parameters(model, run.device):
        s.wrapped = accelerator.prepare_model(s.steps)
    # Where nothing wraps the steps, training calls its own without the way round.
    s.bare = s.wrapped is s.steps and "forward" not in vars(s.steps)
    s.reseed = seeds.reseeder(run.device)
    if run.device.type == "xla":
        s.call |= {event: xla.synced(call[event]) for event in BATCH_ENDS}
    dtype = launch.TRUE.get(settings.precision)
    move = mover(run.device, dtype)
    if dtype is not None or run.device.type != "cpu" or any(s.plan.all(role) for role in TRANSFER):
        s.transfer = s.plan.transfer(run, run.progress.calls, move)

    for stage in _stages(s):
        load(s, stage)
    stack.callback(close_loaders, s)
    if s.plan.verb == "fit":
        s.means = Means(run.device, watch="train/loss")
        run.num_train_batches = expected(settings, s.loaders["train"], "train")
        prepare_optimizers(s, stack)
        if not model.training:
            warn(f"{type(model).__name__} was in eval mode; it is put into train() as a whole for training")
            model.train()
        if settings.reload_dataloaders_every_n_epochs and all(stage in s.given for stage in s.loaders):
            warn("reload_dataloaders_every_n_epochs has no effect: the loaders were given, not made by a marked method")
        if resumed is not None and resumed.state is not None:
            restore(s, resumed.state)
    if writes:
        _open_directory(s, stack, resumed)
    if settings.profiler is not None:
        from . import profilers
        from .profiling import profile

        stack.callback(profile(s, profilers.create(settings.profiler), move))


def _open_directory(s: Session, stack: ExitStack, resumed: "Resumed | None") -> None:
    from . import resuming
    from .directory import CHECKPOINTS, locked, make_directory
    from .saving import Saver
    from .state import LOGGERS

    run, settings = s.run, s.settings
    policy = resuming.policy(settings, "val" in s.loaders) if s.plan.verb == "fit" else None
    directory = resumed.directory if resumed is not None else None
    if directory is None:  # made last: what was refused before leaves nothing behind
        directory = make_directory(settings, type(s.plan.model).__name__)
        stack.enter_context(locked(directory))
    run.hparams = mask(_hparams(s.plan.model) | dict(settings.hparams or {}))
    kept = resumed.state.extra.get(LOGGERS, {}) if resumed is not None and resumed.state is not None else {}
    run.open(directory, loggers.Loggers(loggers.create(settings.logger, directory, kept)))
    run.loggers.watch(s.plan.model)
    if policy is not None:
        s.saver = Saver(s, policy, directory / CHECKPOINTS)
    if resumed is not None:
        resuming.go_on(s, resumed)
    run.loggers.log_hparams(run.hparams)


def _hparams(model: nn.Module) -> dict[str, Any]:
    """What `HparamsMixin` or the model's own attribute `hparams` (a mapping or a namespace) holds."""
    found = vars(model).get("_hparams", vars(model).get("hparams", {}))
    found = found if isinstance(found, Mapping) else getattr(found, "__dict__", {})
    return {str(name): value for name, value in found.items()}


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
