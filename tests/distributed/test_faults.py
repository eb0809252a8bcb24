"""A run of several processes when something goes wrong: a rank fails, is killed, hangs, is asked to stop, differs."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.errors import LaunchError
from tests.models import QUIET, Net, batches, equal, weights

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and sends signals")


# ---- forked ranks ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_case_of_the_battery_is_survived() -> None:
    """Killed, asked to stop, unequal, not finite, full, two at once: see battery.py; what fails is shown by name."""
    command = [sys.executable, "tests/distributed/battery.py"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    cases = [json.loads(line) for line in ended.stdout.splitlines()]
    assert len(cases) == 15
    failed = [f"{case['case']}: {case['error'][:2000]}" for case in cases if case["error"]]
    assert not failed, "\n".join(failed)


# ---- processes that `fit` starts -------------------------------------------------------------------------------------


class Faulty(Net):
    """Something happens on rank 1 in the third step, or elsewhere."""

    def __init__(self, how: str, folder: Path) -> None:
        super().__init__()
        self.how, self.folder = how, folder

    def act(self) -> None:
        (self.folder / "failed").write_text(str(time.time()))
        if self.how == "raises":
            raise ValueError("no good")
        if self.how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.how == "exits":
            sys.exit(0)
        if self.how == "SIGTERM":
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(60)

    @ld.prepare_data
    def prepare(self) -> None:
        if self.how == "hangs in prepare_data":
            self.act()

    @ld.training_step
    def step(self, batch: tuple[Tensor, Tensor], run: ld.Run) -> Tensor:
        within = not self.how.startswith("hangs in ")
        if within and run.rank == 1 and run.progress.micro_batch == 2:
            self.act()
        return super().step(batch)

    @ld.validation_step
    def check(self, batch: tuple[Tensor, Tensor], run: ld.Run) -> Any:
        if self.how == "hangs in validation" and run.rank == 1:
            self.act()
        return super().check(batch)


def _fails(how: str, folder: Path, **given: Any) -> tuple[BaseException, float]:
    """What `fit` raises, and how long after the fault; the caller's model must be as it was."""
    model = Faulty(how, folder)
    before = weights(model)
    settings: Any = {"max_epochs": 2, "num_sanity_val_steps": 0, "root_dir": folder, "name": "run"} | QUIET | given
    with pytest.raises(BaseException) as caught:  # noqa: PT011 (which one is asked by the caller)
        ld.fit(model, (batches(8), batches(4)), devices=2, accelerator="cpu", **settings)
    seconds = time.time() - float((folder / "failed").read_text())
    assert equal(weights(model), before)
    assert model.training
    return caught.value, seconds


