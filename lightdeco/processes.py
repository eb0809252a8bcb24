"""Starting processes on this machine for one call.

    start:  pack the call into a file  ->  one process per rank (child.py)  ->  watch them (watching.py)  ->  the result

Each process leads a session of its own: a terminal's Ctrl-C reaches the parent alone, which passes it on once, and a
rank can be killed together with all that it started. Its stdin is a pipe that the parent holds: when the parent dies,
however that happens, the pipe closes and the process ends itself.
"""

import ast
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from multiprocessing.spawn import get_command_line
from pathlib import Path
from types import FrameType
from typing import TypeVar, cast

import torch

from . import packing
from .child import SLOT
from .errors import LaunchError
from .joined import Place, joined
from .watching import Forwarding, Rank, end, watch

P = TypeVar("P")
R = TypeVar("R")


def start(
    function: Callable[[P, Path], R],
    payload: P,
    count: int,
    *,
    directory: Path | None = None,
    visible: Sequence[int] | None = None,
    environment: Mapping[str, str] | None = None,
    timeout_minutes: float | None = None,
) -> R:
    """Call `function(payload, directory)` in `count` new processes of this machine; return what rank 0 returned.

    The processes are new interpreters, never forks, with torchrun's variables; a process group can be opened in them
    with `env://`. What they get is a copy, tensors on the CPU, with the roles that `ld.attach` gave. Rank 0 writes to
    the caller's stdout and stderr; the last 100 lines of another rank's stderr are shown with its failure. The process
    that calls holds no process group and trains nothing.

    Args:
        function: a function of a module; gets the payload and the directory.
        directory: a new directory, for the caller's own files too (weights, say); by default a temporary one, removed.
        visible: the CUDA devices of the processes, as the caller counts them; rank i of the run gets the i-th.
        environment: more environment variables.
        timeout_minutes: end the run when a rank has given no `child.beat` for so long; None: never.

    Raises:
        LaunchError: this process is one of several or is just being started itself; something cannot be sent; a rank
            was killed, exited early, hung, or raised what cannot be rebuilt here.
        KeyboardInterrupt, SystemExit: a signal ended the run.

    An exception of a rank is raised here as it was, where it can be pickled; its cause is a LaunchError with the text
    of every rank's failure, the first one last. Within 5 s of the first failure no process is left.
    """
    _refuse(count, visible)
    with ExitStack() as stack:
        folder = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lightdeco-")))
        if (folder / "payload").exists():
            raise LaunchError(f"{folder} served another call already; give each call a directory of its own")
        names = packing.pack(payload, folder / "payload", function=function)
        if names:
            _refuse_guarded(names)
            _refuse_unguarded(names, count)
        (folder / "start.json").write_text(json.dumps(packing.preparation(), default=str))
        (folder / "beats").write_bytes(bytes(SLOT * count))
        store = _Store(count)  # held until the last process has ended
        shared = _shared_variables(count, visible) | dict(environment or {})
        forwarding = stack.enter_context(Forwarding().installed())
        ranks: list[Rank] = []
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            for number in range(count):
                place = Place(number, number, count, count, port=store.port)
                ranks.append(_popen(number, folder, dict(os.environ) | shared | place.variables()))
            forwarding.ranks = ranks
            forwarding.raise_stop()  # a signal that came before there was anyone to pass it on to
            watch(ranks, folder, float("inf") if timeout_minutes is None else timeout_minutes * 60, forwarding)
        except BaseException:
            end(ranks, 0.0)
            raise
        return cast(R, packing.unpack(folder / "result")[0])


class _Store:
    """The store in which the processes of a run find each other; reached from this machine alone, on a free port.

    The parent holds it, as torchrun's agent does: so no port is chosen first and opened later by another process.
    """

    def __init__(self, count: int) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        listening = socket.create_server(("127.0.0.1", 0))
        self.port: int = listening.getsockname()[1]
        self._store = TCPStore(
            "127.0.0.1", self.port, count, True, wait_for_workers=False, master_listen_fd=listening.detach()
        )


