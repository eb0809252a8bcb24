"""Checkpoints of a model that lies in parts on several processes: each writes whole tensors, which are dealt out.

    model-00001-of-00002.safetensors       a file for each process, as Hugging Face names them, and
    model.safetensors.index.json           its index: in which file each tensor is
    optimizer-00001-of-00002.safetensors   what belongs to parameters that are cut
    optimizer.safetensors                  the other tensors of the optimizers

`state.safetensors`, `state.json` and `manifest.json` are as ever. A tensor is gathered, and kept by its owner alone,
one at a time: no process ever holds all of them.
"""

import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torch.optim import Optimizer

from lightdeco.dtensor import is_sharded, rows, whole
from lightdeco.errors import CheckpointError
from lightdeco.group import Group

from . import storage, tensors
from .content import FILES, JSON, MODEL, OPTIMIZER, OTHERS, Snapshot, State, encode
from .files import Record, Sink, dump, reported

INDEX: Final = "model.safetensors.index.json"
_PART: Final = re.compile(r"(model|optimizer)-(\d{5})-of-(\d{5})\.safetensors")


# ---- names -----------------------------------------------------------------------------------------------------------


def part_name(file: str, rank: int, size: int) -> str:
    """The name of a process's file.

    >>> part_name("model.safetensors", 0, 2)
    'model-00001-of-00002.safetensors'
    """
    return f"{file.removesuffix('.safetensors')}-{rank + 1:05d}-of-{size:05d}.safetensors"


def is_part(file: str) -> bool:
    """Whether a file is that of one process of several."""
    return _PART.fullmatch(file) is not None


def holding(names: Collection[str], file: str) -> list[str]:
    """Which of the files of a checkpoint hold what `file`, one of `FILES`, holds in an undivided one."""
    stem = file.removesuffix(".safetensors") + "-"
    return [name for name in sorted(names) if name == file or (name.startswith(stem) and is_part(name))]


def complete(names: Collection[str]) -> bool:
    """Whether these are the files of a checkpoint, of one process or of several."""
    if set(names) == set(FILES):
        return True
    sizes = {int(found[3]) for name in names if (found := _PART.fullmatch(name))}
    if len(sizes) != 1:
        return False
    (size,) = sizes
    parts = {part_name(file, rank, size) for file in (MODEL, OPTIMIZER) for rank in range(size)}
    return set(names) == parts | {OPTIMIZER, OTHERS, JSON, INDEX}


# ---- dealing out -----------------------------------------------------------------------------------------------------


class Dealer:
    """Gives each tensor to the process that has the least so far; every process has one and does the same."""

    def __init__(self, group: Group) -> None:
        self._rank, self._loads = group.rank, [0] * group.size

    def give(self, tensor: Tensor) -> Tensor:
        """A whole tensor, which every process has: its owner's copy on the CPU; the others get a stand-in for it."""
        owner = self._loads.index(min(self._loads))
        self._loads[owner] += tensor.numel() * tensor.itemsize
        made = tensor.cpu() if owner == self._rank else torch.empty_like(tensor, device="meta")
        return tensors.owned(made, owner)


def deal(state: State, optimizers: Mapping[str, Optimizer], group: Group) -> None:
    """Give each tensor that is cut to one process, whole.

    Every process calls it. Costs an all-gather for each tensor.

    Raises:
        CheckpointError: an optimizer's state is cut in another way than its parameter.
    """
    dealer = Dealer(group)

    def dealt(tensor: Any) -> Any:
        return dealer.give(whole(tensor)) if isinstance(tensor, Tensor) and is_sharded(tensor) else tensor

    state.model = {name: dealt(value) for name, value in state.model.items()}
    for name, optimizer in optimizers.items():
        saved = state.optimizers[name]
        live = [parameter for each in optimizer.param_groups for parameter in each["params"]]
        for key, parts in saved["state"].items():
            for part, value in parts.items():
                _refuse_other_cut(live[key], value, part, type(optimizer).__name__)
            saved["state"][key] = {part: dealt(value) for part, value in parts.items()}


