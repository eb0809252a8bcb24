"""What `profiler="simple"` adds to a training step: lightdeco bare, without and with it.

    python benchmarks/profiling.py --output benchmarks/results/profiling.md

The work, the clock and the rounds are those of `overhead.py`: the seed MLP, batches that are made beforehand, one
thread, and in each round one block of each in an order that rotates. The table shows medians over the rounds with
quartiles.
"""

import argparse
import io
import os
import statistics
import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from overhead import BATCH, WARM_UP, WORKLOADS, Clock, Ours, Ticker, processor

import lightdeco as ld

BAR = 1.03
WITHOUT, WITH = "without", 'profiler="simple"'


def block(profiler: Any, workload: str, steps: int) -> float:
    """Microseconds per step of one block."""
    make_model, make_batches = WORKLOADS[workload]
    torch.manual_seed(0)
    model, batches, clock = make_model(), make_batches(WARM_UP + steps, "cpu"), Clock(steps, "cpu")
    quiet = {"logger": False, "progress_bar": False, "summary": False, "checkpoint": False, "accelerator": "cpu"}
    with redirect_stdout(io.StringIO()):  # the profiler's table
        ld.fit(Ours(model), batches, max_steps=clock.last, callbacks=[Ticker(clock)], profiler=profiler, **quiet)
    return float(clock.microseconds)


def report(times: dict[str, list[float]], options: argparse.Namespace, load: float) -> str:
    """The table and the circumstances, as Markdown."""
    lines = ["| | µs per step | ratio | quartiles | bar |", "|---|---|---|---|---|"]
    for name, values in times.items():
        ratios = [one / other for one, other in zip(values, times[WITHOUT], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        verdict = f"{BAR:.2f}: {'met' if middle <= BAR else 'missed'}" if name == WITH else ""
        cost = statistics.median(values)
        lines.append(f"| {name} | {cost:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} | {verdict} |")
    facts = [
        f"{options.rounds} rounds of {options.steps} steps, {options.workload}, batches of {BATCH}, Adam, one thread",
        f"torch {torch.__version__}, lightdeco {ld.__version__}, {processor()}, {os.cpu_count()} cores",
        f"load at the beginning {load:.1f}, at the end {os.getloadavg()[0]:.1f}",
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print the table and write it to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=1000, help="steps timed in each block, besides the warm-up")
    parser.add_argument("--workload", choices=WORKLOADS, default=next(iter(WORKLOADS)))
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    load = os.getloadavg()[0]
    contenders: dict[str, Any] = {WITHOUT: None, WITH: "simple"}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(options.rounds + 1):
        for name in sorted(contenders, reverse=bool(turn % 2)):
            microseconds = block(contenders[name], options.workload, options.steps)
            if turn:  # the first round warms up
                times[name].append(microseconds)
    text = report(times, options, load)
    print(text)
    if options.output:
        Path(options.output).write_text(f'# What profiler="simple" costs\n\n{text}', encoding="utf-8")


if __name__ == "__main__":
    main()
