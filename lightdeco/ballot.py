"""The ballot: one small parameter more, whose gradient carries what the processes of a run tell each other.

Backward begins at the loss and at the ballot, whose gradient there is what the process has to say. DDP averages it with
the gradients of the model: each process gets the mean of what all of them put in.
"""

from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from .errors import StepError
from .signals import ENDS
from .steps import Steps

#: The places in what is agreed on: factor of the loss, factor times loss, seconds of rank 0, "stop", and then each
#: signal that ends a run, the one that requeues last.
FACTOR, LOSS, SECONDS, STOP, SIGNALS = range(5)
SIZE: Final = SIGNALS + len(ENDS) + 1
NO_SIGNALS: Final = [0.0] * (SIZE - SIGNALS)


class SharedSteps(Steps):
    """`Steps` with the ballot; a training step returns it beside its outputs."""

    def __init__(self, model: nn.Module, calls: Any, training: frozenset[str]) -> None:
        super().__init__(model, calls)
        double = all(p.dtype == torch.float64 for p in model.parameters())
        self.ballot = nn.Parameter(torch.zeros(SIZE, dtype=torch.float64 if double else torch.float32))
        self._training = training
        #: Whether DDP looks in the graph for the parameters that are used: then it must find the ballot there.
        self.searched = False

    def forward(self, role: str, *offered: object) -> Any:
        """As `Steps.forward`; of a training step `(outputs, ballot)`."""
        method, select = self.calls[role]
        positional, keywords = select(offered)
        outputs = method(*positional, **keywords)
        if role not in self._training:
            return outputs
        return outputs, self.ballot.view(-1) if self.searched else self.ballot


class Cast(torch.autograd.Function):
    """A loss whose backward, which somebody else calls, gives the ballot the votes, whatever the loss is scaled by."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, slip: Tensor, votes: Tensor) -> Tensor:
        """The loss."""
        ctx.votes = votes
        return loss.view_as(loss)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        """The gradient, and the votes."""
        return grads[0], ctx.votes, None


def refuse_weightless(means: Sequence[float]) -> None:
    """Refuse an update in which nothing counts; `means` of what was cast.

    Raises:
        StepError: every weight of the window was 0, on every process.
    """
    if means[FACTOR] == 0:
        raise StepError('every "weight" of an update was 0, on every process; leave such batches out of the data')
