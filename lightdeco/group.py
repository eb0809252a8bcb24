"""The processes of a run, and what they tell each other."""

import atexit
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Final, Generic, TypeVar

import torch

from .errors import LightdecoError
from .joined import group_store, join

T = TypeVar("T")

#: What is gathered in one message, in bytes: more takes a second one. The first of them say how long it is.
_SMALL: Final = 2048
_LENGTH: Final = 8


class Kept(Generic[T]):
    """What stays on rank 0, because it cannot or need not be sent; the others get `Kept(None)`."""

    def __init__(self, thing: T | None = None) -> None:
        self.thing = thing

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, ()


class Group:
    """All processes of a run. On one process, everything is what this process gives.

    Everything here is called by all processes, in the same order; what is sent may be anything that pickles.
    """

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._among: dict[tuple[int, ...], Any] = {}

    def gather(self, thing: T) -> list[T]:
        """What each process gives, in the order of ranks; on every process."""
        if self.size == 1:
            return [thing]
        if "cpu:gloo" not in torch.distributed.get_backend_config():  # a user's own group, of GPUs alone
            found: list[Any] = [None] * self.size
            torch.distributed.all_gather_object(found, thing)
            return found
        sent = pickle.dumps(thing)
        rows = self._rows(len(sent).to_bytes(_LENGTH, "little") + sent, _SMALL)
        lengths = [int.from_bytes(row[:_LENGTH], "little") for row in rows]
        if max(lengths) > _SMALL - _LENGTH:
            rows = self._rows(bytes(_LENGTH) + sent, _LENGTH + max(lengths))
        return [pickle.loads(row[_LENGTH : _LENGTH + n]) for row, n in zip(rows, lengths, strict=True)]

    def _rows(self, sent: bytes, size: int) -> list[bytes]:
        """As many bytes of each process, in one message."""
        own = torch.frombuffer(bytearray(sent[:size].ljust(size, b"\0")), dtype=torch.uint8)
        every = torch.empty(self.size * size, dtype=torch.uint8)
        torch.distributed.all_gather_into_tensor(every, own)
        return [bytes(row) for row in every.view(self.size, size).numpy()]

    def same(self, thing: T) -> T:
        """What rank 0 gives; on every process."""
        if self.size == 1:
            return thing
        box: list[Any] = [thing]
        torch.distributed.broadcast_object_list(box, src=0)
        found: T = box[0]
        return found

    def first(self, function: Callable[[], T]) -> T:
        """Call a function on rank 0 alone; every process gets what it returned, or raises what it raised."""
        if self.size == 1:
            return function()
        result: Any = None
        error: Exception | None = None
        if self.rank == 0:
            try:
                result = function()
            except Exception as raised:  # the others wait: they must hear of it
                error = raised
        told = self.same((result, _sent(error, 0)))
        if error is not None:
            raise error
        if told[1] is not None:
            raise told[1]
        found: T = result if self.rank == 0 else told[0]
        return found

    def every(self, function: Callable[[], T]) -> T:
        """Call a function on every process, which gets what its own returned; where one raises, all raise."""
        result: Any = None
        error: Exception | None = None
        try:
            result = function()
        except Exception as raised:
            if self.size == 1:
                raise
            error = raised
        told = [each for each in self.gather(_sent(error, self.rank)) if each is not None]
        if error is not None or told:
            raise error or told[0]
        found: T = result
        return found

    def among(self, ranks: tuple[int, ...]) -> Any:
        """torch's group of these processes; every process calls it, those that are not among them too."""
        if ranks not in self._among:
            self._among[ranks] = torch.distributed.new_group(list(ranks))
        return self._among[ranks]

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            torch.distributed.barrier()


def _sent(error: Exception | None, rank: int) -> Exception | None:
    """The error as another process can rebuild it: itself where it is one of lightdeco's, otherwise its text."""
    if error is None or isinstance(error, LightdecoError):
        return error
    return LightdecoError(f"on rank {rank}: {type(error).__name__}: {error}")


@contextmanager
def opened(kind: str, timeout_minutes: float | None, keep: bool = False) -> Iterator[Group]:
    """The group of the processes that a launcher or `processes.start` started; it is closed at the end.

    Args:
        kind: the kind of device: "cuda" talks through nccl, everything else through gloo.
        timeout_minutes: how long one process waits for another; None: half an hour.
        keep: leave it open for what follows, until the process ends: a model that is cut lives in it.
    """
    place = join()
    if place.world_size == 1:
        yield Group()
        return
    group = Group(place.rank, place.world_size, place.local_rank)
    if torch.distributed.is_initialized():  # the user's own, or that of the verb around this one
        yield group
        return
    if kind == "cuda":
        torch.cuda.set_device(place.local_rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
        store=group_store(),
        rank=place.rank,
        world_size=place.world_size,
        # Later than the process that started these ones, which can tell who hangs and who only waits.
        timeout=timedelta(minutes=timeout_minutes or 30, seconds=15),
    )
    try:
        yield group
    finally:
        if keep:
            atexit.register(_close)
        else:
            torch.distributed.destroy_process_group()


def _close() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
