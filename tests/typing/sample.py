"""A user's project, as type checkers see it: it must pass `mypy --strict` and basedpyright, and is never run."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import assert_type

import lightdeco as ld

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.layer = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.layer(x)
        return result

    @ld.training_step
    def step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        ld.log("certainty", logits.softmax(1).max(), prog_bar=True)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}

    @ld.validation_step
    @ld.test_step
    @torch.no_grad()
    def check(self, batch: Batch) -> dict[str, Tensor]:
        return self.step(batch, 0)

    @ld.predict_step()
    def classify(self, batch: Batch) -> Tensor:
        classes: Tensor = self(batch[0]).argmax(1)
        return classes

    @ld.configure_optimizers
    def optimizers(self) -> ld.Optim:
        optimizer = torch.optim.Adam(self.parameters(), lr=1e-3)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10)
        return ld.Optim(optimizer, scheduler, interval="step", every=2)

    @ld.on_train_epoch_end
    def tell(self, run: ld.Run) -> None:
        run.print(run.epoch, run.metrics["val/loss"])


class Data:
    def __init__(self) -> None:
        self.points = TensorDataset(torch.randn(64, 8), torch.randint(0, 2, (64,)))

    @ld.prepare_data
    def download(self) -> None: ...

    @ld.setup
    def split(self, stage: str) -> None: ...

    @ld.train_dataloader
    def train(self) -> DataLoader[tuple[Tensor, ...]]:
        return DataLoader(self.points, batch_size=8, shuffle=True)

    @ld.val_dataloader
    def val(self) -> dict[str, DataLoader[tuple[Tensor, ...]]]:
        return {"near": DataLoader(self.points, batch_size=8), "far": DataLoader(self.points, batch_size=8)}


class Stop:
    @ld.on("train_batch_end", every=100)
    def look(self, batch: Batch, batch_idx: int, run: ld.Run) -> None:
        run.should_stop = run.global_step > 1000


def signatures_survive(net: Net, batch: Batch) -> None:
    """A decorated method has the type that it had."""
    assert_type(net.step(batch, 0), dict[str, Tensor])
    assert_type(net.step(batch=batch, batch_idx=1)["loss"], Tensor)
    assert_type(net.check(batch), dict[str, Tensor])
    assert_type(net.classify(batch), Tensor)
    assert_type(net.optimizers(), ld.Optim)
    assert_type(Data().val()["near"], DataLoader[tuple[Tensor, ...]])


def verbs(net: Net, data: Data, batches: list[Batch]) -> None:
    """Each verb takes a model, data and settings, and says what it returns."""
    run = ld.fit(net, data, max_epochs=3, devices="auto", logger=["tensorboard", "csv"], callbacks=[Stop()], seed=0)
    assert_type(run, ld.Run)
    assert_type(run.global_step, int)
    assert_type(run.epoch, int)
    assert_type(run.should_stop, bool)
    run.plot(run.dir / "curves.png")
    settings = ld.Settings(max_steps=10, precision="bf16-mixed", gradient_clip_val=1.0)
    ld.fit(net, (batches, batches), settings=settings, limit_val_batches=0.5)
    ld.fit(net, {"train": ld.CombinedLoader([batches, batches], mode="max_size")}, max_time="00:01:00:00")
    assert_type(ld.validate(net, data), dict[str, float])
    assert_type(ld.test(net, DataLoader(data.points, batch_size=8), progress_bar=False), dict[str, float])
    outputs: Iterator[Any] = ld.predict(net, batches)
    print(next(outputs))


class Gan(ld.OptimizerMixin, nn.Module):
    @ld.training_step(optimizer="a", every=2)
    def first(self, batch: Batch) -> Tensor:
        return batch[0].mean()

    @ld.split_batch(size=4)
    def parts(self, batch: Batch, size: int) -> list[Batch]:
        return [(batch[0][:size], batch[1][:size]), (batch[0][size:], batch[1][size:])]

    @ld.backward
    def back(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        ld.backward(loss, optimizer, retain_graph=True)

    @ld.clip_gradients()
    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        ld.clip_gradients(optimizer, 1.0, "value")

    @ld.training_step(manual=True)
    def drive(self, batch: Batch) -> Tensor:
        assert_type(self.parts(batch, 2), list[Batch])
        loss = self.first(batch)
        self.manual_backward(loss)
        return loss


def attached(layer: nn.Linear) -> nn.Linear:
    """`attach` returns what it was given."""
    result = ld.attach(
        layer,
        training_step=lambda layer, batch: layer(batch).mean(),
        configure_optimizers=lambda layer: torch.optim.SGD(layer.parameters(), lr=0.1),
    )
    assert_type(result, nn.Linear)
    assert_type(ld.seed_everything(1), int)
    return result
