"""The training that is interrupted: augmentation, dropout, BatchNorm, a schedule, metrics; and its fingerprint."""

import hashlib
import json
import random
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics.classification import MulticlassAccuracy

import lightdeco as ld

SIZE, BATCH, EPOCHS = 60, 8, 3


def augmented(i: int) -> tuple[Tensor, Tensor]:
    """Sample `i` with noise of torch, NumPy and `random`: x (4,), y ()."""
    generator = torch.Generator().manual_seed(i)
    noise = torch.randn(4) + numpy.random.randn() + random.random()
    return torch.randn(4, generator=generator) + 0.1 * noise.float(), torch.tensor(i % 3)


class Samples(Dataset[Any]):
    """Map-style."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return augmented(i)


class Stream(IterableDataset[Any]):
    """The same as a stream."""

    def __iter__(self) -> Any:
        info = torch.utils.data.get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        return (augmented(i) for i in range(worker, SIZE, workers))


class Net(nn.Module):
    """A classifier with everything that has a state."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.accuracy = MulticlassAccuracy(3)
        self.corner = 0
        self.draws = numpy.random.rand

    @ld.training_step
    def step(self, batch: Any) -> Any:
        """Loss, a torchmetrics object, and a random number."""
        logits = self.net(batch[0])
        self.accuracy.update(logits, batch[1])
        ld.log("acc", self.accuracy)
        return {"loss": F.cross_entropy(logits, batch[1]), "draw": self.draws()}

    @ld.validation_step
    def check(self, batch: Any) -> Tensor:
        """The loss."""
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @ld.configure_optimizers
    def adam(self) -> Any:
        """A schedule by step."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [5, 9, 13], gamma=0.5)
        return ld.Optim(optimizer, schedule, interval="step")

    @ld.on("train_batch_end", every=3)
    def count(self) -> None:
        """A state of the author's own, that depends on how often an event has happened."""
        self.corner += 1

    @ld.on_save_checkpoint
    def keep(self, state: Any) -> None:
        """Keep it."""
        state["corner"] = self.corner

    @ld.on_load_checkpoint
    def load(self, state: Any) -> None:
        """Take it back."""
        self.corner = state["corner"]


@dataclass
class Case:
    """One way to train; `settings` are those of `fit`."""

    settings: dict[str, Any] = field(default_factory=dict)
    workers: tuple[int, ...] = (0,)
    """The number of workers of the first start, the second, …; the last one stays."""
    persistent: bool = False
    stream: bool = False
    draws: Any = numpy.random.rand
    """What the step draws from; with a changing number of workers only torch is reproducible there."""
    model: type[Net] = Net
    callbacks: tuple[Any, ...] = ()


def run(root: Path, case: Case, start: int = 0, **settings: Any) -> tuple[Net, ld.Run]:
    """Train, or go on: the `start`-th start of a run in `root`."""
    workers = case.workers[min(start, len(case.workers) - 1)]
    options: Any = {"num_workers": workers, "persistent_workers": case.persistent and workers > 0}
    data: Any = Stream() if case.stream else Samples()
    shuffle = {} if case.stream else {"shuffle": True}
    loaders = DataLoader(data, BATCH, **shuffle, **options), DataLoader(Samples(12), 5)
    model = case.model()
    model.draws = case.draws
    given: Any = {
        "max_epochs": EPOCHS, "seed": 5, "log_every_n_steps": 2, "root_dir": root, "name": "run", "resume": "auto",
        "progress_bar": False, "summary": False, "logger": "csv", "num_sanity_val_steps": 0,
        "callbacks": [make() for make in case.callbacks],
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ld.LightdecoWarning)
        return model, ld.fit(model, loaders, **(given | case.settings | settings))


def fingerprint(model: Net, result: ld.Run) -> dict[str, str]:
    """A hash of each thing that must come out the same."""
    lines = (result.dir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]
    assert result.last_checkpoint is not None
    optimizer = (result.last_checkpoint / "optimizer.safetensors").read_bytes()
    weights = b"".join(value.numpy().tobytes() for value in model.state_dict().values())
    progress = result.progress
    parts: dict[str, Any] = {
        "weights": weights,
        "optimizer": optimizer,
        "records": json.dumps(records).encode(),
        "table": (result.dir / "metrics.csv").read_bytes(),
        "latest": json.dumps(sorted(result.metrics.items())).encode(),
        "counters": repr((progress.epoch, progress.global_step, progress.micro_batch, model.corner)).encode(),
    }
    return {name: hashlib.sha256(value).hexdigest()[:16] for name, value in parts.items()}
