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


def body(model: Any, **settings: Any) -> list[str]:
    """The lines of one batch, without the places."""
    text = explain(model, batches(), max_epochs=1, logger=False, checkpoint=False, **settings)
    lines = [re.split(r"  +\S*test_explain.py", line)[0].rstrip() for line in text.splitlines()]
    return lines[next(i for i, line in enumerate(lines) if "for each batch" in line) + 1 :]


class Pair(torch.nn.Module):
    """Two optimizers, each with a step."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

    @ld.training_step(optimizer="b", every=2)
    def first(self, batch: Any) -> Any:
        return self.b(batch[0]).mean()

    @ld.training_step(optimizer="a")
    def second(self, batch: Any) -> Any:
        return self.a(batch[0]).mean()

    @ld.configure_optimizers
    def make(self) -> Any:
        return {name: torch.optim.SGD(getattr(self, name).parameters(), 0.1) for name in ("a", "b")}


def test_several_optimizers_each_have_a_block_with_their_update() -> None:
    """torch is seeded once, each step has its own update, and the batch is counted once."""
    lines = [line.strip() for line in body(Pair(), gradient_clip_val=1.0)]
    assert lines[:15] == [
        "optimizer 'b', for batches 0, 2, 4, …, while only its parameters require grad:",
        "optimizer.zero_grad()",
        "seed torch with seeds.step_seed(seed, rank, micro_batch)",
        "outputs = Pair.first(batch)",
        "loss.backward()",
        "clip the gradients: norm at most 1.0",
        "optimizer.step()",
        "by step, if configure_optimizers made one: scheduler.step()",
        "optimizer 'a', while only its parameters require grad:",
        "optimizer.zero_grad()",
        "outputs = Pair.second(batch)",
        "loss.backward()",
        "clip the gradients: norm at most 1.0",
        "optimizer.step()",
        "by step, if configure_optimizers made one: scheduler.step()",
    ]
    assert lines[15] == "global_step += 1, if any optimizer was updated"


def test_a_manual_step_has_no_update_of_the_loop() -> None:
    """What the step calls is there with who listens; what only the loop does is not."""

    class Manual(Pair):
        first = second = None

        @ld.training_step(manual=True)
        def both(self, batch: Any) -> None: ...

        @ld.on_before_optimizer_step
        def look(self, optimizer: Any) -> None: ...

    lines = body(Manual(), accumulate_grad_batches=2, gradient_clip_val=0.5)
    text = "\n".join(lines)
    assert "zero_grad()" not in text
    assert "scheduler" not in text
    at = [line.strip() for line in lines].index("the step clears and updates by itself; when it calls")
    assert [line.strip() for line in lines[at + 1 : at + 8]] == [
        "ld.backward:",
        "loss.backward()",
        "ld.clip_gradients:",
        "clip the gradients: norm at most 0.5",
        "optimizer.step:",
        "on_before_optimizer_step: Manual.look(optimizer)",
        "optimizer.step and zero_grad, ld.clip_gradients: nothing, until 2 batches have come",
    ]
    half = "\n".join(body(Manual(), precision="16-mixed", devices=2))
    assert half.index("optimizer.step, first: average its gradients") < half.index("optimizer.step, first: unscale")


def test_parts_of_a_batch_precision_memory_and_profiler() -> None:
    """split_batch has a loop of its own, true precision no autocast, and both settings a line where they act."""

    class Split(Net):
        @ld.split_batch
        def split(self, batch: Any) -> Any:
            return [batch]

    lines = [line.strip() for line in body(Split(), oom="micro")]
    assert lines[:4] == [
        "seed torch with seeds.step_seed(seed, rank, micro_batch)",
        "parts = Split.split(batch)",
        "for each part, with the carry of the one before:",
        "optimizer.zero_grad()",
    ]
    assert not any("oom" in line for line in lines)
    assert any("oom='micro'" in line for line in body(Net(), oom="micro"))
    text = explain(Net(), batches(), max_epochs=1, precision="bf16-true", profiler="simple")
    assert "weights and inputs in: bf16-true" in text
    assert "profiler='simple'" in text
    assert "autocast" not in text


def test_several_processes_are_told() -> None:
    """Where processes come from, how batches are dealt out, when gradients are averaged, what comes back."""
    text = ld.explain(Net(), batches(), max_epochs=1, devices=3, accelerator="cpu")
    lines = [line.strip() for line in text.splitlines()]
    order = [
        "start 3 new interpreters, each with a copy of model, data and settings; in each of them:",
        "process r reads batches r, r + 3, r + 6, … of its loaders",
        "loss.backward()",
        "average the gradients over the 3 processes, in backward, so that each sample counts the same",
        "the processes end; the model here gets the trained weights, and fit returns the Run",
    ]
    places = [lines.index(line) for line in order]
    assert places == sorted(places)
    window = ld.explain(Net(), batches(), max_epochs=1, devices=[0, 1], accumulate_grad_batches=2)
    assert "average the gradients over the 2 processes, so that each sample counts the same" in window
    assert "processes" not in ld.explain(Net(), batches(), max_epochs=1, accelerator="cpu")
