"""A verb whose work is done by processes that this one starts: the model goes there, and its weights come back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch
from torch import nn

from . import ending, errors, group, joined, launch, strategies
from .callbacks.model_checkpoint import POLICY, ModelCheckpoint
from .errors import LaunchError, Line, warn
from .materialise import Materialiser
from .plan import Plan
from .run import Run
from .settings import Settings

if TYPE_CHECKING:
    from .resuming import Weights

#: The weights after `fit`, as a checkpoint in the directory that both sides know.
_TRAINED: Final = "trained"

#: What is known of a run after its end, and can be sent.
_TOLD: Final = (
    "progress",
    "stop_reason",
    "should_stop",
    "metrics",
    "history",
    "hparams",
    "best_checkpoint",
    "best_score",
    "last_checkpoint",
    "seed",
    "world_size",
    "num_train_batches",
    "prog_bar",
    "_dir",
)

#: The name of the data object's state.
_DATA: Final = "(data)"
#: Says of `EarlyStopping`, `SpikeDetection` and `Timer` that the next `fit` goes on; `load_state_dict` sets it.
_GOES_ON: Final = "_loaded"


Verb: TypeAlias = Callable[..., Any]


class _Call(NamedTuple):
    """The call of a verb, as it is sent."""

    verb: Verb
    model: nn.Module
    data: Any
    settings: Settings
    more: dict[str, Any]
    generator: torch.Tensor
    line: Line


def fit(verb: Verb, plan: Plan, model: nn.Module, data: Any, settings: Settings, count: int) -> Run:
    """`ld.fit` in `count` processes; the model then holds the trained weights.

    Raises:
        LaunchError: something cannot be sent, or a process died or hangs.

    What a process raises is raised here. The model is then unchanged.
    """
    with TemporaryDirectory(prefix="lightdeco-") as folder:
        try:
            told, states = _start(verb, model, data, settings, count, {}, Path(folder))
        except Exception as error:
            ending.correct(Path(folder), error)
            raise
        _take_over(plan, model, settings, Path(folder) / _TRAINED)
    _put_back(plan, settings, states)
    run = Run("fit", model, settings, told["seed"])
    for name in _TOLD:
        setattr(run, name, told[name])
    return run


def evaluate(
    verb: Verb, plan: Plan, data: Any, weights: "Weights", settings: Settings, count: int, writes: bool = False
) -> Any:
    """`ld.validate`, `ld.test` or `ld.predict` in `count` processes; of the last all outputs, in the data's order."""
    from .resuming import load

    more: dict[str, Any] = {"weights": weights} | ({"logger": settings.logger} if writes else {})
    result, states = _start(verb, plan.model, data, settings, count, more)
    load(plan.model, settings, weights)
    _put_back(plan, settings, states)
    return result


def _start(
    verb: Verb,
    model: nn.Module,
    data: Any,
    settings: Settings,
    count: int,
    more: dict[str, Any],
    folder: Path | None = None,
) -> Any:
    from . import processes

    # torch's random state decides the seed of a run that is given none.
    call = _Call(verb, model, data, settings, more, torch.get_rng_state(), errors.caller())
    return processes.start(
        _work,
        call,
        count,
        directory=folder,
        visible=launch.visible(settings),
        timeout_minutes=settings.process_timeout,
    )


def _work(call: _Call, folder: Path) -> tuple[Any, dict[str, Any]]:
    """In a started process: the verb; what rank 0 returns is sent back, with the states of what the verb was given."""
    from . import preparing

    errors.start_at(call.line)
    torch.set_rng_state(call.generator)
    settings = replace(call.settings, devices="auto")  # they are chosen already
    with preparing.again() as plans:
        result = call.verb(call.model, call.data, settings=settings, **call.more)
        if isinstance(result, Iterator):
            result = list(result)
    if isinstance(result, Run):
        _save(call.model, settings, folder)
    if joined.rank() > 0:
        return None, {}
    if isinstance(result, Run):
        result = {name: getattr(result, name) for name in _TOLD}
    return result, _states(plans[0], settings, folder)


def _save(model: nn.Module, settings: Settings, folder: Path) -> None:
    """Write the trained weights for the caller; every process calls it."""
    from . import checkpoint
    from .checkpoint import dealt

    trained = checkpoint.State(model=model.state_dict())
    if strategies.name_of(settings) == "fsdp":
        with group.opened(launch.kind_of(settings), settings.process_timeout, keep=True) as processes:
            dealt.deal(trained, {}, processes)
            processes.every(lambda: dealt.save(folder, _TRAINED, trained, processes))
    elif joined.rank() == 0:
        checkpoint.save(folder, _TRAINED, trained)


def _take_over(plan: Plan, model: nn.Module, settings: Settings, path: Path) -> None:
    """Load the trained weights; a model that builds layers in `configure_model` builds them here too."""
    from . import checkpoint, seeds

    with seeds.preserved():
        hook = plan.one("configure_model")
        if hook is not None:
            method, select = plan.step(hook, None)
            positional, keywords = select(())
            method(*positional, **keywords)
        Materialiser(model, 0).fill(model)
    if settings.precision in launch.TRUE:
        model.to(launch.TRUE[settings.precision])
    checkpoint.load_weights(model, path)


# ---- states ----------------------------------------------------------------------------------------------------------


def _states(plan: Plan, settings: Settings, folder: Path) -> dict[str, Any]:
    """On rank 0 after the verb: the states to send, by name."""
    from . import packing

    found: dict[str, Any] = {}
    for name, thing in _with_state(plan, settings):
        state = thing.state_dict()
        try:
            packing.pack(state, folder / "state")
        except LaunchError as error:  # a state is not worth the result of the run
            warn(f"the state of {type(thing).__name__} cannot be sent back: {error.__cause__}")
        else:
            found[name] = state
    return found


def _put_back(plan: Plan, settings: Settings, states: dict[str, Any]) -> None:
    """Load the states into the caller's objects: they are as after a verb in this process."""
    from . import seeds

    with seeds.preserved():
        for name, thing in _with_state(plan, settings):
            if name in states:
                goes_on = getattr(thing, _GOES_ON, None)
                thing.load_state_dict(states[name])
                if isinstance(goes_on, bool):
                    setattr(thing, _GOES_ON, goes_on and plan.verb != "fit")


def _with_state(plan: Plan, settings: Settings) -> Iterator[tuple[str, Any]]:
    """What has a state that the verb changes, by a name that both sides know."""
    from . import state

    yield from state.with_state(plan)
    if (data := state.data_object(plan)) is not None:
        yield _DATA, data
    if isinstance(settings.checkpoint, ModelCheckpoint) and plan.verb == "fit":
        yield POLICY, settings.checkpoint
