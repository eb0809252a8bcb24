"""`fit`: how long, how much data, when validation is due, schedulers, what is put back, what is refused."""

import random
import re
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

import lightdeco as ld
from tests.models import QUIET, Net, batches, equal, weights


class Watch:
    """Where validations and epochs happened, as (event, epoch, global_step)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int]] = []

    @ld.on_validation_start
    def validation(self, run: ld.Run) -> None:
        self.seen.append(("val", run.epoch, run.global_step))

    @ld.on_train_epoch_end
    def epoch(self, run: ld.Run) -> None:
        self.seen.append(("epoch", run.epoch, run.global_step))


class Endless(IterableDataset[Any]):
    """A stream without length."""

    def __init__(self, count: int | None = None) -> None:
        self.count = count

    def __iter__(self) -> Any:
        generator = torch.Generator().manual_seed(1)
        n = 0
        while self.count is None or n < self.count:
            yield torch.randn(4, generator=generator), n % 3
            n += 1


def fit(data: Any = None, model: Any = None, **settings: Any) -> ld.Run:
    return ld.fit(model or Net(), batches() if data is None else data, **(QUIET | settings))


# ---- how long ----


@pytest.mark.parametrize(
    ("settings", "steps", "epochs", "reason"),
    [
        ({"max_epochs": 2}, 8, 2, "max_epochs"),
        ({"max_steps": 6}, 6, 1, "max_steps"),
        ({"max_steps": 8}, 8, 2, "max_steps"),
        ({"max_epochs": 1, "max_steps": 100}, 4, 1, "max_epochs"),
        ({"max_time": 1e-9}, 0, 0, "max_time"),
        ({"max_epochs": 2, "limit_train_batches": 3}, 6, 2, "max_epochs"),
        ({"max_epochs": 1, "limit_train_batches": 0.5}, 2, 1, "max_epochs"),
        ({"fast_dev_run": True}, 1, 1, "max_epochs"),
        ({"fast_dev_run": 3}, 3, 1, "max_epochs"),
        ({"max_epochs": 2, "accumulate_grad_batches": {0: 1, 1: 2}}, 6, 2, "max_epochs"),
    ],
)
def test_how_long(settings: dict[str, Any], steps: int, epochs: int, reason: str) -> None:
    """Each limit ends the run at its number of steps and epochs and is named as the reason."""
    run = fit(**settings)
    assert (run.global_step, run.epoch, run.stop_reason) == (steps, epochs, reason)


def test_should_stop_ends_the_run_at_the_next_step_but_not_before_the_minimum() -> None:
    """`run.should_stop = True` is obeyed once min_epochs and min_steps are reached."""

    class Stop:
        @ld.on_train_batch_end
        def stop(self, run: ld.Run) -> None:
            run.should_stop = True

    assert fit(callbacks=Stop(), max_epochs=5).global_step == 1
    assert fit(callbacks=Stop(), max_epochs=5, min_steps=3).global_step == 3
    run = fit(callbacks=Stop(), max_epochs=5, min_epochs=2)
    assert (run.global_step, run.epoch, run.stop_reason) == (8, 2, "should_stop")


def test_a_stream_without_length_trains_until_max_steps() -> None:
    """An endless iterable dataset needs only max_steps."""
    run = fit(DataLoader(Endless(), batch_size=4), max_steps=5)
    assert (run.global_step, run.epoch, run.num_train_batches) == (5, 0, None)
    assert run.metrics["train/loss"] > 0


# ---- when validation is due ----


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [("val", 0, 4), ("epoch", 0, 4), ("val", 1, 8), ("epoch", 1, 8)]),
        ({"val_check_interval": 3}, [("val", 0, 3), ("epoch", 0, 4), ("val", 1, 7), ("epoch", 1, 8)]),
        (
            {"val_check_interval": 0.5},
            [("val", 0, 2), ("val", 0, 4), ("epoch", 0, 4), ("val", 1, 6), ("val", 1, 8), ("epoch", 1, 8)],
        ),
        ({"check_val_every_n_epoch": 2}, [("epoch", 0, 4), ("val", 1, 8), ("epoch", 1, 8)]),
        ({"limit_val_batches": 0}, [("epoch", 0, 4), ("epoch", 1, 8)]),
    ],
)
def test_when_validation_is_due(settings: dict[str, Any], expected: list[Any]) -> None:
    """At the end of each epoch, every n batches, at a share of the epoch, every n epochs, never."""
    watch = Watch()
    fit((batches(), batches(2)), callbacks=watch, max_epochs=2, num_sanity_val_steps=0, **settings)
    assert watch.seen == expected


def test_a_wrong_length_does_not_decide_when_validation_runs() -> None:
    """Iteration is trusted, `__len__` is not: too many and too few announced batches end the same."""

    class Lying(list[Any]):
        def __len__(self) -> int:
            return 9

        def __iter__(self) -> Any:
            return iter(batches(4))

    watch = Watch()
    run = fit((Lying([1]), batches(1)), callbacks=watch, max_epochs=2, num_sanity_val_steps=0)
    assert watch.seen == [("val", 0, 4), ("epoch", 0, 4), ("val", 1, 8), ("epoch", 1, 8)]
    assert run.epoch == 2


def test_the_sanity_check_leaves_no_trace() -> None:
    """It fires events but records nothing, and training goes on as if it had not been."""
    with_check, without = Net(), Net()
    one = fit((batches(), batches()), with_check, max_epochs=1, seed=0, num_sanity_val_steps=2)
    other = fit((batches(), batches()), without, max_epochs=1, seed=0, num_sanity_val_steps=0)
    assert equal(weights(with_check), weights(without))
    assert [r["stage"] for r in one.history] == [r["stage"] for r in other.history] == ["val", "train"]


def test_events_of_the_sanity_check_see_its_metrics_which_are_forgotten() -> None:
    """A callback that reads val/loss need not know of the sanity check; afterwards the metric is gone."""
    seen: list[tuple[str, bool]] = []

    class Looking:
        @ld.on_validation_end
        def look(self, run: ld.Run) -> None:
            seen.append((run.stage, "val/loss" in run.metrics))

        @ld.on_train_start
        def start(self, run: ld.Run) -> None:
            seen.append((run.stage, "val/loss" in run.metrics))

    fit((batches(), batches()), callbacks=Looking(), max_epochs=1)
    assert seen == [("sanity", True), ("train", False), ("val", True)]


def test_overfit_batches_are_the_same_in_every_epoch() -> None:
    """A shuffled loader gives the same few batches each epoch."""
    seen: list[Any] = []

    class Looking(Net):
        @ld.on_train_batch_start
        def look(self, batch: Any) -> None:
            seen.append(batch[0])

    data = [(torch.randn(4), i % 3) for i in range(40)]
    fit(DataLoader(data, batch_size=4, shuffle=True), Looking(), max_epochs=3, overfit_batches=2)
    assert len(seen) == 6
    assert all(torch.equal(seen[i], seen[i % 2]) for i in range(6))


def test_loaders_are_made_anew_every_n_epochs() -> None:
    """`reload_dataloaders_every_n_epochs` calls the marked method again."""
    made: list[int] = []

    class Data:
        @ld.train_dataloader
        def train(self, run: ld.Run) -> Any:
            made.append(run.epoch)
            return batches(1)

    fit(Data(), max_epochs=4, reload_dataloaders_every_n_epochs=2)
    assert made == [0, 2]


# ---- schedulers ----


def scheduled(make: Any, **optim: Any) -> tuple[Any, list[float]]:
    rates: list[float] = []

    class Scheduled(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return ld.Optim(optimizer, make(optimizer), **optim)

        @ld.on_train_batch_end
        def look(self) -> None:
            rates.append(ld.optimizers().param_groups[0]["lr"])  # type: ignore[union-attr]

    return Scheduled(), rates


def test_schedulers_step_by_epoch_by_step_and_every_n() -> None:
    """An epoch scheduler steps after each epoch, a step scheduler after each update, `every` counts them."""

    def half(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)

    cases = [
        ({}, [1, 1, 0.5, 0.5, 0.25, 0.25]),
        ({"interval": "step"}, [0.5, 0.25, 0.125, 0.0625, 0.03125, 0.015625]),
        ({"every": 2}, [1, 1, 1, 1, 0.5, 0.5]),
        ({"interval": "step", "every": 4}, [1, 1, 1, 0.5, 0.5, 0.5]),
    ]
    for optim, expected in cases:
        model, rates = scheduled(half, **optim)
        fit(batches(2), model, max_epochs=3)
        assert rates == expected


def test_one_update_is_one_step_of_the_scheduler_under_accumulation() -> None:
    """Step schedulers count updates, not batches."""
    model, rates = scheduled(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5), interval="step")
    fit(batches(4), model, max_epochs=1, accumulate_grad_batches=2)
    assert rates == [1, 0.5, 0.5, 0.25]


def test_a_plateau_scheduler_gets_its_metric() -> None:
    """ReduceLROnPlateau follows val/loss, or the metric that is named; a wrong name is an error with the nearest."""

    def plateau(optimizer: Any) -> Any:
        # Nothing is ever an improvement by so much: each epoch but the first is a bad one.
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau
        return scheduler(optimizer, patience=0, factor=0.5, threshold=9, threshold_mode="abs")

    for monitor in (None, "val/acc", "train/loss"):
        model, rates = scheduled(plateau, monitor=monitor)
        fit((batches(1), batches(1)), model, max_epochs=3)
        assert rates == [1, 1, 0.5]
    model, _ = scheduled(plateau, monitor="val/los")
    with pytest.raises(ld.SettingsError, match=r"'val/los'.*did you mean 'val/loss'"):
        fit((batches(1), batches(1)), model, max_epochs=1)


# ---- what goes wrong ----


class NaN(Net):
    """Its loss is NaN at batch 2 of epoch 1."""

    @ld.training_step
    def step(self, batch: Any, batch_idx: int, run: ld.Run) -> Any:
        x, y = batch
        bad = float("nan") if run.epoch == 1 and batch_idx == 2 else 1.0
        return F.cross_entropy(self(x), y) * bad


def test_a_loss_that_is_not_finite_names_its_step() -> None:
    """It is found at the next record, before validation and at the epoch's end, and the first bad step is named."""
    with pytest.raises(ld.StepError, match=r"batch 2 of epoch 1, global_step 7"):
        fit(model=NaN(), max_epochs=3)


