"""Plain values as JSON with tags for what JSON loses, and their tensors beside it.

A value that JSON keeps is itself: None, bool, int, finite float, str, list, dict with str keys. Everything else is
`{"$": tag, "v": …}`. Types are matched exactly: a subclass (an enum, a named tuple) is refused, since it would come
back as something else. What is read is never imported, called by name or evaluated: a tag is a key of a table here.
"""

import base64
import math
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from torch import Tensor, nn

from lightdeco.errors import CheckpointError

from . import tensors
from .files import dump

#: Values nested deeper are refused: most often they contain themselves.
MAX_DEPTH: Final = 64
#: More values than this belong into a tensor or an array.
MAX_VALUES: Final = 1_000_000

_TENSORS: Final = (Tensor, nn.Parameter, nn.Buffer) if hasattr(nn, "Buffer") else (Tensor, nn.Parameter)
_FACTORIES: Final = {kind.__name__: kind for kind in (bool, int, float, str, list, dict, set, tuple)}
_NUMPY_KINDS: Final = "biufcmMSU"
_ALLOWED: Final = (
    "numbers, text, None, list, tuple, dict, set, the containers of `collections`, bytes, timedelta, Path, tensors, "
    "NumPy arrays and scalars, torch dtypes, devices and sizes"
)


