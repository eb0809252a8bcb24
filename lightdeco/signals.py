"""Signals while a fit runs: they set a flag, and the run stops at the next step, saved."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final

#: What each signal ends the process with, once the run is saved.
ENDS: Final[dict[int, Callable[[], BaseException]]] = {
    signal.SIGTERM: lambda: SystemExit(128 + signal.SIGTERM),
    signal.SIGINT: KeyboardInterrupt,
}

#: What a first Ctrl-C is answered with.
STOPPING: Final = "stopping after this step; press Ctrl-C again to stop at once"
_answers = 0


def answers() -> int:
    """How often this process has written `STOPPING` to its stderr, each time below the line of the cursor."""
    return _answers


class Signals:
    """SIGTERM and SIGINT: `received` is the first that came, or None.

    The handler sets the flag and calls the handler that was there before. A second SIGINT raises `KeyboardInterrupt` at
    once; a second SIGTERM changes nothing, so that a save that is under way is finished. `requeues` is one more, after
    which the job is requeued (`requeue.py`); None: there is none, or the run has come to its end.
    """

    def __init__(self) -> None:
        #: The first that this process heard of.
        self.heard: int | None = None
        #: The first that the run is to end for: with several processes, once all have agreed on it.
        self.received: int | None = None
        self.shared = False
        self.requeues: int | None = None
        self._before: dict[int, Any] = {}

    @contextmanager
    def caught(self) -> Iterator[None]:
        """Catch the signals until the end; Python allows it in the main thread only, elsewhere nothing is caught.

        Raises:
            SystemExit, KeyboardInterrupt: one came, and nothing has ended the run for it yet.
        """
        if threading.current_thread() is threading.main_thread():
            for number in {*ENDS, *([] if self.requeues is None else [self.requeues])}:
                before = signal.getsignal(number)
                if before is not signal.SIG_IGN:  # as under nohup
                    self._before[number] = signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, before in self._before.items():
                signal.signal(number, signal.SIG_DFL if before is None else before)
        self.end()  # one that came in the last events

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again = self.heard == number == signal.SIGINT
        if self.heard is None:
            self.heard = number
            if not self.shared:
                self.received = number
            if number == signal.SIGINT:
                _answer()
        before = self._before[number]
        if again:
            raise KeyboardInterrupt
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)

    @property
    def name(self) -> str | None:
        """The name of what was received, such as "SIGTERM"."""
        return None if self.received is None else signal.Signals(self.received).name

    def end(self) -> None:
        """End the process as the signal asks; does nothing when none came.

        Raises:
            SystemExit: with status 143 after SIGTERM, 138 after SIGUSR1 in a job of Slurm.
            KeyboardInterrupt: after SIGINT; a script then ends with status 130.
        """
        if self.received is not None:
            raise ENDS.get(self.received, lambda: SystemExit(128 + (self.received or 0)))()


def _answer() -> None:
    global _answers
    os.write(2, f"\n{STOPPING}\n".encode())  # past Python's buffers, which the handler may have interrupted
    _answers += 1
