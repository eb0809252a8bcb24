"""A run ends with the very weights of the loop that one would write by hand."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld
from lightdeco import seeds
from tests.models import QUIET, Net, batches, equal, weights

SEED = 11


def by_hand(loader: Any, epochs: int, optimizer: Callable[[Net], torch.optim.Optimizer]) -> Net:
    """The hand-written loop: `seeds.order_seed` before each epoch, `seeds.step_seed` before each step."""
    model, micro_batch = Net(), 0
    step = optimizer(model)
    for epoch in range(epochs):
        torch.manual_seed(seeds.order_seed(SEED, epoch))
        for x, y in loader:
            torch.manual_seed(seeds.step_seed(SEED, 0, micro_batch))
            step.zero_grad()
            F.cross_entropy(model(x), y).backward()
            step.step()
            micro_batch += 1
    return model


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(50, 4, generator=generator), torch.randint(3, (50,), generator=generator))


@pytest.mark.parametrize("validated", [False, True])
@pytest.mark.parametrize("kind", ["list", "loader"])
def test_training_is_bit_equal_to_the_hand_written_loop(kind: str, validated: bool) -> None:
    """With dropout and a shuffled loader, with and without validation in between."""
    loader: Any = batches() if kind == "list" else DataLoader(dataset(), batch_size=8, shuffle=True)
    expected = by_hand(loader, 3, lambda m: torch.optim.Adam(m.parameters(), lr=m.lr))
    model = Net()
    ld.fit(model, (loader, batches(2)) if validated else loader, max_epochs=3, seed=SEED, **QUIET)
    assert equal(weights(model), weights(expected))


def test_a_seed_and_everything_on_change_nothing(tmp_path: Any) -> None:
    """Loggers, bar, summary, callbacks that draw random numbers: the weights stay those of the bare run."""

    class Drawing:
        @ld.on_train_batch_start
        def draw(self) -> None:
            torch.rand(3)

    bare, full = Net(), Net()
    ld.fit(bare, batches(), max_epochs=2, seed=SEED, **QUIET)
    ld.fit(full, (batches(), batches()), max_epochs=2, seed=SEED, callbacks=Drawing(), root_dir=tmp_path)
    assert equal(weights(bare), weights(full))


def test_accumulated_gradients_are_those_of_the_concatenated_batch() -> None:
    """Batches of different sizes in a window, the short last window included, and a window of one."""
    sizes = [8, 8, 3, 8, 2, 5, 4]
    pieces = [(torch.randn(n, 4), torch.randint(3, (n,))) for n in sizes]
    seen: list[list[torch.Tensor]] = []

    class Plain(Net):
        @ld.on_before_optimizer_step
        def look(self) -> None:
            seen.append([p.grad.clone() for p in self.parameters() if p.grad is not None])

        @ld.configure_optimizers
        def adam(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    ld.fit(Plain(dropout=0.0), pieces, max_epochs=1, accumulate_grad_batches=3, **QUIET)
    assert len(seen) == 3
    model = Net(dropout=0.0)
    for window, got in zip((pieces[:3], pieces[3:6], pieces[6:]), seen, strict=True):
        x, y = (torch.cat([piece[i] for piece in window]) for i in (0, 1))
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        for p, g in zip(model.parameters(), got, strict=True):
            torch.testing.assert_close(g, p.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_weights_of_micro_batches_decide_how_much_each_counts(as_tensor: bool) -> None:
    """With token counts as "weight", the window's gradient is that of the mean over all tokens."""
    tokens = [(torch.randn(n, 4), torch.randint(3, (n,)), torch.rand(n) > 0.4) for n in (6, 9, 4)]
    seen: list[torch.Tensor] = []

    class Tokens(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y, mask = batch
            loss = F.cross_entropy(self(x)[mask], y[mask])
            return {"loss": loss, "weight": mask.sum() if as_tensor else int(mask.sum())}

        @ld.on_before_optimizer_step
        def look(self) -> None:
            seen.append(self.body[0].weight.grad.clone())

    run = ld.fit(Tokens(dropout=0.0), tokens, max_epochs=1, accumulate_grad_batches=3, **QUIET)
    model = Net(dropout=0.0)
    x, y, mask = (torch.cat([piece[i] for piece in tokens]) for i in range(3))
    loss = F.cross_entropy(model(x)[mask], y[mask])
    loss.backward()
    loss = loss.detach()
    torch.testing.assert_close(seen[0], model.body[0].weight.grad, rtol=1e-5, atol=1e-7)
    assert run.metrics["train/loss"] == pytest.approx(float(loss), rel=1e-5)


def test_a_window_of_one_batch_scales_nothing() -> None:
    """With one batch left in the last window, its update is bit-equal to the one without accumulation."""
    one, other = Net(), Net()
    ld.fit(one, batches(1), max_epochs=3, seed=1, accumulate_grad_batches=4, **QUIET)
    ld.fit(other, batches(1), max_epochs=3, seed=1, **QUIET)
    assert equal(weights(one), weights(other))


def test_lbfgs_is_bit_equal_to_the_hand_written_loop() -> None:
    """An optimizer that needs a closure gets one; the logged loss is its first evaluation."""
    losses: list[float] = []

    class Quadratic(Net):
        @ld.configure_optimizers
        def lbfgs(self) -> torch.optim.Optimizer:
            return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)

        adam = None

    model = Quadratic()
    run = ld.fit(model, batches(3), max_epochs=2, seed=SEED, log_every_n_steps=1, **QUIET)
    expected = Net()
    optimizer, micro_batch = torch.optim.LBFGS(expected.parameters(), lr=0.5, max_iter=4), 0
    for _ in range(2):
        for x, y in batches(3):

            def closure(x: torch.Tensor = x, y: torch.Tensor = y, k: int = micro_batch) -> torch.Tensor:
                torch.manual_seed(seeds.step_seed(SEED, 0, k))
                optimizer.zero_grad()
                loss = F.cross_entropy(expected(x), y)
                loss.backward()
                return loss

            losses.append(float(optimizer.step(closure).detach()))
            micro_batch += 1
    assert equal(weights(model), weights(expected))
    logged = [r["train/loss"] for r in run.history if "train/loss" in r]
    assert logged == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_clipping_is_torchs(algorithm: Any) -> None:
    """Both algorithms end bit-equal to torch's own functions called by hand."""
    model, expected = Net(), Net()
    ld.fit(
        model, batches(), max_epochs=2, seed=SEED, gradient_clip_val=0.01, gradient_clip_algorithm=algorithm, **QUIET
    )
    clip = torch.nn.utils.clip_grad_norm_ if algorithm == "norm" else torch.nn.utils.clip_grad_value_
    optimizer = torch.optim.Adam(expected.parameters(), lr=expected.lr)
    for k, (x, y) in enumerate(batches() * 2):
        torch.manual_seed(seeds.step_seed(SEED, 0, k))
        optimizer.zero_grad()
        F.cross_entropy(expected(x), y).backward()
        clip(expected.parameters(), 0.01)
        optimizer.step()
    assert equal(weights(model), weights(expected))


