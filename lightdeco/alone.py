"""What the loop asks of the other processes of a run, where there are none."""

from collections.abc import Callable, Iterator
from itertools import repeat
from time import monotonic
from typing import Any, NamedTuple

from torch import Tensor, nn

from .data.loader import Loader
from .group import Group
from .run import Run
from .signals import Signals
from .windows import Window


class Bad(NamedTuple):
    """A loss that was not finite: the batch of the epoch, the step that it made, and which loss it is."""

    batch: int
    step: int
    which: str


class Alone:
    """A process on its own: it asks nobody."""

    size = 1

    def __init__(self, run: Run, signals: Signals) -> None:
        self.run, self.signals = run, signals
        self.group = Group()
        #: `monotonic()` when training would have begun, had it not been interrupted.
        self.started = monotonic()

    @property
    def stop(self) -> bool:
        """Whether `run.should_stop` was set."""
        return self.run.should_stop

    def seconds(self) -> float:
        """Time in training, that before an interruption included."""
        return monotonic() - self.started

    def window(self, size: int) -> Window:
        """The micro-batches of one update."""
        return Window(size)

    def agree(self) -> None:
        """Between two epochs or after an evaluation: hear what the others wish."""

    #: Makes gradients from a loss.
    backward: Callable[[Tensor], None] = staticmethod(Tensor.backward)

    def align(self, model: nn.Module, weights: bool = False) -> None:
        """Give every process the buffers of rank 0, before an evaluation; `weights`: the parameters too."""

    def refresh(self) -> None:
        """At the beginning of an epoch: look which parameters require grad."""

    def measure(self, loader: Loader) -> None:
        """Look at the training loader, from which the processes read."""

    def shortest(self, length: int | None) -> int | None:
        """The least of the lengths; None where a process does not know its own."""
        return length

    def fewest(self, parts: int) -> int:
        """The least of the numbers of parts that the processes have made of a batch."""
        return parts

    def together(self, batches: Any) -> Any:
        """The batches, as long as every process has one."""
        return batches

    def rounds(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """The batches of an evaluation, each with whether it is this process's own."""
        return zip(batches, repeat(True), strict=False)
