"""`manifest.json`: the size and hash of every other file in its directory, sealed by a hash of its own."""

import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import xxhash

from lightdeco.errors import CheckpointError

from .files import HASH, MAX_JSON, Record, Sink, Source, dump, parse, reported

MANIFEST: Final = "manifest.json"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of `manifest.json`; `serial` grows with each write in a folder, whatever the clock says."""

    serial: int
    facts: dict[str, Any]
    files: dict[str, Record]


def _sealed(body: dict[str, Any]) -> bytes:
    return dump({**body, HASH: xxhash.xxh3_128(dump(body)).hexdigest()}) + b"\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of a directory, when it is exactly as it was written.

    Raises:
        CheckpointError: missing, damaged, or of another format.
    """
    where = path / MANIFEST
    with Source(where) as source:
        if source.size > MAX_JSON:
            raise CheckpointError(f"{where}: {source.size} bytes; allowed: {MAX_JSON}")
        data = source.read(source.size)
    body = parse(data, where)
    if not isinstance(body, dict) or HASH not in body:
        raise CheckpointError(f"{where}: is no manifest of lightdeco")
    body.pop(HASH)
    if _sealed(body) != data:
        raise CheckpointError(f"{where}: is damaged: its own {HASH} hash does not fit")
    if body.get("format") != FORMAT:
        raise CheckpointError(
            f"{where}: has format {body.get('format')!r}; this lightdeco reads {FORMAT}: use the one that wrote it"
        )
    try:
        files = {str(n): Record(int(f["size"]), str(f[HASH])) for n, f in body["files"].items()}
        return Manifest(int(body["serial"]), dict(body["facts"]), files)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: lacks what a manifest holds: {error!r}") from None


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write it, last of all files, and wait until it is on the disk."""
    files = {name: {"size": record.size, HASH: record.digest} for name, record in manifest.files.items()}
    body = {"format": FORMAT, "serial": manifest.serial, "facts": manifest.facts, "files": files}
    with Sink(path / MANIFEST) as sink:
        sink.write(_sealed(body))
        sink.finish()


def check_files(path: Path) -> Manifest:
    """The manifest, when exactly its files are there, with the sizes it says. Reads nothing else.

    Hidden files, which file browsers leave, are not counted.

    Raises:
        CheckpointError: naming the file.
    """
    _check_link(path)
    manifest = read_manifest(path)
    with reported(f"{path}: cannot be listed"):
        present = {entry.name for entry in os.scandir(path)} - {MANIFEST}
        for name in sorted(manifest.files.keys() - present):
            raise CheckpointError(f"{path / name}: is missing")
        for name in sorted(present - manifest.files.keys()):
            if not name.startswith("."):
                raise CheckpointError(f"{path / name}: is not in {MANIFEST}; move it out of the checkpoint")
        for name, record in manifest.files.items():
            info = os.lstat(path / name)
            if not stat.S_ISREG(info.st_mode):
                raise CheckpointError(f"{path / name}: is a link or a directory; a checkpoint holds files alone")
            if info.st_size != record.size:
                raise CheckpointError(f"{path / name}: has {info.st_size} bytes; {MANIFEST} says {record.size}")
    return manifest


def verify(path: Path) -> Manifest:
    """`check_files`, and the hash of every file. Costs reading all of it once."""
    manifest = check_files(path)
    for name, record in manifest.files.items():
        with Source(path / name) as source:
            source.skip()
            source.check(record)
    return manifest


def _check_link(path: Path) -> None:
    if path.is_symlink() and path.resolve().parent != path.parent.resolve():
        raise CheckpointError(f"{path}: is a symbolic link that leads out of its folder; give {path.resolve()} itself")
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not a directory" if path.exists() else f"{path}: does not exist")
