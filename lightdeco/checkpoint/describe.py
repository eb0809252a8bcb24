"""What a checkpoint, a folder of them or a run holds, as text."""

import json
from collections import Counter
from pathlib import Path

from lightdeco.errors import CheckpointError

from . import load, tensors
from .content import CHECKPOINTS, FILES
from .files import Source
from .manifest import MANIFEST, read_manifest, verify

_SHOWN = 12


def describe(path: Path) -> tuple[str, bool]:
    """A text about what lies at `path`, and whether all of it is valid. Changes nothing.

    `path` is a checkpoint, a folder of checkpoints, or a run's directory with a folder `checkpoints` in it.
    """
    if not path.is_dir():
        return f"{path} is no directory; allowed: a checkpoint, a folder of checkpoints, a run's directory", False
    if any((path / name).exists() for name in (MANIFEST, *FILES)):
        return _one(path)
    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    found = [entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    if not found:
        return f"{path} holds no checkpoint", False
    texts = [_one(entry) for entry in sorted(found, key=_serial)]
    return "\n\n".join(text for text, _ in texts), all(valid for _, valid in texts)


def _serial(path: Path) -> tuple[int, str]:
    try:
        return read_manifest(path).serial, path.name
    except CheckpointError:
        return 0, path.name


def _one(path: Path) -> tuple[str, bool]:
    try:
        manifest = verify(path)
        facts, state = manifest.facts, load(path)
    except CheckpointError as error:
        return f"{path.name}: NOT VALID\n  {error}", False
    lines = [f"{path.name}: valid"]
    for label, key in (("step", "global_step"), ("epoch", "epoch"), ("written", "written")):
        if key in facts:
            lines.append(f"  {label}: {facts[key]}")
    made_with = {"lightdeco": facts.get("lightdeco"), "torch": facts.get("torch"), **state.versions}
    others = {name: made_with.pop(name, None) for name in ("platform", "command", "git_commit")}
    lines.append("  versions: " + ", ".join(f"{name} {value}" for name, value in made_with.items() if value))
    lines += [f"  {name.replace('_', ' ')}: {value}" for name, value in others.items() if value]
    latest = state.metrics.get("latest", state.metrics)  # beside them: what the epoch has counted so far
    for name, values in (("metrics", latest), ("hparams", state.hparams)):
        if values:
            lines.append(f"  {name}: " + _shortened([f"{key} = {_number(value)}" for key, value in values.items()]))
    for name in ("optimizers", "schedulers", "callbacks", "extra"):
        if keys := [str(key) or "1" for key in getattr(state, name) if not str(key).startswith("(")]:
            lines.append(f"  {name}: " + _shortened(keys))
    for file in sorted(manifest.files, key=_order):
        lines += _file(path / file)
    return "\n".join(lines), True


def _order(file: str) -> tuple[int, str]:
    return FILES.index(file) if file in FILES else 0 if file.startswith("model") else 1, file


def _file(path: Path) -> list[str]:
    title = f"  {path.name}: {size(path.stat().st_size)}"
    if path.suffix == ".json":
        return [title]
    with Source(path) as source:
        entries = tensors.read_header(source)
    totals = Counter[str]()
    for entry in entries.values():
        totals[str(entry.dtype)[6:]] += entry.end - entry.start
    lines = [f"{title}, {len(entries)} tensors" + "".join(f", {dtype} {size(n)}" for dtype, n in totals.items())]
    for name, entry in list(entries.items())[:_SHOWN]:
        lines.append(f"    {name}: {str(entry.dtype)[6:]} {list(entry.shape)}")
    if len(entries) > _SHOWN:
        lines.append(f"    … and {len(entries) - _SHOWN} more")
    return lines


def size(count: int) -> str:
    """A number of bytes for human eyes.

    >>> size(1234567)
    '1.2 MB'
    """
    value, unit = float(count), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def _shortened(items: list[str]) -> str:
    return ", ".join(items[:_SHOWN]) + (f", … and {len(items) - _SHOWN} more" if len(items) > _SHOWN else "")


def _number(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else json.dumps(text[:60]) + "…"
