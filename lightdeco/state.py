"""What a checkpoint holds of a run: `collect` reads it from a session, `restore` puts it back."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from itertools import zip_longest
from time import monotonic
from typing import Any, Final

from . import ranks, strategies, xla
from .callbacks.model_checkpoint import POLICY
from .checkpoint import State
from .counted import counted, metric_modules, set_counted
from .dtensor import reshard
from .errors import CheckpointError, warn
from .plan import Hook, Plan
from .seeds import random_state, set_random_state
from .session import Session

#: The corner of the checkpoint that holds the states of the loggers, such as the id of a vendor's run.
LOGGERS: Final = "(loggers)"
#: The corner that says of which kinds and parameters the optimizers are; their own states only count them.
OPTIMIZERS: Final = "(optimizers)"


def collect(s: Session, metrics: Mapping[str, Any] | None = None) -> State:
    """The state between two steps. The tensors are the live ones: it must be written or copied before the next step.

    `metrics`: what `collect_metrics` gave, where that was taken away meanwhile.
    """
    run = s.run
    reshard(run.model)  # the user may have called it
    xla.sync()  # or each tensor would be read by a program of its own
    run.progress.seconds = s.seconds()
    corners: dict[str, Any] = {}
    for key, hook in _named(s, "on_save_checkpoint"):
        s.plan.call(hook, run, (corners.setdefault(key, {}),))
    state = State(
        model=s.plan.model.state_dict(),
        optimizers={name: s.held.state_of(optim.optimizer) for name, optim in run.optims.items()},
        scaler={name: scaler.state_dict() for name, scaler in s.scalers.items()} or None,
        schedulers={n: optim.scheduler.state_dict() for n, optim in run.optims.items() if optim.scheduler is not None},
        callbacks={key: thing.state_dict() for key, thing in with_state(s.plan)},
        data=_data(s),
        progress=asdict(run.progress) | _position(s),
        metrics={"latest": run.metrics} | _without_unkept(s, metrics or collect_metrics(s)),
        random=random_state(),
        hparams=run.hparams,
        settings=s.provenance["settings"],
        extra=corners | {LOGGERS: run.loggers.state_dict(), OPTIMIZERS: _kinds(s)},
        versions=s.provenance["environment"],
    )
    ranks.gather(state, s.group)
    s.held.deal(state, {name: optim.optimizer for name, optim in run.optims.items()})
    return state


def collect_metrics(s: Session) -> dict[str, Any]:
    """What was logged in the present epoch; of torchmetrics objects that are no part of the model, the names alone."""
    return {"means": s.means.state_dict(), "torchmetrics": _torchmetrics(s)}


def restore(s: Session, state: State) -> None:
    """Put a state back into a session that was made ready: all but the model's weights, which go first.

    Raises:
        CheckpointError: the state is of other optimizers, schedulers or parameters.
    """
    run = s.run
    _compare_optimizers(state.extra[OPTIMIZERS], _kinds(s))
    for name, optim in run.optims.items():
        if optim.scheduler is not None:
            optim.scheduler.load_state_dict(state.schedulers[name])
            # An epoch may end right after a resume: torch would warn of a scheduler that steps before its optimizer.
            vars(optim.optimizer)["_opt_called"] = True
        # After the schedulers, some of which set learning rates.
        s.held.load(optim.optimizer, state.optimizers[name], name or "optimizer")
    for name, scaler in s.scalers.items():
        if state.scaler is not None and name in state.scaler:
            scaler.load_state_dict(state.scaler[name])
    things = dict(with_state(s.plan))
    for key in [key for key in state.callbacks if key not in things and key != POLICY]:
        warn(f"the checkpoint holds a state of the callback {key}, which this run does not have; it is left out")
    for key, thing in things.items():
        if key in state.callbacks:
            thing.load_state_dict(state.callbacks[key])
    _compare_data(s, state.data)
    compression = strategies.compression(None if run.accelerator is None else run.accelerator.ddp_handler)
    if compression is not None and "power_sgd" in compression:
        warn(
            f"comm_hook={compression!r} keeps what it has not sent yet, which a checkpoint does not hold: the run goes "
            "on, but not to the bit as if it had not been interrupted"
        )
    progress = run.progress
    for field in asdict(progress):
        if field != "calls" and field in state.progress:  # not there in checkpoints of an earlier version
            setattr(progress, field, state.progress[field])
    progress.calls.clear()
    progress.calls.update(state.progress["calls"])
    run.should_stop, run.stop_reason = state.progress["should_stop"], state.progress["stop_reason"]
    s.finished, s.peers.started = state.progress["finished"], monotonic() - progress.seconds
    s.first_micro_batch = progress.micro_batch - progress.batch
    s.steps_before = -1 if progress.batch else progress.global_step
    s.checked_batch, s.checked_step = progress.batch, progress.global_step
    run.metrics.update(state.metrics["latest"])
    s.means.load_state_dict(state.metrics["means"])
    _restore_torchmetrics(s, state.metrics["torchmetrics"])
    for key, hook in _named(s, "on_load_checkpoint"):
        s.plan.call(hook, run, (state.extra.get(key, {}),))
    set_random_state(state.random)


def _position(s: Session) -> dict[str, Any]:
    """What belongs to the position of a run besides its progress."""
    run = s.run
    return {
        "seed": run.seed,
        "world_size": run.world_size,
        "records": run.records_size,
        "should_stop": run.should_stop,
        "stop_reason": run.stop_reason,
        "finished": s.finished,
    }


def _owners(plan: Plan) -> dict[int, str]:
    """A name for each object with marks, by its id: "model", "data", or the class of a callback and its number."""
    named: dict[int, str] = {}
    counts: dict[str, int] = {}
    for thing in plan.owners:
        if thing is plan.model or thing is plan.data:
            named[id(thing)] = "model" if thing is plan.model else "data"
            continue
        kind = type(thing).__qualname__
        counts[kind] = counts.get(kind, 0) + 1
        named[id(thing)] = kind if counts[kind] == 1 else f"{kind} {counts[kind]}"
    return named


def _named(s: Session, event: str) -> Iterator[tuple[str, Hook]]:
    owners = _owners(s.plan)
    return ((owners[id(hook.owner)], hook) for hook in s.plan.all(event))


def with_state(plan: Plan) -> Iterator[tuple[str, Any]]:
    """The callbacks that have a state, by name."""
    owners = _owners(plan)
    for thing in plan.owners:
        if owners[id(thing)] not in ("model", "data") and _has_state(thing):
            yield owners[id(thing)], thing


def _has_state(thing: object) -> bool:
    return callable(getattr(thing, "state_dict", None)) and callable(getattr(thing, "load_state_dict", None))


# ---- optimizers ------------------------------------------------------------------------------------------------------


def _kinds(s: Session) -> dict[str, dict[str, Any]]:
    names = {id(parameter): name for name, parameter in s.plan.model.named_parameters()}
    return {
        name: {
            "optimizer": type(optim.optimizer).__name__,
            "scheduler": None if optim.scheduler is None else type(optim.scheduler).__name__,
            # Those that are not the model's have no name.
            "parameters": [[names.get(id(p)) for p in group] for group in s.held.parameters(optim.optimizer)],
        }
        for name, optim in s.run.optims.items()
    }


def _compare_optimizers(saved: Mapping[str, Any], present: Mapping[str, Any]) -> None:
    if saved.keys() != present.keys():
        raise _other("the names of the optimizers", sorted(saved), sorted(present))
    for name, now in present.items():
        for what, value in now.items():
            before = saved[name][what]
            if before != value and what != "parameters":
                raise _other(f"the {what}" + (f" of {name!r}" if name else ""), before, value)
            if before != value:
                pairs = zip_longest(_flat(before), _flat(value), fillvalue="none")
                sizes = [len(group) for group in before], [len(group) for group in value]
                first = next((pair for pair in pairs if pair[0] != pair[1]), sizes)
                raise _other("the optimizer's parameters are in other places, first", *first)


def _flat(groups: list[list[str | None]]) -> list[str | None]:
    return [name for group in groups for name in group]


def _other(what: str, before: object, now: object) -> CheckpointError:
    return CheckpointError(
        f"{what}: {before!r} in the checkpoint, {now!r} in this run, which cannot go on with its state; make it as it "
        "was, or start anew with the weights alone: ld.load_weights(model, path)"
    )


# ---- data ------------------------------------------------------------------------------------------------------------


def _data(s: Session) -> dict[str, Any]:
    """The data object's own state, and what the order of the batches depends on besides the position."""
    (loader,) = s.loaders["train"]
    thing = data_object(s.plan)
    own = thing.state_dict() if thing is not None else None
    sizes = list(loader.batch_sizes)
    return {"own": own, "length": loader.length, "batch_sizes": sizes, "stream_workers": loader.stream_workers}


