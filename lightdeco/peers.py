"""What the processes of a run agree on: how much each gradient counts, what time it is, who asks to stop.

With `Peers`, all of it rides in the all-reduce of the gradients (see ballot.py). So an update costs one all-reduce, and
every process stops, saves and clips at the same step.
"""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .ballot import FACTOR, LOSS, SECONDS, SIGNALS, SIZE, STOP, Cast, SharedSteps
from .data import batch_size_of
from .data.loader import Loader
from .errors import StepError, warn
from .group import Group
from .optim import Window, gradients_of, parameters_of
from .run import Run
from .signals import ENDS, Signals


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

    def align(self, model: nn.Module, weights: bool = False) -> None:
        """Give every process the buffers of rank 0, before an evaluation; `weights`: the parameters too."""

    def measure(self, loader: Loader) -> None:
        """Look at the training loader, from which the processes read."""

    def together(self, batches: Any) -> Any:
        """The batches, as long as every process has one."""
        return batches


class Peers(Alone):
    """One process of several."""

    def __init__(self, run: Run, signals: Signals, group: Group) -> None:
        super().__init__(run, signals)
        self.group, self.size = group, group.size
        signals.shared = True
        #: The weight of an ordinary micro-batch. One that has it goes into backward as it is, so that with equal
        #: batches the gradients are bit-equal to those of plain DDP.
        self.unit = 1.0
        #: Whether the loss itself is agreed on: an optimizer with a closure looks at it, `on_nan="skip"` too.
        self.needs_loss = False
        #: Whether processes may have different numbers of batches.
        self.uneven = False
        self.loss = torch.zeros(())
        #: Switches the all-reduce in the next backward on or off.
        self.sync: Callable[[bool], object] = lambda on: None
        #: The ballot as the last forward returned it.
        self.slip: Tensor | None = None
        self._ballot: nn.Parameter | None = None
        self._stop, self._seconds = False, 0.0
        self._late: list[tuple[Tensor, Any]] = []
        #: The wishes of the last step, and the same as a tensor.
        self._wishes, self._template = list[float](), torch.empty(0)

    @property
    def stop(self) -> bool:
        """Whether any process asked to stop, as of the last update."""
        return self._stop

    def seconds(self) -> float:
        """Time in training on rank 0, as of the last update."""
        return self._seconds

    def window(self, size: int) -> "SharedWindow":
        """The micro-batches of one update, on all processes."""
        return SharedWindow(size, self)

    # ---- with the gradients ------------------------------------------------------------------------------------------

    def wrap(self, steps: "SharedSteps", wrapped: nn.Module) -> Callable[..., Any]:
        """The training steps behind what accelerate wrapped around them."""
        self._ballot = steps.ballot
        if isinstance(wrapped, nn.parallel.DistributedDataParallel):

            def sync(on: bool) -> None:
                if wrapped.require_backward_grad_sync is not on:  # 1 µs for each attribute of a module
                    wrapped.require_backward_grad_sync = on

            self.sync = sync

        def step(key: str, *inputs: object) -> Any:
            outputs, self.slip = wrapped(key, *inputs)
            return outputs

        return step

    def wishes(self) -> list[float]:
        """What this process asks for: a list of `SIZE` numbers, its part of the sum; seconds by tenths."""
        heard = self.signals.heard
        seconds = int((monotonic() - self.started) * 10) / 10 if self.group.rank == 0 else 0.0
        return [0.0, 0.0, seconds, float(self.run.should_stop), *(float(heard == number) for number in ENDS)]

    def cast(self, loss: Tensor, factor: Any, last: bool) -> Tensor:
        """The loss times its factor, connected with the ballot; the wishes go with the last one of an update."""
        assert self.slip is not None
        wishes = self.wishes() if last else [0.0] * SIZE
        if not isinstance(factor, Tensor):
            wishes[FACTOR] = factor
        if wishes != self._wishes:  # seldom; on a GPU this waits for it
            self._wishes = wishes
            self._template = torch.tensor(wishes, dtype=self.slip.dtype, device=self.slip.device)
        votes = self._template.clone()  # autograd may take it as it is for the gradient, in which DDP writes
        if isinstance(factor, Tensor):
            votes[FACTOR] = factor
        if self.needs_loss:
            votes[LOSS] = loss.detach() * factor
        return Cast.apply(loss, self.slip, factor, votes)  # type: ignore[no-any-return]

    def count(self, optimizer: Optimizer) -> None:
        """After backward: read the ballot, and divide the optimizer's gradients by the mean of all factors.

        Raises:
            StepError: every weight of the window was 0.
        """
        assert self._ballot is not None and self._ballot.grad is not None
        votes, self._ballot.grad = self._ballot.grad, None
        if self.needs_loss:
            self.loss = votes[LOSS] / votes[FACTOR]
        if votes.device.type != "cpu":
            factor = votes[FACTOR]
            torch._foreach_div_(gradients_of(optimizer), torch.where(factor == 0, torch.ones_like(factor), factor))
            self._read_later(votes)
            return
        numbers = votes.tolist()
        self._read(numbers)
        if numbers[FACTOR] == 0:
            raise StepError('every "weight" of an update was 0, on every process; leave such batches out of the data')
        if numbers[FACTOR] != 1.0:
            torch._foreach_div_(gradients_of(optimizer), numbers[FACTOR])

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """The sum of the optimizer's gradients over all processes, divided by the sum of factors; one all-reduce.

        For a step that calls backward itself, which DDP cannot see. A parameter without a gradient on any process keeps
        none.
        """
        if self._ballot is not None:
            self._ballot.grad = None
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
        if head[FACTOR] == 0:
            raise StepError('every "weight" of an update was 0, on every process; leave such batches out of the data')
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

    def together(self, batches: Any) -> Any:
        """Where processes may have different numbers of batches, they ask each other before each one."""
        if not self.uneven:
            yield from batches
            return
        for batch in batches:
            if not self._all(True):
                warn("the processes have different numbers of batches: what some have more is left out of the epoch")
                return
            yield batch
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
        for number, wished in zip(ENDS, means[SIGNALS:SIZE], strict=True):
            if wished and self.signals.received is None:
                self.signals.received = number

    def _read_later(self, votes: Tensor) -> None:
        """Read the votes of two updates ago, which are there without waiting; the same ones on every process."""
        copy = votes.to("cpu", non_blocking=True) if votes.device.type != "cuda" else _pinned(votes)
        event = torch.get_device_module(votes.device).Event()
        event.record()
        self._late.append((copy, event))
        if len(self._late) > 2:
            numbers, there = self._late.pop(0)
            there.synchronize()
            self._read(numbers.tolist())


