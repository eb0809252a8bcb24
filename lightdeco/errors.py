"""The exception tree: every refusal of lightdeco is a `LightdecoError`, every warning a `LightdecoWarning`.

LightdecoError
├── MarkError        marks and their discovery: a role missing, given twice, or asking for what it cannot get
├── SettingsError    a setting's name or value (also a ValueError)
├── DataError        what `data` is, or what a loader delivered
├── StepError        what a step returned
├── LoggerError      making a logger
├── CheckpointError  writing or reading a checkpoint
└── LaunchError      starting or joining processes
"""

import contextlib
import difflib
import os
import sys
import warnings
from collections.abc import Iterable
from types import FrameType
from typing import Final, NamedTuple

#: Code that no warning points at: lightdeco, and contextlib, through which lightdeco calls itself.
_PASSED: Final = (os.path.dirname(os.path.abspath(__file__)) + os.sep, contextlib.__file__)

#: What torch says where the other end of a connection is gone, which explains nothing: the other process can.
_GONE: Final = ("gloo/transport", "Connection was likely closed", "ncclRemoteError", "remote process exited")


class Line(NamedTuple):
    """Where a verb was called."""

    file: str
    number: int
    module: str


#: In a process that a verb started: the caller's line, at which what comes from no code of the user's points there.
_started_at: Line | None = None


class LightdecoError(Exception):
    """The base of every error that lightdeco raises by itself.

    Errors of the user's own code are never wrapped in it.

    >>> issubclass(SettingsError, LightdecoError)
    True
    """


class MarkError(LightdecoError):
    """A mark, a role or an argument is missing, doubled or misplaced; raised before the first batch."""


class SettingsError(LightdecoError, ValueError):
    """A setting has a wrong name or value; the message names the setting, the value and what is allowed."""


class DataError(LightdecoError):
    """`data` has a form that lightdeco cannot read, or a loader delivered nothing."""


class StepError(LightdecoError):
    """A step returned something that cannot be used as what its role returns."""


class LoggerError(LightdecoError):
    """A logger could not be made: package missing, wrong option, refused login."""


class CheckpointError(LightdecoError):
    """A checkpoint could not be written or read; the message lists the reason for each candidate."""


class LaunchError(LightdecoError):
    """The devices or processes asked for cannot be had on this machine, or one of them was killed or hangs.

    `rank` is that of the process which failed first, where a verb had started several.
    """

    rank: int | None = None


class LightdecoWarning(UserWarning):
    """The category of every warning of lightdeco."""


def rank() -> int:
    """The rank of this process among all, from the variables that launchers set; 0 in a process on its own."""
    return int(os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")))


def warn(message: str, everywhere: bool = False) -> None:
    """Warn once per message and place, pointing at the line outside lightdeco from which it was called.

    Of several processes rank 0 warns for all; with `everywhere` each does, of something that is its own.
    """
    if not everywhere and rank() > 0:
        return
    frame = _outside()
    line = _line(frame)
    warnings.warn_explicit(
        message,
        LightdecoWarning,
        filename=line.file,
        lineno=line.number,
        module=line.module,
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def caller() -> Line:
    """The line outside lightdeco from which it was called."""
    return _line(_outside())


def start_at(line: Line) -> None:
    """In a started process: let warnings point at the caller's line, where no other code of the user's runs."""
    global _started_at
    _started_at = line


def _outside() -> FrameType:
    # Verbs and loop lie between the warning and the user's call: the depth differs, so no stacklevel fits all.
    frame: FrameType = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_PASSED):
        frame = frame.f_back
    return frame


def _line(frame: FrameType) -> Line:
    if frame.f_back is None and _started_at is not None:
        return _started_at
    return Line(frame.f_code.co_filename, frame.f_lineno, frame.f_globals.get("__name__", "<unknown>"))


def add_note(error: BaseException, text: str) -> bool:
    """Add a line under an error; False before Python 3.11, where errors have no notes and nothing is done.

    >>> add_note(ValueError("no"), "why") == hasattr(ValueError, "add_note")
    True
    """
    add = getattr(error, "add_note", None)
    if add is None:
        return False
    add(text)
    return True


def lost(text: object) -> bool:
    """Whether an error says no more than that another process of the run is gone.

    >>> lost(RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:45455"))
    True
    """
    return any(words in str(text) for words in _GONE)


def wrong_argument(function: str, name: str, value: object, allowed: str) -> SettingsError:
    """The error for an argument of a callback.

    >>> wrong_argument("EarlyStopping", "patience", 0, "an integer of at least 1")
    SettingsError('EarlyStopping(patience=0); allowed: an integer of at least 1')
    """
    return SettingsError(f"{function}({name}={value!r}); allowed: {allowed}")


def nearest(word: str, allowed: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the allowed word most like `word`, or an empty string.

    >>> nearest("max_epoch", ["max_epochs", "max_steps"])
    "; did you mean 'max_epochs'?"
    """

    def alike(other: str) -> float:
        return difflib.SequenceMatcher(None, word, other).ratio()

    found = max(allowed, key=alike, default="")  # of equally near ones the first
    return f"; did you mean {found!r}?" if found and alike(found) >= 0.6 else ""
