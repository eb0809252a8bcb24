"""From the parts of a batch to the whole: `Gathered` makes their gradients and joins what the step returned."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .branch import Branch
from .errors import StepError
from .steps import is_metric, is_scalar, read_result
from .windows import Window

#: Writes the gradients that are ready into `p.grad`, times the factor that the loss was scaled by.
Merge = Callable[[Tensor], None]


class _Ready(torch.autograd.Function):
    """A loss whose gradients are ready."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, value: Tensor, merge: Merge) -> Tensor:
        """The value itself; `anchor` requires grad, and so does the result."""
        ctx.merge = merge
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *factors: Any) -> Any:
        """Hand the gradients over, times the factor that the loss was scaled by."""
        ctx.merge(*factors)
        return None, None, None


class Gathered:
    """The results of the parts, and the sum of their gradients: each counts with its weight, as in accumulation."""

    def __init__(self, branch: Branch, count: int) -> None:
        self._branch, self._window = branch, Window(count)
        self._outputs: list[Any] = []
        self._weights: list[Any] = []
        self._losses: list[Tensor] = []

    def add(self, outputs: Any, size: Callable[[], int]) -> None:
        """Make the gradients of a part."""
        result = read_result(outputs, self._branch.hook.where, training=True)
        loss: Tensor = result[0]  # there is one, with a gradient
        weight, samples = result[3:]
        single = self._window.size == 1
        if weight is None:
            weight = 1 if single else samples or size()
        scaled = loss if single else self._window.scale(loss, weight, last=False)
        scaler = self._branch.scaler
        torch.autograd.backward(scaled if scaler is None else scaler.scale(scaled))
        self._losses.append(loss.detach().reshape(()))
        self._weights.append(weight.detach().reshape(()) if isinstance(weight, Tensor) else weight)
        self._outputs.append(outputs if single else _without_graph(outputs))

    def joined(self, merge: Merge) -> Any:
        """What the step would have returned for the whole batch."""
        total: Any = sum(self._weights) if self._window.size > 1 else None
        if self._branch.scaler is not None:  # the loop scales the loss once more
            total = self._branch.scaler.scale(torch.ones_like(self._losses[0])) * (1 if total is None else total)
        if not isinstance(total, Tensor) and total == 0:
            raise StepError('every "weight" of the parts of a batch was 0; leave such batches out of the data')

        def divided(factor: Tensor) -> None:
            merge(factor / total)

        with torch.enable_grad():
            anchor = torch.zeros((), requires_grad=True)
            loss = _Ready.apply(anchor, self._mean(self._losses), merge if total is None else divided)
        if isinstance(self._outputs[0], Tensor):
            return loss
        names = dict.fromkeys(name for outputs in self._outputs for name in outputs)
        return {name: loss if name == "loss" else self._value(name) for name in names}

    def _mean(self, values: Sequence[Any], weights: Sequence[Any] | None = None) -> Any:
        if len(values) == 1:
            return values[0]
        weights = self._weights if weights is None else weights
        return sum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)

    def _value(self, name: str) -> Any:
        """One value of the whole batch: see "Running out of memory" in docs/loop.md."""
        having = [(o[name], w) for o, w in zip(self._outputs, self._weights, strict=True) if name in o]
        values = [value for value, _ in having]
        first = values[0]
        if len(self._outputs) == 1 or first is None or isinstance(first, (str, bool)) or is_metric(first):
            return first
        if name in ("weight", "batch_size"):
            return sum(values)
        if all(map(is_scalar, values)):
            return self._mean(values, [weight for _, weight in having])
        if all(isinstance(value, Tensor) and value.dim() for value in values):
            return torch.cat(values)
        return [item for value in values for item in value] if isinstance(first, list) else values


def _without_graph(outputs: Any) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs.detach()
    return {name: value.detach() if isinstance(value, Tensor) else value for name, value in outputs.items()}
