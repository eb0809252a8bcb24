"""Slurm's SIGUSR1: real processes and signals; `scontrol` is a script of the test's that writes down its calls."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent

import pytest

import lightdeco as ld
from lightdeco import requeue

ROOT = Path(__file__).resolve().parents[2]

#: Trains, and says when two batches are done; each batch takes a little, so that the signal comes between steps.
PROGRAM = """
    import json, sys, time
    from contextlib import nullcontext
    from pathlib import Path
    from types import SimpleNamespace
    import lightdeco as ld
    from tests.faults import training
    from tests.faults.training import Case, Net, fingerprint, run

    settings = json.loads(sys.argv[1])
    slow = settings.pop("slow")

    class Slow(Net):
        @ld.on_train_batch_end
        def wait(self, run):
            if run.global_step == 2:
                Path("ready").write_text("")
            time.sleep(slow)

    training.warnings = SimpleNamespace(catch_warnings=nullcontext, simplefilter=print)  # let ours be seen
    model, result = run(Path("runs"), Case(model=Slow), **settings)
    Path("result.json").write_text(json.dumps([fingerprint(model, result), result.stop_reason]))
"""

SCONTROL = """\
#!/bin/sh
echo "$@" >> "$CALLS"
ls runs/run/checkpoints/*/manifest.json >> "$CALLS"
exit ${SCONTROL_STATUS:-0}
"""


@pytest.fixture
def job(tmp_path: Path) -> dict[str, str]:
    """The environment of a batch job, in a directory with the program and a `scontrol` on PATH."""
    (tmp_path / "train.py").write_text(dedent(PROGRAM))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "scontrol").write_text(SCONTROL)
    (tmp_path / "bin" / "scontrol").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    path = f"{tmp_path / 'bin'}{os.pathsep}{kept['PATH']}"
    own = {"PATH": path, "PYTHONPATH": str(ROOT), "CALLS": str(tmp_path / "calls"), "OMP_NUM_THREADS": "1"}
    return kept | own | {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train"}


def train(folder: Path, environment: dict[str, str], number: int | None, slow: float = 0.05, **settings: object) -> int:
    """Run the program, send it a signal after two batches, and return how it ended; its stderr is kept."""
    (folder / "ready").unlink(missing_ok=True)
    command = [sys.executable, "train.py", json.dumps(settings | {"slow": slow})]
    with open(folder / "stderr", "w") as stderr:
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=stderr)
        try:
            if number is not None:
                limit = time.monotonic() + 60
                while not (folder / "ready").exists() and process.poll() is None and time.monotonic() < limit:
                    time.sleep(0.01)
                process.send_signal(number)
            return process.wait(60)
        finally:
            process.kill()


def calls(folder: Path) -> list[str]:
    """What scontrol was called with, and the checkpoints that there were."""
    return (folder / "calls").read_text().split() if (folder / "calls").exists() else []


@pytest.mark.slow
def test_a_job_is_saved_and_requeued_and_ends_as_if_it_had_never_stopped(tmp_path: Path, job: dict[str, str]) -> None:
    """scontrol is called once, after a checkpoint is there; the job that runs again ends bit for bit like one."""
    assert train(tmp_path, job, signal.SIGUSR1) == 138
    called = calls(tmp_path)
    assert called[:2] == ["requeue", "4711"]
    assert len(called) > 2
    assert not (tmp_path / "result.json").exists()
    assert train(tmp_path, job, None, slow=0) == 0
    requeued = json.loads((tmp_path / "result.json").read_text())
    assert calls(tmp_path) == called
    assert train(tmp_path, job, None, slow=0, root_dir="whole") == 0
    assert requeued == json.loads((tmp_path / "result.json").read_text())


@pytest.mark.slow
def test_a_task_of_an_array_is_requeued_alone(tmp_path: Path, job: dict[str, str]) -> None:
    """By the array's number and its own; on the signal that the variable names."""
    array = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "11", "LIGHTDECO_REQUEUE_SIGNAL": "SIGTERM"}
    assert train(tmp_path, job | array, signal.SIGTERM) == 143
    assert calls(tmp_path)[:2] == ["requeue", "4700_11"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "settings", "status", "said"),
    [
        ({}, {"checkpoint": False}, 138, "not requeued, since the run is not saved"),
        ({}, {"resume": None}, 138, "without resume='auto' it would begin anew"),
        ({"SCONTROL_STATUS": "3"}, {}, 138, "failed; submit the job again (it ended with status 3"),
        ({"SLURM_JOB_ID": ""}, {}, -signal.SIGUSR1, ""),
    ],
)
def test_when_a_job_is_not_requeued(
    change: dict[str, str], settings: dict[str, object], status: int, said: str, tmp_path: Path, job: dict[str, str]
) -> None:
    """A run that is not saved, or would begin anew; scontrol fails; outside of a batch job the signal is not ours."""
    environment = {name: value for name, value in (job | change).items() if value}
    assert train(tmp_path, environment, signal.SIGUSR1, **settings) == status
    assert said in (tmp_path / "stderr").read_text().replace("\n", " ")
    assert bool(calls(tmp_path)) == ("SCONTROL_STATUS" in change)


def test_what_slurm_says_decides() -> None:
    """A wrong name is refused with the nearest one; in any other place it does not matter."""
    assert requeue.wanted({"SLURM_JOB_ID": "1", requeue.VARIABLE: "SIGHUP"}) == signal.SIGHUP
    assert requeue.wanted({requeue.VARIABLE: "SIGUSR9"}) is None
    assert requeue.wanted({"SLURM_JOB_ID": "1", requeue.VARIABLE: "none"}) is None
    assert requeue.wanted({"SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "interactive"}) is None
    with pytest.raises(ld.LaunchError, match=r"SIGUSR9.*allowed: SIGUSR1.*did you mean"):
        requeue.wanted({"SLURM_JOB_ID": "1", requeue.VARIABLE: "SIGUSR9"})
