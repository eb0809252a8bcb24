"""Starting processes: what they get, what comes back, and that every way to fail ends all and names the rank."""

import importlib.util
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld
from lightdeco.attach import ATTACHED, attachments
from lightdeco.child import _told, beat, leave
from lightdeco.errors import LaunchError
from lightdeco.joined import Place, group_store, hosts, join, joined, place, tasks_per_node
from lightdeco.packing import pack, unpack
from lightdeco.processes import start, visible_devices
from lightdeco.watching import Rank, _ending


class Bad(ValueError):
    """An exception of a user's own."""


class Stubborn(Exception):
    """An exception that pickle cannot rebuild."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} {two}")


class Tied(nn.Module):
    """Tied weights, and a buffer that is a view of another one."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight
        self.whole: Tensor
        self.register_buffer("whole", torch.arange(4.0))
        self.register_buffer("part", self.whole[:2])
        self.act: Any = torch.relu


class Given(nn.Linear):
    """A class that a test attaches a role to."""


def half_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).mean() / 2


def _group(folder: Path) -> None:
    """Open a process group and leave this process's id, for a test that asks whether it has ended."""
    dist.init_process_group("gloo", store=group_store(), rank=place().rank, world_size=place().world_size)
    (folder / f"pid-{dist.get_rank()}").write_text(str(os.getpid()))
    dist.barrier()


def _pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*")]


def _alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not yet waited for by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _ended(folder: Path, count: int = 2) -> bool:
    pids = _pids(folder)
    assert len(pids) == count
    return not any(_alive(pid) for pid in pids)


# ---- what works ------------------------------------------------------------------------------------------------------


