"""What the processes of one run send each other, as a file: any object, its tensors copied, attached roles with it.

Pickled, but never shared: torch's reductions for multiprocessing hand out the caller's own storage, `torch.save` does
not. Classes of a script's `__main__` go by name, so the other process imports the script, and only then; what no other
process can import (a notebook's classes, lambdas) goes by value where cloudpickle is installed.
"""

import importlib
import importlib.util
import io
import multiprocessing
import multiprocessing.spawn
import operator
import pickle
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any, Final

import torch
from torch import Tensor, nn

from .attach import ATTACHED, _Attachments
from .errors import LaunchError

#: What `__main__` is called in a process that imported it for its classes.
_MAIN: Final = ("__main__", "__mp_main__")

#: In a started process, what `multiprocessing.spawn.prepare` needs to import the script; None when done or not needed.
_script: dict[str, Any] | None = None
_importing: str | None = None


def pack(payload: object, path: Path, *, function: Callable[..., object] | None = None) -> set[str]:
    """Write an object, and a function to call with it, to a file; returns the names of `__main__` that it refers to.

    Tensors are copied, and those that share storage share it again when read; gradients are left out. Roles given by
    `ld.attach` to instances and classes go along.

    Raises:
        LaunchError: something in it cannot be sent; names the attribute and what to do.
    """
    names: set[str] = set()
    content = {"payload": payload, "function": function}
    module = _pickling(pickle.Pickler, names)
    try:
        _save(content, path, module)
        return names
    except Exception as error:
        refusal = error
    by_value = importlib.util.find_spec("cloudpickle") is not None
    if by_value:
        cloudpickle = importlib.import_module("cloudpickle")
        names.clear()
        module = _pickling(cloudpickle.Pickler, names)
        try:
            _save(content, path, module)
            return names
        except Exception as error:
            refusal = error
    where, culprit, reason = _culprit(content, refusal, module)
    if by_value:
        advice = "make it in `setup` or `configure_model`, which run in every process"
    else:
        advice = "define it in a module that can be imported (`def`, not `lambda`), or `pip install cloudpickle`"
    raise LaunchError(
        f"{where} ({_described(culprit)}) cannot be sent to other processes: {reason}; {advice}"
    ) from refusal


def unpack(path: Path) -> tuple[Any, Any]:
    """The object and the function of a file that `pack` of the same run wrote; tensors on the CPU."""
    content = torch.load(path, map_location="cpu", weights_only=False, pickle_module=_pickling(pickle.Pickler, set()))
    return content["payload"], content["function"]


def _save(content: object, path: Path | io.BytesIO, module: ModuleType) -> None:
    torch.save(content, path, pickle_module=module, pickle_protocol=pickle.HIGHEST_PROTOCOL)


# ---- the script ------------------------------------------------------------------------------------------------------


def main_file() -> str | None:
    """The file or module of `__main__`, where another process could import it; None in a notebook or a shell."""
    main = sys.modules["__main__"]
    spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
    found = spec.name if spec is not None else file
    return found if found is not None and (spec is not None or Path(found).is_file()) else None


def preparation() -> dict[str, Any]:
    """What another process must know of this one before it unpacks: paths, arguments, where `__main__` is."""
    found: dict[str, Any] = multiprocessing.spawn.get_preparation_data("rank")
    found.pop("authkey")  # no process of multiprocessing
    return found


def prepare(preparation: dict[str, Any]) -> None:
    """Make this process like the one that sent `preparation`; import its script when something needs it, not before."""
    global _script
    script = {key: value for key, value in preparation.items() if key.startswith("init_main")}
    multiprocessing.spawn.prepare({key: value for key, value in preparation.items() if key not in script})
    _script = script


def importing_script() -> str | None:
    """The script whose `__main__` this process, started by another one, is just importing for its classes."""
    inheriting = getattr(multiprocessing.current_process(), "_inheriting", False)  # a process of multiprocessing
    return _importing or ("the script" if inheriting else None)


def _import_script() -> None:
    global _script, _importing
    if _script is not None:
        preparation, _script = _script, None
        _importing = str(next(iter(preparation.values()), "the script"))
        try:
            multiprocessing.spawn.prepare(preparation)
        finally:
            _importing = None


