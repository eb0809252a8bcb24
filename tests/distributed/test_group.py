"""The group of a run's processes: alone, and two on one machine."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lightdeco import group, processes
from lightdeco.group import Group
from tests.distributed.program import together


def expected(rank: int, size: int = 2, local_rank: int | None = None) -> dict[str, Any]:
    """What `program.work` gives on a rank."""
    return {
        "rank": rank,
        "local_rank": rank if local_rank is None else local_rank,
        "size": size,
        "gathered": [{"rank": each, "text": "é" * each} for each in range(size)],
        "same": [0, "from"],
        "total": size * (size + 1) / 2,
    }


def test_a_process_on_its_own_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is opened, and what it gives is what it gets, the same object."""
    for name in ("WORLD_SIZE", "RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    thing = object()
    with group.opened("cpu", None) as alone:
        assert not torch.distributed.is_initialized()
        assert (alone.rank, alone.size, alone.local_rank) == (0, 1, 0)
        assert alone.gather(thing) == [thing]
        assert alone.same(thing) is thing
        alone.wait()
    assert together() == [expected(0, size=1)] * 2


def _each(payload: None, folder: Path) -> list[Any]:
    found = together()
    with group.opened("cpu", 1) as every:
        return every.gather(found)


def _inside_the_users(payload: None, folder: Path) -> list[Any]:
    """The user opened a group: it is used, and left open."""
    with group.opened("cpu", 1):
        inner: list[Any]
        with group.opened("cpu", 1) as every:
            inner = every.gather((every.rank, every.size))
        assert torch.distributed.is_initialized()
        return [*inner, Group(1, 2).size]


@pytest.mark.slow
def test_two_processes_on_one_machine() -> None:
    """They gather in the order of ranks, agree with rank 0, and open one group after another."""
    assert processes.start(_each, None, 2) == [[expected(0)] * 2, [expected(1)] * 2]
    assert processes.start(_inside_the_users, None, 2) == [(0, 2), (1, 2), 2]
