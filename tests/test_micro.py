"""`oom="micro"`: a step that runs out of memory is made in parts, with the gradients of the whole batch."""

import re
import subprocess
import sys
import textwrap
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

import lightdeco as ld
from lightdeco import seeds
from lightdeco.data import cut_batch
from lightdeco.micro import _even
from tests.models import QUIET, batches, equal, weights

SEED = 3
CPU = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"
ERRORS: list[Callable[[], RuntimeError]] = [
    lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    lambda: RuntimeError(CPU),
    lambda: RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear"),
]


class Boom(torch.autograd.Function):
    """The identity, whose backward runs out of memory."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, error: Any) -> Any:
        ctx.error = error
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise ctx.error()


class Net(nn.Module):
    """A step for which more than `most` samples are too many, in its forward or in its backward."""

    def __init__(self, most: int = 100, late: bool = False, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(4, 8)
        self.norm: nn.Module = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.drop, self.last = nn.Dropout(dropout), nn.Linear(8, 3)
        self.most, self.late, self.error = most, late, ERRORS[0]
        self.seen: list[int] = []
        self.double()

    def logits(self, x: Tensor) -> Tensor:
        self.seen.append(len(x))
        hidden = self.drop(torch.tanh(self.norm(self.first(x.double()))))
        if len(x) > self.most:
            if not self.late:
                raise self.error()
            hidden = Boom.apply(hidden, self.error)
        return self.last(hidden)

    @ld.training_step
    def step(self, batch: Any) -> Any:
        x, y = batch
        logits = self.logits(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).double().mean()}

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(model: nn.Module, data: Any = None, **settings: Any) -> ld.Run:
    data = batches(4, size=8) if data is None else data
    return ld.fit(
        model, data, **(QUIET | {"max_epochs": 2, "seed": SEED, "oom": "micro", "checkpoint": False} | settings)
    )


def close(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.allclose(x, y, rtol=1e-10, atol=1e-12) for x, y in zip(weights(a), weights(b), strict=True))


# ---- the same gradients ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("most", "error"), [(1, ERRORS[1]), (2, ERRORS[2]), (3, ERRORS[0]), (5, ERRORS[1])])
def test_weights_and_metrics_are_those_of_the_whole_batch(late: bool, most: int, error: Any) -> None:
    """Wherever memory runs out, and however small the parts: weights, steps and means, to float tolerance."""
    whole, cut = Net(), Net(most, late)
    cut.error = error
    expected = fit(whole, oom="raise")
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory with 8 samples, at batch 0 of epoch 0"):
        run = fit(cut)
    assert close(whole, cut)
    assert run.global_step == expected.global_step == 8
    assert run.metrics == pytest.approx(expected.metrics, rel=1e-9)
    limit = {1: 1, 2: 2, 3: 2, 5: 4}[most]
    assert run.progress.part_sizes == {"": limit}
    assert cut.seen[-8 // limit :] == [limit] * (8 // limit)


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"on_nan": "skip"}], ids=str)
def test_without_an_error_nothing_changes(settings: Any) -> None:
    """Where memory suffices, a run without accumulation is bit for bit that of oom='raise'."""
    one, other = Net(dropout=0.5, norm=True), Net(dropout=0.5, norm=True)
    fit(one, oom="raise", **settings)
    run = fit(other, **settings)
    assert equal(weights(one), weights(other))
    assert run.progress.part_sizes == {}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_earlier_gradients_of_a_window_are_neither_lost_nor_doubled(late: bool, at: int) -> None:
    """Memory runs out at any batch of a window of unequal batches: its update is that of all of them at once."""
    sizes = [2, 3, 2]
    sizes[at] = 6
    x, y = torch.randn(sum(sizes), 4), torch.randint(3, (sum(sizes),))
    data = list(zip(x.split(sizes), y.split(sizes), strict=True))
    whole, cut = Net(), Net(4, late)
    fit(whole, [(x, y)], oom="raise", max_epochs=1)
    with pytest.warns(ld.LightdecoWarning, match=f"with 6 samples, at batch {at} "):
        run = fit(cut, data, accumulate_grad_batches=3, max_epochs=1)
    assert close(whole, cut)
    assert run.global_step == 1


@pytest.mark.parametrize("tensor", [False, True])
def test_a_weight_of_the_step_decides(tensor: bool) -> None:
    """Parts count with the "weight" that the step returns, as the batches of a window do."""

    class Tokens(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y = batch
            counted = (y > 0).sum()
            loss = F.cross_entropy(self.logits(x), y, ignore_index=0)
            return {"loss": loss, "weight": counted if tensor else int(counted)}

    whole, cut = Tokens(), Tokens(4)
    expected = fit(whole, oom="raise")
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        run = fit(cut)
    assert close(whole, cut)
    assert run.metrics["train/loss"] == pytest.approx(expected.metrics["train/loss"])


def test_what_a_try_moved_is_put_back() -> None:
    """BatchNorm, torchmetrics, logged values and random numbers of the failed try leave no trace."""

    class Counting(Net):
        def __init__(self, most: int) -> None:
            super().__init__(most, late=True, dropout=0.5, norm=True)
            self.accuracy = torchmetrics.MeanMetric()
            self.values = torchmetrics.CatMetric()

        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y = batch
            logits = self.logits(x)
            self.accuracy.update(y.double())
            self.values.update(y.double())
            ld.log("samples", float(len(x)), reduce="sum")
            return F.cross_entropy(logits, y)

        @ld.on_train_epoch_end
        def look(self, run: ld.Run) -> None:
            self.sums = float(self.accuracy.compute()), self.values.compute().tolist(), run.metrics["samples"]

    def by_hand(model: Counting) -> None:
        optimizer = model.sgd()
        for k, (x, y) in enumerate(batches(4, size=8)):
            optimizer.zero_grad()
            torch.manual_seed(seeds.step_seed(SEED, 0, k))
            for part in (slice(0, 4), slice(4, 8)):
                (4 * F.cross_entropy(model.logits(x[part]), y[part])).backward()
            for p in model.parameters():
                assert p.grad is not None
                p.grad.div_(8)
            optimizer.step()

    cut, hand = Counting(4), Counting(100)
    with pytest.warns(ld.LightdecoWarning, match="but that BatchNorm sees each part alone"):
        fit(cut, max_epochs=1)
    by_hand(hand)
    labels = torch.cat([y for _, y in batches(4, size=8)]).double()
    assert close(cut, hand)
    assert cut.sums == (pytest.approx(float(labels.mean())), labels.tolist(), 32.0)


def test_every_value_of_the_result_is_that_of_the_batch() -> None:
    """Scalars are means, tensors and lists are joined, what is equal for all is kept; weights are sums."""

    class Telling(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y = batch
            logits = self.logits(x)
            found = {
                "logits": logits,
                "names": [str(int(i)) for i in y],
                "kind": "a",
                "none": None,
                "pair": (1, len(x)),
            }
            loss = F.cross_entropy(logits, y)
            return found | {"loss": loss, "weight": len(x), "batch_size": len(x), "mean": x.mean(), "flag": True}

        @ld.on_train_batch_end
        def keep(self, outputs: Any) -> None:
            self.outputs = outputs

    x, y = torch.randn(7, 4), torch.arange(7) % 3
    model = Telling(4)
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        fit(model, [(x, y)], max_epochs=1)
    found = model.outputs
    assert found["logits"].shape == (7, 3)
    assert not found["logits"].requires_grad
    assert found["names"] == [str(int(i)) for i in y]
    assert (found["kind"], found["none"], found["flag"]) == ("a", None, True)
    assert found["pair"] == [(1, 4), (1, 3)]
    assert found["weight"] == found["batch_size"] == 7
    assert float(found["mean"]) == pytest.approx(float(x.mean()), abs=1e-6)


# ---- with the rest of the library ------------------------------------------------------------------------------------


def test_several_optimizers_each_have_a_size_of_their_own() -> None:
    """Only the step that ran out of memory is cut, and only its optimizer's parameters get gradients."""

    class Two(Net):
        step = None

        @ld.training_step(optimizer="a")
        def step_a(self, batch: Any) -> Any:
            return F.cross_entropy(self.logits(batch[0]), batch[1])

        @ld.training_step(optimizer="b")
        def step_b(self, batch: Any) -> Any:
            return self.last(torch.tanh(self.first(batch[0].double()))).square().mean()

        @ld.configure_optimizers
        def sgd(self) -> Any:
            return {"a": torch.optim.SGD(self.first.parameters(), 0.1), "b": torch.optim.Adam(self.last.parameters())}

    whole, cut = Two(), Two(4, late=True)
    fit(whole, oom="raise", accumulate_grad_batches=2)
    with pytest.warns(ld.LightdecoWarning, match="training step of 'a' ran out of memory"):
        run = fit(cut, accumulate_grad_batches=2)
    assert close(whole, cut)
    assert run.progress.part_sizes == {"a": 4}


