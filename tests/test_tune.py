"""The learning rate and batch size searches: what they find, and that they leave no trace."""

import gc
import math
import random
import traceback
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import lightdeco as ld
from lightdeco.memory import is_out_of_memory
from lightdeco.tuning import find_batch_size, lr_find
from lightdeco.tuning.curve import LRCurve, _smoothed
from tests.models import Net, batches


def dataset(samples: int = 40) -> TensorDataset:
    """Features (4,) and classes 0..2."""
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(
        torch.randn(samples, 4, generator=generator), torch.randint(3, (samples,), generator=generator)
    )


class Stateful(Net):
    """A model with every kind of state that a run can change."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4)
        self.frozen = nn.Linear(4, 4).eval().requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()), persistent=False)
        self.kept = torch.optim.Adam(self.parameters(), lr=1e-3)
        (self.norm.weight.sum() + self.body[0].weight.sum()).backward()
        self.kept.step()
        self.schedule = torch.optim.lr_scheduler.StepLR(self.kept, 1)
        self.generator = torch.Generator().manual_seed(5)
        self.numpy = numpy.random.default_rng(5)
        self.random = random.Random(5)
        self.table = numpy.zeros(3)
        self.counts: dict[str, Any] = {"steps": 0, "nested": [0]}
        self.order: OrderedDict[str, int] = OrderedDict(a=1, b=2)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.table += 1
        self.counts["steps"] += 1
        self.counts["nested"].append(self.calls)
        self.order.move_to_end("a")
        torch.rand(1, generator=self.generator)
        self.numpy.random()
        self.random.random()
        self.frozen.requires_grad_(True)
        self.extra = nn.Linear(1, 1)
        return super().step(batch)

    @ld.configure_optimizers
    def adam(self) -> Any:
        return self.kept, self.schedule


class Data:
    """A marked data object whose loaders read `batch_size`."""

    def __init__(self, samples: int = 40, reads: bool = True, drop_last: bool = False) -> None:
        self.batch_size, self.samples, self.reads, self.drop_last = 5, samples, reads, drop_last
        self.generator = torch.Generator().manual_seed(2)
        self.setups: list[str] = []

    @ld.setup
    def prepare(self, stage: str) -> None:
        self.setups.append(stage)
        self.made = dataset(self.samples)

    @ld.train_dataloader
    def train(self) -> DataLoader[Any]:
        size = self.batch_size if self.reads else 5
        return DataLoader(self.made, size, shuffle=True, drop_last=self.drop_last, generator=self.generator)

    @ld.val_dataloader
    def val(self) -> DataLoader[Any]:
        return DataLoader(self.made, self.batch_size)


class Counter:
    """A callback with state of its own."""

    def __init__(self) -> None:
        self.batches, self.ema = 0, torch.zeros(2)

    @ld.on_train_batch_end
    def count(self) -> None:
        self.batches += 1
        self.ema += 1


def picture(thing: Any, seen: set[int]) -> Any:
    """Everything reachable from an object, as plain values: identities, and the bits of tensors."""
    if isinstance(thing, (int, float, str, bytes, type(None), type)):
        return repr(thing)
    if id(thing) in seen:
        return id(thing)
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        bits = thing.detach().contiguous().numpy().tobytes()
        return id(thing), thing.data_ptr(), bits, thing.requires_grad, picture(thing.grad, seen)
    if isinstance(thing, numpy.ndarray):
        return id(thing), thing.tobytes()
    if isinstance(thing, torch.Generator):
        return id(thing), thing.get_state().numpy().tobytes()
    if isinstance(thing, numpy.random.Generator):
        return id(thing), repr(thing.bit_generator.state)
    if isinstance(thing, random.Random):
        return id(thing), thing.getstate()
    if isinstance(thing, dict):
        return id(thing), [(picture(key, seen), picture(value, seen)) for key, value in thing.items()]
    if isinstance(thing, (list, tuple, set)):
        return id(thing), [picture(part, seen) for part in thing]
    if hasattr(thing, "__dict__"):
        return id(thing), [(name, picture(value, seen)) for name, value in vars(thing).items()]
    return id(thing)


def world(*things: Any) -> Any:
    """The things and the process's random state, to be compared before and after."""
    state = torch.get_rng_state().numpy().tobytes(), repr(numpy.random.get_state()), random.getstate()
    return [picture(thing, set()) for thing in things], state, torch.is_grad_enabled()