def _pinned(votes: Tensor) -> Tensor:
    copy = torch.empty(votes.shape, dtype=votes.dtype, pin_memory=True)
    return copy.copy_(votes, non_blocking=True)


class SharedWindow(Window):
    """The micro-batches of one update on all processes; their gradients are averaged with the last one's backward."""

    def __init__(self, size: int, peers: Peers) -> None:
        self._peers = peers
        super().__init__(size)
        self.plain = False

    def coming(self, last: bool) -> None:
        """Before the step of a micro-batch: only the window's last one is averaged."""
        self._peers.sync(self.count + 1 >= self.size or last)

    def scale(self, loss: Tensor, weight: Any, last: bool) -> Tensor:
        """Count a micro-batch and return its loss as it goes into backward."""
        self.single = self.single or (self.count == 0 and last)
        self.count += 1
        if isinstance(weight, Tensor):
            weight = weight.detach().reshape(())
        self._factor = weight / self._peers.unit
        self._total = self._total + self._factor
        self._averaged = self.complete(last)
        return self._peers.cast(loss, self._factor, self._averaged)

    def normalise(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the mean of all factors."""
        if self._averaged:
            self._peers.count(optimizer)
        else:  # the epoch ended with a batch that this step leaves out
            self._peers.average(optimizer, self._total)

    def agreed(self, loss: Tensor) -> Tensor:
        """The mean loss of all processes."""
        return self._peers.loss

    def repeat(self, loss: Tensor) -> Tensor:
        """The loss of a step that a closure evaluates anew, as it goes into backward."""
        return self._peers.cast(loss, self._factor, True)


class SharedPending(Window):
    """The micro-batches of one update of a manual step, whose gradients are averaged when it is made."""

    def __init__(self, size: int, peers: Peers) -> None:
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
