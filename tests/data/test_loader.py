"""Loaders: order, randomness and position are functions of (seed, epoch, batch), whatever reads the data and where."""

import gc
import multiprocessing
import os
import random
import signal
from collections.abc import Iterator
from typing import Any

import numpy
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from lightdeco import seeds
from lightdeco.data import rebuilt
from lightdeco.data.combined import CombinedLoader
from lightdeco.data.loader import Loader
from lightdeco.data.sharing import Share
from lightdeco.errors import DataError

SEED, SIZE = 7, 10
WORKERS: list[dict[str, Any]] = [
    {"num_workers": 0},
    {"num_workers": 1},
    {"num_workers": 2},
    {"num_workers": 2, "persistent_workers": True},
]
IDS = ["0", "1", "2", "2 persistent"]
all_workers = pytest.mark.parametrize("workers", WORKERS, ids=IDS)


def draws() -> list[float]:
    return [torch.rand(()).item(), numpy.random.rand(), random.random()]


class Augmented(Dataset[list[float]]):
    """Sample i is i and one draw of each generator; the reads are counted where they happen."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.reads = 0
        self.mark = ""

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> list[float]:
        self.reads += 1
        return [float(i), *draws()]


class Many(Augmented):
    def __getitems__(self, indices: list[int]) -> list[list[float]]:
        return [[float(i), *draws(), -1.0] for i in indices]


class Stream(IterableDataset[list[float]]):
    """Sharded over the workers by hand; a shuffle at the start and a draw for each sample."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __iter__(self) -> Iterator[list[float]]:
        info = get_worker_info()
        mine = list(range(self.size) if info is None else range(info.id, self.size, info.num_workers))
        if info is not None:
            assert info.dataset is self
        random.shuffle(mine)
        for i in mine:
            yield [float(i), *draws()]


class SizedStream(Stream):
    def __len__(self) -> int:
        return 100


class EagerStream(IterableDataset[float]):
    def __iter__(self) -> Iterator[float]:
        return iter([random.random()])


class Drawing(Sampler[int]):
    """Draws from all three global generators at each index."""

    def __init__(self) -> None:
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __len__(self) -> int:
        return SIZE

    def __iter__(self) -> Iterator[int]:
        for _ in range(SIZE):
            yield (int(torch.randint(SIZE, ())) + int(numpy.random.randint(SIZE)) + random.randrange(SIZE)) % SIZE


class DrawingBatches(Sampler[list[int]]):
    def __init__(self) -> None:
        self.sampler = Drawing()

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(4):
            yield random.sample(range(SIZE), 3)


class Eager(Sampler[list[int]]):
    """Draws when its iterator is made, not when it is first asked."""

    def __iter__(self) -> Iterator[list[int]]:
        return iter([row.tolist() for row in torch.randperm(SIZE).split(3)])


