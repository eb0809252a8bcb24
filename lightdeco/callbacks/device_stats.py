"""How busy the machine is: CPU, memory and GPU, with the records of training."""

import importlib
import importlib.util
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from lightdeco.errors import SettingsError
from lightdeco.marks import on_train_batch_end, on_train_start

if TYPE_CHECKING:
    from lightdeco.run import Run
    from lightdeco.scalars import Reduce

_GIB: Final = 2**30
_PROC: Final = Path("/proc")

Reader = Callable[[], float]


class DeviceStats:
    """Logs how busy CPU and GPU are, measured after every `every`-th update.

    The values join the record that training writes every `log_every_n_steps`:

    - `device/cpu_percent`: of all cores of the machine, 0 to 100, since the measurement before (a mean);
    - `device/memory_gib`: memory of this process that is resident; where only that can be had, its peak (a maximum);
    - `device/gpu_memory_gib`: memory of the run's GPU that this process's tensors take (a maximum);
    - `device/gpu_percent`: share of time in which the run's GPU was working (a mean); needs `nvidia-ml-py`.

    Without `psutil`, Linux tells through `/proc` and other systems through the module `resource`. Nothing waits for the
    device. What cannot be measured is left out.

    Args:
        every: updates between two measurements, at least 1. One takes less than a millisecond.

    Raises:
        SettingsError: `every` has a wrong value; or, when training starts, nothing can be measured.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> quiet = {"log_every_n_steps": 2, "logger": False, "progress_bar": False, "summary": False}
    >>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)], max_epochs=2, callbacks=[DeviceStats(every=2)], **quiet)
    >>> 0 < run.metrics["device/memory_gib"] < 100
    True
    """

    def __init__(self, every: int = 50) -> None:
        if type(every) is not int or every < 1:
            raise SettingsError(f"DeviceStats(every={every!r}); allowed: an integer of at least 1")
        self.every = every
        self._readers: dict[str, tuple[Reader, Reduce]] = {}
        self._step = 0

    @on_train_start
    def _start(self, run: "Run") -> None:
        self._step = run.global_step
        found: dict[str, tuple[Reader | None, Reduce]] = {
            "device/cpu_percent": (_cpu_percent(), "mean"),
            "device/memory_gib": (_memory_gib(), "max"),
            "device/gpu_memory_gib": (_gpu_memory_gib(run.device), "max"),
            "device/gpu_percent": (_gpu_percent(run.device), "mean"),
        }
        self._readers = {name: (reader, reduce) for name, (reader, reduce) in found.items() if reader is not None}
        if not self._readers:
            raise SettingsError(
                "DeviceStats() can measure nothing on this machine: it needs psutil; run `pip install lightdeco[stats]`"
            )

    @on_train_batch_end
    def _batch_end(self, run: "Run") -> None:
        step = run.global_step
        if step == self._step or step % self.every:  # no update, or not its turn
            return
        self._step = step
        for name, (read, reduce) in self._readers.items():
            run.log(name, read(), on_epoch=False, reduce=reduce, batch_size=1)


def _cpu_percent() -> Reader | None:
    """What reads the share of all cores' time that was used since its last call."""
    if _installed("psutil"):
        read = importlib.import_module("psutil").cpu_percent
        read()  # the first call has nothing to compare with

        def percent() -> float:
            return float(read(interval=None))

        return percent
    times = _cpu_times()
    return None if times is None else _since_last(times)


def _since_last(before: tuple[int, int]) -> Reader:
    latest = 0.0

    def percent() -> float:
        nonlocal before, latest
        now = _cpu_times()
        if now is not None and now[1] > before[1]:  # the clock ticks a hundred times a second
            latest = 100 * (now[0] - before[0]) / (now[1] - before[1])
            before = now
        return latest

    return percent


def _cpu_times() -> tuple[int, int] | None:
    """(busy, all) ticks of all cores since the machine was started, or None where the system does not tell."""
    try:
        words = (_PROC / "stat").read_text(encoding="ascii").split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, idle, iowait, *rest = map(int, words[1:9])  # guests' time is in the user's already
    busy = user + nice + system + sum(rest)
    return busy, busy + idle + iowait


def _memory_gib() -> Reader | None:
    """What reads the memory of this process."""
    if _installed("psutil"):
        process = importlib.import_module("psutil").Process()
        return lambda: float(process.memory_info().rss) / _GIB
    statm = _PROC / "self" / "statm"
    if statm.exists():
        page = os.sysconf("SC_PAGE_SIZE")
        return lambda: int(statm.read_text(encoding="ascii").split()[1]) * page / _GIB
    if _installed("resource"):
        import resource
        import sys

        unit = 1 if sys.platform == "darwin" else 1024
        return lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GIB
    return None


def _gpu_memory_gib(device: torch.device) -> Reader | None:
    if device.type != "cuda":
        return None
    return lambda: torch.cuda.memory_allocated(device) / _GIB


def _gpu_percent(device: torch.device) -> Reader | None:
    """What reads how busy the GPU is; NVML refuses that for a part of a GPU (MIG) and on some drivers."""
    if device.type != "cuda" or not _installed("pynvml"):
        return None
    with suppress(Exception):  # NVML's own errors: the value is left out
        torch.cuda.utilization(device)
        return lambda: float(torch.cuda.utilization(device))
    return None


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None
