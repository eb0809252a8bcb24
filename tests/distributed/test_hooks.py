"""Hooks of DDP that compress gradients: what the processes agree on is sent beside them, as it is."""

import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

import lightdeco as ld
from lightdeco.joined import group_store, rank
from lightdeco.processes import start
from tests.distributed.test_fit import Manual, Net, Stops, Two, Weighted, loader
from tests.models import QUIET, equal

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")

BF16 = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.BF16)
FP16 = DistributedDataParallelKwargs(comm_hook=DDPCommunicationHookType.FP16)
POWER = DistributedDataParallelKwargs(
    comm_hook=DDPCommunicationHookType.POWER_SGD,
    comm_state_option={"matrix_approximation_rank": 2, "start_powerSGD_iter": 3},
)


class Configured(Net):
    """Asks for the hook itself."""

    @ld.configure_accelerator
    def arguments(self) -> dict[str, Any]:
        return {"kwargs_handlers": [BF16]}


class Heavy(Net):
    """Batches with weights that 16 bits cannot hold, equal among themselves."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return {"loss": self.loss(batch), "weight": 100_001.0 * len(batch[0])}


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "bf16": (Net, {"strategy": BF16}),
    "fp16": (Net, {"strategy": FP16}),
    "power": (Net, {"strategy": POWER}),
    "configured": (Configured, {}),
    "weights": (Weighted, {"strategy": BF16}),
    "heavy": (Heavy, {"strategy": BF16}),
    "accumulation": (Weighted, {"strategy": FP16, "accumulate_grad_batches": 4}),
    "clipping": (Net, {"strategy": FP16, "gradient_clip_val": 0.3}),
    "nan": (Net, {"strategy": FP16, "on_nan": "skip"}),
    "two optimizers": (Two, {"strategy": DistributedDataParallelKwargs(
        comm_hook=DDPCommunicationHookType.BF16, find_unused_parameters=True
    )}),
}  # fmt: skip


def fit(model: nn.Module, **settings: Any) -> ld.Run:
    return ld.fit(model, loader(8, shuffle=True), checkpoint=False, **{"max_epochs": 2, "seed": 5} | settings, **QUIET)


def by_hand() -> nn.Module:
    """A loop with DDP and torch's fp16 hook, over the batches in their order."""
    torch.distributed.init_process_group("gloo", store=group_store(), rank=rank(), world_size=2)
    model = Net()
    wrapped = nn.parallel.DistributedDataParallel(model.body)
    wrapped.register_comm_hook(None, default_hooks.fp16_compress_hook)
    optimizer = model.sgd()
    for k, (x, y) in enumerate(loader(8)):
        if k % 2 == rank():
            optimizer.zero_grad()
            F.cross_entropy(wrapped(x), y).backward()
            optimizer.step()
    torch.distributed.destroy_process_group()
    return model


def train_all(names: list[str], folder: Path) -> dict[str, Any]:
    """In a started process: weights and metrics of every case on both ranks, and two loops to compare."""
    found: dict[str, Any] = {}
    for name in names:
        kind, settings = CASES[name]
        model = kind()
        run = fit(model, **settings)
        found[name] = [p.detach().clone() for p in model.parameters()], dict(run.metrics), run.global_step
    model = Net()
    ld.fit(model, loader(8), max_epochs=1, strategy=FP16, checkpoint=False, **QUIET)
    found["by fit"], found["by hand"] = list(model.parameters()), list(by_hand().parameters())
    found["stopped"] = fit(Net(), strategy=FP16, callbacks=Stops((1,), "batch")).global_step
    torch.distributed.init_process_group("gloo", store=group_store(), rank=rank(), world_size=2)
    everywhere: list[Any] = [None, None]
    torch.distributed.all_gather_object(everywhere, found)
    torch.distributed.destroy_process_group()
    return {"first": everywhere[0], "second": everywhere[1]}


@pytest.fixture(scope="module")
def trained() -> Any:
    """Every case, on two processes."""
    return start(train_all, list(CASES), 2)


@pytest.mark.parametrize("name", CASES)
def test_close_to_one_process_and_equal_on_all(trained: Any, name: str) -> None:
    """Gradients are rounded on their way; weights, metrics and steps are the same on both ranks."""
    weights, metrics, steps = trained["first"][name]
    assert equal(weights, trained["second"][name][0])
    assert metrics == trained["second"][name][1]
    kind, settings = CASES[name]
    model = kind() if kind is not Configured else Net()
    run = ld.fit(
        model, loader(16, shuffle=True), max_epochs=2, seed=5, checkpoint=False,
        **{k: v for k, v in settings.items() if k != "strategy"}, **QUIET,
    )  # fmt: skip
    assert steps == run.global_step
    loose = {"rtol": 0.3, "atol": 0.1} if name == "power" else {"rtol": 2e-2, "atol": 5e-3}
    torch.testing.assert_close(weights, [p.detach() for p in model.parameters()], **loose)
    assert metrics == pytest.approx(run.metrics, rel=2e-2)


def test_gradients_are_compressed_as_by_hand(trained: Any) -> None:
    """To the bit as in a loop with the same hook, and not as without it."""
    first = trained["first"]
    assert equal(first["by fit"], first["by hand"])
    assert not equal(first["fp16"][0], first["bf16"][0])


def test_a_wish_to_stop_is_heard(trained: Any) -> None:
    """One update later, as without a hook."""
    assert trained["first"]["stopped"] == trained["second"]["stopped"] == 4


def said(what: str) -> AbstractContextManager[Any]:
    """Expect a warning of rank 0, which warns for all."""
    return nullcontext() if rank() else pytest.warns(ld.LightdecoWarning, match=what)


def without_effect(reduced: None, folder: Path) -> Tensor:
    """A manual step, beside which a hook has nothing to do."""
    with said("comm_hook='fp16' has no effect: a manual step"):
        fit(Manual(), strategy=FP16)
    return torch.zeros(0)


def test_a_hook_without_effect_warns() -> None:
    """A manual step averages without DDP."""
    start(without_effect, None, 2)


def resumed(reduced: None, folder: Path) -> list[str]:
    """What a resume with PowerSGD says."""
    settings: Any = {"strategy": POWER, "seed": 5, "name": "run", "root_dir": folder} | QUIET
    ld.fit(Net(), loader(8), max_epochs=1, **settings)
    with said("comm_hook='power_sgd' keeps what it has not sent yet"):
        ld.fit(Net(), loader(8), max_epochs=2, resume="last", **settings)
    return []


def test_what_a_checkpoint_does_not_hold_is_said() -> None:
    """PowerSGD has a memory that is not saved."""
    start(resumed, None, 2)
