"""What saving and loading a checkpoint costs beside `torch.save` and `torch.load`, and that it stays flat.

    python benchmarks/checkpoint.py --output benchmarks/results/checkpoint.md

The state is a model with Adam's two moments. In each round every contender saves and loads it, in an order that
rotates; files go to the folder `--folder`, whose disk is what is measured. `torch.save` is followed by `fsync`, without
which it has written nothing yet. lightdeco verifies besides: it hashes what it writes, reads it back and compares; its
load checks every hash. Loads are from the page cache.
"""

import argparse
import datetime
import os
import platform
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from torch import nn

import lightdeco as ld
from lightdeco.checkpoint import State, load, prune, save, snapshot

Job = Callable[[Path, State], object]


def state_of(gigabytes: float) -> State:
    """A model of square layers and Adam's state of it; three tensors of four bytes for each parameter."""
    width = 1024
    layers = max(1, round(gigabytes * 1e9 / (3 * 4 * width * (width + 1))))
    net = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    adam = torch.optim.Adam(net.parameters())
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    adam.step()
    return State(model=dict(net.state_dict()), optimizers={"main": adam.state_dict()}, progress={"global_step": 1})


def save_ours(folder: Path, state: State) -> object:
    """lightdeco: written, synced, read back, renamed."""
    return save(folder, "ours", state)


def load_ours(folder: Path, state: State) -> object:
    """lightdeco: every hash checked."""
    return load(folder / "ours")


def save_torch(folder: Path, state: State) -> object:
    """torch.save, and a wait until the bytes are on the disk."""
    with (folder / "torch.pt").open("wb") as file:
        torch.save({"model": state.model, "optimizer": state.optimizers["main"]}, file)
        file.flush()
        os.fsync(file.fileno())
    return file


def load_torch(folder: Path, state: State) -> object:
    """torch.load, without a check of what was read."""
    return torch.load(folder / "torch.pt", weights_only=True)


def copy_ours(folder: Path, state: State) -> object:
    """The time that training waits when the files are written behind its back."""
    return snapshot(state)


CONTENDERS: dict[str, tuple[Job, ...]] = {
    "lightdeco": (save_ours, load_ours),
    "torch.save + fsync, torch.load": (save_torch, load_torch),
    "lightdeco, snapshot": (copy_ours,),
}


def measured(folder: Path, state: State, rounds: int) -> dict[str, list[list[float]]]:
    """Seconds of each job of each contender in each round."""
    times: dict[str, list[list[float]]] = {name: [[] for _ in jobs] for name, jobs in CONTENDERS.items()}
    names = list(CONTENDERS)
    for turn in range(rounds + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            for index, job in enumerate(CONTENDERS[name]):
                os.sync()  # what others have left to write is not counted
                start = time.perf_counter()
                found = job(folder, state)
                seconds = time.perf_counter() - start
                del found
                if turn:  # the first round warms up
                    times[name][index].append(seconds)
    return times


def growth(folder: Path, saves: int) -> str:
    """Memory, open files and threads over many small saves in one process, from the first tenth to the end."""
    state = State(
        model={"w": torch.ones(64, 64)},
        optimizers={"main": {"state": {0: {"m": torch.ones(64, 64)}}, "param_groups": []}},
        random={"torch": torch.get_rng_state()},
    )
    process, before = psutil.Process(), (0.0, 0, 0)
    for number in range(saves):
        save(folder / "many", f"step={number:08d}", state)
        prune(folder / "many", {f"step={number:08d}"})
        if number in (saves // 10, saves - 1):
            now = (process.memory_info().rss / 1e6, process.num_fds(), threading.active_count())
            before, after = (now, now) if number == saves // 10 else (before, now)
    return (
        f"- {saves} saves of 38 kB, pruned to one: memory {after[0] - before[0]:+.1f} MB, "
        f"open files {after[1] - before[1]:+d}, threads {after[2] - before[2]:+d}"
    )


def report(times: dict[str, list[list[float]]], gigabytes: float) -> list[str]:
    """The table: seconds per GB, medians with quartiles, and the ratio to torch in the same round."""
    lines = ["| contender | job | seconds per GB | quartiles | ratio to torch |", "|---|---|---|---|---|"]
    torch_times = times["torch.save + fsync, torch.load"]
    for name, jobs in times.items():
        for index, seconds in enumerate(jobs):
            job = "copy" if "snapshot" in name else ("save", "load")[index]
            low, middle, high = (value / gigabytes for value in statistics.quantiles(seconds, n=4))
            ratio = statistics.median(a / b for a, b in zip(seconds, torch_times[index], strict=True))
            shown = "" if job == "copy" else f"{ratio:.2f}"
            lines.append(f"| {name} | {job} | {middle:.2f} | {low:.2f} to {high:.2f} | {shown} |")
    return lines


def main() -> None:
    """Measure, print, and write the table when `--output` is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--folder", type=Path, default=Path.cwd(), help="where to write: the disk that is measured")
    parser.add_argument("--gigabytes", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--saves", type=int, default=1000)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-", dir=arguments.folder))
    try:
        state = state_of(arguments.gigabytes)
        size = snapshot(state).nbytes / 1e9
        lines = ["# What a checkpoint costs", "", *report(measured(folder, state, arguments.rounds), size), ""]
        del state
        lines += [growth(folder, arguments.saves)]
    finally:
        shutil.rmtree(folder)
    lines += [
        f"- {arguments.rounds} rounds of {size:.2f} GB: a model and Adam's state; loads from the page cache",
        f"- Python {platform.python_version()}, torch {torch.__version__}, lightdeco {ld.__version__}, "
        f"{os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"- measured on {datetime.date.today()}; load at the end {os.getloadavg()[0]:.1f}",
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
