"""The file `metrics.jsonl`: one strict JSON object per line, whatever loggers a run has."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, SupportsFloat, cast

from lightdeco.errors import LoggerError, warn

from .lines import Lines

#: Its name in the run's directory.
METRICS: Final = "metrics.jsonl"
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_TEXT_FIELDS = frozenset({"stage"})


_JSON = json.JSONEncoder(allow_nan=False)  # json.dumps would make one for each record


class MetricsFile:
    """Appends records to a file, one JSON line each, handed to the system when `write` returns.

    A line that was torn by a crash is cut off when the file is continued. `size` is its length in bytes: `cut(size)`
    brings the file back to that moment.

    Raises:
        LoggerError: the file cannot be opened for writing.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = MetricsFile(Path(folder) / "metrics.jsonl")
    ...     file.write({"stage": "train", "epoch": 0, "step": 1, "train/loss": math.inf})
    ...     file.close()
    ...     read(file.path)
    [{'stage': 'train', 'epoch': 0, 'step': 1, 'train/loss': inf}]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._warned = False
        try:
            self._lines = Lines(self.path)
        except OSError as error:
            raise LoggerError(f"{str(self.path)!r} cannot be written ({error}); choose another root_dir") from error

    @property
    def size(self) -> int:
        """The length of the file in bytes."""
        return self._lines.size

    def write(self, record: Mapping[str, object]) -> None:
        """Append one record of texts and numbers (tensors of one element too).

        A write that fails is one `LightdecoWarning` for this file; it does not raise.
        """
        try:
            line = _JSON.encode(dict(record))  # finite numbers and texts, nearly always
        except (TypeError, ValueError):
            line = _JSON.encode({key: encode(value) for key, value in record.items()})
        try:
            self._lines.append(line.encode() + b"\n")
        except (OSError, ValueError) as error:  # ValueError: the file is closed
            if not self._warned:
                self._warned = True
                warn(
                    f"metrics could not be written to {str(self.path)!r} ({error}); training goes on, its records are "
                    "missing there until writing works again; later failures are not reported"
                )

    def cut(self, size: int) -> None:
        """Drop what was written after the file was `size` bytes long; does nothing when it is shorter."""
        self._lines.cut(size)

    def close(self) -> None:
        """Close the file; a later `write` only warns."""
        self._lines.close()


def read(path: str | Path) -> list[dict[str, object]]:
    """The records of a metrics file, oldest first; a last line that was torn by a crash is left out.

    `"NaN"`, `"Infinity"` and `"-Infinity"` come back as floats, but for the field `stage`.

    Raises:
        LoggerError: a line before the last one is no JSON object.
    """
    records: list[dict[str, object]] = []
    # What follows the last newline is nothing, or a torn line.
    for number, line in enumerate(Path(path).read_bytes().split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise LoggerError(f"{path}, line {number} is no JSON ({error}); remove that line") from error
        if not isinstance(record, dict):
            raise LoggerError(f"{path}, line {number} is no JSON object; remove that line")
        records.append({key: _decode(key, value) for key, value in record.items()})
    return records


def encode(value: object) -> object:
    """A text, number, bool or None as strict JSON has it; a tensor of one element as a number, NaN as a text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    number = float(cast(SupportsFloat, value))  # a tensor or NumPy's scalar; for other types TypeError is right
    if math.isnan(number):
        return "NaN"
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def _decode(key: str, value: object) -> object:
    return _SPECIAL.get(value, value) if isinstance(value, str) and key not in _TEXT_FIELDS else value
