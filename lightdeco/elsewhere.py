"""A verb whose work is done by processes that this one starts: the model goes there, and its weights come back."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch
from torch import nn

from . import group, launch, strategies
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


Verb: TypeAlias = Callable[..., Any]


class _Call(NamedTuple):
    """The call of a verb, as it is sent."""

    verb: Verb
    model: nn.Module
    data: Any
    settings: Settings
    more: dict[str, Any]
    generator: torch.Tensor


def fit(verb: Verb, plan: Plan, model: nn.Module, data: Any, settings: Settings, count: int) -> Run:
    """`ld.fit` in `count` processes; the model then holds the trained weights.

    Raises:
        LaunchError: something cannot be sent, or a process died or hangs.

    What a process raises is raised here. The model is then unchanged.
    """
    with TemporaryDirectory(prefix="lightdeco-") as folder:
        told = _start(verb, model, data, settings, count, {}, Path(folder))
        _take_over(plan, model, settings, Path(folder) / _TRAINED)
    run = Run("fit", model, settings, told["seed"])
    for name in _TOLD:
        setattr(run, name, told[name])
    return run


def evaluate(
    verb: Verb, model: nn.Module, data: Any, weights: "Weights", settings: Settings, count: int, writes: bool
) -> dict[str, float]:
    """`ld.validate` or `ld.test` in `count` processes."""
    from .resuming import load

    more: dict[str, Any] = {"weights": weights} | ({"logger": settings.logger} if writes else {})
    values: dict[str, float] = _start(verb, model, data, settings, count, more)
    load(model, settings, weights)
    return values


def predict(verb: Verb, model: nn.Module, data: Any, weights: "Weights", settings: Settings, count: int) -> list[Any]:
    """`ld.predict` in `count` processes: everything, in the order of the data."""
    from .resuming import load

    outputs: list[Any] = _start(verb, model, data, settings, count, {"weights": weights})
    load(model, settings, weights)
    return outputs


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
    call = _Call(verb, model, data, settings, more, torch.get_rng_state())
    return processes.start(
        _work,
        call,
        count,
        directory=folder,
        visible=launch.visible(settings),
        timeout_minutes=settings.process_timeout,
    )


def _work(call: _Call, folder: Path) -> Any:
    """In a started process: the verb; what rank 0 returns is sent back."""
    from . import checkpoint
    from .checkpoint import dealt

    torch.set_rng_state(call.generator)
    settings = replace(call.settings, devices="auto")  # they are chosen already
    with group.opened(launch.kind_of(settings), settings.process_timeout) as processes:
        result = call.verb(call.model, call.data, settings=settings, **call.more)
        if isinstance(result, Iterator):
            return list(result)
        if not isinstance(result, Run):
            return result
        trained = checkpoint.State(model=call.model.state_dict())
        if strategies.name_of(settings) == "fsdp":
            dealt.deal(trained, {}, processes)
            processes.every(lambda: dealt.save(folder, _TRAINED, trained, processes))
        elif result.is_main:
            checkpoint.save(folder, _TRAINED, trained)
    return {name: getattr(result, name) for name in _TOLD}


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
