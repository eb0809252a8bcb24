"""What each setting may be: small checks that are combined with `|`, and the table of them.

A check returns the value to keep (numpy numbers become Python's, lists are copied, aliases get their full name) or
`Refused`. The message is built in one place, so that every refusal names the setting, the value and what is allowed.
"""

import math
import numbers
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal, NamedTuple, get_args

import numpy

from .errors import SettingsError, nearest

Accelerator = Literal["auto", "cpu", "gpu", "cuda", "mps", "tpu", "xla"]
Strategy = Literal["auto", "ddp", "fsdp", "deepspeed"]
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "fp8", "fp16", "bf16"]
Clip = Literal["norm", "value"]
OnNan = Literal["raise", "skip", "ignore"]
Oom = Literal["raise", "micro"]
Profiler = Literal["simple", "advanced", "pytorch"]

_ALIASES = {"fp16": "16-mixed", "bf16": "bf16-mixed"}
_LARGEST = 2**63 - 1
_TIME = re.compile(r"([0-9]{1,5}):([01]?[0-9]|2[0-3]):([0-5]?[0-9]):([0-5]?[0-9])")
_PLAIN = (str, bytes, numbers.Number, numpy.generic, numpy.ndarray, os.PathLike, list, tuple, dict, set, frozenset)
_WINDOWS = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(\..*)?", re.IGNORECASE)


class Refused(NamedTuple):
    """The answer of a check to a wrong value, with what to do about it, where that is known."""

    hint: str = ""


