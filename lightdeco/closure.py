"""`Closure`: what an optimizer that evaluates the loss itself (LBFGS, SAM) gets."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.optim import Optimizer

from .optim import parameters_of


class Closure:
    """The closure that an optimizer's `step` gets: loss and gradients at the present weights.

    They were computed before the update began: the first call returns that loss, unless a parameter or a gradient has
    changed since (SAM). Every other call (LBFGS' line search) evaluates the step anew.
    """

    def __init__(self, optimizer: Optimizer, loss: Tensor, evaluate: Callable[[], Tensor]) -> None:
        self._optimizer, self._loss, self._evaluate = optimizer, loss.detach(), evaluate
        self._state: list[tuple[int, int, int]] | None = self._fingerprint()

    def __call__(self) -> Tensor:
        """The loss (0-dim, detached), with the gradients in `p.grad`."""
        if self._fingerprint() != self._state:
            with torch.enable_grad():
                self._loss = self._evaluate().detach()
        self._state = None  # what optimizers write through `.data` between calls, no version shows
        return self._loss

    def _fingerprint(self) -> list[tuple[int, int, int]]:
        parameters = parameters_of(self._optimizer)
        return [(p._version, id(p.grad), -1 if p.grad is None else p.grad._version) for p in parameters]
