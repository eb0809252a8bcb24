"""Processes whose gradients torch's DistributedDataParallel averages, in backward.

With `Balloting` all that is agreed on rides in the same all-reduce (see ballot.py), so that an update costs one. Where
a hook of the user's compresses what DDP sends (`InDDP`), it goes in a message of its own, as it is.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from . import unused
from .ballot import SIZE, Cast, SharedSteps
from .group import Group
from .peers import Peers, scaled
from .run import Run
from .signals import Signals
from .steps import Steps


class InDDP(Peers):
    """One process of several, in each of which DDP lies around the training steps."""

    def __init__(self, run: Run, signals: Signals, group: Group) -> None:
        super().__init__(run, signals, group)
        self._wrapped: nn.Module = nn.Identity()
        self._trained: frozenset[int] = frozenset()
        #: Every parameter of the model, and whether each is trained.
        self._every: list[nn.Parameter] = []
        self._required: list[bool] = []
        #: Whether DDP has averaged gradients since these parameters are trained.
        self._averaged = True
        self._ballot: nn.Parameter | None = None
        #: The ballot as the last forward returned it, and what goes into it.
        self._slip, self._votes = torch.empty(0), torch.empty(0)

    def wrap(self, steps: Steps, wrapped: nn.Module, again: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
        """The training steps behind what accelerate wrapped around them; `again` wraps them in DDP anew."""
        self._wrapped, self._again = wrapped, again
        self.refresh()

        def step(key: str, *inputs: object) -> Any:
            if [p.requires_grad for p in self._every] != self._required:
                self.refresh()  # frozen or thawed within the epoch
            try:
                outputs = self._wrapped(key, *inputs)
            except RuntimeError as error:
                if (names := unused.named(error, self._wrapped)) is None:
                    raise
                raise unused.refusal(names) from error
            if self._ballot is not None:
                outputs, self._slip = outputs
            return outputs

        return step

    def refresh(self) -> None:
        """Wrap the steps anew when other parameters require grad than before; DDP would not average them."""
        if not getattr(self._wrapped, "find_unused_parameters", False):  # else steps leave out what is not theirs
            self._every = list(self._wrapped.parameters())
            self._required = [p.requires_grad for p in self._every]
        trained = frozenset(id(p) for p in self._wrapped.parameters() if p.requires_grad)
        if trained == self._trained:
            return
        if self._trained and isinstance(self._wrapped, DistributedDataParallel):
            self._wrapped = self._again(self._wrapped.module)
        self._trained, self._averaged = trained, False

    def sync(self, on: bool) -> None:
        """Whether the next backward averages the gradients."""
        wrapped = self._wrapped  # to set an attribute of a module costs 1 µs
        if isinstance(wrapped, DistributedDataParallel) and wrapped.require_backward_grad_sync is not on:
            wrapped.require_backward_grad_sync = on

    def count(self, optimizer: Optimizer) -> None:
        """After backward: agree, and divide the optimizer's gradients by the mean of all factors.

        Raises:
            StepError: every weight of the window was 0, or some parameters got no gradient, for which DDP waits.
        """
        if not self._averaged:  # once: DDP itself notices it at the next forward, which may be in no run of one update
            self._averaged = True
            if names := unused.without_gradient(self._wrapped):
                raise unused.refusal(names)
        super().count(optimizer)


class Balloting(InDDP):
    """The same, where what is agreed on is the gradient of one parameter more, the ballot."""

    def __init__(self, run: Run, signals: Signals, group: Group) -> None:
        super().__init__(run, signals, group)
        #: Whether a backward of the user's own is called, which knows of the loss alone.
        self.overridden = False

    def wrap(self, steps: Steps, wrapped: nn.Module, again: Callable[[nn.Module], nn.Module]) -> Callable[..., Any]:
        """As of `InDDP`; the steps return the ballot too."""
        assert isinstance(steps, SharedSteps)
        self._ballot = steps.ballot
        steps.searched = getattr(wrapped, "find_unused_parameters", False)
        return super().wrap(steps, wrapped, again)

    def cast(self, loss: Tensor, factor: Any, last: bool) -> Tensor:
        """The loss times its factor, and the votes for its backward; the wishes go with the last one of an update."""
        # A tensor of its own: autograd may take it as it is for the gradient, in which DDP writes.
        sum_of_losses = loss.detach() * factor if self.needs_loss else None
        votes = self.said(self.wishes() if last else [0.0] * SIZE, factor, sum_of_losses)
        if self.overridden:
            return Cast.apply(scaled(loss, factor), self._slip, votes)  # type: ignore[no-any-return]
        self._votes = votes
        return scaled(loss, factor)

    def backward(self, loss: Tensor) -> None:
        """Make gradients from the loss as `cast` returned it, times any scale; that of the ballot are the votes."""
        torch.autograd.backward((loss, self._slip), (None, self._votes))

    def means(self) -> Tensor:
        """The gradient of the ballot after backward."""
        assert self._ballot is not None and self._ballot.grad is not None
        means, self._ballot.grad = self._ballot.grad, None
        return means

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """As of `Peers`; what the ballot holds was not sent."""
        assert self._ballot is not None
        self._ballot.grad = None
        super().average(optimizer, factor)
