"""`validate`, `test` and `predict`."""

import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lightdeco as ld
from tests.models import QUIET, Net, batches, equal, weights


class Counted(Dataset[Any]):
    """Remembers which samples were read in this process."""

    def __init__(self, count: int = 12) -> None:
        self.count, self.read = count, list[int]()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> Any:
        self.read.append(i)
        return torch.full((4,), float(i)), 0


def test_evaluation_does_not_change_the_model() -> None:
    """Weights, buffers, modes and gradients are as before, running statistics included."""

    class Normed(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4)

        def forward(self, x: Any) -> Any:
            return self.body(self.norm(x))

    model = Normed()
    before = weights(model)
    for verb in (ld.validate, ld.test):
        assert verb(model, batches(), **QUIET)
    assert equal(before, weights(model))
    assert all(m.training for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_inference_mode_can_be_switched_off() -> None:
    """Steps run under inference_mode by default, under no_grad otherwise."""
    seen: list[tuple[bool, bool]] = []

    class Looking(Net):
        @ld.validation_step
        def check(self, batch: Any) -> None:
            seen.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))

    ld.validate(Looking(), batches(1), **QUIET)
    ld.validate(Looking(), batches(1), inference_mode=False, **QUIET)
    assert seen == [(True, False), (False, False)]


def test_evaluations_write_nothing_unless_they_are_asked_to(tmp_path: Path) -> None:
    """Without `logger=` in the call no directory appears; with it the record is in metrics.jsonl."""
    ld.validate(Net(), batches(1), root_dir=tmp_path, progress_bar=False)
    assert not list(tmp_path.iterdir())
    ld.test(Net(), batches(1), root_dir=tmp_path, name="tested", logger="csv", progress_bar=False)
    assert (tmp_path / "tested" / "metrics.jsonl").read_text().count('"stage": "test"') == 1


def test_two_validations_of_the_same_weights_agree_although_the_step_is_random() -> None:
    """torch's randomness in an evaluation step depends on seed, loader and batch, not on the time."""

    class Noisy(Net):
        @ld.validation_step
        def check(self, batch: Any) -> Any:
            return torch.rand(())

    first = ld.validate(Noisy(), batches(3), seed=1, **QUIET)
    assert first == ld.validate(Noisy(), batches(3), seed=1, **QUIET)
    assert first != ld.validate(Noisy(), batches(3), seed=2, **QUIET)


def test_predict_yields_one_output_per_batch_in_order() -> None:
    """Lazily: nothing runs before the first output is asked for, and one batch is read at a time."""
    data = Counted()
    outputs = ld.predict(Net(), DataLoader(data, batch_size=4), **QUIET)
    assert data.read == []
    first = next(outputs)
    assert data.read == [0, 1, 2, 3]
    rest = list(outputs)
    model = Net().eval()
    expected = [model(torch.stack([torch.full((4,), float(i)) for i in range(k, k + 4)])) for k in (0, 4, 8)]
    for output, wanted in zip([first, *rest], expected, strict=True):
        torch.testing.assert_close(output, wanted)


def test_predict_checks_its_arguments_at_the_call() -> None:
    """Not at the first output."""
    with pytest.raises(ld.SettingsError, match="did you mean 'limit_predict_batches'"):
        ld.predict(Net(), batches(), limit_predict_batch=1, **QUIET)
    with pytest.raises(ld.DataError):
        ld.predict(Net(), **QUIET)


def test_predict_gives_the_process_back_between_outputs() -> None:
    """Modes, random state and grad mode are the caller's whenever the caller has the floor."""
    model = Net()
    torch.manual_seed(5)
    expected = [torch.rand(1) for _ in range(3)]
    torch.manual_seed(5)
    for i, _ in enumerate(ld.predict(model, batches(3), **QUIET)):
        assert model.training
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert torch.equal(torch.rand(1), expected[i])


