"""Ranks that are forked from one process which has imported everything: a run of several starts in no time.

They find each other as under torchrun; kills and signals are real. What a rank returns comes back as JSON.
"""

import contextlib
import faulthandler
import gc
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch

from lightdeco import joined
from lightdeco.processes import _Store

SECONDS: Final = 40.0  # for one start of all ranks

Pids = Sequence[int]


@dataclass
class Ended:
    """How a rank ended: the exit status (negative: the signal), what it printed, what its function returned."""

    status: int
    text: str
    value: Any = None


def start(
    work: Callable[[], Any], size: int = 2, act: Callable[[Pids], None] | None = None, patience: float = SECONDS
) -> list[Ended]:
    """Run `work` in `size` forked ranks; `act(pids)` interrupts them from outside. Waits for the end of all.

    Raises:
        AssertionError: they did not end within `patience` seconds.
    """
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        store = _Store(size)
        pids: list[int] = []
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _child(work, Path(folder), joined.Place(rank, rank, size, size, port=store.port), patience)
            pids.append(pid)
        if act is not None:
            act(pids)
        statuses = _wait(pids, time.monotonic() + patience)
        texts = [(Path(folder) / f"text-{rank}").read_text(errors="replace") for rank in range(size)]
        hung = [rank for rank, status in enumerate(statuses) if status is None]
        assert not hung, f"the ranks {hung} did not end within {patience} s; all wrote:\n" + "\n----\n".join(texts)
        values = [Path(folder) / f"value-{rank}" for rank in range(size)]
        return [
            Ended(status or 0, text, json.loads(value.read_text()) if value.exists() else None)
            for status, text, value in zip(statuses, texts, values, strict=True)
        ]


def together(work: Callable[[], Any], size: int = 2, patience: float = SECONDS) -> list[Any]:
    """What each rank returned; raises where one did not come to its end."""
    ended = start(work, size, patience=patience)
    texts = [f"rank {rank} ended with {end.status}:\n{end.text[-3000:]}" for rank, end in enumerate(ended)]
    assert not any(end.status for end in ended), "\n----\n".join(texts)
    return [end.value for end in ended]


def die_together() -> None:
    """End all ranks at once, as when the machine goes down."""
    os.killpg(0, signal.SIGKILL)


def _child(work: Callable[[], Any], folder: Path, place: joined.Place, patience: float) -> None:
    """Run in the forked process; never returns."""
    gc.freeze()  # garbage of the parent may wait, as it ends, for a thread that was not forked
    leader = folder / "leader"
    if place.rank == 0:
        os.setpgid(0, 0)
        leader.with_suffix(".new").write_text(str(os.getpid()))
        leader.with_suffix(".new").replace(leader)
    else:
        while not leader.exists():
            time.sleep(0.001)
        os.setpgid(0, int(leader.read_text()))
    output = os.open(folder / f"text-{place.rank}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    faulthandler.dump_traceback_later(0.9 * patience, file=output)  # where it hangs, if it does
    if place.world_size > 1:
        os.environ.update(place.variables() | {"TORCHELASTIC_USE_AGENT_STORE": "True"})
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Threads and processes in which inductor compiles, if the parent did, were not forked: here it compiles by itself.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
    if (config := sys.modules.get("torch._inductor.config")) is not None:
        config.compile_threads = 1
    # The pool of threads that was forked is made anew by the first who asks; autograd's own threads would not wait.
    torch.set_num_threads(torch.get_num_threads())
    status = 1
    try:
        value = work()
        (folder / f"value-{place.rank}").write_text(json.dumps(value))
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


def _wait(pids: Pids, deadline: float) -> list[int | None]:
    """The statuses of all; None for what had to be killed."""
    statuses: dict[int, int | None] = {}
    while len(statuses) < len(pids):
        for pid in pids:
            if pid in statuses:
                continue
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                statuses[pid] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > deadline:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
        time.sleep(0.002)
    return [statuses[pid] for pid in pids]
