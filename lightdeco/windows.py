"""The micro-batches of one update on several processes."""

from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from .optim import Window


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
