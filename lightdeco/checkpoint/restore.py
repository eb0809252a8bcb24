"""Put what a checkpoint holds back into a model and its optimizers, in place."""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightdeco.dtensor import cut, is_sharded, like
from lightdeco.errors import CheckpointError, nearest

from . import tensors
from .content import CHECKPOINTS, FILES, MODEL
from .files import Source
from .manifest import MANIFEST, check_files, read_manifest

_SHOWN = 10


class Loaded(NamedTuple):
    """What `load_weights(strict=False)` left out."""

    missing: list[str]
    """Names of the model that the file does not have; these tensors are as they were."""
    unexpected: list[str]
    """Names of the file that the model does not have."""


def load_weights(model: nn.Module, path: str | Path, strict: bool = True) -> Loaded:
    """Copy the weights of a checkpoint, or of any `.safetensors` file, into a model.

    The model's tensors stay the same objects on the same device with the same dtype. Of a checkpoint, the manifest and
    the model's file are verified; the other files are not read.

    Args:
        model: any module; parameters of a lazy one get their shapes from the file.
        path: a checkpoint's directory or a `.safetensors` file. For a run's directory the error lists what is there.
        strict: names must be the same, and a dtype of the file must be the model's or fit into it without loss (as
            bfloat16 into float32). With False, names that only one side has are left out and numbers are converted.

    Raises:
        CheckpointError: names, shapes or dtypes differ, or the file is damaged. Nothing is copied then. Shapes must be
            equal in any case.

    >>> import tempfile, torch, safetensors.torch
    >>> source, path = torch.nn.Linear(2, 1), Path(tempfile.mkdtemp()) / "weights.safetensors"
    >>> safetensors.torch.save_file(source.state_dict(), path)
    >>> _ = load_weights(target := torch.nn.Linear(2, 1), path)
    >>> bool(torch.equal(source.weight, target.weight))
    True
    """
    path = Path(path)
    wanted = model.state_dict(keep_vars=True)
    found = _read(path, wanted)
    for name, tied in _tied(wanted, found).items():
        found[name] = found[tied]
    missing = [name for name in wanted if name not in found]
    unexpected = [name for name in found if name not in wanted]
    complaints = _misfits(wanted, found, strict)
    if strict or len(missing) == len(wanted):
        complaints += _list("missing in the file", [f"{n!r}{nearest(n, unexpected)}" for n in missing])
        complaints += _list("not in the model", [f"{n!r}{nearest(n, missing)}" for n in unexpected])
    if complaints:
        advice = "" if not strict else "\n  strict=False leaves out names that only one side has and converts numbers"
        raise CheckpointError(
            f"{path} does not fit {type(model).__name__}; nothing was loaded:{''.join(complaints)}{advice}"
        )
    model.load_state_dict({name: value for name, value in found.items() if name in wanted}, strict=False)
    return Loaded(missing, unexpected)


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], name: str = "optimizer") -> None:
    """Load an optimizer's state bit for bit: `optimizer.load_state_dict` alone casts states to their parameter's dtype.

    Call it after the schedulers are made (they set learning rates) and after the weights are on their device.

    Raises:
        CheckpointError: the state is of other parameters or of another kind of optimizer.
    """
    try:
        saved = [len(group["params"]) for group in state["param_groups"]]
        states = {key: dict(value) for key, value in state["state"].items() if isinstance(value, dict)}
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"the state of {name!r} is none of an optimizer: {error!r}") from None
    present = [len(group["params"]) for group in optimizer.param_groups]
    if saved != present:
        raise CheckpointError(
            f"{name!r} has {len(present)} groups of {present} parameters; its state in the checkpoint is for {saved}"
        )
    keys = [key for group in state["param_groups"] for key in group["params"]]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for key, parameter in zip(keys, parameters, strict=True):
        if is_sharded(parameter) and key in states:
            states[key] = {part: _cut(parameter, value) for part, value in states[key].items()}
    before = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict({**state, "state": {**state["state"], **states}})
    for group, former in zip(optimizer.param_groups, before, strict=True):
        if absent := former.keys() & optimizer.defaults.keys() - group.keys():
            raise CheckpointError(
                f"the state of {name!r} is of another optimizer than {type(optimizer).__name__}: no {sorted(absent)}"
            )
        for key, value in former.items():  # a learning rate on a device, say
            if isinstance(value, Tensor) and isinstance(group.get(key), Tensor):
                group[key] = group[key].to(value.device)
    for key, parameter in zip(keys, parameters, strict=True):
        for part, value in states.get(key, {}).items():
            live = optimizer.state[parameter][part]
            if isinstance(value, Tensor) and isinstance(live, Tensor) and live.dtype != value.dtype and part != "step":
                optimizer.state[parameter][part] = value.to(live.device, copy=True)


