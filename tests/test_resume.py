"""Resuming: an interrupted run goes on, and ends bit for bit as if it had never stopped."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightdeco as ld
from lightdeco import checkpoint
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from tests.models import weights

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "seed": 5}


class Noisy(Dataset[Any]):
    """Random augmentation through torch, NumPy and `random`."""

    def __init__(self, size: int = 52) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(size, 4, generator=generator), torch.arange(size) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        import random

        return self.x[i] + 0.1 * torch.randn(4) + 0.1 * numpy.random.randn() + 0.1 * random.random(), self.y[i]


class Net(nn.Module):
    """Dropout, BatchNorm, Adam with a schedule by step, logging of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.stop_at: int | None = None

    @ld.training_step
    def step(self, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        ld.log("largest", loss, reduce="max")
        return {"loss": loss, "noise": numpy.random.rand()}

    @ld.validation_step
    def check(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @ld.configure_optimizers
    def adam(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return ld.Optim(
            optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100), interval="step"
        )

    @ld.on_train_batch_end
    def stop(self, run: ld.Run) -> None:
        if self.stop_at is not None and run.progress.global_step == self.stop_at:
            raise Stop


class Stop(Exception):
    """Ends a run as an error of the user does."""


def loaders() -> Any:
    return DataLoader(Noisy(), batch_size=8, shuffle=True), DataLoader(Noisy(10), batch_size=4)


def fit(root: Path, model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, ld.Run]:
    model = model or Net()
    given: Any = QUIET | {"root_dir": root, "name": "run", "max_epochs": 3, "log_every_n_steps": 3} | settings
    return model, ld.fit(model, loaders(), **given)


def records(run: ld.Run) -> list[dict[str, Any]]:
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def same(found: tuple[nn.Module, ld.Run], expected: tuple[nn.Module, ld.Run]) -> None:
    """Weights, buffers, records, counters and latest metrics are equal to the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(weights(found[0]), weights(expected[0]), strict=True))
    assert records(found[1]) == records(expected[1])
    assert found[1].metrics == expected[1].metrics
    strip = [{k: v for k, v in record.items() if k != "time"} for record in found[1].history]
    assert strip == [{k: v for k, v in record.items() if k != "time"} for record in expected[1].history]
    a, b = found[1].progress, expected[1].progress
    a.seconds = b.seconds = 0.0
    assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ld.Run]:
    """The run that nobody interrupts."""
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("at", [1, 3, 6, 7, 8, 14, 20])
def test_a_run_that_failed_goes_on(tmp_path: Path, whole: Any, at: int) -> None:
    """Within an epoch, at its end and at its start; a checkpoint is written every step."""
    model = Net()
    model.stop_at = at
    with pytest.raises(Stop):
        fit(tmp_path, model, checkpoint=ModelCheckpoint(every_n_steps=1))
    found = fit(tmp_path, resume="auto", checkpoint=ModelCheckpoint(every_n_steps=1))
    same(found, whole)


def test_max_steps_can_be_raised(tmp_path: Path, whole: Any) -> None:
    """A run that ended within an epoch goes on as if it had not."""
    for steps in (2, 5, 12):
        fit(tmp_path, max_epochs=None, max_steps=steps, resume="auto")
    same(fit(tmp_path, resume="auto"), whole)


def test_a_finished_run_trains_nothing(tmp_path: Path, whole: Any) -> None:
    """It returns its run with its final weights."""
    fit(tmp_path)
    model, run = fit(tmp_path, resume="auto")
    same((model, run), whole)
    assert run.stop_reason == "max_epochs"
    assert run.best_checkpoint is not None
    assert run.best_checkpoint.is_dir()
    assert run.best_score == whole[1].best_score


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """The last and the best stay; the weights load without lightdeco."""
    from safetensors.torch import load_file

    model, run = fit(tmp_path)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.name == "step=00000021"
    names = sorted(path.name for path in (run.dir / "checkpoints").iterdir())
    assert set(names) == {run.last_checkpoint.name, run.best_checkpoint.name}  # type: ignore[union-attr]
    assert load_file(run.last_checkpoint / "model.safetensors").keys() == model.state_dict().keys()
    assert checkpoint.load(run.last_checkpoint).progress["global_step"] == 21
