"""Parameters that get no gradient on several processes: refused by name, before weights can differ."""

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.processes import start
from tests.models import QUIET, Net, batches

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")


class Spare(Net):
    """Has layers that no step uses."""

    def __init__(self, count: int = 1, frozen: bool = False) -> None:
        super().__init__()
        self.spare = nn.ModuleList(nn.Linear(2, 2) for _ in range(count)).requires_grad_(not frozen)


class Late(Spare):
    """Leaves its spare layer out from the third batch on."""

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return loss + self.spare[0](torch.ones(2)).sum() if batch_idx < 2 else loss


class Broken(Net):
    """Raises torch's kind of error itself."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        raise RuntimeError("my own")


class Idle(Net):
    """Its backward does nothing."""

    @ld.backward
    def own(self, loss: Tensor) -> None:
        """Nothing."""


FIND = DistributedDataParallelKwargs(find_unused_parameters=True)

CASES: dict[str, tuple[nn.Module, dict[str, Any]]] = {
    "never used": (Spare(), {"max_epochs": 1}),
    "one update": (Spare(), {"max_steps": 1}),
    "many": (Spare(4), {"max_epochs": 1}),
    "accumulation": (Spare(), {"max_epochs": 1, "accumulate_grad_batches": 2}),
    "late": (Late(), {"max_epochs": 1}),
    "frozen": (Spare(frozen=True), {"max_epochs": 1}),
    "found": (Spare(), {"max_epochs": 1, "strategy": FIND}),
    "late, found": (Late(), {"max_epochs": 1, "strategy": FIND}),
    "idle": (Idle(), {"max_epochs": 1}),
    "own error": (Broken(), {"max_epochs": 1}),
}


def fit_all(_: None, folder: Path) -> dict[str, str]:
    """In a started process: what each case raises, or nothing."""
    found = {}
    for (name, (model, settings)), strategy in itertools.product(CASES.items(), ("auto", "ddp")):
        key = name if strategy == "auto" else f"{name} (ddp)"
        try:
            ld.fit(model, batches(8), checkpoint=False, accelerator="cpu", **{"strategy": strategy} | settings, **QUIET)
            found[key] = ""
        except Exception as error:
            found[key] = f"{type(error).__name__}: {error}"
    return found


@pytest.fixture(scope="module")
def ended() -> Any:
    """How every case ended on two processes."""
    return start(fit_all, None, 2)


@pytest.mark.parametrize("ddp", ["", " (ddp)"])
@pytest.mark.parametrize(
    ("name", "which"),
    [
        ("never used", "spare.0.weight, spare.0.bias:"),
        ("one update", "spare.0.weight, spare.0.bias:"),
        ("accumulation", "spare.0.weight, spare.0.bias:"),
        ("late", "spare.0.weight, spare.0.bias:"),
        (
            "many",
            "spare.0.weight, spare.0.bias, spare.1.weight, spare.1.bias, spare.2.weight and 3 more:",
        ),
    ],
)
def test_parameters_without_a_gradient_are_named(ended: Any, name: str, which: str, ddp: str) -> None:
    """Instead of torch's error, which comes a step later and names no parameter; it says what to do."""
    name += ddp
    assert ended[name].startswith(f"StepError: a training step gave no gradient to {which}"), ended[name]
    assert "strategy=DistributedDataParallelKwargs(find_unused_parameters=True)" in ended[name]


@pytest.mark.parametrize("name", ["frozen", "frozen (ddp)", "found", "late, found"])
def test_what_the_message_advises_works(ended: Any, name: str) -> None:
    """Frozen parameters and DDP's search for unused ones train to the end."""
    assert ended[name] == ""


def test_a_backward_that_does_nothing_is_named(ended: Any) -> None:
    """And not lightdeco's own parameter."""
    assert ended["idle"].startswith("StepError: the method marked @ld.backward did not call backward"), ended["idle"]


def test_other_errors_of_a_step_are_left_alone(ended: Any) -> None:
    """A RuntimeError of the user's own arrives as it is."""
    assert ended["own error"] == "RuntimeError: my own"