# ---- the learning rate -----------------------------------------------------------------------------------------------


class Quadratic(nn.Module):
    """`w²/2`: plain gradient descent falls up to lr 2 and diverges above it."""

    def __init__(self, make: Any = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3,), 2.0))
        self.v = nn.Parameter(torch.full((3,), 2.0))
        self.make = make or (lambda model: torch.optim.SGD(model.parameters(), lr=0.1))
        self.used: list[tuple[float, ...]] = []

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        return (self.w.square().sum() + self.v.square().sum()) / 2 * batch.mean()

    @ld.configure_optimizers
    def optimizers(self) -> Any:
        return self.make(self)


def ones(count: int = 4) -> list[Tensor]:
    """Batches that do not change the loss."""
    return [torch.ones(2, 1)] * count


def used_rates(model: nn.Module, rates: list[list[float]]) -> Any:
    """`configure_optimizers` for two groups that notes the rates that the updates really use."""

    class Noted(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            rates.append([float(group["lr"]) for group in self.param_groups])
            return super().step(closure)

    groups = [{"params": [model.w], "lr": 0.01}, {"params": [model.v], "lr": 0.1}]  # type: ignore[union-attr]
    return Noted(groups)


def test_the_suggestion_is_where_the_loss_falls() -> None:
    """On a quadratic the curve falls, then diverges; the suggestion lies where gradient descent is fast and stable."""
    found = lr_find(Quadratic(), ones(), min_lr=1e-4, max_lr=1e4, steps=100)
    assert found.suggestion is not None
    assert 0.01 < found.suggestion < 2
    assert len(found.lrs) == len(found.losses) == len(found.smoothed) < 100
    assert found.losses[0] == pytest.approx(12.0)
    assert found.lrs[0] == pytest.approx(1e-4)
    assert repr(found).startswith(f"<LRCurve: suggestion {found.suggestion:.3g}; {len(found.lrs)} steps, lr 0.0001 to")


@pytest.mark.parametrize("mode", ["exponential", "linear"])
def test_every_step_gets_its_rate(mode: Any) -> None:
    """The curve goes from `min_lr` to `max_lr` in equal factors or amounts, over several epochs of the data."""
    found = lr_find(Quadratic(), ones(3), min_lr=1e-3, max_lr=0.1, steps=11, mode=mode, early_stop=None)
    between = [b / a if mode == "exponential" else b - a for a, b in zip(found.lrs, found.lrs[1:], strict=False)]
    assert len(found.lrs) == 11
    assert found.lrs[0] == pytest.approx(1e-3)
    assert found.lrs[-1] == pytest.approx(0.1)
    assert between == pytest.approx([between[0]] * 10)


SCHEDULERS = {
    "none": lambda o: o,
    "by step": lambda o: ld.Optim(o, torch.optim.lr_scheduler.ExponentialLR(o, 0.5), interval="step"),
    "warm-up from 0": lambda o: ld.Optim(o, torch.optim.lr_scheduler.LambdaLR(o, lambda n: n / 10), interval="step"),
    "one cycle, too short": lambda o: ld.Optim(
        o, torch.optim.lr_scheduler.OneCycleLR(o, [0.01, 0.1], total_steps=3, cycle_momentum=False), interval="step"
    ),
    "plateau": lambda o: ld.Optim(o, torch.optim.lr_scheduler.ReduceLROnPlateau(o), monitor="val/loss"),
    "by epoch": lambda o: (o, torch.optim.lr_scheduler.StepLR(o, 1)),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rate_set_is_the_rate_used(name: str) -> None:
    """Whatever scheduler the model has, each update runs with the planned rate; groups keep their ratio."""
    rates: list[list[float]] = []
    model = Quadratic(lambda model: SCHEDULERS[name](used_rates(model, rates)))
    found = lr_find(model, ones(3), min_lr=1e-5, max_lr=1e-2, steps=10)
    assert [second for _, second in rates] == pytest.approx(found.lrs)
    assert [first for first, _ in rates] == pytest.approx([lr / 10 for lr in found.lrs])


def test_a_tensor_rate_and_an_own_optimizer_step_are_overruled() -> None:
    """A learning rate in a tensor is set in place, and code that sets one before `step` has no effect."""
    rates: list[list[float]] = []

    class Warm(Quadratic):
        @ld.optimizer_step
        def update(self, optimizer: torch.optim.Optimizer, closure: Any) -> None:
            optimizer.param_groups[0]["lr"].fill_(99.0)
            optimizer.step(closure)

        @ld.on_before_zero_grad
        def note(self, optimizer: torch.optim.Optimizer) -> None:
            rates.append([float(optimizer.param_groups[0]["lr"])])

    found = lr_find(Warm(lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.1))), ones(), steps=6)
    assert [rate for (rate,) in rates[1:]] == pytest.approx(found.lrs[:-1])


