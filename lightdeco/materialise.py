"""Layers that were built on the meta device get memory, and values from their own `reset_parameters`."""

from typing import Any

import torch
from torch import Tensor, nn

from . import seeds
from .errors import MarkError


class Materialiser:
    """Gives memory on the CPU to what lies on the meta device, for a whole model or one part of it after another.

    Each module draws its values from a seed of its own, so that they do not depend on the order, nor on the number of
    processes.
    """

    def __init__(self, model: nn.Module, seed: int) -> None:
        self._numbers = {id(module): number for number, module in enumerate(model.modules())}
        self._names = {id(module): name for name, module in model.named_modules()}
        self._seed = seed
        self._made: dict[int, Tensor] = {}  # what modules share stays shared
        self._kept: list[Tensor] = []  # or another tensor could get the same id

    def fill(self, part: nn.Module) -> None:
        """Make everything in a module real, and call `reset_parameters` of each submodule that had something on meta.

        Raises:
            MarkError: such a submodule has no `reset_parameters`.
        """
        found = [module for module in part.modules() if any(tensor.is_meta for tensor in _own(module))]
        for module in found:
            self._allocate(module)
        with seeds.preserved():
            for module in found:
                seeds.seed_all(seeds.module_seed(self._seed, self._numbers[id(module)]))
                self._reset(module)

    def _allocate(self, module: nn.Module) -> None:
        for held in (module._parameters, module._buffers):
            for name, tensor in held.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in self._made:
                    self._made[id(tensor)] = _real(tensor)
                    self._kept.append(tensor)
                made: Any = self._made[id(tensor)]
                held[name] = made

    def _reset(self, module: nn.Module) -> None:
        reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
        if reset is None:
            name, kind = self._names[id(module)], type(module).__name__
            raise MarkError(
                f"{name or 'the model'} ({kind}) was built on the meta device and has no reset_parameters() that could "
                "fill it; give it one, or build it on the CPU"
            )
        with torch.no_grad():
            reset()


def _own(module: nn.Module) -> list[Tensor]:
    """The parameters and buffers of the module itself."""
    return [tensor for held in (module._parameters, module._buffers) for tensor in held.values() if tensor is not None]


def _real(tensor: Tensor) -> Tensor:
    empty = torch.zeros_like(tensor, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