def shown(value: object) -> str:
    """The value's repr on one line, of at most 80 characters."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a value that cannot even be shown (an integer of 5000 digits, say) still gets its refusal
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 80 else text[:79] + "…"


@dataclass(frozen=True)
class Check:
    """One kind of allowed value: its description, what is kept of a value, and the names to suggest."""

    allowed: str
    keep: Callable[[object], object]
    names: tuple[str, ...] = ()

    def __or__(self, other: "Check") -> "Check":
        """What either allows; this one is asked first."""

        def keep(value: object) -> object:
            first = self.keep(value)
            if not isinstance(first, Refused):
                return first
            second = other.keep(value)
            return Refused(first.hint or second.hint) if isinstance(second, Refused) else second

        return Check(f"{self.allowed}, {other.allowed}", keep, self.names + other.names)

    def __call__(self, setting: str, value: object) -> object:
        """The value to keep; raises `SettingsError` where it is none of the allowed ones."""
        cause = None
        try:
            kept = self.keep(value)
            if not isinstance(kept, Refused):
                return kept
            hint = f"; {kept.hint}" if kept.hint else _suggestion(value, self.names)
        except Exception as error:  # the value's own: an `__eq__` or `__iter__` of its class that raises
            cause, hint = error, f"; to read it raised {type(error).__name__}"
        raise SettingsError(f"{setting} is {shown(value)}; allowed: {self.allowed}{hint}") from cause


def _suggestion(value: object, names: tuple[str, ...]) -> str:
    """The name that begins with the value (32 -> '32-true'), or else the nearest one."""
    word = plain(value).lower() if isinstance(value, str) else shown(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or len(word) < 2:
        return ""
    longer = [name for name in names if name.startswith(word)]
    return f"; did you mean {longer[0]!r}?" if longer else nearest(word, names)


def _integer(value: object) -> int | None:
    """An integer of Python or numpy as an `int`, or None: booleans and time spans of numpy are no integers."""
    if isinstance(value, bool | numpy.timedelta64) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def _number(value: object) -> int | float | None:
    """A finite number of Python or numpy as an `int` or `float`, or None."""
    if (whole := _integer(value)) is not None:
        return whole if abs(whole) <= _LARGEST else None
    return float(value) if isinstance(value, float | numpy.floating) and math.isfinite(float(value)) else None


def plain(text: str) -> str:
    """A text as a `str`, also where it is a member of an Enum of texts, which `str` would show as `Class.MEMBER`."""
    return str.__str__(text)


def _printable(text: str, *refused: str) -> bool:
    return not any(unicodedata.category(character) in ("Cc", *refused) for character in text)


def integer(minimum: int, maximum: int = _LARGEST) -> Check:
    """Integers from `minimum` to `maximum`."""

    def keep(value: object) -> object:
        whole = _integer(value)
        return Refused() if whole is None or not minimum <= whole <= maximum else whole

    return Check(f"an integer >= {minimum}" + (f" and <= {maximum}" if maximum < _LARGEST else ""), keep)


def positive(unit: str) -> Check:
    """Finite numbers above zero."""

    def keep(value: object) -> object:
        number = _number(value)
        return Refused() if number is None or number <= 0 else number

    return Check(f"a number > 0{unit}", keep)


def share_or_count(minimum: int) -> Check:
    """A number of batches (an integer: 1 is one batch) or a share (a float: 1.0 is everything)."""

    def keep(value: object) -> object:
        number = _number(value)
        ok = 0 < number <= 1 if isinstance(number, float) else number is not None and number >= minimum
        return number if ok else Refused()

    return Check(f"an integer >= {minimum} (batches), a float in (0, 1] (share)", keep)


def one_of(*names: str) -> Check:
    """Some names; aliases become the name they stand for."""

    def keep(value: object) -> object:
        name = plain(value) if isinstance(value, str) else ""
        return _ALIASES.get(name, name) if name in names else Refused()

    return Check(", ".join(map(repr, names)), keep, names)


def _no_limit(value: object) -> object:
    if value is None:
        return None
    endless = _number(value) == -1 or (isinstance(value, float) and value == math.inf)
    return Refused("no limit is None" if endless else "")


def _devices(value: object) -> object:
    if not isinstance(value, list | tuple) or not value:
        return Refused()
    indices = [_integer(index) for index in value]
    ok = all(index is not None and 0 <= index <= _LARGEST for index in indices) and len(set(indices)) == len(indices)
    return indices if ok else Refused()


def _schedule(value: object) -> object:
    if not isinstance(value, Mapping) or not value:
        return Refused()
    kept = {_integer(epoch): _integer(count) for epoch, count in value.items()}
    ok = all(epoch is not None and epoch >= 0 and count is not None and count >= 1 for epoch, count in kept.items())
    return kept if ok else Refused()


def _options(value: object) -> object:
    if not isinstance(value, Mapping):
        return Refused("vars(…) makes a dict of a namespace" if type(value).__name__ == "Namespace" else "")
    # A plain copy: it cannot change behind the settings' back, and any mapping can then be pickled.
    return dict(value) if all(isinstance(key, str) for key in value) else Refused("its keys must be strings")


def _object(value: object) -> object:
    """An object made by someone's own class; plain values and classes are what people pass by mistake."""
    if isinstance(value, type):
        return Refused(f"this is the class: call it, as in {value.__name__}()")
    if isinstance(value, _PLAIN):
        return Refused()
    return Refused() if type(value).__module__ == "builtins" and type(value) is not object else value


def _text(value: object) -> object:
    if not isinstance(value, str):
        return Refused()
    text = plain(value)
    return text if text.strip() and _printable(text) else Refused()


def _path(value: object) -> object:
    if not isinstance(value, os.PathLike):
        return _text(value)
    return Refused() if isinstance(_text(os.fspath(value)), Refused) else value


def list_of(item: Check) -> Check:
    """A list or tuple whose items pass another check."""

    def keep(value: object) -> object:
        if not isinstance(value, list | tuple):
            return Refused()
        kept = [item.keep(one) for one in value]
        return next((one for one in kept if isinstance(one, Refused)), kept)

    return Check(f"a list of them ({item.allowed})", keep)


def seconds(value: object) -> float | None:
    """The seconds in a number, a `timedelta` or a text like "DD:HH:MM:SS"; None where it is none of them or not > 0."""
    if isinstance(value, str) and (found := _TIME.fullmatch(value)):
        days, hours, minutes, rest = map(int, found.groups())
        value = timedelta(days=days, hours=hours, minutes=minutes, seconds=rest)
    number = value.total_seconds() if isinstance(value, timedelta) else _number(value)
    return float(number) if number is not None and number > 0 else None


def _duration(value: object) -> object:
    if seconds(value) is None:
        return Refused()
    return value if (number := _number(value)) is None else number


