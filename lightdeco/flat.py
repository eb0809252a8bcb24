"""Processes that average the gradients of a small model themselves, in one message after backward.

DDP cuts gradients into buckets, the first of 1 MiB, and sends one while backward makes the next. A model of one bucket
has nothing to gain from that: what is left of DDP is what its forward and its hooks cost, which for a small model is
more than all of lightdeco. The numbers are the same: gradients divided by the number of processes, and added up.
"""

from typing import Any, Final, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import unused
from .ballot import SIZE
from .errors import LaunchError, StepError
from .group import Group
from .peers import Peers
from .run import Run
from .session import Session
from .signals import Signals

#: Bytes of what is trained, up to which it is one bucket of DDP.
BUCKET: Final = 1 << 20


def fits(s: Session) -> bool:
    """Whether DDP would do nothing else for this run than `Flat`: "auto" on a CPU, one training step, a small model.

    Small: what it trains, in float32 or float64, has 1 MiB at most, and it has no buffers, which DDP sends around
    before each step.
    """
    model = s.plan.model
    steps = [hook for hook in s.plan.steps().values() if hook.role.name == "training_step"]
    if s.settings.strategy != "auto" or s.run.device.type != "cpu" or len(steps) > 1 or s.plan.one("backward"):
        return False
    if any(True for _ in model.buffers()) or any(getattr(module, "sparse", False) for module in model.modules()):
        return False
    size = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    return size <= BUCKET and {p.dtype for p in model.parameters()} in ({torch.float32}, {torch.float64})


class Flat(Peers):
    """One process of several."""

    def __init__(self, run: Run, signals: Signals, group: Group) -> None:
        super().__init__(run, signals, group)
        #: Every parameter of the model, those that are trained, and whether each of the first is.
        self._every: list[nn.Parameter] = []
        self._trained: list[nn.Parameter] = []
        self._required: list[bool] = []
        #: Votes and gradients one after the other, and the place of each in it.
        self._message = torch.empty(0)
        self._places: list[Tensor] = []
        self._last = True

    def refresh(self) -> None:
        """Where there are other parameters than before, or other ones are trained: those of rank 0 for all, as by DDP.

        Raises:
            LaunchError: the processes have different models.
        """
        model = self.run.model
        every = list(model.parameters())
        if [*map(id, every)] == [*map(id, self._every)] and [p.requires_grad for p in every] == self._required:
            return
        first, *others = self.group.gather([(name, tuple(p.shape)) for name, p in model.named_parameters()])
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise LaunchError(
                    f"rank {rank} has other parameters than rank 0; every process must make the same model"
                )
        self.align(model, weights=True)
        self._every = every
        self._make_room()

    def _make_room(self) -> None:
        self._required = [p.requires_grad for p in self._every]
        self._trained = [p for p in self._every if p.requires_grad]
        sizes = [SIZE, *(p.numel() for p in self._trained)]
        self._message = torch.empty(sum(sizes), dtype=self.dtype)
        votes, *parts = torch.split(self._message, sizes)
        self._places = [votes, *(part.view(p.shape) for part, p in zip(parts, self._trained, strict=True))]

    def cast(self, loss: Tensor, factor: Any, last: bool) -> Tensor:
        """The loss times its factor."""
        self._last = last
        return super().cast(loss, factor, last)

    def backward(self, loss: Tensor) -> None:
        """Make gradients; with the last ones of an update, those of all processes.

        Raises:
            StepError: a parameter got none, or a sparse one.
        """
        loss.backward()  # type: ignore[no-untyped-call]
        if self._last:
            self._exchange()

    def _exchange(self) -> None:
        if [p.requires_grad for p in self._every] != self._required:
            self._make_room()  # frozen or thawed within the epoch
        grads: list[Any] = [p.grad for p in self._trained]
        if any(grad is None or grad.is_sparse for grad in grads):
            self._refuse(grads)
        torch._foreach_copy_(self._places, [self.votes(), *grads])
        self._message.mul_(1 / self.size)  # before the sum, as DDP does it
        torch.distributed.all_reduce(self._message)
        torch._foreach_copy_(grads, self._places[1:])

    def _refuse(self, grads: list[Any]) -> NoReturn:
        names = {id(p): name for name, p in self.run.model.named_parameters()}
        named = [(names[id(p)], grad) for p, grad in zip(self._trained, grads, strict=True)]
        if missing := [name for name, grad in named if grad is None]:
            raise unused.refusal(missing)
        name = next(name for name, grad in named if grad.is_sparse)
        raise StepError(
            f"{name} got a sparse gradient, which several processes average only for nn.Embedding and nn.EmbeddingBag "
            "with sparse=True; use one of these, or make the gradient dense"
        )

    def means(self) -> Tensor:
        """What came with the gradients."""
        return self._places[0]

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """Average the gradients of a window whose last backward was not known to be the last."""
        self._exchange()
        self.count(optimizer)