def test_predict_left_half_way_releases_its_workers_and_tears_down() -> None:
    """Closing the generator ends the workers and calls teardown."""
    ended: list[str] = []

    class Ending(Net):
        @ld.teardown
        def end(self, stage: str) -> None:
            ended.append(stage)

    outputs = ld.predict(Ending(), DataLoader(Counted(), batch_size=2, num_workers=2, persistent_workers=True), **QUIET)
    next(outputs)
    assert len(multiprocessing.active_children()) == 2
    outputs.close()  # type: ignore[attr-defined]
    assert ended == ["predict"]
    assert not multiprocessing.active_children()


def test_data_objects_bring_loaders_for_every_verb() -> None:
    """prepare_data once, then setup(stage), then the loader of the verb's stage, then teardown(stage)."""
    calls: list[str] = []

    class Data:
        @ld.prepare_data
        def download(self) -> None:
            calls.append("prepare")

        @ld.setup
        def split(self, stage: str) -> None:
            calls.append(f"setup {stage}")

        @ld.teardown
        def end(self, stage: str) -> None:
            calls.append(f"teardown {stage}")

        @ld.train_dataloader
        def train(self) -> Any:
            calls.append("train")
            return batches(1)

        @ld.val_dataloader
        def val(self) -> Any:
            calls.append("val")
            return {"a": batches(1), "b": batches(1)}

        @ld.test_dataloader
        def test(self) -> Any:
            calls.append("test")
            return batches(1)

        @ld.predict_dataloader
        def new(self) -> Any:
            calls.append("predict")
            return batches(2)

    data = Data()
    ld.fit(Net(), data, max_epochs=1, **QUIET)
    assert calls == ["prepare", "setup fit", "train", "val", "teardown fit"]
    for verb, name in ((ld.validate, "val"), (ld.test, "test"), (ld.predict, "predict")):
        calls.clear()
        result = verb(Net(), data, **QUIET)
        if verb is ld.predict:
            assert len(list(result)) == 2
        stage = verb.__name__
        assert calls == ["prepare", f"setup {stage}", name, f"teardown {stage}"]


def test_a_loader_given_comes_before_the_one_the_model_marks() -> None:
    """What is passed to the verb is used."""

    class Own(Net):
        @ld.val_dataloader
        def val(self) -> Any:
            return batches(5)

    seen: list[int] = []

    class Watch:
        @ld.on_validation_batch_start
        def look(self, batch_idx: int) -> None:
            seen.append(batch_idx)

    ld.validate(Own(), callbacks=Watch(), **QUIET)
    assert seen == [0, 1, 2, 3, 4]
    seen.clear()
    ld.validate(Own(), batches(2), callbacks=Watch(), **QUIET)
    assert seen == [0, 1]


def test_limits_cut_every_loader() -> None:
    """Numbers and shares, for each loader of the stage."""
    seen: list[tuple[int, int]] = []

    class Watch:
        @ld.on_test_batch_start
        def look(self, batch_idx: int, dataloader_idx: int) -> None:
            seen.append((dataloader_idx, batch_idx))

    data = {"test": {"a": batches(4), "b": batches(2)}}
    ld.test(Net(), data, callbacks=Watch(), limit_test_batches=0.5, **QUIET)
    assert seen == [(0, 0), (0, 1), (1, 0)]
    seen.clear()
    ld.test(Net(), data, callbacks=Watch(), limit_test_batches=3, **QUIET)
    assert seen == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]


def test_batch_transfers_may_be_changed_and_overridden() -> None:
    """The two events may return a changed batch; the override replaces the move."""
    order: list[str] = []

    class Moving(Net):
        @ld.on_before_batch_transfer
        def before(self, batch: Any, device: torch.device) -> Any:
            order.append(f"before {device}")
            return [batch[0] * 0 + 1, batch[1]]

        @ld.transfer_batch_to_device
        def move(self, batch: Any, device: torch.device) -> Any:
            order.append("move")
            return batch

        @ld.on_after_batch_transfer
        def after(self, batch: Any) -> Any:
            order.append("after")
            return [batch[0] * 2, batch[1]]

        @ld.predict_step
        def infer(self, batch: Any) -> Any:
            return batch[0]

    (output,) = ld.predict(Moving(), batches(1), **QUIET)
    assert order == ["before cpu", "move", "after"]
    assert torch.equal(output, torch.full((8, 4), 2.0))
