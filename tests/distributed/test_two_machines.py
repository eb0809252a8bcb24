"""Two machines: two network namespaces of Linux, joined by nothing but one cable, with one process each."""

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lightdeco as ld
from tests.distributed.test_group import expected
from tests.models import QUIET, Net, batches

ROOT = Path(__file__).resolve().parents[2]
ADDRESSES = ("10.77.0.1", "10.77.0.2")


def ip(*arguments: str) -> None:
    """Call iproute2; its complaint is the message of the error."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@pytest.fixture
def machines() -> Iterator[list[str]]:
    """Two namespaces, each with a loopback and one end of a veth pair; they see nothing else."""
    if shutil.which("ip") is None:
        pytest.skip("needs iproute2 (the command ip)")
    tag = uuid.uuid4().hex[:6]
    names = [f"lightdeco-{tag}-{i}" for i in range(2)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", f"ld{tag}0", "netns", names[0], "type", "veth", "peer", f"ld{tag}1", "netns", names[1])
        except OSError as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        for i, name in enumerate(names):
            ip("-n", name, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"ld{tag}{i}")
            ip("-n", name, "link", "set", f"ld{tag}{i}", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def start(machine: str, rank: int, folder: Path, **more: str) -> "subprocess.Popen[str]":
    """One process on a machine, with the variables that torchrun would set there."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCHELASTIC_"))}
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    place |= {"MASTER_ADDR": ADDRESSES[0], "MASTER_PORT": "29511"}
    command = ["ip", "netns", "exec", machine, sys.executable, "-m", "tests.distributed.program"]
    return subprocess.Popen(
        [*command, str(folder / f"rank-{rank}.json")],
        cwd=ROOT,
        env=kept | place | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(ranks: list["subprocess.Popen[str]"], seconds: float = 100) -> list[tuple[int, str]]:
    """Wait for the processes: how each ended, and what it wrote."""
    try:
        outputs = [process.communicate(timeout=seconds)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [(process.returncode, output) for process, output in zip(ranks, outputs, strict=True)]


@pytest.mark.slow
def test_two_machines_work_together(machines: list[str], tmp_path: Path) -> None:
    """They find each other by the address of the first, each is rank 0 of its machine, and they train one model."""
    interface = subprocess.run(
        ["ip", "-n", machines[0], "-o", "link", "show", "type", "veth"], capture_output=True, text=True, check=True
    ).stdout
    tag = interface.split(":")[1].strip().split("@")[0][:-1]
    ranks = [start(name, i, tmp_path, GLOO_SOCKET_IFNAME=f"{tag}{i}") for i, name in enumerate(machines)]
    ended = finish(ranks)
    assert [status for status, _ in ended] == [0, 0], "\n".join(output for _, output in ended)
    for rank in range(2):
        found = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert found["results"] == [expected(rank, local_rank=0)] * 2
        assert found["address"] == ADDRESSES[0]
    every = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    runs = [each["run"] for each in every]
    assert runs[0] == runs[1]
    assert every[0]["cut"] == every[1]["cut"]
    assert every[0]["cut"]["weights"] == pytest.approx(runs[0]["weights"], rel=1e-6)
    assert every[0]["cut"]["metrics"]["val/loss"] == pytest.approx(runs[0]["metrics"]["val/loss"], rel=1e-6)
    assert (runs[0]["world_size"], runs[0]["steps"]) == (2, 6)
    alone, data = Net(dropout=0.0), batches(6)
    pairs = [tuple(map(torch.cat, zip(*data[i : i + 2], strict=True))) for i in range(0, 6, 2)]
    run = ld.fit(alone, (pairs, data), max_epochs=2, seed=1, name="alone", **QUIET)
    assert runs[0]["metrics"]["val/loss"] == pytest.approx(run.metrics["val/loss"], rel=1e-5)
    assert runs[0]["metrics"]["train/loss"] == pytest.approx(run.metrics["train/loss"], rel=1e-5)
    assert sorted(path.name for path in tmp_path.glob("runs/*/checkpoints/*"))


@pytest.mark.slow
def test_the_machines_are_apart(machines: list[str]) -> None:
    """What listens on one machine's loopback is not there on the other: only the cable joins them."""
    seen = "import socket; print(*sorted(name for _, name in socket.if_nameindex()))"
    found = [
        subprocess.run(["ip", "netns", "exec", name, sys.executable, "-c", seen], capture_output=True, text=True).stdout
        for name in machines
    ]
    assert all(len(names.split()) == 2 for names in found), found
    assert found[0] != found[1]
