"""What counts as a spike, when it is told, and what is done about it."""

import math
import random
import warnings
from typing import Any

import pytest
import torch

import lightdeco as ld
from lightdeco.callbacks.spike_detection import SpikeDetection
from lightdeco.errors import LightdecoWarning, SettingsError
from tests.models import QUIET, Net


class Constant(Net):
    """Its loss is what the batch says."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return {"loss": self(torch.ones(2, 4)).sum() * 0 + batch[0].mean(), "twice": 2 * batch[0].mean()}

    @ld.validation_step
    def check(self, batch: Any) -> Any:
        return {"loss": batch[0].mean()}


def _batches(values: list[float]) -> list[Any]:
    return [(torch.full((2, 4), value), torch.zeros(2, dtype=torch.long)) for value in values]


def _noise(n: int, mean: float = 1.0, std: float = 0.05) -> list[float]:
    draw = random.Random(0)
    return [draw.gauss(mean, std) for _ in range(n)]


def _fit(values: list[float], spikes: SpikeDetection, **settings: Any) -> ld.Run:
    return ld.fit(Constant(), _batches(values), callbacks=[spikes], **(QUIET | {"max_epochs": 1} | settings))


def test_a_spike_is_told_with_its_step_and_logged() -> None:
    """One warning names value, step and what was usual; the number is in the records of training."""
    values = _noise(40)
    values[29] = 5.0
    spikes = SpikeDetection()
    with pytest.warns(
        LightdecoWarning, match=r"a spike: train/loss was 5 at step 30, and \S+ ± 0\.0\d+ before$"
    ) as told:
        run = _fit(values, spikes, log_every_n_steps=10)
    assert len(told) == 1
    assert [(spike.step, spike.value) for spike in spikes.spikes] == [(30, 5.0)]
    logged = [(r["step"], r["train/loss_spikes"]) for r in run.history if "train/loss_spikes" in r]
    assert logged == [(10, 0), (20, 0), (30, 1), (40, 0)]
    assert run.stop_reason == "max_epochs"


def test_stop_ends_the_run_and_says_why() -> None:
    """The run ends after the batch, with a reason that names the spike."""
    values = _noise(40)
    values[24] = 5.0
    with pytest.warns(LightdecoWarning, match="a spike"):
        run = _fit(values, SpikeDetection(action="stop"))
    assert run.global_step == 25
    assert run.stop_reason is not None
    assert run.stop_reason.startswith("train/loss was 5 at step 25, and 0.99")


def test_noise_a_slope_and_a_flat_curve_are_no_spikes() -> None:
    """Nothing is told of ordinary losses: noisy, falling, or flat but for rounding."""
    falling = [5 * math.exp(-i / 30) + noise for i, noise in enumerate(_noise(200, 0.1, 0.02))]
    flat = [1.0 + 1e-7 * (i % 3) for i in range(100)] + [1.05] * 5
    for values in (_noise(300), falling, flat):
        spikes = SpikeDetection()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            _fit(values, spikes)
        assert spikes.spikes == []


def test_spikes_do_not_hide_each_other_and_a_new_level_becomes_usual() -> None:
    """A second spike right after the first is found; of a level that stays, the first few values are spikes."""
    spikes = SpikeDetection(window=50)
    values = [*_noise(60), 5.0, 5.0, *_noise(10), *_noise(200, mean=3.0)]
    with pytest.warns(LightdecoWarning):
        _fit(values, spikes)
    steps = [spike.step for spike in spikes.spikes]
    assert steps[:2] == [61, 62]
    assert 72 < steps[2] < 75
    assert max(steps) < 72 + 50


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_a_spike(bad: float) -> None:
    """NaN and infinity are spikes, and spoil nothing that follows."""
    values = _noise(40)
    values[30] = bad
    values[35] = 4.0
    spikes = SpikeDetection()
    with pytest.warns(LightdecoWarning, match="a spike") as told:
        _fit(values, spikes, on_nan="ignore")
    assert f"train/loss was {bad} at step 31" in str(told[0].message)
    assert [spike.step for spike in spikes.spikes] == [31, 36]


def test_other_metrics() -> None:
    """What the step returns by batches; what validation records by records, the sanity check left out."""
    values = _noise(40)
    values[30] = 5.0
    spikes = SpikeDetection("train/twice")
    with pytest.warns(LightdecoWarning, match="train/twice was 10 at step 31"):
        _fit(values, spikes)
    spikes = SpikeDetection("val/loss", warmup=2, window=5)

    class Rising(Constant):
        count = 0

        @ld.validation_step
        def check(self, batch: Any, run: ld.Run) -> Any:
            self.count += run.stage == "val"
            return {"loss": batch[0].mean() * (10 if self.count == 4 else 1)}

    data = _batches([1.0, 1.0]), _batches([1.0])
    with pytest.warns(LightdecoWarning, match="val/loss was 10 at step 8, and 1 ± 0 before"):
        ld.fit(Rising(), data, callbacks=[spikes], **(QUIET | {"max_epochs": 5, "num_sanity_val_steps": 1}))
    assert len(spikes.spikes) == 1


def test_a_name_that_there_is_not_is_told_at_the_end() -> None:
    """The warning lists what was recorded and the nearest name."""
    with pytest.warns(LightdecoWarning, match=r"no effect.*recorded: .*did you mean 'train/loss'"):
        _fit([1.0, 1.0], SpikeDetection("train/los"))


def test_several_optimizers_and_parts_of_batches() -> None:
    """A metric of one optimizer's step is found; of a batch in parts, each part counts."""

    class Two(Constant):
        @ld.training_step(optimizer="a")
        def step(self, batch: Any) -> Any:
            return super().step(batch)

        @ld.training_step(optimizer="b")
        def other(self, batch: Any) -> Any:
            return self(torch.ones(2, 4)).sum() * 0 + 3 * batch[0].mean()

        @ld.configure_optimizers
        def adam(self) -> Any:
            first, *rest = self.parameters()
            return {"a": torch.optim.SGD([first], lr=0.1), "b": torch.optim.SGD(rest, lr=0.1)}

    class Parts(Constant):
        @ld.split_batch
        def cut(self, batch: Any) -> Any:
            return [(batch[0], batch[1]), (batch[0] * (1 + (batch[0] > 2)), batch[1])]

    values = _noise(40)
    values[30] = 5.0
    for model, name, found in ((Two(), "train/b/loss", [15.0]), (Parts(), "train/loss", [5.0, 10.0])):
        spikes = SpikeDetection(name)
        with pytest.warns(LightdecoWarning, match="a spike"):
            ld.fit(model, _batches(values), callbacks=[spikes], **(QUIET | {"max_epochs": 1}))
        assert [spike.value for spike in spikes.spikes] == found


