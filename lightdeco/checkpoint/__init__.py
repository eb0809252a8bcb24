"""Checkpoints: a directory of safetensors and JSON that is there whole or not at all. Nothing is pickled.

    step=00000200/
        model.safetensors      the model's own state_dict; needs no lightdeco to load
        optimizer.safetensors  the tensors of the optimizers
        state.safetensors      every other tensor
        state.json             everything else; refers to the tensors by name
        manifest.json          size and hash of each file; written last

Of a model in parts there are several files: see dealt.py.

`save` and `load` move a `State`; `snapshot` copies one so that training may go on; `newest_valid` finds what to resume
from; `prune` removes the rest. `python -m lightdeco.checkpoint PATH` shows what is in one.
"""

from collections.abc import Collection
from pathlib import Path

from torch import Tensor

from lightdeco.errors import CheckpointError
from lightdeco.group import Group

from . import dealt, storage, tensors
from .content import FILES, JSON, MODEL, OPTIMIZER, OTHERS, Snapshot, State, decode, encode, snapshot
from .files import MAX_JSON, Record, Sink, Source, reported
from .manifest import MANIFEST, Manifest, check_files, read_manifest, verify
from .restore import Loaded, load_optimizer, load_weights
from .tensors import Keep

__all__ = [
    "Loaded",
    "Snapshot",
    "State",
    "load",
    "load_optimizer",
    "load_weights",
    "newest_valid",
    "prune",
    "save",
    "snapshot",
    "verify",
]

# ---- writing ---------------------------------------------------------------------------------------------------------


def save(directory: Path, name: str, state: State | Snapshot) -> Path:
    """Write a checkpoint `directory/name` and return its path. When this returns, it is on the disk and was read back.

    A checkpoint of that name is replaced; a missing directory is made. Called on one process. A `State` must not change
    meanwhile: pass a `snapshot` from another thread. Costs writing everything once and reading it back from the cache.

    Raises:
        CheckpointError: names the key of a value that cannot be kept, or says why the system refused. The checkpoints
            that were there are untouched.

    >>> import tempfile, torch
    >>> folder = Path(tempfile.mkdtemp())
    >>> path = save(folder, "step=00000001", State(model={"w": torch.ones(2)}, progress={"global_step": 1}))
    >>> load(path).model["w"]
    tensor([1., 1.])
    """
    content = state if isinstance(state, Snapshot) else encode(state)

    def fill(temporary: Path) -> dict[str, Record]:
        files: dict[str, Record] = {}
        for file, group in ((MODEL, content.model), (OPTIMIZER, content.optimizer), (OTHERS, content.others)):
            with Sink(temporary / file) as sink:
                tensors.write(sink, group)
                files[file] = sink.finish()
        with Sink(temporary / JSON) as sink:
            sink.write(content.text)
            files[JSON] = sink.finish()
        return files

    return storage.write(Path(directory), name, fill, content.facts)


def prune(directory: Path, keep: Collection[str]) -> list[str]:
    """Remove every checkpoint of a folder but those named, and return the names of the removed.

    Directories that hold no file of a checkpoint are left alone. To be called after `save`, never before.

    Raises:
        CheckpointError: none of `keep` is there (nothing is removed then), or the system refused.
    """
    found = {path.name: path for path in _candidates(directory) if not path.is_symlink()}
    if not found.keys() & set(keep):
        raise CheckpointError(f"{directory}: none of {sorted(keep)} is there, so nothing is pruned")
    ours = {MANIFEST, *FILES}
    surplus = [
        name for name, path in found.items() if name not in keep and any((path / file).exists() for file in ours)
    ]
    for name in surplus:
        storage.remove(found[name])
    return surplus


# ---- reading ---------------------------------------------------------------------------------------------------------


def load(path: Path, cut: Group | None = None) -> State:
    """Read a checkpoint. Every size and hash is checked; tensors are on the CPU.

    Nothing is unpickled, imported or evaluated, and the memory used is bounded by the size of the files.

    `cut`: the processes on which the model lies in parts: this one keeps its part of the optimizers' tensors, and no
    tensor of the model, which `load_weights` reads.

    Raises:
        CheckpointError: names the file and what is wrong with it.
    """
    path = Path(path)
    manifest = _manifest(path)
    keep = None if cut is None else dealt.own_rows(cut)
    groups: list[dict[str, Tensor]] = [{}, {}, {}]
    for found, group in zip(groups, (MODEL, OPTIMIZER, OTHERS), strict=True):
        if cut is None or group != MODEL:
            for file in dealt.holding(manifest.files, group):
                found |= _read_tensors(path, manifest, file, keep if dealt.is_part(file) else None)
    with Source(path / JSON) as source:
        if source.size > MAX_JSON:
            raise CheckpointError(f"{path / JSON}: {source.size} bytes; allowed: {MAX_JSON}")
        text = source.read(source.size)
        source.check(manifest.files[JSON])
    return decode(text, path / JSON, *groups)


def newest_valid(directory: Path) -> tuple[Path | None, list[tuple[Path, str]]]:
    """The newest checkpoint that is whole, and those that were passed over, with the reason for each.

    The order is that of writing, whatever names and clocks say. One without a readable manifest has no place in it and
    is always reported. `(None, [])` when there is no checkpoint at all. Cleans up after processes that died. Costs
    reading the newest once.

    Raises:
        CheckpointError: there are checkpoints and none of them is valid; lists the reason for each.
    """
    directory = Path(directory)
    if not directory.is_dir():
        return None, []
    storage.clean(directory)
    passed: list[tuple[Path, str]] = []
    ordered: list[tuple[int, Path]] = []
    for path in [*_candidates(directory), *storage.set_aside(directory).values()]:
        try:
            ordered.append((read_manifest(path).serial, path))
        except CheckpointError as error:
            passed.append((path, str(error)))
    for _, path in sorted(ordered, reverse=True):
        try:
            _manifest(path)
            verify(path)
        except CheckpointError as error:
            passed.append((path, str(error)))
        else:
            return path, passed
    if passed:
        reasons = "".join(f"\n  {reason}" for _, reason in passed)
        raise CheckpointError(
            f"{directory} holds no valid checkpoint; put one of them right, or remove them all to start anew:{reasons}"
        )
    return None, []


def _candidates(directory: Path) -> list[Path]:
    """Every visible directory counts, so that a ruined checkpoint is never mistaken for none; links inside do not."""
    with reported(f"{directory}: cannot be listed"):
        root = Path(directory).resolve()
        found = sorted(path for path in Path(directory).iterdir() if path.is_dir() and not path.name.startswith("."))
        return [path for path in found if not (path.is_symlink() and path.resolve().parent == root)]


def _manifest(path: Path) -> Manifest:
    manifest = check_files(path)
    if not dealt.complete(manifest.files):
        raise CheckpointError(f"{path / MANIFEST}: lists {sorted(manifest.files)}; a checkpoint has {sorted(FILES)}")
    return manifest


def _read_tensors(path: Path, manifest: Manifest, file: str, keep: Keep | None) -> dict[str, Tensor]:
    with Source(path / file) as source:
        found = tensors.read(source, keep)
        source.check(manifest.files[file])
    return found
