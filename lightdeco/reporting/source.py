"""What is known of a run: read from its directory, and from the `Run` where there is one. Changes no file."""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lightdeco import ending
from lightdeco.callbacks.model_checkpoint import POLICY
from lightdeco.checkpoint import State
from lightdeco.checkpoint.content import CHECKPOINTS, JSON, MODEL, OTHERS
from lightdeco.checkpoint.dealt import holding
from lightdeco.checkpoint.encoding import Decoder
from lightdeco.checkpoint.files import Source, parse
from lightdeco.checkpoint.manifest import Manifest, check_files
from lightdeco.checkpoint.tensors import Entry, read, read_header
from lightdeco.directory import LOCK
from lightdeco.errors import CheckpointError, LightdecoError
from lightdeco.loggers import metrics_file
from lightdeco.loggers.masking import mask, mask_text
from lightdeco.loggers.metrics_file import METRICS
from lightdeco.run import Run
from lightdeco.settings import Settings, explicit

#: A run, or the directory of one that has ended, goes on or was killed.
RunOrDir = Run | str | os.PathLike[str]

_PARTS = ("hparams", "settings", "versions", "progress", "callbacks")
_PROFILES = ("profile.txt", "profile.json")
_LONGEST = 100_000  # characters of a profile
#: Of every setting.
DEFAULTS = {part.name: part.default for part in fields(Settings)}


@dataclass
class Checkpoint:
    """One checkpoint, as its manifest tells."""

    name: str
    step: int | None = None
    epoch: int | None = None
    written: str = ""
    size: int = 0
    """Bytes of all its files."""
    score: float | None = None
    problem: str = ""
    """Why it could not be read."""
    serial: int = -1
    """Grows with each write; -1 where it could not be read."""


@dataclass
class Facts:
    """What a page tells of a run. Secrets are masked; parts that are not known are empty."""

    title: str
    directory: Path | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    state: str = "unknown"
    """"finished", "failed", "interrupted", "running", "killed" or "unknown"."""
    ending: str = ""
    """How it ended, in words."""
    hparams: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    """Those that differ from their defaults."""
    environment: dict[str, Any] = field(default_factory=dict)
    checkpoints: list[Checkpoint] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    model: list[dict[str, str]] = field(default_factory=list)
    """Rows of the summary."""
    totals: str = ""
    profile: str = ""
    problems: list[str] = field(default_factory=list)
    """What could not be read, and why."""


def facts(source: RunOrDir) -> Facts:
    """Read all that is known of a run.

    Raises:
        LightdecoError: `source` is neither a `Run` nor the directory of one.
    """
    if isinstance(source, Run):
        return _of_run(source)
    if not isinstance(source, str | os.PathLike):
        raise LightdecoError(f"{source!r} is no run; allowed: a Run, or the path of a run's directory")
    directory = Path(source)
    if not (directory / METRICS).is_file():
        if directory.parent.name == CHECKPOINTS:
            hint = f"; did you mean {str(directory.parent.parent)!r}?"
        else:
            inside = sorted(path.parent for path in directory.glob(f"*/{METRICS}")) if directory.is_dir() else []
            hint = f"; did you mean {str(inside[-1])!r}?" if inside else ""
        raise LightdecoError(f"{str(directory)!r} is no directory of a run: it holds no {METRICS}{hint}")
    found = Facts("/".join(directory.resolve().parts[-2:]), directory)
    found.history = metrics_file.read(directory / METRICS)
    _read_directory(found, directory)
    found.state, found.ending = _ending_on_disk(directory)
    return found


def _of_run(run: Run) -> Facts:
    from lightdeco.callbacks.model_summary import _cells, summarize, total, totals_lines
    from lightdeco.loggers.environment import environment

    directory = run.dir if run.has_dir else None
    name = type(run.model).__name__
    found = Facts(name if directory is None else "/".join(directory.resolve().parts[-2:]), directory)
    if directory is not None:
        _read_directory(found, directory)
    found.history = [dict(record) for record in run.history]
    found.hparams = mask(run.hparams)
    found.settings = _plain_settings(explicit(run.settings))
    found.environment = environment()
    found.progress = {"epoch": run.epoch, "global_step": run.global_step, "seed": run.seed}
    found.model = [_cells(row) for row in summarize(run.model, 2)]
    found.totals = totals_lines(total(run.model))[0]
    told = None if directory is None else ending.read(directory)
    if told is not None:
        found.state, found.ending = _told(told)
    elif run.accelerator is not None:
        found.state, found.ending = "running", "still running when this page was written"
    elif run.stop_reason is not None:
        found.state, found.ending = "finished", _in_words(run.stop_reason)
    else:
        found.ending = "ended without a reason to stop: an error, or an interruption"
    return found


# ---- the directory ---------------------------------------------------------------------------------------------------


