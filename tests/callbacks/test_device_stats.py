"""Statistics of the machine: what is measured with and without psutil, when, and what is refused."""

import builtins
import importlib.util
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.callbacks import device_stats
from lightdeco.callbacks.device_stats import DeviceStats
from tests.models import QUIET, Net, batches, equal, weights

CPU, MEMORY = "device/cpu_percent", "device/memory_gib"


def fit(callback: DeviceStats, **settings: Any) -> ld.Run:
    """A fit of two epochs of 4 batches that records every second update."""
    defaults: dict[str, Any] = {"max_epochs": 2, "log_every_n_steps": 2}
    return ld.fit(Net(), batches(), callbacks=[callback], **(defaults | QUIET | settings))


def without(monkeypatch: pytest.MonkeyPatch, *modules: str) -> None:
    """Make modules look as if they were not installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in modules else find(name))


def steps_with(run: ld.Run, name: str) -> list[int]:
    """The steps of the records that hold the name."""
    return [record["step"] for record in run.history if name in record]


def test_joins_the_records() -> None:
    """Values join the training records of their steps, add no record, and are no epoch's values."""
    run = fit(DeviceStats(every=4))
    assert steps_with(run, MEMORY) == [4, 8]
    assert len(run.history) == 4 + 2
    assert {name for name in run.metrics if name.startswith("device/")} <= {CPU, MEMORY}


def test_measurements_between_two_records_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several measurements the record shows the mean share of the CPU and the largest memory."""
    percents, sizes = iter([10.0, 30.0] * 4), iter([3.0, 1.0] * 4)
    monkeypatch.setattr(device_stats, "_cpu_percent", lambda: lambda: next(percents))
    monkeypatch.setattr(device_stats, "_memory_gib", lambda: lambda: next(sizes))
    run = fit(DeviceStats(every=1))
    records = [record for record in run.history if MEMORY in record]
    assert [(record[CPU], record[MEMORY]) for record in records] == [(20, 3)] * 4


def test_accumulation_counts_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    """One measurement per update, not per batch."""
    counter = itertools.count(1)
    monkeypatch.setattr(device_stats, "_cpu_percent", lambda: lambda: float(next(counter)))
    fit(DeviceStats(every=1), accumulate_grad_batches=2)
    assert next(counter) == 5


@pytest.mark.parametrize("missing", [(), ("psutil",)])
def test_memory_and_cpu_are_those_of_the_machine(missing: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """With psutil or /proc alike: the memory grows with what the process holds, the CPU's share is in 0..100."""
    without(monkeypatch, *missing)
    memory, percent = device_stats._memory_gib(), device_stats._cpu_percent()
    assert memory is not None
    assert percent is not None
    before = memory()
    held = torch.ones(2**26)  # a quarter of a GiB
    after = memory()
    assert 0.2 < after - before < 0.4, held.shape
    for _ in range(3):
        torch.randn(300, 300).inverse()
        assert 0 <= percent() <= 100


def test_share_of_the_cpu_from_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psutil the share is that of the ticks since the last measurement; none have passed: the value before."""
    without(monkeypatch, "psutil")
    monkeypatch.setattr(device_stats, "_PROC", tmp_path)
    (tmp_path / "stat").write_text("cpu 100 0 50 1000 50 0 0 0 77 0\ncpu0 1 1\n")
    percent = device_stats._cpu_percent()
    assert percent is not None
    assert percent() == 0
    (tmp_path / "stat").write_text("cpu 120 5 55 1060 60 0 0 0 99 0\n")
    assert percent() == 30
    assert percent() == 30


def test_resource_where_there_is_no_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without psutil and /proc the peak memory is left, and the CPU's share is left out."""
    without(monkeypatch, "psutil")
    monkeypatch.setattr(device_stats, "_PROC", tmp_path)
    run = fit(DeviceStats(every=2))
    assert CPU not in run.metrics
    assert 0.01 < run.metrics[MEMORY] < 100


def test_nothing_to_measure_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing can be measured the run is refused before its first batch, with the command to install."""
    without(monkeypatch, "psutil", "resource")
    monkeypatch.setattr(device_stats, "_PROC", tmp_path)
    with pytest.raises(ld.SettingsError, match=r"pip install lightdeco\[stats\]"):
        fit(DeviceStats())


def test_imports_nothing_optional(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the library of the GPU's maker is not imported."""
    imported = builtins.__import__

    def watched(name: str, *given: Any, **named: Any) -> Any:
        assert not name.startswith("pynvml")
        return imported(name, *given, **named)

    monkeypatch.setattr(builtins, "__import__", watched)
    assert MEMORY in fit(DeviceStats(every=2)).metrics


@pytest.mark.parametrize("every", [0, 1.5, True, "50"])
def test_wrong_arguments_are_refused(every: Any) -> None:
    """`every` is a positive integer."""
    with pytest.raises(ld.SettingsError, match=r"DeviceStats\(every=.*; allowed: an integer of at least 1"):
        DeviceStats(every=every)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_the_gpu() -> None:
    """On a GPU the memory of its tensors is logged."""
    run = fit(DeviceStats(every=2), accelerator="gpu", devices=1)
    assert 0 < run.metrics["device/gpu_memory_gib"] < 1


def test_leaves_no_trace_and_a_second_fit_works() -> None:
    """Weights and random state are those of a run without it, with a new object and with a used one."""
    used = DeviceStats(every=1)
    found: list[list[Tensor]] = []
    for callbacks in ([], [used], [used]):
        model = Net()
        run = ld.fit(model, batches(), max_epochs=2, seed=1, log_every_n_steps=1, callbacks=callbacks, **QUIET)
        assert steps_with(run, MEMORY) == (list(range(1, 9)) if callbacks else [])
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(found[0], found[1])
    assert equal(found[0], found[2])
