"""Parameters that get no gradient in a run of several processes, for which DDP waits in vain: found and named."""

import re
from typing import Final

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from .errors import StepError

#: How torch's error begins, and where it says which parameters, by their places or (TORCH_DISTRIBUTED_DEBUG) by name.
_BEGINS: Final = "Expected to have finished reduction in the prior iteration"
_PLACES: Final = re.compile(r"Parameter indices which did not receive grad for rank \d+: ([\d ]+)")
_NAMES: Final = re.compile(r"Parameters which did not receive grad for rank \d+: (.+)")
_SHOWN: Final = 5


def without_gradient(wrapped: nn.Module) -> list[str]:
    """The parameters that DDP waits for and that have no gradient after a backward; 0.1 µs for each parameter."""
    if not isinstance(wrapped, DistributedDataParallel) or wrapped.find_unused_parameters or wrapped.static_graph:
        return []
    return [_short(name) for name, p in wrapped.module.named_parameters() if p.requires_grad and p.grad is None]


def named(error: RuntimeError, wrapped: nn.Module) -> list[str] | None:
    """The parameters that torch's error is about; None where it is another error."""
    text = str(error)
    if not text.startswith(_BEGINS):
        return None
    if found := _NAMES.search(text):
        return [_short(name) for name in found[1].split(", ")]
    places = {int(place) for place in found[1].split()} if (found := _PLACES.search(text)) else set[int]()
    trained = [name for name, p in wrapped.named_parameters() if p.requires_grad]  # in DDP's order
    return [_short(name) for place, name in enumerate(trained) if place in places]


def refusal(names: list[str]) -> StepError:
    """The error that names them."""
    if "ballot" in names:  # lightdeco's own (ballot.py), which gets its gradient from the loss
        return StepError(
            "the method marked @ld.backward did not call backward on the loss that it was given, by which several "
            "processes average gradients; call loss.backward(), or make a manual step: @ld.training_step(manual=True)"
        )
    if not names:
        which = "some parameters"
    else:
        which = f"{', '.join(names[:_SHOWN])}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}"
    return StepError(
        f"a training step gave no gradient to {which}: with several processes DDP waits for one. Freeze them "
        "(requires_grad_(False)) or remove them; if it depends on the batch, give "
        "strategy=DistributedDataParallelKwargs(find_unused_parameters=True) from accelerate.utils"
    )


def _short(name: str) -> str:
    return name.removeprefix("module.").removeprefix("model.")