def data_object(plan: Plan) -> Any:
    """The data object, if it has a state of its own."""
    return plan.data if plan.data is not plan.model and _has_state(plan.data) else None


def _compare_data(s: Session, data: Mapping[str, Any]) -> None:
    """Name what makes the batches other ones than those of the interrupted run."""
    (loader,) = s.loaders["train"]
    sizes = data.get("batch_sizes", [])  # not in checkpoints of the first days
    known = [(before, now) for before, now in zip(sizes, loader.batch_sizes, strict=False) if None not in (before, now)]
    changed = [(before, now) for before, now in known if before != now]
    if changed:
        before, now = changed[0]
        warn(
            f"the train loader gave batches of {before} samples ({data.get('length')} of them) when the checkpoint was "
            f"written, and gives batches of {now} ({loader.length} of them) now: the run goes on with other batches "
            "than it would have had"
        )
    elif data.get("length", loader.length) != loader.length:  # left out where the run had more or fewer processes
        warn(
            f"the train loader had {data['length']} batches when the checkpoint was written and has {loader.length} "
            "now: the run goes on with other batches than it would have had"
        )
    if data["stream_workers"] != loader.stream_workers:
        warn(
            f"the train loader reads an iterable dataset with {loader.stream_workers} workers, and had "
            f"{data['stream_workers']} when the checkpoint was written: the run goes on with other batches"
        )


