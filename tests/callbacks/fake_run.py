"""A stand-in for a run, and for the loop that calls a callback's events."""

from pathlib import Path
from typing import Any

import torch

from lightdeco.marks import marks_of
from lightdeco.run import Progress
from lightdeco.settings import Settings


class FakeRun:
    """What callbacks read of a run, as plain attributes."""

    def __init__(self, directory: Path | None = None, max_epochs: int | None = None) -> None:
        self.epoch = self.global_step = self.batch_idx = 0
        self.progress = Progress()
        self.settings = Settings(max_epochs=max_epochs)
        self.max_epochs = max_epochs
        self.world_size = 1
        self.device = torch.device("cpu")
        self.accelerator = None
        self.num_train_batches: int | None = None
        self.num_eval_batches: int | None = None
        self.metrics: dict[str, float] = {}
        self.prog_bar: dict[str, float] = {}
        self.is_main = True
        self.stop_reason: str | None = None
        self.stage = ""
        self.eval_loaders: tuple[str | None, ...] = (None,)
        self.has_dir = directory is not None
        self.dir = directory


def call(callback: object, event: str, **offered: Any) -> None:
    """Call every method that is marked for the event, with the arguments that it names."""
    offered = {"exception": KeyboardInterrupt(), "dataloader_idx": 0} | offered
    for function in list(vars(type(callback)).values()):
        if any(mark.role == event for mark in marks_of(function)):
            names = function.__code__.co_varnames[1 : function.__code__.co_argcount]
            function(callback, **{name: offered[name] for name in names})


def fake_fit(
    callback: object, run: FakeRun, epochs: int, batches: int, val_batches: int = 0, between: Any = None
) -> None:
    """The events of a fit in their order; `between` is called in each batch."""
    call(callback, "on_fit_start", run=run)
    for _ in range(epochs):
        run.stage = "train"
        call(callback, "on_train_epoch_start", run=run)
        for run.batch_idx in range(batches):
            if between is not None:
                between()
            run.global_step += 1
            run.progress.batch += 1
            run.progress.micro_batch += 1
            run.prog_bar["train/loss"] = 1 / run.global_step
            call(callback, "on_train_batch_end", run=run)
        if val_batches:
            fake_evaluation(callback, run, "validation", val_batches, between)
            run.metrics["val/loss"] = 2 / run.global_step
        run.stage = "train"
        call(callback, "on_train_epoch_end", run=run)
        run.epoch += 1
        run.progress.batch = 0
    run.stop_reason = "max_epochs"
    call(callback, "on_fit_end", run=run)
    call(callback, "teardown", run=run, stage="fit")


def fake_evaluation(
    callback: object, run: FakeRun, kind: str, batches: int, between: Any = None, loaders: int = 1
) -> None:
    """The events of an evaluation of as many batches of each loader."""
    before = run.batch_idx
    run.stage, run.batch_idx = "val" if kind == "validation" else kind, 0
    call(callback, f"on_{kind}_start", run=run)
    for dataloader_idx in range(loaders):
        for run.batch_idx in range(batches):
            if between is not None:
                between()
            call(callback, f"on_{kind}_batch_end", run=run, dataloader_idx=dataloader_idx)
    call(callback, f"on_{kind}_end", run=run)
    run.batch_idx = before
