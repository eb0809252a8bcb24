"""Watching started processes: who ended how, who hangs, which failure was the first, and the end of all of them."""

import os
import pickle
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from .child import SLOT
from .errors import LaunchError, add_note, lost

#: How often the parent looks.
_POLL_S: Final = 0.05
#: After the first failure, how long evidence is awaited of what caused it: a killed peer is seen a little later.
_SETTLE_S: Final = 0.2
#: From SIGTERM to SIGKILL after a failure. With the two above, no process lives 5 s longer than the first to fail.
_GRACE_S: Final = 2.0
#: How long the others may take when one rank has ended because it was asked to: they may be writing a checkpoint.
_STOP_S: Final = 60.0
#: How long a rank may take at least to its first heartbeat: interpreter and torch, perhaps from a slow file system.
_START_S: Final = 300.0
#: How long a rank may take to exit after it has left its result.
_EXIT_S: Final = 30.0
#: A death without a word is noticed after the errors that it causes in others; by this much it goes before them.
_SILENT_S: Final = 1.0

_HINTS: Final = {
    signal.SIGKILL: " (out of memory?)",
    signal.SIGSEGV: " (a crash in native code)",
    signal.SIGBUS: " (is /dev/shm full?)",
}


@dataclass
class Ending:
    """How a rank ended, and when it failed."""

    ok: bool
    when: float = 0.0
    text: str = ""  # with the traceback
    last: str = ""  # without
    error: BaseException | None = None
    stop: bool = False  # it was asked to, by a signal


@dataclass
class Rank:
    """One started process, and what the parent knows of it."""

    number: int
    process: "subprocess.Popen[str]"
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=100))
    reader: threading.Thread | None = None
    ending: Ending | None = None
    beats: int = -1
    since: float = field(default_factory=time.monotonic)

    def listen(self) -> None:
        """Keep the last lines of its stderr, where that is a pipe."""
        if self.process.stderr is not None:
            arguments = (self.process.stderr,)
            self.reader = threading.Thread(target=self.tail.extend, args=arguments, name="lightdeco-tail", daemon=True)
            self.reader.start()

    def send(self, number: int, group: bool = False) -> None:
        """A signal to the process, or to it and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            if group:
                os.killpg(self.process.pid, number)  # the group outlives its leader as long as it has members
            else:
                self.process.send_signal(number)


class Forwarding:
    """Signals that reach the parent while it waits, passed on to every rank, each once."""

    def __init__(self) -> None:
        self.ranks: list[Rank] = []
        self.stop: int | None = None  # the first signal that asks to end
        self.now = False  # asked a second time
        self._at = 0.0

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if number != signal.SIGUSR1:
            # `timeout` and batch systems may send one signal twice within a moment; a person takes longer.
            self.now = self.stop is not None and time.monotonic() > self._at + 1.0
            if self.stop is None:
                self.stop, self._at = number, time.monotonic()
        for rank in self.ranks:
            rank.send(number)

    @contextmanager
    def installed(self) -> Iterator["Forwarding"]:
        """Handle SIGINT, SIGTERM, SIGHUP and SIGUSR1, but those that are ignored; only in the main thread."""
        before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for heard in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
                if signal.getsignal(heard) not in (signal.SIG_IGN, None):
                    before[heard] = signal.signal(heard, self)
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def raise_stop(self) -> None:
        """What the signal would have done to this process, as an exception."""
        if self.stop == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop is not None:
            raise SystemExit(128 + self.stop)


def watch(ranks: Sequence[Rank], folder: Path, timeout_s: float, forwarding: Forwarding) -> None:
    """Return when every rank has left its result; otherwise end all and raise what came first.

    Raises:
        the exception of the first rank that failed, where it can be rebuilt; its cause is a LaunchError with the text
        LaunchError: a rank was killed, exited without a result, hung, or raised what cannot be rebuilt
        KeyboardInterrupt, SystemExit: the processes ended because a signal asked them to
    """
    limit = float("inf")
    while not all(rank.ending is not None for rank in ranks) and not forwarding.now and time.monotonic() < limit:
        time.sleep(_POLL_S)
        for rank in ranks:
            rank.ending = rank.ending or _ending(rank, folder, len(ranks), forwarding.stop)
        failed = [rank.ending for rank in ranks if rank.ending is not None and not rank.ending.ok]
        if failed:
            patience = _STOP_S if all(ending.stop for ending in failed) else _SETTLE_S
            limit = min(limit, time.monotonic() + patience)
        elif (text := _hang(ranks, folder, timeout_s)) is not None:
            end(ranks, 0.0)
            raise LaunchError(text)
    failed = [rank.ending for rank in ranks if rank.ending is not None and not rank.ending.ok]
    if forwarding.now or any(rank.ending is None or not (rank.ending.ok or rank.ending.stop) for rank in ranks):
        end(ranks, 0.0 if forwarding.now else _GRACE_S)
    else:
        end(ranks, _EXIT_S, ask=False)
    first = min(failed, key=lambda ending: (lost(ending.last), ending.when), default=None)
    if first is None or first.stop:
        forwarding.raise_stop()
    if first is not None:
        _raise(first, ranks)


def end(ranks: Sequence[Rank], grace_s: float, ask: bool = True) -> None:
    """End what still runs: SIGTERM if `ask`, and after `grace_s` SIGKILL, also for all that a process started.

    Without `ask`, what a process that has exited by itself left running (an upload, say) is left alone.
    """
    for rank in ranks:
        if ask and rank.ending is None:
            rank.send(signal.SIGTERM)
    limit = time.monotonic() + grace_s
    for rank in ranks:
        with suppress(subprocess.TimeoutExpired):
            rank.process.wait(max(0.0, limit - time.monotonic()))
    for rank in ranks:
        if ask or rank.process.returncode is None:
            rank.send(signal.SIGKILL, group=True)
    for rank in ranks:
        rank.process.wait()
        if rank.process.stdin is not None:
            rank.process.stdin.close()
        if rank.reader is not None and rank.process.stderr is not None:
            rank.reader.join(1.0)
            rank.process.stderr.close()


# ---- endings ---------------------------------------------------------------------------------------------------------


def _ending(rank: Rank, folder: Path, count: int, stop: int | None) -> Ending | None:
    """How a rank has ended; None while it works."""
    code = rank.process.poll()  # before the look for its outcome, which it leaves before it exits
    path, name = folder / f"outcome-{rank.number}", f"rank {rank.number} of {count}"
    if not path.exists():
        return None if code is None else _silent(rank, folder, name, code, stop)
    outcome = pickle.loads(path.read_bytes())
    if outcome["ok"]:
        return Ending(ok=True)
    error: BaseException | None = None
    if outcome["error"] is not None:
        with suppress(Exception):  # its class may not be found here; the text is
            error = pickle.loads(outcome["error"])
    if isinstance(error, SystemExit) and error.code in (None, 0):
        last = f"{name} called sys.exit(0) before the end"
        return Ending(False, outcome["time"], f"{outcome['text']}\n{last}", last)
    stopped = isinstance(error, (SystemExit, KeyboardInterrupt))
    text, last = (f"{outcome[key].rstrip()}\n(on {name})" for key in ("text", "last"))
    return Ending(False, outcome["time"], text, last, error, stopped)


def _silent(rank: Rank, folder: Path, name: str, code: int, stop: int | None) -> Ending:
    step, what = progress(folder, rank.number)
    at = f", at step {step} ({what})" if what else ", before it could begin"
    if code >= 0:
        text = f"{name} exited with {code} and without a result{at}"
    else:
        number = signal.Signals(-code)
        text = f"{name} was killed by {number.name}{_HINTS.get(number, '')}{at}"
    return Ending(
        False, time.monotonic() - _SILENT_S, text, text, stop=stop is not None and code in (-stop, 128 + stop)
    )


def _raise(first: Ending, ranks: Sequence[Rank]) -> NoReturn:
    """Raise a failure; the text names the other ranks' failures before it, but for those that it caused."""
    failed = [rank.ending for rank in ranks if rank.ending is not None and not rank.ending.ok]
    others = [ending for ending in failed if ending is not first and not lost(ending.last)]
    parts = [ending.last for ending in sorted(others, key=lambda ending: -ending.when)]
    (culprit,) = (rank for rank in ranks if rank.ending is first)
    if wrote := "".join(culprit.tail).strip():
        parts.append(f"rank {culprit.number} wrote last:\n{wrote}")
    text = "\n\n".join([*parts, first.text])
    whole = LaunchError(text if first.error is None else f"in the processes that were started:\n\n{text}")
    whole.rank = culprit.number
    if first.error is None:
        raise whole
    add_note(first.error, first.text.rpartition("\n")[2])
    raise first.error from whole