class OwnIter(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (("mine", batch) for batch in super().__iter__())


class OwnInit(DataLoader[Any]):
    def __init__(self, dataset: Any, **options: Any) -> None:
        super().__init__(dataset, collate_fn=self.join, **options)

    def join(self, samples: list[Any]) -> tuple[str, Any, float]:
        return "joined", samples, random.random()


class Batches:
    """An iterable of its own kind."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self.epochs: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[list[float]]:
        first = random.random()
        for k in range(self.size):
            yield [float(k), first, *draws()]


class WrongLength(Batches):
    def __len__(self) -> int:
        return 9


def identity(batch: Any) -> Any:
    return batch


def noisy(samples: list[Any]) -> list[Any]:
    return [*samples, draws()]


def plain(batches: Any) -> list[Any]:
    """Batches as nested lists of numbers, for exact comparison."""
    return [plain_one(batch) for batch in batches]


def plain_one(batch: Any) -> Any:
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if isinstance(batch, dict):
        return {key: plain_one(value) for key, value in batch.items()}
    return [plain_one(part) for part in batch] if isinstance(batch, list | tuple) else batch


def epochs(loader: Any, number: int = 3, seed: int = SEED) -> list[list[Any]]:
    wrapped = Loader(loader, seed)
    try:
        return [plain(wrapped.batches(epoch)) for epoch in range(number)]
    finally:
        wrapped.close()


def make(dataset: Any, **options: Any) -> DataLoader[Any]:
    if options.get("num_workers"):
        options.setdefault("multiprocessing_context", "fork")
    return DataLoader(dataset, **{"batch_size": 3, "collate_fn": noisy, **options})


def no_children_left() -> bool:
    gc.collect()
    return multiprocessing.active_children() == []


# Order and randomness


@all_workers
def test_order_is_that_of_a_hand_written_loop(workers: dict[str, Any]) -> None:
    """A shuffled loader has in each epoch the order of a loop that calls torch.manual_seed(order_seed(…)) before it."""
    by_hand = []
    reference = DataLoader(range(SIZE), batch_size=3, shuffle=True)  # type: ignore[arg-type]
    for epoch in range(3):
        torch.manual_seed(seeds.order_seed(SEED, epoch))
        by_hand.append([batch.tolist() for batch in reference])
    assert by_hand[0] != by_hand[1] != by_hand[2]
    got = epochs(make(range(SIZE), shuffle=True, collate_fn=None, **workers))
    assert got == by_hand


@pytest.mark.parametrize(
    "options",
    [
        {"batch_sampler": Eager()},
        {"sampler": WeightedRandomSampler([1.0] * SIZE, SIZE)},
        {"sampler": SubsetRandomSampler(range(2, SIZE))},
        {"sampler": RandomSampler(range(SIZE), replacement=True, num_samples=50)},
        {"batch_size": None, "shuffle": True},
        {"batch_size": 4, "drop_last": True, "shuffle": True},
    ],
    ids=["eager batches", "weighted", "subset", "replacement", "batch_size=None", "drop_last"],
)
def test_order_of_other_samplers_is_that_of_a_hand_written_loop(options: dict[str, Any]) -> None:
    """The promise holds for every sampler of torch, and for one that draws when its iterator is made."""
    reference = DataLoader(range(SIZE), **options)  # type: ignore[arg-type]
    by_hand = []
    for epoch in range(2):
        torch.manual_seed(seeds.order_seed(SEED, epoch))
        by_hand.append(plain(reference))
    for workers in WORKERS[0], WORKERS[2]:
        assert epochs(make(range(SIZE), **{"batch_size": 1, **options, "collate_fn": None}, **workers), 2) == by_hand


@pytest.mark.parametrize(
    "kind", [Augmented, Many, "weighted", "drawing", "drawing batches", "single", "own init", "listed"]
)
def test_batches_do_not_depend_on_the_workers(kind: Any) -> None:
    """What torch, NumPy and random give in a dataset, a collate function and a sampler is the same for all workers."""

    def loader(workers: dict[str, Any]) -> DataLoader[Any]:
        if kind == "own init":
            workers = {**workers, "multiprocessing_context": "fork"} if workers["num_workers"] else workers
            return OwnInit(Augmented(), batch_size=3, shuffle=True, **workers)
        options: dict[str, Any] = {
            "weighted": {"sampler": WeightedRandomSampler([0.1, 0.9] * 5, SIZE)},
            "drawing": {"sampler": Drawing()},
            "drawing batches": {"batch_sampler": DrawingBatches(), "batch_size": 1},
            "single": {"batch_size": None, "shuffle": True, "collate_fn": identity},
            "listed": {"batch_sampler": [[3, 1], [2]], "batch_size": 1},
        }.get(kind, {"shuffle": True})
        return make((kind if isinstance(kind, type) else Augmented)(), **options, **workers)

    first, *others = [epochs(loader(workers)) for workers in WORKERS]
    assert first[0] != first[1] != first[2]
    assert all(other == first for other in others)
    if kind == "drawing batches":
        assert len({tuple(sample[0] for sample in batch[:-1]) for batch in first[0]}) == 4, "anew for each batch"
    assert all(len(epoch) == (SIZE if kind == "single" else 2 if kind == "listed" else 4) for epoch in first)


def test_each_batch_is_read_under_its_own_seed() -> None:
    """Batch k is read and collated under data_seed(seed, epoch, k), set once."""
    dataset = Augmented()
    *_, last = Loader(make(dataset, batch_size=4), SEED).batches(epoch=2)
    seeds.seed_all(seeds.data_seed(SEED, 2, 2))
    assert last == noisy([dataset[8], dataset[9]])


def test_epochs_are_told() -> None:
    """Whatever has set_epoch is told the epoch once: loader, sampler, batch sampler, its sampler, dataset."""
    dataset: Any = Augmented()
    told: list[int] = []
    dataset.set_epoch = told.append
    sampler = Drawing()
    inner = DrawingBatches()
    other = Batches()
    for loader in make(dataset, sampler=sampler), make(dataset, batch_sampler=inner, batch_size=1), other:
        list(Loader(loader, SEED).batches(epoch=5))
    assert (sampler.epochs, inner.sampler.epochs, other.epochs, told) == ([5], [5], [5], [5, 5])


def test_distributed_sampler_gets_its_epoch() -> None:
    """A DistributedSampler reshuffles each epoch, as with set_epoch by hand."""
    sampler = DistributedSampler(range(SIZE), num_replicas=2, rank=1, seed=3)  # type: ignore[arg-type, var-annotated]
    got = epochs(make(range(SIZE), sampler=sampler, collate_fn=None))
    by_hand = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        by_hand.append([batch.tolist() for batch in DataLoader(range(SIZE), 3, sampler=sampler)])  # type: ignore[arg-type]
    assert got == by_hand


@pytest.mark.parametrize("owner", ["loader", "sampler", "batch sampler"])
def test_generator_of_the_user(owner: str) -> None:
    """A generator given by the user is seeded for each epoch, and has its own state back afterwards."""
    generator = torch.Generator()
    generator.manual_seed(99)
    state = generator.get_state()
    shuffled = RandomSampler(range(SIZE), generator=generator)

    def loader(**workers: Any) -> DataLoader[Any]:
        if owner == "loader":
            return make(range(SIZE), shuffle=True, generator=generator, collate_fn=None, **workers)
        if owner == "sampler":
            return make(range(SIZE), sampler=shuffled, collate_fn=None, **workers)
        batches = BatchSampler(shuffled, 3, drop_last=False)
        return make(range(SIZE), batch_size=1, batch_sampler=batches, collate_fn=None, **workers)

    by_hand = []
    for epoch in range(3):
        generator.manual_seed(seeds.order_seed(SEED, epoch))
        by_hand.append(plain(loader()))
    generator.set_state(state)
    for workers in WORKERS:
        assert epochs(loader(**workers)) == by_hand
        assert torch.equal(generator.get_state(), state)
    half = Loader(loader(), SEED).batches(0)
    next(half)
    assert not torch.equal(generator.get_state(), state)
    half.close()
    assert torch.equal(generator.get_state(), state)


# Position


def kinds() -> dict[str, Any]:
    combine = {mode: CombinedLoader([make(Augmented(), shuffle=True), make(Augmented(5), shuffle=True)], mode)  # type: ignore[arg-type]
               for mode in ("min_size", "max_size", "max_size_cycle", "sequential")}  # fmt: skip
    return {
        "shuffled": make(Augmented(), shuffle=True),
        "workers": make(Augmented(), shuffle=True, num_workers=2),
        "persistent": make(Augmented(), shuffle=True, num_workers=2, persistent_workers=True),
        "drawing": make(Augmented(), sampler=Drawing()),
        "drawing batches": make(Augmented(), batch_size=1, batch_sampler=DrawingBatches()),
        "single": make(Augmented(), batch_size=None, shuffle=True, collate_fn=identity),
        "list": [[1.0], [2.0], [3.0], [4.0]],
        "tuple": ([1.0], [2.0], [3.0]),
        "own init": OwnInit(Augmented(), batch_size=3, shuffle=True),
        "own iter": OwnIter(Augmented(), batch_size=3, shuffle=True),
        "custom": Batches(),
        "stream": make(Stream()),
        "stream workers": make(Stream(), num_workers=2),
        "bare stream": Stream(),
        **combine,
        "nested": CombinedLoader({"a": combine["sequential"], "b": make(Augmented(5))}, "max_size_cycle"),
        "replayed": CombinedLoader([Batches(), make(Augmented(6), shuffle=True)], "max_size_cycle"),
        "replayed parts": CombinedLoader([Batches(), make(Augmented(6), shuffle=True)], "sequential"),
    }


REPLAYED = {"own iter", "custom", "stream", "stream workers", "bare stream", "replayed", "replayed parts"}


@pytest.mark.parametrize("kind", kinds())
def test_start_gives_the_rest_of_the_epoch(kind: str) -> None:
    """From any position on, up to the end and beyond, the batches are those of the whole epoch."""
    loader = Loader(kinds()[kind], SEED)
    assert loader.exact == (kind not in REPLAYED)
    whole = plain(loader.batches(1))
    assert len(whole) >= 2
    assert plain(loader.batches(1)) == whole
    positions = (1, len(whole)) if "worker" in kind else range(len(whole) + 2)
    for start in positions:
        assert plain(loader.batches(1, start)) == whole[start:], start
    loader.close()


def test_start_reads_nothing_that_lies_before() -> None:
    """A position in a map-style loader is reached without reading a sample."""
    dataset, short = Augmented(), Augmented(5)
    loader = make(dataset, shuffle=True)
    assert len(list(Loader(loader, SEED).batches(0, start=2))) == 2
    assert dataset.reads == 4
    combined = CombinedLoader([loader, make(short)], "max_size_cycle")
    dataset.reads = 0
    assert len(list(Loader(combined, SEED).batches(0, start=3))) == 1
    assert (dataset.reads, short.reads) == (1, 2)


def test_replay_reads_and_drops() -> None:
    """Another iterable is replayed up to the position, under the same seeds."""
    reads = []

    def loud() -> Iterator[int]:
        for k in range(4):
            reads.append(k)
            yield k

    assert list(Loader(loud(), SEED).batches(0, start=3)) == [3]
    assert reads == [0, 1, 2, 3]
    assert list(Loader(CombinedLoader([loud(), [9]], "sequential"), SEED).batches(0, start=3)) == [3, 9]
    assert reads == [0, 1, 2, 3] * 2


# Loaders that are not rebuilt


def test_subclass_with_its_own_iteration_is_read_by_it() -> None:
    """A DataLoader whose class iterates by itself is read as its author wrote it, in a reproducible order."""
    loader = OwnIter(Augmented(), batch_size=3, shuffle=True, collate_fn=noisy)
    first, second = epochs(loader, 2), epochs(loader, 2)
    assert first == second
    assert first[0] != first[1]
    assert {batch[0] for batch in first[0]} == {"mine"}
    random.seed(0)
    torch.manual_seed(seeds.order_seed(SEED, 0))
    order = [[sample[0] for sample in batch[:-1]] for _, batch in loader]
    assert [[sample[0] for sample in batch[1][:-1]] for batch in first[0]] == order


def test_subclass_with_its_own_collation_keeps_it() -> None:
    """A DataLoader subclass that only changes __init__ is rebuilt as that class, with its own settings."""
    loader = Loader(OwnInit(Augmented(), batch_size=3), SEED)
    assert loader.exact
    assert {batch[0] for batch in loader.batches(0)} == {"joined"}


def test_other_iterables_are_seeded_before_each_batch() -> None:
    """An iterable is seeded by order_seed before its start and by data_seed before each later batch."""
    (_, first, *_), (_, second, *drawn) = list(Loader(Batches(), SEED).batches(3))[:2]
    seeds.seed_all(seeds.order_seed(SEED, 3))
    assert first == second == random.random()
    seeds.seed_all(seeds.data_seed(SEED, 3, 1))
    assert drawn == draws()


def test_tensors_put_together_by_torch_alone_are_not_seeded() -> None:
    """A plain TensorDataset draws nothing, so nothing is seeded; a subclass or another collate function may draw."""

    class Noisy(TensorDataset):
        def __getitem__(self, i: int) -> Any:
            return (torch.rand(()),)

    def second(dataset: Any, **options: Any) -> Any:
        batches = Loader(DataLoader(dataset, batch_size=2, **options), SEED).batches(0)
        next(batches)
        torch.manual_seed(1)
        batch, after = next(batches)[0].tolist(), torch.rand(()).item()
        torch.manual_seed(1)
        return batch, after == torch.rand(()).item()

    plain = TensorDataset(torch.arange(6.0))
    assert second(plain) == ([2.0, 3.0], True)
    assert second(Subset(plain, [5, 4, 3, 2])) == ([3.0, 2.0], True)
    torch.manual_seed(seeds.data_seed(SEED, 0, 1))
    drawn = [torch.rand(()).item(), torch.rand(()).item()]
    assert second(Noisy(torch.arange(6.0))) == (drawn, False)
    assert second(Subset(Noisy(torch.arange(6.0)), range(6))) == (drawn, False)
    assert second(plain, collate_fn=lambda samples: (torch.rand(2),))[0] == pytest.approx(drawn)


def test_lists_are_neither_copied_nor_seeded() -> None:
    """A list's batches are the very same objects, and reading them leaves the random state alone."""
    batches = [torch.zeros(2), torch.ones(2)]
    before = torch.get_rng_state()
    assert all(got is given for got, given in zip(Loader(batches, SEED).batches(0), batches, strict=True))
    assert torch.equal(before, torch.get_rng_state())


def test_generator_of_batches_is_one_shot_and_stays_open() -> None:
    """A generator is read on in the next epoch, and has nothing more when it is used up."""
    loader = Loader((k for k in range(3)), SEED)
    assert loader.one_shot
    first = loader.batches(0)
    assert next(first) == 0
    first.close()
    assert list(loader.batches(1)) == [1, 2]
    assert list(loader.batches(2)) == []
    assert Loader(CombinedLoader([[1], (k for k in range(3))]), SEED).one_shot
    assert not any(Loader(each, SEED).one_shot for each in ([1], Batches(), make(Augmented()), Stream()))


def test_errors_of_the_dataset_pass() -> None:
    """An error in the user's dataset arrives as it is, from this process and from a worker."""
    for workers in WORKERS[0], WORKERS[2]:
        with pytest.raises(IndexError, match="list index out of range"):
            list(Loader(make([1, 2, 3], sampler=[0, 1, 9], **workers), SEED).batches(0))
    assert no_children_left()


# Length


def test_length_is_what_len_says() -> None:
    """The length is a claim of the loader: None where there is none, and a wrong one changes nothing."""
    lengths = [make(Augmented()), make(Augmented(), drop_last=True), [1, 2], make(Stream()), Batches(), iter([1])]
    assert [Loader(each, SEED).length for each in lengths] == [4, 3, 2, None, None, None]
    wrong = Loader(WrongLength(), SEED)
    assert (wrong.length, len(list(wrong.batches(0)))) == (9, 4)
    stream = make(SizedStream(300), batch_size=2)
    own = OwnIter(SizedStream(300), batch_size=2)
    for loader in stream, own:
        assert (Loader(loader, SEED).length, len(epochs(loader, 1)[0])) == (50, 150), "and torch does not warn about it"


# Streams


@all_workers
def test_stream_is_a_function_of_seed_and_epoch(workers: dict[str, Any]) -> None:
    """Each epoch of a stream gives every sample once, anew, and the same each time; workers see the user's dataset."""
    first, second = (epochs(make(Stream(), **workers)) for _ in range(2))
    assert first == second
    for epoch in first:
        assert sorted(sample[0] for batch in epoch for sample in batch[:-1]) == list(range(SIZE))
    assert first[0] != first[1] != first[2]
    assert epochs(make(Stream(), **workers), 1, seed=SEED + 1)[0] != first[0]


def test_stream_in_persistent_workers_is_that_of_new_workers() -> None:
    """Workers that persist learn the epoch: they give what new workers give."""
    assert epochs(make(Stream(), **WORKERS[2])) == epochs(make(Stream(), **WORKERS[3]))


@pytest.mark.parametrize("workers", [0, 2])
def test_each_batch_of_a_stream_has_its_own_seed(workers: int) -> None:
    """Batch j of worker w is read and collated under data_seed(seed, epoch, j * num_workers + w)."""
    batches = epochs(make(Stream(12), num_workers=workers), 1)[0]
    for k, batch in enumerate(batches):
        seeds.seed_all(seeds.data_seed(SEED, 0, k))
        if k < max(workers, 1):
            random.shuffle(list(range(12 // max(workers, 1))))  # the generator starts with its first sample
        assert [sample[1:] for sample in batch[:-1]] + [batch[-1]] == [draws() for _ in range(4)]


def test_stream_that_draws_before_its_first_sample() -> None:
    """What is drawn when a stream is opened differs between workers and epochs, and is the same each time."""
    first, second = (epochs(make(EagerStream(), collate_fn=identity, **workers), 2) for workers in WORKERS[2:])
    assert first == second
    opened = [draw for epoch in first for batch in epoch for draw in batch]
    assert len(opened) == len(set(opened)) == 4


def test_stream_without_batches() -> None:
    """With batch_size=None every sample is a batch, seeded by itself; with drop_last the rest is left out."""
    samples = epochs(make(Stream(), batch_size=None, collate_fn=identity), 1)[0]
    seeds.seed_all(seeds.data_seed(SEED, 0, 4))
    assert samples[4][1:] == draws()
    assert len(samples) == SIZE
    assert len(epochs(make(Stream(), batch_size=4, drop_last=True), 1)[0]) == 2


# Workers


def mark_dataset(worker_id: int) -> None:
    info: Any = get_worker_info()
    info.dataset.mark = f"{type(info.dataset).__name__} in worker {worker_id}"


class Marked(Augmented):
    def __getitem__(self, i: int) -> Any:
        info: Any = get_worker_info()
        assert info.dataset is self
        return self.mark


class Seeds(Augmented):
    def __getitem__(self, i: int) -> Any:
        info: Any = get_worker_info()
        return info.seed


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_worker_init_fn_sees_the_dataset_of_the_user(context: str) -> None:
    """worker_init_fn finds the user's own dataset and can set attributes on it; all of it can be pickled."""
    loader = make(
        Marked(2),
        batch_size=1,
        num_workers=1,
        worker_init_fn=mark_dataset,
        multiprocessing_context=context,
        collate_fn=identity,
    )
    assert epochs(loader, 1) == [[["Marked in worker 0"]] * 2]


def test_stream_in_spawned_workers() -> None:
    """A stream in workers that are started afresh is that in forked ones."""
    spawned = make(Stream(4), num_workers=1, multiprocessing_context="spawn", persistent_workers=True)
    assert epochs(spawned) == epochs(make(Stream(4), num_workers=1))


@pytest.mark.parametrize("dataset", [Augmented, Stream])
@pytest.mark.parametrize("how", ["close", "delete", "own iter", "combined"])
def test_half_read_epoch_leaves_no_worker(how: str, dataset: Any) -> None:
    """A generator left half-way and closed or deleted leaves no worker behind."""
    given: Any = make(dataset(), num_workers=2)
    if how == "own iter":
        given = OwnIter(dataset(), batch_size=3, num_workers=2, multiprocessing_context="fork")
    if how == "combined":
        given = CombinedLoader([given, make(dataset(), num_workers=1)])
    batches = Loader(given, SEED).batches(0)
    next(batches)
    assert len(multiprocessing.active_children()) >= 2
    if how == "close":
        batches.close()
        assert multiprocessing.active_children() == []
    del batches
    assert no_children_left()


@pytest.mark.parametrize("kind", ["map", "stream", "own iter", "combined"])
def test_persistent_workers_persist_until_close(kind: str) -> None:
    """Persistent workers outlive a half-read epoch, give the next one right, and end with close, twice if need be."""
    dataset = Stream() if kind == "stream" else Augmented()
    given: Any = make(dataset, **WORKERS[3])
    if kind == "own iter":
        given = OwnIter(dataset, batch_size=3, multiprocessing_context="fork", **WORKERS[3])
    if kind == "combined":
        given = CombinedLoader([given])
    loader = Loader(given, SEED)
    half = loader.batches(0)
    next(half)
    half.close()
    children = {child.pid for child in multiprocessing.active_children()}
    assert len(children) == 2
    next_epoch = plain(loader.batches(1))
    assert {child.pid for child in multiprocessing.active_children()} == children
    loader.close()
    loader.close()
    assert no_children_left()
    if kind != "own iter":
        assert plain(loader.batches(1)) == next_epoch, "workers are started again"
    loader.close()


def test_the_loader_of_the_user_stays_as_it_was() -> None:
    """Nothing is changed in the user's own loader; it keeps its workers and can be read by hand in between."""
    loader: Any = make(Augmented(), shuffle=True, **WORKERS[3])
    expected = epochs(loader, 2)
    assert len(list(loader)) == 4
    before = dict(loader.__dict__)
    assert epochs(loader, 2) == expected
    assert loader.__dict__ == before
    assert len(list(loader)) == 4
    loader._iterator._shutdown_workers()


def test_workers_start_from_the_base_seed_of_a_hand_written_loop() -> None:
    """What is random while a worker starts is that of a loop with torch.manual_seed(order_seed(…)) before it."""
    loader = make(Seeds(), num_workers=1, collate_fn=identity, shuffle=True)
    torch.manual_seed(seeds.order_seed(SEED, 0))
    by_hand = list(loader)
    assert epochs(loader, 1)[0] == by_hand


# CombinedLoader


@pytest.mark.parametrize("mode", ["min_size", "max_size", "max_size_cycle", "sequential"])
@pytest.mark.parametrize("named", [True, False])
def test_combined_modes(mode: Any, named: bool) -> None:
    """Each mode gives the parts' samples in the structure given, as the plain CombinedLoader does."""
    long, short = (make(range(size), collate_fn=None) for size in (10, 5))
    combined = CombinedLoader({"a": long, "b": short} if named else [long, short], mode)
    loader = Loader(combined, SEED)
    assert plain(loader.batches(0)) == plain(combined)
    assert loader.length == len(combined) == len(plain(combined))


def test_sequential_tells_the_loader() -> None:
    """With sequential parts, dataloader_idx is the part that the last batch came from, from any start."""
    loader = Loader(CombinedLoader([[1, 2], make(range(6), sampler=[0, 3]), [5]], "sequential"), SEED)
    for start in range(4):
        assert [loader.dataloader_idx for _ in loader.batches(0, start)] == [0, 0, 1, 2][start:]

    assert Loader([1, 2], SEED).dataloader_idx == 0


def test_parts_are_not_paired_alike() -> None:
    """Part 0 has the order it would have alone; the others have another, so pairs differ in each epoch."""
    alone = make(range(SIZE), shuffle=True, collate_fn=None)
    pairs = epochs(CombinedLoader([alone, make(range(SIZE), shuffle=True, collate_fn=None)]))
    assert [[first for first, _ in epoch] for epoch in pairs] == epochs(alone)
    assert all(first != second for epoch in pairs for first, second in epoch[:1])


def test_restarted_part_is_shuffled_anew() -> None:
    """In max_size_cycle each restart has an order of its own."""
    short = make(range(5), shuffle=True, batch_size=5, collate_fn=None)
    rounds = epochs(CombinedLoader([list(range(4)), short], "max_size_cycle"), 1)[0]
    orders = [tuple(second) for _, second in rounds]
    assert len(set(orders)) == 4
    assert {tuple(sorted(order)) for order in orders} == {tuple(range(5))}


def test_one_shot_part_cannot_cycle() -> None:
    """A part that gives nothing when it is started again is refused by name."""
    loader = Loader(CombinedLoader([[1, 2, 3], (k for k in range(2))], "max_size_cycle"), SEED)
    with pytest.raises(DataError, match="loader 1 of the CombinedLoader gave nothing"):
        list(loader.batches(0))


def test_sequential_sampler_needs_no_seed() -> None:
    """An unshuffled loader keeps the order of its dataset in every epoch."""
    loader = make(range(SIZE), sampler=SequentialSampler(range(SIZE)), collate_fn=None)
    assert epochs(loader) == [[[0, 1, 2], [3, 4, 5], [6, 7, 8], [9]]] * 3


# ---- several processes -----------------------------------------------------------------------------------------------


def shared(given: Any, size: int, filled: bool, **options: Any) -> list[Any]:
    """What each of `size` processes reads of epoch 1."""
    shares = [Share(rank, size, filled) for rank in range(size)]
    return [list(Loader(given(), SEED, share=share).batches(1, **options)) for share in shares]


GIVEN: dict[str, Any] = {
    "indexed": lambda: make(Augmented(10), batch_size=3, shuffle=True),
    "list": lambda: [[i] for i in range(4)],
    "iterable": lambda: Batches(),
    "stream": lambda: make(Stream(), batch_size=3),
    "combined": lambda: CombinedLoader([make(Augmented(10), batch_size=3), [1, 2, 3, 4]], mode="min_size"),
}


@pytest.mark.parametrize("kind", GIVEN)
@pytest.mark.parametrize("size", [2, 3])
def test_batch_k_of_rank_r_is_batch_k_times_size_plus_r(kind: str, size: int) -> None:
    """Random augmentation included; evaluation reads each batch once, training fills the last round."""
    whole = list(Loader(GIVEN[kind](), SEED).batches(1))
    parts = shared(GIVEN[kind], size, filled=False)
    assert [parts[k % size][k // size] for k in range(len(whole))] == whole
    assert sum(map(len, parts)) == len(whole)
    filled = shared(GIVEN[kind], size, filled=True)
    assert len({len(part) for part in filled}) == 1
    assert [part[: len(own)] for part, own in zip(filled, parts, strict=True)] == parts


def test_filled_batches_come_from_the_beginning_of_the_epoch() -> None:
    """Also where there are fewer batches than processes."""
    assert shared(lambda: ["a", "b", "c"], 2, filled=True) == [["a", "c"], ["b", "a"]]
    assert shared(lambda: ["a", "b"], 5, filled=True) == [["a"], ["b"], ["a"], ["b"], ["a"]]
    assert shared(list, 2, filled=True) == [[], []]


@pytest.mark.parametrize("kind", GIVEN)
def test_a_part_starts_anywhere(kind: str) -> None:
    """The same batches from the second on."""
    parts = shared(GIVEN[kind], 2, filled=True)
    assert shared(GIVEN[kind], 2, filled=True, start=1) == [part[1:] for part in parts]


def test_lengths_are_those_of_the_part() -> None:
    """Known without reading; a DistributedSampler of the user is left alone."""
    assert [Loader([0] * 5, 0, share=Share(r, 2, True)).length for r in (0, 1)] == [3, 3]
    assert [Loader([0] * 5, 0, share=Share(r, 2)).length for r in (0, 1)] == [3, 2]
    own = DistributedSampler(Augmented(10), num_replicas=2, rank=0, shuffle=False)
    loader = Loader(make(Augmented(10), sampler=own, batch_size=5), 0, share=Share(0, 2, True))
    assert (loader.length, len(list(loader.batches(0)))) == (1, 1)


def test_a_process_reads_only_its_own_samples() -> None:
    """Of a map-style dataset."""
    dataset = Augmented(10)
    list(Loader(make(dataset, batch_size=2), SEED, share=Share(1, 2)).batches(0))
    assert dataset.reads == 4


class Dying:
    """A loader and its iterator, whose only worker (a real process) was killed while a batch was on its way."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        worker = multiprocessing.get_context("fork").Process(target=signal.pause)
        worker.start()
        os.kill(worker.pid or 0, signal.SIGKILL)
        self._workers = [worker]

    def __iter__(self) -> "Dying":
        return self

    def __next__(self) -> Any:
        raise ConnectionResetError(104, "Connection reset by peer")


def test_a_worker_that_dies_while_it_sends_is_named() -> None:
    """torch then only says that a connection was reset; what is raised is what torch raises at any other moment."""
    with pytest.raises(
        RuntimeError, match=r"DataLoader worker \(pid \d+\) exited unexpectedly with status -9"
    ) as caught:
        next(rebuilt._read(Dying(), 0))
    assert isinstance(caught.value.__cause__, ConnectionResetError)


def test_the_first_batch_is_known_of_lists_alone() -> None:
    """It is there without reading; nothing else is read for it."""
    assert Loader([3, 4], seed=0).first == 3
    assert Loader((), seed=0).first is None
    iterator = iter([3, 4])
    assert Loader(iterator, seed=0).first is None
    assert list(iterator) == [3, 4]
