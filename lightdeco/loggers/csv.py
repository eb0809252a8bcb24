"""The logger "csv": a table with one row per record."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from lightdeco.errors import LoggerError

from .lines import Lines
from .metrics_file import encode


class CSV:
    """Writes `metrics.csv`: a column `step`, then one column per metric in order of appearance.

    A new metric adds a column: the table is written anew beside the old one and replaces it, so that a reader always
    finds a whole table. Each row is handed to the system when `log_metrics` returns. A cell of a metric that a record
    does not have is empty. A table that exists already is continued. Hyperparameters, and what the run was made with,
    are in `hparams.json` beside it.

    Args:
        directory: where the file is written; None is the run's directory.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = None if directory is None else Path(directory)
        self.path: Path | None = None
        self._columns = ["step"]
        self._provenance: dict[str, object] = {}
        self._lines: Lines | None = None

    def open(self, directory: Path) -> None:
        """Start or continue the table; `directory` is the run's.

        Raises:
            LoggerError: there is another kind of file in its place.
        """
        self.close("finished")
        folder = self.directory or directory
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "metrics.csv"
        columns, rows = _read(self.path)
        if columns[0] != "step":
            raise LoggerError(f"{str(self.path)!r} is no table of this logger; move it or give CSV another directory")
        self._replace(columns, rows)

    def log_provenance(self, provenance: Mapping[str, object]) -> None:
        """Keep what the run was made with for the file of `log_hparams`."""
        self._provenance = dict(provenance)

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        """Write `hparams.json`: the hyperparameters as "hparams", and beside them what the run was made with."""
        path = self._opened().path.with_name("hparams.json")
        sibling = path.with_name(f"{path.name}.new")
        text = json.dumps(_strict({"hparams": hparams, **self._provenance}), indent=1, ensure_ascii=False)
        sibling.write_text(f"{text}\n", encoding="utf-8")
        os.replace(sibling, path)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append one row."""
        new = [name for name in metrics if name not in self._columns]
        if new:
            self._replace(self._columns + new, _read(self._opened().path)[1])
        self._opened().append(_text(self._columns, [{**metrics, "step": step}]))

    def cut(self, step: int) -> None:
        """Drop the rows after `step`: the run continues from there."""
        columns, rows = _read(self._opened().path)
        self._replace(columns, [row for row in rows if int(str(row["step"])) <= step])

    def rewind(self, records: Sequence[tuple[int, Mapping[str, float]]]) -> None:
        """Write the table anew from the records, (step, metrics) each, that stay when a run is resumed."""
        columns = list(dict.fromkeys(["step", *(name for _, metrics in records for name in metrics)]))
        self._replace(columns, [{**metrics, "step": step} for step, metrics in records])

    def close(self, status: str) -> None:
        """Close the file, whatever the status."""
        if self._lines is not None:
            self._lines.close()
            self._lines = None

    def _opened(self) -> Lines:
        if self._lines is None:
            raise LoggerError("the logger CSV is not open; call open(directory) first")
        return self._lines

    def _replace(self, columns: list[str], rows: Sequence[Mapping[str, object]]) -> None:
        """Write the whole table to a sibling, put it in the place of the old one and append to it from now on."""
        assert self.path is not None
        sibling = self.path.with_name(f"{self.path.name}.new")
        sibling.write_bytes(_text(columns, [dict(zip(columns, columns, strict=True)), *rows]))
        self.close("finished")
        os.replace(sibling, self.path)
        self._columns = columns
        self._lines = Lines(self.path)


def _strict(value: object) -> object:
    """A plain value as strict JSON has it: NaN and infinities as texts, as in metrics.jsonl."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return encode(value)


def _text(columns: list[str], rows: Sequence[Mapping[str, object]]) -> bytes:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _read(path: Path) -> tuple[list[str], list[dict[str, object]]]:
    """The columns and the rows of a table, but for a torn last row; a missing or empty file is an empty table."""
    if not path.exists():
        return ["step"], []
    text = path.read_text(encoding="utf-8")
    reader = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
    columns = list(reader.fieldnames or ["step"])
    rows: list[dict[str, object]] = [{name: row.get(name) or "" for name in columns} for row in reader]
    return columns, rows
