"""`resume=` and `weights=`: where a verb goes on, or whose weights it uses."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from torch import nn

from . import checkpoint, ranks, strategies
from .callbacks.model_checkpoint import POLICY, DefaultCheckpoint, ModelCheckpoint
from .checkpoint import State
from .directory import find
from .errors import SettingsError, warn
from .group import Group
from .loggers.metrics_file import METRICS
from .plan import Plan
from .run import RESERVED_NAMES, Run
from .session import Session
from .settings import Settings
from .state import restore_data

#: "best", "last" or a path; None for the model as it is.
Weights: TypeAlias = str | os.PathLike[str] | None


@dataclass
class Resumed:
    """What was found: the run's directory (None: a new one), the checkpoint and, for `fit`, its state."""

    directory: Path | None
    checkpoint: Path | None
    state: State | None


def look(plan: Plan, settings: Settings, writes: bool, weights: Weights, group: Group) -> Resumed | None:
    """Find and read the checkpoint that `resume=` or `weights=` means; None where neither is given.

    Rank 0 looks for all; every process reads.

    Raises:
        CheckpointError: there is none, or none is valid.
        SettingsError: `weights` is of another type, or `overwrite` is set beside `resume`.
    """
    name = type(plan.model).__name__
    if weights is not None:
        return Resumed(None, group.first(lambda: _evaluated(settings, name, weights)), None)
    which = settings.resume
    if plan.verb != "fit" or which is None:
        return None
    if not writes:
        warn(f"resume={which!r} has no effect with fast_dev_run")
        return None
    if settings.overwrite:
        raise SettingsError(f"overwrite=True would delete the run that resume={which!r} goes on with; give one of them")
    directory, path = group.first(lambda: find(settings, name, which))
    named = None if settings.name is None else (Path(settings.root_dir) / settings.name).resolve()
    if directory is not None and named not in (None, directory.resolve()):
        directory = None  # the run goes on under a name of its own
    cut = group if strategies.name_of(settings) == "fsdp" else None
    return Resumed(directory, path, ranks.own(checkpoint.load(path, cut), group) if path is not None else None)


def _evaluated(settings: Settings, name: str, weights: Weights) -> Path | None:
    if not isinstance(weights, (str, os.PathLike)) or weights in ("", "auto"):
        raise SettingsError(f"weights is {weights!r}; allowed: 'best', 'last', the path of a checkpoint or a run, None")
    return find(settings, name, weights, ("last", "best")).checkpoint


def load(model: nn.Module, settings: Settings, weights: Weights) -> None:
    """Load what `weights=` means into a model; None leaves it as it is."""
    if weights is not None and (path := _evaluated(settings, type(model).__name__, weights)) is not None:
        checkpoint.load_weights(model, path)


def seed_of(resumed: Resumed | None, settings: Settings, drawn: int) -> int:
    """The seed of the run.

    Raises:
        SettingsError: the run to go on with has another seed than the one given.
    """
    if resumed is None or resumed.state is None:
        return drawn
    seed: int = resumed.state.progress["seed"]
    if settings.seed not in (None, seed):
        raise SettingsError(
            f"seed={settings.seed}: the run to resume has seed={seed}, which decides its order of data; leave it out"
        )
    return seed


def _rewind(run: Run) -> None:
    """Make the loggers forget what came after the checkpoint."""
    records = [(record["step"], {k: v for k, v in record.items() if k not in RESERVED_NAMES}) for record in run.history]
    run.loggers.cut(run.global_step)
    run.loggers.rewind(records)


def _name_lost(run: Run, state: State) -> None:
    """Warn that `metrics.jsonl` holds less than it held when the checkpoint was written."""
    steps = [record["step"] for record in run.history]
    there = f"{len(steps)} records, up to step {steps[-1]}" if steps else "no record"
    warn(
        f"{run.dir / METRICS} holds {there}: fewer than when the checkpoint was written, at global_step "
        f"{state.progress['global_step']}. The others are lost; the run goes on, and its history lacks them"
    )


def load_first(s: Session, resumed: Resumed) -> None:
    """Load the weights, and the data object's own state, before anything is made of them."""
    if resumed.checkpoint is not None:
        checkpoint.load_weights(s.plan.model, resumed.checkpoint)
    if resumed.state is not None:
        restore_data(s, resumed.state)


def policy(settings: Settings, validates: bool) -> ModelCheckpoint | None:
    """The policy that `checkpoint=` means, ready for a new run; None for no checkpoints.

    Raises:
        SettingsError: it is something else than a ModelCheckpoint, or has a monitor in a run that does not validate.
    """
    given = settings.checkpoint
    if isinstance(given, bool):
        return DefaultCheckpoint() if given else None
    if not isinstance(given, ModelCheckpoint):
        raise SettingsError(f"checkpoint is a {type(given).__name__}; allowed: True, False, ld.ModelCheckpoint(…)")
    if given.monitor is not None and not given.optional and not validates:
        raise SettingsError(
            f"ModelCheckpoint(monitor={given.monitor!r}): this run has no validation that could record it; leave "
            "monitor out, or give validation data and a @validation_step"
        )
    given.begin()
    return given


def go_on(s: Session, resumed: Resumed) -> None:
    """Cut the records back to the checkpoint, and take over what is kept in the directory."""
    run, state, directory = s.run, resumed.state, resumed.directory
    if directory is not None and run.is_main:
        size = 0 if state is None else state.progress["records"]
        lost = run.records_size < size
        run.cut_records(size)
        if lost and state is not None:
            _name_lost(run, state)
        _rewind(run)
    run.history = s.group.same(run.history)
    if s.saver is None or state is None or directory is None:
        return
    policy = s.saver.policy
    policy.load_state_dict(state.callbacks[POLICY])
    s.saver.show()
