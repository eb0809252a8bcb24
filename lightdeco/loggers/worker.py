"""`Worker`: calls one logger on a thread of its own, so that neither its failures nor its waiting reach a run."""

import threading
import time
from queue import SimpleQueue
from typing import Any, Final

#: Calls that may wait for a logger, and bytes of images, histograms and the like among them; more are dropped.
MAX_CALLS: Final = 10_000
MAX_BYTES: Final = 256 * 2**20

_Call = tuple[str, tuple[Any, ...], int]


class Worker:
    """Calls a logger's methods in the order of `put`, on a thread that the first `put` starts and `finish` ends.

    `put`, `finish` and `report` are for one thread, the one that trains. Nothing here takes a lock that a forked
    process could inherit while it is held and then need: a fork never calls `put`.

    Args:
        name: the logger's, for messages and for the thread.
        logger: its methods are called by name.
        max_calls: calls that may wait; more are dropped and counted.
        max_bytes: the same in bytes, of the sizes given to `put`; a single larger value may pass.
    """

    def __init__(self, name: str, logger: object, max_calls: int = MAX_CALLS, max_bytes: int = MAX_BYTES) -> None:
        self.name = name
        self._logger, self._max_calls, self._max_bytes = logger, max_calls, max_bytes
        self._queue: SimpleQueue[_Call | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._given_bytes = self._taken_bytes = 0  # each is written by one thread only
        self._given = self._taken = self._dropped = 0  # calls
        self._left = False  # given up: the thread ends after the call that it is in
        self.failure: tuple[str, BaseException] | None = None  # the first failing call

    def put(self, method: str, *arguments: object, size: int = 0) -> None:
        """Have a method called, or drop the call when too many wait; `size` is that of the arguments in bytes."""
        waiting = self._given_bytes - self._taken_bytes
        if self._queue.qsize() >= self._max_calls or (waiting and waiting + size > self._max_bytes):
            self._dropped += 1
            return
        self._put(method, arguments, size)
        self._given += 1

    def finish(self, status: str, has_close: bool) -> None:
        """Have the logger closed and the thread ended after all calls so far; nothing can be put any more."""
        if has_close:
            self._put("close", (status,), 0)
        self._queue.put(None)

    def join(self, deadline: float) -> str:
        """Wait for the end, at most until `deadline` (of `time.monotonic`); what went wrong, as a sentence, or ""."""
        if self._thread is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()))
            self._left = self._thread.is_alive()
        total, waiting = self._given + self._dropped, max(0, self._given - self._taken) if self._left else 0
        lost = f": {self._dropped + waiting} of {total} calls were dropped" if self._dropped + waiting else ""
        if self._left:
            return f"the logger {self.name!r} did not come to its end in time and is left behind{lost}"
        return f"the logger {self.name!r} was too slow{lost}" if lost else ""

    def close_here(self, status: str) -> None:
        """Close a logger that must be closed on the thread that trains, after `join`; not one that is left behind."""
        if not self._left:
            self._do("close", (status,))

    def _put(self, method: str, arguments: tuple[Any, ...], size: int) -> None:
        if self._thread is None:
            # A daemon: a logger that waits for a dead network must not hold the end of the process.
            thread = threading.Thread(target=self._work, name=f"lightdeco-{self.name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the system has no thread left
                self.failure, self._dropped, self._given = (method, error), self._dropped + 1, self._given - 1
                return
            self._thread = thread
        self._given_bytes += size
        self._queue.put((method, arguments, size))

    def _work(self) -> None:
        while (call := self._queue.get()) is not None and not self._left:
            method, arguments, size = call
            try:
                self._do(method, arguments)
            except BaseException as error:  # also SystemExit: the thread must go on
                self.failure = self.failure or (method, error.with_traceback(None))
            self._taken_bytes += size
            self._taken += method != "close"
            del call, arguments  # nothing is held while waiting

    def _do(self, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            getattr(self._logger, method)(*arguments)
        except Exception as error:
            self.failure = self.failure or (method, error.with_traceback(None))
