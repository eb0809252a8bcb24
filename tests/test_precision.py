"""`precision=`: in which numbers a model is trained."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightdeco as ld
from tests.models import QUIET, batches, weights


class Net(nn.Module):
    """Makes a tensor of its own in the step, and notes the dtypes that it sees."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)
        self.seen: set[torch.dtype] = set()

    @ld.training_step
    @ld.validation_step
    def step(self, batch: Any) -> Tensor:
        logits = self.layer(batch[0]) + torch.zeros(3)
        self.seen |= {batch[0].dtype, logits.dtype}
        assert batch[1].dtype == torch.long
        return F.cross_entropy(logits, batch[1])

    @ld.configure_optimizers
    def adam(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.05)


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_weights_inputs_and_what_steps_make_have_the_dtype(precision: Any, dtype: torch.dtype) -> None:
    """Floating inputs are converted, integers are not; the optimizer's state has the dtype; the default comes back."""
    model, data = Net(), batches(4)
    run = ld.fit(model, (data, data), max_epochs=2, precision=precision, seed=1, **QUIET)
    assert model.seen == {dtype}
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert torch.get_default_dtype() == torch.float32
    first, last = (record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record)
    assert last < first


def test_64_true_is_the_hand_written_loop_in_double() -> None:
    """To the last bit."""
    model, data = Net(), batches(4)
    ld.fit(model, data, max_epochs=2, precision="64-true", seed=1, **QUIET)
    by_hand = Net().double()
    optimizer = by_hand.adam()
    for _ in range(2):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(by_hand.layer(x.double()), y).backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights(model), weights(by_hand), strict=True))