def test_a_closure_evaluates_in_parts_too() -> None:
    """LBFGS calls the step again and again: each time in parts."""

    class Newton(Net):
        @ld.configure_optimizers
        def sgd(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

    whole, cut = Newton(), Newton(4)
    fit(whole, oom="raise", max_epochs=1)
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        fit(cut, max_epochs=1)
    assert all(torch.allclose(a, b, rtol=1e-6) for a, b in zip(weights(whole), weights(cut), strict=True))
    assert len(cut.seen) > 2 * 4


def test_overrides_and_hooks_meet_each_gradient_once() -> None:
    """A `backward` override sees gradients after `loss.backward()`; a hook on a parameter is called per part."""

    class Own(Net):
        def __init__(self, most: int = 100) -> None:
            super().__init__(most)
            self.last.bias.register_hook(lambda grad: grad * 2)
            self.norms: list[float] = []

        @ld.backward
        def own(self, loss: Tensor) -> None:
            loss.backward()
            assert self.first.weight.grad is not None
            self.first.weight.grad.mul_(0.5)

        @ld.on_after_backward
        def look(self) -> None:
            self.norms.append(float(sum(p.grad.norm() for p in self.parameters() if p.grad is not None)))

    whole, cut = Own(), Own(4)
    fit(whole, oom="raise")
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        fit(cut)
    assert close(whole, cut)
    assert whole.norms == pytest.approx(cut.norms)


def test_embeddings_with_sparse_gradients() -> None:
    """Sparse gradients are added and divided like others."""

    class Words(nn.Module):
        def __init__(self, most: int = 100) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.most = nn.Embedding(5, 3, sparse=True), most

        @ld.training_step
        def step(self, batch: Tensor) -> Tensor:
            if len(batch) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return self.table(batch).square().sum(1).mean()

        @ld.configure_optimizers
        def sgd(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = [torch.tensor([0, 1, 1, 4, 2]), torch.tensor([3, 3])]
    for n in (1, 2):
        whole, cut = Words(), Words(2)
        fit(whole, data, oom="raise", accumulate_grad_batches=n)
        with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
            fit(cut, data, accumulate_grad_batches=n)
        assert torch.allclose(whole.table.weight, cut.table.weight)


def test_bf16_mixed_and_compile(recwarn: pytest.WarningsRecorder) -> None:
    """Parts run under autocast, and a compiled forward takes them."""

    class Called(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x)))

        @ld.training_step
        def step(self, batch: Any) -> Any:
            logits = self(batch[0])
            self.kind = logits.dtype
            if len(logits) > self.most:
                raise self.error()
            return F.cross_entropy(logits, batch[1])

    model = Called(4).float()
    run = fit(model, precision="bf16-mixed", compile={"backend": "eager"})
    assert run.progress.part_sizes == {"": 4}
    assert model.kind == torch.bfloat16


