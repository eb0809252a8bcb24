"""Small models, whose gradients are averaged without DDP: which they are, and what is refused. See also test_fit.py."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.ddp import InDDP
from lightdeco.flat import Flat
from lightdeco.joined import rank
from lightdeco.peers import Peers
from lightdeco.processes import start
from tests.distributed.test_fit import Net, Normed, Two, loader
from tests.models import QUIET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")


class Sized(Net):
    """Of which `count` numbers more are trained."""

    def __init__(self, count: int, frozen: bool = False) -> None:
        super().__init__()
        self.more = nn.Parameter(torch.ones(count), requires_grad=not frozen)

    def loss(self, batch: Any) -> Tensor:
        return super().loss(batch) + 1e-6 * self.more.square().mean()


class Mixed(Net):
    """Has a layer in another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Linear(2, 2, dtype=torch.float64).requires_grad_(False)


class Overriding(Net):
    """Calls backward itself."""

    @ld.backward
    def own(self, loss: Tensor) -> None:
        loss.backward()


class Table(Net):
    """Its embedding gets sparse gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(3, 8, sparse=True)

    def loss(self, batch: Any) -> Tensor:
        return super().loss((batch[0] + self.table(batch[1]), batch[1]))


MEBI = 1 << 18  # floats
CASES: dict[str, tuple[nn.Module, dict[str, Any], type[Peers]]] = {
    "small": (Net(), {}, Flat),
    "double": (Net(), {"precision": "64-true"}, Flat),
    "autocast": (Net(), {"precision": "bf16-mixed"}, Flat),
    "frozen": (Sized(MEBI, frozen=True), {}, Flat),
    "large": (Sized(MEBI), {}, InDDP),
    "buffers": (Normed(), {}, InDDP),
    "bf16": (Net(), {"precision": "bf16-true"}, InDDP),
    "mixed": (Mixed(), {}, InDDP),
    "several steps": (Two(), {}, InDDP),
    "overridden": (Overriding(), {}, InDDP),
    "sparse": (Table(), {}, InDDP),
    "asked for": (Net(), {"strategy": "ddp"}, InDDP),
}


class Kind:
    """Notes who averages, and what of the gradients is seen by events and by those who keep them."""

    def __init__(self) -> None:
        self.kind: type[Peers] | None = None
        self.kept: list[tuple[Tensor, Tensor]] = []
        self.same = True

    @ld.on_after_backward
    def look(self, run: ld.Run) -> None:
        from lightdeco import wrapping

        self.kind = wrapping.chosen  # type: ignore[attr-defined]
        grad = run.model.body[2].bias.grad
        assert grad is not None
        self.kept.append((grad, grad.clone()))
        everywhere = [torch.zeros_like(grad), torch.zeros_like(grad)]
        torch.distributed.all_gather(everywhere, grad)
        self.same = self.same and torch.equal(*everywhere)


def fit_all(_: None, folder: Path) -> dict[str, tuple[bool, bool, bool]]:
    """In a started process: who averaged; whether gradients were the same on both ranks; whether kept ones stayed."""
    from lightdeco import opening, wrapping

    wrap = wrapping.wrap

    def noting(s: Any) -> None:
        wrap(s)
        wrapping.chosen = type(s.peers)  # type: ignore[attr-defined]

    opening.wrap = noting  # type: ignore[attr-defined]
    found = {}
    for name, (model, settings, kind) in CASES.items():
        noted = Kind()
        ld.fit(model, loader(8), max_epochs=1, callbacks=noted, checkpoint=False, **settings, **QUIET)
        assert noted.kind is not None
        kept = all(torch.equal(live, then) for live, then in noted.kept)
        found[name] = (issubclass(noted.kind, kind), noted.same, kept)
    return found


@pytest.fixture(scope="module")
def noted() -> Any:
    """What every case showed."""
    return start(fit_all, None, 2)


@pytest.mark.parametrize("name", CASES)
def test_who_averages(noted: Any, name: str) -> None:
    """lightdeco itself where DDP would send one message and do nothing else; events see means; kept gradients stay."""
    assert noted[name] == (True, True, True)


class Gathered(nn.Module):
    """An embedding without the attribute of torch's."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.Parameter(torch.ones(3, 2))

    @ld.training_step
    def step(self, batch: Any) -> Tensor:
        return nn.functional.embedding(batch[1], self.rows, sparse=True).mean()

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def differ(_: None, folder: Path) -> str:
    """A rank with another model."""
    try:
        ld.fit(Sized(3 + rank()), loader(8), max_epochs=1, checkpoint=False, **QUIET)
    except ld.LaunchError as error:
        return str(error)
    return ""


def scatter(_: None, folder: Path) -> list[Tensor]:
    """A sparse gradient."""
    with pytest.raises(ld.StepError, match="rows got a sparse gradient, which several"):
        ld.fit(Gathered(), loader(8), max_epochs=1, checkpoint=False, **QUIET)
    return []


def test_different_models_are_refused() -> None:
    """Before training, on every rank."""
    assert start(differ, None, 2) == "rank 1 has other parameters than rank 0; every process must make the same model"


def test_sparse_gradients_that_were_not_foreseen_are_refused() -> None:
    """With what to do, which works: see the case "sparse"."""
    assert start(scatter, None, 2) == []


def weights(_: None, folder: Path) -> list[list[Tensor]]:
    """Of three processes, by "auto" and by "ddp"."""
    found = []
    for strategy in ("auto", "ddp"):
        model = Net()
        ld.fit(model, loader(8), max_epochs=2, strategy=strategy, checkpoint=False, **QUIET)
        found.append([p.detach().clone() for p in model.parameters()])
    return found


def test_three_processes() -> None:
    """As by DDP, but for the order in which three numbers are added."""
    flat, ddp = start(weights, None, 3)
    torch.testing.assert_close(flat, ddp)
