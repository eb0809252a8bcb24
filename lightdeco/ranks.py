"""What each process has of its own in a checkpoint, and how a run goes on with another number of processes."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from torch import Tensor

from .checkpoint import State
from .errors import warn
from .group import Group
from .scalars import fold

#: The corner of the checkpoint that holds a part for each process; not there where the run had one.
RANKS: Final = "(ranks)"


def gather(state: State, group: Group) -> None:
    """Put the parts of all processes into the state; every process calls it."""
    if group.size == 1:
        return
    own = {
        "metrics": {name: value for name, value in state.metrics.items() if name != "latest"},
        "random": state.random,
        "data": state.data["own"],
        "corners": {key: corner for key, corner in state.extra.items() if not key.startswith("(")},
    }
    state.extra[RANKS] = group.gather(_on_cpu(own))


def own(state: State, group: Group) -> State:
    """The state as this process goes on with it; warns where the run had another number of processes."""
    before = state.progress["world_size"]
    parts = state.extra.pop(RANKS, None)
    if parts is None and group.size == 1:
        return state
    if parts is None:
        parts = [{"metrics": state.metrics, "random": state.random, "data": state.data["own"], "corners": {}}]
    mine = parts[group.rank % len(parts)]
    metrics = {"latest": state.metrics["latest"], **mine["metrics"]}
    progress, data = dict(state.progress), state.data | {"own": mine["data"]}
    if before != group.size:
        metrics |= _shared_out(parts, group)
        again = _move(progress, before, group.size)
        del data["length"]  # of each process
        if group.rank == 0:
            _tell(before, group.size, again)
    return replace(
        state,
        metrics=metrics,
        random=mine["random"],
        data=data,
        progress=progress,
        extra=state.extra | mine["corners"],
    )


def _shared_out(parts: list[dict[str, Any]], group: Group) -> dict[str, Any]:
    """The metrics of the present epoch, each part taken over by one process."""
    mine = [part["metrics"] for part in parts[group.rank :: group.size]]
    if group.rank == 0 and any(part["metrics"]["torchmetrics"]["counted"] for part in parts):
        warn("what torchmetrics objects have counted in this epoch is left out: it cannot be shared out anew")
    return {"means": merged([each["means"] for each in mine]), "torchmetrics": {"logged": {}, "counted": {}}}


def merged(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What several `Means.state_dict` returned, as the state of one that was given all of it."""
    found: dict[str, Any] = {}
    for name, state in (item for each in states for item in each.items()):
        totals = dict(found.get(name, {}).get("totals", {}))
        for scope, (total, weight) in state["totals"].items():
            old = totals.get(scope)
            totals[scope] = [total, weight] if old is None else list(fold(state["reduce"], old, (total, weight)))
        found[name] = {**state, "totals": totals}
    return found


def _move(progress: dict[str, Any], before: int, now: int) -> int:
    """Set the position in the epoch by the order of one process; returns how many batches are read again."""
    done = progress["batch"] * before
    batch, again = divmod(done, now)
    progress["batch"] = batch
    progress["validated"] = progress["validated"] * before // now
    return int(again)


def _tell(before: int, now: int, again: int) -> None:
    repeated = f"; {again} of its batches are read again" if again else ""
    had = f"{before} process{'es' * (before != 1)}"
    warn(
        f"the run had {had} when the checkpoint was written, and has {now} now: an update is made of "
        f"{now} batches where it was of {before}. The samples come in the same order{repeated}"
    )


def _on_cpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(each) for each in value)
    return value