def _together(payload: dict[str, Any], folder: Path) -> dict[str, Any]:
    for late in range(2):  # a second and a third group in one process, with a rank that is late
        _group(folder)
        dist.destroy_process_group()
        time.sleep(0.1 * (place().rank == late))
    _group(folder)
    model, rank = payload["model"], dist.get_rank()
    with torch.no_grad():
        model.a.weight.add_(100)
        model.whole[0] = 7
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    print(f"printed by rank {rank}", flush=True)
    print(f"warned by rank {rank}", file=sys.stderr, flush=True)
    beat(1, "a step")
    return {
        "model": model,
        "total": total,
        "tied": model.a.weight is model.b.weight,
        "view": float(model.part[0]),
        "roles": [attachments(payload[name])["attach training_step"].function.__name__ for name in ("own", "class")],
        "batches": len(list(DataLoader(TensorDataset(torch.arange(4)), num_workers=1))),
        "environment": {name: os.environ[name] for name in ("WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "MY")},
        "joined": (joined(), place().rank, place().local_world_size),
        "threads": torch.get_num_threads(),
        "folder": str(folder),
    }


def test_ranks_work_together_on_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Ranks reduce together, with torchrun's variables; what they get is a copy with its ties and attached roles."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    model, before = Tied(), dict(os.environ)
    weight, buffer = model.a.weight.detach().clone(), model.whole.clone()
    own = ld.attach(nn.Linear(2, 1), training_step=half_loss)
    given = {"model": model, "own": own, "class": Given(1, 1)}
    ld.attach(Given, training_step=half_loss)
    try:
        result = start(_together, given, 2, directory=tmp_path, visible=[1, 0], environment={"MY": "1"})
    finally:
        delattr(Given, ATTACHED)

    assert float(result["total"]) == 3
    assert result["tied"]
    assert result["view"] == 7
    assert result["roles"] == ["half_loss", "half_loss"]
    assert result["batches"] == 4
    assert result["environment"] == {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "CUDA_VISIBLE_DEVICES": "1,0", "MY": "1"}
    assert result["joined"] == (True, 0, 2)
    assert result["threads"] == 1
    assert result["folder"] == str(tmp_path)
    assert torch.equal(result["model"].a.weight, weight + 100)
    assert torch.equal(model.a.weight, weight)
    assert torch.equal(model.whole, buffer)
    assert os.environ == before
    assert _ended(tmp_path)
    captured = capfd.readouterr()
    assert "printed by rank 0" in captured.out
    assert "warned by rank 0" in captured.err
    assert "rank 1" not in captured.out + captured.err


# ---- what fails ------------------------------------------------------------------------------------------------------


def _fails(how: str, folder: Path) -> None:
    _group(folder)
    if dist.get_rank() == 1:
        print("a last word", file=sys.stderr, flush=True)
        (folder / "failed").write_text(str(time.time()))
        if how == "raises":
            raise Bad("no good")
        if how == "is killed":
            os.kill(os.getpid(), signal.SIGKILL)
        os._exit(0)
    if how == "exits":  # rank 0 neither notices nor listens
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(60)
    dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize("how", ["raises", "is killed", "exits"])
def test_a_rank_that_fails_ends_all_and_is_named_last(how: str, tmp_path: Path) -> None:
    """Within 5 s no rank is left; the caller gets the first failure, with its rank, though others failed after it."""
    with pytest.raises(Exception) as caught:  # noqa: PT011 (which one is asked below)
        start(_fails, how, 2, directory=tmp_path)
    assert time.time() - float((tmp_path / "failed").read_text()) < 5
    assert _ended(tmp_path)
    if how == "raises":
        assert type(caught.value) is Bad
        assert str(caught.value) == "no good"
        assert getattr(caught.value, "__notes__", ["(on rank 1 of 2)"]) == ["(on rank 1 of 2)"]
        assert type(caught.value.__cause__) is LaunchError
        text = str(caught.value.__cause__)
        assert "in _fails" in text
        assert "lightdeco/child.py" not in text
        assert text.endswith("Bad: no good\n(on rank 1 of 2)")
    else:
        assert type(caught.value) is LaunchError
        text = str(caught.value)
        what = "was killed by SIGKILL (out of memory?)" if how == "is killed" else "exited with 0 and without a result"
        assert text.endswith(f"rank 1 of 2 {what}, at step 0 (starting)")
    assert "rank 1 wrote last:\na last word" in text


def _hangs(payload: None, folder: Path) -> None:
    beat(0, "opening the group")
    _group(folder)
    for step in range(4):
        beat(step, "a training step")
        if dist.get_rank() == 1 and step == 2:
            time.sleep(60)
        dist.all_reduce(torch.ones(1))


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_step_and_place(tmp_path: Path) -> None:
    """The rank to blame is the one that sleeps, not the one that waits for it; the message ends with it."""
    begin = time.monotonic()
    with pytest.raises(LaunchError) as caught:
        start(_hangs, None, 2, directory=tmp_path, timeout_minutes=0.06)
    assert time.monotonic() - begin < 15
    assert _ended(tmp_path)
    text = str(caught.value)
    assert "rank 0 of 2 made no progress" in text
    assert text.endswith("rank 1 of 2 made no progress for 0.06 minutes, at step 2 (a training step)")
    assert "in _hangs" in text.splitlines()[-2]


def test_an_exception_that_cannot_be_rebuilt_comes_as_text(tmp_path: Path) -> None:
    """The parent learns of it as text; sys.exit(0) is a failure too, sys.exit(143) the end of a stopped run."""
    process = subprocess.Popen(["true"], text=True)
    process.wait()
    for number, error in enumerate([Stubborn("a", "b"), SystemExit(0), SystemExit(143)]):
        leave(tmp_path, number, _told(error))
    stubborn, zero, stopped = (_ending(Rank(i, process), tmp_path, 3, None) for i in range(3))
    assert stubborn is not None
    assert zero is not None
    assert stopped is not None
    assert (stubborn.ok, stubborn.error, stubborn.stop) == (False, None, False)
    assert stubborn.last.endswith("Stubborn: a b\n(on rank 0 of 3)")
    assert (zero.ok, zero.error, zero.last) == (False, None, "rank 1 of 3 called sys.exit(0) before the end")
    assert (stopped.ok, stopped.stop) == (False, True)


def test_what_cannot_be_started_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One device for each process; devices that there are; and no rank starts ranks."""
    with pytest.raises(LaunchError, match="one device for each process"):
        start(_hangs, None, 2, visible=[0])
    assert visible_devices([2, 0], "4, 5,7") == "7,4"
    with pytest.raises(LaunchError, match=r"devices=\[3\].*leaves 2"):
        visible_devices([3], "0,1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="one of several already"):
        start(_hangs, None, 2)


# ---- signals and scripts ---------------------------------------------------------------------------------------------

SCRIPT = """
    import os, signal, sys, time
    from pathlib import Path
    from lightdeco.processes import start

    class Work:
        def __init__(self, folder):
            self.folder = folder

    def work(payload, folder):
        folder, rank = Path(payload.folder), os.environ["RANK"]
        heard = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: heard.append(number))
        (folder / f"part-{rank}").write_text(str(os.getpid()))
        (folder / f"part-{rank}").rename(folder / f"pid-{rank}")
        while not heard:
            time.sleep(0.01)
        time.sleep(0.3)
        (folder / f"heard-{rank}").write_text(str(heard))
        raise KeyboardInterrupt if heard[0] == signal.SIGINT else SystemExit(143)

    if __name__ == "__main__":
        for folder in sys.argv[1:]:
            try:
                start(work, Work(folder), 2)
            except BaseException as error:
                print(repr(error), flush=True)
            else:
                print("as if nothing had happened", flush=True)
"""


def _python(*arguments: str, text: str | None = None, **variables: str) -> "subprocess.Popen[str]":
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(Path(ld.__file__).parents[1]), **variables},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    if text is not None and process.stdin is not None:
        process.stdin.write(dedent(text))
    return process


def _until(condition: Callable[[], bool], seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while not condition() and time.monotonic() < limit:
        time.sleep(0.02)
    return condition()


def test_a_signal_to_the_parent_ends_all(tmp_path: Path) -> None:
    """Ctrl-C and SIGTERM reach each rank once and end the call; a parent that is killed leaves no orphan.

    The ranks import the script, which is guarded, for its class and its function.
    """
    (tmp_path / "script.py").write_text(dedent(SCRIPT))
    folders = {number: tmp_path / number.name for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)}
    for folder in folders.values():
        folder.mkdir()
    process = _python(str(tmp_path / "script.py"), *map(str, folders.values()), TMPDIR=str(tmp_path))
    try:
        for number, folder in folders.items():
            assert _until(lambda folder=folder: len(_pids(folder)) == 2, 30)
            process.send_signal(number)
            assert _until(lambda folder=folder: _ended(folder), 5)
        out, err = process.communicate(timeout=10)
    finally:
        process.kill()
    assert (out, err) == ("KeyboardInterrupt()\nSystemExit(143)\n", "")
    assert process.returncode == -signal.SIGKILL
    assert list(tmp_path.glob("lightdeco-*/payload")) == []  # the model's copy is not left behind
    for number, folder in folders.items():
        heard = [] if number == signal.SIGKILL else [f"[{int(number)}]"] * 2
        assert [path.read_text() for path in sorted(folder.glob("heard-*"))] == heard


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """It works as long as no rank needs the script; otherwise it is refused, before a process starts."""
    source = """
        import joining
        from lightdeco import processes

        class Net:
            pass

        print("script")
        print("result", processes.start(joining.join, "a", 1).name)
        processes._popen = None
        processes.start(joining.join, [Net()], 2)
    """
    (tmp_path / "script.py").write_text(dedent(source))
    (tmp_path / "joining.py").write_text("def join(payload, folder):\n    return folder / payload\n")
    process = _python(str(tmp_path / "script.py"))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert out == "script\nresult a\n"
    assert f"LaunchError: {tmp_path / 'script.py'}:11 starts 2 processes" in err
    assert "for Net " in err
    assert 'put it under `if __name__ == "__main__":`' in err


def test_a_class_under_the_guard(tmp_path: Path) -> None:
    """It is refused before a process starts: the processes would import the script and not find it."""
    source = """
        import joining
        from lightdeco import processes

        if __name__ == "__main__":
            class Net:
                pass

            processes._popen = None
            processes.start(joining.join, [Net()], 2)
    """
    (tmp_path / "script.py").write_text(dedent(source))
    (tmp_path / "joining.py").write_text("def join(payload, folder):\n    return folder / payload\n")
    process = _python(str(tmp_path / "script.py"))
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert f"LaunchError: {tmp_path / 'script.py'}:6 defines Net under" in err
    assert "define it above that line" in err


def test_classes_of_a_notebook_travel_by_value() -> None:
    """What is defined where no file is, a class with a role and a lambda too, reaches the ranks through cloudpickle."""
    pytest.importorskip("cloudpickle")
    source = """
        import lightdeco as ld
        from lightdeco.processes import start
        from lightdeco.attach import attachments

        class Net:
            @ld.training_step
            def step(self, batch):
                return batch * 2

        def work(net, folder):
            return net.step(21), attachments(net)["attach validation_step"].function(net, 5), net

        net = ld.attach(Net(), validation_step=lambda net, batch: batch + 1)
        first, second, back = start(work, net, 1)
        print(first, second, type(back) is Net)
    """
    out, err = _python("-", text=source).communicate(timeout=30)
    assert out == "42 6 True\n", err


# ---- packing ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_sent_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the attribute and what to do, with cloudpickle and without it."""
    model = Tied()
    model.act = lambda x: x
    payload = {"model": nn.Sequential(model)}
    real = importlib.util.find_spec
    without = lambda name, *more: None if name == "cloudpickle" else real(name, *more)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", without)
        with pytest.raises(
            LaunchError, match=r"^model\.0\.act \(.*<lambda>, .*test_processes.py:\d+\) cannot be sent .*`pip"
        ):
            pack(payload, tmp_path / "file")
    pytest.importorskip("cloudpickle")
    pack(payload, tmp_path / "file")
    assert unpack(tmp_path / "file")[0]["model"][0].act(3) == 3
    model.act = {"locks": [threading.Lock()]}
    with pytest.raises(
        LaunchError, match=r"^model\.0\.act\['locks'\]\[0\] \(a lock\) cannot be sent .*configure_model"
    ):
        pack(payload, tmp_path / "file")


def test_pickle_alone_leaves_roles_out_and_pack_carries_them(tmp_path: Path) -> None:
    """Roles of an instance go along when processes are started, and only then; the class is the same afterwards."""
    model = ld.attach(nn.Linear(1, 1), training_step=half_loss)
    assert attachments(pickle.loads(pickle.dumps(model))) == {}
    assert pack({"model": model}, tmp_path / "file", function=half_loss) == set()
    payload, function = unpack(tmp_path / "file")
    assert attachments(payload["model"])["attach training_step"].function is half_loss is function
    assert type(payload["model"]) is nn.Linear


# ---- joined ----------------------------------------------------------------------------------------------------------

TORCHRUN = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0"} | {
    "MASTER_PORT": "29500"
}
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "9",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NODELIST": "gpu[08-09],login",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2),1",
}