def _shared_variables(count: int, visible: Sequence[int] | None) -> dict[str, str]:
    # The processes are clients of a store that exists: so says torchrun's agent too.
    found = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // count))
    if visible is not None:
        found["CUDA_VISIBLE_DEVICES"] = visible_devices(visible, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return found


def visible_devices(indices: Sequence[int], present: str | None) -> str:
    """`CUDA_VISIBLE_DEVICES` for devices as this process counts them, which may see only some itself.

    Raises:
        LaunchError: this process does not see that many.

    >>> visible_devices([0, 2], None), visible_devices([0, 2], "4,5,7")
    ('0,2', '4,7')
    """
    names = None if present is None else [name.strip() for name in present.split(",") if name.strip()]
    if names is not None and any(i >= len(names) for i in indices):
        raise LaunchError(
            f"devices={list(indices)}, but CUDA_VISIBLE_DEVICES={present!r} leaves {len(names)} to this process"
        )
    return ",".join(str(i) if names is None else names[i] for i in indices)


def _popen(number: int, folder: Path, variables: dict[str, str]) -> Rank:
    interpreter = get_command_line()
    path = [str(entry) for entry in sys.path]
    code = f"import sys; sys.path[:] = {path!r}; from lightdeco.child import main; main({str(folder)!r}, {number})"
    process = subprocess.Popen(
        [*interpreter[: interpreter.index("-c")], "-c", code],
        env=variables,
        stdin=subprocess.PIPE,
        stdout=None if number == 0 else subprocess.DEVNULL,
        stderr=None if number == 0 else subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    rank = Rank(number, process)
    rank.listen()
    return rank


# ---- what is refused before anything starts --------------------------------------------------------------------------


def _refuse(count: int, visible: Sequence[int] | None) -> None:
    if count < 1 or (visible is not None and len(visible) != count):
        raise LaunchError(f"{count} processes for the devices {visible}; give one device for each process")
    if (script := packing.importing_script()) is not None:
        raise LaunchError(
            f"{script} was imported by a process that it started, and would start processes again; put the call under "
            '`if __name__ == "__main__":`'
        )
    if joined():
        raise LaunchError("this process is one of several already (WORLD_SIZE > 1), so it starts none itself")
    if os.name != "posix" or not torch.distributed.is_available():
        raise LaunchError("torch has no processes to offer on this system; use one device, or Linux or macOS")


def _refuse_unguarded(names: set[str], count: int) -> None:
    """Refuse when the processes must import the script for its classes, and would meet the very same call in it."""
    main = vars(sys.modules["__main__"])
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not (frame.f_globals is main and frame.f_code.co_name == "<module>"):
        frame = frame.f_back
    if frame is None:
        return
    file, line = main.get("__file__"), frame.f_lineno
    for statement in _statements():
        around = [node for node in ast.walk(statement) if isinstance(node, ast.stmt) and _holds(node, line)]
        if around and not any(isinstance(node, ast.If) for node in around):
            some = ", ".join(sorted(names)[:3])
            raise LaunchError(
                f"{file}:{line} starts {count} processes, which import this file for {some} and would come to this "
                'line again; put it under `if __name__ == "__main__":`'
            )


def _refuse_guarded(names: set[str]) -> None:
    """Refuse what the script defines for itself alone: the processes import it, and would not find it."""
    guarded: dict[str, int] = {}
    everywhere: set[str] = set()
    for statement in _statements():
        if not isinstance(statement, ast.If) or "__name__" not in ast.unparse(statement.test):
            everywhere |= {n.name for n in ast.walk(statement) if isinstance(n, (ast.ClassDef, ast.FunctionDef))}
            continue
        for node in (each for part in statement.body for each in ast.walk(part)):
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                guarded[node.name] = node.lineno
    for name in sorted(name.partition(".")[0] for name in names):
        if name in guarded and name not in everywhere:
            raise LaunchError(
                f"{vars(sys.modules['__main__']).get('__file__')}:{guarded[name]} defines {name} under "
                '`if __name__ == "__main__":`, where the processes, which import this file, do not see it; define it '
                "above that line"
            )


def _statements() -> list[ast.stmt]:
    """Those of the script; none where there is no source to read: the process that is started will refuse."""
    file = vars(sys.modules["__main__"]).get("__file__")
    try:
        return ast.parse(Path(file).read_bytes()).body if file is not None else []
    except (OSError, SyntaxError, ValueError):
        return []


def _holds(node: ast.stmt, line: int) -> bool:
    return node.lineno <= line <= (node.end_lineno or node.lineno)