def restore_data(s: Session, state: State) -> None:
    """Give the data object its own state back, before it is asked for loaders."""
    thing = data_object(s.plan)
    if state.data["own"] is not None and thing is not None:
        thing.load_state_dict(state.data["own"])


# ---- torchmetrics ----------------------------------------------------------------------------------------------------


def _torchmetrics(s: Session) -> dict[str, Any]:
    paths = {id(module): path for path, module in metric_modules(s.plan.model).items()}
    logged = {name: paths.get(id(metric)) for name, metric in s.means.metrics.items()}
    return {"logged": logged, "counted": counted(s.plan.model)}


def _without_unkept(s: Session, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics as a checkpoint holds them; those that it cannot hold are named, once in a run."""
    logged: Mapping[str, str | None] = metrics["torchmetrics"]["logged"]
    for name in [name for name, path in logged.items() if path is None and name not in s.unkept]:
        s.unkept.add(name)
        warn(
            f"the torchmetrics object logged as {name!r} is no part of the model, so a checkpoint within an epoch "
            "does not hold what it has counted; make it an attribute of the model"
        )
    kept = {name: path for name, path in logged.items() if path is not None}
    return {**metrics, "torchmetrics": {**metrics["torchmetrics"], "logged": kept}}


def _restore_torchmetrics(s: Session, state: Mapping[str, Any]) -> None:
    set_counted(s.plan.model, state["counted"])
    modules = metric_modules(s.plan.model)
    s.means.metrics.update({name: modules[path] for name, path in state["logged"].items() if path in modules})
