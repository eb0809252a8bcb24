"""Files that are hashed while they are written and read, and JSON of bounded size.

The hash is xxh3_128: it guards against damage, not against attack, and keeps 10 GB/s, where SHA-256 would halve the
speed of a disk. Whoever can write into the folder can forge it.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import xxhash

from lightdeco.errors import CheckpointError

HASH: Final = "xxh3_128"
#: Bytes of JSON that are read at most, as a file or as the header of one.
MAX_JSON: Final = 64 << 20
#: Bytes that are hashed and written at a time: they are still in the cache the second time.
_CHUNK: Final = 1 << 20


class Record(NamedTuple):
    """What a manifest says about one file."""

    size: int
    digest: str


@contextmanager
def reported(what: str) -> Iterator[None]:
    """Turn an OSError into a CheckpointError that says what was being done, with the system's reason."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "unknown")
        raise CheckpointError(f"{what}: {error.strerror or error} ({name}, errno {error.errno})") from error


class Sink:
    """A new file that is hashed while it is written. Its mode is an ordinary one: the umask decides who may read it."""

    def __init__(self, path: Path) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o666)
        self._digest, self._size = xxhash.xxh3_128(), 0

    def __enter__(self) -> "Sink":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes (a contiguous buffer)."""
        view = memoryview(data).cast("B")
        for start in range(0, len(view), _CHUNK):
            chunk = view[start : start + _CHUNK]
            self._digest.update(chunk)
            while chunk:
                chunk = chunk[os.write(self._fd, chunk) :]
        self._size += len(view)

    def finish(self) -> Record:
        """Wait until the file is on the disk."""
        os.fsync(self._fd)
        return Record(self._size, self._digest.hexdigest())


class Source:
    """A file that is hashed while it is read. Links and what is no ordinary file are refused.

    Raises:
        CheckpointError: it cannot be opened or ends early.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_BINARY")  # NONBLOCK: opening a pipe must not wait for a writer
        with reported(f"{path}: cannot be opened"):
            if path.is_symlink():  # asked for first: the errno of O_NOFOLLOW differs between systems
                raise CheckpointError(f"{path}: is a symbolic link, which is not followed")
            self._fd = os.open(path, os.O_RDONLY | sum(getattr(os, flag, 0) for flag in flags))
        info = os.fstat(self._fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(self._fd)
            raise CheckpointError(f"{path}: is not an ordinary file")
        self.size, self.position, self._digest = info.st_size, 0, xxhash.xxh3_128()

    def __enter__(self) -> "Source":
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def fill(self, view: memoryview) -> None:
        """Read as many bytes as the buffer holds."""
        view = view.cast("B")
        with open(self._fd, "rb", buffering=0, closefd=False) as file, reported(f"{self.path}: cannot be read"):
            done = 0
            while done < len(view):
                count = file.readinto(view[done : done + _CHUNK])
                if not count:
                    raise CheckpointError(f"{self.path}: ends early, after {self.position + done} bytes")
                self._digest.update(view[done : done + count])
                done += count
        self.position += len(view)

    def read(self, size: int) -> bytes:
        """The next `size` bytes; the caller has bounded them."""
        data = bytearray(size)
        self.fill(memoryview(data))
        return bytes(data)

    def skip(self) -> None:
        """Read what is left, for the hash alone."""
        buffer = memoryview(bytearray(min(_CHUNK, self.size - self.position)))
        while (left := self.size - self.position) > 0:
            self.fill(buffer[:left])

    def check(self, record: Record) -> None:
        """Compare what was read with the manifest."""
        if self._digest.hexdigest() != record.digest:
            raise CheckpointError(f"{self.path}: is damaged: its {HASH} hash is not the one in the manifest")


def dump(value: Any) -> bytes:
    """Strict JSON, the same bytes for the same value."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def parse(data: bytes, where: object) -> Any:
    """The value of strict JSON.

    Raises:
        CheckpointError: too long, nested too deeply, NaN or numbers of absurd length in it, or no JSON at all.
    """

    def constant(name: str) -> float:
        raise ValueError(f"{name} is not strict JSON")

    def real(digits: str) -> float:
        if math.isfinite(number := float(digits)):
            return number
        raise ValueError(f"{digits[:20]} is out of range")

    def integer(digits: str) -> int:
        if len(digits) > 4000:  # quadratic in Python before 3.10.7
            raise ValueError(f"an integer of {len(digits)} digits")
        return int(digits)

    if len(data) > MAX_JSON:
        raise CheckpointError(f"{where}: {len(data)} bytes of JSON; allowed: {MAX_JSON}")
    try:
        return json.loads(data, parse_constant=constant, parse_float=real, parse_int=integer)
    except RecursionError:
        raise CheckpointError(f"{where}: is nested too deeply") from None
    except ValueError as error:
        raise CheckpointError(f"{where}: cannot be read as JSON: {error}") from None


def sync_directory(path: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    if os.name == "nt":  # Windows has no such call
        return
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that know no such call
            raise
    finally:
        os.close(fd)