def _refuse_other_cut(parameter: Tensor, value: Any, part: str, kind: str) -> None:
    if isinstance(value, Tensor) and is_sharded(value) and (value.shape, value.dim() > 0) != (parameter.shape, True):
        raise CheckpointError(
            f"{part!r} of {kind} has the shape {tuple(value.shape)} for a parameter of {tuple(parameter.shape)}: it "
            "is cut in a way of its own, which a checkpoint cannot hold; use another optimizer, or checkpoint=False"
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


def save(directory: Path, name: str, state: State | Snapshot, group: Group) -> Path:
    """Write a checkpoint to which every process gives its part; every process calls it.

    Raises:
        CheckpointError: as `checkpoint.save`; on the process where it happened, and on rank 0.
    """
    content = state if isinstance(state, Snapshot) else encode(state)
    if group.rank > 0:
        folder = group.same(None)
        if folder is not None:
            written = _tried(lambda: _write(Path(folder), content, group))
            group.gather(written)
            if written[1] is not None:
                raise written[1]
        return Path(directory) / name
    told = False

    def fill(temporary: Path) -> dict[str, Record]:
        nonlocal told
        told = True
        group.same(str(temporary))
        files: dict[str, Record] = {}
        failed: list[Exception] = []
        for written, error in group.gather(_tried(lambda: _write(temporary, content, group))):
            files |= written
            failed += [error] if error is not None else []
        if failed:
            raise failed[0]
        return files

    try:
        return storage.write(Path(directory), name, fill, content.facts)
    finally:
        if not told:
            group.same(None)


def _tried(write: Callable[[], dict[str, Record]]) -> tuple[dict[str, Record], Exception | None]:
    """What was written, or the error, of which the others must hear."""
    try:
        with reported("a part of the checkpoint could not be written (every process must see the folder)"):
            return write(), None
    except Exception as error:
        return {}, error


def _write(folder: Path, content: Snapshot, group: Group) -> dict[str, Record]:
    """The files of this process."""
    rank, size = group.rank, group.size
    model = {name: tensor for name, tensor in content.model.items() if (tensors.owner(tensor) or 0) == rank}
    optimizer = {name: tensor for name, tensor in content.optimizer.items() if tensors.owner(tensor) == rank}
    written: dict[str, Mapping[str, Tensor]] = {
        part_name(MODEL, rank, size): model,
        part_name(OPTIMIZER, rank, size): optimizer,
    }
    texts: dict[str, bytes] = {}
    if rank == 0:
        written[OPTIMIZER] = {n: t for n, t in content.optimizer.items() if tensors.owner(t) is None}
        written[OTHERS] = content.others
        texts = {JSON: content.text, INDEX: _index(content, size)}
    files: dict[str, Record] = {}
    for file, group_of in written.items():
        with Sink(folder / file) as sink:
            tensors.write(sink, group_of)
            files[file] = sink.finish()
    for file, text in texts.items():
        with Sink(folder / file) as sink:
            sink.write(text)
            files[file] = sink.finish()
    return files


def _index(content: Snapshot, size: int) -> bytes:
    total = sum(tensor.numel() * tensor.itemsize for tensor in content.model.values())
    places = {name: part_name(MODEL, tensors.owner(tensor) or 0, size) for name, tensor in content.model.items()}
    return dump({"metadata": {"total_size": total}, "weight_map": places})


# ---- reading ---------------------------------------------------------------------------------------------------------


def own_rows(group: Group) -> Callable[[str, Tensor], Tensor]:
    """What a process keeps of each tensor that is cut, while a file is read."""

    def keep(name: str, tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        return tensors.as_part(tensor[rows(tuple(tensor.shape), group.rank, group.size)].clone())

    return keep
