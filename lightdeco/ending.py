"""`end.json` in a run's directory: how and when the run ended. Where it is missing, the run goes on or was killed."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from . import child
from .errors import LaunchError, lost, warn
from .loggers.masking import mask_text
from .run import Run

NAME: Final = "end.json"
#: The note for the process that started this one: the directory of the run that has ended.
_NOTE: Final = "ended"
_LONGEST: Final = 2000  # characters of an error's message


def begin(directory: Path) -> None:
    """Remove the file: the run in this directory goes on."""
    (directory / NAME).unlink(missing_ok=True)


def write(run: Run, status: str, error: BaseException | None) -> None:
    """Write the file whole or not at all, on the main process; a write that fails is a warning.

    Args:
        run: one with a directory; for others nothing is done.
        status: "finished", "failed" or "interrupted".
        error: what ended the run; of it the class, and the message with secrets masked.
    """
    if not run.has_dir or not run.is_main:
        return
    found = {
        "status": status,
        "stop_reason": run.stop_reason,
        "error": None if error is None else {"class": _class(error), "message": _message(error)},
        "time": round(time.time(), 3),
        "epoch": run.epoch,
        "step": run.global_step,
    }
    _put(run.dir, found)
    child.note(_NOTE, str(run.dir))


def correct(folder: Path, error: BaseException) -> None:
    """In the process that started the run: name what ended it, where rank 0 only saw that another process is gone."""
    cause = error if isinstance(error, LaunchError) else error.__cause__
    note = folder / _NOTE
    if not isinstance(cause, LaunchError) or not cause.rank or not note.exists():
        return
    directory = Path(note.read_text())
    told = read(directory)
    if told is None or told.get("status") == "finished":
        return
    lines = str(cause).splitlines()[-2:]  # of a traceback the error itself, and then its rank
    last = LaunchError(" ".join(lines) if lines[-1].startswith("(on rank ") else lines[-1])
    message = _message(last) if error is cause else f"{_message(error)} (on rank {cause.rank})"
    stated = {"status": "failed", "stop_reason": None, "error": {"class": _class(error), "message": message}}
    _put(directory, told | stated)


def _put(directory: Path, found: dict[str, Any]) -> None:
    target, sibling = directory / NAME, directory / f"{NAME}.new"
    try:
        with sibling.open("w", encoding="utf-8") as file:
            file.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(sibling, target)
    except (OSError, UnicodeError) as failure:
        warn(f"{target} could not be written ({failure}); reports cannot say how the run ended")
        with suppress(OSError):
            sibling.unlink(missing_ok=True)


def read(directory: Path) -> dict[str, Any] | None:
    """What the file says, or None where there is none that can be read."""
    try:
        found = json.loads((directory / NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _class(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _message(error: BaseException) -> str:
    try:
        text = mask_text(str(error))
    except Exception:  # a broken __str__ of the user's error must not hide the error itself
        return ""
    if lost(text):
        text = f"another process of the run has ended, which says why: {text}"
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
