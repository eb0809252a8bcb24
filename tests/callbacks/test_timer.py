"""The timer: what is counted, once, across runs and resumed ones."""

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.callbacks.timer import Timer
from tests.models import QUIET, Net, batches, equal, weights


class Slow(Net):
    """A net whose training batches take 5 ms and whose evaluation batches take 20 ms, at least."""

    @ld.on_train_batch_end
    def slow(self) -> None:
        time.sleep(0.005)

    @ld.on_validation_batch_end
    @ld.on_test_batch_end
    def slower(self) -> None:
        time.sleep(0.02)


def fit(timer: Timer, model: Net | None = None, **settings: Any) -> ld.Run:
    """A fit of one epoch of 4 batches with validation on 2."""
    data = settings.pop("data", (batches(), batches(2)))
    return ld.fit(model or Slow(), data, callbacks=[timer], **({"max_epochs": 1} | QUIET | settings))


def test_counts_each_stage_once() -> None:
    """Validation inside of training counts as validation alone, and the sanity check as nothing."""
    timer = Timer()
    began = time.perf_counter()
    fit(timer, num_sanity_val_steps=2)
    all_in_all = time.perf_counter() - began
    train, val = timer.elapsed("train"), timer.elapsed("val")
    assert train >= 0.02
    assert val >= 0.04
    assert train + val <= all_in_all - 0.04  # the sanity check's two batches
    assert timer.elapsed("test") == 0


def test_runs_while_asked() -> None:
    """During a run `elapsed` grows; afterwards it stands still."""
    timer, seen = Timer(), []

    class Ask:
        @ld.on_train_batch_end
        def ask(self) -> None:
            seen.append(timer.elapsed())

    ld.fit(Slow(), batches(), max_epochs=1, callbacks=[timer, Ask()], **QUIET)
    assert seen == sorted(seen)
    assert seen[-1] - seen[0] >= 0.015
    assert timer.elapsed() == timer.elapsed() >= seen[-1]


def test_tests_add_to_a_fit_and_a_second_fit_starts_anew() -> None:
    """An evaluation adds to what a fit has counted; the next fit begins at nothing."""
    timer, model = Timer(), Slow()
    fit(timer, model)
    train, val = timer.elapsed("train"), timer.elapsed("val")
    ld.test(model, batches(2), callbacks=[timer], progress_bar=False)
    ld.validate(model, batches(2), callbacks=[timer], progress_bar=False)
    assert timer.elapsed("train") == train
    assert timer.elapsed("test") >= 0.04
    assert timer.elapsed("val") >= val + 0.04
    fit(timer, model, data=batches())
    assert (timer.elapsed("val"), timer.elapsed("test")) == (0, 0)


def test_a_test_inside_of_a_fit_is_no_training() -> None:
    """A verb inside of a fit with the same timer counts for its own stage."""
    timer = Timer()

    class Tests(Net):
        @ld.on_train_epoch_end
        def check_test(self) -> None:
            ld.test(Slow(), batches(10), callbacks=[timer], progress_bar=False)

    fit(timer, Tests(), data=batches())
    assert timer.elapsed("test") >= 0.2 > timer.elapsed("train") > 0


def test_state_survives_as_json() -> None:
    """A state that went through JSON is what the next fit adds to, and only that one."""
    timer = Timer()
    timer.load_state_dict(json.loads(json.dumps({"train": 100.0, "val": 10.0, "test": 1.0})))
    fit(timer)
    state = json.loads(json.dumps(timer.state_dict()))
    assert 100.02 <= state["train"] < 110
    assert 10.04 <= state["val"] < 20
    assert state["test"] == 1
    fit(timer)
    assert timer.elapsed() < 10


def test_failure_stops_the_clock() -> None:
    """After a run that failed in a validation, nothing goes on being counted."""
    timer = Timer()

    class Fails(Net):
        @ld.on_validation_batch_end
        def fail(self, run: ld.Run) -> None:
            if run.stage == "val":
                raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError):
        fit(timer, Fails())
    assert timer.state_dict() == timer.state_dict()
    assert timer.elapsed("val") > 0


def test_logs_only_when_asked() -> None:
    """With log=True the records of epochs, validations and tests carry seconds; without, none does."""
    run = fit(Timer())
    assert not [name for record in run.history for name in record if name.startswith("time/")]
    timer = Timer(log=True)
    run = fit(timer, max_epochs=2, num_sanity_val_steps=1)
    train = [record["time/train"] for record in run.history if "time/train" in record]
    val = [record["time/val"] for record in run.history if "time/val" in record]
    assert train[1] - train[0] >= 0.02
    assert val[1] - val[0] >= 0.04
    assert [record["stage"] for record in run.history] == ["val", "train", "val", "train"]
    assert ld.test(Slow(), batches(1), callbacks=[timer], progress_bar=False)["time/test"] >= 0.02


def test_wrong_arguments_are_refused() -> None:
    """An unknown stage is refused with the nearest name, and `log` is a bool."""
    with pytest.raises(ld.SettingsError, match=r"elapsed\('tran'\); allowed: 'train', 'val', 'test'; did you mean"):
        Timer().elapsed("tran")  # type: ignore[arg-type]
    with pytest.raises(ld.SettingsError, match=r"Timer\(log='yes'\); allowed: True, False"):
        Timer(log="yes")  # type: ignore[arg-type]


def test_leaves_no_trace() -> None:
    """Weights and random state are those of a run without it."""
    found: list[list[Tensor]] = []
    for callbacks in ([], [Timer(log=True)]):
        model = Net()
        ld.fit(model, (batches(), batches(1)), max_epochs=2, seed=1, callbacks=callbacks, **QUIET)
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(*found)
