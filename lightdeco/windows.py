"""The micro-batches of one update: how much each counts, on one process and on several."""

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import StepError
from .optim import divide


class Window:
    """The micro-batches of one update: how much each counts.

    Each micro-loss is a mean over its batch; multiplied by its weight before backward and with the gradients divided by
    the sum of weights before clipping, the window's gradient is that of the concatenated batch. A window of one
    micro-batch scales nothing.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        #: Whether each micro-batch is an update of its own, and nothing is scaled.
        self.plain = size == 1
        self.begin()

    def begin(self) -> None:
        """Begin the next window."""
        self.count = 0
        self.single = self.size == 1
        self._total: Any = 0

    def coming(self, last: bool) -> None:
        """Before the step of a micro-batch; `last`: none follows in this epoch."""

    def scale(self, loss: Tensor, weight: Any, last: bool) -> Tensor:
        """Count a micro-batch and return its loss as it goes into backward."""
        weight = self.counted(weight, last)
        return loss if self.single else loss * weight

    def counted(self, weight: Any, last: bool) -> Any:
        """Count a micro-batch, and return its weight as a number or a 0-dim tensor."""
        self.single = self.single or (self.count == 0 and last)
        self.count += 1
        if isinstance(weight, Tensor):
            weight = weight.detach().reshape(())
        self._total = self._total + weight
        return weight

    def complete(self, last: bool) -> bool:
        """Whether the update is due."""
        return self.count >= self.size or last

    def refuse_several(self, where: str) -> None:
        """Refuse to evaluate anew a window of several micro-batches, of which only the last is known.

        Raises:
            StepError: the window has several.
        """
        if not self.single:
            raise StepError(
                f"the closure of {where} was called in a window of several batches; set accumulate_grad_batches=1"
            )

    def agreed(self, loss: Tensor) -> Tensor:
        """The loss of the update, for a closure and for `on_nan`."""
        return loss

    def repeat(self, loss: Tensor) -> Tensor:
        """The loss of a step that a closure evaluates anew, as it goes into backward."""
        return loss

    def normalise(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the sum of weights.

        Raises:
            StepError: every weight of the window was 0.
        """
        if self.single:
            return
        total = self._total
        if isinstance(total, Tensor):
            total = torch.where(total == 0, torch.ones_like(total), total)  # all gradients are 0 then
        elif total == 0:
            raise StepError('every "weight" of an accumulation window was 0; leave such batches out of the data')
        divide(optimizer, total)

    def finish(self, optimizer: Optimizer) -> None:
        """Divide the gradients, and begin the next window."""
        self.normalise(optimizer)
        self.begin()


# ---- on several processes --------------------------------------------------------------------------------------------


class Agreeing(Protocol):
    """What a window asks of `peers.Peers`."""

    unit: float
    loss: Tensor

    def sync(self, on: bool) -> None:
        """Whether the next backward averages the gradients."""

    def cast(self, loss: Tensor, factor: Any, last: bool) -> Tensor:
        """The loss times its factor, as it goes into backward."""
        ...

    def count(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the mean of all factors."""

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """The mean of the gradients over all processes."""


class SharedWindow(Window):
    """The micro-batches of one update on all processes; their gradients are averaged with the last one's backward."""

    def __init__(self, size: int, peers: Agreeing) -> None:
        self._peers = peers
        super().__init__(size)
        self.plain = False
        peers.sync(True)  # a window of one batch is not asked for what is coming

    def coming(self, last: bool) -> None:
        """Before the step of a micro-batch: only the window's last one is averaged."""
        self._peers.sync(self.count + 1 >= self.size or last)

    def scale(self, loss: Tensor, weight: Any, last: bool) -> Tensor:
        """Count a micro-batch and return its loss as it goes into backward."""
        self._factor = self.counted(weight, last) / self._peers.unit
        self._averaged = self.complete(last)
        return self._peers.cast(loss, self._factor, self._averaged)

    def normalise(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the mean of all factors."""
        if self._averaged:
            self._peers.count(optimizer)
        else:  # the epoch ended with a batch that this step leaves out
            self._peers.average(optimizer, self._total / self._peers.unit)

    def agreed(self, loss: Tensor) -> Tensor:
        """The mean loss of all processes."""
        return self._peers.loss

    def repeat(self, loss: Tensor) -> Tensor:
        """The loss of a step that a closure evaluates anew, as it goes into backward."""
        return self._peers.cast(loss, self._factor, True)


class SharedPending(Window):
    """The micro-batches of one update of a manual step, whose gradients are averaged when it is made."""

    def __init__(self, size: int, peers: Agreeing) -> None:
        self._peers = peers
        super().__init__(size)
        self.plain = self.single = False

    def begin(self) -> None:
        """Begin the next window."""
        super().begin()
        self.single = False

    def scale(self, loss: Tensor, weight: Any, last: bool) -> Tensor:
        """Count a micro-batch and return its loss times its weight."""
        return super().scale(loss, weight, False)

    def normalise(self, optimizer: Optimizer) -> None:
        """Average the gradients by the weights of all processes; without weights, processes count equally."""
        self._peers.average(optimizer, self._total if self.count else 1)
