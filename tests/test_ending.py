"""`end.json`: how a run ended, what reports make of it, and that it is missing where a run goes on or was killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightdeco as ld
from lightdeco import ending
from lightdeco.reporting import compare, source
from tests.models import QUIET, Net, batches

ROOT = Path(__file__).parents[1]


def _fit(model: Any, tmp_path: Path, **settings: Any) -> ld.Run:
    given = QUIET | {"max_epochs": 2, "root_dir": tmp_path, "name": "run", "fast_dev_run": False} | settings
    return ld.fit(model, batches(3), **given)


class Failing(Net):
    """Raises at its fifth batch."""

    error: BaseException = ValueError("no luck at postgres://me:hush-word@host/db --token hush-word")

    @ld.on_train_batch_end
    def fail(self, run: ld.Run) -> None:
        if run.global_step == 5:
            raise self.error


def _end(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "run" / "end.json").read_text())
    return found


def test_a_finished_run(tmp_path: Path) -> None:
    """Status, reason, position and time; nothing is left of the writing."""
    run = _fit(Net(), tmp_path)
    end = _end(tmp_path)
    assert end.pop("time") >= run.history[-1]["time"]
    assert end == {"status": "finished", "stop_reason": "max_epochs", "error": None, "epoch": 2, "step": 6}
    assert not list(run.dir.glob("*.new"))
    for given in (run, run.dir):
        assert (source.facts(given).state, source.facts(given).ending) == ("finished", "finished: max_epochs reached")


def test_a_failed_run_names_the_error_without_secrets(tmp_path: Path) -> None:
    """The class and the masked message are in the file, and in the report's and the comparison's text."""
    with pytest.raises(ValueError, match="no luck"):
        _fit(Failing(), tmp_path)
    end = _end(tmp_path)
    assert (end["status"], end["epoch"], end["step"]) == ("failed", 1, 5)
    assert end["error"] == {"class": "ValueError", "message": "no luck at postgres://***@host/db --token ***"}
    found = source.facts(tmp_path / "run")
    assert found.state == "failed"
    assert found.ending == f"failed: ValueError: {end['error']['message']} (at step 5, in epoch 1)"
    assert compare([tmp_path / "run"]).table[0]["ended"] == found.ending
    assert not [p for p in (tmp_path / "run").rglob("*") if p.is_file() and b"hush-word" in p.read_bytes()]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(143)])
def test_an_interrupted_run(tmp_path: Path, error: BaseException) -> None:
    """Ctrl-C and the exits of signals are interruptions, not failures."""
    model = Failing()
    model.error = error
    with pytest.raises(type(error)):
        _fit(model, tmp_path)
    end = _end(tmp_path)
    assert (end["status"], end["error"]["class"]) == ("interrupted", type(error).__name__)
    assert source.facts(tmp_path / "run").state == "interrupted"


def test_it_is_missing_while_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """A run that goes on takes the old end away, and writes its own."""
    seen: list[Any] = []

    class Looking(Net):
        @ld.on_train_batch_end
        def look(self, run: ld.Run) -> None:
            seen.append((ending.read(run.dir), source.facts(run.dir).state))

    _fit(Net(), tmp_path, checkpoint=True)
    _fit(Looking(), tmp_path, checkpoint=True, resume="auto", max_epochs=3)
    assert seen == [(None, "running")] * 3
    assert _end(tmp_path)["epoch"] == 3


def test_a_killed_run_has_none(tmp_path: Path) -> None:
    """After SIGKILL there is no `end.json`; the report says running or killed, or, from the lock, which."""
    code = (
        "import os, signal, lightdeco as ld\nfrom tests.test_ending import Failing, _fit\nfrom pathlib import Path\n"
        "class Kill(Failing):\n    def fail(self, run):\n        run.global_step == 5 and os.kill(os.getpid(), 9)\n"
        f"_fit(Kill(), Path({str(tmp_path)!r}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (tmp_path / "run" / "end.json").exists()
    assert source.facts(tmp_path / "run").state == "killed"
    (tmp_path / "run" / "run.lock").unlink()
    found = source.facts(tmp_path / "run")
    assert (found.state, found.ending) == ("unknown", "running or killed: there is no end.json")


def test_what_cannot_be_written_or_told_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails is one warning, an error without a text has none, and a torn file counts as missing."""

    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("mute")

    model = Failing()
    model.error = Mute()
    with pytest.raises(Mute):
        _fit(model, tmp_path)
    assert _end(tmp_path)["error"]["message"] == ""
    (tmp_path / "run" / "end.json").write_text('{"status": "fin')
    assert ending.read(tmp_path / "run") is None

    def full(*given: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(ending.os, "replace", full)
    with pytest.warns(ld.LightdecoWarning, match=r"end\.json could not be written \(no space left\)"):
        _fit(Net(), tmp_path, overwrite=True)
    assert not list((tmp_path / "run").glob("end.json*"))
