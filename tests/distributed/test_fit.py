"""`fit` and the other verbs on several processes of the CPU: started by `devices=`, and joined."""

import copy
import itertools
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import lightdeco as ld
from lightdeco.processes import start
from tests.models import QUIET


def samples(count: int = 96) -> TensorDataset:
    """`count` samples of 8 features and a class of 3, the same every time."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 8, generator=generator), torch.randint(3, (count,), generator=generator))


def loader(batch_size: int, count: int = 96, **options: Any) -> DataLoader[Any]:
    return DataLoader(samples(count), batch_size=batch_size, **options)


class Net(nn.Module):
    """A classifier with every step; without randomness of its own."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
        self.lr = lr

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.body(batch[0]), batch[1])

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return self.loss(batch)

    @ld.validation_step
    @ld.test_step
    def check(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": self.loss(batch)}

    @ld.predict_step
    def infer(self, batch: Any) -> Tensor:
        return batch[0][:, 0]

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Weighted(Net):
    """Counts each batch with a weight of its own."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        x, y = batch
        weight = (y + 1).float()
        each = F.cross_entropy(self.body(x), y, reduction="none")
        return {"loss": (each * weight).sum() / weight.sum(), "weight": weight.sum()}


class Scheduled(Net):
    """Clips, and steps a scheduler with each update."""

    @ld.configure_optimizers
    def sgd(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr)
        return ld.Optim(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.8), interval="step")


class Thawing(Net):
    """Its first layer is frozen in the first epoch."""

    @ld.on_train_start
    def freeze(self) -> None:
        self.body[0].requires_grad_(False)

    @ld.on_train_epoch_end
    def thaw(self) -> None:
        self.body[0].requires_grad_(True)


class Melting(Net):
    """Its first layer is frozen at first, and its last one in the end; both change within an epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.body[0].requires_grad_(False)

    @ld.on_train_batch_start
    def change(self, run: ld.Run) -> None:
        self.body[0].requires_grad_(run.global_step >= 2)
        self.body[2].requires_grad_(run.global_step < 8)
        if run.global_step >= 8:
            self.body[2].zero_grad()


class Growing(Net):
    """Gets another first layer, of other weights on each rank, after the first epoch."""

    @ld.on_train_epoch_start
    def grow(self, run: ld.Run) -> None:
        if run.epoch == 1:
            layer = nn.Linear(8, 16)
            nn.init.constant_(layer.weight, 0.1 + run.rank)
            nn.init.zeros_(layer.bias)
            self.body[0] = layer
            (optimizer,) = (optim.optimizer for optim in run.optims.values())
            optimizer.param_groups[0]["params"] = list(self.parameters())


class Parts(Net):
    """Cuts batches of up to 8 samples into parts of 3."""

    @ld.split_batch(size=3)
    def split(self, batch: Any, size: int) -> Any:
        return list(zip(batch[0].split(size), batch[1].split(size), strict=True))


class Closing(Net):
    """An optimizer that evaluates the loss itself."""

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3, line_search_fn="strong_wolfe")


