"""Faults of files, names and workers: cases of `torture.py` that end in one start or two."""

import gc
import os
import random
import shutil
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

import lightdeco as ld
from lightdeco import ModelCheckpoint
from tests.faults.training import Case, Net, Samples, fingerprint, run

SECRET = "SECRET-0123456789"


class Wider(Net):
    """Another shape and another name."""

    def __init__(self) -> None:
        super().__init__()
        self.net[4] = nn.Linear(16, 4)
        self.more = nn.Linear(2, 2)


def refused(kind: type[ld.LightdecoError], work: Callable[[], object], *words: str) -> None:
    """`work` must raise this, with these words, before any step."""
    done: list[int] = []
    Net.counts = ld.on_train_batch_start(lambda self: done.append(1))  # type: ignore[attr-defined]
    try:
        work()
    except kind as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} is not in: {error}"  # noqa: PT017
    else:
        raise AssertionError(f"no {kind.__name__}")
    assert not done, f"{len(done)} steps were made"


def another_model(root: Path, rng: random.Random) -> None:
    """Names and shapes are compared before any step, and nothing is lost."""
    run(root, Case())
    words = ("'net.4.weight' is (3, 16) in the file, (4, 16) in the model", "missing in the file", "'more.weight'")
    refused(ld.CheckpointError, lambda: run(root, Case(model=Wider)), *words)
    run(root, Case(), max_epochs=4)


def strange_names(root: Path, rng: random.Random) -> None:
    """A name never leads out of the root."""
    inside = root / "inside"
    inside.mkdir()
    for name in ("../../x", "/abs", "a\0b", "CON", "x" * 300, "..", "a\\b"):
        refused(ld.SettingsError, lambda name=name: run(inside, Case(), name=name), "name is")
    assert not list(inside.iterdir())
    assert [path.name for path in root.iterdir()] == ["inside"]
    assert run(inside, Case(), name="läuft 日本")[1].dir.parent == inside


