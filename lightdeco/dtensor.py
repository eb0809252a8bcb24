"""Sharded tensors: torch's `DTensor`, recognised without its slow import, and the parameters of DeepSpeed's stage 3."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor is a `DTensor`, of which this process holds a part."""
    return hasattr(tensor, "full_tensor")


def local(tensor: Any) -> Tensor:
    """The part of this process, with the memory of the tensor itself; a plain tensor is its own part."""
    if hasattr(tensor, "ds_tensor"):  # the last parts are filled up with anything
        part: Tensor = tensor.ds_tensor
        return part[: max(0, tensor.ds_numel - tensor.ds_zero_partition_rank * part.numel())]
    found: Tensor = tensor.to_local() if is_sharded(tensor) else tensor
    return found


def numel(tensor: Any) -> int:
    """How many numbers a tensor has, on all processes together."""
    return int(getattr(tensor, "ds_numel", tensor.numel()))


def whole(tensor: Any) -> Tensor:
    """All of it, on each process; every process calls it. A plain tensor as it is."""
    found: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor
    return found


def rows(shape: torch.Size | tuple[int, ...], rank: int, size: int) -> slice:
    """The rows (of the first dimension) that a process holds of a tensor that `fully_shard` has cut.

    As `torch.chunk`: all have as many, but the last ones, which may have none.

    >>> [rows((5, 2), rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    each = -(-shape[0] // size)
    return slice(min(rank * each, shape[0]), min((rank + 1) * each, shape[0]))


def like(live: Any, part: Tensor) -> Tensor:
    """A sharded tensor cut as `live` is, made of this process's part of it; shares no memory with `part`."""
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part.to(live.device, copy=True),
        live.device_mesh,
        live.placements,
        run_check=False,
        shape=live.shape,
        stride=live.stride(),
    )


def cut(live: Any, tensor: Tensor) -> Tensor:
    """A whole tensor (CPU or anywhere), which each process has, cut as `live` is; its dtype stays."""
    mesh = live.device_mesh
    return like(live, tensor[rows(tuple(tensor.shape), mesh.get_local_rank(), mesh.size())])


def reshard(model: nn.Module) -> None:
    """Free what a forward without backward has gathered; the parameters that a model shows are the cut ones again.

    Does nothing with a model that is not cut.
    """
    for module in model.modules():
        free = getattr(module, "reshard", None)
        if free is not None and hasattr(module, "set_reshard_after_forward"):  # torch's FSDPModule
            free()


def forget_forward(model: nn.Module) -> None:
    """Tell torch that a forward of a model that is cut was left half-way."""
    reset = getattr(model, "reset_iter_state", None)
    if callable(reset):
        with suppress(AttributeError):  # so it ends where no forward was begun yet
            reset()
