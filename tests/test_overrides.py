"""Every override of the loop decides the result: each is written so that the weights tell that it was used."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import StepLR

import lightdeco as ld
from tests.models import QUIET, batches, equal, weights


class Line(nn.Module):
    """Plain gradient descent on a linear classifier."""

    def __init__(self, lr: float = 0.5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.lr = nn.Linear(4, 3), lr

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(self.layer(batch[0]), batch[1])

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self.loss(batch)

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return SGD(self.parameters(), self.lr)


def fit(model: nn.Module, **settings: Any) -> list[Tensor]:
    ld.fit(model, batches(3), **(QUIET | {"max_epochs": 1} | settings))
    return weights(model)


def by_hand(lr: float = 0.5, **change: Any) -> list[Tensor]:
    """The loop, in which a function may stand for each override."""
    model = Line()
    optimizer = SGD(model.parameters(), lr)
    for batch in batches(3):
        if "clear" in change:
            change["clear"](model)
        else:
            optimizer.zero_grad()
        change.get("backward", Tensor.backward)(model.loss(batch))
        if "clip" in change:
            change["clip"](model)
        optimizer.step()
        if "schedule" in change:
            change["schedule"](optimizer)
    return weights(model)


def test_backward() -> None:
    """What the override puts into the gradients is what the optimizer uses."""

    class Doubling(Line):
        @ld.backward
        def back(self, loss: Tensor, optimizer: Optimizer) -> None:
            (loss * 2).backward()

    assert equal(fit(Doubling()), by_hand(backward=lambda loss: (loss * 2).backward()))
    assert not equal(fit(Doubling()), by_hand())


def test_optimizer_zero_grad() -> None:
    """An override that does not clear but halves gives momentum of a kind."""

    def halve(model: Line) -> None:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    class Halving(Line):
        @ld.optimizer_zero_grad
        def clear(self, optimizer: Optimizer) -> None:
            halve(self)

    assert equal(fit(Halving()), by_hand(clear=halve))
    assert not equal(fit(Halving()), by_hand())


def test_clip_gradients() -> None:
    """The override clips in the place of the settings."""

    def sign(model: Line) -> None:
        for p in model.parameters():
            assert p.grad is not None
            p.grad.sign_()

    class Signs(Line):
        @ld.clip_gradients
        def clip(self, optimizer: Optimizer) -> None:
            sign(self)

    assert equal(fit(Signs(), gradient_clip_val=1e-9), by_hand(clip=sign))


def test_optimizer_step_with_its_closure() -> None:
    """A method that steps with the mean of two gradients: here, and where the first would lead (SAM-like)."""

    class Looking(Line):
        @ld.optimizer_step
        def look_ahead(self, optimizer: Optimizer, closure: Any) -> None:
            closure()
            parameters = list(self.parameters())
            before = [(p.detach().clone(), p.grad.clone()) for p in parameters]  # type: ignore[union-attr]
            optimizer.step()
            closure()
            with torch.no_grad():
                for p, (old, first) in zip(parameters, before, strict=True):
                    assert p.grad is not None
                    p.copy_(old - self.lr * (first + p.grad) / 2)

    model = Line()
    for batch in batches(3):
        parameters = list(model.parameters())
        before = [p.detach().clone() for p in parameters]
        first = torch.autograd.grad(model.loss(batch), parameters)
        with torch.no_grad():
            for p, gradient in zip(parameters, first, strict=True):
                p.sub_(0.5 * gradient)
        second = torch.autograd.grad(model.loss(batch), parameters)
        with torch.no_grad():
            for p, old, a, b in zip(parameters, before, first, second, strict=True):
                p.copy_(old - 0.5 * (a + b) / 2)
    for ours, theirs in zip(fit(Looking()), weights(model), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not equal(weights(model), by_hand())


def test_optimizer_step_of_lbfgs() -> None:
    """The override decides how often LBFGS, which needs the closure, is stepped."""

    class Newton(Line):
        @ld.optimizer_step
        def twice(self, optimizer: Optimizer, closure: Any) -> None:
            optimizer.step(closure)
            optimizer.step(closure)

        def sgd(self) -> Any:
            return LBFGS(self.parameters(), max_iter=2)

    model = Line()
    optimizer = LBFGS(model.parameters(), max_iter=2)
    for batch in batches(3):

        def closure(batch: Any = batch) -> Tensor:
            optimizer.zero_grad()
            loss = model.loss(batch)
            loss.backward()
            return loss.detach()

        optimizer.step(closure)
        optimizer.step(closure)
    assert equal(fit(Newton()), weights(model))


def test_lr_scheduler_step() -> None:
    """The override alone decides what the schedule does."""

    class Scheduled(Line):
        @ld.lr_scheduler_step
        def schedule(self, scheduler: Any, metric: Any) -> None:
            scheduler.optimizer.param_groups[0]["lr"] *= 0.1

        def sgd(self) -> Any:
            optimizer = SGD(self.parameters(), 0.5)
            return ld.Optim(optimizer, StepLR(optimizer, 1, gamma=7.0), interval="step")

    def schedule(optimizer: SGD) -> None:
        optimizer.param_groups[0]["lr"] *= 0.1

    assert equal(fit(Scheduled()), by_hand(schedule=schedule))


def test_transfer_batch_to_device() -> None:
    """The step gets the batch that the override returns."""

    class Moving(Line):
        @ld.transfer_batch_to_device
        def move(self, batch: Any, device: torch.device) -> Any:
            return (batch[0] * 0).to(device), batch[1].to(device)

    found = fit(Moving())
    assert torch.equal(found[0], Line().layer.weight)  # features of 0: only the bias learns
    assert not torch.equal(found[1], Line().layer.bias)


def test_split_batch() -> None:
    """As many updates as parts, each with its part."""

    class Halves(Line):
        @ld.split_batch(size=4)
        def split(self, batch: Any, size: int) -> Any:
            return list(zip(batch[0].split(size), batch[1].split(size), strict=True))

    model = Line()
    optimizer = SGD(model.parameters(), 0.5)
    for x, y in batches(3):
        for part in zip(x.split(4), y.split(4), strict=True):
            optimizer.zero_grad()
            model.loss(part).backward()
            optimizer.step()
    assert equal(fit(Halves()), weights(model))


def test_configure_model() -> None:
    """Layers that are built late are on the device and trained."""

    class Late(Line):
        def __init__(self) -> None:
            super().__init__()
            del self.layer

        @ld.configure_model
        def build(self) -> None:
            torch.manual_seed(0)
            self.layer = nn.Linear(4, 3)

    assert equal(fit(Late()), by_hand())


def test_configure_callbacks() -> None:
    """What it returns hears events."""

    class Stop:
        @ld.on_train_batch_end
        def stop(self, run: ld.Run) -> None:
            run.should_stop = True

    class Stopping(Line):
        @ld.configure_callbacks
        def callbacks(self) -> Any:
            return [Stop()]

    assert ld.fit(Stopping(), batches(3), max_epochs=5, **QUIET).global_step == 1


def test_configure_accelerator() -> None:
    """Its arguments reach accelerate: under bf16 the layer's output has that type."""
    seen: list[torch.dtype] = []

    class Mixed(Line):
        def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
            out = self.layer(batch[0])
            seen.append(out.dtype)
            return F.cross_entropy(out, batch[1])

        @ld.configure_accelerator
        def arguments(self) -> Any:
            return {"mixed_precision": "bf16"}

    fit(Mixed())
    assert set(seen) == {torch.bfloat16}