# ---- heartbeats ------------------------------------------------------------------------------------------------------


def progress(folder: Path, rank: int) -> tuple[int, str]:
    """The step of a rank's last heartbeat and what it was about to do."""
    slot = (folder / "beats").read_bytes()[rank * SLOT : (rank + 1) * SLOT]
    return int.from_bytes(slot[:8], "little"), slot[16:].rstrip(b"\0").decode(errors="replace")


def _hang(ranks: Sequence[Rank], folder: Path, timeout_s: float) -> str | None:
    """The text about the rank that hangs, when one has not beaten for `timeout_s`; its stack at the end."""
    if timeout_s == float("inf"):
        return None
    now, content = time.monotonic(), (folder / "beats").read_bytes()
    for rank in ranks:
        beats = int.from_bytes(content[rank.number * SLOT + 8 : rank.number * SLOT + 16], "little")
        if beats != rank.beats or rank.ending is not None:
            rank.beats, rank.since = beats, now
    if all(now - rank.since < (timeout_s if rank.beats else max(timeout_s, _START_S)) for rank in ranks):
        return None
    still = [rank for rank in ranks if now - rank.since > timeout_s / 2]
    for rank in still:
        if (folder / f"stack-{rank.number}").exists():  # otherwise the signal would kill it
            rank.send(signal.SIGUSR2)
    time.sleep(0.3)
    # Ranks that wait for another one do so inside of torch; of the rest, the one at the lowest step is to blame.
    seen = []
    for rank in still:
        lines = _stack(folder / f"stack-{rank.number}")
        step, what = progress(folder, rank.number)
        waits = not lines or any(part in lines[0] for part in ("/torch/", "/accelerate/"))
        silence = f"made no progress for {timeout_s / 60:g} minutes, at step {step} ({what})"
        text = f"rank {rank.number} of {len(ranks)} {silence}"
        seen.append((waits, step, rank.number, "\n".join([*reversed(lines), text])))
    return "\n\n".join(text for *_, text in sorted(seen, reverse=True))


def _stack(path: Path) -> list[str]:
    """The lines of the main thread in a dump of `faulthandler`, innermost frame first, without those of lightdeco."""
    lines: list[str] = []
    if not path.exists():
        return lines
    for line in path.read_text(errors="replace").splitlines():
        if line.startswith(("Thread ", "Current thread ")):
            lines = []  # the main thread comes last
        elif line.startswith("  File ") and "/lightdeco/child.py" not in line and '"<string>"' not in line:
            lines.append(line)
    return lines[:20]
