"""Which batches are copied beside the steps: those whose tensors can all be seen, and are on the CPU."""

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence

from lightdeco.data.moving import from_cpu, leaves, mover

HERE, AWAY = torch.zeros(2), torch.zeros(2, device="meta")
Pair = namedtuple("Pair", "x y")


@dataclass(frozen=True)
class Sample:
    """A batch as a dataclass."""

    x: Tensor
    rest: Any = None


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [1, [x]],
        lambda x: Pair("name", x),
        lambda x: OrderedDict(a={"b": (None, x)}),
        lambda x: MappingProxyType({"x": x}),
        lambda x: Sample(torch.ones(1), rest=Sample(x)),
    ],
)
def test_tensors_are_found_wherever_to_device_finds_them(wrap: Any) -> None:
    """One tensor that is on a device already keeps the whole batch off the other stream."""
    assert from_cpu(wrap(HERE))
    assert not from_cpu(wrap(AWAY))
    assert sum(value is HERE for value in leaves(wrap(HERE))) == 1


def test_objects_that_move_themselves_are_not_copied_beside_the_steps() -> None:
    """What they hold cannot be followed: a packed sequence is a tuple that moves itself."""
    assert not from_cpu([HERE, pack_sequence([torch.zeros(2)])])
    assert from_cpu([Sample, "text", 1, None])  # a class is no object of it


def test_elsewhere_batches_are_moved_as_they_are() -> None:
    """No stream is made for a CPU; the dtype is applied."""
    move = mover(torch.device("cpu"), torch.float64)
    assert isinstance(move, partial)
    assert [v.dtype for v in move([HERE, torch.tensor(1)], torch.device("cpu"), 0)] == [torch.float64, torch.int64]