class Two(Net):
    """Two optimizers, the second every other batch; `manual` drives them by hand in the same way."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 3)

    @ld.training_step(optimizer="body")
    def step(self, batch: Any) -> Any:
        return self.loss(batch)

    @ld.training_step(optimizer="head", every=2)
    def second(self, batch: Any) -> Any:
        return F.cross_entropy(self.head(batch[0]) + self.body(batch[0]), batch[1])

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return {
            "body": torch.optim.SGD(self.body.parameters(), lr=0.1),
            "head": torch.optim.SGD(self.head.parameters(), lr=0.1),
        }


class Manual(Two):
    """`Two`, by hand."""

    second = None  # type: ignore[assignment]

    @ld.training_step(manual=True)
    def step(self, batch: Any, batch_idx: int) -> None:
        optimizers = ld.optimizers()
        body, head = optimizers["body"], optimizers["head"]
        body.zero_grad()
        ld.backward(self.loss(batch), body)
        body.step()
        if batch_idx % 2 == 0:
            head.zero_grad()
            ld.backward(F.cross_entropy(self.head(batch[0]) + self.body(batch[0]), batch[1]), head)
            head.step()


def trained(model: nn.Module, batch_size: int, **settings: Any) -> tuple[list[Tensor], ld.Run]:
    """The weights after two epochs, and the run."""
    settings = {"max_epochs": 2, "seed": 5, "checkpoint": False} | settings
    run = ld.fit(model, loader(batch_size, shuffle=True), **QUIET, **settings)
    return [p.detach().clone() for p in model.parameters()], run


class Normed(Net):
    """Has buffers, so that "auto" is torch's DDP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8, momentum=None, affine=False).eval()

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.body(self.norm(batch[0])), batch[1])


#: "ddp" is torch's DDP; "auto" averages the gradients of these small models itself, where it can.
STRATEGIES = ("auto", "ddp")
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (Net, {}),
    "buffers": (Normed, {}),
    "weights": (Weighted, {}),
    "accumulation": (Net, {"accumulate_grad_batches": 4}),  # 6 batches an epoch: the last window is short
    "weights and accumulation": (Weighted, {"accumulate_grad_batches": {0: 2, 1: 3}}),
    "scheduler and clipping": (Scheduled, {"gradient_clip_val": 0.3}),
    "closure": (Closing, {"max_steps": 1}),  # LBFGS makes much of the smallest difference in what follows
    "thawing": (Thawing, {}),
    "thawing and freezing within an epoch": (Melting, {}),
    "growing": (Growing, {}),
    "two optimizers": (Two, {}),
    "manual": (Manual, {}),
    "bf16": (Net, {"precision": "bf16-mixed"}),
    "float64": (Net, {"precision": "64-true"}),
}


def train_all(names: list[str], folder: Path) -> dict[tuple[str, str], Any]:
    """In a started process: every case with batches of 8, gradients compared between the ranks."""
    found = {}
    for name, strategy in itertools.product(names, STRATEGIES):
        kind, settings = CASES[name]
        weights, run = trained(kind(), 8, strategy=strategy, **settings)
        everywhere: list[Any] = [None, None]
        torch.distributed.init_process_group("gloo", store=_store(), rank=_rank(), world_size=2)
        torch.distributed.all_gather_object(everywhere, weights)
        torch.distributed.destroy_process_group()
        equal = all(torch.equal(a, b) for a, b in zip(*everywhere, strict=True))
        found[name, strategy] = (weights, dict(run.metrics), run.global_step, equal)
    return found


def _rank() -> int:
    return ld.joined.rank()  # type: ignore[attr-defined, no-any-return]


def _store() -> Any:
    from lightdeco.joined import group_store

    return group_store()


