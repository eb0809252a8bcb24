"""What the processes of a run agree on: how much each gradient counts, what time it is, who asks to stop.

With `Peers`, all of it rides in the all-reduce of the gradients (see ballot.py). So an update costs one all-reduce, and
every process stops, saves and clips at the same step.
"""

from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import unused
from .alone import Alone
from .ballot import FACTOR, LOSS, NO_SIGNALS, SECONDS, SIGNALS, SIZE, STOP, Cast, SharedSteps, refuse_weightless
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
        self._wrapped: nn.Module = nn.Identity()
        self._trained: frozenset[int] = frozenset()
        #: Whether DDP has averaged gradients since these parameters are trained.
        self._averaged = True
        #: Whether a backward of the user's own is called, which knows of the loss alone.
        self.overridden = False
        #: The ballot as the last forward returned it, and what goes into it.
        self._slip, self._votes = torch.empty(0), torch.empty(0)
        self._ballot: nn.Parameter | None = None
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

    def wrap(self, steps: SharedSteps, wrapped: nn.Module, again: Callable[[nn.Module], nn.Module]) -> Any:
        """The training steps behind what accelerate wrapped around them; `again` wraps them in DDP anew."""
        self._ballot, self._wrapped, self._again = steps.ballot, wrapped, again
        steps.searched = getattr(wrapped, "find_unused_parameters", False)
        self.refresh()

        def step(key: str, *inputs: object) -> Any:
            try:
                outputs, self._slip = self._wrapped(key, *inputs)
            except RuntimeError as error:
                if (names := unused.named(error, self._wrapped)) is None:
                    raise
                raise unused.refusal(names) from error
            return outputs

        return step

    def refresh(self) -> None:
        """Wrap the steps anew when other parameters require grad than before; DDP would not average them."""
        trained = frozenset(id(p) for p in self._wrapped.parameters() if p.requires_grad)
        if trained == self._trained:
            return
        if self._trained and isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped = self._again(self._wrapped.module)
        self._trained, self._averaged = trained, False

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
        """The loss times its factor, and the votes for its backward; the wishes go with the last one of an update."""
        wishes = self.wishes() if last else [0.0] * SIZE
        if not isinstance(factor, Tensor):
            wishes[FACTOR] = factor
        # A copy: autograd may take it as it is for the gradient, in which DDP writes.
        votes = self.template(wishes, self._slip.dtype, self._slip.device).clone()
        if isinstance(factor, Tensor):
            votes[FACTOR] = factor
        if self.needs_loss:
            votes[LOSS] = loss.detach() * factor
        scaled = loss if isinstance(factor, float) and factor == 1.0 else loss * factor
        if self.overridden:
            return Cast.apply(scaled, self._slip, votes)  # type: ignore[no-any-return]
        self._votes = votes
        return scaled

    def backward(self, loss: Tensor) -> None:
        """Make gradients from the loss as `cast` returned it, times any scale; that of the ballot are the votes."""
        torch.autograd.backward((loss, self._slip), (None, self._votes))

    def template(self, wishes: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The wishes as a tensor, the same one as long as they are the same: to make one waits for a GPU."""
        if wishes != self._wishes:
            self._wishes, self._template = wishes, torch.tensor(wishes, dtype=dtype, device=device)
        return self._template

    def count(self, optimizer: Optimizer) -> None:
        """After backward: read the ballot, and divide the optimizer's gradients by the mean of all factors.

        Raises:
            StepError: every weight of the window was 0, or some parameters got no gradient, for which DDP waits.
        """
        assert self._ballot is not None and self._ballot.grad is not None
        if not self._averaged:  # once: DDP itself notices it at the next forward, which may be in no run of one update
            self._averaged = True
            if names := unused.without_gradient(self._wrapped):
                raise unused.refusal(names)
        votes, self._ballot.grad = self._ballot.grad, None
        self.tally(votes, optimizer)

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
        refuse_weightless(head)
        flat /= head[FACTOR]
        sizes = [p.numel() for p in parameters]
        for p, count, grad in zip(parameters, head[SIZE:], torch.split(flat[len(head) :], sizes), strict=True):
            if count:
                p.grad = grad.view_as(p).to(p.dtype, copy=True)

    def sync(self, on: bool) -> None:
        """Whether the next backward averages the gradients."""
        wrapped = self._wrapped  # to set an attribute of a module costs 1 µs
        if isinstance(wrapped, DistributedDataParallel) and wrapped.require_backward_grad_sync is not on:
            wrapped.require_backward_grad_sync = on

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
