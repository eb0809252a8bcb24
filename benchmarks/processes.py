"""What a training step costs in two processes, beside the DDP loop written by hand; and how long they take to start.

    python benchmarks/processes.py --output benchmarks/results/processes.md

Two processes with one thread each talk through gloo. The contenders train in the same two processes, in blocks that
take turns; the order changes from round to round, and each block is divided by that of the hand-written loop of the
same round. Blocks are short and many: on a machine that others use too, two blocks differ by a fifth and more. The
clock runs from step A to step B inside of a block, with a barrier before each reading, so that setting up and closing
are not counted. The table shows medians over the rounds with their quartiles.

Then `ld.fit(..., devices=2)` is called a few times, and timed from the call to the beginning of the first training
step in rank 0; beside it stands a process that does nothing but import torch and accelerate.
"""

import argparse
import datetime
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from itertools import cycle, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from overhead import BATCH, WARM_UP, Ours, Ticker, mlp, processor
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import lightdeco as ld
from lightdeco import processes

PROCESSES = 2
PER_EPOCH = 200  # batches of one process in an epoch of the loader
BAR = 1.03
BASELINE, OURS = "DDP by hand", "lightdeco"
QUIET: dict[str, Any] = {"logger": False, "checkpoint": False, "progress_bar": False, "summary": False}


class Clock:
    """Counts finished steps; reads the time at step A and at step B, when all processes are there."""

    def __init__(self, steps: int) -> None:
        self.first, self.last = WARM_UP, WARM_UP + steps
        self.count = 0
        self.times: list[float] = []

    def tick(self) -> None:
        self.count += 1
        if self.count == self.first or self.count == self.last:
            torch.distributed.barrier()
            self.times.append(time.perf_counter())

    @property
    def microseconds(self) -> float:
        """Time per step."""
        start, end = self.times
        return (end - start) / (self.last - self.first) * 1e6


# ---- the work --------------------------------------------------------------------------------------------------------


def made_batches(steps: int) -> list[tuple[Tensor, Tensor]]:
    """`steps` batches made beforehand, for each of the processes; 64 different ones, so that memory stays small."""
    made = [(torch.rand(BATCH, 784), torch.randint(0, 10, (BATCH,))) for _ in range(64)]
    return list(islice(cycle(made), PROCESSES * steps))


def ordinary_loader(steps: int) -> DataLoader[tuple[Tensor, ...]]:
    """An ordinary shuffling loader, as for one process."""
    samples = PROCESSES * PER_EPOCH * BATCH
    data = TensorDataset(torch.rand(samples, 784), torch.randint(0, 10, (samples,)))
    return DataLoader(data, batch_size=BATCH, shuffle=True)


WORKLOADS: dict[str, Callable[[int], Any]] = {
    "MLP, batches made beforehand": made_batches,
    "MLP, DataLoader": ordinary_loader,
}


# ---- the contenders: each trains `clock.last` steps and calls `clock.tick` after each --------------------------------


