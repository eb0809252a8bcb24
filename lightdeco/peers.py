"""What the processes of a run agree on: how much each gradient counts, what time it is, who asks to stop.

So every process stops, saves and clips at the same step. Who averages the gradients is a class of its own: torch's DDP
(ddp.py), lightdeco itself for a small model (flat.py), FSDP and DeepSpeed (voting.py); here, for a step that calls
backward itself, nobody before the update.
"""

from collections.abc import Sequence
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .alone import Alone
from .ballot import FACTOR, LOSS, NO_SIGNALS, SECONDS, SIGNALS, SIZE, STOP, refuse_weightless
from .child import beat
from .data import batch_size_of
from .data.loader import Loader
from .dtensor import is_sharded
from .errors import warn
from .group import Group
from .optim import divide, parameters_of
from .run import Run
from .signals import ENDS, Signals
from .windows import SharedWindow


class Peers(Alone):
    """One process of several; the gradients of an update and what else is agreed on are averaged by `average`."""

    def __init__(self, run: Run, signals: Signals, group: Group) -> None:
        super().__init__(run, signals)
        self.group, self.size = group, group.size
        signals.shared = True
        #: The weight of an ordinary micro-batch. One that has it goes into backward as it is, so that with equal
        #: batches the gradients are bit-equal to those of plain DDP.
        self.unit = 1.0
        #: Whether the loss itself is agreed on: an optimizer with a closure looks at it, `on_nan="skip"` too.
        self.needs_loss = False
        #: Whether processes may have different numbers of batches, and whether they had of parts of one.
        self.uneven = self._parts_differ = False
        self.loss = torch.zeros(())
        double = all(p.dtype == torch.float64 for p in run.model.parameters())
        #: Of what is agreed on.
        self.dtype = torch.float64 if double else torch.float32
        #: The sums over the window: of the factors, and of the losses times their factors.
        self._factors: Any = 0.0
        self._losses: Any = 0.0
        self._stop, self._seconds = False, 0.0
        self._late: list[tuple[Tensor, Any]] = []
        #: The wishes of the last step, and the same as a tensor.
        self._wishes, self._template = list[float](), torch.empty(0)
        #: What the last update agreed on, if there was nothing to do.
        self._usual = list[float]()

    @property
    def stop(self) -> bool:
        """Whether any process asked to stop, as of the last update."""
        return self._stop

    def seconds(self) -> float:
        """Time in training on rank 0, as of the last update."""
        return self._seconds

    def window(self, size: int) -> SharedWindow:
        """The micro-batches of one update, on all processes."""
        return SharedWindow(size, self)

    # ---- with the gradients ------------------------------------------------------------------------------------------

    def sync(self, on: bool) -> None:
        """Before a step: whether its backward is the last one of an update."""

    def wishes(self) -> list[float]:
        """What this process asks for: a list of `SIZE` numbers, its part of the sum; seconds by tenths."""
        heard = self.signals.heard
        seconds = int((monotonic() - self.started) * 10) / 10 if self.group.rank == 0 else 0.0
        signals = [float(heard == number) for number in self._numbers()] if heard is not None else NO_SIGNALS
        return [0.0, 0.0, seconds, float(self.run.should_stop), *signals]

    def _numbers(self) -> tuple[int | None, ...]:
        """The signals that are heard, in the order of the ballot."""
        return (*ENDS, self.signals.requeues)

    def cast(self, loss: Tensor, factor: Any, last: bool) -> Tensor:
        """Before backward: the loss times its factor; `last`: it is the last one of an update."""
        self._factors = self._factors + factor
        if self.needs_loss:
            self._losses = self._losses + loss.detach() * factor
        return scaled(loss, factor)

    def backward(self, loss: Tensor) -> None:
        """Make gradients from the loss as `cast` returned it, times any scale."""
        loss.backward()  # type: ignore[no-untyped-call]

    def votes(self) -> Tensor:
        """What this process says to an update: its wishes, and the sums over the window, which begin anew."""
        votes = self.said(self.wishes(), self._factors, self._losses)
        self._factors = self._losses = 0.0
        return votes

    def said(self, wishes: list[float], factor: Any, loss: Any) -> Tensor:
        """A new tensor of the wishes, the factor and, where all need it, the loss times its factor.

        It is copied from one that is kept as long as they are the same: to make one waits for a GPU.
        """
        if not isinstance(factor, Tensor):
            wishes[FACTOR] = factor
        if wishes != self._wishes:
            self._wishes, self._template = wishes, torch.tensor(wishes, dtype=self.dtype, device=self.run.device)
        votes = self._template.clone()
        if isinstance(factor, Tensor):
            votes[FACTOR] = factor
        if self.needs_loss:
            votes[LOSS] = loss
        return votes

    def count(self, optimizer: Optimizer) -> None:
        """After backward: agree, and divide the optimizer's gradients by the mean of all factors.

        Raises:
            StepError: every weight of the window was 0.
        """
        self.tally(self.means(), optimizer)

    def means(self) -> Tensor:
        """The means of what all processes say to an update."""
        votes = self.votes()
        torch.distributed.all_reduce(votes)
        return votes / self.size

    def tally(self, votes: Tensor, optimizer: Optimizer) -> None:
        """Take over what was agreed, and divide the optimizer's gradients by the mean factor; `votes` are means.

        Raises:
            StepError: every weight of the window was 0.
        """
        if self.needs_loss:
            self.loss = votes[LOSS] / votes[FACTOR]
        if not votes.is_cpu:
            factor = votes[FACTOR]
            self.divide(optimizer, torch.where(factor == 0, torch.ones_like(factor), factor))
            self._read_later(votes)
            return
        numbers = votes.tolist()
        if numbers == self._usual:
            return
        self._read(numbers)
        refuse_weightless(numbers)
        if numbers[FACTOR] != 1.0:
            self.divide(optimizer, numbers[FACTOR])
        elif not any(numbers[STOP:]):
            self._usual = numbers

    def divide(self, optimizer: Optimizer, by: Any) -> None:
        """Divide the optimizer's gradients, by a number or a 0-dim tensor on their device."""
        divide(optimizer, by)

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """The sum of the optimizer's gradients over all processes, divided by the sum of factors; one all-reduce.

        For a step that calls backward itself, which DDP cannot see. A parameter without a gradient on any process keeps
        none.
        """
        self._factors = self._losses = 0.0
        parameters = [p for p in parameters_of(optimizer) if p.requires_grad]
        device, dtype = parameters[0].device, parameters[0].dtype
        wishes = torch.tensor(self.wishes(), device=device, dtype=dtype) / self.size
        wishes[FACTOR] = factor
        there = torch.tensor([float(p.grad is not None) for p in parameters], device=device, dtype=dtype)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flat = torch.cat([wishes, there, *(grad.reshape(-1).to(dtype) for grad in grads)])
        torch.distributed.all_reduce(flat)
        head = flat[: SIZE + len(parameters)].tolist()  # waits
        self._read(head[:SIZE])
        refuse_weightless(head)
        flat /= head[FACTOR]
        sizes = [p.numel() for p in parameters]
        for p, count, grad in zip(parameters, head[SIZE:], torch.split(flat[len(head) :], sizes), strict=True):
            if count:
                p.grad = grad.view_as(p).to(p.dtype, copy=True)

    # ---- without gradients -------------------------------------------------------------------------------------------

    def agree(self) -> None:
        """One small all-reduce; every process calls it at the same place."""
        votes = torch.tensor(self.wishes(), device=self.run.device)
        torch.distributed.all_reduce(votes)
        self._read((votes / self.size).tolist())

    def align(self, model: nn.Module, weights: bool = False) -> None:
        """One broadcast for each dtype; a model without buffers costs nothing."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in (*model.buffers(), *(model.parameters() if weights else ())):
            if not is_sharded(tensor):
                kinds.setdefault(tensor.dtype, []).append(tensor.detach())
        for tensors in kinds.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            torch.distributed.broadcast(flat, src=0)
            for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
                tensor.copy_(part.view_as(tensor))

    def measure(self, loader: Loader) -> None:
        """Agree on the weight of an ordinary batch, and on whether the processes can have different numbers of them."""
        sizes = loader.batch_sizes
        size = sizes[0] if len(sizes) == 1 and sizes[0] else batch_size_of(loader.first)
        self.unit = float(self.group.same(size or 1))
        lengths = self.group.gather(loader.length if loader.exact else None)
        self.uneven = None in lengths or len(set(lengths)) > 1

    def shortest(self, length: int | None) -> int | None:
        """One gathering, before training."""
        known = [each for each in self.group.gather(length) if each is not None]
        return min(known) if len(known) == self.size else None

    def fewest(self, parts: int) -> int:
        """One small all-reduce for each batch that is split; waits. What some have more is left out, with a warning."""
        numbers = torch.tensor([parts, -parts], device=self.run.device)
        torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
        fewest, most = numbers.tolist()
        if fewest != -most and not self._parts_differ:
            self._parts_differ = True
            warn(
                f"the processes cut a batch into different numbers of parts ({fewest} to {-most}): what some have more "
                "is left out; drop_last=True avoids short last batches"
            )
        return int(fewest)

    def together(self, batches: Any) -> Any:
        """Where processes may have different numbers of batches, they ask each other before each one."""
        for batch in batches:
            beat(self.run.progress.global_step, "training")
            if self.uneven and not self._all(True):
                warn("the processes have different numbers of batches: what some have more is left out of the epoch")
                return
            yield batch
        if self.uneven:
            self._all(False)

    def _all(self, there: bool) -> bool:
        flag = torch.tensor(float(there), device=self.run.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MIN)
        return bool(flag)

    # ---- what was agreed ---------------------------------------------------------------------------------------------

    def _read(self, means: Sequence[float]) -> None:
        """Take over what all wish; `means` over the processes, of which one at least asked where it is not 0."""
        self._seconds = means[SECONDS] * self.size
        if means[STOP]:
            self._stop = self.run.should_stop = True
        if not any(means[SIGNALS:SIZE]):
            return
        for number, wished in zip(self._numbers(), means[SIGNALS:SIZE], strict=True):
            if wished and self.signals.received is None:
                self.signals.received = number

    def _read_later(self, votes: Tensor) -> None:
        """Read the votes of two updates ago, which are there without waiting; the same ones on every process."""
        pinned = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=votes.device.type == "cuda")
        copy = pinned.copy_(votes, non_blocking=True)
        event = torch.get_device_module(votes.device).Event()
        event.record()
        self._late.append((copy, event))
        if len(self._late) > 2:
            numbers, there = self._late.pop(0)
            there.synchronize()
            self._read(numbers.tolist())


def scaled(loss: Tensor, factor: Any) -> Tensor:
    """The loss times its factor; itself where that is 1."""
    return loss if isinstance(factor, float) and factor == 1.0 else loss * factor
