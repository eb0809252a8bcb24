"""The progress bar: in a terminal, in a notebook, elsewhere, and what it costs."""

import io
import math
import os
import pickle
import re
import subprocess
import sys
import textwrap
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lightdeco.callbacks import ProgressBar
from lightdeco.callbacks.progress_display import Lines
from lightdeco.callbacks.progress_layout import Bar, drawing
from lightdeco.errors import SettingsError
from tests.callbacks.fake_run import FakeRun, call, fake_evaluation, fake_fit

ROOT = Path(__file__).resolve().parents[2]


class Terminal(io.StringIO):
    """A stdout that is a terminal; each test installs it, since pytest sets stdout after the fixtures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._monkeypatch = monkeypatch

    def install(self) -> None:
        self._monkeypatch.setattr(sys, "stdout", self)

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return 1


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """A terminal of 100 columns, with colours."""
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "30")
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


def _screen(sent: str, columns: int = 100) -> list[str]:
    """The lines of a terminal, scrolled-off ones included, after all that was sent to it."""
    lines, row, column = [""], 0, 0
    for part in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|[\n\r]|.", sent):
        if part == "\r":
            column = 0
        elif part == "\n":
            row, column = row + 1, 0
        elif part[-1] == "A" and part[0] == "\x1b":
            row -= int(part[2:-1])
        elif part == "\x1b[J":
            lines = [*lines[:row], lines[row][:column]]
        elif part[0] != "\x1b":
            if column == columns:
                row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
            lines[row] = lines[row][:column].ljust(column) + part + lines[row][column + 1 :]
            column += 1
        lines += [""] * (row + 1 - len(lines))
    return [line.rstrip() for line in lines]


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
    assert re.fullmatch(
        rf"finished: max_epochs reached after 3 epochs, 12 steps in 0\.\d s; files in {where}", lines[3]
    )


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
    assert re.search(r"after 1 epoch, 1 step in 0\.\d s$", capsys.readouterr().out.rstrip())


def test_an_evaluation_alone_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """`test` and the like print one line with their metrics."""
    run = FakeRun()
    run.metrics = {"test/loss": 0.25}
    fake_evaluation(ProgressBar(), run, "test", 3)
    assert re.fullmatch(r"test finished: 3 batches in 0\.\d s  test/loss 0\.25\n", capsys.readouterr().out)


def test_an_evaluation_on_several_processes_counts_its_share(capsys: pytest.CaptureFixture[str]) -> None:
    """The batches are those of the main process, and the last line says so."""
    run = FakeRun()
    run.world_size = 2
    fake_evaluation(ProgressBar(), run, "predict", 3)
    assert capsys.readouterr().out.startswith("predict finished: 3 batches on rank 0 of 2 in ")


def test_bars_on_a_terminal(terminal: Terminal, tmp_path: Path) -> None:
    """The bars show epoch, batches, rate, time left, values and evaluation; at the end only the last lines are left."""
    terminal.install()
    run = FakeRun(tmp_path, max_epochs=2)
    run.num_train_batches, run.num_eval_batches = 5, 4
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=2, batches=5, val_batches=4)
    drawn = _plain(terminal.getvalue())
    for text in ("epoch 1/2", "epoch 2/2", "3/5", "5/5", "validate", "2/4", "it/s", "0:00 left", "fit 0:00 left"):
        assert text in drawn
    assert re.search(r"epoch 1/2  ━+ +5/5 .*\nvalidate   ━+─+  1/4 .*\nstep 5  .*train/loss 0\.2\n", drawn)
    values, last, *rest = _screen(terminal.getvalue(), columns=1000)
    assert values == "train/loss 0.1  val/loss 0.2"
    assert last.startswith("finished: max_epochs reached after 2 epochs, 10 steps in 0.")
    assert rest == [""]


def test_prints_of_the_user_stay_above_the_bars(terminal: Terminal) -> None:
    """What the user prints is kept as it is, in whole lines above the bars, and stdout is the user's afterwards."""
    terminal.install()
    numbers = iter(range(100))

    def between() -> None:
        number = next(numbers)
        print(f"hello [{number}]" + " and more" * 20 * (number == 3))
        print(f"begun {number}", end="", flush=True)
        print(" and ended")

    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(max_epochs=1), epochs=1, batches=5, between=between)
    screen = _screen(terminal.getvalue(), columns=1000)
    wanted = [[f"hello [{i}]" + " and more" * 20 * (i == 3), f"begun {i} and ended"] for i in range(5)]
    assert screen[:10] == [line for lines in wanted for line in lines]
    assert len(screen) == 13
    assert sys.stdout is terminal