@pytest.fixture(scope="module")
def on_two() -> Any:
    """Every case, trained by two processes."""
    return start(train_all, list(CASES), 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", CASES)
def test_two_processes_with_half_the_batch_are_one_with_all_of_it(on_two: Any, name: str, strategy: str) -> None:
    """Weights, metrics and steps are equal to float tolerance; weights are bit-equal on both ranks."""
    kind, settings = CASES[name]
    expected, run = trained(kind(), 16, **settings)
    weights, metrics, steps, equal = on_two[name, strategy]
    assert equal
    assert steps == run.global_step
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if "bf16" in name else {"rtol": 1e-4, "atol": 1e-5}
    for mine, theirs in zip(weights, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)
    for key, value in run.metrics.items():
        assert metrics[key] == pytest.approx(value, rel=1e-2 if "bf16" in name else 1e-5), key


@pytest.mark.parametrize("name", CASES)
def test_a_small_model_is_trained_to_the_bit_as_by_ddp(on_two: Any, name: str) -> None:
    """What `strategy="auto"` does for it changes no weight and no metric."""
    (weights, metrics, *_), (by_ddp, theirs, *_) = (on_two[name, strategy] for strategy in STRATEGIES)
    assert all(torch.equal(a, b) for a, b in zip(weights, by_ddp, strict=True))
    assert metrics == theirs


# ---- against plain DDP -----------------------------------------------------------------------------------------------


def by_hand_and_by_fit(strategy: str, folder: Path) -> tuple[bool, list[int], int]:
    """The same batches by a loop with torch's DDP and by `fit`; how many all-reduces each update of `fit` made."""
    settings: dict[str, Any] = {"strategy": strategy, "checkpoint": False} | QUIET
    rank = _rank()
    given = [batch for k, batch in enumerate(loader(8)) if k % 2 == rank]
    torch.distributed.init_process_group("gloo", store=_store(), rank=rank, world_size=2)
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model.body)
    optimizer = model.sgd()
    for _ in range(2):
        for x, y in given:
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    torch.distributed.destroy_process_group()

    counts: list[int] = []
    fitted = Net()

    class Count:
        profiler: Any = None

        @ld.on_train_batch_start
        def begin(self) -> None:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
            self.profiler.__enter__()

        @ld.on_train_batch_end
        def end(self) -> None:
            self.profiler.__exit__(None, None, None)
            counts.append(sum(event.count for event in self.profiler.key_averages() if "allreduce_" in event.key))

    steps = ld.fit(fitted, loader(8), max_epochs=2, callbacks=Count(), **settings).global_step
    ld.fit(Net(), loader(8), max_epochs=1, callbacks=Count(), accumulate_grad_batches=3, **settings)
    equal = all(torch.equal(a, b) for a, b in zip(model.parameters(), fitted.parameters(), strict=True))
    return equal, counts, steps


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bit_equal_to_a_loop_with_ddp_and_one_all_reduce_per_update(strategy: str) -> None:
    """With equal batches `fit` does what a hand-written loop does, to the bit; agreeing costs no message more."""
    equal, counts, steps = start(by_hand_and_by_fit, strategy, 2)
    assert equal
    assert steps == 12
    assert counts == [1] * 12 + [0, 0, 1, 0, 0, 1]


class Stops:
    """Asks to end the run, on some ranks, in the third batch or in the first validation."""

    def __init__(self, ranks: tuple[int, ...], event: str) -> None:
        self.ranks, self.event = ranks, event

    @ld.on_train_batch_end
    def batch(self, run: ld.Run) -> None:
        if self.event == "batch" and run.global_step == 3 and run.rank in self.ranks:
            run.should_stop = True

    @ld.on_validation_end
    def validation(self, run: ld.Run) -> None:
        if self.event == "validation" and run.stage != "sanity" and run.rank in self.ranks:
            run.should_stop = True


def stop(_: None, folder: Path) -> list[tuple[int, str | None]]:
    """At which step a run ended, and why: asked to by both ranks or one, in a batch or in a validation."""
    found = []
    for event, ranks in itertools.product(("batch", "validation"), ((0, 1), (1,))):
        run = ld.fit(
            Net(), (loader(8), loader(8)), max_epochs=2, val_check_interval=4, callbacks=Stops(ranks, event),
            checkpoint=False, **QUIET,
        )  # fmt: skip
        found.append((run.global_step, run.stop_reason))
    return found


def test_a_wish_to_stop_is_heard_with_the_next_update() -> None:
    """In a batch one update later than on one process, since it travels with gradients; in a validation at once."""
    assert start(stop, None, 2) == [(4, "should_stop")] * 4
    settings: Any = {"max_epochs": 2, "checkpoint": False} | QUIET
    assert ld.fit(Net(), loader(8), callbacks=Stops((0,), "batch"), **settings).global_step == 3


