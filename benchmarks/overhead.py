"""What a training step costs beside the loop written by hand: lightdeco, accelerate, and Lightning where installed.

    python benchmarks/overhead.py --output benchmarks/results/overhead.md

All contenders do the same work in one process with one thread. In each round every contender trains one block of
steps, in an order that rotates from round to round, and its time is divided by that of the hand-written loop of the
same round: what else the machine does meanwhile hits both. A block is one call of `fit`; the clock runs from step A to
step B inside it, so that setting up and closing are not counted. The table shows medians over the rounds with their
quartiles.

The contenders run in a child process whose output goes to a pseudo-terminal, so that progress bars do their real work.
"""

import argparse
import contextlib
import datetime
import json
import logging
import os
import platform
import pty
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import metadata, util
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld

BATCH = 32
WARM_UP = 200
BARS = {"lightdeco, bare": 1.03, "lightdeco, defaults": 1.06}
BASELINE = "by hand"


# ---- the work --------------------------------------------------------------------------------------------------------


def mlp() -> nn.Module:
    """The seed's network: (n, 784) to (n, 10)."""
    return nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn() -> nn.Module:
    """A small convolutional network: (n, 784) to (n, 10)."""
    convolutions = [nn.Conv2d(1, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return nn.Sequential(nn.Unflatten(1, (1, 28, 28)), *convolutions, nn.Flatten(), nn.Linear(576, 10))


def made_batches(steps: int, device: str) -> list[tuple[Tensor, Tensor]]:
    """A list of `steps` batches made beforehand; 64 different ones, so that memory stays small."""
    made = [(torch.rand(BATCH, 784).to(device), torch.randint(0, 10, (BATCH,)).to(device)) for _ in range(64)]
    return list(islice(cycle(made), steps))


class Batches:
    """A list of batches as an iterable that is no list."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def ordinary_loader(steps: int, device: str) -> DataLoader[tuple[Tensor, ...]]:
    """An ordinary shuffling loader with 200 batches an epoch."""
    data = TensorDataset(torch.rand(200 * BATCH, 784), torch.randint(0, 10, (200 * BATCH,)))
    return DataLoader(data, batch_size=BATCH, shuffle=True)


WORKLOADS: dict[str, tuple[Callable[[], nn.Module], Callable[[int, str], Any]]] = {
    "MLP, batches made beforehand": (mlp, made_batches),
    "MLP, DataLoader": (mlp, ordinary_loader),
    "CNN, batches made beforehand": (cnn, made_batches),
}


class Clock:
    """Counts finished steps and reads the time at step A and at step B; every contender calls it once per step."""

    def __init__(self, steps: int, device: str) -> None:
        self.first, self.last = WARM_UP, WARM_UP + steps
        self.cuda = device.startswith("cuda")
        self.count = 0
        self.times: list[float] = []

    def tick(self) -> None:
        self.count += 1
        if self.count == self.first or self.count == self.last:
            if self.cuda:
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())

    @property
    def microseconds(self) -> float:
        """Time per step."""
        start, end = self.times
        return (end - start) / (self.last - self.first) * 1e6


# ---- the contenders: each trains `clock.last` steps and calls `clock.tick` after each -------------------------------


def by_hand(model: nn.Module, batches: Iterable[Any], clock: Clock, device: str, folder: str) -> None:
    model.to(device).train()
    optimizer = torch.optim.Adam(model.parameters())
    move = device != "cpu"
    while clock.count < clock.last:
        for x, y in batches:
            if move:
                x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            clock.tick()
            if clock.count == clock.last:
                return


def with_accelerate(model: nn.Module, batches: Iterable[Any], clock: Clock, device: str, folder: str) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=device == "cpu")
    model.train()
    optimizer = torch.optim.Adam(model.parameters())
    model, optimizer = accelerator.prepare(model, optimizer)
    if isinstance(batches, DataLoader):
        batches = accelerator.prepare(batches)
    while clock.count < clock.last:
        for x, y in batches:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            clock.tick()
            if clock.count == clock.last:
                AcceleratorState._reset_state(True)
                return


class Ours(nn.Module):
    """The model with the marks of lightdeco."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    @ld.training_step
    def step(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.net(x), y)

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


class Ticker:
    """The clock as a callback of lightdeco."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    @ld.on_train_batch_end
    def tick(self) -> None:
        self.clock.tick()


def with_lightdeco(defaults: bool) -> Callable[..., None]:
    def contender(model: nn.Module, batches: Iterable[Any], clock: Clock, device: str, folder: str) -> None:
        settings = ld.Settings(accelerator="cpu" if device == "cpu" else "gpu", root_dir=folder, max_steps=clock.last)
        bare = ld.Settings() if defaults else ld.Settings(logger=False, progress_bar=False, summary=False)
        ld.fit(
            Ours(model),
            batches,
            settings=settings,
            callbacks=[Ticker(clock)],
            logger=bare.logger,
            progress_bar=bare.progress_bar,
            summary=bare.summary,
            checkpoint=defaults,
        )

    return contender


def with_lightning(defaults: bool) -> Callable[..., None]:
    from lightning import pytorch as pl

    class Theirs(pl.LightningModule):
        def __init__(self, net: nn.Module) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x, y = batch
            loss = F.cross_entropy(self.net(x), y)
            if defaults:
                self.log("train/loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters())

    class Tick(pl.Callback):
        def __init__(self, clock: Clock) -> None:
            self.clock = clock

        def on_train_batch_end(self, *arguments: Any) -> None:
            self.clock.tick()

    def contender(model: nn.Module, batches: Iterable[Any], clock: Clock, device: str, folder: str) -> None:
        trainer = pl.Trainer(
            accelerator="cpu" if device == "cpu" else "gpu",
            devices=1,
            max_steps=clock.last,
            default_root_dir=folder,
            callbacks=[Tick(clock)],
            logger=defaults,
            enable_checkpointing=defaults,
            enable_progress_bar=defaults,
            enable_model_summary=defaults,
        )
        # A list would be taken for a list of loaders.
        trainer.fit(Theirs(model), Batches(batches) if isinstance(batches, list) else batches)

    return contender


def contenders() -> dict[str, Callable[..., None]]:
    """Every contender of this machine by name; the hand-written loop comes first."""
    found: dict[str, Callable[..., None]] = {
        BASELINE: by_hand,
        "lightdeco, bare": with_lightdeco(defaults=False),
        "lightdeco, defaults": with_lightdeco(defaults=True),
        "accelerate, by hand": with_accelerate,
    }
    if util.find_spec("lightning"):
        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        found |= {
            "Lightning, bare": with_lightning(defaults=False),
            "Lightning, defaults": with_lightning(defaults=True),
        }
    return found


# ---- measuring -------------------------------------------------------------------------------------------------------


def block(contender: Callable[..., None], workload: str, steps: int, device: str) -> float:
    """Microseconds per step of one block."""
    make_model, make_batches = WORKLOADS[workload]
    torch.manual_seed(0)
    model, batches, clock = make_model(), make_batches(WARM_UP + steps, device), Clock(steps, device)
    with tempfile.TemporaryDirectory() as folder:
        contender(model, batches, clock, device, folder)
    return clock.microseconds


def measure(options: argparse.Namespace) -> None:
    """Run every round and write {workload: {contender: [µs per round]}}; the first round warms up and is dropped."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    everyone = contenders()
    results: dict[str, dict[str, list[float]]] = {w: {name: [] for name in everyone} for w in options.workloads}
    for turn in range(options.rounds + 1):
        names = list(everyone)
        names = names[turn % len(names) :] + names[: turn % len(names)]
        for workload in options.workloads:
            for name in names:
                microseconds = block(everyone[name], workload, options.steps, options.device)
                if turn:
                    results[workload][name].append(microseconds)
    Path(options.child).write_text(json.dumps(results), encoding="utf-8")


def in_terminal(command: list[str]) -> None:
    """Run a command with a pseudo-terminal as its output, which is read and dropped; shown if the command fails."""
    reader, writer = pty.openpty()
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=writer, stderr=writer, close_fds=True)
    os.close(writer)
    seen = b""
    with contextlib.suppress(OSError):  # Linux reports the end of a pseudo-terminal as an error
        while data := os.read(reader, 65536):
            seen = (seen + data)[-20_000:]
    os.close(reader)
    if child.wait() != 0:
        sys.exit(f"{seen.decode(errors='replace')}\nthe measuring process ended with status {child.returncode}")


def report(results: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> str:
    """The table and the environment, as Markdown."""
    lines = ["| workload | contender | µs per step | ratio | quartiles | bar |", "|---|---|---|---|---|---|"]
    for workload, times in results.items():
        for name, values in times.items():
            ratios = [one / other for one, other in zip(values, times[BASELINE], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            bar = BARS.get(name)
            verdict = "" if bar is None else f"{bar:.2f}: {'met' if middle <= bar else 'missed'}"
            cost = statistics.median(values)
            lines.append(f"| {workload} | {name} | {cost:.1f} | {middle:.3f} | {low:.3f} to {high:.3f} | {verdict} |")
    packages = ("torch", "accelerate", "lightning", "lightdeco")
    versions = [f"{name} {metadata.version(name)}" for name in packages if util.find_spec(name)]
    facts = [
        f"{options.rounds} rounds of {options.steps} steps, batches of {BATCH}, Adam, one thread, {options.device}",
        f"Python {platform.python_version()}, {', '.join(versions)}",
        f"{processor()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        f"measured on {datetime.date.today():%Y-%m-%d}; load at the end {os.getloadavg()[0]:.1f}",
    ]
    return "\n".join([*lines, "", *(f"- {fact}" for fact in facts), ""])


def processor() -> str:
    """The name of the processor, or of the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure in a child process, print the table and write it to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=1000, help="steps timed in each block, besides the warm-up")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--output", help="a Markdown file for the table")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        measure(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "results.json"
        given = ["--rounds", str(options.rounds), "--steps", str(options.steps), "--device", options.device]
        in_terminal([sys.executable, __file__, *given, "--workloads", *options.workloads, "--child", str(file)])
        text = report(json.loads(file.read_text(encoding="utf-8")), options)
    print(text)
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        Path(options.output).write_text(f"# What a training step costs\n\n{text}", encoding="utf-8")


if __name__ == "__main__":
    main()
