"""Processes that agree by an all-reduce of their own, where gradients are averaged part by part, in each backward."""

from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
from torch.optim import Optimizer

from .peers import Peers

_NONE: Final = object()


class Voting(Peers):
    """One process of several that hold parts of the model, or of the optimizer's state.

    What they agree on goes in an all-reduce of its own, once for an update.
    """

    def calling(self, wrapped: Callable[..., Any]) -> Callable[..., Any]:
        """The training steps; each first gives all processes the buffers of rank 0, as DDP does."""
        model = self.run.model

        def step(key: str, *inputs: object) -> Any:
            self.align(model)
            return wrapped(key, *inputs)

        return step

    def average(self, optimizer: Optimizer, factor: Any) -> None:
        """As `count`: each backward has averaged its gradients already."""
        self.count(optimizer)

    def rounds(self, batches: Iterator[Any]) -> Iterator[tuple[Any, bool]]:
        """Each batch with True; then, as long as another process has one, the last batch again with False.

        A forward gathers parameters from all processes, so all make the same number of them. A process without any
        batch gets the first one of rank 0.
        """
        there, batch = True, None
        first = next(batches, _NONE)
        having = self.group.gather(first is not _NONE)
        if not all(having):
            shared = self.group.same(first if any(having) and first is not _NONE else None)
            first, there = (shared, False) if first is _NONE else (first, True)
        if not any(having):
            return
        batch = first
        while True:
            yield batch, there
            following = next(batches, _NONE) if there else _NONE
            there = following is not _NONE
            if not self._any(there):
                return
            batch = following if there else batch

    def _any(self, there: bool) -> bool:
        flag = torch.tensor(float(there), device=self.run.device)
        torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
        return bool(flag)
