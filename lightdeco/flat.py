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
        self._model = run.model
        self._trained: list[nn.Parameter] = []
        self._names: list[str] = []
        #: Votes and gradients one after the other, and the place of each in it.
        self._message = torch.empty(0)
        self._places: list[Tensor] = []
        self._last = True

    def begin(self) -> None:
        """Give every process the weights of rank 0.

        Raises:
            LaunchError: the processes have different models.
        """
        first, *others = self.group.gather([(name, tuple(p.shape)) for name, p in self._model.named_parameters()])
        for rank, other in enumerate(others, start=1):
            if other != first:
                raise LaunchError(
                    f"rank {rank} has other parameters than rank 0; every process must make the same model"
                )
        self.align(self._model, weights=True)

    def refresh(self) -> None:
        """Make room for the gradients of what is trained."""
        named = [(name, p) for name, p in self._model.named_parameters() if p.requires_grad]
        if [name for name, _ in named] == self._names:
            return
        self._names, self._trained = [name for name, _ in named], [p for _, p in named]
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
        grads: list[Any] = [p.grad for p in self._trained]
        if any(grad is None or grad.is_sparse for grad in grads):
            self._refuse(grads)
        torch._foreach_copy_(self._places, [self.votes(), *grads])
        self._message.mul_(1 / self.size)  # before the sum, as DDP does it
        torch.distributed.all_reduce(self._message)
        torch._foreach_copy_(grads, self._places[1:])

    def _refuse(self, grads: list[Any]) -> NoReturn:
        if missing := [name for name, grad in zip(self._names, grads, strict=True) if grad is None]:
            raise unused.refusal(missing)
        name = next(name for name, grad in zip(self._names, grads, strict=True) if grad.is_sparse)
        raise StepError(f"{name} got a sparse gradient; give strategy='ddp', which averages those too")

    def means(self) -> Tensor:
        """What came with the gradients."""
        return self._places[0]

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """Average the gradients of a window whose last backward was not known to be the last."""
        self._exchange()
        self.count(optimizer)
