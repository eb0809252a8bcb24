"""What a checkpoint holds: `State`, and `Snapshot`, the same as the content of files."""

import functools
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, timezone
from typing import Any, Final

import torch
from torch import Tensor

from lightdeco.errors import CheckpointError

from . import tensors
from .encoding import Decoder, Encoder, difference
from .files import MAX_JSON, dump, parse

MODEL: Final = "model.safetensors"
OPTIMIZER: Final = "optimizer.safetensors"
OTHERS: Final = "state.safetensors"
JSON: Final = "state.json"
FILES: Final = (MODEL, OPTIMIZER, OTHERS, JSON)
#: The folder of checkpoints in a run's directory.
CHECKPOINTS: Final = "checkpoints"

#: What `scheduler.state_dict()` may hold and `load_state_dict` need not get: a fresh scheduler has its own.
_FUNCTIONS: Final = (types.FunctionType, types.MethodType, types.BuiltinFunctionType, functools.partial)


@dataclass(slots=True)
class State:
    """What a checkpoint keeps. Every part is plain values (see `encoding`) and tensors, nested as you like.

    Tensors come back on the CPU, without gradient, contiguous, and each with memory of its own.
    """

    model: dict[str, Any] = field(default_factory=dict)
    """The model's `state_dict`. What is no tensor in it (extra state) is kept in state.json."""
    optimizers: dict[str, Any] = field(default_factory=dict)
    """By name, each optimizer's `state_dict`."""
    schedulers: dict[str, Any] = field(default_factory=dict)
    """By name, each scheduler's `state_dict`; functions in it are left out."""
    scaler: dict[str, Any] | None = None
    """The gradient scaler's `state_dict`."""
    callbacks: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    """The counters; `global_step` and `epoch` are shown by `describe`."""
    metrics: dict[str, Any] = field(default_factory=dict)
    random: dict[str, Any] = field(default_factory=dict)
    hparams: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    """The authors' own corners, filled in `on_save_checkpoint`."""
    versions: dict[str, Any] = field(default_factory=dict)
    """Versions, and platform, command and commit: for people, as settings are."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A `State` that is encoded and checked: the content of the files that `save` writes."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    others: dict[str, Tensor]
    text: bytes
    facts: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors and of the JSON; tensors that share memory count once for each name."""
        every = [*self.model.values(), *self.optimizer.values(), *self.others.values()]
        return len(self.text) + sum(tensor.numel() * tensor.itemsize for tensor in every)

    def state(self) -> State:
        """The state; its tensors are those of the snapshot, not copies."""
        return decode(self.text, "snapshot", self.model, self.optimizer, self.others)


def snapshot(state: State) -> Snapshot:
    """Copy a state to the CPU, so that training can go on while the copy is written or kept.

    Waits for the devices that hold the tensors. Costs the memory of `Snapshot.nbytes`, less what is shared.

    Raises:
        CheckpointError: as `save`; whatever cannot be kept is found here already.
    """
    found = encode(state)
    copies: dict[tuple[Any, ...], Tensor] = {}

    def copy(tensor: Tensor) -> Tensor:
        if tensors.owner(tensor) is not None:  # made for this state, or on another process
            return tensor
        value = tensors.plain(tensor)
        # Tied weights are copied once. The tensors are alive as long as the state is, so no address is used again.
        place = (value.device, value.data_ptr(), value.dtype, value.shape, value.stride())
        if place not in copies or not value.numel() or not place[1]:  # on XLA no tensor has an address
            copies[place] = value.to("cpu", copy=True).contiguous()
        return copies[place]

    def copies_of(group: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: copy(tensor) for name, tensor in group.items()}

    model, optimizer, others = map(copies_of, (found.model, found.optimizer, found.others))
    return Snapshot(model, optimizer, others, found.text, found.facts)


def encode(state: State) -> Snapshot:
    """Encode, decode and compare; the tensors are those of the state, not copies.

    Raises:
        CheckpointError: names the key of what cannot be kept.
    """
    model = {key: value for key, value in state.model.items() if isinstance(value, Tensor)}
    for key, tensor in model.items():
        if reason := tensors.refusal(tensor):
            raise CheckpointError(f"model.{key} {reason}")
    wanted = {part.name: getattr(state, part.name) for part in fields(State)}
    wanted["model"] = {key: value for key, value in state.model.items() if key not in model}
    wanted["schedulers"] = _without_functions(state.schedulers)
    optimizer, others = Encoder(), Encoder()
    lines = []
    for part, value in wanted.items():
        encoder = optimizer if part == "optimizers" else others
        lines.append(dump(part) + b":" + dump(encoder.encode(value, part)))  # a line for each part, for human eyes
    text = b"{\n" + b",\n".join(lines) + b"\n}\n"
    if len(text) > MAX_JSON:
        raise CheckpointError(f"the values take {len(text)} bytes of JSON; allowed: {MAX_JSON}; use tensors or arrays")
    again = decode(text, "the encoded state", {}, optimizer.tensors, others.tensors)
    for part, value in wanted.items():
        if place := difference(value, getattr(again, part), part):
            raise CheckpointError(f"{place} does not come back from JSON as it was; keep it in another form")
    return Snapshot(model, optimizer.tensors, others.tensors, text, _facts(state))


def _without_functions(state: Any) -> Any:
    if type(state) is dict:
        return {k: _without_functions(value) for k, value in state.items() if not isinstance(value, _FUNCTIONS)}
    return [_without_functions(value) for value in state] if type(state) is list else state


def _facts(state: State) -> dict[str, Any]:
    from lightdeco import __version__

    counters = {name: value for name in ("global_step", "epoch") if type(value := state.progress.get(name)) is int}
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return {"lightdeco": __version__, "torch": str(torch.__version__), "written": now, **counters}


def decode(
    text: bytes,
    where: object,
    model: dict[str, Tensor],
    optimizer: dict[str, Tensor],
    others: dict[str, Tensor],
) -> State:
    """The state of state.json's text and the tensors it refers to.

    Raises:
        CheckpointError: it is none of `encode`'s.
    """
    parts = parse(text, where)
    names = [part.name for part in fields(State)]
    if not isinstance(parts, dict) or parts.keys() != set(names):
        raise CheckpointError(f"{where}: its parts are not {names}")
    state = State()
    decoders = {"optimizers": Decoder(optimizer)}
    rest = Decoder(others)
    for name in names:
        value = decoders.get(name, rest).decode(parts[name], f"{where}: {name}")
        if not isinstance(value, dict) and not (value is None and name == "scaler"):
            raise CheckpointError(f"{where}: {name} is a {type(value).__name__}; a checkpoint has a dict there")
        setattr(state, name, value)
    state.model = {**model, **state.model}
    return state
