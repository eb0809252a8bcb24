"""Tiny models and data that several test files share."""

import os
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightdeco as ld

#: Settings that keep a test quiet and its directory empty of logs.
QUIET: dict[str, Any] = {"logger": False, "progress_bar": False, "summary": False}

#: scripts/test_xla.sh and scripts/test_gpu.sh run tests of the core on another device than the CPU.
if os.environ.get("LIGHTDECO_TEST_ACCELERATOR"):
    QUIET["accelerator"] = os.environ["LIGHTDECO_TEST_ACCELERATOR"]


def batches(count: int = 4, size: int = 8, features: int = 4) -> list[tuple[Tensor, Tensor]]:
    """`count` batches of random features (size, features) and classes 0..2 (size,), the same every time."""
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(size, features, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


class Net(nn.Module):
    """A classifier with dropout and every step marked."""

    def __init__(self, features: int = 4, dropout: float = 0.5, lr: float = 1e-2) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.body = nn.Sequential(nn.Linear(features, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))
        self.lr = lr

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        return F.cross_entropy(self(x), y)

    @ld.validation_step
    @ld.test_step
    def check(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        x, y = batch
        logits = self(x)
        return {"loss": F.cross_entropy(logits, y), "acc": (logits.argmax(1) == y).float().mean()}

    @ld.predict_step
    def infer(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return self(batch[0])

    @ld.configure_optimizers
    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.lr)


def weights(model: nn.Module) -> list[Tensor]:
    """A copy of every tensor of the model's state."""
    return [value.detach().clone() for value in model.state_dict().values()]


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether two lists of tensors are equal to the bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
