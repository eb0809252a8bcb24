"""What memory a model takes in each of two processes, whole (DDP) and in parts (FSDP), and how fast it trains.

    python benchmarks/sharded.py --output benchmarks/results/sharded.md

A stack of equal blocks is trained with Adam by two processes of the CPU, through gloo, one thread each. Its layers are
built on the meta device. Memory is what a process has in RAM beyond what it had before `fit`: at its peak, and between
two steps. glibc is told to give large blocks back to the system when they are freed, which it does not do by default.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco import processes

WIDTH, DEPTH, STEPS = 2048, 12, 6
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "1000000"}
QUIET: dict[str, Any] = {"logger": False, "checkpoint": False, "progress_bar": False, "summary": False}


class Stack(nn.Module):
    """Blocks of one large layer each."""

    @ld.configure_model
    def build(self) -> None:
        with torch.device("meta"):
            layers = [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()) for _ in range(DEPTH)]
        self.blocks = nn.ModuleList(layers)

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        for block in self.blocks:
            batch = block(batch)
        return batch.square().mean()

    @ld.configure_optimizers
    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), foreach=False)


class Watch:
    """Notes memory and time at the end of each step."""

    def __init__(self) -> None:
        self.memory: list[float] = []
        self.times: list[float] = []

    @ld.on_train_batch_end
    def look(self) -> None:
        self.memory.append(memory("VmRSS"))
        self.times.append(time.perf_counter())


def memory(what: str) -> float:
    """MB of this process, as Linux counts them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(what)) / 1024


def train(strategy: str, folder: Path) -> list[list[float]]:
    """In each process: train; peak and present memory in MB, and seconds a step, of every process."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    ld.fit(nn_warm(), [torch.zeros(1, 4)], max_steps=1, strategy=strategy, **QUIET)  # imports are not counted
    before, watch = memory("VmRSS"), Watch()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    ld.fit(Stack(), [torch.ones(8, WIDTH)] * 2 * STEPS, max_steps=STEPS, strategy=strategy, callbacks=watch, **QUIET)
    steps = [b - a for a, b in zip(watch.times[1:], watch.times[2:], strict=False)]
    own = [memory("VmHWM") - before, statistics.median(watch.memory[2:]) - before, statistics.median(steps)]
    every: list[Any] = [None, None]
    torch.distributed.all_gather_object(every, own)
    return every


def nn_warm() -> nn.Module:
    """A model of no size."""

    class Small(Stack):
        @ld.configure_model
        def build(self) -> None:
            self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    return Small()


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; with `--output` into a file too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(argv)
    found: dict[str, list[list[float]]] = {"ddp": [], "fsdp": []}
    for _ in range(given.rounds):
        for strategy, rows in found.items():
            rows += processes.start(train, strategy, 2, environment=MALLOC)
    size = DEPTH * WIDTH * (WIDTH + 1) * 4 / 2**20
    lines = [
        f"# A model of {size:.0f} MB with Adam, in two processes",
        "",
        "| strategy | peak, MB | between steps, MB | seconds a step |",
        "|---|---|---|---|",
    ]
    for strategy, rows in found.items():
        peak, present, seconds = (statistics.median(column) for column in zip(*rows, strict=True))
        lines.append(f"| {strategy} | {peak:.0f} | {present:.0f} | {seconds:.2f} |")
    lines += ["", f"- medians of {given.rounds} rounds and both processes; `python benchmarks/sharded.py`"]
    lines += ["- with MALLOC_MMAP_THRESHOLD_=1000000, for both: otherwise freed blocks stay with the process"]
    lines += [f"- {DEPTH} layers of {WIDTH} x {WIDTH}, float32, gloo, one thread each, torch {torch.__version__}"]
    print("\n".join(lines))
    if given.output is not None:
        given.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