def links(root: Path, rng: random.Random) -> None:
    """A link in the place of a checkpoint is not written through, and not pruned."""
    run(root, Case(), max_steps=2)
    outside = root / "outside"
    shutil.copytree(root / "run" / "checkpoints" / "step=00000002", outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    (root / "run" / "checkpoints" / "step=00000004").symlink_to(outside)
    try:
        run(root, Case({"checkpoint": ModelCheckpoint(every_n_steps=1)}))
    except ld.CheckpointError as error:
        assert "step=00000004" in str(error)  # noqa: PT017
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


def secrets(root: Path, rng: random.Random) -> None:
    """No secret of `hparams` is in any file."""
    hparams = {"api_key": SECRET, "nested": {"token": SECRET}, "url": f"https://me:{SECRET}@host/", "lr": 0.1}
    run(root, Case(), hparams=hparams, logger=["csv", "tensorboard"])
    files = [path for path in root.rglob("*") if path.is_file()]
    leaks = [str(path) for path in files if SECRET.encode() in path.read_bytes()]
    assert len(files) > 5
    assert not leaks, leaks


def no_place(root: Path, rng: random.Random) -> None:
    """A directory that cannot be written is refused before the first step."""
    (root / "file").write_text("")
    for place in (root / "file", Path("/proc/nowhere")):
        refused(ld.SettingsError, lambda place=place: run(place, Case()), "cannot be written", "root_dir=")


def deleted(root: Path, rng: random.Random) -> None:
    """The directory is deleted at any step: training goes on, and its end is saved and can be resumed."""
    step, what = rng.randint(1, 20), rng.choice(["run", "run/checkpoints"])

    def delete(self: Any, run: ld.Run) -> None:
        if run.global_step == step:
            shutil.rmtree(root / what, ignore_errors=True)

    Net.deletes = ld.on_train_batch_end(delete)  # type: ignore[attr-defined]
    often = Case({"checkpoint": ModelCheckpoint(every_n_steps=1, background=rng.random() < 0.5)})
    result = run(root, often)[1]
    assert result.last_checkpoint is not None
    assert result.last_checkpoint.is_dir()
    assert run(root, often, max_epochs=4)[1].epoch == 4


def modes(root: Path, rng: random.Random) -> None:
    """The umask decides who may read what is written."""
    mask = rng.choice([0o002, 0o022, 0o027, 0o077])
    os.umask(mask)
    run(root, Case())
    for path in (root / "run").rglob("*"):
        wanted = (0o777 if path.is_dir() else 0o666) & ~mask
        assert stat.S_IMODE(path.stat().st_mode) == wanted, f"{path}: {path.stat().st_mode:o}"


def bad_worker(root: Path, rng: random.Random) -> None:
    """A dataset that raises keeps its traceback; a worker that dies ends the run within 10 s; both are resumed."""
    kind, place = rng.choice(["raises", "exits", "killed"]), rng.randint(9, 50)

    class Bad(Samples):
        def __getitem__(self, i: int) -> Any:
            if i == place and kind == "raises":
                raise KeyError(f"sample {i} is broken")
            if i == place:
                os._exit(3) if kind == "exits" else os.kill(os.getpid(), 9)
            return super().__getitem__(i)

    def train(data: Samples, **more: Any) -> ld.Run:
        loader = DataLoader(data, 8, shuffle=True, num_workers=2)
        given: Any = {"logger": False, "progress_bar": False, "summary": False, "seed": 5, "name": "run"}
        return ld.fit(Net(), loader, root_dir=root, max_epochs=2, **given, **more)

    begun = time.monotonic()
    try:
        train(Bad())
    except KeyError as error:
        assert kind == "raises", error  # noqa: PT017
        assert f"sample {place} is broken" in str(error)  # noqa: PT017
        assert "__getitem__" in str(error)  # noqa: PT017
    except RuntimeError as error:
        assert kind != "raises", error  # noqa: PT017
        assert "DataLoader worker" in str(error)  # noqa: PT017
    else:
        raise AssertionError("no error")
    assert time.monotonic() - begun < 10
    assert train(Samples(), resume="auto").epoch == 2


def flat(root: Path, rng: random.Random) -> None:
    """Many saves and many runs in one process: memory, open files and threads stay as they are."""

    def used() -> tuple[int, int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * 4096, len(os.listdir("/proc/self/fd")), threading.active_count()

    data = [(torch.randn(8, 4), torch.arange(8) % 3)] * 10
    quiet: Any = {"logger": False, "progress_bar": False, "summary": False, "root_dir": root, "overwrite": True}

    def many(count: int) -> None:
        for number in range(count):
            policy = ModelCheckpoint(every_n_steps=1, background=number % 2 == 0)
            ld.fit(Net(), data, max_epochs=1, name="run", checkpoint=policy, **quiet)

    many(6)
    before = used()
    many(18)
    after = used()
    assert after[0] - before[0] < 5e6, f"{(after[0] - before[0]) / 1e6:.1f} MB more"
    assert after[1:] == before[1:], f"files and threads: {before[1:]}, then {after[1:]}"


def ends_the_same(root: Path, rng: random.Random) -> None:
    """One step more than a finished run has, by `max_steps`, and then the rest: as if it had never stopped."""
    whole = fingerprint(*run(root / "whole", Case()))
    for steps in sorted(rng.sample(range(1, 24), 3)):
        run(root, Case(), max_epochs=None, max_steps=steps)
    assert fingerprint(*run(root, Case())) == whole


CASES: dict[str, tuple[str, Callable[[Path, random.Random], None]]] = {
    "another model": ("17", another_model),
    "strange names": ("21", strange_names),
    "links": ("22", links),
    "secrets in hparams": ("23", secrets),
    "a directory that cannot be written": ("27", no_place),
    "the directory is deleted": ("28", deleted),
    "the umask": ("29", modes),
    "a dataset or a worker fails": ("43", bad_worker),
    "240 saves, 24 runs": ("49", flat),
    "max_steps is raised": ("1", ends_the_same),
}
