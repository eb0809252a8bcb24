"""The progress bar: on a terminal, elsewhere, and what it costs."""

import io
import math
import pickle
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightdeco.callbacks import ProgressBar
from lightdeco.errors import SettingsError
from tests.callbacks.fake_run import FakeRun, call, fake_evaluation, fake_fit

HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    """A stdout that is a terminal; each test installs it, since pytest sets stdout after the fixtures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._monkeypatch = monkeypatch

    def install(self) -> None:
        self._monkeypatch.setattr(sys, "stdout", self)

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns, with colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    return Terminal(monkeypatch)


@pytest.fixture(autouse=True)
def _screen_is_free() -> Iterator[None]:
    yield
    shown, ProgressBar._shown = ProgressBar._shown, None
    assert shown is None


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)


def test_lines_where_there_is_no_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One line per epoch and a last one that says why the run stopped, how long it was and where it is."""
    fake_fit(ProgressBar(), FakeRun(tmp_path, max_epochs=3), epochs=3, batches=4, val_batches=2)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    for number, line in enumerate(lines[:3], start=1):
        assert re.fullmatch(
            rf"epoch {number}/3  step {4 * number}  0\.\d s  \S+ steps/s  train/loss \S+  val/loss \S+", line
        )
    where = re.escape(str(tmp_path))
    assert re.fullmatch(rf"stopped \(max_epochs\) after 3 epochs, 12 steps, 0\.\d s; {where}", lines[3])


def test_lines_of_a_long_run_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    """A thousand epochs give about twenty lines, without control codes, the first epochs among them."""
    fake_fit(ProgressBar(), FakeRun(), epochs=1000, batches=1)
    out = capsys.readouterr().out
    epochs = [int(number) for number in re.findall(r"^epoch (\d+) ", out, flags=re.MULTILINE)]
    assert epochs[:8] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert len(out.splitlines()) <= 20
    assert epochs[-1] > 250
    assert "\x1b" not in out
    assert "\r" not in out


def test_one_batch_and_one_epoch_are_singular(capsys: pytest.CaptureFixture[str]) -> None:
    """A run of one epoch and one step without a directory is described as such."""
    fake_fit(ProgressBar(), FakeRun(), epochs=1, batches=1)
    assert re.search(r"after 1 epoch, 1 step, 0\.\d s$", capsys.readouterr().out.rstrip())


def test_an_evaluation_alone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`test` and the like print one line with their metrics."""
    run = FakeRun()
    run.metrics = {"test/loss": 0.25}
    fake_evaluation(ProgressBar(), run, "test", 3)
    assert re.fullmatch(r"test: 3 batches, 0\.\d s  test/loss 0\.25\n", capsys.readouterr().out)


def test_bars_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    """The bars show epoch, batches, values and evaluation; at the end only the last lines are left."""
    terminal.install()
    run = FakeRun(tmp_path, max_epochs=2)
    run.num_train_batches, run.num_eval_batches = 5, 4
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=2, batches=5, val_batches=4)
    drawn = _plain(terminal.getvalue())
    for text in (
        "epoch 1/2",
        "epoch 2/2",
        "3/5",
        "5/5",
        "validate",
        "2/4",
        "it/s",
        "left",
        "train/loss 0.1",
        "val/loss",
    ):
        assert text in drawn
    last = terminal.getvalue().rpartition(SHOW_CURSOR)[2]
    assert "train/loss 0.1" in last
    assert "stopped (max_epochs) after 2 epochs, 10 steps" in last
    assert "━" not in last


def test_prints_of_the_user_stay_above_the_bars(terminal: Terminal) -> None:
    """What the user prints during a run is not drawn over, and stdout is the user's again afterwards."""
    terminal.install()
    printed = False

    def between() -> None:
        nonlocal printed
        if not printed:
            print("hello from [the user]")
        printed = True

    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3, between=between)
    assert "hello from [the user]\n" in _plain(terminal.getvalue())
    assert sys.stdout is terminal


def test_unknown_lengths(terminal: Terminal) -> None:
    """Without lengths and limits the bars show what is known."""
    terminal.install()
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3, val_batches=2)
    drawn = _plain(terminal.getvalue())
    assert "epoch 1 " in drawn
    assert "3/?" in drawn
    assert "2/?" in drawn
    assert "left" not in drawn