def test_losses_are_those_of_a_hand_written_loop() -> None:
    """The losses are to the bit those of a loop that sets the rate and updates."""
    data, model, twin = batches(), Net(dropout=0.0), Net(dropout=0.0)
    found = lr_find(model, data, min_lr=1e-4, max_lr=1e-1, steps=10)
    optimizer, losses = twin.adam(), []
    for i, lr in enumerate(found.lrs):
        optimizer.param_groups[0]["lr"] = lr
        loss = twin.step(data[i % len(data)])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert found.losses == losses


def test_accumulated_batches_are_one_point() -> None:
    """With accumulation there is one loss per update, the mean over its batches."""
    data = [torch.full((2, 1), float(i)) for i in (1, 3)]
    found = lr_find(Quadratic(), data, min_lr=1e-9, max_lr=2e-9, steps=4, accumulate_grad_batches=2)
    assert found.losses == pytest.approx([24.0] * 4)


@pytest.mark.parametrize(("early_stop", "whole"), [(4.0, False), (None, True)])
def test_divergence_ends_the_search(early_stop: float | None, whole: bool) -> None:
    """A loss that explodes, up to infinity and NaN, ends the search, unless `early_stop` is None."""
    found = lr_find(Quadratic(), ones(), min_lr=3.0, max_lr=1e8, steps=60, early_stop=early_stop)
    assert (len(found.losses) == 60) is whole
    assert math.isfinite(found.losses[-1]) is not whole
    assert len(found.lrs) == len(found.losses)


def test_a_negative_loss_does_not_end_the_search() -> None:
    """A loss below zero that keeps falling is no divergence."""

    class Falling(Quadratic):
        @ld.training_step
        def step(self, batch: Tensor) -> Tensor:
            return self.w.sum()

    assert len(lr_find(Falling(), ones(), min_lr=1e-4, max_lr=1.0, steps=40).losses) == 40


def test_no_descent_gives_no_suggestion() -> None:
    """A constant or rising curve suggests nothing; zigzag after the lowest point is left out."""
    rates = [10.0**i for i in range(-9, 1)]
    assert LRCurve(rates, [1.0] * 10).suggestion is None
    assert LRCurve(rates, [float(i) for i in range(10)]).suggestion is None
    assert LRCurve([], []).suggestion is None
    assert LRCurve([0.1], [1.0]).suggestion is None
    assert repr(LRCurve([], [])) == "<LRCurve: suggestion None (the loss never falls); 0 steps>"
    falls = [3.0, 3.0, 2.9, 2.0, 1.1, 1.0, 1.0, 50.0, 2.0, 60.0, math.nan]
    assert LRCurve([10.0**i for i in range(-10, 1)], falls).suggestion == 1e-7


def test_smoothing_does_not_lag() -> None:
    """A straight line stays as it is, a single spike is taken out, and what is not finite stays so."""
    line = [0.5 * i for i in range(40)]
    assert _smoothed(line) == pytest.approx(line)
    assert max(_smoothed([*[1.0] * 20, 99.0, *[1.0] * 20])) == 1.0
    assert _smoothed([1.0, 1.0, 1.0, math.inf]) == [1.0, 1.0, 1.0, math.inf]


