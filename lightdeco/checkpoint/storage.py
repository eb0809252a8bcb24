"""Directories that are there whole or not at all: written beside, synced, read back, renamed, pruned.

What is being written, replaced or removed lies in a hidden sibling. Its name says what it is and which process owns it:
`.<name>.<new, old or gone>-<machine>-<process>-<random>`.
"""

import hashlib
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from lightdeco.errors import CheckpointError

from .files import Record, reported, sync_directory
from .manifest import Manifest, check_files, read_manifest, verify, write_manifest

_HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<kind>new|old|gone)-(?P<host>[0-9a-f]+)-(?P<pid>\d+)-[0-9a-f]{8}")
#: After so many seconds a hidden directory belongs to nobody, even if a process with its number lives.
_STALE_S: Final = 86_400
_active: set[str] = set()  # hidden directories that this process works in now


def write(directory: Path, name: str, fill: Callable[[Path], dict[str, Record]], facts: Mapping[str, Any]) -> Path:
    """Make `directory/name` with the files that `fill` writes into the empty directory it is given.

    Nothing is visible under `name` before everything is on the disk and was read back. A directory that has the name
    is replaced; if that is interrupted, `clean` puts it back.

    Raises:
        CheckpointError: the system refused (disk full, read-only, …); what was there before is as it was.
    """
    check_name(name)
    target = directory / name
    with reported(f"checkpoint {target} could not be written"):
        if target.is_symlink() or (target.exists() and not target.is_dir()):
            raise CheckpointError(f"{target}: is no directory and is not replaced; move it away")
        _make(directory)
        clean(directory)
        with _hidden(directory, name, "new") as temporary:
            os.mkdir(temporary)
            files = fill(temporary)
            write_manifest(temporary, Manifest(_next_serial(directory), dict(facts), files))
            sync_directory(temporary)
            verify(temporary)
            _put(temporary, target)
            sync_directory(directory)
        check_files(target)
    return target


def _put(temporary: Path, target: Path) -> None:
    """Rename; POSIX can replace no directory that holds files, so the one that is there steps aside for a moment."""
    if not target.exists():
        os.rename(temporary, target)
        return
    with _hidden(target.parent, target.name, "old") as aside:
        try:
            os.rename(target, aside)
            os.rename(temporary, target)
        finally:
            if not target.exists() and aside.exists():
                os.rename(aside, target)


def remove(path: Path) -> None:
    """Delete a directory such that nothing half deleted is ever seen under its name."""
    with reported(f"checkpoint {path} could not be removed"), _hidden(path.parent, path.name, "gone") as gone:
        os.rename(path, gone)
        shutil.rmtree(gone)


def clean(directory: Path) -> None:
    """Delete what dead processes left, and put back what one of them had set aside to replace it."""
    for entry in hidden(directory):
        found = _HIDDEN.fullmatch(entry.name)
        if found is None or not _abandoned(entry, found["host"], int(found["pid"])):
            continue
        target = directory / found["name"]
        with reported(f"{entry} could not be cleaned up"):
            if found["kind"] == "old" and not target.exists():
                os.rename(entry, target)
            else:
                _discard(entry)


def hidden(directory: Path) -> list[Path]:
    """The hidden directories of ours in a folder."""
    with reported(f"{directory}: cannot be listed"):
        entries = [Path(entry) for entry in os.scandir(directory) if entry.is_dir(follow_symlinks=False)]
    return sorted(entry for entry in entries if _HIDDEN.fullmatch(entry.name))


def set_aside(directory: Path) -> dict[str, Path]:
    """The directories that are set aside for one that is not there yet, by their real name."""
    names = [(_HIDDEN.fullmatch(entry.name), entry) for entry in hidden(directory)]
    olds = {found["name"]: entry for found, entry in names if found is not None and found["kind"] == "old"}
    return {name: entry for name, entry in olds.items() if not (directory / name).exists()}


def check_name(name: str) -> None:
    """Refuse a name that is not one of a visible directory.

    Raises:
        CheckpointError: empty, hidden, too long, or with a separator or control character in it.
    """
    allowed = re.fullmatch(r'[^./\\:*?"<>|\x00-\x1f][^/\\:*?"<>|\x00-\x1f]*', name) and not name.endswith((" ", "."))
    if not allowed or len(os.fsencode(name)) > 150:
        raise CheckpointError(
            f"{name!r} cannot name a checkpoint; allowed: at most 150 bytes, no leading or final dot, none of "
            '/ \\ : * ? " < > | and no control character'
        )


@contextmanager
def _hidden(directory: Path, name: str, kind: str) -> Iterator[Path]:
    """The path of a hidden sibling, which is removed at the end; but not the last copy of what has this name."""
    path = directory / f".{name}.{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"
    _active.add(path.name)
    try:
        yield path
    finally:
        if kind != "old" or ((directory / name).exists() and path.exists()):
            _discard(path)
        _active.discard(path.name)


def _discard(path: Path) -> None:
    """Delete a hidden directory; under another name first, so that a half deleted one is never put back."""
    gone = path.with_name(path.name.replace(".old-", ".gone-"))
    if gone != path:
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _host() -> str:
    # Hashed, so that any name of any length gives one of word characters.
    return hashlib.blake2s(socket.gethostname().encode(), digest_size=4).hexdigest()


def _abandoned(path: Path, host: str, pid: int) -> bool:
    """Whether the process that made a hidden directory is gone; of another machine's only its age is known."""
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False  # just renamed by its owner
    if age > _STALE_S:
        return True
    if host != _host() or os.name == "nt":  # on Windows os.kill(pid, 0) is no question
        return False
    if pid == os.getpid():
        return path.name not in _active
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _make(directory: Path) -> None:
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        sync_directory(directory.parent)


def _next_serial(directory: Path) -> int:
    serials = [0]
    for entry in os.scandir(directory):
        try:
            serials.append(read_manifest(Path(entry)).serial)
        except CheckpointError:  # no checkpoint, or a bad one: it has no place in the order
            continue
    return max(serials) + 1
