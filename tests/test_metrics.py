"""Metrics: exact weighted means that are read once, whatever is logged and however often."""

import math
import weakref
from collections.abc import Callable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import lightdeco as ld
from lightdeco import metrics
from lightdeco.group import Group
from lightdeco.metrics import Means

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
CPU = torch.device("cpu")
NUMBERS = st.lists(st.tuples(st.floats(-1e6, 1e6), st.integers(1, 500)), min_size=1, max_size=200)


def means(values: Any, reduce: str = "mean", weights: Any = None) -> dict[str, float]:
    """The epoch's record after logging the values under "x"."""
    held = Means(CPU)
    for i, value in enumerate(values):
        held.add("x", value, 1 if weights is None else weights[i], reduce, on_step=False)
    return held.epoch()


@pytest.fixture(scope="module", params=["read at once", "buffered"], autouse=True)
def _way(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test runs as on the CPU, and with the CPU taken for a device that must be waited for, as a GPU is."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "buffered":
            patch.setattr(metrics, "waits", lambda device: True)
        yield


# ---- numbers ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(NUMBERS)
def test_a_mean_is_that_of_all_samples(pairs: list[tuple[float, int]]) -> None:
    """Equal to math.fsum to double precision, also for more values than the buffer holds."""
    expected = math.fsum(v * w for v, w in pairs) / sum(w for _, w in pairs)
    scale = max(abs(v) for v, _ in pairs) or 1.0
    found = means([v for v, _ in pairs], weights=[w for _, w in pairs])["x"]
    assert abs(found - expected) <= 1e-13 * scale


@pytest.mark.parametrize(
    ("reduce", "exact"), [("sum", sum), ("min", min), ("max", max), ("last", lambda values: values[-1])]
)
@pytest.mark.parametrize("count", [1, 63, 64, 65, 128, 129, 1000])
def test_every_reduction_across_any_number_of_folds(reduce: str, exact: Callable[..., float], count: int) -> None:
    """Sums and extremes ignore the weight of a batch."""
    values = [float((i * 7919) % 1009 - 500) for i in range(count)]
    assert means(values, reduce, weights=[5] * count) == {"x": exact(values)}


def test_tensors_of_any_kind_are_values() -> None:
    """Dtype, shape with one element, gradient; NumPy's and Python's numbers, booleans."""
    for value in (
        torch.tensor(2),
        torch.tensor([[2.0]]),
        torch.tensor(2.0, dtype=torch.bfloat16),
        torch.tensor(2.0, requires_grad=True) * 1,
        numpy.float32(2),
        numpy.int64(2),
        Fraction(2),
        2,
    ):
        assert means([value]) == {"x": 2.0}
    assert means([True, torch.tensor(False)]) == {"x": 0.5}
    assert means([16777217.0, 16777217]) == {"x": 16777217.0}  # more than float32 holds


def test_weights_may_be_tensors_and_are_copied() -> None:
    """Mixed with numbers; changed in place afterwards, as values may be."""
    value, weight, held = torch.tensor(1.0), torch.tensor([3]), Means(CPU)
    held.add("x", value, weight)
    value.fill_(5.0)
    weight.fill_(100)
    held.add("x", value, 1)
    value.fill_(math.nan)
    assert held.window() == {"x": 2.0}


def test_nothing_of_the_graph_is_kept() -> None:
    """A logged loss with its graph does not keep activations alive."""

    class Buffer(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.held = Held()
            seen.append(weakref.ref(ctx.held))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    class Held: ...

    seen: list[Any] = []
    held = Means(CPU)
    loss = Buffer.apply(torch.ones(1, requires_grad=True)).sum()
    held.add("x", loss, loss * 2)
    del loss
    assert seen[0]() is None
    assert held.window() == {"x": 1.0}


def test_window_and_epoch_are_taken_apart() -> None:
    """A record by step begins anew; the epoch's mean is over all of it."""
    held = Means(CPU)
    windows = []
    for i in range(130):
        held.add("x", float(i), 1)
        held.add("y", float(i), 1, on_epoch=False)
        if i % 50 == 49:
            windows.append(held.window())
    assert windows == [{"x": 24.5, "y": 24.5}, {"x": 74.5, "y": 74.5}]
    assert held.epoch("_epoch") == {"x_epoch": 64.5}
    assert held.window() == {"x": 114.5, "y": 114.5}
    assert held.window() == held.epoch() == {}


def test_the_first_bad_value_is_found_across_folds_and_windows() -> None:
    """Counted from the last question, whatever was recorded in between."""
    for bad in (0, 63, 64, 127, 128, 199):
        held = Means(CPU, watch="x")
        for i in range(200):
            held.add("x", [1.0, math.nan, math.inf, -math.inf][(i >= bad) * (1 + i % 3)], 1)
            if i == 100:
                held.window()
        assert held.first_bad() == bad
        assert held.first_bad() is None
        held.add("x", 1.0, 1)
        held.add("x", math.nan, 1)
        assert held.first_bad() == 1
    assert Means(CPU, watch="never logged").first_bad() is None


def test_logging_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No value is read on the host before a record is made; a record reads all of them at once."""
    monkeypatch.setattr(metrics, "waits", lambda device: True)
    held, reads = Means(CPU), []

    def read(tensor: Tensor, *given: Any) -> Any:
        reads.append(tensor.shape)
        return original(tensor)

    original = Tensor.tolist
    for name in ("item", "tolist", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(Tensor, name, read)
    monkeypatch.setattr(metrics, "_item", read)
    for i in range(200):
        value = torch.ones(()) * i
        for name in ("a", "b", "c"):
            held.add(name, value, value if name == "c" else 4, "max" if name == "b" else "mean")
    assert reads == []
    found = held.window()
    assert len(reads) == 2  # the values, and the weights that are tensors
    monkeypatch.undo()
    assert found == {"a": 99.5, "b": 199.0, "c": pytest.approx((199 * 399 / 6) / 99.5 * 1)}


def test_weights_of_low_precision_are_summed_in_double() -> None:
    """A count in bfloat16 is exact, their sum would not be; of different shapes, and mixed with numbers."""
    weights = [torch.tensor(7, dtype=torch.bfloat16), torch.tensor([7.0], dtype=torch.float16), torch.tensor([[7]]), 7]
    for some in (weights, weights[:1]):
        assert means([2.0] * 401, weights=some * 401) == {"x": 2.0}


def test_a_nan_stays_in_every_reduction_whenever_it_is_read() -> None:
    """Also when values before and after it were read apart."""
    for reduce in ("mean", "sum", "min", "max"):
        for values in ([math.nan, 1.0, 2.0], [1.0, math.nan, 2.0], [1.0, 2.0, math.nan]):
            held = Means(CPU)
            for value in values:
                held.add("x", value, 1, reduce)
                held.window()
            assert math.isnan(held.epoch("")["x"]), (reduce, values)


def test_when_values_are_read_changes_no_bit() -> None:
    """The epoch's mean is the same to the last bit, whatever was recorded or saved in between."""
    values = [0.1 * i + 1e-9 * i * i for i in range(300)]
    seldom, often = Means(CPU), Means(CPU)
    for i, value in enumerate(values):
        seldom.add("x", value, 3 + i % 2)
        often.add("x", value, 3 + i % 2)
        if i % 7 == 0:
            often.first_bad()
    assert seldom.epoch() == often.epoch()
    assert seldom.window() == often.window()


class Told(Group):
    """Processes that spoke one after the other; the last one, of another `size`, only listens."""

    def __init__(self, told: list[Any], size: int = 1) -> None:
        super().__init__(size=size)
        self.told = told

    def gather(self, thing: Any) -> list[Any]:
        if self.size > 1:
            return self.told
        self.told.append(thing)
        return [thing]


@pytest.mark.parametrize("size", [2, 3])
def test_means_of_several_processes_are_those_of_all_samples(size: int) -> None:
    """Whatever the number of samples of each; names that only some have do not mix with others."""
    values = [0.1 * i for i in range(21)]
    alone = Means(CPU)
    for value in values:
        alone.add("x", value, 1)
        alone.add("most", value, 1, "max")
    told: list[Any] = []
    for rank in range(size):
        part = Means(CPU, group=Told(told))
        for value in values[rank::size]:
            part.add("x", value, 1)
            part.add("most", value, 1, "max")
        if rank == 1:
            part.add("only here", 5.0, 2)
        part.epoch()
    merged = Means(CPU, group=Told(told, size)).epoch()
    assert merged == {**alone.epoch(), "only here": 5.0} | {"x": pytest.approx(1.0, abs=1e-12)}


@pytest.mark.gpu
def test_logging_does_not_wait_for_a_device() -> None:
    """Torch raises at every synchronisation; values and weights from both sides, across folds."""
    device = torch.device("cuda")
    held, there = Means(device), torch.ones((), device=device)
    held.add("warm", there, there)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for i in range(200):
            held.add("a", there, 4 + i % 2)
            held.add("b", torch.ones(()), there)
            held.add("c", 1.0, torch.ones(()), "max")
            held.add("d", there, (there, 3)[i % 2], "last")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert held.window() == dict.fromkeys(("warm", "a", "b", "c", "d"), 1.0)


def test_a_series_begun_in_inference_mode_goes_on_outside_of_it() -> None:
    """A step may compute some of its metrics under `torch.inference_mode()`."""
    held = Means(CPU)
    with torch.inference_mode():
        held.add("x", torch.ones(()), torch.ones(()))
    held.add("x", torch.ones(()) * 3, 1)
    for _ in range(100):
        held.add("x", 2.0, 1)
    assert held.epoch() == {"x": 2.0}


@pytest.mark.parametrize(
    ("value", "reduce", "said"),
    [
        (torch.ones(2), "mean", r"got a tensor of shape \(2,\); allowed: a number"),
        (torch.ones(1, dtype=torch.complex64), "mean", "got a tensor of shape"),
        ("0.5", "mean", "got a str"),
        (None, "mean", "got a NoneType"),
        (Decimal(1), "mean", "got a Decimal"),
        (1.0, "men", r"reduce='men'\); allowed: \('mean', 'sum', 'min', 'max', 'last'\); did you mean 'mean'\?"),
        (1.0, 3, r"reduce=3\)"),
    ],
)
def test_what_is_no_scalar_is_refused_by_name(value: Any, reduce: Any, said: str) -> None:
    """At the first value and at later ones."""
    held = Means(CPU)
    for _ in range(2):
        with pytest.raises(ld.StepError, match=rf"ld\.log\('x'.*{said}"):
            held.add("x", value, 1, reduce)
        held.add("x", 1.0, 1)


def test_one_name_is_reduced_in_one_way() -> None:
    """A second way for the same name would be ignored without a word."""
    held = Means(CPU)
    held.add("x", 1.0, 1, "sum")
    with pytest.raises(ld.StepError, match=r"ld\.log\('x', reduce='max'\).* reduce='sum'"):
        held.add("x", 1.0, 1, "max")


# ---- in a run --------------------------------------------------------------------------------------------------------


class Net(nn.Linear):
    """A classifier that logs torchmetrics objects and counts what is done with them."""

    def __init__(self) -> None:
        super().__init__(2, 3)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="micro")
        self.returned = torchmetrics.MeanMetric()
        self.done: list[str] = []
        for name in ("compute", "reset"):
            original = getattr(self.accuracy, name)
            setattr(self.accuracy, name, lambda o=original, n=name: (self.done.append(n), o())[1])

    @ld.training_step
    @ld.validation_step
    def step(self, batch: tuple[Tensor, Tensor]) -> dict[str, Any]:
        x, y = batch
        logits = self(x)
        self.accuracy.update(logits, y)
        self.returned.update(y)
        ld.log("acc" if self.training else "val_acc", self.accuracy)
        return {"loss": nn.functional.cross_entropy(logits, y), "y": self.returned}

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    return [(torch.randn(n, 2), torch.randint(0, 3, (n,))) for n in sizes]


def test_torchmetrics_are_computed_and_reset_once_per_epoch() -> None:
    """Logged or returned by a step; the value is that of all samples, and the next epoch begins anew."""
    net, data = Net(), batches(5, 3, 1)
    run = ld.fit(net, data, **QUIET | {"max_epochs": 2})
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    records = [record for record in run.history if "acc" in record]
    assert net.done == ["compute", "reset"] * 2
    assert [r["epoch"] for r in records] == [0, 1]
    for record in records:
        assert record["acc"] == pytest.approx((net(x).argmax(1) == y).float().mean().item())
        assert record["train/y"] == pytest.approx(y.float().mean().item())


def test_the_sanity_check_leaves_torchmetrics_empty() -> None:
    """The first validation counts its own samples alone."""
    net, data = Net(), batches(4, 4)
    run = ld.fit(net, ([data[0]], data), **QUIET, num_sanity_val_steps=1)
    assert run.metrics["val/y"] == pytest.approx(torch.cat([y for _, y in data]).float().mean().item())


def test_a_torchmetrics_object_without_a_single_value_is_refused_by_name() -> None:
    """A value per class, or a collection, cannot be one number of a record."""

    class PerClass(Net):
        def __init__(self) -> None:
            super().__init__()
            self.accuracy = torchmetrics.classification.MulticlassAccuracy(3, average="none")

    with pytest.raises(ld.StepError, match=r"'acc'.*MulticlassAccuracy.*shape \(3,\)"):
        ld.fit(PerClass(), batches(4), **QUIET)


def test_the_epochs_mean_of_unequal_batches_is_that_of_the_whole_set() -> None:
    """256, 256 and 10 samples: each sample counts once, in training and in validation."""
    net, data = Net(), batches(256, 256, 10)
    run = ld.fit(net, (data, data), **QUIET)
    x, y = (torch.cat(parts) for parts in zip(*data, strict=True))
    expected = nn.functional.cross_entropy(net(x), y).item()
    assert run.metrics["val/loss"] == pytest.approx(expected, abs=1e-6)
    assert run.metrics["train/loss"] == pytest.approx(expected, abs=1e-6)
