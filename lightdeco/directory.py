"""The run's directory: made, found again to resume from, and locked while a run writes into it."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, NamedTuple

from . import checkpoint
from .callbacks.model_checkpoint import POLICY
from .checkpoint.content import CHECKPOINTS
from .checkpoint.manifest import MANIFEST
from .errors import CheckpointError, LaunchError, SettingsError, nearest, warn
from .loggers.metrics_file import METRICS
from .settings import Settings

#: Locked by the process that writes into a run's directory, and holds its number.
LOCK: Final = "run.lock"


# ---- new -------------------------------------------------------------------------------------------------------------


def make_directory(settings: Settings, class_name: str) -> Path:
    """Make the run's directory, exclusively: `<root_dir>/<name>`, or `<root_dir>/<Class>/version_<n>`.

    Raises:
        SettingsError: the name exists (without `overwrite`), or `root_dir` cannot be written.
    """
    root = Path(settings.root_dir)
    try:
        if settings.name is not None:
            return _named(root, settings.name, settings.overwrite)
        parent = root / class_name
        parent.mkdir(parents=True, exist_ok=True)
        version = max(_versions(parent), default=-1) + 1
        while True:  # another process may make the same one: mkdir decides
            try:
                (parent / f"version_{version}").mkdir()
                break
            except FileExistsError:
                version += 1
        return _writable(parent / f"version_{version}")
    except OSError as error:
        raise SettingsError(f"root_dir={str(root)!r} cannot be written: {error}; give a directory that can") from error


def _named(root: Path, name: str, overwrite: bool) -> Path:
    path = root / name
    root.mkdir(parents=True, exist_ok=True)
    try:
        path.mkdir()
    except FileExistsError:
        if not overwrite:
            raise SettingsError(f"name={name!r}: {path} exists; give another name, or overwrite=True") from None
        ours = path.is_dir() and not path.is_symlink() and ((path / METRICS).exists() or not any(path.iterdir()))
        if not ours:
            raise SettingsError(f"name={name!r}: {path} is no run of lightdeco, so it is not overwritten") from None
        with locked(path):
            shutil.rmtree(path)
        path.mkdir()
    return _writable(path)


def _writable(path: Path) -> Path:
    (path / METRICS).touch(exist_ok=False)
    return path


# ---- found again -----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Where a run goes on: its directory (None: a new one) and the checkpoint (None: from the start)."""

    directory: Path | None
    checkpoint: Path | None


def find(
    settings: Settings,
    class_name: str,
    which: str | os.PathLike[str],
    words: tuple[str, ...] = ("auto", "last", "best"),
) -> Found:
    """The checkpoint that `resume=` or `weights=` means: one of the words, or a path.

    A path is a checkpoint, a folder of checkpoints or a run's directory. A name looks in `<root_dir>/<name>`, without a
    name in the newest `<root_dir>/<Class>/version_<n>`. Checkpoints that are passed over are named in a warning each.

    Raises:
        CheckpointError: there is none ("auto" starts anew then), or none of those that are there is valid.
    """
    if which not in words:
        return _at(Path(which), which, words)
    directory = _existing(settings, class_name)
    where = directory or (Path(settings.root_dir) / (settings.name or class_name))
    newest = _newest(where / CHECKPOINTS)
    if newest is None:
        if which == "auto":
            return Found(directory, None)
        raise CheckpointError(f"{which!r}: there is no checkpoint in {where}; look at name and root_dir")
    return Found(where, newest if which != "best" else _best(newest))


def _existing(settings: Settings, class_name: str) -> Path | None:
    root = Path(settings.root_dir)
    if settings.name is not None:
        return root / settings.name if (root / settings.name).is_dir() else None
    versions = _versions(root / class_name)
    return versions[max(versions)] if versions else None


def _versions(parent: Path) -> dict[int, Path]:
    """The directories `version_<n>`, by n."""
    return {int(n): path for path in parent.glob("version_*") if (n := path.name.removeprefix("version_")).isdecimal()}


def _at(path: Path, given: object, words: tuple[str, ...]) -> Found:
    if (path / MANIFEST).is_file():
        folder, found = path.parent, path
    else:
        folder = path if path.name == CHECKPOINTS else path / CHECKPOINTS
        newest = _newest(folder)
        if newest is None:
            allowed = ", ".join(map(repr, words))
            raise CheckpointError(
                f"{str(given)!r} is no checkpoint, and no directory that holds one; allowed: {allowed}, the path of a "
                f"checkpoint or of a run{nearest(str(given), words)}"
            )
        found = newest
    return Found(folder.parent if folder.name == CHECKPOINTS else None, found)


def _newest(folder: Path) -> Path | None:
    found, passed_over = checkpoint.newest_valid(folder)
    for path, reason in passed_over:
        warn(f"the checkpoint {path} was passed over: {reason}")
    return found


def _best(newest: Path) -> Path:
    kept = checkpoint.load(newest).callbacks.get(POLICY, {}).get("kept", {})
    scored = [name for name, score in kept.items() if score is not None]
    if not scored:
        raise CheckpointError(
            f"'best': {newest} knows of none; a best one is kept by ModelCheckpoint(monitor=…), and by default where "
            "there is a validation that returns a loss"
        )
    path = newest.parent / str(scored[-1]).replace("/", "")
    checkpoint.verify(path)
    return path


# ---- locked ----------------------------------------------------------------------------------------------------------

_held: set[Path] = set()  # by this process; the lock of the system is one per process


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Keep other runs out of a directory. The system frees the lock of a process that dies.

    Raises:
        LaunchError: another run writes into it; names its process and host.
    """
    path = directory.resolve() / LOCK
    if path in _held:
        raise LaunchError(f"{directory} is in use by a run of this very process; give another name")
    with path.open("a+", encoding="utf-8") as file:
        try:
            _lock(file.fileno())
            if not os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                raise OSError("removed by its owner a moment ago")
        except OSError:
            file.seek(0)
            owner = file.read(200).strip() or "another process"
            raise LaunchError(f"{directory} is in use by {owner}; wait for its end, or give another name") from None
        _held.add(path)
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
            yield
        finally:
            _held.discard(path)
            with suppress(OSError):
                path.unlink()


def _lock(descriptor: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
    else:
        # Not flock: forked workers would hold it on after the run was killed.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
