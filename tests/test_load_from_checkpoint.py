"""`Net.load_from_checkpoint`: a model from a checkpoint alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from tests.models import QUIET, weights


class Net(ld.LightdecoMixin, nn.Module):
    """Keeps its hyperparameters."""

    def __init__(self, width: int, lr: float = 0.1, keep: bool = True) -> None:
        super().__init__()
        if keep:
            self.save_hyperparameters()
        self.net, self.lr = nn.Linear(4, width), lr

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        return self.net(batch).square().mean()

    @ld.configure_optimizers
    def optimizer(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_model_is_made_from_its_checkpoint(tmp_path: Path) -> None:
    """The hyperparameters and the weights are those of the run; arguments given stand before them."""
    model = Net(width=3, lr=0.2)
    run = model.fit([torch.ones(2, 4)] * 3, max_epochs=1, root_dir=tmp_path, **QUIET)
    assert run.last_checkpoint is not None
    again = Net.load_from_checkpoint(run.last_checkpoint)
    assert (again.lr, again.hparams.width) == (0.2, 3)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(model), strict=True))
    assert Net.load_from_checkpoint(run.last_checkpoint, lr=0.5).lr == 0.5


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    """A model that kept nothing needs its arguments; a model of another shape is refused with the difference."""
    run = Net(width=3, keep=False).fit([torch.ones(2, 4)], max_epochs=1, root_dir=tmp_path, **QUIET)
    assert run.last_checkpoint is not None
    with pytest.raises(ld.CheckpointError, match=r"no value for width of Net"):
        Net.load_from_checkpoint(run.last_checkpoint)
    assert Net.load_from_checkpoint(run.last_checkpoint, width=3).lr == 0.1
    with pytest.raises(ld.CheckpointError, match=r"does not fit Net"):
        Net.load_from_checkpoint(run.last_checkpoint, width=5)
