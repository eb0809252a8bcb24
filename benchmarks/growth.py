"""Whether memory, open files and threads stay flat: many steps, fits, predicted batches, checkpoints and resumes.

    python benchmarks/growth.py --output benchmarks/results/growth.md

Each part warms up for a tenth of its way; what is there then is compared with what is there at its end. Memory is the
resident set of the process after a garbage collection.
"""

import argparse
import gc
import os
import platform
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld

#: Growth allowed in each part: 10**6 bytes, files, threads.
ALLOWED = (5.0, 0, 0)


class Reading(NamedTuple):
    """What the process holds at one moment."""

    megabytes: float
    files: int
    threads: int


def reading() -> Reading:
    """Read memory, open files and threads of this process."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    return Reading(pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files, threading.active_count())


class Net(nn.Module):
    """A small classifier with everything marked."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    @ld.training_step
    @ld.validation_step
    def step(self, batch: Any) -> dict[str, Tensor]:
        logits = self.net(batch[0])
        loss = nn.functional.cross_entropy(logits, batch[1])
        return {"loss": loss, "acc": (logits.argmax(1) == batch[1]).float().mean()}

    @ld.predict_step
    def predict(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    @ld.configure_optimizers
    def adam(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters())
        return ld.Optim(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1000), interval="step")


def loader(samples: int) -> DataLoader[tuple[Tensor, ...]]:
    """Batches of 8 samples."""
    return DataLoader(TensorDataset(torch.rand(samples, 8), torch.randint(3, (samples,))), batch_size=8, shuffle=True)


class Watch:
    """Reads once the warm-up is over and at the last step."""

    def __init__(self, steps: int) -> None:
        self.steps, self.readings = steps, list[Reading]()

    @ld.on_train_batch_end
    def read(self, run: ld.Run) -> None:
        """Read at a tenth and at the end."""
        if run.global_step in (self.steps // 10, self.steps):
            self.readings.append(reading())


def steps(count: int, folder: str) -> list[Reading]:
    """One long fit with a loader, validation, TensorBoard and checkpoints."""
    watch = Watch(count)
    data = (loader(8 * 1000), loader(80))
    ld.fit(Net(), data, max_steps=count, callbacks=watch, root_dir=folder)
    return watch.readings


def fits(count: int, folder: str) -> list[Reading]:
    """Many short fits with all defaults, one after the other."""
    readings = []
    for i in range(1, count + 1):
        ld.fit(Net(), (loader(80), loader(16)), max_epochs=1, root_dir=folder, summary=i == 1, progress_bar=i == 1)
        if i in (count // 10, count):
            readings.append(reading())
    return readings


def predictions(count: int, folder: str) -> list[Reading]:
    """One long prediction, whose outputs are dropped."""
    readings = []
    outputs: Iterator[Any] = ld.predict(Net(), [loader(8 * count)], progress_bar=False)
    for i, _ in enumerate(outputs, start=1):
        if i in (count // 10, count):
            readings.append(reading())
    return readings


def saves(count: int, folder: str) -> list[Reading]:
    """A checkpoint at each of many steps."""
    watch = Watch(count)
    policy = ld.ModelCheckpoint(every_n_steps=1, save_top_k=2)
    ld.fit(Net(), (loader(8 * 100), loader(16)), max_steps=count, callbacks=watch, checkpoint=policy, root_dir=folder)
    return watch.readings


def resumes(count: int, folder: str) -> list[Reading]:
    """One run, resumed many times for one more epoch each."""
    readings = []
    for i in range(1, count + 1):
        quiet: Any = {"summary": False, "progress_bar": False}
        data = (loader(80), loader(16))
        ld.fit(Net(), data, max_epochs=i, root_dir=folder, name="run", resume="auto", **quiet)
        if i in (count // 10, count):
            readings.append(reading())
    return readings


PARTS: dict[str, tuple[Callable[[int, str], list[Reading]], int]] = {
    "training steps": (steps, 100_000),
    "fits in one process": (fits, 200),
    "predicted batches": (predictions, 10_000),
    "checkpoints": (saves, 1_000),
    "resumes of one run": (resumes, 100),
}


def main() -> None:
    """Run every part, print the table and write it to `--output`; ends with status 1 if something grew."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output", help="a Markdown file for the table")
    parser.add_argument("--share", type=float, default=1.0, help="part of the way to go, such as 0.1")
    options = parser.parse_args()
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    lines = [
        "| what | how many | memory (MB) | growth | open files | threads | flat |",
        "|---|---|---|---|---|---|---|",
    ]
    flat = True
    for name, (part, count) in PARTS.items():
        count = max(10, int(count * options.share))
        with tempfile.TemporaryDirectory() as folder:
            first, last = part(count, folder)
        grown = [b - a for a, b in zip(first, last, strict=True)]
        good = all(more <= allowed for more, allowed in zip(grown, ALLOWED, strict=True))
        flat = flat and good
        counts = f"{first.files} to {last.files} | {first.threads} to {last.threads}"
        memory = f"{first.megabytes:.1f} to {last.megabytes:.1f} | {grown[0]:+.1f}"
        lines.append(f"| {name} | {count:,} | {memory} | {counts} | {'yes' if good else 'NO'} |")
    text = "\n".join([*lines, "", f"- Python {platform.python_version()}, torch {torch.__version__}", ""])
    print(text)
    if options.output:
        Path(options.output).write_text(f"# Growth\n\n{text}", encoding="utf-8")
    raise SystemExit(not flat)


if __name__ == "__main__":
    main()
