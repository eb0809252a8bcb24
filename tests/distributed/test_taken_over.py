"""What a verb that starts processes leaves in the caller's own objects: the same as on one process."""

import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import lightdeco as ld
from tests.distributed.test_fit import Net, loader
from tests.models import QUIET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="compares runs to the last bit")


class Counter:
    """Counts batches, keeps a tensor, and has a state."""

    def __init__(self) -> None:
        self.batches, self.sum = 0, torch.zeros(2)
        self.found: Any = None

    @ld.on_train_batch_end
    @ld.on_test_batch_end
    @ld.on_predict_batch_end
    def count(self) -> None:
        self.batches += 1
        self.sum += 1

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "sum": self.sum, "kinds": (1, {2})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        assert state["kinds"] == (1, {2})
        self.batches = state["batches"]
        self.sum.copy_(state["sum"])


class Stateless:
    """Counts batches, and has no state."""

    batches = 0

    @ld.on_train_batch_end
    def count(self) -> None:
        self.batches += 1


class Locked(Counter):
    """Its state cannot be sent."""

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches, "lock": threading.Lock()}


class Data:
    """A data object with a state."""

    def __init__(self, batch_size: int) -> None:
        self.batch_size, self.asked = batch_size, 0

    @ld.train_dataloader
    def train(self) -> Any:
        self.asked += 1
        return loader(self.batch_size, shuffle=True)

    @ld.val_dataloader
    @ld.test_dataloader
    def evaluated(self) -> Any:
        return loader(7)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.asked = state["asked"]


class Counting(Net):
    """Brings a callback of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.counter = Counter()

    @ld.configure_callbacks
    def more(self) -> Any:
        return [self.counter]


def _trained(folder: Path, devices: int) -> dict[str, Any]:
    """All the objects that a run was given, after it."""
    early = ld.EarlyStopping(stopping_threshold=100.0)
    # Two of a class, so that each must get its own state.
    given: dict[str, Any] = {"early": early, "timer": ld.Timer(), "spikes": ld.SpikeDetection(window=4, warmup=2)}
    given |= {"early 2": ld.EarlyStopping("val/loss", patience=9), "counter": Counter(), "none": Stateless()}
    policy, data, model = ld.ModelCheckpoint("val/loss", save_top_k=2), Data(16 // devices), Counting()
    settings: Any = {"root_dir": folder, "name": str(devices), "checkpoint": policy, "max_epochs": 3, "seed": 5}
    settings |= QUIET | {"accelerator": "cpu", "callbacks": list(given.values())}
    random = torch.get_rng_state()
    run = ld.fit(model, data, devices=devices, **settings)
    assert torch.equal(torch.get_rng_state(), random)
    assert (run.epoch, run.global_step) == (1, 6)
    assert (run.stop_reason or "").startswith("early stopping")
    return given | {"policy": policy, "data": data, "own": model.counter}


def test_callbacks_and_data_come_back_as_from_one_process(tmp_path: Path) -> None:
    """States by `state_dict`: lightdeco's callbacks, the caller's, those of `configure_callbacks`, data, policy."""
    one, two = _trained(tmp_path, 1), _trained(tmp_path, 2)
    assert two["early"].best == pytest.approx(one["early"].best)
    assert two["policy"].last == one["policy"].last == "step=00000006"
    assert two["policy"].best == (one["policy"].best[0], pytest.approx(one["policy"].best[1]))
    assert two["policy"].steps == one["policy"].steps
    assert [two["timer"].elapsed(stage) > 0 for stage in ("train", "val", "test")] == [True, True, False]
    assert len(two["spikes"]._values) == len(one["spikes"]._values) == 4  # losses, on two processes those of rank 0
    assert (two["early 2"].best, two["early 2"].waited) == (pytest.approx(one["early 2"].best), 0)
    for name in ("counter", "own"):
        assert two[name].batches == one[name].batches == 6
        assert two[name].sum.tolist() == [6.0, 6.0]
    assert two["data"].asked == one["data"].asked == 1
    assert two["none"].batches == 0  # as documented
    # The next fit starts anew, as after one process: otherwise the first of these would end it before its first step.
    for given in (one, two):
        run = ld.fit(
            Net(), Data(16), max_epochs=1, checkpoint=False, callbacks=[given["early"], given["timer"]], **QUIET
        )
        assert run.global_step == 6
        assert given["early"].best is not None
        assert given["timer"].elapsed() < 60


def test_callbacks_of_an_evaluation_come_back(tmp_path: Path) -> None:
    """Those of `test` and `predict` too; an object that goes on still goes on in the next `fit`."""
    timer, counter = ld.Timer(), Counter()
    timer.load_state_dict({"train": 100.0, "val": 100.0, "test": 100.0})
    settings: Any = {"devices": 2, "accelerator": "cpu", "callbacks": [timer, counter], "progress_bar": False}
    ld.test(Net(), Data(8), **settings)
    assert 100.0 < timer.elapsed("test") < 160
    assert counter.batches == 7  # of 14, on rank 0
    assert len(list(ld.predict(Net(), loader(7), **settings))) == 14
    assert counter.batches == 14
    ld.fit(Net(), loader(48), max_epochs=1, checkpoint=False, callbacks=[timer], **QUIET)
    assert timer.elapsed("train") > 100.0


def test_a_state_that_cannot_be_sent_is_named_and_costs_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The trained weights and the other states come back all the same."""
    locked, counter, model = Locked(), Counter(), Net()
    before = model.body[0].weight.detach().clone()
    settings: Any = {"callbacks": [locked, counter], "max_epochs": 1, "checkpoint": False, "accelerator": "cpu"}
    run = ld.fit(model, loader(8), devices=2, **settings | QUIET)
    assert (run.global_step, counter.batches, locked.batches) == (6, 6, 0)
    assert not torch.equal(model.body[0].weight, before)
    said = capfd.readouterr().err
    assert "the state of Locked cannot be sent back: cannot pickle '_thread.lock' object" in said
