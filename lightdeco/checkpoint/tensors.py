"""Tensors in the safetensors format, written and read in one pass: no copy of the whole, each with memory of its own.

The format is public: https://huggingface.co/docs/safetensors. The library itself refuses tensors that share memory, and
maps files into memory when it reads, so that what was verified need not be what is used later.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from lightdeco.errors import CheckpointError

from .files import MAX_JSON, Sink, Source, dump, parse

_NAMES: Final = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U64": "uint64",
    "U32": "uint32",
    "U16": "uint16",
    "U8": "uint8",
    "BOOL": "bool",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
#: The format's name of each dtype that it has. Others are kept as their bytes (U8), with a note in the header.
FORMAT_NAMES: Final = {getattr(torch, torch_name): name for name, torch_name in _NAMES.items()}
#: Every dtype of this torch by its name; nothing else can be named by a file.
DTYPES: Final = {str(value)[6:]: value for value in vars(torch).values() if isinstance(value, torch.dtype)}
_BY_FORMAT: Final = {name: dtype for dtype, name in FORMAT_NAMES.items()}
_NOTE: Final = "lightdeco"
#: Subclasses with another one (distributed, quantized, fake tensors) have no memory that could be written.
_DISPATCH: Final = "__torch_dispatch__"
_OWNER: Final = "_lightdeco_owner"
_IS_PART: Final = "_lightdeco_part"


#: Gets the name and the tensor that was read, and returns what is kept of it.
Keep: TypeAlias = Callable[[str, Tensor], Tensor]


class Entry(NamedTuple):
    """One tensor of a file: where its bytes are, and what they are."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int


def refusal(tensor: Tensor) -> str | None:
    """Why a tensor cannot be kept, or None."""
    if nn.parameter.is_lazy(tensor):
        return "is not initialised yet; run the model once on a batch, or create it in @configure_model"
    if tensor.is_meta and owner(tensor) is None:
        return "is on the meta device and has no values"
    if tensor.layout != torch.strided:
        return f"is sparse ({tensor.layout}); convert it with .to_dense()"
    if tensor.is_quantized:
        return "is quantized; keep its .int_repr(), scale and zero point"
    if getattr(type(tensor), _DISPATCH) is not getattr(Tensor, _DISPATCH):
        return f"is a {type(tensor).__name__}, which is no plain tensor; gather or convert it first"
    return None


def owned(tensor: Tensor, rank: int) -> Tensor:
    """The tensor, which process `rank` writes; on the meta device it stands in for the one that the other has."""
    vars(tensor)[_OWNER] = rank
    return tensor


def owner(tensor: Tensor) -> int | None:
    """The process that writes a tensor that was dealt out; None for all others."""
    found: int | None = vars(tensor).get(_OWNER)
    return found


def as_part(tensor: Tensor) -> Tensor:
    """The tensor, which is the part of this process of one that is cut."""
    vars(tensor)[_IS_PART] = True
    return tensor


def is_part(tensor: Tensor) -> bool:
    """Whether `as_part` has said so."""
    return _IS_PART in vars(tensor)


def plain(tensor: Tensor) -> Tensor:
    """The tensor without gradient, subclass, and lazy conjugation or negation; on its device, mostly without a copy."""
    return tensor.detach().as_subclass(Tensor).resolve_conj().resolve_neg()


