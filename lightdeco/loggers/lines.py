"""A file that grows by whole lines, and stays a file of whole lines when a write fails or the machine stops."""

import contextlib
import os
from pathlib import Path


class Lines:
    """Appends bytes to a file, unbuffered: handed to the system when `append` returns.

    A last line that was torn by a crash is cut off when the file is opened, and what a full disk took of a line is cut
    off before the next one. `size` is the length in bytes of the whole lines.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self.size = _whole_lines(path)
        self._torn = path.is_file() and path.stat().st_size > self.size

    def append(self, lines: bytes) -> None:
        """Write whole lines; raises OSError when not all of them could be written."""
        if self._torn:
            self._file.truncate(self.size)
        self._torn = True
        written = self._file.write(lines)
        if written != len(lines):
            raise OSError(f"only {written} of {len(lines)} bytes could be written")
        self._torn = False
        self.size += len(lines)

    def cut(self, size: int) -> None:
        """Drop what was written after the file was `size` bytes long; does nothing when it is shorter."""
        if size < self.size:
            self._file.truncate(size)
            self.size, self._torn = size, False

    def close(self) -> None:
        """Close the file, without a torn line at its end; a later `append` raises ValueError."""
        if self._torn and not self._file.closed:
            with contextlib.suppress(OSError):  # a device that cannot be truncated; readers leave a torn line out
                self._file.truncate(self.size)
        self._file.close()


def _whole_lines(path: Path) -> int:
    """The length in bytes of the file up to and with its last newline; 0 for what is no regular file."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(0, position - 65536)
            file.seek(start)
            found = file.read(position - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            position = start
    return 0