def test_on_nan_skip_leaves_the_update_out_and_counts_it() -> None:
    """Neither weights nor global_step nor scheduler move with a skipped update."""
    model = NaN()
    run = fit(model=model, max_epochs=2, on_nan="skip")
    assert (run.global_step, run.progress.skipped_updates, run.progress.micro_batch) == (7, 1, 8)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_on_nan_ignore_goes_on() -> None:
    """With "ignore" nothing is checked."""
    run = fit(model=NaN(), max_epochs=2, on_nan="ignore")
    assert run.global_step == 8


def test_detect_anomaly_finds_the_operation() -> None:
    """Anomaly mode is on inside and off afterwards."""

    class Root(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            return (self(batch[0]).sum() * 0).sqrt().sum() * torch.tensor(float("inf"))

    with pytest.warns(UserWarning, match="Error detected|Anomaly"), pytest.raises(RuntimeError, match="nan"):
        fit(model=Root(), max_epochs=1, detect_anomaly=True)
    assert not torch.is_anomaly_enabled()


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "returned no loss"),
        (1.0, "returned a float"),
        ("text", "returned a str"),
        (torch.zeros(3), r"tensor of shape \(3,\)"),
        (torch.tensor(1.0), "without gradient"),
        ({"acc": 1.0}, 'no loss; .* "loss"'),
        ({"loss": 2.0}, 'a float under "loss"'),
        ({"loss": torch.zeros(2)}, r'shape \(2,\) under "loss"'),
        ({1: 2}, "the key 1"),
        ({"loss": "grad", "weight": "x"}, '"weight"'),
        ({"loss": "grad", "weight": -1}, '"weight": -1'),
        ({"loss": "grad", "batch_size": 0}, '"batch_size": 0'),
        ({"loss": "grad", "batch_size": True}, '"batch_size": True'),
        ([1, 2], "returned a list"),
    ],
)
def test_a_step_that_returns_the_wrong_thing(returned: Any, message: str) -> None:
    """StepError names the step with its place, what it returned and what to return; nothing is trained."""

    class Wrong(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            if isinstance(returned, dict) and returned.get("loss") == "grad":
                return returned | {"loss": self(batch[0]).mean()}
            return returned

    model = Wrong()
    before = weights(model)
    with pytest.raises(ld.StepError, match=rf"Wrong\.step \(.*test_fit\.py:\d+\).*{message}"):
        fit(model=model, max_epochs=1)
    assert equal(before, weights(model))


def test_stop_iteration_in_a_step_ends_the_run_with_that_error() -> None:
    """It must not end the epoch in silence."""

    class Stopping(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            raise StopIteration("mine")

        @ld.validation_step
        def check(self, batch: Any) -> Any:
            raise StopIteration("mine")

        @ld.predict_step
        def infer(self, batch: Any) -> Any:
            raise StopIteration("mine")

    with pytest.raises(StopIteration, match="mine"):
        fit(model=Stopping(), max_epochs=1)
    with pytest.raises(StopIteration, match="mine"):
        ld.validate(Stopping(), batches(), **QUIET)
    with pytest.raises(RuntimeError, match="StopIteration"):  # what Python makes of it in a generator
        list(ld.predict(Stopping(), batches(), **QUIET))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "empty"),
        (([(1, 2)], []), "val loader is empty"),
        (5, "int"),
        (iter([]), "yielded no batch in epoch 0"),
        ({"trian": []}, "'train'"),
        (torch.zeros(3, 4), "Tensor"),
        (None, "no train data"),
    ],
)
def test_wrong_data_is_refused_before_training(data: Any, message: str) -> None:
    """DataError says what was given and what is allowed."""
    with pytest.raises(ld.DataError, match=re.escape(message)):
        ld.fit(Net(), data, max_epochs=1, **QUIET)


