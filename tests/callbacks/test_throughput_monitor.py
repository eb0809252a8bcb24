"""Throughput: what is counted under which name, over which time, and what is refused."""

import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.callbacks import throughput_monitor
from lightdeco.callbacks.throughput_monitor import ThroughputMonitor, peak_by_name
from tests.models import QUIET, Net, batches, equal, weights

SAMPLES, STEPS, TOKENS = (f"throughput/{name}_per_s" for name in ("samples", "steps", "tokens"))
FLOPS, SHARE = "throughput/flops_per_s", "throughput/peak_share"


class Text(Net):
    """A net whose batches are dicts, and which returns the number of its tokens."""

    @ld.training_step
    def step(self, batch: dict[str, Any]) -> dict[str, Any]:
        loss = super().step((batch["x"], batch["y"]))
        return {"loss": loss, "batch_size": 2, "weight": torch.tensor(24), "whole": "text"}


def fit(callback: ThroughputMonitor, model: Net | None = None, **settings: Any) -> ld.Run:
    """A fit of one epoch of 8 batches of 8 samples that records every fourth update."""
    data = settings.pop("data", batches(8))
    if isinstance(model, Text):
        data = [{"ids": torch.zeros(8, 5), "x": x, "y": y, "rows": 3} for x, y in data]
    defaults: dict[str, Any] = {"max_epochs": 1, "log_every_n_steps": 4}
    return ld.fit(model or Net(), data, callbacks=[callback], **(defaults | QUIET | settings))


def ratio(run: ld.Run, name: str) -> float:
    """A rate per update, in which the time cancels out."""
    return round(run.metrics[name] / run.metrics[STEPS], 6)


def test_joins_the_records() -> None:
    """Rates join the records of training; what is not known or not asked for is left out."""
    run = fit(ThroughputMonitor())
    assert [record["step"] for record in run.history if SAMPLES in record] == [4, 8]
    assert len(run.history) == 2 + 1
    assert {name for name in run.metrics if name.startswith("throughput/")} == {SAMPLES, STEPS}
    assert ratio(run, SAMPLES) == 8


def test_rates_are_those_of_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """The window's last batches count, from the end of the batch before them."""
    clock = iter([0.0, 100.0, 200.0, 300.0, 301.0, 302.0, 303.0, 305.0])
    monkeypatch.setattr(throughput_monitor, "perf_counter", lambda: next(clock))
    run = fit(ThroughputMonitor(window=4))
    assert run.metrics[STEPS] == 4 / 5
    assert run.metrics[SAMPLES] == 32 / 5


def test_validation_is_left_out() -> None:
    """The time of validations in the middle of an epoch does not count."""

    class Slow(Net):
        @ld.on_validation_batch_end
        def slow(self) -> None:
            time.sleep(0.1)

    run = fit(ThroughputMonitor(), Slow(), data=(batches(8), batches(1)), val_check_interval=1)
    assert run.metrics[STEPS] > 20  # with the validations fewer than 10


def test_accumulation_counts_batches_and_updates() -> None:
    """With accumulation samples are those of all batches, and steps are updates."""
    run = fit(ThroughputMonitor(window=4), accumulate_grad_batches=2, log_every_n_steps=2)
    assert ratio(run, SAMPLES) == 16


def test_no_rate_from_one_batch() -> None:
    """The first batch has no batch before it: nothing is logged, and nothing fails."""
    run = fit(ThroughputMonitor(), log_every_n_steps=1)
    assert [record["step"] for record in run.history if STEPS in record] == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("names", "samples", "tokens"),
    [
        ({}, 2, None),
        ({"tokens": "ids"}, 2, 40),
        ({"tokens": "weight", "batch_size": "ids"}, 8, 24),
        ({"tokens": "rows", "batch_size": "rows"}, 3, 3),
    ],
)
def test_counts_by_name(names: dict[str, str], samples: int, tokens: int | None) -> None:
    """Names are looked up in what the step returns, then in the batch; larger tensors are counted."""
    run = fit(ThroughputMonitor(**names), Text())
    assert ratio(run, SAMPLES) == samples
    assert (TOKENS in run.metrics) == (tokens is not None)
    assert tokens is None or ratio(run, TOKENS) == tokens