def test_values_on_a_device_wait_for_the_record() -> None:
    """A value that would have to be waited for is judged with the next record, at its own step."""

    spikes = SpikeDetection(warmup=2, window=10)
    spikes._waiting = [(i + 1, torch.tensor(v)) for i, v in enumerate([1.0, 1.1, 1.0, 9.0, 1.0])]
    assert spikes.spikes == []
    spikes._read()
    assert [(spike.step, spike.value) for spike in spikes.spikes] == [(4, 9.0)]
    assert spikes._waiting == []


def test_it_goes_on_from_its_state() -> None:
    """Window and spikes are plain values; another object that gets them judges the next run as this one would."""
    values = _noise(40)
    values[30] = 5.0
    spikes = SpikeDetection()
    with pytest.warns(LightdecoWarning, match="a spike"):
        _fit(values, spikes)
    again = SpikeDetection()
    again.load_state_dict(spikes.state_dict())
    with pytest.warns(LightdecoWarning, match="was 3 at step 1"):
        _fit([3.0, 1.0], again)
    assert [spike.value for spike in again.spikes] == [5.0, 3.0]
    _fit([3.0] * 4, again)  # a second fit starts anew
    assert again.spikes == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"monitor": ""},
        {"window": 1},
        {"threshold": 0},
        {"threshold": math.nan},
        {"min_rise": -1},
        {"warmup": 1},
        {"warmup": 101},
        {"action": "stopp"},
    ],
)
def test_wrong_arguments_are_refused(wrong: dict[str, Any]) -> None:
    """The error names the argument and what is allowed."""
    with pytest.raises(SettingsError, match=rf"SpikeDetection\({next(iter(wrong))}=.*allowed"):
        SpikeDetection(**wrong)
