"""The processes of a run, and what they tell each other."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch

from .joined import group_store, join

T = TypeVar("T")


class Group:
    """All processes of a run. On one process, everything is what this process gives.

    Everything here is called by all processes, in the same order; what is sent may be anything that pickles.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank

    def gather(self, thing: T) -> list[T]:
        """What each process gives, in the order of ranks; on every process."""
        if self.size == 1:
            return [thing]
        found: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(found, thing)
        return found

    def same(self, thing: T) -> T:
        """What rank 0 gives; on every process."""
        if self.size == 1:
            return thing
        box: list[Any] = [thing]
        torch.distributed.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


@contextmanager
def opened(kind: str, timeout_minutes: float | None) -> Iterator[Group]:
    """The group of the processes that a launcher or `processes.start` started; it is closed at the end.

    Args:
        kind: the kind of device: "cuda" talks through nccl, everything else through gloo.
        timeout_minutes: how long one process waits for another; None: half an hour.
    """
    place = join()
    if place.world_size == 1:
        yield Group()
        return
    group = Group(place.rank, place.world_size, place.local_rank)
    if torch.distributed.is_initialized():  # the user's own
        yield group
        return
    if kind == "cuda":
        torch.cuda.set_device(place.local_rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=group_store(),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(minutes=timeout_minutes or 30),
    )
    try:
        yield group
    finally:
        torch.distributed.destroy_process_group()