def _read_directory(found: Facts, directory: Path) -> None:
    """Checkpoints, what the newest of them holds, and the profile."""
    for path in sorted((directory / CHECKPOINTS).glob("*")):
        if path.is_dir() and not path.is_symlink() and not path.name.startswith("."):
            found.checkpoints.append(_checkpoint(path))
    found.checkpoints.sort(key=lambda one: (one.serial, one.name))
    found.problems += [f"checkpoint {one.name}: {one.problem}" for one in found.checkpoints if one.problem]
    for newest in reversed([one for one in found.checkpoints if not one.problem]):
        try:
            _read_newest(found, directory / CHECKPOINTS / newest.name)
            break
        except (CheckpointError, OSError) as error:  # a run that goes on may have removed it
            found.problems.append(f"checkpoint {newest.name}: {error}")
    for name in _PROFILES:
        if (directory / name).is_file() and not found.profile:
            text = (directory / name).read_text(encoding="utf-8", errors="replace")
            cut = f"\n… {len(text) - _LONGEST:,} characters more in {name}" if len(text) > _LONGEST else ""
            found.profile = mask_text(text[:_LONGEST]) + cut


def _checkpoint(path: Path) -> Checkpoint:
    try:
        manifest = check_files(path)
    except CheckpointError as error:
        return Checkpoint(path.name, problem=str(error))
    told = manifest.facts
    size = sum(record.size for record in manifest.files.values())
    step, epoch = (value if isinstance(value := told.get(name), int) else None for name in ("global_step", "epoch"))
    return Checkpoint(path.name, step, epoch, str(told.get("written", "")), size, serial=manifest.serial)


def _read_newest(found: Facts, path: Path) -> None:
    """What the newest checkpoint holds, without the tensors of model and optimizer, which may be many gigabytes."""
    manifest = check_files(path)
    parts = _parts(path, manifest)
    found.progress = dict(parts.progress)
    found.hparams = mask(parts.hparams)
    changed = {name: value for name, value in parts.settings.items() if DEFAULTS.get(name) != value}
    found.settings = _plain_settings(changed)
    found.environment = mask(parts.versions)
    kept = parts.callbacks.get(POLICY)
    scores = kept.get("kept") if isinstance(kept, dict) else None
    for one in found.checkpoints:
        score = scores.get(one.name) if isinstance(scores, dict) else None
        one.score = float(score) if isinstance(score, int | float) else None
    entries: dict[str, Entry] = {}
    for file in holding(manifest.files, MODEL):
        with Source(path / file) as source:
            entries |= read_header(source)
    found.model, found.totals = _tensors(entries)


def _parts(path: Path, manifest: Manifest) -> State:
    with Source(path / JSON) as source:
        text = source.read(source.size)
        source.check(manifest.files[JSON])
    with Source(path / OTHERS) as source:
        decoder = Decoder(read(source))
        source.check(manifest.files[OTHERS])
    raw, state = parse(text, path / JSON), State()
    for part in _PARTS:
        value = decoder.decode(raw.get(part) if isinstance(raw, dict) else None, f"{path / JSON}: {part}")
        if not isinstance(value, dict):
            raise CheckpointError(f"{path / JSON}: {part} is a {type(value).__name__}; a checkpoint has a dict there")
        setattr(state, part, value)
    return state


def _tensors(entries: Mapping[str, Entry]) -> tuple[list[dict[str, str]], str]:
    rows = [
        {"name": name, "shape": str(list(entry.shape)), "dtype": str(entry.dtype).removeprefix("torch.")}
        for name, entry in entries.items()
    ]
    size = sum(entry.end - entry.start for entry in entries.values())
    return rows, f"{len(rows):,} tensors, {size / 1e6:,.3g} MB"


def _plain_settings(settings: Mapping[str, object]) -> dict[str, Any]:
    return mask({name: value for name, value in settings.items() if name != "hparams"})


# ---- how it ended ----------------------------------------------------------------------------------------------------


def _in_words(reason: str) -> str:
    if reason in ("max_epochs", "max_steps", "max_time"):
        return f"finished: {reason} reached"
    return "stopped: run.should_stop was set" if reason == "should_stop" else f"stopped: {reason}"


def _ending_on_disk(directory: Path) -> tuple[str, str]:
    """The state and the ending as files tell: `end.json` of a run that has ended, the lock of one that has not."""
    told = ending.read(directory)
    if told is not None:
        return _told(told)
    try:
        owner = (directory / LOCK).read_text(encoding="utf-8", errors="replace")[:200].strip()
    except OSError:
        return "unknown", f"running or killed: there is no {ending.NAME}"
    alive = _is_alive(owner)
    if alive is None:
        return "unknown", f"running or killed: there is no {ending.NAME}; in use by {owner or 'another process'}"
    return ("running", f"still running: {owner}") if alive else ("killed", f"killed: {owner} is no more")


def _told(end: Mapping[str, Any]) -> tuple[str, str]:
    """The state and the ending as `end.json` has them."""
    status, error = str(end.get("status")), end.get("error")
    if status == "finished":
        reason = end.get("stop_reason")
        return status, _in_words(reason) if isinstance(reason, str) else status
    words = status
    if isinstance(error, dict):
        message = str(error.get("message") or "").strip()
        words += f": {error.get('class')}" + (f": {message}" if message else "")
    where = f"at step {end.get('step')}, in epoch {end.get('epoch')}"
    return status if status in ("failed", "interrupted") else "unknown", f"{words} ({where})"


def _is_alive(owner: str) -> bool | None:
    """Whether the process that a lock names is there; None where that cannot be told."""
    words = owner.split()
    if os.name == "nt" or len(words) != 4 or words[3] != socket.gethostname() or not words[1].isdecimal():
        return None
    try:
        os.kill(int(words[1]), 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