def test_a_batch_without_tensors_has_no_samples() -> None:
    """Where the number of samples is unknown, it is left out."""

    class Numbers(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            return {"loss": super().step(batches(1)[0]), "weight": 1}

    run = fit(ThroughputMonitor(), Numbers(), data=["a"] * 4)
    assert SAMPLES not in run.metrics
    assert STEPS in run.metrics


def test_flops_and_share_of_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs are a number or a function of the batch; the share appears where the device's peak is known."""
    run = fit(ThroughputMonitor(flops=1e6))
    assert ratio(run, FLOPS) == 1e6
    assert SHARE not in run.metrics
    monkeypatch.setattr(throughput_monitor, "peak_flops", lambda device, precision: 1e9)
    run = fit(ThroughputMonitor(flops=lambda batch: batch[0].numel()))
    assert ratio(run, FLOPS) == 32
    assert run.metrics[SHARE] == pytest.approx(run.metrics[FLOPS] / 1e9)


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "peak"),
    [
        ("NVIDIA H200", "bf16-mixed", False, 989.4e12),
        ("NVIDIA H200 NVL", "bf16-mixed", False, None),
        ("NVIDIA H100 80GB HBM3", "32-true", True, 494.7e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", False, None),
        ("NVIDIA A100-SXM4-80GB", "32-true", False, 19.5e12),
        ("NVIDIA A100 80GB PCIe", "fp16", False, 312e12),
        ("NVIDIA L4", "16-true", False, 121e12),
        ("NVIDIA L40S", "16-mixed", False, 362e12),
        ("NVIDIA A10G", "bf16-true", False, 70e12),
        ("Tesla T4", "32-true", True, 8.1e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", False, None),
        ("NVIDIA H200", "64-true", False, None),
        ("NVIDIA H200", "fp8", False, None),
        ("Something else", "bf16", False, None),
    ],
)
def test_known_peaks(name: str, precision: str, tf32: bool, peak: float | None) -> None:
    """A device's peak is found by its exact kind and the precision; parts of a device and unknown ones have none."""
    assert peak_by_name(name, precision, tf32) == (None if peak is None else pytest.approx(peak))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"window": 0}, r"window=0\); allowed: an integer of at least 1"),
    ({"window": True}, "window=True"),
    ({"batch_size": 8}, r"batch_size=8\); allowed: a name"),
    ({"tokens": ""}, "tokens=''"),
    ({"flops": 0}, r"flops=0\); allowed: a finite number above 0"),
    ({"flops": math.inf}, "flops=inf"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], message: str) -> None:
    """Each wrong value is refused by name."""
    with pytest.raises(ld.SettingsError, match=message):
        ThroughputMonitor(**arguments)


def test_wrong_names_and_counts_are_refused() -> None:
    """A name that is nowhere, or holds no count, is refused at the first batch; so is a wrong number of FLOPs."""
    with pytest.raises(
        ld.SettingsError, match=r"tokens='idz'\) is neither .*; names there: loss, .*did you mean 'ids'"
    ):
        fit(ThroughputMonitor(tokens="idz"), Text())
    with pytest.raises(ld.SettingsError, match=r"batch_size='rows'\) is neither .*; names there: none"):
        fit(ThroughputMonitor(batch_size="rows"))
    with pytest.raises(ld.SettingsError, match=r"tokens='whole'\): the value there is a str"):
        fit(ThroughputMonitor(tokens="whole"), Text())
    with pytest.raises(ld.DataError, match="returned -1 for a batch"):
        fit(ThroughputMonitor(flops=lambda batch: -1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counts_on_the_gpu() -> None:
    """Token counts on the GPU are summed there and read with the record."""
    run = fit(ThroughputMonitor(tokens="weight"), Text(), accelerator="gpu", devices=1)
    assert ratio(run, TOKENS) == 24


def test_leaves_no_trace_and_a_second_fit_starts_anew() -> None:
    """Weights and random state are those of a run without it; a used object has forgotten the run before."""
    used = ThroughputMonitor(flops=1.0)
    found: list[list[Tensor]] = []
    for callbacks in ([], [used], [used]):
        model = Net()
        run = ld.fit(model, batches(), max_epochs=1, seed=1, log_every_n_steps=1, callbacks=callbacks, **QUIET)
        assert [r["step"] for r in run.history if STEPS in r] == ([2, 3, 4] if callbacks else [])
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