@pytest.mark.parametrize("kind", ["ends", "fails", "interrupted"])
def test_lr_find_leaves_no_trace(kind: str, own_directory: Path) -> None:
    """Model, optimizer, data, callbacks and random state are bit-equal to before, however the search ends."""
    model, data, callback = Stateful(), Data(), Counter()
    errors: dict[str, Any] = {"fails": ValueError, "interrupted": KeyboardInterrupt}

    class Breaks:
        @ld.on_train_batch_end
        def stop(self, batch_idx: int) -> None:
            if kind != "ends" and batch_idx == 3:
                raise errors[kind]

    before = world(model, data, callback)
    if kind == "ends":
        lr_find(model, data, steps=20, callbacks=[callback, Breaks()])
    else:
        with pytest.raises(errors[kind]):
            lr_find(model, data, steps=20, callbacks=[callback, Breaks()])
    assert world(model, data, callback) == before
    assert list(own_directory.iterdir()) == []


def test_settings_without_effect_warn() -> None:
    """What the search decides by itself is not silently ignored when it is given in the call."""
    with pytest.warns(ld.LightdecoWarning, match=r"max_epochs=3 has no effect in ld\.lr_find"):
        lr_find(Quadratic(), ones(), steps=3, max_epochs=3)
    settings = ld.Settings(max_epochs=3, logger="csv", accumulate_grad_batches=2)
    assert len(lr_find(Quadratic(), ones(), steps=3, settings=settings).losses) == 3


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"min_lr": 0}, "min_lr is 0; allowed: a finite number > 0"),
        ({"max_lr": math.inf}, "max_lr is inf"),
        ({"min_lr": 2.0}, "allowed: min_lr < max_lr"),
        ({"steps": 1}, "steps is 1; allowed: an integer of at least 2"),
        ({"mode": "exponentail"}, "did you mean 'exponential'"),
        ({"early_stop": 1}, "early_stop is 1; allowed: a number > 1, None"),
        ({"max_step": 1}, "max_step is no setting; did you mean 'max_steps'"),
    ],
)
def test_wrong_arguments_of_lr_find(wrong: dict[str, Any], message: str) -> None:
    """A wrong argument is named, with what is allowed, before anything runs."""
    with pytest.raises(ld.SettingsError, match=message):
        lr_find(Quadratic(), ones(), **wrong)