def test_an_iterator_that_is_used_up_says_so() -> None:
    """A generator lasts one epoch; the second one explains."""
    with pytest.raises(ld.DataError, match="only once"):
        fit(iter(batches()), max_epochs=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "max_epochs"),
        ({"max_epochs": 0}, "max_epochs"),
        ({"max_epoch": 1}, "did you mean 'max_epochs'"),
        ({"max_epochs": True}, "max_epochs"),
        ({"max_epochs": 1, "name": "../x"}, "name"),
        ({"max_epochs": 1, "name": "a\0b"}, "name"),
        ({"max_epochs": 1, "name": "x" * 300}, "name"),
        ({"max_epochs": 1, "val_check_interval": 9}, "val_check_interval=9 is more than the 4 batches"),
        ({"max_epochs": 1, "gradient_clip_val": float("nan")}, "gradient_clip_val"),
    ],
)
def test_wrong_settings_are_refused_before_training(settings: dict[str, Any], message: str) -> None:
    """SettingsError, a ValueError, names the setting, and no step runs."""
    model = Net()
    before = weights(model)
    with pytest.raises(ld.SettingsError, match=message) as caught:
        fit((batches(), batches()), model, **settings)
    assert isinstance(caught.value, ValueError)
    assert equal(before, weights(model))