@pytest.fixture
def restored() -> Iterator[None]:
    """The environment as before, whatever the test sets."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("restored")
def test_torchrun_and_srun_say_which_process_this_is() -> None:
    """torchrun's variables count first; from srun's, `join` makes torchrun's for the process group to read."""
    assert (joined({}), place({})) == (False, Place())
    assert (joined({"WORLD_SIZE": "1", "RANK": "0"}), joined(TORCHRUN), joined(SRUN)) == (False, True, True)
    assert place(SRUN | TORCHRUN) == place(TORCHRUN) == Place(3, 1, 4, 2, "n0", 29500)
    found = place(SRUN)
    assert found[:5] == (5, 2, 7, 3, "gpu08")
    assert 10_000 <= found.port < 30_000
    assert place(SRUN | {"SLURM_STEP_ID": "3"}).port != found.port == place(SRUN | {"SLURM_PROCID": "0"}).port
    assert place(SRUN | {"MASTER_ADDR": "me", "MASTER_PORT": "5"})[4:] == ("me", 5)
    assert place(SRUN | {"SLURM_STEP_NODELIST": "gpu08"}).address == "127.0.0.1"
    os.environ.update(SRUN)
    assert join() == found
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"], os.environ["MASTER_ADDR"]) == ("5", "7", "gpu08")
    assert place() == found