# ---- the pickler -----------------------------------------------------------------------------------------------------


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if module in _MAIN:
            _import_script()
        return super().find_class(module, name)


def _pickling(base: type, names: set[str]) -> ModuleType:
    """A module that `torch.save` can use instead of `pickle`; it adds to `names` what `__main__` must have."""

    class Pickler(base):  # type: ignore[misc]
        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, _Attachments):
                return _Attachments, (dict(value),)
            if isinstance(value, (type, FunctionType)) and _locatable(value):
                ours = value.__module__ in _MAIN
                if ours and main_file() is None:
                    if base is pickle.Pickler:
                        raise pickle.PicklingError("it is defined in a notebook or a shell, not in a file")
                    return super().reducer_override(value)
                if ours:
                    names.add(value.__qualname__)
                attached = [(cls, dict(vars(cls)[ATTACHED])) for cls in _holders(value)]
                if attached:  # a state, set after the class is known: the functions may refer to it
                    return _locate, (value.__module__, value.__qualname__), attached, None, None, _reattach
                if ours:
                    return value.__qualname__  # by name; cloudpickle alone would send all of `__main__` by value
            return NotImplemented if base is pickle.Pickler else super().reducer_override(value)

    module = ModuleType("lightdeco_pickle")
    vars(module).update(Pickler=Pickler, Unpickler=_Unpickler, load=pickle.load)
    return module


def _holders(value: object) -> list[type]:
    """The classes of a class's MRO that hold functions of `ld.attach` themselves."""
    return [cls for cls in value.__mro__ if ATTACHED in vars(cls)] if isinstance(value, type) else []


def _locatable(value: type | FunctionType) -> bool:
    """Whether module and name lead to the very object."""
    try:
        found: object = operator.attrgetter(value.__qualname__)(sys.modules[value.__module__])
    except (AttributeError, KeyError):
        return False
    return found is value


def _locate(module: str, qualname: str) -> Any:
    """The class of that name, in the process that reads it."""
    if module in _MAIN:
        _import_script()
    return operator.attrgetter(qualname)(importlib.import_module(module))


def _reattach(_: object, attached: list[tuple[type, dict[str, Any]]]) -> None:
    for cls, functions in attached:
        setattr(cls, ATTACHED, _Attachments(functions))


# ---- what cannot be sent ---------------------------------------------------------------------------------------------


def _culprit(value: Any, reason: Exception, module: ModuleType) -> tuple[str, Any, Exception]:
    """The smallest part of an object that cannot be pickled, with its name and the reason."""
    where, seen = "", {id(value)}
    while True:
        for name, part in _parts(value):
            if id(part) not in seen and (refusal := _refusal(part, module)) is not None:
                seen.add(id(part))
                where, value, reason = where + name, part, refusal
                break
        else:
            where = where.removeprefix("['payload']") or where
            return re.sub(r"^\['(\w+)'\]", r"\1", where), value, reason


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield from ((f"[{key!r}]", part) for key, part in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{i}]", part) for i, part in enumerate(value))
    elif not isinstance(value, (type, FunctionType, ModuleType)):
        own = dict(getattr(value, "__dict__", {}))
        if isinstance(value, nn.Module):
            for group in ("_modules", "_parameters", "_buffers"):
                own |= own.pop(group, {})
        yield from ((f".{name}", part) for name, part in own.items())


def _refusal(value: Any, module: ModuleType) -> Exception | None:
    class Probe(module.Pickler):  # type: ignore[misc, name-defined]
        def persistent_id(self, value: object) -> object:
            return "tensor" if isinstance(value, Tensor) else None  # their bytes are never the reason

    try:
        Probe(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(value)
    except Exception as error:
        return error
    return None


def _described(value: Any) -> str:
    code = getattr(value, "__code__", None)
    if code is not None:
        return f"{value.__qualname__}, {code.co_filename}:{code.co_firstlineno}"
    return f"the class {value.__qualname__}" if isinstance(value, type) else f"a {type(value).__name__}"