def _text(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode()


def _size(values: list[Any]) -> torch.Size:
    return torch.Size([int(value) for value in values])


def _complex(values: list[str]) -> complex:
    return complex(float(values[0]), float(values[1]))


#: Values without parts: the type, its tag, to JSON, from JSON.
_LEAVES: Final[tuple[tuple[type, str, Callable[[Any], Any], Callable[[Any], Any]], ...]] = (
    (float, "float", repr, float),  # only nan, inf and -inf
    (complex, "complex", lambda z: [repr(z.real), repr(z.imag)], _complex),
    (bytes, "bytes", _text, base64.b64decode),
    (bytearray, "bytearray", _text, lambda text: bytearray(base64.b64decode(text))),
    (timedelta, "timedelta", lambda t: [t.days, t.seconds, t.microseconds], lambda v: timedelta(*v)),
    (type(Path()), "path", str, Path),
    (torch.Size, "torch.Size", list, _size),
    (torch.device, "torch.device", str, torch.device),
    (torch.dtype, "torch.dtype", lambda dtype: str(dtype)[6:], tensors.DTYPES.__getitem__),
)
_LEAF_OF_TYPE: Final = {kind: (tag, to_json) for kind, tag, to_json, _ in _LEAVES}
_LEAF_OF_TAG: Final = {tag: from_json for _, tag, _, from_json in _LEAVES}
_SEQUENCES: Final[dict[type, str]] = {tuple: "tuple", set: "set", frozenset: "frozenset", deque: "deque"}
_SEQUENCE_OF_TAG: Final = {tag: kind for kind, tag in _SEQUENCES.items()}
_MAPPINGS: Final[dict[type, str]] = {
    dict: "dict",
    OrderedDict: "OrderedDict",
    Counter: "Counter",
    defaultdict: "defaultdict",
}
_MAPPING_OF_TAG: Final = {tag: kind for kind, tag in _MAPPINGS.items()}


class Encoder:
    """Values to JSON; their tensors are collected in `tensors`, by the path at which they were found."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._count = 0

    def encode(self, value: Any, path: str, depth: int = 0) -> Any:
        """A value as JSON.

        Raises:
            CheckpointError: names the path of a value that cannot be kept.
        """
        self._count += 1
        if self._count > MAX_VALUES:
            raise CheckpointError(f"{path} is more than {MAX_VALUES} values; keep bulk data in tensors or arrays")
        if depth > MAX_DEPTH:
            raise CheckpointError(f"{path[:200]}… is nested deeper than {MAX_DEPTH}; does it contain itself?")
        kind = type(value)
        if value is None or kind is bool or kind is str or (kind is float and math.isfinite(value)):
            return value
        if kind is int:
            if value.bit_length() > 4096:
                raise CheckpointError(f"{path} is an int of {value.bit_length()} bits; allowed: 4096")
            return value
        if kind is list:
            return self._each(value, path, depth)
        if kind in _MAPPINGS:
            return self._mapping(value, path, depth)
        if kind in _LEAF_OF_TYPE:
            tag, to_json = _LEAF_OF_TYPE[kind]
            return {"$": tag, "v": to_json(value)}
        if kind in _SEQUENCES:
            return self._sequence(value, path, depth)
        if isinstance(value, Tensor):
            return self._tensor(value, path)
        if kind is numpy.ndarray or isinstance(value, numpy.generic):
            return self._numpy(value, path)
        raise _unknown(value, path)

    def _each(self, values: Iterable[Any], path: str, depth: int) -> list[Any]:
        return [self.encode(value, f"{path}[{index}]", depth + 1) for index, value in enumerate(values)]

    def _mapping(self, value: Mapping[Any, Any], path: str, depth: int) -> Any:
        kind, places = type(value), {key: _place(path, key) for key in value}
        if kind is dict and "$" not in value and all(type(key) is str for key in value):
            return {key: self.encode(item, places[key], depth + 1) for key, item in value.items()}
        encoded: dict[str, Any] = {"$": _MAPPINGS[kind]}
        if isinstance(value, defaultdict):
            factory = value.default_factory
            name = None if factory is None else getattr(factory, "__name__", "")
            if name is not None and _FACTORIES.get(name) is not factory:
                raise CheckpointError(f"{path} is a defaultdict of {factory!r}; allowed: {sorted(_FACTORIES)} and None")
            encoded["factory"] = name
        encoded["v"] = [
            [self._hashable(key, f"{path}'s key {key!r}", depth), self.encode(item, places[key], depth + 1)]
            for key, item in value.items()
        ]
        return encoded

    def _sequence(self, value: Any, path: str, depth: int) -> dict[str, Any]:
        encoded: dict[str, Any] = {"$": _SEQUENCES[type(value)]}
        if isinstance(value, deque):
            encoded["maxlen"] = value.maxlen
        if isinstance(value, (set, frozenset)):  # sorted: the order of a set differs from process to process
            members = [self._hashable(member, f"{path}'s member {member!r}", depth) for member in value]
            encoded["v"] = sorted(members, key=dump)
        else:
            encoded["v"] = self._each(value, path, depth)
        return encoded

    def _hashable(self, value: Any, path: str, depth: int) -> Any:
        # Tensors are hashed by identity: one that is read again would be another key.
        if isinstance(value, Tensor):
            raise CheckpointError(f"{path} is a tensor; in a set or as a key it cannot be kept")
        return self.encode(value, path, depth + 1)

    def _tensor(self, value: Tensor, path: str) -> dict[str, Any]:
        if type(value) not in _TENSORS:
            raise _unknown(value, path)
        if reason := tensors.refusal(value):
            raise CheckpointError(f"{path} {reason}")
        return {"$": "tensor", "v": self._keep(value, path)}

    def _numpy(self, value: Any, path: str) -> dict[str, Any]:
        if value.dtype.kind not in _NUMPY_KINDS or type(value).__module__ != "numpy":
            raise CheckpointError(
                f"{path} is NumPy data of type {value.dtype}; allowed: numbers, bools, times and text"
            )
        if isinstance(value, numpy.generic):
            return {"$": "numpy", "dtype": value.dtype.str, "v": _text(value.tobytes())}
        data = torch.frombuffer(bytearray(value.tobytes()), dtype=torch.uint8) if value.nbytes else torch.empty(0)
        shape = list(value.shape)
        return {"$": "ndarray", "dtype": value.dtype.str, "shape": shape, "v": self._keep(data.byte(), path)}

    def _keep(self, tensor: Tensor, path: str) -> str:
        path = path.encode("utf-8", "replace").decode()  # safetensors refuses lone surrogates
        name, number = path, 1
        while name in self.tensors:  # {"a.b": …} and {"a": {"b": …}} have one path
            number += 1
            name = f"{path}~{number}"
        self.tensors[name] = tensor
        return name


class Decoder:
    """JSON, as `Encoder` makes it, to values."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self._count = 0

    def decode(self, value: Any, path: str) -> Any:
        """The value.

        Raises:
            CheckpointError: the JSON is none of `Encoder`'s.
        """
        try:
            return self._decode(value, 0)
        except (AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {type(error).__name__}: {error}") from None

    def _decode(self, value: Any, depth: int) -> Any:
        self._count += 1
        if self._count > MAX_VALUES or depth > MAX_DEPTH:
            raise ValueError(f"more than {MAX_VALUES} values, or nested deeper than {MAX_DEPTH}")
        if isinstance(value, list):
            return [self._decode(item, depth + 1) for item in value]
        if not isinstance(value, dict):
            return value
        if "$" not in value:
            return {key: self._decode(item, depth + 1) for key, item in value.items()}
        tag, content = value["$"], value["v"]
        if tag in _LEAF_OF_TAG:
            return _LEAF_OF_TAG[tag](content)
        if tag in _MAPPING_OF_TAG:
            return self._mapping(_MAPPING_OF_TAG[tag], value, depth)
        if tag in _SEQUENCE_OF_TAG:
            items = [self._decode(item, depth + 1) for item in content]
            return deque(items, value["maxlen"]) if tag == "deque" else _SEQUENCE_OF_TAG[tag](items)
        if tag == "tensor":
            return self._tensors[content]
        if tag == "numpy":
            return numpy.frombuffer(base64.b64decode(content), _numpy_dtype(value["dtype"]))[0]
        if tag == "ndarray":
            data = self._tensors[content].numpy().tobytes()
            dtype = _numpy_dtype(value["dtype"])
            array = numpy.frombuffer(data, dtype) if dtype.itemsize else numpy.empty(0, dtype)
            return array.reshape(value["shape"]).copy()
        raise ValueError(f"unknown tag {tag!r}")

    def _mapping(self, kind: type, value: dict[str, Any], depth: int) -> Any:
        items = [(self._decode(key, depth + 1), self._decode(item, depth + 1)) for key, item in value["v"]]
        if kind is defaultdict:
            factory = value["factory"]
            return defaultdict(None if factory is None else _FACTORIES[factory], items)
        return kind(dict(items))


def difference(a: Any, b: Any, path: str) -> str | None:
    """The path of the first part in which two values differ, or None: types, values, order, the bits of numbers."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):  # a parameter comes back as a tensor
        return None if tensors.same_bits(a, b) else path
    if type(a) is not type(b):
        return path
    if isinstance(a, numpy.ndarray):
        return None if a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() else path
    if isinstance(a, (set, frozenset)):  # by repr: NaN is not equal to itself
        return None if sorted(map(repr, a)) == sorted(map(repr, b)) else path
    if isinstance(a, Mapping):
        if len(a) != len(b) or getattr(a, "default_factory", None) is not getattr(b, "default_factory", None):
            return path
        return _first(
            found
            for (key, x), (other, y) in zip(a.items(), b.items(), strict=True)
            for found in (difference(key, other, f"{path}'s key {key!r}"), difference(x, y, _place(path, key)))
        )
    if isinstance(a, (list, tuple, deque)) and not isinstance(a, torch.Size):
        if len(a) != len(b) or (isinstance(a, deque) and a.maxlen != b.maxlen):
            return path
        return _first(difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
    # repr tells 0.0 from -0.0 and calls NaN equal.
    return None if repr(a) == repr(b) else path


def _first(found: Iterable[str | None]) -> str | None:
    return next((path for path in found if path is not None), None)


def _numpy_dtype(name: str) -> numpy.dtype[Any]:
    dtype = numpy.dtype(str(name))
    if dtype.kind not in _NUMPY_KINDS:
        raise ValueError(f"{name!r} is no type of plain numbers, times or text")
    return dtype


def _place(path: str, key: Any) -> str:
    return f"{path}.{key}" if isinstance(key, str) else f"{path}[{key!r}]"


def _unknown(value: Any, path: str) -> CheckpointError:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return CheckpointError(f"{path} is a {name}, which a checkpoint does not keep; allowed: {_ALLOWED}")