def cut(strategy: str, folder: Path) -> tuple[int, list[str], bool]:
    """A last batch of 8 samples on one rank and of 5 on the other, cut into parts of 3."""
    model = Parts()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = ld.fit(model, loader(8, 29), max_epochs=2, strategy=strategy, checkpoint=False, **QUIET)
    everywhere = [None, None]
    torch.distributed.init_process_group("gloo", store=_store(), rank=_rank(), world_size=2)
    torch.distributed.all_gather_object(everywhere, [p.tolist() for p in model.parameters()])
    torch.distributed.destroy_process_group()
    said = [str(each.message) for each in caught if "numbers of parts" in str(each.message)]
    return run.progress.updates[""], said, everywhere[0] == everywhere[1]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_batches_of_different_numbers_of_parts(strategy: str) -> None:
    """What one rank has more is left out, with one warning; nobody waits for a part that does not come."""
    updates, said, equal = start(cut, strategy, 2)
    assert (updates, equal) == (2 * (3 + 2), True)
    assert len(said) == 1
    assert said[0].startswith("the processes cut a batch into different numbers of parts (2 to 3): what some")


# ---- started by a verb -----------------------------------------------------------------------------------------------


class Told(Net):
    """Notes what happens in which process, in files."""

    @ld.prepare_data
    def once(self) -> None:
        Path(f"prepared-{_rank()}").touch()

    @ld.on_fit_end
    def end(self, run: ld.Run) -> None:
        Path(f"ended-{run.rank}-{run.world_size}-{run.is_main}").touch()
        assert run.broadcast(run.rank, src=1) == 1
        assert run.all_gather(torch.tensor([float(run.rank)])).tolist() == [[0.0], [1.0]]
        run.barrier()


def test_fit_returns_once_with_the_trained_weights(own_directory: Path) -> None:
    """In the caller's process: weights, run and files; the caller's own state is kept."""
    torch.manual_seed(9)
    state = torch.get_rng_state()
    model, tied = Told(), nn.ParameterList()
    tied.append(model.body[0].weight)
    before = model.body[0].weight
    torch.set_rng_state(state)
    run = ld.fit(model, (loader(8, shuffle=True), loader(7)), max_epochs=2, devices=2, seed=5, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.body[0].weight is before
    one = Net()
    other = ld.fit(one, (loader(16, shuffle=True), loader(7)), max_epochs=2, seed=5, **QUIET)
    for mine, theirs in zip(model.parameters(), one.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (run.epoch, run.global_step, run.stop_reason) == (2, other.global_step, "max_epochs")
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.is_dir()
    assert run.dir.resolve().parent.parent == own_directory / "runs"
    assert [r["stage"] for r in run.history] == [r["stage"] for r in other.history]
    assert {p.name for p in own_directory.glob("prepared-*")} == {"prepared-0"}
    assert {p.name for p in own_directory.glob("ended-*")} == {"ended-0-2-True", "ended-1-2-False"}
    again = copy.deepcopy(model)
    assert ld.validate(model, loader(7), devices=2, **QUIET) == pytest.approx(ld.validate(again, loader(7), **QUIET))


@pytest.mark.parametrize("count", [1, 5, 21])
def test_predict_is_in_the_order_of_the_data(count: int) -> None:
    """Whatever the number of batches and processes."""
    found = list(ld.predict(Net(), loader(2, count), devices=3, progress_bar=False))
    assert torch.equal(torch.cat(found), samples(count).tensors[0][:, 0])
    assert [len(each) for each in found] == [2] * (count // 2) + [1]


class Locked:
    """A callback that cannot be sent."""

    def __init__(self) -> None:
        self.lock = threading.Lock()

    @ld.on_fit_end
    def end(self) -> None:
        """Nothing."""


def test_settings_that_cannot_be_had_are_refused_before_anything_starts() -> None:
    """One clear error, of the right kind, in a moment."""
    wrong: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"devices": [0, 1], "accelerator": "cpu"}, ld.LaunchError, "a cpu has no numbers"),
        ({"num_nodes": 2}, ld.LaunchError, "num_nodes=2.*torchrun"),
        ({"strategy": "fsdp", "accelerator": "cpu"}, ld.LaunchError, "this run has one: give devices=2"),
        ({"strategy": "deepspeed", "accelerator": "cpu"}, ld.LaunchError, "this run has one: give devices=2"),
        ({"strategy": object(), "accelerator": "cpu"}, ld.SettingsError, "strategy is a object; allowed"),
        ({"devices": 2, "strategy": "fsdp", "oom": "micro"}, ld.SettingsError, "does not go with oom='micro'"),
        ({"devices": 2, "precision": "16-mixed"}, ld.SettingsError, "precision='16-mixed' needs a CUDA device"),
        ({"devices": 2, "sync_batchnorm": True}, ld.LaunchError, "SyncBatchNorm works on GPUs only"),
        ({"devices": 2, "callbacks": Locked()}, ld.LaunchError, "cannot be sent"),
    ]
    for settings, kind, message in wrong:
        with pytest.raises(kind, match=message):
            ld.fit(Net(), loader(8), max_epochs=1, **QUIET, **settings)


