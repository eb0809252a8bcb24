"""Objects as text: the call that makes one again, as far as it can be told from the object, and whose method a hook is.

No constructor is called. Its arguments are read from `HparamsMixin`, or from attributes that have the same names.
"""

import inspect
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch.utils.data import DataLoader

from lightdeco.hooks import Hook
from lightdeco.loggers.metrics_file import METRICS
from lightdeco.settings import Settings

_ROOT: Final = Path(__file__).resolve().parents[1]


def is_plain(value: Any) -> bool:
    """Whether `repr(value)` is the value again: numbers, strings, None, and lists, tuples, dicts of such.

    >>> is_plain({"a": [1, None]}), is_plain(float("nan")), is_plain(object())
    (True, False, False)
    """
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, value)) and all(map(is_plain, value.values()))
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (bool, int, str)


def arguments_of(thing: object) -> tuple[dict[str, Any], list[str]]:
    """The arguments with which an object was probably made, without those that have their default, and the names of
    required ones of which nothing is known."""
    try:
        parameters = inspect.signature(type(thing)).parameters.values()
    except (ValueError, TypeError):  # some classes of C have no signature
        return {}, []
    held = getattr(thing, "__dict__", {})
    known = {**held, **held.get("_hparams", {})}
    found: dict[str, Any] = {}
    missing: list[str] = []
    for p in parameters:
        required = p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        if p.name in known and is_plain(known[p.name]):
            if required or type(known[p.name]) is not type(p.default) or known[p.name] != p.default:
                found[p.name] = known[p.name]
        elif required:
            missing.append(p.name)
    return found, missing


def made(thing: object) -> str:
    """The call that makes the object, as far as it is known: `Digits(total_steps=1140)`, or `Digits(width=…)`.

    >>> from lightdeco import EarlyStopping
    >>> made(EarlyStopping(patience=5))
    'EarlyStopping(patience=5)'
    """
    found, missing = arguments_of(thing)
    given = [f"{name}={value!r}" for name, value in found.items()] + [f"{name}=…" for name in missing]
    return f"{type(thing).__name__}({', '.join(given)})"


def attached(hook: Hook) -> Any:
    """The function that `ld.attach` gave to the object, or None for a method of its class."""
    if inspect.getattr_static(type(hook.owner), method_name(hook), None) is not None:
        return None
    return getattr(hook.method, "__func__", None)


def method_name(hook: Hook) -> str:
    """The name under which the object has the method; for what was attached, the role."""
    return hook.where.partition(" (")[0].partition(".")[2]


def place(hook: Hook) -> str:
    """`file:line` of the method: the file as seen from here, or from the root of the package it belongs to."""
    file, _, line = hook.where.partition(" (")[2].rstrip(")").rpartition(":")
    for base in (os.getcwd(), str(_ROOT)):
        if file.startswith(base + os.sep):
            return f"{Path(file).relative_to(base).as_posix()}:{line}"
    return f"{file}:{line}" if file else ""


def arguments(hook: Hook, names: dict[str, str] | None = None) -> str:
    """What stands in the brackets when the method is called; `names` says what stands for an argument, if not its name.

    The first parameter of a step may have any name; it is given by position.
    """
    names = names or {}
    given = [names.get(name, name) for name in hook.positional]
    return ", ".join([*given, *(f"{name}={names.get(name, name)}" for name in hook.keywords)])


def call_text(hook: Hook) -> str:
    """A call of the method with its class, as a person would write it: `Digits.step(batch)`."""
    stage = {"stage": '"fit"'} if hook.role.name in ("setup", "teardown") else {}
    return f"{type(hook.owner).__name__}.{method_name(hook)}({arguments(hook, stage)})"


def loader_text(given: object) -> str:
    """What a loader is, from its attributes alone: nothing of it is called.

    >>> loader_text([1, 2]), loader_text({"a": (), "b": ()})
    ('a list', "{'a': a tuple, 'b': a tuple}")
    """
    if isinstance(given, DataLoader):
        workers = f", {given.num_workers} workers" if given.num_workers else ""
        return f"a {type(given).__name__} over a {type(given.dataset).__name__}, batch_size={given.batch_size}{workers}"
    if isinstance(given, Mapping):
        return "{" + ", ".join(f"{name!r}: {loader_text(one)}" for name, one in given.items()) + "}"
    return f"a {type(given).__name__}"


def directory_text(settings: Settings, kind: str) -> str:
    """The directory of a run whose model is of the class `kind`."""
    return f"{settings.root_dir}/{settings.name or kind + '/version_<n>'}"


def recorders(settings: Settings) -> str:
    """Where records go: the file of every run, and the loggers.

    >>> recorders(Settings()), recorders(Settings(logger=False))
    ('metrics.jsonl, tensorboard', 'metrics.jsonl')
    """
    given = settings.logger
    several: Any = given if isinstance(given, (list, tuple)) else [given]
    names = [] if given is False else ["tensorboard"] if given is True else several
    return ", ".join([METRICS, *(name if isinstance(name, str) else type(name).__name__ for name in names)])


def policy_text(settings: Settings) -> str:
    """When checkpoints are written, and which."""
    if settings.checkpoint is True:
        return "the last and the best by val/loss, at most every 30 s"
    return made(settings.checkpoint)
