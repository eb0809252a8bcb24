"""`log_gradients`: the norms that are logged are those of the update, by module, and nothing else changes."""

import itertools
import math
from typing import Any

import pytest
import torch
from torch import nn

import lightdeco as ld
from lightdeco.callbacks import gradient_norms
from tests.models import QUIET, Net, batches


class Deep(nn.Module):
    """One module around several, and a parameter beside them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.ModuleDict({"a": nn.Linear(4, 5), "b": nn.Sequential(nn.ReLU(), nn.Linear(5, 3))})
        self.net.scale = nn.Parameter(torch.ones(()))
        self.seen: list[dict[str, float]] = []

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return nn.functional.cross_entropy(self.net["b"](self.net["a"](batch[0])) * self.net.scale, batch[1])

    @ld.on_before_optimizer_step
    def keep(self) -> None:
        grads = {name: p.grad for name, p in self.named_parameters() if p.grad is not None}
        parts = {"net.a": "net.a.", "net.b": "net.b.", "net.scale": "net.scale", "": ""}
        self.seen.append(
            {
                key: math.sqrt(sum(float(g.double().square().sum()) for n, g in grads.items() if n.startswith(start)))
                for key, start in parts.items()
            }
        )

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _fit(model: Any, **settings: Any) -> ld.Run:
    return ld.fit(model, batches(7), **(QUIET | {"max_epochs": 2, "seed": 1} | settings))


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 1e-3}])
def test_norms_are_those_of_the_recorded_update(settings: dict[str, Any]) -> None:
    """By module and of all, after accumulation and before clipping, at each record of steps and at the epoch's end."""
    model = Deep()
    run = _fit(model, log_gradients=True, log_every_n_steps=3, **settings)
    records = [r for r in run.history if "train/grad_norm" in r]
    updates = 8 if "accumulate_grad_batches" in settings else 14
    assert [r["step"] for r in records] == ([3, 4, 6, 8] if updates == 8 else [3, 6, 7, 9, 12, 14])
    for record in records:
        for name, norm in model.seen[record["step"] - 1].items():
            assert record[f"train/grad_norm/{name}" if name else "train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert len(model.seen) == updates


def test_they_change_no_weight_and_cost_nothing_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same weights; norms are computed for recorded steps alone; off, the callback is not there."""
    calls = itertools.count()
    real = gradient_norms.norms
    monkeypatch.setattr(gradient_norms, "norms", lambda *given: (next(calls), real(*given))[1])
    on, off = Net(), Net()
    off.load_state_dict(on.state_dict())
    _fit(on, log_gradients=True, log_every_n_steps=5)
    assert next(calls) == 4  # steps 5 and 10, and the ends of the epochs at 7 and 14
    run = _fit(off)
    assert next(calls) == 5
    assert not any("grad_norm" in name for name in run.metrics)
    assert all(torch.equal(a, b) for a, b in zip(on.parameters(), off.parameters(), strict=True))


def test_each_optimizer_has_its_own() -> None:
    """With several optimizers the names have the optimizer's, and only its parameters count."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 1), nn.Linear(4, 1)

        @ld.training_step(optimizer="first")
        def a(self, batch: Any) -> Any:
            return self.one(batch[0]).square().mean()

        @ld.training_step(optimizer="second")
        def b(self, batch: Any) -> Any:
            return (self.two(batch[0]) * 3).square().mean()

        @ld.configure_optimizers
        def optimizers(self) -> Any:
            return {n: torch.optim.SGD(m.parameters(), lr=0.1) for n, m in (("first", self.one), ("second", self.two))}

    run = _fit(Two(), log_gradients=True, log_every_n_steps=1)
    names = sorted(name for name in run.metrics if "grad_norm" in name)
    assert names == [f"train/{n}/grad_norm{m}" for n, m in itertools.product(("first",), ("", "/one"))] + [
        f"train/{n}/grad_norm{m}" for n, m in itertools.product(("second",), ("", "/two"))
    ]
    assert run.metrics["train/first/grad_norm"] == run.metrics["train/first/grad_norm/one"]
    assert len([r for r in run.history if "train/second/grad_norm" in r]) == 14


def test_a_manual_step_has_them_too() -> None:
    """The event comes before each `optimizer.step()` of a manual step as well."""

    class Manual(Net):
        @ld.training_step(manual=True)
        def step(self, batch: Any) -> Any:
            optimizer = ld.optimizers()
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            optimizer.zero_grad()
            ld.backward(loss)
            optimizer.step()
            return loss

    run = _fit(Manual(), log_gradients=True, log_every_n_steps=1)
    assert run.metrics["train/grad_norm"] > 0


def test_gradients_of_every_kind_have_a_norm() -> None:
    """Sparse, complex, float64 and bfloat16 gradients, and parameters without one."""
    dense, sparse = nn.Parameter(torch.zeros(2)), nn.Embedding(4, 2, sparse=True)
    dense.grad = torch.tensor([3.0, 4.0])
    sparse(torch.tensor([1, 1, 2])).sum().backward()
    optimizer = torch.optim.SGD([dense, *sparse.parameters(), nn.Parameter(torch.zeros(1))], lr=0.1)
    found = gradient_norms.norms(optimizer, {id(dense): "d", id(sparse.weight): "s"}, "n")
    assert float(found["n/d"]) == 5
    assert float(found["n/s"]) == pytest.approx(math.sqrt(2 * 4 + 2 * 1))
    assert float(found["n"]) == pytest.approx(math.sqrt(25 + 10))
    for dtype in (torch.complex64, torch.float64, torch.bfloat16):
        parameter = nn.Parameter(torch.zeros(2, dtype=dtype))
        parameter.grad = torch.tensor([3, 4], dtype=dtype) * (1j if dtype.is_complex else 1)
        norm = gradient_norms.norms(torch.optim.SGD([parameter], lr=0.1), {}, "n")["n"]
        assert float(norm) == 5
        assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient_norms.norms(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), {}, "n") == {}


def test_explain_names_it() -> None:
    """What is added by the setting is told by `ld.explain`."""
    assert "GradientNorms" in ld.explain(Net(), batches(2), max_epochs=1, log_gradients=True)
