"""`explain` shows what a run would call, and calls nothing."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightdeco as ld
from lightdeco.explain import explain
from tests.models import QUIET, Net, batches


class Watch:
    """Listens to a few events."""

    @ld.on_fit_start
    def begin(self, run: Any) -> None:
        raise AssertionError("nothing may be called")

    @ld.on("train_batch_end", every=10)
    def look(self, batch_idx: int, outputs: Any) -> None:
        raise AssertionError("nothing may be called")


class Untouched:
    """A data object and dataset of which nothing may run."""

    @ld.setup
    def make(self, stage: str) -> None:
        raise AssertionError("nothing may be called")

    @ld.train_dataloader
    def training(self) -> Any:
        raise AssertionError("nothing may be called")

    def __len__(self) -> int:
        raise AssertionError("nothing may be called")

    def __getitem__(self, i: int) -> Any:
        raise AssertionError("nothing may be called")


class Careful(Net):
    """Whose optimizer may not be asked for."""

    def adam(self) -> torch.optim.Optimizer:
        raise AssertionError("nothing may be called")


def test_nothing_runs_and_nothing_is_written(tmp_path: Path) -> None:
    """No method of model, data or callbacks is called, no loader measured, no file made, no random number drawn."""
    model, state = Careful(), torch.get_rng_state()
    text = explain(model, Untouched(), max_epochs=2, callbacks=[Watch()])
    assert 'Untouched.make("fit")' in text
    assert "train_loader = Untouched.training()" in text
    assert "optimizer, scheduler = Careful.adam()" in text
    stream: Any = Untouched()
    given = explain(model, DataLoader(stream, batch_size=4, sampler=[0]), max_epochs=2)
    assert "train_loader = a DataLoader over a Untouched, batch_size=4, as given" in given
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(torch.get_rng_state(), state)


def test_each_listener_is_there_with_its_place() -> None:
    """Every hook of the run is one line, with a file and line that lead to it, in one column."""
    text = explain(Net(), (batches(), batches()), max_epochs=2, callbacks=[Watch()], **QUIET)
    here = Path(__file__).read_text(encoding="utf-8").splitlines()
    for call, wanted in (("Watch.begin(run)", "on_fit_start"), ("Watch.look(batch_idx, outputs)", "train_batch_end")):
        line = next(line for line in text.splitlines() if call in line)
        place = re.search(r"test_explain\.py:(\d+)$", line)
        assert place
        assert wanted in here[int(place[1]) - 1]
    assert "on_train_batch_end, every 10 times: Watch.look" in text
    columns = {match.end() for line in text.splitlines() if (match := re.search(r"  (?=\S+:\d+$)", line))}
    assert len(columns) == 1


def test_what_is_absent_is_left_out() -> None:
    """A bare run has no word of validation, clipping, windows, loggers, checkpoints or callbacks."""
    text = explain(Net(), batches(), max_epochs=2, checkpoint=False, on_nan="ignore", **QUIET).partition("\n\n")[2]
    for absent in (
        "valid",
        "clip",
        "window",
        "tensorboard",
        "checkpoint",
        "callback",
        "on_train",
        "autocast",
        "compile",
    ):
        assert absent not in text, absent
    assert "for each epoch, until 2 are done:" in text


def test_settings_stand_where_they_act() -> None:
    """Limits, clipping, accumulation, precision, validation, loggers, checkpoints, compile and on_nan with values."""
    text = explain(
        Net(), {"train": batches(), "val": batches()}, max_epochs=9, max_steps=70, max_time=60, min_steps=5,
        gradient_clip_val=0.5, accumulate_grad_batches=4, precision="bf16", val_check_interval=2,
        check_val_every_n_epoch=3, limit_train_batches=3, limit_val_batches=1, logger=["csv"], compile=True,
        checkpoint=ld.ModelCheckpoint(every_n_steps=7), on_nan="skip", log_every_n_steps=5, seed=4,
        callbacks=[ld.EarlyStopping(patience=5)], resume="auto", name="mine",
    )  # fmt: skip
    order = (
        "callbacks: EarlyStopping(patience=5), ModelSummary(), ProgressBar()",
        "seed torch, NumPy and random with 4",
        "go on from a checkpoint: resume='auto'",
        "steps under autocast: bf16-mixed",
        "compile the model's forward",
        "make runs/mine; log to metrics.jsonl, csv",
        "for each epoch, until 9 are done or global_step is 70 or 60 s have passed (should_stop ends it too",
        "for each batch of train_loader (the first 3):",
        "at the beginning of a window of 4 batches:",
        "outputs = Net.step(batch)",
        "loss.backward()",
        "leave this update out where the loss or a gradient is not finite (on_nan='skip')",
        "clip the gradients: norm at most 0.5",
        "optimizer.step(); global_step += 1",
        "every 5 steps: record train/… in metrics.jsonl, csv",
        "every 2 batches, every 3 epochs: validate, in eval mode and torch.inference_mode:",
        "for each batch of val_loader (at most 1):",
        "outputs = Net.check(batch)",
        "where a checkpoint is due (ModelCheckpoint(every_n_steps=7)):",
        "on_train_epoch_end: EarlyStopping._epoch_end(run)",
        "save the last checkpoint",
    )
    at = 0
    for line in order:
        assert line in text[at:], f"{line!r} is not there, or too early, in\n{text}"
        at = text.index(line, at)


def test_overrides_replace_what_torch_would_do() -> None:
    """A marked method stands in place of the default, and configure_callbacks is the one function that runs."""

    class Own(Net):
        @ld.backward
        def back(self, loss: torch.Tensor) -> None:
            loss.backward()

        @ld.configure_callbacks
        def listeners(self) -> list[object]:
            return [Watch()]

    text = explain(Own(), batches(), max_epochs=1, **QUIET)
    assert "Own.back(loss)" in text
    assert "loss.backward()" not in text
    assert "callbacks = Own.listeners()" in text
    assert "on_fit_start: Watch.begin(run)" in text


def test_wrong_arguments_are_refused_as_by_fit() -> None:
    """Settings, data and marks are checked the same way."""
    with pytest.raises(ld.SettingsError, match="did you mean 'max_epochs'"):
        explain(Net(), batches(), max_epoch=3)  # type: ignore[call-arg]  # what is tested
    with pytest.raises(ld.DataError, match="no train data"):
        explain(Net(), max_epochs=3)
