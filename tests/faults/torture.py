"""Interrupts a training in every way that one process can be interrupted, resumes it, and compares the end to the bit.

    python tests/faults/torture.py --minutes 60 --output benchmarks/results/torture.md
    python tests/faults/torture.py --tries 2

Every start is a forked process of its own; kills are real. The table counts, for each case, the tries and those that
ended with the same weights, optimizer, records, tables and counters as the run that nobody interrupted.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import lightdeco as ld
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from tests.faults import cases
from tests.faults.training import EPOCHS, Case, Net, fingerprint, run

OFTEN: Final = ModelCheckpoint(monitor="val/loss", save_top_k=2, every_n_steps=1)
STARTS: Final = 40  # at most, before a try counts as lost
SECONDS: Final = 60.0  # for one start


# ---- processes -------------------------------------------------------------------------------------------------------


@dataclass
class Ended:
    """How a start ended: the exit status (negative: the signal) and what it printed."""

    status: int
    text: str


def start(work: Callable[[], None], kill: Callable[[int], None] | None = None) -> Ended:
    """Run `work` in a forked process, interrupted from outside by `kill(pid)` if given; wait for its end."""
    with tempfile.TemporaryFile("w+") as output:
        pid = os.fork()
        if pid == 0:
            _child(work, output.fileno())
        if kill is not None:
            kill(pid)
        status = _wait(pid)
        output.seek(0)
        return Ended(status, output.read())


def _child(work: Callable[[], None], output: int) -> None:
    """Run in the forked process; never returns."""
    os.dup2(output, 1)
    os.dup2(output, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    status = 1
    try:
        work()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _wait(pid: int) -> int:
    deadline = time.monotonic() + SECONDS
    while True:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise AssertionError(f"a start did not end within {SECONDS} s")
        time.sleep(0.002)


def finish(
    root: Path, case: Case, number: int = 0, prepare: Callable[[], None] = lambda: None
) -> dict[str, str] | None:
    """Start a run in `root` and let it end; its fingerprint, or None when it did not come to its end."""
    file = root / "fingerprint.json"

    def work() -> None:
        prepare()
        model, result = run(root, case, number)
        file.write_text(json.dumps(fingerprint(model, result)))

    ended = start(work)
    if ended.status != 0:
        raise AssertionError(f"the last start ended with status {ended.status}:\n{ended.text[-3000:]}")
    found: dict[str, str] = json.loads(file.read_text())
    return found


def interrupted(root: Path, case: Case, number: int, prepare: Callable[[], None] = lambda: None, **given: Any) -> Ended:
    """One start that is interrupted, by what `prepare` arranges in it or from outside (`kill=`)."""

    def work() -> None:
        prepare()
        run(root, case, number)
        print("came to its end")

    return start(work, **given)


# ---- ways to interrupt, from inside ----------------------------------------------------------------------------------


def die() -> None:
    """End this process at once, as the system's out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(module: Any, names: tuple[str, ...], count: int, act: Callable[[], None] = die) -> None:
    """Act right before or right after the `count`-th call of one of the functions in the checkpoints' code."""
    left = [count]

    def around(real: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0 and count % 2:
                act()
            result = real(*args, **kwargs)
            if left[0] == 0 and not count % 2:
                act()
            return result

        return called

    for name in names:
        setattr(module, name, around(getattr(module, name)))


def at_byte(count: int) -> None:
    """Die in the middle of a write, after `count` bytes of checkpoints."""
    real, left = os.write, [count]

    def write(descriptor: int, data: Any) -> int:
        size = len(memoryview(data).cast("B"))
        if size > left[0]:
            real(descriptor, memoryview(data).cast("B")[: max(0, left[0])])
            die()
        left[0] -= size
        return real(descriptor, data)

    os.write = write  # type: ignore[assignment]


def after(seconds: float, number: int = signal.SIGKILL, times: int = 1) -> Callable[[int], None]:
    """Send a signal from outside after a while, and again after 10 ms."""

    def kill(pid: int) -> None:
        time.sleep(seconds)
        for _ in range(times):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            time.sleep(0.01)

    return kill


# ---- cases: each is one try, and raises what went wrong --------------------------------------------------------------


References = dict[str, dict[str, str]]
Try = Callable[[Path, random.Random, References], None]


def reference(known: References, name: str, case: Case) -> dict[str, str]:
    """The fingerprint of the run that nobody interrupts; made once."""
    if name not in known:
        with folder() as root:
            found = finish(root, case)
            assert found is not None
            known[name] = found
    return known[name]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A directory for one try."""
    path = Path(tempfile.mkdtemp(prefix="torture-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def compare(found: dict[str, str] | None, expected: dict[str, str]) -> None:
    """Raise for what is not the same."""
    assert found is not None
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"not as in the uninterrupted run: {', '.join(different)}"


def killed(name: str, case: Case, root: Path, rng: random.Random, known: References, kills: int = 4) -> None:
    """SIGKILL at random moments, several times, then to the end."""
    expected = reference(known, name, case)
    for number in range(kills):
        ended = interrupted(root, case, number, kill=after(rng.uniform(0.05, 0.9)))
        if ended.status == 0:
            break
        assert ended.status == -signal.SIGKILL, ended.text[-3000:]
    compare(finish(root, case, kills), expected)


def killed_within(name: str, case: Case, arrange: Callable[[random.Random], Callable[[], None]]) -> Try:
    """A try that dies at a place, twice, and then runs to its end."""

    def one(root: Path, rng: random.Random, known: References) -> None:
        expected = reference(known, name, case)
        for number in range(2):
            ended = interrupted(root, case, number, prepare=arrange(rng))
            assert ended.status in (0, -signal.SIGKILL), ended.text[-3000:]
        compare(finish(root, case, 2), expected)

    return one


def _storage() -> Any:
    from lightdeco.checkpoint import storage

    return storage.os


_SYSTEM = ("fsync", "rename", "replace", "mkdir", "open", "close", "write", "unlink", "rmdir")


def _at_system_call(rng: random.Random) -> Callable[[], None]:
    return partial(at_call, _storage(), _SYSTEM, rng.randint(1, 400))


def _in_pruning(rng: random.Random) -> Callable[[], None]:
    return partial(at_call, _storage(), ("unlink", "rmdir", "rename", "replace"), rng.randint(1, 60))


def _at_event(*events: str) -> Callable[[random.Random], Callable[[], None]]:
    """Die in the n-th of these events of the model."""

    def arrange(rng: random.Random) -> Callable[[], None]:
        left = [rng.randint(1, 8)]

        def hear(self: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                die()

        def patch() -> None:
            for event in events:
                setattr(Net, f"dies_{event}", getattr(ld, event)(lambda self: hear(self)))

        return patch

    return arrange


def signalled(number: int, status: int, times: int = 1) -> Try:
    """A signal at a random moment: saved, with the right exit status; nothing after `fit` runs."""

    def one(root: Path, rng: random.Random, known: References) -> None:
        case = Case()
        expected = reference(known, "plain", case)
        for start_number in range(2):
            # Before the loop begins, signals do what they always do.
            ended = interrupted(root, case, start_number, kill=after(rng.uniform(0.3, 0.8), number, times))
            if ended.status == 0:
                break
            assert ended.status in (status, -number), f"status {ended.status}\n{ended.text[-3000:]}"
            assert "came to its end" not in ended.text
        compare(finish(root, case, 2), expected)

    return one


def signalled_in_save(root: Path, rng: random.Random, known: References) -> None:
    """SIGTERM in the middle of writing a checkpoint, and again: the save is finished once, status 143."""
    case = Case({"checkpoint": OFTEN})
    expected = reference(known, "often", case)

    def twice() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    ended = interrupted(root, case, 0, partial(at_call, _storage(), ("fsync",), rng.randint(1, 40), twice))
    assert ended.status == 143, f"status {ended.status}\n{ended.text[-3000:]}"
    compare(finish(root, case, 1), expected)


def damaged(damage: Callable[[Path, random.Random], None]) -> Try:
    """The newest checkpoint is damaged: the one before it is used, and the damaged one is named with the reason."""

    def one(root: Path, rng: random.Random, known: References) -> None:
        keep = ModelCheckpoint(every_n_steps=2, save_top_k=3)
        case = Case({"checkpoint": keep})
        expected = reference(known, "kept", case)
        ended = interrupted(root, case, 0, partial(_stop_at_step, rng.randint(7, 20)))
        assert ended.status == 1, ended.text[-3000:]
        newest = max((root / "run" / "checkpoints").iterdir(), key=lambda path: path.name)
        damage(newest, rng)
        said = _said_while_resuming(root, case)
        assert newest.name in said, f"the damaged checkpoint is not named: {said}"
        compare(finish(root, case, 1), expected)

    return one


def _stop_at_step(step: int) -> None:
    def stop(self: Any, run: ld.Run) -> None:
        if run.global_step == step:
            raise RuntimeError("stopped by the test")

    Net.stops = ld.on_train_batch_end(stop)  # type: ignore[attr-defined]


def _said_while_resuming(root: Path, case: Case) -> str:
    """What is said about the checkpoints that are passed over."""
    from lightdeco.directory import find

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        find(ld.Settings(max_epochs=1, root_dir=root, name="run"), "Net", "auto")
    return "\n".join(str(warning.message) for warning in caught)


def _truncate(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.iterdir()))
    os.truncate(file, int(file.stat().st_size * rng.choice([0, 0.1, 0.5, 0.9, 0.999])))


def _flip(path: Path, rng: random.Random) -> None:
    file = rng.choice(sorted(path.iterdir()))
    data = bytearray(file.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)


def _remove(path: Path, rng: random.Random) -> None:
    rng.choice(sorted(path.iterdir())).unlink()


def _pickle(path: Path, rng: random.Random) -> None:
    import pickle

    class Harm:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path.parent.parent / 'harmed'}",)

    rng.choice(sorted(path.iterdir())).write_bytes(pickle.dumps(Harm()))


def all_bad(root: Path, rng: random.Random, known: References) -> None:
    """Every checkpoint is damaged: an error that lists each, and never a start from the beginning."""
    case = Case({"checkpoint": ModelCheckpoint(every_n_steps=2, save_top_k=3)})
    interrupted(root, case, 0, partial(_stop_at_step, rng.randint(7, 20)))
    checkpoints = sorted((root / "run" / "checkpoints").iterdir())
    for path in checkpoints:
        _flip(path, rng)
    ended = interrupted(root, case, 1)
    assert ended.status == 1
    assert "CheckpointError" in ended.text
    assert all(path.name in ended.text for path in checkpoints), ended.text


def disk_full(root: Path, rng: random.Random, known: References) -> None:
    """No more space while a checkpoint is written: training goes on, the older ones are valid, nothing half is left."""
    case = Case({"checkpoint": OFTEN, "logger": False})
    expected = reference(known, "no table", replace(case, settings=case.settings | {"logger": "csv"}))
    limit = rng.randint(100, 6000)

    def fill(self: Any, run: ld.Run) -> None:
        if run.global_step == 5:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if run.global_step == 9:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        Net.fills = ld.on_train_batch_end(fill)  # type: ignore[attr-defined]

    found = finish(root, replace(case, settings={"checkpoint": OFTEN}), 0, prepare)
    assert found is not None
    # metrics.jsonl and the table stand under the same limit: their records of that time may be missing.
    for name in ("weights", "optimizer", "latest", "counters"):
        assert found[name] == expected[name], name
    left = [path.name for path in (root / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
    assert not left, left


def bad_numbers(root: Path, rng: random.Random, known: References) -> None:
    """A loss or a gradient that is not finite: named, never saved; the last good checkpoint is there."""
    step, in_gradient = rng.randint(2, 20), rng.random() < 0.5

    def spoil(self: Any, run: ld.Run) -> None:
        if run.progress.micro_batch == step:
            bad = next(self.parameters())
            (bad.grad if in_gradient else bad.data).fill_(float("nan"))

    def prepare() -> None:
        event = ld.on_after_backward if in_gradient else ld.on_train_batch_start
        Net.spoils = event(spoil)  # type: ignore[attr-defined]

    ended = interrupted(root, Case({"checkpoint": OFTEN}), 0, prepare)
    assert ended.status == 1, ended.text[-2000:]
    assert "StepError" in ended.text
    assert "not finite" in ended.text
    from lightdeco import checkpoint

    for path in (root / "run" / "checkpoints").iterdir():
        model = checkpoint.load(path).model
        assert all(bool(torch.isfinite(value).all()) for value in model.values()), path


def elsewhere(root: Path, rng: random.Random, known: References) -> None:
    """`$TMPDIR` is a directory that does not take anything: it is not used for checkpoints."""
    case = Case({"checkpoint": OFTEN})
    expected = reference(known, "often", case)

    def prepare() -> None:
        os.environ["TMPDIR"] = "/proc/nowhere"
        tempfile.tempdir = "/proc/nowhere"
        at_byte(rng.randint(1000, 200_000))

    interrupted(root, case, 0, prepare)
    compare(finish(root, case, 1), expected)


def finished_again(root: Path, rng: random.Random, known: References) -> None:
    """A finished run is resumed: nothing is trained, the result is the same."""
    case = Case()
    first = finish(root, case)
    compare(finish(root, case, 1), reference(known, "plain", case))
    compare(first, reference(known, "plain", case))


def logger_raises(root: Path, rng: random.Random, known: References) -> None:
    """A logger that raises in any of its calls changes nothing."""
    bad = rng.choice(["log_metrics", "log_hparams", "close"])

    class Raising:
        def log_metrics(self, metrics: Any, step: int) -> None:
            self._call("log_metrics")

        def log_hparams(self, hparams: Any) -> None:
            self._call("log_hparams")

        def close(self, status: str) -> None:
            self._call("close")

        def _call(self, name: str) -> None:
            if name == bad:
                raise OSError("the network is gone")

    expected = reference(known, "plain", Case())
    compare(finish(root, Case({"logger": ["csv", Raising()]})), expected)


def in_one_process(case: Callable[[Path, random.Random], None]) -> Try:
    """A case that needs one start, whatever it does there."""

    def one(root: Path, rng: random.Random, known: References) -> None:
        ended = start(lambda: case(root, rng))
        assert ended.status == 0, f"status {ended.status}\n{ended.text[-3000:]}"

    return one


def two_at_once(root: Path, rng: random.Random, known: References) -> None:
    """A second run in the same directory is refused, with process and host of the first, which is not disturbed."""
    case = Case()
    expected = reference(known, "plain", case)
    second: list[Ended] = []

    def other(pid: int) -> None:
        deadline = time.monotonic() + 20
        while not (root / "run" / "run.lock").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.01)
        second.append(interrupted(root, case, 0))

    slow = replace(case, settings={"callbacks": [_Slow()]})

    def work() -> None:
        model, result = run(root, slow)
        (root / "fingerprint.json").write_text(json.dumps(fingerprint(model, result)))

    first = start(work, other)
    assert first.status == 0, first.text[-2000:]
    assert second[0].status == 1
    assert "is in use by process" in second[0].text, second[0].text[-2000:]
    compare(json.loads((root / "fingerprint.json").read_text()), expected)


class _Slow:
    @ld.on_train_batch_end
    def wait(self) -> None:
        """Leave the second run time to come."""
        time.sleep(0.05)


_LAYOUTS: Final[dict[str, Case]] = {
    "plain": Case(),
    "often": Case({"checkpoint": OFTEN}),
    "accumulation": Case({"accumulate_grad_batches": 3, "checkpoint": ModelCheckpoint(every_n_steps=1)}),
    "validation within": Case({"val_check_interval": 3, "checkpoint": OFTEN}),
    "workers": Case({"checkpoint": OFTEN}, workers=(0, 2, 2, 0), persistent=True, draws=lambda: torch.rand(())),
    "stream": Case({"checkpoint": OFTEN}, stream=True),
    "background": Case({"checkpoint": ModelCheckpoint(every_n_steps=1, background=True)}),
    "early stopping": Case(
        {"checkpoint": OFTEN, "max_epochs": 8}, callbacks=(lambda: ld.EarlyStopping(patience=2, min_delta=0.01),)
    ),
}

CASES: Final[dict[str, tuple[str, Try]]] = {
    "kill": ("1, 6", partial(killed, "plain", _LAYOUTS["plain"])),
    "kill, a checkpoint each step": ("1", partial(killed, "often", _LAYOUTS["often"])),
    "kill within accumulation": ("7", partial(killed, "accumulation", _LAYOUTS["accumulation"])),
    "kill, validations within epochs": ("6", partial(killed, "within", _LAYOUTS["validation within"])),
    "kill, workers 0, 2, 2, 0, persistent": ("8, 9", partial(killed, "workers", _LAYOUTS["workers"])),
    "kill, an iterable dataset": ("11", partial(killed, "stream", _LAYOUTS["stream"])),
    "kill, saving in the background": ("2", partial(killed, "background", _LAYOUTS["background"])),
    "kill, early stopping": ("1", partial(killed, "early", _LAYOUTS["early stopping"])),
    "kill at a byte of a save": (
        "2",
        killed_within("often", _LAYOUTS["often"], lambda rng: partial(at_byte, rng.randint(0, 200_000))),
    ),
    "kill at a system call of a save": ("3", killed_within("often", _LAYOUTS["often"], _at_system_call)),
    "kill while pruning": ("4", killed_within("often", _LAYOUTS["often"], _in_pruning)),
    "kill in validation": (
        "6",
        killed_within("often", _LAYOUTS["often"], _at_event("on_validation_batch_start", "on_validation_end")),
    ),
    "kill at an epoch's end": (
        "6",
        killed_within("often", _LAYOUTS["often"], _at_event("on_train_epoch_end", "on_train_end", "on_fit_end")),
    ),
    "$TMPDIR cannot be written": ("5", elsewhere),
    "a finished run again": ("12", finished_again),
    "a truncated file": ("13", damaged(_truncate)),
    "a flipped bit": ("14", damaged(_flip)),
    "a missing file": ("15", damaged(_remove)),
    "a malicious pickle": ("18", damaged(_pickle)),
    "all checkpoints bad": ("16", all_bad),
    "disk full": ("25, 26", disk_full),
    "a logger raises": ("30", logger_raises),
    "SIGTERM": ("35", signalled(signal.SIGTERM, 143)),
    "SIGTERM twice in a save": ("36", signalled_in_save),
    "Ctrl-C": ("38", signalled(signal.SIGINT, 130)),
    "Ctrl-C twice": ("38", signalled(signal.SIGINT, 130, times=2)),
    "NaN": ("44", bad_numbers),
    "two runs in one directory": ("50", two_at_once),
    **{name: (rows, in_one_process(case)) for name, (rows, case) in cases.CASES.items()},
}


# ---- the table -------------------------------------------------------------------------------------------------------


def table(results: dict[str, list[str]], seconds: float) -> str:
    """What was tried, as Markdown; then the first failures."""
    lines = ["| case | rows | tries | survived |", "|---|---|---|---|"]
    for name, (rows, _) in CASES.items():
        tries = results.get(name, [])
        lines.append(f"| {name} | {rows} | {len(tries)} | {sum(not t for t in tries)} |")
    total = [t for tries in results.values() for t in tries]
    lines.append(f"| all | | {len(total)} | {sum(not t for t in total)} |")
    lines += ["", f"- {seconds / 60:.0f} minutes, one process at a time; {EPOCHS} epochs of 8 steps to interrupt"]
    lines += [
        f"- Python {platform.python_version()}, torch {torch.__version__}, {platform.system()} {platform.release()}"
    ]
    failures = [f"{name}: {t}" for name, tries in results.items() for t in tries if t]
    return "\n".join([*lines, *(f"\n```\n{failure[:3000]}\n```" for failure in failures[:5]), ""])


def main() -> None:
    """Try the cases in turn until the time is up or each had its tries; status 1 if one was not survived."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, help="how long")
    parser.add_argument("--tries", type=int, help="how often each case")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", help="a Markdown file for the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    known: References = {}
    results: dict[str, list[str]] = {}
    begun, number = time.monotonic(), 0
    tries = options.tries or (10**9 if options.minutes else 1)
    limit = options.minutes * 60 if options.minutes else float("inf")
    while number < tries and time.monotonic() - begun < limit:
        for name in options.cases:
            if time.monotonic() - begun >= limit:
                break
            rng = random.Random(f"{options.seed} {name} {number}")
            with folder() as root:
                try:
                    CASES[name][1](root, rng, known)
                    results.setdefault(name, []).append("")
                except Exception as error:
                    results.setdefault(name, []).append(f"try {number}: {type(error).__name__}: {error}")
                    print(f"{name}, try {number}: {error}", flush=True)
        number += 1
    text = table(results, time.monotonic() - begun)
    print(text)
    if options.output:
        Path(options.output).write_text(f"# Interrupted and resumed\n\n{text}", encoding="utf-8")
    raise SystemExit(any(t for tries in results.values() for t in tries))


if __name__ == "__main__":
    main()
