"""The way of a batch to its device; to a CUDA device on a stream of its own, beside what the device is doing.

Steps do not wait for the device, so the loop asks for the next batch while the present step is still running there. On
the stream of the steps its copy would queue behind them; on another one it runs meanwhile. No batch is read ahead for
that: order, position, randomness and errors are those of every other device.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from . import to_device


class Move(Protocol):
    """Moves a batch, as `transfer_batch_to_device` does."""

    def __call__(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device."""
        ...


def mover(device: torch.device, dtype: torch.dtype | None) -> Move:
    """What moves the batches of a run; with `dtype`, tensors of floating numbers get it."""
    return BesideSteps(device, dtype).move if device.type == "cuda" else partial(_move, dtype)


def _move(dtype: torch.dtype | None, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
    return to_device(batch, device, non_blocking=True, dtype=dtype)


class BesideSteps:
    """Moves batches from the CPU to a CUDA device on a stream of its own; the present stream waits for the copy.

    From pinned memory (`DataLoader(pin_memory=True)`) the host goes on at once; from other memory it waits for its own
    copy, and not for the steps before. A batch with tensors on a device, or with an object that moves itself, is moved
    on the present stream: what is in it may be in the making there, or could not be followed.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype | None) -> None:
        self._dtype = dtype
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def move(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """The batch on the device. Does not wait for the steps before."""
        if not from_cpu(batch):
            return _move(self._dtype, batch, device, dataloader_idx)
        with torch.cuda.stream(self._stream):
            moved = _move(self._dtype, batch, device, dataloader_idx)
        present = torch.cuda.current_stream(device)
        present.wait_stream(self._stream)
        for value in leaves(moved):
            if isinstance(value, Tensor):
                # Its memory belongs to the other stream; it is not given to the next copy before the step is done.
                value.record_stream(present)
        return moved


def from_cpu(batch: Any) -> bool:
    """Whether every tensor of the batch can be seen and is on the CPU.

    >>> from_cpu({"x": [torch.zeros(1), "name"]}), from_cpu(torch.zeros(1, device="meta"))
    (True, False)
    """
    for value in leaves(batch):
        if isinstance(value, Tensor):
            if value.device.type != "cpu":
                return False
        elif callable(getattr(value, "to", None)):
            return False
    return True


def leaves(batch: Any) -> Iterator[Any]:
    """What is in a batch, below the lists, tuples, mappings and dataclasses that `to_device` looks into."""
    kind = type(batch)
    plain = kind is tuple or kind is list or kind is dict
    if isinstance(batch, Tensor) or (not plain and callable(getattr(batch, "to", None))):
        yield batch
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from leaves(part)
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from leaves(part)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from leaves(getattr(batch, field.name))
    else:
        yield batch
