"""Which batches of the one-process order belong to which process."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Share(NamedTuple):
    """The part of one process: batch `k` of rank `r` is batch `k * size + r` of the one-process order.

    `filled`: the last round is filled from the epoch's beginning, so that all ranks have equally many; for training.
    Without it each batch belongs to one rank exactly; for evaluation.

    >>> [[batch for _, batch in Share(r, 2, filled=True).own(iter("abc"))] for r in (0, 1)]
    [['a', 'c'], ['b', 'a']]
    """

    rank: int = 0
    size: int = 1
    filled: bool = False

    def own(self, batches: Iterator[T]) -> Iterator[tuple[int, T]]:
        """The batches of this rank, each with its place in the one-process order. Reads all of them."""
        first: list[T] = []
        count = 0
        for batch in batches:
            if self.filled and count < self.size:
                first.append(batch)
            if count % self.size == self.rank:
                yield count, batch
            count += 1
        over = count % self.size
        if self.filled and count and 0 < over <= self.rank:
            place = count - over + self.rank
            yield place, first[(place - count) % count]

    def part(self, batches: Sequence[T]) -> Sequence[T]:
        """The same of batches that are there."""
        if self.size == 1:
            return batches
        own = batches[self.rank :: self.size]
        over = len(batches) % self.size
        if self.filled and 0 < over <= self.rank:
            own = [*own, batches[(self.rank - over) % len(batches)]]
        return own

    def length(self, total: int) -> int:
        """How many of `total` batches this rank has."""
        if self.filled:
            return -(-total // self.size)
        return total // self.size + (self.rank < total % self.size)