def test_lr_find_refuses_what_it_cannot_use() -> None:
    """An iterator would be used up; an optimizer without a rate has none to set; a missing role is named."""
    with pytest.raises(ld.DataError, match="read only once"):
        lr_find(Quadratic(), iter(ones()))

    class Rateless(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            del self.param_groups[0]["lr"]

    model = Quadratic(lambda m: Rateless(m.parameters()))
    before = world(model)
    with pytest.raises(ld.MarkError, match="Rateless has no learning rate"):
        lr_find(model, ones())
    assert world(model) == before
    with pytest.raises(ld.MarkError, match="configure_optimizers"):
        lr_find(ld.attach(nn.Linear(1, 1), training_step=lambda m, batch: m(batch).sum()), ones())
    model = Quadratic(lambda m: "sgd")
    with pytest.raises(ld.MarkError, match=r"Quadratic\.optimizers .*returned str"):
        lr_find(model, ones())


def test_lr_find_works_on_attached_roles() -> None:
    """A model that got its roles from `attach` keeps exactly those."""
    model = nn.Linear(1, 1)
    make = lambda m: torch.optim.SGD(m.parameters(), lr=0.1)  # noqa: E731
    ld.attach(model, training_step=lambda m, batch: m(batch).square().mean(), configure_optimizers=make)
    before = world(model)
    assert len(lr_find(model, ones(), steps=5).losses) == 5
    assert world(model) == before


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    """The figure has a logarithmic axis, points, the smoothed line and the suggestion; a diverged end is cut off."""
    pytest.importorskip("matplotlib")
    found = lr_find(Quadratic(), ones(), min_lr=1e-4, max_lr=1e6, steps=100, early_stop=None)
    ax = found.plot(tmp_path / "lr.png").axes[0]
    assert (tmp_path / "lr.png").read_bytes().startswith(b"\x89PNG")
    lines = {str(line.get_label()): line for line in ax.lines}
    assert list(lines["smoothed"].get_xdata()) == found.lrs
    assert f"suggestion: {found.suggestion:.2g}" in lines
    assert ax.get_xscale() == "log"
    assert ax.get_ylim()[1] < 30
    assert LRCurve([], []).plot().axes


# ---- the batch size --------------------------------------------------------------------------------------------------


class Hungry(Stateful):
    """Runs out of memory above a batch size, in training or in validation only; notes the sizes that it saw."""

    def __init__(self, train: int = 1000, val: int = 1000, error: Any = None) -> None:
        super().__init__()
        self.limits, self.error = (train, val), error or torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to …")

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        SIZES.append(("train", len(batch[0])))
        if len(batch[0]) > self.limits[0]:
            raise self.error
        return super().step(batch)

    @ld.validation_step
    def check(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        SIZES.append(("val", len(batch[0])))
        if len(batch[0]) > self.limits[1]:
            raise self.error
        return super().check(batch)


#: What `Hungry` saw; not on the model, where it would be put back.
SIZES: list[tuple[str, int]] = []


@pytest.fixture(scope="module", autouse=True)
def fast_collection() -> Iterator[None]:
    """Keep the garbage collector, which runs after each trial, from looking at all of torch each time."""
    lr_find(Net(), batches(), steps=2)  # imports what is imported only when it is needed
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def nothing_seen() -> None:
    """Forget the sizes of the test before."""
    SIZES.clear()


def loaders(samples: int = 40, **options: Any) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """DataLoaders for training and validation."""
    options = {"batch_size": 5, "generator": torch.Generator().manual_seed(3)} | options
    return DataLoader(dataset(samples), shuffle=True, **options), DataLoader(dataset(samples // 2), **options)


@pytest.mark.parametrize("where", ["train", "val"])
@pytest.mark.parametrize("data", [Data, loaders])
def test_the_largest_size_that_fits(where: Any, data: Any) -> None:
    """Running out of memory is seen in training, and in validation alone; both modes find their largest size."""
    limit: dict[str, Any] = {where: 11}
    assert find_batch_size(Hungry(**limit), data()) == 8
    assert max(size for _, size in SIZES) >= 16
    assert {stage for stage, _ in SIZES} == {"train", "val"}
    assert find_batch_size(Hungry(**limit), data(), mode="binsearch") == 11


def test_a_trial_is_short() -> None:
    """A trial makes `steps` updates and as many batches of validation at most, also with accumulation."""
    find_batch_size(Hungry(), Data(400), start=4, max_trials=1, steps=2)
    assert SIZES == [("train", 4), ("train", 4), ("val", 4), ("val", 4)]
    SIZES.clear()
    find_batch_size(Hungry(), Data(400), start=4, max_trials=1, steps=2, accumulate_grad_batches=50)
    assert [stage for stage, _ in SIZES] == ["train"] * 4 + ["val"] * 2
    SIZES.clear()
    find_batch_size(Hungry(), Data(40), start=40, max_trials=1, steps=2)
    assert SIZES == [("train", 40), ("val", 40)] * 2


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        torch.cuda.OutOfMemoryError("anything"),
    ],
)
def test_forms_of_running_out_of_memory(error: Exception) -> None:
    """Each form in which torch runs out of memory is known."""
    assert is_out_of_memory(error)
    assert find_batch_size(Hungry(train=3, error=error), loaders()) == 2


def test_other_errors_are_not_memory() -> None:
    """What only looks alike is not taken for running out of memory."""
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(RuntimeError(3))
    assert not is_out_of_memory(RuntimeError())
    assert not is_out_of_memory(ValueError("out of memory"))


def test_a_start_that_does_not_fit_is_halved() -> None:
    """From too large a start the search goes down; "binsearch" then looks between the last two."""
    assert find_batch_size(Hungry(train=11), Data(400), start=64) == 8
    assert find_batch_size(Hungry(train=11), Data(400), start=64, mode="binsearch") == 11
    single = Hungry(train=1)
    single.norm = nn.Identity()  # type: ignore[assignment]  # BatchNorm wants more than one sample
    assert find_batch_size(single, Data(400)) == 1


def test_nothing_fits() -> None:
    """When not even one sample fits, the error says so, with the message of the device."""
    with pytest.raises(ld.LightdecoError, match=r"no batch size fits.*down to 1: 'CUDA out of memory"):
        find_batch_size(Hungry(train=0), Data())
    with pytest.raises(ld.LightdecoError, match=r"of 64:.*larger max_trials"):
        find_batch_size(Hungry(train=0), Data(400), start=64, max_trials=1)


@pytest.mark.parametrize("mode", ["power", "binsearch"])
@pytest.mark.parametrize(("start", "samples"), [(2, 2), (2, 41), (40, 41), (1000, 41)])
def test_the_samples_are_the_bound(mode: Any, start: int, samples: int) -> None:
    """When everything fits, the result is the number of samples."""
    assert find_batch_size(Hungry(), loaders(samples)[0], mode=mode, start=start) == samples
    assert find_batch_size(Hungry(), Data(samples), mode=mode, start=start) == samples


def test_drop_last_leaves_a_batch() -> None:
    """A size above the number of samples is never tried with `drop_last`, which would leave no batch."""
    assert find_batch_size(Hungry(), loaders(40, drop_last=True)) == 40
    assert find_batch_size(Hungry(), Data(40, drop_last=True)) == 32


def test_other_errors_pass_through() -> None:
    """An error of the model that is none of memory reaches the caller as it is, with few frames of ours above it."""
    with pytest.raises(ZeroDivisionError) as caught:
        find_batch_size(Hungry(train=5, error=ZeroDivisionError("mine")), loaders())
    assert str(caught.value) == "mine"
    package = str(Path(ld.__file__).parent)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert sum(frame.filename.startswith(package) for frame in frames) <= 5


@pytest.mark.parametrize("kind", ["ends", "fails", "interrupted"])
@pytest.mark.parametrize("where", ["train", "val"])
@pytest.mark.parametrize("data", [Data, loaders])
def test_find_batch_size_leaves_no_trace(kind: str, where: Any, data: Any, own_directory: Path) -> None:
    """Model, data, loaders, callbacks and random state are bit-equal to before, wherever and however the search ends.

    The model keeps counters, generators, and an optimizer with a scheduler.
    """
    errors: dict[str, Any] = {"ends": None, "fails": ValueError("mine"), "interrupted": KeyboardInterrupt()}
    model, given, callback = Hungry(**{where: 9}, error=errors[kind]), data(), Counter()
    before = world(model, given, callback)
    if kind == "ends":
        assert find_batch_size(model, given, mode="binsearch", callbacks=callback) == 9
    else:
        with pytest.raises((ValueError, KeyboardInterrupt)):
            find_batch_size(model, given, mode="binsearch", callbacks=callback)
    assert world(model, given, callback) == before
    assert list(own_directory.iterdir()) == []


def test_a_trial_begins_from_the_same_weights() -> None:
    """What one trial did to the model is undone before the next."""
    seen: list[float] = []

    class Watched(Hungry):
        @ld.on_train_start
        def look(self) -> None:
            seen.append(float(self.seen) + sum(float(p.detach().sum()) for p in self.parameters()))

    find_batch_size(Watched(train=9), loaders())
    assert len(seen) == 4
    assert len(set(seen)) == 1


def test_the_loaders_are_made_alike() -> None:
    """A rebuilt DataLoader keeps dataset, sampler, collate_fn and options; a list, dict or CombinedLoader its form."""
    collated: list[int] = []

    def collate(samples: list[Any]) -> Any:
        collated.append(len(samples))
        return torch.utils.data.default_collate(samples)

    sampler = RandomSampler(dataset(30), num_samples=12)
    train = DataLoader(dataset(30), 5, sampler=sampler, collate_fn=collate, drop_last=True)
    val = loaders()[1]
    assert find_batch_size(Hungry(), {"train": train, "val": {"a": val, "b": val}, "test": [1]}) == 12
    assert max(collated) == 12
    assert train.batch_size == 5
    both = ld.CombinedLoader([loaders(20)[0], loaders(10)[0]], mode="sequential")
    assert find_batch_size(Hungry(train=16), (both, [val, val])) == 16


class Stream(IterableDataset[Any]):
    """Samples without a length."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __iter__(self) -> Any:
        return iter(list(dataset(self.samples)))


def test_streams_end_at_their_last_sample() -> None:
    """An iterable dataset has no length: the first batch that is not full ends the search."""
    assert find_batch_size(Hungry(), DataLoader(Stream(20), batch_size=4)) == 20
    assert find_batch_size(Hungry(train=9), DataLoader(Stream(20), batch_size=4)) == 8


def test_the_attribute_may_have_another_name_or_be_the_models() -> None:
    """`attribute` names what the loaders read, on the data object or on a model that brings its own data."""

    class Own(Hungry):
        per_step = 7

        @ld.train_dataloader
        def train_data(self) -> DataLoader[Any]:
            return DataLoader(dataset(), self.per_step)

    model = Own(train=20)
    assert find_batch_size(model, attribute="per_step") == 16
    assert model.per_step == 7
    assert "per_step" not in vars(model)


def test_validation_may_be_missing_or_off() -> None:
    """Without validation, or with it switched off, training alone decides."""
    assert find_batch_size(Hungry(train=20, val=1), loaders()[0]) == 16
    assert find_batch_size(Hungry(train=20, val=1), Data(), limit_val_batches=0) == 16


class Fixed:
    """A data object whose batch size cannot be written."""

    @property
    def batch_size(self) -> int:
        return 3

    @ld.train_dataloader
    def train(self) -> DataLoader[Any]:
        return DataLoader(dataset(), self.batch_size)


def sub() -> DataLoader[Any]:
    """A DataLoader of another class."""
    return type("Own", (DataLoader,), {})(dataset(), 4)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("make", "more", "message"),
    [
        (lambda: batches(), {}, "the batch size of the train loader, a list, cannot be changed; give a plain"),
        (sub, {}, "the train loader, a Own, cannot be changed"),
        (lambda: DataLoader(dataset(), None), {}, "it has a batch_sampler of its own, or none"),
        (lambda: DataLoader(dataset(), batch_sampler=BatchSampler(range(8), 2, False)), {}, "batch_sampler of its own"),
        (lambda: (loaders()[0], batches()), {}, "the val loader, a list"),
        (Fixed, {}, r"Fixed\.batch_size cannot be set"),
        (Data, {"attribute": "batchsize"}, "did you mean 'batch_size'"),
        (lambda: Data(reads=False), {}, r"Data\.batch_size was 2 and then 4, .* had 5 samples both times"),
        (lambda: None, {}, "Hungry has no attribute 'batch_size'"),
    ],
)
def test_data_whose_size_cannot_be_changed(make: Any, more: dict[str, Any], message: str) -> None:
    """What cannot be had in another batch size is refused, with what to do."""
    with pytest.raises(ld.DataError, match=message):
        find_batch_size(Hungry(), make(), **more)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"mode": "powr"}, "did you mean 'power'"),
        ({"start": 0}, "start is 0; allowed: an integer of at least 1"),
        ({"steps": True}, "steps is True"),
        ({"max_trials": 2.5}, r"max_trials is 2\.5"),
    ],
)
def test_wrong_arguments_of_find_batch_size(wrong: dict[str, Any], message: str) -> None:
    """A wrong argument is named, with what is allowed, before anything runs."""
    with pytest.raises(ld.SettingsError, match=message):
        find_batch_size(Hungry(), loaders(), **wrong)
    assert SIZES == []


# ---- several processes -----------------------------------------------------------------------------------------------


def test_searches_run_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning says so where several were asked for; in a process of a launcher the searches are refused."""
    with pytest.warns(ld.LightdecoWarning, match=r"devices=2 has no effect in ld\.lr_find"):
        assert len(ld.lr_find(Net(), batches(), steps=4, devices=2, accelerator="cpu").losses) == 4
    variables = {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ld.LaunchError, match=r"ld\.lr_find searches in one process, and a launcher started several"):
        ld.lr_find(Net(), batches(), steps=4)
    with pytest.raises(ld.LaunchError, match=r"ld\.find_batch_size searches in one process"):
        ld.find_batch_size(Net(), DataLoader(TensorDataset(torch.randn(4, 4)), batch_size=2))
