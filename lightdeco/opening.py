"""Setting up and ending a verb: `opened` makes model, optimizer and loaders ready, in the order of the lines."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import ending, group, launch, loggers, seeds, sharding, strategies, xla
from .branching import prepare_optimizers
from .child import beat
from .compiling import compile_forward
from .current import active
from .data import loaders
from .data.moving import mover
from .data.sharing import Share
from .errors import DataError, warn
from .group import Kept
from .limits import expected
from .loggers.masking import mask
from .materialise import Materialiser
from .metrics import Means
from .plan import Plan
from .roles import BATCH_ENDS, STAGE_LOADER, TRANSFER, VERB_STAGE
from .run import Run
from .session import Session
from .settings import Settings
from .steps import modes_of, restore_modes
from .wrapping import wrap

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
    # What is cut, and DeepSpeed itself, live in torch's group of processes.
    keep = strategies.name_of(settings) != "ddp"
    with group.opened(launch.kind_of(settings), settings.process_timeout, keep=keep) as processes:
        with process.entered():
            resumed = resuming.look(plan, settings, writes, weights, processes)
            seed = settings.seed if settings.seed is not None else int(torch.randint(2**32, ()))
            seed = resuming.seed_of(resumed, settings, processes.same(seed))
            seeds.seed_everything(seed)  # `setup` and the configure roles begin from the run's seed too
            run = Run(plan.verb, plan.model, settings, seed)
            run.rank, run.world_size = processes.rank, processes.size
            call = plan.bind(run, run.progress.calls)
            session = Session(plan, settings, given, run, call, process, processes)
            session.signals.requeues = requeue.wanted() if plan.verb == "fit" else None
        with _ended(session):
            with process.entered(), active(run):
                _set_up(session, writes, session.stack, resumed)
                resumed = None  # its tensors are copied
            yield session


@contextmanager
def _ended(s: Session) -> Iterator[None]:
    """End the run, whatever happens."""
    from . import requeue

    run, process = s.run, s.process
    status, failure = "failed", None
    try:
        yield
        status = "finished"
    except BaseException as error:
        interrupted = isinstance(error, (KeyboardInterrupt, SystemExit, GeneratorExit))
        status, failure = "interrupted" if interrupted else "failed", error
        if not isinstance(error, GeneratorExit):
            with process.entered(), active(run):
                try:
                    s.call["on_exception"](error)
                finally:
                    if s.saver is not None:
                        s.saver.fail(error)
        raise
    finally:
        with process.entered(), active(run):
            ending.write(run, status, failure)  # while the directory is locked
            failure = None  # its traceback holds this frame
            s.stack.close()
            run.close(status)
        if status == "interrupted":
            requeue.requeue(s.signals, run, s.settings, s.saver)


def _set_up(s: Session, writes: bool, stack: ExitStack, resumed: "Resumed | None") -> None:
    from . import resuming
    from .state import restore

    run, call, settings, model = s.run, s.call, s.settings, s.plan.model
    if writes and resumed is not None and resumed.directory is not None:
        _lock(s, resumed.directory)
    if "teardown" in call:
        stack.callback(call["teardown"], s.plan.verb)
    if s.group.local_rank == 0:
        beat(0, "preparing the data")
        call.get("prepare_data", _nothing)()
    beat(0, "waiting for prepare_data")
    s.group.wait()
    beat(0, "setting up")
    call.get("setup", _nothing)(s.plan.verb)
    call.get("configure_model", _nothing)()
    cut = sharding.wanted(s)
    if not cut:
        Materialiser(model, run.seed).fill(model)
    stack.callback(restore_modes, modes_of(model))
    if resumed is not None and not cut:
        resuming.load_first(s, resumed)

    if settings.precision in launch.TRUE:
        model.to(launch.TRUE[settings.precision])
    if settings.compile is not False:
        stack.callback(compile_forward(model, settings.compile))
    wrap(s)
    if resumed is not None and cut:
        resuming.load_first(s, resumed)  # each process its part
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
        s.means = Means(run.device, watch="train/loss", group=s.group)
        run.num_train_batches = s.peers.shortest(expected(settings, s.loaders["train"], "train"))
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
    from .checkpoint.content import CHECKPOINTS
    from .directory import make_directory
    from .provenance import provenance
    from .saving import Saver
    from .state import LOGGERS

    run, settings = s.run, s.settings
    policy = resuming.policy(settings, "val" in s.loaders) if s.plan.verb == "fit" else None
    directory = resumed.directory if resumed is not None else None
    if directory is None:  # made last: what was refused before leaves nothing behind
        directory = s.group.first(lambda: make_directory(settings, type(s.plan.model).__name__))
        _lock(s, directory)
    if run.is_main:
        ending.begin(directory)
    run.hparams = mask(_hparams(s.plan.model) | dict(settings.hparams or {}))
    kept = resumed.state.extra.get(LOGGERS, {}) if resumed is not None and resumed.state is not None else {}
    where = directory
    created = s.group.first(lambda: Kept(loggers.create(settings.logger, where, kept)))
    run.open(directory, loggers.Loggers(created.thing or {}))
    run.loggers.watch(s.plan.model)
    s.provenance = provenance(settings, run.seed)
    if policy is not None:
        s.saver = Saver(s, policy, directory / CHECKPOINTS)
    if resumed is not None:
        resuming.go_on(s, resumed)
    run.loggers.log_provenance(s.provenance)
    run.loggers.log_hparams(run.hparams)


def _lock(s: Session, directory: Path) -> None:
    """Keep other runs out of the directory; one process does it for all."""
    from .directory import locked

    s.group.first(lambda: Kept(s.stack.enter_context(locked(directory))))


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
    ours = s.settings.use_distributed_sampler
    share = Share(s.group.rank, s.group.size, filled=stage == "train") if ours else Share()
    s.loaders[stage] = loaders(given, stage, s.run.seed, share)
    if stage == "train":
        s.peers.measure(s.loaders[stage][0])


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
