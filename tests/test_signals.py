"""SIGTERM and Ctrl-C: the run is saved, the process ends as it should, and nothing after `fit` runs."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import lightdeco as ld
from lightdeco import ModelCheckpoint
from tests.models import QUIET, Net, batches

ROOT = Path(__file__).parents[1]
HANDLERS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """The handlers are as a script has them, and what a test sets ends with it."""
    before = [signal.getsignal(number) for number in HANDLERS]
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in zip(HANDLERS, before, strict=True):
        signal.signal(number, handler)


def send(*numbers: int) -> Callable[[], None]:
    """A function that sends signals to this process."""

    def sends() -> None:
        for number in numbers:
            os.kill(os.getpid(), number)

    return sends


def at(event: str, act: Callable[[], object], count: int = 1) -> Net:
    """A net that acts when an event happens for the `count`-th time."""
    left = [count]

    def hear(self: Net) -> None:
        left[0] -= 1
        if left[0] == 0:
            act()

    return type("Hears", (Net,), {"hears": getattr(ld, event)(hear)})()


def fit(model: Net | None = None, **settings: Any) -> ld.Run:
    """Two epochs of six steps and a validation."""
    given = QUIET | {"name": "run", "max_epochs": 2, "seed": 1, "num_sanity_val_steps": 0} | settings
    return ld.fit(model or Net(), (batches(6), batches(2)), **given)


def last() -> int:
    """The step of the newest checkpoint; -1 where there is none."""
    return max((int(path.name[5:]) for path in Path("runs/run/checkpoints").glob("step=*")), default=-1)


@pytest.mark.parametrize(
    ("event", "count", "step"),
    [
        ("on_train_batch_start", 3, 3),
        ("on_train_batch_end", 3, 3),
        ("on_train_batch_end", 12, 12),
        ("on_validation_batch_start", 1, 6),
        ("on_validation_end", 1, 6),
        ("on_train_epoch_end", 1, 6),
        ("on_train_end", 1, 12),
        ("on_fit_end", 1, 12),
        ("on_fit_start", 1, -1),
        ("on_train_start", 1, -1),
    ],
)
@pytest.mark.parametrize("number", HANDLERS)
def test_a_signal_ends_the_run_saved(number: int, event: str, count: int, step: int) -> None:
    """Wherever it comes, the last events included; the handlers are then as before; the run can go on."""
    before = [signal.getsignal(each) for each in HANDLERS]
    with pytest.raises((SystemExit, KeyboardInterrupt)) as ended:
        fit(at(event, send(number), count))
    assert (getattr(ended.value, "code", None) == 143) == (number == signal.SIGTERM)
    assert last() == step
    assert [signal.getsignal(each) for each in HANDLERS] == before
    assert fit(resume="auto").global_step == 12


def test_a_signal_in_the_sanity_check() -> None:
    """There is nothing to save yet; the run begins anew."""
    with pytest.raises(SystemExit, match="143"):
        fit(at("on_validation_batch_start", send(signal.SIGTERM)), num_sanity_val_steps=2)
    assert last() == -1
    assert fit(resume="auto").global_step == 12


def test_a_signal_within_accumulation_waits_for_the_update() -> None:
    """Gradients are in no checkpoint."""
    with pytest.raises(SystemExit):
        fit(at("on_train_batch_end", send(signal.SIGTERM), 2), accumulate_grad_batches=3)
    assert last() == 1
    assert fit(resume="auto", accumulate_grad_batches=3).global_step == 4


def test_a_signal_in_a_save_lets_it_end() -> None:
    """Two of them too; the run ends at the next step."""
    with pytest.raises(SystemExit):
        fit(
            at("on_save_checkpoint", send(signal.SIGTERM, signal.SIGTERM), 2),
            checkpoint=ModelCheckpoint(every_n_steps=2),
        )
    assert last() == 4


def test_ctrl_c_twice_ends_at_once() -> None:
    """In the middle of a step nothing is saved but what was before it."""
    with pytest.raises(KeyboardInterrupt):
        fit(
            at("on_before_backward", send(signal.SIGINT, signal.SIGINT), 3), checkpoint=ModelCheckpoint(every_n_steps=2)
        )
    assert last() == 2


def test_the_first_signal_decides() -> None:
    """Ctrl-C, then SIGTERM: an interrupt."""
    with pytest.raises(KeyboardInterrupt):
        fit(at("on_train_batch_end", send(signal.SIGINT, signal.SIGTERM), 3))
    assert last() == 3


def test_the_users_own_handler_is_called_too() -> None:
    """And is in place again afterwards."""
    heard: list[int] = []

    def own(number: int, frame: object) -> None:
        heard.append(number)

    signal.signal(signal.SIGTERM, own)
    with pytest.raises(SystemExit, match="143"):
        fit(at("on_train_batch_end", send(signal.SIGTERM), 3))
    assert heard == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is own


def test_an_ignored_signal_stays_ignored() -> None:
    """As under nohup."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    assert fit(at("on_train_batch_end", send(signal.SIGTERM), 3)).stop_reason == "max_epochs"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_a_fit_in_a_thread_catches_nothing() -> None:
    """Python lets only the main thread set handlers; the run is none the worse for it."""
    runs: list[ld.Run] = []
    thread = threading.Thread(target=lambda: runs.append(fit()))
    thread.start()
    thread.join()
    assert runs[0].global_step == 12
    assert last() == 12


def test_a_signal_in_a_fit_within_a_fit_ends_both() -> None:
    """The inner one is saved; the outer one is within an epoch's end, and keeps what it had saved."""

    def inner() -> None:
        fit(at("on_train_batch_end", send(signal.SIGTERM), 3), name="inner")

    with pytest.raises(SystemExit, match="143"):
        fit(at("on_train_epoch_end", inner, 2), checkpoint=ModelCheckpoint(every_n_steps=3))
    assert [path.name for path in Path("runs/inner/checkpoints").iterdir()] == ["step=00000003"]
    assert last() == 12
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_the_user_raises_keeps_its_status() -> None:
    """`sys.exit(3)` before a step: saved, and still 3."""
    with pytest.raises(SystemExit, match="3"):
        fit(at("on_train_batch_start", lambda: sys.exit(3), 4))
    assert last() == 3


SCRIPT = """
import os, signal
import lightdeco as ld
from tests.models import Net, batches, QUIET

class Sends(Net):
    @ld.on_train_batch_end
    def send(self, run):
        if run.global_step == 3:
            os.kill(os.getpid(), signal.{name})

ld.fit(Sends(), batches(6), max_epochs=1, name="run", **QUIET)
print("after fit")
"""


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_script_ends_with_the_status_of_the_signal(tmp_path: Path, name: str, status: int) -> None:
    """143 and 130, as a shell says it; what stands after `fit` does not run."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = ["bash", "-c", '"$0" -c "$1"; exit $?', sys.executable, SCRIPT.format(name=name)]
    ended = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == status, ended.stderr
    assert "after fit" not in ended.stdout
    assert [path.name for path in (tmp_path / "runs/run/checkpoints").iterdir()] == ["step=00000003"]
    if name == "SIGINT":
        assert "stopping after this step; press Ctrl-C again to stop at once" in ended.stderr