def _read(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    from . import dealt, load  # their modules import this one

    def keep(name: str, tensor: Tensor) -> Tensor:
        live = wanted.get(name)
        fits = isinstance(live, Tensor) and is_sharded(live) and live.shape == tensor.shape
        return cut(live, tensor) if fits else tensor

    if path.is_dir():
        _refuse_folder(path)
        manifest = check_files(path)
        files = dealt.holding(manifest.files, MODEL)
        if not files:
            raise CheckpointError(f"{path}: holds no {MODEL}")
        # Extra state that is no tensor lies in the other files.
        extra = any(not isinstance(value, Tensor) for value in wanted.values())
        found: dict[str, Any] = (
            {n: v for n, v in load(path).model.items() if not isinstance(v, Tensor)} if extra else {}
        )
        for file in files:
            with Source(path / file) as source:
                found |= tensors.read(source, keep)
                source.check(manifest.files[file])
        return found
    if not path.exists():
        raise CheckpointError(f"{path}: does not exist; allowed: a checkpoint's directory or a .safetensors file")
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: allowed: a checkpoint's directory or a .safetensors file; nothing is unpickled")
    with Source(path.resolve()) as source:  # a single file that the user names may be a link (model hubs use them)
        return {**tensors.read(source, keep)}


def _cut(parameter: Tensor, value: Any) -> Any:
    """A value of an optimizer's state as it belongs to a parameter that is cut."""
    if not isinstance(value, Tensor) or not value.dim():
        return value
    if tensors.is_part(value):
        return like(parameter, value)
    return cut(parameter, value) if value.shape == parameter.shape else value


def _refuse_folder(path: Path) -> None:
    """Name what is in a run's directory or a folder of checkpoints, where a checkpoint is wanted."""
    if any((path / name).exists() for name in (MANIFEST, *FILES)):
        return
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    found = {each.parent: 0 for each in folder.glob(f"[!.]*/{MANIFEST}")}
    for each in found:
        with suppress(CheckpointError):
            found[each] = read_manifest(each).serial
    if found:
        what = "a run's directory" if folder != path else "a folder of checkpoints"
        names = ", ".join(str(each) for each in sorted(found, key=lambda each: found[each])[-_SHOWN:])
        raise CheckpointError(
            f"{path} is {what}, which may hold several weights, and no checkpoint; give the path of one of its "
            f"checkpoints: {names}"
        )


def _tied(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> dict[str, str]:
    """For each name that the file leaves out: a name in it of the very same tensor of the model."""
    present = {id(wanted[name]): name for name in wanted if name in found}
    return {n: present[id(value)] for n, value in wanted.items() if n not in found and id(value) in present}


def _misfits(wanted: Mapping[str, Any], found: Mapping[str, Any], strict: bool) -> list[str]:
    shapes, dtypes, kinds = [], [], []
    for name, live in wanted.items():
        value = found.get(name)
        if value is None or not isinstance(live, Tensor):
            continue
        if not isinstance(value, Tensor):
            kinds.append(f"{name!r} is no tensor in the file")
        elif live.is_meta:
            kinds.append(f"{name!r} of the model is on the meta device; call model.to_empty(device=…) first")
        elif nn.parameter.is_lazy(live):
            continue
        elif value.shape != live.shape:
            shapes.append(f"{name!r} is {tuple(value.shape)} in the file, {tuple(live.shape)} in the model")
        elif strict and not _fits(value.dtype, live.dtype):
            dtypes.append(f"{name!r} is {value.dtype} in the file, {live.dtype} in the model")
    return [*_list("other shape", shapes), *_list("other dtype", dtypes), *_list("cannot be filled", kinds)]


def _fits(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether each value of one dtype is a value of the other."""
    if source == target:
        return True
    kinds = [(dtype.is_complex, dtype.is_floating_point, dtype == torch.bool) for dtype in (source, target)]
    try:
        return kinds[0] == kinds[1] and torch.promote_types(source, target) == target
    except RuntimeError:  # float8 takes part in no promotion
        return False


def _list(title: str, items: Iterable[str]) -> list[str]:
    lines = list(items)
    if not lines:
        return []
    more = f"\n    … and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return [f"\n  {title} ({len(lines)}):" + "".join(f"\n    {line}" for line in lines[:_SHOWN]) + more]