# ---- data ------------------------------------------------------------------------------------------------------------


class Stream(IterableDataset[Any]):
    """21 samples, one after the other; `own` is split by rank, 13 and 8."""

    def __init__(self, own: bool) -> None:
        self.own = own

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        every = samples(21)
        places = itertools.islice(range(21), worker.id if worker else 0, None, worker.num_workers if worker else 1)
        for i in places:
            if not self.own or (i < 13) == (_rank() == 0):
                yield every[i]


class Seen(Net):
    """Keeps what it trained on."""

    @ld.on_train_start
    def begin(self) -> None:
        self.seen: list[list[float]] = []

    @ld.on_train_batch_end
    def note(self, batch: Any) -> None:
        self.seen.append(batch[0][:, 0].tolist())


def read(_: None, folder: Path) -> dict[str, Any]:
    """Which batches each rank trained on."""
    found: dict[str, Any] = {}
    for name, given, ours in (
        ("map", loader(4, 21), True),
        ("stream", DataLoader(Stream(False), batch_size=4), True),
        ("workers", DataLoader(Stream(False), batch_size=4, num_workers=2), True),
        ("own", DataLoader(Stream(True), batch_size=4), False),
        ("list", list(loader(4, 21)), True),
    ):
        model = Seen()
        ld.fit(model, given, max_epochs=1, use_distributed_sampler=ours, checkpoint=False, **QUIET)
        torch.distributed.init_process_group("gloo", store=_store(), rank=_rank(), world_size=2)
        everywhere: list[Any] = [None, None]
        torch.distributed.all_gather_object(everywhere, model.seen)
        torch.distributed.destroy_process_group()
        found[name] = everywhere
    return found


@pytest.fixture(scope="module")
def data_read() -> Any:
    """What two ranks read of several kinds of data."""
    return start(read, None, 2)


@pytest.mark.parametrize("name", ["map", "stream", "workers", "list"])
def test_batches_are_dealt_out(data_read: Any, name: str) -> None:
    """Batch k of rank r is batch 2k + r of one process; the last round is filled from the beginning."""
    given = DataLoader(Stream(False), batch_size=4, num_workers=2) if name == "workers" else loader(4, 21)
    order = [x[:, 0].tolist() for x, _ in given]
    zero, one = data_read[name]
    assert len(order) == 6
    assert (zero, one) == (order[0::2], order[1::2])


def test_ranks_with_different_numbers_of_batches_end_together(data_read: Any) -> None:
    """A dataset that splits itself: 4 batches and 2; both train 2."""
    zero, one = data_read["own"]
    x = samples(21).tensors[0][:, 0].tolist()
    assert (zero, one) == ([x[0:4], x[4:8]], [x[13:17], x[17:21]])
