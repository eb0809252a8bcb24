"""How a run holds its model and the optimizers' state: what a checkpoint gets of them, and what takes them back."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from .checkpoint import State, load_optimizer
from .checkpoint.dealt import deal
from .group import Group


class Held:
    """Every process holds all of it."""

    #: Whether each process holds a part, so that all of them write checkpoints together.
    cut = False

    def parameters(self, optimizer: Optimizer) -> list[list[nn.Parameter]]:
        """The parameters of the model that are in each group of the optimizer."""
        return [group["params"] for group in optimizer.param_groups]

    def state_of(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state as torch's `state_dict` has it; what is cut comes with `deal`."""
        return optimizer.state_dict()

    def load(self, optimizer: Optimizer, state: Mapping[str, Any], name: str) -> None:
        """Load an optimizer's state bit for bit.

        Raises:
            CheckpointError: the state is of other parameters or of another kind of optimizer.
        """
        load_optimizer(optimizer, state, name)

    def deal(self, state: State, optimizers: Mapping[str, Optimizer]) -> None:
        """Give each tensor that is cut to one process, whole; every process calls it."""

    def gather(self) -> None:
        """At the end of training: give every process the whole model again, where it has another form meanwhile."""


class InParts(Held):
    """The model lies in parts, as torch's `fully_shard` cuts it, before and after the run."""

    cut = True

    def __init__(self, group: Group) -> None:
        self._group = group

    def deal(self, state: State, optimizers: Mapping[str, Optimizer]) -> None:
        """Give each tensor that is cut to one process, whole; an all-gather for each."""
        deal(state, optimizers, self._group)
