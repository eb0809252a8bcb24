"""fp16's loss scaling on two processes: what overflows on one is left out by both."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightdeco as ld
from lightdeco import scaling
from lightdeco.processes import start
from tests.models import QUIET, Net, batches, equal, weights

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")


class Automatic(Net):
    """Whose gradients are infinite in the second batch of rank 1."""

    def __init__(self, bad: bool) -> None:
        super().__init__()
        self.bad = bad

    def loss(self, batch: tuple[Tensor, Tensor], run: ld.Run) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if self.bad and run.rank == 1 and run.progress.micro_batch == 1:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    @ld.training_step
    def step(self, batch: Any, run: ld.Run) -> Tensor:
        return self.loss(batch, run)


class Manual(Automatic):
    """The same by hand."""

    @ld.training_step(manual=True)
    def step(self, batch: Any, run: ld.Run) -> None:
        optimizer = ld.optimizers()
        optimizer.zero_grad()
        ld.backward(self.loss(batch, run))
        optimizer.step()


CASES = {"automatic": Automatic, "manual": Manual}


def fit_all(wanted: bool, folder: Path) -> dict[str, Any]:
    """In each process: train every case, without and with overflow; (weights, updates left out, updates) by rank."""
    scaling.wanted = lambda precision: wanted  # the scaler works on the CPU too
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, kind in CASES.items():
        for bad in (False, True) if wanted else (False,):
            torch.manual_seed(0)
            model: nn.Module = kind(bad)
            run = ld.fit(model, batches(8), max_epochs=1, seed=1, checkpoint=False, **QUIET)
            told = [None, None]
            torch.distributed.all_gather_object(
                told, (weights(model), run.progress.skipped_updates, run.progress.global_step)
            )
            found[f"{name}{' bad' * bad}"] = told
    torch.distributed.destroy_process_group()
    return found


def test_both_processes_leave_an_update_out_together() -> None:
    """Scaling changes no bit; an overflow on rank 1 costs both ranks one update, and their weights stay equal."""
    plain, scaled = (start(fit_all, wanted, 2) for wanted in (False, True))
    for name in CASES:
        assert equal(plain[name][0][0], scaled[name][0][0])
        (first, skipped, steps), (second, *others) = scaled[f"{name} bad"]
        assert equal(first, second)
        assert (skipped, steps) == tuple(others) == (1, 3)
        assert not equal(first, scaled[name][0][0])