def write(sink: Sink, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors; such that share memory are written under each of their names.

    Raises:
        CheckpointError: names the tensor that cannot be kept.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    notes: dict[str, tuple[str, list[int]]] = {}
    for name, tensor in tensors.items():
        _check_name(name)
        if reason := refusal(tensor):
            raise CheckpointError(f"{name} {reason}")
        header[name] = {}  # the header has the order of the mapping, the bytes have that of alignment
        if tensor.dtype not in FORMAT_NAMES:
            notes[name] = str(tensor.dtype)[6:], list(tensor.shape)
    if notes:
        header["__metadata__"][_NOTE] = json.dumps(notes)
    order, offset = sorted(tensors, key=lambda name: -tensors[name].itemsize), 0
    for name in order:
        tensor, start = tensors[name], offset
        offset += tensor.numel() * tensor.itemsize
        shape = [offset - start] if name in notes else list(tensor.shape)
        dtype = FORMAT_NAMES.get(tensor.dtype, "U8")
        header[name].update(dtype=dtype, shape=shape, data_offsets=[start, offset])
    text = dump(header)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_JSON:
        raise CheckpointError(f"the names of {len(tensors)} tensors take {len(text)} bytes; allowed: {MAX_JSON}")
    sink.write(struct.pack("<Q", len(text)) + text)
    for name in order:
        if tensors[name].numel():
            sink.write(_bytes(plain(tensors[name]).cpu().contiguous()))  # one tensor at a time leaves the device


def read_header(source: Source) -> dict[str, Entry]:
    """What the file holds, in the order in which it was given to `write`; leaves the source where the bytes start.

    Raises:
        CheckpointError: the header is too long, malformed, or does not fit the size of the file.
    """
    where = source.path
    (length,) = struct.unpack("<Q", source.read(8)) if source.size >= 8 else (0,)
    if not 2 <= length <= min(MAX_JSON, source.size - 8):
        raise CheckpointError(f"{where}: is no safetensors file: its header would have {length} bytes")
    header = parse(source.read(length), where)
    try:
        notes = parse(header.pop("__metadata__", {}).get(_NOTE, "{}").encode(), where)
        entries = {name: _entry(raw, notes.get(name)) for name, raw in header.items()}
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: has a malformed header: {error!r}") from None
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start != position or entry.end - entry.start != math.prod(entry.shape) * entry.dtype.itemsize:
            raise CheckpointError(f"{where}: has a malformed header: the bytes of {name!r} do not fit")
        position = entry.end
    if position != source.size - 8 - length:
        raise CheckpointError(f"{where}: has {source.size - 8 - length} bytes of tensors; its header says {position}")
    return entries


def read(source: Source, keep: Keep | None = None) -> dict[str, Tensor]:
    """Every tensor of a file, on the CPU, in the order in which it was given to `write`.

    `keep`: gets each name and tensor as it is read, and returns what is kept of it.

    Raises:
        CheckpointError: see `read_header`; the file ends early, or a shape is impossible.
    """
    entries = read_header(source)
    tensors: dict[str, Tensor] = {}
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except (RuntimeError, TypeError, OverflowError) as error:
            raise CheckpointError(f"{source.path}: {name!r} cannot be made: {error}") from None
        if tensor.numel():
            source.fill(_bytes(tensor))
        tensors[name] = tensor if keep is None else keep(name, tensor)
    return {name: tensors[name] for name in entries}


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have equal dtypes, shapes and bytes, wherever they are."""
    if a is b:
        return True
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return a.numel() == 0 or _bytes(plain(a).cpu().contiguous()) == _bytes(plain(b).cpu().contiguous())


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor that is not empty."""
    flat = tensor.reshape(-1)
    if flat.stride(0) != 1:  # one element, which is contiguous with any stride; never so when memory is filled
        flat = flat.clone(memory_format=torch.contiguous_format)
    return flat.view(torch.uint8).numpy().data


def _entry(raw: Any, note: Any) -> Entry:
    shape, dtype = raw["shape"], _BY_FORMAT[raw["dtype"]]
    if note is not None:
        dtype, shape = DTYPES[note[0]], note[1]
    start, end = raw["data_offsets"]
    for number in (*shape, start, end):
        if type(number) is not int or not 0 <= number < 2**63:
            raise ValueError(f"{number!r} is no size")
    return Entry(dtype, tuple(shape), start, end)


def _check_name(name: str) -> None:
    if name == "__metadata__" or any("\ud800" <= letter <= "\udfff" for letter in name):
        raise CheckpointError(f"{name!r} cannot name a tensor in a safetensors file")