def by_hand(model: nn.Module, batches: Any, clock: Clock) -> None:
    rank = torch.distributed.get_rank()
    sampler: DistributedSampler[Any] | None = None
    if isinstance(batches, DataLoader):
        sampler = DistributedSampler(batches.dataset)
        batches = DataLoader(batches.dataset, batch_size=BATCH, sampler=sampler)
    else:
        batches = batches[rank::PROCESSES]
    wrapped = DistributedDataParallel(model.train())
    optimizer = torch.optim.Adam(model.parameters())
    epoch = 0
    while clock.count < clock.last:
        if sampler is not None:
            sampler.set_epoch(epoch)
        for x, y in batches:
            loss = F.cross_entropy(wrapped(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick()
            if clock.count == clock.last:
                return
        epoch += 1


def with_lightdeco(model: nn.Module, batches: Iterable[Any], clock: Clock, strategy: str = "auto") -> None:
    settings: dict[str, Any] = {"accelerator": "cpu", "strategy": strategy} | QUIET
    # Each process reads its own part of `batches`.
    ld.fit(Ours(model), batches, max_steps=clock.last, callbacks=[Ticker(clock)], **settings)


def in_ddp(model: nn.Module, batches: Iterable[Any], clock: Clock) -> None:
    with_lightdeco(model, batches, clock, "ddp")


CONTENDERS: dict[str, Callable[..., None]] = {BASELINE: by_hand, OURS: with_lightdeco, 'lightdeco, "ddp"': in_ddp}


# ---- measuring -------------------------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What the processes are asked to do."""

    rounds: int
    steps: int
    workloads: list[str]


Times = dict[str, dict[str, list[float]]]


def measure(work: Work, folder: Path) -> Times:
    """In each process: every round; {workload: {contender: [µs per round]}}. The first round warms up."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    results: Times = {workload: {name: [] for name in CONTENDERS} for workload in work.workloads}
    for turn in range(work.rounds + 1):
        names = list(CONTENDERS)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for workload in work.workloads:
            for name in names:
                torch.manual_seed(0)
                model, batches, clock = mlp(), WORKLOADS[workload](WARM_UP + work.steps), Clock(work.steps)
                CONTENDERS[name](model, batches, clock)
                if turn:
                    results[workload][name].append(clock.microseconds)
    torch.distributed.destroy_process_group()
    return results


class FirstStep:
    """Writes down when rank 0 begins its first step."""

    def __init__(self, path: str) -> None:
        self.path = path

    @ld.on_train_batch_start
    def note(self, batch_idx: int) -> None:
        if batch_idx == 0 and torch.distributed.get_rank() == 0:
            Path(self.path).write_text(str(time.time()), encoding="utf-8")


def seconds_to_first_step() -> float:
    """From the call of `fit` to the first step in rank 0."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/first"
        called = time.time()
        ld.fit(
            Ours(mlp()),
            made_batches(2),
            accelerator="cpu",
            devices=PROCESSES,
            max_steps=2,
            callbacks=[FirstStep(path)],
            **QUIET,
        )
        return float(Path(path).read_text(encoding="utf-8")) - called


def seconds_to_import() -> float:
    """A process that imports torch and accelerate, and ends."""
    called = time.time()
    subprocess.run([sys.executable, "-c", "import torch, accelerate"], check=True)
    return time.time() - called


# ---- the report ------------------------------------------------------------------------------------------------------


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median, the upper quartile."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def report(results: Times, starts: dict[str, list[float]], work: Work, load: float) -> str:
    """The tables and the environment, as Markdown."""
    lines = ["| workload | contender | µs per step | ratio | quartiles | bar |", "|---|---|---|---|---|---|"]
    for workload, times in results.items():
        for name, values in times.items():
            ratios = [one / other for one, other in zip(values, times[BASELINE], strict=True)]
            low, middle, high = quartiles(ratios)
            verdict = "" if name == BASELINE else f"{BAR:.2f}: {'met' if middle <= BAR else 'missed'}"
            cost = statistics.median(values)
            lines.append(f"| {workload} | {name} | {cost:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} | {verdict} |")
    lines += ["", "| start | seconds | quartiles |", "|---|---|---|"]
    for name, values in starts.items():
        low, middle, high = quartiles(values)
        lines.append(f"| {name} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    versions = [f"{name} {metadata.version(name)}" for name in ("torch", "accelerate", "lightdeco")]
    facts = [
        f"{work.rounds} rounds of {work.steps} steps, batches of {BATCH} in each process, Adam, {PROCESSES} processes "
        "with one thread each, gloo",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"measured on {datetime.date.today():%Y-%m-%d}; load before {load:.1f}, at the end {os.getloadavg()[0]:.1f} "
        f"(the processes themselves make {PROCESSES})",
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the tables and write them to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--steps", type=int, default=300, help="steps timed in each block, besides the warm-up")
    parser.add_argument("--starts", type=int, default=5, help="how often `fit` is called to time its start")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--output", help="a Markdown file for the tables")
    options = parser.parse_args(arguments)
    work, load = Work(options.rounds, options.steps, options.workloads), os.getloadavg()[0]
    results = processes.start(measure, work, PROCESSES, environment={"OMP_NUM_THREADS": "1"})
    warnings.simplefilter("ignore")
    starts = {
        f"`fit(devices={PROCESSES})` to the first step": [seconds_to_first_step() for _ in range(options.starts)],
        "`import torch, accelerate` in one process": [seconds_to_import() for _ in range(options.starts)],
    }
    text = report(results, starts, work, load)
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(f"# What a training step costs in two processes\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