def test_shares_of_an_unknown_length_are_refused() -> None:
    """A share needs a length, and the message says to give a number."""
    stream = DataLoader(Endless(8), batch_size=4)
    with pytest.raises(ld.SettingsError, match=r"limit_train_batches=0\.5 is a share"):
        fit(stream, max_epochs=1, limit_train_batches=0.5)
    with pytest.raises(ld.SettingsError, match=r"val_check_interval=0\.5 is a share"):
        fit((stream, batches()), max_epochs=1, val_check_interval=0.5)


def test_a_root_directory_that_cannot_be_written(tmp_path: Path) -> None:
    """It is refused before the first batch."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ld.SettingsError, match="root_dir"):
        fit(max_epochs=1, root_dir=tmp_path / "file")


def test_settings_without_effect_warn() -> None:
    """No value is silently ignored."""
    with pytest.warns(ld.LightdecoWarning, match="gradient_clip_algorithm has no effect"):
        fit(max_epochs=1, gradient_clip_algorithm="value")
    with pytest.warns(ld.LightdecoWarning, match="val_check_interval=2 has no effect"):
        fit(max_epochs=1, val_check_interval=2)
    with pytest.warns(ld.LightdecoWarning, match="reload_dataloaders_every_n_epochs has no effect"):
        fit(max_epochs=1, reload_dataloaders_every_n_epochs=2)


# ---- what is put back ----


class Augmenting(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 6

    def __getitem__(self, i: int) -> Any:
        return torch.randn(4) + numpy.random.rand() + random.random(), i % 3


def test_every_verb_leaves_the_process_as_it_was() -> None:
    """Random state of torch, NumPy and random, modes, accelerate's state, and the default seed are as before."""
    from accelerate.state import AcceleratorState, PartialState

    model = Net()
    model.body[2].eval()
    data = DataLoader(Augmenting(), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    verbs: list[Any] = [
        lambda: ld.fit(model, (data, data), max_epochs=1, **QUIET),
        lambda: ld.validate(model, data, **QUIET),
        lambda: ld.test(model, data, **QUIET),
        lambda: list(ld.predict(model, data, **QUIET)),
    ]
    for verb in verbs:
        state = torch.get_rng_state(), numpy.random.get_state()[1].copy(), random.getstate()  # type: ignore[union-attr]
        shared = dict(PartialState._shared_state), dict(AcceleratorState._shared_state)
        verb()
        assert torch.equal(state[0], torch.get_rng_state())
        assert (state[1] == numpy.random.get_state()[1]).all()
        assert state[2] == random.getstate()
        assert shared == (PartialState._shared_state, AcceleratorState._shared_state)
        assert [m.training for m in model.body] == [True, True, False, True]


def test_a_frozen_submodule_stays_in_eval() -> None:
    """A root in training mode keeps each submodule's own mode in training, and after each validation."""
    modes: list[list[bool]] = []

    class Frozen(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(4).eval()

        @ld.on_train_batch_start
        def look(self) -> None:
            modes.append([self.training, self.norm.training, self.body.training])

    fit((batches(2), batches(1)), Frozen(), max_epochs=2)
    assert modes == [[True, False, True]] * 4


def test_a_root_in_eval_mode_is_put_into_train_with_a_warning() -> None:
    """The whole module trains, and is back in eval afterwards."""
    model = Net().eval()
    with pytest.warns(ld.LightdecoWarning, match="was in eval mode"):
        fit(model=model, max_epochs=1)
    assert not any(m.training for m in model.modules())


def test_a_verb_inside_a_verb_has_a_run_of_its_own() -> None:
    """Validation by `ld.validate` from an event does not disturb the training around it."""
    results: list[float] = []

    class Inner(Net):
        @ld.on_train_epoch_end
        def again(self) -> None:
            results.append(ld.validate(self, batches(2), **QUIET)["val/loss"])

    model, plain = Inner(), Net()
    run = fit(model=model, max_epochs=2, seed=4)
    other = fit(model=plain, max_epochs=2, seed=4)
    assert equal(weights(model), weights(plain))
    assert len(results) == 2
    assert run.metrics == other.metrics