@pytest.mark.parametrize("cut_at", [4, 2])
def test_a_resumed_run_is_cut_from_its_first_batch(tmp_path: Path, cut_at: int) -> None:
    """The size of the parts decides dropout's masks: it is part of what a checkpoint holds, so that nothing changes."""

    def run(model: Net, name: str, **settings: Any) -> ld.Run:
        given = {"root_dir": tmp_path, "name": name, "max_epochs": 4, "checkpoint": True, **settings}
        return fit(model, batches(4, size=8), **given)

    whole, first = Net(cut_at, dropout=0.5), Net(cut_at, dropout=0.5)
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        run(whole, "whole")
    with pytest.warns(ld.LightdecoWarning, match="ran out of memory"):
        run(first, "parts", max_steps=6, max_epochs=None)
    again = Net(100, dropout=0.5)  # memory is there now: the run goes on as it was nevertheless
    resumed = run(again, "parts", resume="last")
    assert resumed.progress.part_sizes == {"": cut_at}
    assert set(again.seen) == {cut_at}
    assert equal(weights(whole), weights(again))


# ---- what cannot be cut ----------------------------------------------------------------------------------------------


@dataclass
class Thing:
    x: Tensor


class Opaque:
    pass


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ((torch.zeros(1, 4), torch.zeros(1, dtype=torch.long)), "the batch has one sample"),
        ("text", "holds no tensor"),
        ((torch.zeros(6, 4), torch.zeros(2, 6)), r"shape \(2, 6\), another begins with 6 samples"),
        ({"x": torch.zeros(6, 4), "graph": Opaque()}, "how to cut a Opaque; use lists, tuples"),
    ],
)
def test_a_batch_that_cannot_be_cut_raises_the_error_with_a_note(batch: Any, said: str) -> None:
    """The model's own error, and why nothing was done about it."""

    class Failing(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            raise self.error()

    assert re.search(said, note_of(Failing(), [batch]))


def note_of(model: nn.Module, data: Any, **settings: Any) -> str:
    """The note on the error that ends a run; on Python 3.10 it is a warning."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as raised:
            fit(model, data, **settings)
    (note,) = getattr(raised.value, "__notes__", None) or [str(each.message) for each in caught]
    assert note.startswith("oom='micro' cannot make this step in smaller parts: ")
    return str(note)


def test_one_sample_that_is_too_much_ends_the_run() -> None:
    """The batch is cut down to single samples, and then the error is the model's own."""
    model = Net(0)
    assert "a part of the batch has one sample" in note_of(model, batches(1, size=8))
    assert model.seen == [8, 4, 2, 1]


def test_manual_steps_and_split_batch_say_so_at_the_beginning_and_on_the_error() -> None:
    """Neither can be cut: the setting has no effect, which is said."""

    class Manual(Net):
        @ld.training_step(manual=True)
        def step(self, batch: Any) -> None:
            ld.optimizers().zero_grad()
            ld.backward(F.cross_entropy(self.logits(batch[0]), batch[1]))
            ld.optimizers().step()

    class Split(Net):
        @ld.split_batch
        def split(self, batch: Any) -> Any:
            return [batch]

    for model, said in ((Manual, "the manual step Manual.step"), (Split, "marked @split_batch, hands a carry on")):
        for late in (False, True):
            with pytest.warns(ld.LightdecoWarning, match=f"oom='micro' has no effect: .*{said}"):
                fit(model(), max_epochs=1)
            with pytest.raises(torch.OutOfMemoryError) as caught, pytest.warns(ld.LightdecoWarning, match="no effect"):
                fit(model(4, late))
            if sys.version_info >= (3, 11):
                assert said in caught.value.__notes__[0]


def test_other_errors_reach_the_caller_as_they_are() -> None:
    """A wrong shape is no lack of memory; at most one frame more of lightdeco lies above the step."""

    class Wrong(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            return self.last(batch[0])

    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        fit(Wrong())
    ours = [f for f in traceback.extract_tb(caught.value.__traceback__) if "/lightdeco/" in f.filename]
    assert len(ours) <= 5
    assert not hasattr(caught.value, "__notes__")


def test_backward_twice_is_refused() -> None:
    """The gradients are handed over once."""

    class Twice(Net):
        @ld.backward
        def own(self, loss: Tensor) -> None:
            loss.backward(retain_graph=True)
            loss.backward()

    with pytest.raises(ld.StepError, match="called a second time"):
        fit(Twice())


# ---- how a batch is cut ----------------------------------------------------------------------------------------------


def test_cutting() -> None:
    """Structures of every kind keep their form; what has no samples belongs to each part."""
    batch = {
        "pair": (torch.arange(3), numpy.arange(6).reshape(3, 2)),
        "names": ["a", "b", "c"],
        "scale": torch.tensor(2.0),
        "thing": Thing(torch.arange(3)),
        "options": [1, 2],
        "task": "x",
    }
    first, second = cut_batch(batch, [2, 1])
    assert first["pair"][0].tolist() == [0, 1]
    assert second["pair"][1].tolist() == [[4, 5]]
    assert (first["names"], second["names"]) == (["a", "b"], ["c"])
    assert first["scale"] is batch["scale"]
    assert second["thing"].x.tolist() == [2]
    assert (first["options"], first["task"]) == ([1, 2], "x")
    with pytest.raises(ld.DataError, match="cut a Opaque"):
        cut_batch([torch.zeros(2), Opaque()], [1, 1])
    with pytest.raises(ld.DataError, match="another begins with 2 samples"):
        cut_batch([torch.zeros(2), torch.zeros(3)], [1, 1])
    assert _even(8, 3) == [3, 3, 2]


# ---- real memory -----------------------------------------------------------------------------------------------------


def test_memory_that_really_runs_out(tmp_path: Path) -> None:
    """In a process that may have little memory, torch's CPU allocator fails, and the run goes on in parts."""
    pytest.importorskip("resource")
    script = """
        import resource, sys, warnings
        import torch
        import lightdeco as ld

        class Net(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.scale = torch.nn.Parameter(torch.ones(2**20))

            @ld.training_step
            def step(self, batch):  # 32 MiB for 8 samples, several times
                return (batch * self.scale).tanh().exp().square().mean()

            @ld.configure_optimizers
            def sgd(self):
                return torch.optim.SGD(self.parameters(), lr=0.1)

        torch.set_num_threads(1)
        quiet = dict(logger=False, progress_bar=False, summary=False, checkpoint=False, accelerator="cpu", seed=0)
        data = [torch.ones(16, 2**20)] * 2
        whole, cut = Net(), Net()
        expected = ld.fit(whole, data, max_epochs=1, **quiet)
        used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 130 * 2**20,) * 2)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run = ld.fit(cut, data, max_epochs=1, oom="micro", **quiet)
        print(run.global_step, run.progress.part_sizes, torch.allclose(whole.scale, cut.scale))
        print(*[each.message for each in caught])
    """
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    first, told = done.stdout.splitlines()
    assert first.startswith("2 {'': ")
    assert first.endswith("True")
    assert "ran out of memory with 16 samples" in told