def _run_name(value: object) -> object:
    if not isinstance(value, str):
        return Refused()
    wrong = {
        "it is empty": not value,
        "it has a '/' or '\\'": "/" in value or "\\" in value,
        "it has a control character or half a surrogate pair": not _printable(value, "Cs"),
        "it has '..'": ".." in value,
        "it starts or ends with a space or dot": value != value.strip().strip("."),
        "it is too long": len(value) > 128 or len(value.encode(errors="replace")) > 255,  # file systems: 255 bytes
        "Windows reserves it": _WINDOWS.fullmatch(value) is not None,
    }
    reasons = [reason for reason, holds in wrong.items() if holds]
    return Refused(", ".join(reasons)) if reasons else plain(value)


BOOL = Check("True, False", lambda value: bool(value) if isinstance(value, bool | numpy.bool_) else Refused())
NONE = Check("None", lambda value: None if value is None else Refused())
NO_LIMIT = Check("None", _no_limit)
OBJECT = Check("an object", _object)
CALLBACK = Check("an object with marked methods", _object)
TEXT = Check("a name", _text)
PATH = Check("a path (text or os.PathLike, neither empty nor with control characters)", _path)
OPTIONS = Check("a mapping with string keys", _options)
COUNT = integer(1)

CHECKS: dict[str, Check] = {
    "max_epochs": COUNT | NO_LIMIT,
    "max_steps": COUNT | NO_LIMIT,
    "min_epochs": COUNT | NO_LIMIT,
    "min_steps": COUNT | NO_LIMIT,
    "max_time": Check("seconds > 0, a timedelta > 0, 'DD:HH:MM:SS' (HH < 24; MM, SS < 60)", _duration) | NO_LIMIT,
    "accelerator": one_of(*get_args(Accelerator)),
    "devices": one_of("auto")
    | Check("-1", integer(-1, -1).keep)
    | COUNT
    | Check("a list of different indices >= 0", _devices),
    "num_nodes": COUNT,
    "strategy": one_of(*get_args(Strategy)) | OBJECT,
    "precision": one_of(*get_args(Precision)),
    "sync_batchnorm": BOOL,
    "use_distributed_sampler": BOOL,
    "compile": BOOL | OPTIONS,
    "benchmark": BOOL | NONE,
    "deterministic": BOOL | one_of("warn"),
    "process_timeout": positive(" (minutes)") | NO_LIMIT,
    "inference_mode": BOOL,
    "accumulate_grad_batches": COUNT | Check("a mapping {epoch >= 0: n >= 1}", _schedule),
    "gradient_clip_val": positive("") | NO_LIMIT,
    "gradient_clip_algorithm": one_of(*get_args(Clip)),
    "detect_anomaly": BOOL,
    "on_nan": one_of(*get_args(OnNan)),
    "oom": one_of(*get_args(Oom)),
    "limit_train_batches": share_or_count(1) | NO_LIMIT,
    "limit_val_batches": share_or_count(0) | NO_LIMIT,
    "limit_test_batches": share_or_count(0) | NO_LIMIT,
    "limit_predict_batches": share_or_count(0) | NO_LIMIT,
    "overfit_batches": share_or_count(1) | NO_LIMIT,
    "fast_dev_run": BOOL | COUNT,
    "num_sanity_val_steps": integer(0),
    "val_check_interval": share_or_count(1) | NO_LIMIT,
    "check_val_every_n_epoch": COUNT,
    "reload_dataloaders_every_n_epochs": COUNT | NO_LIMIT,
    "logger": BOOL | TEXT | OBJECT | list_of(TEXT | OBJECT),
    "log_every_n_steps": COUNT,
    "checkpoint": BOOL | OBJECT,
    "resume": one_of("auto", "last", "best") | PATH | NONE,
    "root_dir": PATH,
    "name": Check("a directory's name of 1 to 128 characters (no '/', '\\', '..')", _run_name) | NONE,
    "overwrite": BOOL,
    "hparams": OPTIONS | NONE,
    "log_gradients": BOOL,
    "seed": integer(0, 2**32 - 1) | NONE,
    "callbacks": CALLBACK | Check("a list of such", list_of(CALLBACK).keep) | NONE,
    "progress_bar": BOOL,
    "summary": BOOL | COUNT,
    "profiler": one_of(*get_args(Profiler)) | OBJECT | NONE,
}
