"""What runs in the workers of a DataLoader: the user's dataset, seeded before each batch that it reads."""

from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from lightdeco import seeds

_WORKER = 5


class Fetch(NamedTuple):
    """What a sampler's index is replaced by: the index, and the seed under which its batch is read (32 bits)."""

    seed: int
    index: Any


class SeededDataset(Dataset[Any]):
    """The user's map-style dataset; one call reads one batch and seeds torch, NumPy and `random` before it.

    `seeded=False` leaves the seeding out, for data that nothing random is done to.
    """

    def __init__(self, inner: Any, seeded: bool = True) -> None:
        self.inner, self.seeded = inner, seeded

    def __getitem__(self, fetch: Fetch) -> Any:
        """Read what the DataLoader does not batch (`batch_size=None`)."""
        if self.seeded:
            seeds.seed_all(fetch.seed)
        return self.inner[fetch.index]

    def __getitems__(self, fetch: Fetch) -> Any:
        """Read the samples of one batch, as torch would: by the dataset's own `__getitems__` where it has one."""
        if self.seeded:
            seeds.seed_all(fetch.seed)
        read_many = getattr(self.inner, "__getitems__", None)
        if read_many:
            return read_many(fetch.index)
        return list(map(self.inner.__getitem__, fetch.index))  # a comprehension would be one more frame above an error


class SeededStream(IterableDataset[Any]):
    """The user's IterableDataset; torch, NumPy and `random` are seeded before its start and before each batch.

    Batch `j` of worker `w` counts as batch `j * num_workers + w` of the epoch. `shared` puts the position in memory
    that workers see, because workers that persist must learn the next epoch.
    """

    def __init__(self, inner: Any, batch_size: int, shared: bool) -> None:
        self.inner = inner
        self._batch_size = batch_size
        self._place = torch.zeros(2, dtype=torch.int64)
        if shared:
            self._place.share_memory_()  # type: ignore[no-untyped-call]

    def move(self, seed: int, epoch: int) -> None:
        """Set the position for the next `iter()`, in this process or in a worker."""
        self._place[0], self._place[1] = seed, epoch

    def __iter__(self) -> Iterator[Any]:
        """Start the user's stream in this process or worker."""
        seed, epoch = self._place.tolist()
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        seeds.seed_all(seeds._mix(_WORKER, seeds.order_seed(seed, epoch), worker))
        samples = iter(self.inner)
        return self._samples(samples, seed, epoch, count(worker, workers))

    def _samples(self, samples: Iterator[Any], seed: int, epoch: int, places: Iterable[int]) -> Iterator[Any]:
        for k in places:
            seeds.seed_all(seeds.data_seed(seed, epoch, k))
            for _ in range(self._batch_size):
                try:
                    sample = next(samples)
                except StopIteration:
                    return
                yield sample


class WorkerInit:
    """The user's `worker_init_fn`, called once `get_worker_info().dataset` is the user's own dataset again."""

    def __init__(self, user_fn: Callable[[int], None] | None) -> None:
        self._user_fn = user_fn

    def __call__(self, worker_id: int) -> None:
        """Run in the worker, before it reads."""
        info: Any = get_worker_info()
        # WorkerInfo is frozen.
        object.__setattr__(info, "dataset", info.dataset.inner)
        if self._user_fn is not None:
            self._user_fn(worker_id)