@pytest.mark.parametrize("name", list(TORCHRUN)[:2] + list(TORCHRUN)[4:])
def test_a_missing_variable_of_a_launcher_is_named(name: str) -> None:
    """Rather than waiting for ranks that never come."""
    with pytest.raises(LaunchError, match=f"{name} not set"):
        place({key: value for key, value in TORCHRUN.items() if key != name})
    with pytest.raises(LaunchError, match="WORLD_SIZE='two'"):
        joined({"WORLD_SIZE": "two"})


def test_a_shell_within_slurm_is_not_one_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """An sbatch script, an salloc shell and `srun --pty bash` run one process, however many tasks the job has."""
    batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_JOB_NAME": "train"}
    assert not joined(batch)
    assert not joined(batch | {"SLURM_STEP_ID": "4294967290", "SLURM_STEP_NUM_TASKS": "1"})
    pty = SRUN | {"SLURM_PTY_PORT": "4000", "SLURM_JOB_NAME": "bash"}
    monkeypatch.setattr(os, "isatty", lambda stream: True)
    assert not joined(pty)
    monkeypatch.setattr(os, "isatty", lambda stream: False)
    assert joined(pty)  # srun within that shell: its tasks inherit both variables, but have no terminal
    assert joined(SRUN | {"SLURM_JOB_NAME": "bash"})


def test_node_lists_of_slurm() -> None:
    """Ranges, several brackets, leading zeros; what Slurm does not write is refused."""
    assert hosts("node[01-03,07]") == ["node01", "node02", "node03", "node07"]
    assert hosts("a,b[9-10]-x,r[1-2]n[5,6]") == ["a", "b9-x", "b10-x", "r1n5", "r1n6", "r2n5", "r2n6"]
    assert hosts("") == []
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    with pytest.raises(LaunchError, match="MASTER_ADDR"):
        hosts("node[a-b]")


def test_beats_cost_nothing_without_a_parent() -> None:
    """In a process on its own a heartbeat is a call and no more."""
    begin = time.perf_counter()
    for step in range(10_000):
        beat(step, "a step")
    assert time.perf_counter() - begin < 0.05
