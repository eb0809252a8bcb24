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
from typing import Final

#: Code that no warning points at: lightdeco, and contextlib, through which lightdeco calls itself.
_PASSED: Final = (os.path.dirname(os.path.abspath(__file__)) + os.sep, contextlib.__file__)


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
    """The devices or processes asked for cannot be had on this machine."""


class LightdecoWarning(UserWarning):
    """The category of every warning of lightdeco."""


def warn(message: str) -> None:
    """Warn once per message and place, pointing at the line outside lightdeco from which it was called."""
    # Verbs and loop lie between the warning and the user's call: the depth differs, so no stacklevel fits all.
    place: FrameType = sys._getframe(1)
    while place.f_back is not None and place.f_code.co_filename.startswith(_PASSED):
        place = place.f_back
    names = place.f_globals
    warnings.warn_explicit(
        message,
        LightdecoWarning,
        filename=place.f_code.co_filename,
        lineno=place.f_lineno,
        module=names.get("__name__", "<unknown>"),
        registry=names.setdefault("__warningregistry__", {}),
    )


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
