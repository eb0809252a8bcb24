"""`end.json` in a run's directory: how and when the run ended. Where it is missing, the run goes on or was killed."""

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from .errors import warn
from .loggers.masking import mask_text
from .run import Run

NAME: Final = "end.json"
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
    target, sibling = run.dir / NAME, run.dir / f"{NAME}.new"
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
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