def test_a_begun_line_is_not_lost(terminal: Terminal) -> None:
    """What was printed without an end of line is on the screen after the run."""
    terminal.install()
    fake_fit(ProgressBar(), FakeRun(), epochs=1, batches=1, between=lambda: print("no end", end=""))
    assert "no end" in terminal.getvalue()


def test_bars_step_aside_for_what_writes_past_them(terminal: Terminal) -> None:
    """Whoever asks stdout for its file descriptor (`input`, a debugger, a subprocess) finds no bars on the screen."""
    terminal.install()
    bar, run = ProgressBar(refresh_s=1e-9), FakeRun()
    call(bar, "on_fit_start", run=run)
    call(bar, "on_train_epoch_start", run=run)
    call(bar, "on_train_batch_end", run=run)
    assert "epoch 1" in "".join(_screen(terminal.getvalue()))
    print("name?", end="")
    assert sys.stdout.fileno() == 1
    assert _screen(terminal.getvalue()) == ["name?"]
    terminal.write(" bob\n")
    call(bar, "on_train_batch_end", run=run)
    assert _screen(terminal.getvalue())[0] == "name? bob"
    assert _screen(terminal.getvalue())[1].startswith("epoch 1")
    call(bar, "on_exception", run=run)


def test_stderr(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stderr that is the terminal stays above the bars too; any other is left alone."""
    terminal.install()
    monkeypatch.setattr(sys, "stderr", terminal)
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3, between=lambda: print("oh", file=sys.stderr))
    assert _screen(terminal.getvalue())[:3] == ["oh"] * 3
    assert sys.stderr is terminal
    elsewhere = io.StringIO()
    monkeypatch.setattr(sys, "stderr", elsewhere)
    fake_fit(ProgressBar(refresh_s=1e-9), FakeRun(), epochs=1, batches=3, between=lambda: print("oh", file=sys.stderr))
    assert elsewhere.getvalue() == "oh\n" * 3


def test_unknown_lengths(terminal: Terminal) -> None:
    """Without lengths and limits the bars show what is known; a length that was wrong counts as unknown."""
    terminal.install()
    run = FakeRun()
    run.num_eval_batches = 1
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=1, batches=3, val_batches=2)
    drawn = _plain(terminal.getvalue())
    assert re.search(r"epoch 1 +3 batches", drawn)
    assert "validate  ━" in drawn
    assert re.search(r"validate +2 batches", drawn)
    assert "2/1" not in drawn


def test_validation_shows_where_training_is(terminal: Terminal) -> None:
    """While a validation runs, the bar above it still says how many batches of the epoch are done."""
    terminal.install()
    run = FakeRun()
    run.num_train_batches = 7
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=1, batches=7, val_batches=2)
    titles = re.findall(r"epoch 1 .* (\d/7) .*\nvalidate", _plain(terminal.getvalue()))
    assert titles == ["7/7", "7/7"]


def test_several_validation_loaders_are_named(terminal: Terminal) -> None:
    """With several loaders the bar says which one is read, as its metrics are called, and how many there are."""
    terminal.install()
    run = FakeRun()
    run.eval_loaders, run.num_eval_batches = ("clean", "noisy"), 4
    fake_evaluation(ProgressBar(refresh_s=1e-9), run, "validation", 2, loaders=2)
    found = re.findall(r"(val/\w+ \(\d of 2\)).*?(\d/4)", _plain(terminal.getvalue()))
    assert found == [
        ("val/clean (1 of 2)", "1/4"),
        ("val/clean (1 of 2)", "2/4"),
        ("val/noisy (2 of 2)", "3/4"),
        ("val/noisy (2 of 2)", "4/4"),
    ]


@pytest.mark.parametrize("columns", [*range(1, 60), 100, 300])
def test_no_line_is_wider_than_the_screen(columns: int) -> None:
    """Whatever the width, each line fits, what matters most is there, and many or long values stay three lines."""
    bars = [Bar("epoch 3/10", 340, 938, 62.0, 12.3), Bar("val/a_loader_with_a_long_name (2 of 3)", 3, 10, 1.0, 0.5)]
    facts = ["step 2,218", "train/" + "very_" * 30 + "long 0.1234", *(f"train/metric_{i} {i}" for i in range(40))]
    lines = drawing(bars, facts, columns).plain.split("\n")
    assert max(map(len, lines)) <= columns
    assert len(lines) <= 5
    if columns >= 40:
        assert lines[0].startswith("epoch 3/10")
        assert "340/938" in lines[0]
        assert re.search(r"… \d+ more$", lines[-1])
    if columns >= 100:
        assert re.fullmatch(r"epoch 3/10 +━+─+  340/938  12\.3 it/s  1:02  0:48 left", lines[0])


def test_bars_are_below_each_other() -> None:
    """The parts of two bars are aligned."""
    bars = [Bar("epoch 3/10", 340, 938, 62.0, 12.3), Bar("validate", 3, 10, 1.0, 0.5)]
    assert drawing(bars, ["step 2,218"], 65).plain.split("\n") == [
        "epoch 3/10  ━━━━━───────────  340/938  12.3 it/s  1:02  0:48 left",
        "validate    ━━━━────────────     3/10     2 s/it  0:01  0:14 left",
        "step 2,218",
    ]


def test_a_resized_terminal_keeps_no_remains(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Narrowed to a third, a terminal shows each line of the bars in three rows: all of them are erased."""
    terminal.install()
    bar, run = ProgressBar(refresh_s=1e-9), FakeRun(max_epochs=3)
    run.num_train_batches = 10
    call(bar, "on_fit_start", run=run)
    call(bar, "on_train_epoch_start", run=run)
    call(bar, "on_train_batch_end", run=run)
    call(bar, "on_train_batch_end", run=run)
    assert terminal.getvalue().count("\x1b[2A\r\x1b[J") == 1  # a bar of 99 columns and the values
    monkeypatch.setattr(bar._display._console, "width", 33)  # type: ignore[union-attr]
    call(bar, "on_train_batch_end", run=run)
    assert terminal.getvalue().count("\x1b[4A\r\x1b[J") == 1
    call(bar, "on_exception", run=run)


def test_a_terminal_without_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the encoding has no letters for the bars or a name, others are shown and nothing fails."""
    raw = io.BytesIO()

    class Ascii(io.TextIOWrapper):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Ascii(raw, encoding="ascii"))
    run = FakeRun()
    run.num_train_batches, run.prog_bar = 2, {"größe": 1.0}
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=1, batches=2)
    assert b"####" in raw.getvalue()
    assert b"gr??e 1" in raw.getvalue()


def test_drawing_is_limited_in_time(terminal: Terminal) -> None:
    """However many batches and epochs there are, the bars are drawn once per `refresh_s`."""
    terminal.install()
    fake_fit(ProgressBar(refresh_s=100), FakeRun(), epochs=50, batches=20, val_batches=5)
    assert _plain(terminal.getvalue()).count("epoch ") <= 2


def test_no_color(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    """With NO_COLOR no colour is sent to the terminal."""
    terminal.install()
    colour = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|38;5;\d+|38;2;[\d;]+)m")
    run = FakeRun()
    run.num_train_batches = 3
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=1, batches=3)
    assert colour.search(terminal.getvalue())
    terminal.truncate(0)
    monkeypatch.setenv("NO_COLOR", "1")
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=1, batches=3)
    assert "epoch 2" in _plain(terminal.getvalue())
    assert not colour.search(terminal.getvalue())


@pytest.mark.parametrize("event", ["on_exception", "teardown"])
def test_the_terminal_is_whole_after_an_exception(terminal: Terminal, event: str) -> None:
    """An exception or an abandoned evaluation removes the bars and gives stdout back, and the next run can draw."""
    terminal.install()
    bar, run = ProgressBar(refresh_s=1e-9), FakeRun()
    call(bar, "on_fit_start", run=run)
    call(bar, "on_train_epoch_start", run=run)
    call(bar, "on_train_batch_end", run=run)
    for _ in range(2):
        call(bar, event, run=run, exception=ValueError(), stage="fit")
        assert sys.stdout is terminal
        assert "0 batches  0:00" not in "".join(_screen(terminal.getvalue()))
        call(bar, "on_train_batch_end", run=run)
    fake_fit(bar, run, epochs=1, batches=2)
    assert "finished: max_epochs reached" in terminal.getvalue()


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("max_steps", "finished: max_steps reached after 2 epochs, 1,200 steps in 0.0 s"),
        ("should_stop", "stopped: run.should_stop was set, after 2 epochs, 1,200 steps in 0.0 s"),
        ("good enough", "stopped: good enough, after 2 epochs, 1,200 steps in 0.0 s"),
        (None, "finished after 2 epochs, 1,200 steps in 0.0 s"),
    ],
)
def test_why_a_run_stopped(capsys: pytest.CaptureFixture[str], reason: str | None, line: str) -> None:
    """The last line says why the run stopped, in words."""
    bar, run = ProgressBar(), FakeRun()
    call(bar, "on_fit_start", run=run)
    run.stop_reason, run.epoch, run.global_step = reason, 2, 1200
    call(bar, "on_fit_end", run=run)
    assert capsys.readouterr().out == line + "\n"


def test_where_a_run_failed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The last line of a failed run names the exception's type and the place, in training and in an evaluation."""
    bar, run = ProgressBar(), FakeRun(tmp_path, max_epochs=3)
    run.num_train_batches = 5

    def fail_at(step: int, exception: BaseException) -> str:
        def between() -> None:
            if run.global_step == step:
                raise exception

        run.epoch = run.global_step = run.progress.batch = 0
        with pytest.raises(type(exception)):
            fake_fit(bar, run, epochs=3, batches=5, val_batches=2, between=between)
        call(bar, "on_exception", run=run, exception=exception)
        return capsys.readouterr().out.splitlines()[-1]

    assert (
        fail_at(7, ValueError("x"))
        == f"failed: ValueError in epoch 2/3 after 2 of 5 batches, step 7; files in {tmp_path}"
    )
    assert fail_at(7, KeyboardInterrupt()).startswith("interrupted: KeyboardInterrupt in epoch 2/3")
    gone = RuntimeError("[/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:45455")
    assert fail_at(7, gone).startswith("failed: another process of the run has ended, in epoch 2/3")
    run.max_epochs = 10
    assert fail_at(7, ValueError("x")).startswith("failed: ValueError in epoch 2/10")
    run.max_epochs = 3
    wanted = "failed: KeyError in validate after 0 batches (epoch 2/3, step 10); files in "
    assert fail_at(10, KeyError("x")).startswith(wanted)


def test_lines_of_a_long_epoch(capsys: pytest.CaptureFixture[str]) -> None:
    """An epoch of hours prints lines too, each after twice as long as the one before."""
    lines, bar, pauses = Lines(), Bar("epoch 1", 340, 938, 62.0, 12.3), []
    for _ in range(4):
        lines.draw([bar], ["train/loss 0.5"])
        pauses.append(lines.pause_s)
    assert capsys.readouterr().out == "epoch 1  340/938  12.3 it/s  1:02  0:48 left  train/loss 0.5\n" * 3
    assert pauses == [60, 120, 240, 480]


def test_a_notebook_has_one_live_output(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In Jupyter all drawings replace each other in one output, which ends as the last lines; nothing is printed."""
    outputs: list[list[dict[str, str]]] = []

    class Handle:
        def update(self, data: dict[str, str], raw: bool) -> None:
            assert raw
            outputs[-1].append(data)

    def display(data: dict[str, str], raw: bool, display_id: bool) -> Handle:
        assert raw
        assert display_id
        outputs.append([data])
        return Handle()

    shell = type("ZMQInteractiveShell", (), {})
    ipython, module = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    vars(ipython).update(get_ipython=type("Shell", (shell,), {}), display=module)
    vars(module).update(display=display)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    monkeypatch.delenv("NO_COLOR", raising=False)
    run = FakeRun(max_epochs=2)
    run.num_train_batches = 5
    run.prog_bar = {"<b>": 1.0}
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=2, batches=5, val_batches=2)
    (shown,) = outputs
    assert "2/5" in shown[1]["text/plain"]
    assert 'style="color:' in shown[1]["text/html"]
    assert "&lt;b&gt; 1" in shown[1]["text/html"]
    assert re.search(r"val/loss 0\.2\nfinished: max_epochs reached after 2 epochs", shown[-1]["text/plain"])
    assert "━" not in shown[-1]["text/html"]
    assert capsys.readouterr().out == ""
    monkeypatch.setenv("NO_COLOR", "1")
    fake_fit(ProgressBar(refresh_s=1e-9), run, epochs=2, batches=5)
    assert 'style="color:' not in outputs[1][1]["text/html"]


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX's")
def test_a_real_fit_in_a_real_terminal(tmp_path: Path) -> None:
    """A fit in a terminal of 40 columns shows its bars and leaves table, prints (a worker's too) and the end."""
    import fcntl
    import pty
    import struct
    import termios

    script = """
        import time, torch, lightdeco as ld
        from tests.models import Net, batches

        class Talks(torch.utils.data.Dataset):
            def __len__(self):
                return 32
            def __getitem__(self, i):
                if i == 24:
                    print("a worker reads")
                return torch.zeros(4), 1

        class Slow:
            @ld.on_train_batch_end
            def tell(self, run):
                time.sleep(0.15)
                if run.global_step == 6:
                    print("six")

        data = torch.utils.data.DataLoader(Talks(), 8, num_workers=1, multiprocessing_context="fork")
        options = {"max_epochs": 2, "log_every_n_steps": 1, "num_sanity_val_steps": 0, "logger": False}
        ld.fit(Net(), (data, batches(2)), callbacks=[Slow()], root_dir=ROOT, **options)
    """.replace("ROOT", repr(str(tmp_path)))
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 15, 40, 0, 0))
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=other,
        stdout=other,
        stderr=other,
        cwd=ROOT,
        env=environment | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)},
    )
    os.close(other)
    sent = b""
    while True:
        try:
            sent += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
    os.close(main)
    assert process.wait(timeout=20) == 0
    text = sent.decode()
    assert re.search(r"epoch 2/2  ━+─*  \d/4", _plain(text))
    screen = _screen(text, columns=40)
    assert screen[0].split() == ["name", "type", "parameters", "trainable"]
    printed = [line for line in screen if "reads" in line or "six" in line]
    assert sorted(printed) == ["a worker reads", "a worker reads", "six"]
    values = len(screen) - screen[::-1].index(printed[-1])
    assert re.fullmatch(r"train/loss \S+  val/loss \S+", screen[values])
    assert "".join(screen[values + 1 :]).startswith("finished: max_epochs reached after 2 epochs, 8 steps")
    assert not [line for line in screen if "━" in line or "left" in line]


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