def test_drawing_is_limited_in_time(terminal: Terminal) -> None:
    """However many batches and epochs there are, the bars are drawn once per `refresh_s`."""
    terminal.install()
    fake_fit(ProgressBar(refresh_s=100), FakeRun(), epochs=50, batches=20, val_batches=5)
    assert _plain(terminal.getvalue()).count("epoch ") <= 2


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR no colour is sent to the terminal."""
    terminal.install()
    colour = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;5;\d+|38;2;[\d;]+)m")
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3)
    assert colour.search(terminal.getvalue())
    terminal.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3)
    assert "epoch 1" in _plain(terminal.getvalue())
    assert not colour.search(terminal.getvalue())


@pytest.mark.parametrize("event", ["on_exception", "teardown"])
def test_the_terminal_is_whole_after_an_exception(terminal: Terminal, event: str) -> None:
    """An exception or an abandoned evaluation gives cursor and stdout back, and the next run can draw."""
    terminal.install()
    bar, run = ProgressBar(refresh_s=1e-9), FakeRun()
    call(bar, "on_fit_start", run=run)
    call(bar, "on_train_epoch_start", run=run)
    call(bar, "on_train_batch_end", run=run)
    assert terminal.getvalue().count(HIDE_CURSOR) == 1
    call(bar, event, run=run, exception=ValueError(), stage="fit")
    assert terminal.getvalue().count(SHOW_CURSOR) == 1
    assert sys.stdout is terminal
    call(bar, "on_train_batch_end", run=run)
    call(bar, event, run=run, exception=ValueError(), stage="fit")
    assert terminal.getvalue().count(SHOW_CURSOR) == 1
    fake_fit(bar, run, epochs=1, batches=2)
    assert "stopped (max_epochs)" in terminal.getvalue()


def test_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor gets plain lines."""
    terminal.install()
    monkeypatch.setenv("TERM", "dumb")
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3)
    assert terminal.getvalue().startswith("epoch 1  step 3")
    assert "\x1b" not in terminal.getvalue()


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the main process shows anything."""
    run = FakeRun()
    run.is_main = False
    fake_fit(ProgressBar(), run, epochs=2, batches=2, val_batches=2)
    assert capsys.readouterr().out == ""


def test_a_verb_inside_a_verb_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar of an inner verb shows nothing and leaves the outer one alone."""
    inner = ProgressBar()
    fake_fit(
        ProgressBar(), FakeRun(), epochs=1, batches=1, between=lambda: fake_fit(inner, FakeRun(), epochs=5, batches=1)
    )
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_the_sanity_check_shows_no_training(terminal: Terminal) -> None:
    """Before training starts only the sanity check is on the screen."""
    terminal.install()
    bar, run = ProgressBar(refresh_s=1e-9), FakeRun(max_epochs=2)
    call(bar, "on_fit_start", run=run)
    run.stage = "sanity"
    call(bar, "on_validation_start", run=run)
    call(bar, "on_validation_batch_end", run=run)
    call(bar, "on_validation_end", run=run)
    drawn = _plain(terminal.getvalue())
    call(bar, "on_exception", run=run)
    assert "sanity check" in drawn
    assert "epoch" not in drawn


@pytest.mark.parametrize("kind", ["terminal", "lines"])
def test_a_batch_without_drawing_is_cheap(kind: str, request: pytest.FixtureRequest) -> None:
    """A batch that is not drawn costs less than a microsecond."""
    if kind == "terminal":
        request.getfixturevalue("terminal").install()
    bar, run = ProgressBar(refresh_s=1000), FakeRun()
    call(bar, "on_fit_start", run=run)
    call(bar, "on_train_epoch_start", run=run)
    bar._train_batch(run)  # type: ignore[arg-type]
    best = math.inf
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(1000):
            bar._train_batch(run)  # type: ignore[arg-type]
        best = min(best, (time.perf_counter() - started) / 1000)
    call(bar, "on_exception", run=run)
    assert best < 1e-6


@pytest.mark.parametrize("value", [0, -1, math.nan, "1", True, None])
def test_a_wrong_refresh_is_refused(value: Any) -> None:
    """`refresh_s` must be a positive number."""
    with pytest.raises(SettingsError, match=r"refresh_s=.*allowed"):
        ProgressBar(value)


def test_a_bar_can_be_sent_to_another_process() -> None:
    """Before a run a bar holds plain values only."""
    assert pickle.loads(pickle.dumps(ProgressBar(0.5))).refresh_s == 0.5