@pytest.mark.slow
@pytest.mark.parametrize("how", ["raises", "is killed", "exits"])
def test_a_rank_that_fails_ends_the_run(how: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Within 5 s, with its cause and rank, and not with what it caused elsewhere; the caller's model is as it was."""
    error, seconds = _fails(how, tmp_path, progress_bar=True)
    assert seconds < 5
    text = str(error.__cause__ if how == "raises" else error)
    told = json.loads((tmp_path / "run" / "end.json").read_text())
    assert told["status"] == "failed"
    if how == "raises":
        assert type(error) is ValueError
        assert text.endswith("ValueError: no good\n(on rank 1 of 2)")
        assert told["error"] == {"class": "ValueError", "message": "no good (on rank 1)"}
    else:
        assert type(error) is LaunchError
        what = "was killed by SIGKILL" if how == "is killed" else "called sys.exit(0) before the end"
        assert f"rank 1 of 2 {what}" in text.splitlines()[-1]
        assert told["error"] == {"class": "lightdeco.errors.LaunchError", "message": text.splitlines()[-1]}
    written = capfd.readouterr()
    for where in (text, written.out, written.err):
        assert "gloo" not in where, where
        assert "RuntimeError" not in where, where
    assert "failed: another process of the run has ended, in epoch" in written.out


@pytest.mark.slow
@pytest.mark.parametrize("how", ["hangs", "hangs in validation", "hangs in prepare_data"])
def test_a_rank_that_hangs_is_named(how: str, tmp_path: Path) -> None:
    """`process_timeout` ends the run and says which rank hangs, at which step and in what."""
    error, seconds = _fails(how, tmp_path, process_timeout=0.1)
    assert seconds < 6 + 6
    assert type(error) is LaunchError
    rank, step, what = {
        "hangs": (1, 2, "training"),
        "hangs in validation": (1, 4, "validation"),
        "hangs in prepare_data": (0, 0, "preparing the data"),
    }[how]
    last = str(error).splitlines()[-1]
    assert last == f"rank {rank} of 2 made no progress for 0.1 minutes, at step {step} ({what})"
    assert "in act" in str(error).splitlines()[-2]


@pytest.mark.slow
def test_sigterm_to_one_rank_ends_the_caller(tmp_path: Path) -> None:
    """All save at the same step, and the call raises `SystemExit(143)`; resumed, it ends like an uninterrupted run."""
    error, _ = _fails("SIGTERM", tmp_path, seed=1)
    assert isinstance(error, SystemExit)
    assert error.code == 143
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step=00000003"]


SCRIPT = """
    import sys
    from pathlib import Path
    import torch
    import lightdeco as ld
    from tests.models import QUIET, Net, batches

    if __name__ == "__main__":
        devices = {"devices": 2} if sys.argv[1] == "start" else {}
        folder = Path(sys.argv[2])
        for number in range(1 if devices else 2):  # a second run in the same processes
            model = Net()
            run = ld.fit(model, batches(7), max_epochs=2, seed=4, accelerator="cpu", root_dir=folder, name=str(number),
                         **QUIET, **devices)
            values = ld.validate(model, batches(3), accelerator="cpu", **QUIET, **devices)
            outputs = torch.stack(list(ld.predict(model, batches(3), accelerator="cpu", **QUIET, **devices)))
            with torch.no_grad():
                assert torch.equal(outputs, torch.stack([model.eval().infer(batch) for batch in batches(3)]))
            if sys.argv[1] == "start" or run.is_main:
                torch.save([model.state_dict(), values, run.global_step, run.metrics], folder / f"{number}.pt")
"""


@pytest.mark.slow
def test_torchrun_gives_the_same_as_devices(tmp_path: Path) -> None:
    """One script, under torchrun and with devices=2: equal weights, values, predictions; twice in a process."""
    script = tmp_path / "script.py"
    script.write_text(dedent(SCRIPT))
    found: list[list[Any]] = []
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for how, launcher in (("start", []), ("join", torchrun)):
        (tmp_path / how).mkdir()
        ended = subprocess.run(
            [sys.executable, *launcher, str(script), how, str(tmp_path / how)],
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert ended.returncode == 0, ended.stderr[-3000:]
        found += [torch.load(path) for path in (tmp_path / how).glob("*.pt")]
    assert len(found) == 3
    first = found[0]
    for other in found[1:]:
        assert all(torch.equal(value, other[0][name]) for name, value in first[0].items())
        assert other[1] == first[1]
        assert other[2:] == first[2:]


ENDLESS = """
    import os, sys
    from pathlib import Path
    import lightdeco as ld
    from tests.models import QUIET, Net, batches

    class Telling(Net):
        @ld.on_train_batch_end
        def tell(self, run):
            if run.global_step == 3:
                Path(f"part-{run.rank}").write_text(str(os.getpid()))
                Path(f"part-{run.rank}").rename(f"pid-{run.rank}")

    if __name__ == "__main__":
        settings = QUIET | {"progress_bar": True, "devices": 2, "accelerator": "cpu"}
        ld.fit(Telling(), (batches(7), batches(3)), max_epochs=10**6, name="run", **settings)
"""


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and is not waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("interval", [None, 4])
def test_a_signal_in_the_last_step_before_a_validation(interval: int | None, tmp_path: Path) -> None:
    """All save before the validation, which the signal would end half-way, and go on with it when they are resumed."""
    script = dedent(ENDLESS).replace(
        'Path(f"part-{run.rank}").write_text(str(os.getpid()))', "os.kill(os.getpid(), 15) if run.rank else None"
    )
    script = script.replace('Path(f"part-{run.rank}").rename(f"pid-{run.rank}")', "pass")
    script = script.replace('name="run"', f'name="run", val_check_interval={interval}, resume="auto"')
    (tmp_path / "script.py").write_text(script)
    arguments: Any = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True}
    ended = subprocess.run([sys.executable, "script.py"], timeout=60, **arguments)
    assert ended.returncode == 143, ended.stderr
    checkpoints = tmp_path / "runs" / "run" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["step=00000004"]
    (tmp_path / "script.py").write_text(script.replace("10**6", "1").replace("15)", "0)"))
    ended = subprocess.run([sys.executable, "script.py"], timeout=60, **arguments)
    assert ended.returncode == 0, ended.stderr
    records = [json.loads(line) for line in (checkpoints.parent / "metrics.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["step"]) for r in records if "val/loss" in r] == [("val", 4)]
    assert [r["epoch"] for r in records if "train/loss_epoch" in r] == [0]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_process_that_called_fit(number: int, tmp_path: Path) -> None:
    """To it alone: the run is saved and the script ends as it does on one process; killed, it leaves no process."""
    (tmp_path / "script.py").write_text(dedent(ENDLESS))
    process = subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 60
        while len(pids := [int(path.read_text()) for path in tmp_path.glob("pid-*")]) < 2:
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        process.send_signal(number)
        out, err = process.communicate(timeout=5)  # which waits for every process that holds its output
    finally:
        process.kill()
    limit = time.monotonic() + 5
    while any(map(_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(_alive, pids))
    run = tmp_path / "runs" / "run"
    if number == signal.SIGKILL:
        assert not (run / "end.json").exists()
        return
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: -signal.SIGINT}[number], err
    saved = {path.name for path in (run / "checkpoints").glob("step=*")}  # the last one, and the best so far
    end = json.loads((run / "end.json").read_text())
    assert end["status"] == "interrupted"
    assert f"step={end['step']:08d}" in saved
    assert len(saved) <= 2
    kind = {signal.SIGTERM: "SystemExit", signal.SIGINT: "KeyboardInterrupt"}[number]
    assert end["error"]["class"] == kind
    assert out.count(f"interrupted: {kind} in epoch") == 1
    if number == signal.SIGTERM:
        assert err == ""
    else:
        assert err.count("stopping after this step") == 1
        assert err.splitlines()[-1] == "KeyboardInterrupt"


@pytest.mark.slow
def test_a_rank_of_torchrun_that_is_killed(tmp_path: Path) -> None:
    """Nobody can tell rank 0 the cause there: `end.json` says that another process has ended, which is to be asked."""
    (tmp_path / "script.py").write_text(dedent(ENDLESS))
    process = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "script.py"],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 60
        while not (tmp_path / "pid-1").exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    end = json.loads((tmp_path / "runs" / "run" / "end.json").read_text())
    assert end["status"] == "failed"
    assert end["error"]["message"].startswith("another process of the run has ended, which says why: ")
    assert "failed: another process of the run has ended, in" in out