def test_bf16_runs_the_steps_own_calls_under_autocast() -> None:
    """Calls of a layer inside the step see bf16; the weights stay float32; the loss agrees with autocast by hand."""
    kinds: list[torch.dtype] = []

    class Half(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y = batch
            hidden = self.body[0](x)
            kinds.append(hidden.dtype)
            return F.cross_entropy(self.body(x), y)

    model = Half(dropout=0.0)
    run = ld.fit(model, batches(1), max_epochs=1, precision="bf16-mixed", **QUIET)
    assert kinds == [torch.bfloat16]
    assert all(p.dtype == torch.float32 for p in model.parameters())
    x, y = batches(1)[0]
    fresh = Net(dropout=0.0)
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(fresh(x), y)
    assert run.metrics["train/loss"] == pytest.approx(float(loss.detach()), rel=1e-6)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    """Random augmentation through torch, NumPy and random: 0, 1 and 2 workers end bit-equal."""
    ends = []
    for n in (0, workers):
        loader = DataLoader(Augmented(), batch_size=5, shuffle=True, num_workers=n, persistent_workers=n == 2)
        model = Net()
        ld.fit(model, loader, max_epochs=2, seed=SEED, **QUIET)
        ends.append(weights(model))
    assert equal(*ends)


class Augmented(torch.utils.data.Dataset[Any]):
    """Samples that are different each time they are read."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        import random

        import numpy

        x = torch.full((4,), float(i)) + torch.randn(4)
        return x + float(numpy.random.rand()) + random.random(), i % 3
