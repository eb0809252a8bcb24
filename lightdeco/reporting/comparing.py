"""`compare`: several runs in one table and one page."""

import html
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightdeco.curves import best, curves, mode
from lightdeco.errors import LightdecoError

from . import figures, page
from .source import DEFAULTS, Facts, RunOrDir, facts

#: Beginnings of the table's keys.
_HPARAM, _SETTING, _BEST, _FINAL = "hparams/", "settings/", "best/", "final/"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found; `print` shows it as a text."""

    table: list[dict[str, Any]]
    """A dict for each run, all with the same keys: "run", "ended", "steps", "epochs", then "hparams/…" and "settings/…"
    where they differ, "final/…" (the last value of each metric) and "best/…" (where less or more is better). What a run
    does not have is None."""
    path: Path | None = None
    """The page, when a path was given."""
    best: dict[str, list[str]] = field(default_factory=dict)
    """By key, the names of the runs with the best value."""

    def __str__(self) -> str:
        columns = ["", *(str(row["run"]) for row in self.table)]
        lines = [columns]
        for key in list(self.table[0])[1:]:
            cells = [_text(row[key]) + (" *" if row["run"] in self.best.get(key, ()) else "") for row in self.table]
            lines.append([key, *cells])
        widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def compare(
    runs: Sequence[RunOrDir] | Mapping[str, RunOrDir], path: str | os.PathLike[str] | None = None
) -> Comparison:
    """Compare runs: what differs in their hyperparameters and settings, and their final and best metrics.

    Args:
        runs: each a `Run` or the path of a run's directory (the run may still go on); a dict gives them names.
        path: where to write an HTML page with the table and the curves laid over each other; None writes nothing.

    Raises:
        LightdecoError: fewer than one run, something that is no run, or plotly is missing and a path was given.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> for name, loss in (("small", 0.5), ("large", 0.25)):
    ...     (folder / name).mkdir()
    ...     line = f'{{"stage": "val", "epoch": 0, "step": 9, "val/loss": {loss}}}'
    ...     _ = (folder / name / "metrics.jsonl").write_text(line + chr(10))
    >>> compared = compare([folder / "small", folder / "large"])
    >>> [(row["run"], row["best/val/loss"]) for row in compared.table], compared.best["best/val/loss"]
    ([('small', 0.5), ('large', 0.25)], ['large'])
    """
    if isinstance(runs, str | os.PathLike) or not isinstance(runs, Sequence | Mapping):
        raise LightdecoError(
            f"compare got {runs!r}; allowed: a list of runs and directories, or a dict that names them"
        )
    if not runs:
        raise LightdecoError("compare got no runs; give a list of runs and of the directories of runs")
    given = list(runs.values()) if isinstance(runs, Mapping) else list(runs)
    found = [facts(source) for source in given]
    names = [str(name) for name in runs] if isinstance(runs, Mapping) else _names(found)
    known = dict(zip(names, found, strict=True))
    table = _table(known)
    marked = _best(table)
    target = None if path is None else page.write(Path(path), _page(known, table, marked))
    return Comparison(table, target, marked)


def _names(found: Sequence[Facts]) -> list[str]:
    """The shortest ends of the directories that tell them apart; a number for what is there twice."""
    parts = [one.directory.resolve().parts if one.directory is not None else (one.title,) for one in found]
    depth = 1
    while len({each[-depth:] for each in parts}) < len(set(parts)):
        depth += 1
    names: list[str] = []
    for each in parts:
        name, count = "/".join(each[-depth:]), 2
        while name in names:
            name, count = f"{'/'.join(each[-depth:])} ({count})", count + 1
        names.append(name)
    return names


def _table(known: Mapping[str, Facts]) -> list[dict[str, Any]]:
    metrics = {name: curves(found.history) for name, found in known.items()}
    rows = []
    for name, found in known.items():
        steps = max([int(record.get("step", 0)) for record in found.history], default=0)
        row: dict[str, Any] = {
            "run": name,
            "ended": found.ending,
            "steps": steps,
            "epochs": found.progress.get("epoch"),
        }
        row |= {f"{_HPARAM}{key}": value for key, value in found.hparams.items()}
        row |= {f"{_SETTING}{key}": value for key, value in found.settings.items()}
        for metric, points in metrics[name].items():
            finite = [value for _, value in points if math.isfinite(value)]
            row[f"{_FINAL}{metric}"] = points[-1][1]
            if mode(metric) is not None and finite:
                row[f"{_BEST}{metric}"] = min(finite) if mode(metric) == "min" else max(finite)
        rows.append(row)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    groups = ("run", "ended", "steps", "epochs", _HPARAM, _SETTING, _BEST, _FINAL)
    keys.sort(key=lambda key: next(i for i, group in enumerate(groups) if key.startswith(group)))
    for row, found in zip(rows, known.values(), strict=True):
        if found.progress:  # its settings are known, and those that are not listed have their defaults
            row.update(
                {
                    key: DEFAULTS.get(key.removeprefix(_SETTING))
                    for key in keys
                    if key.startswith(_SETTING) and key not in row
                }
            )
    aware = [row for row, found in zip(rows, known.values(), strict=True) if found.progress]
    shown = [key for key in keys if not key.startswith((_HPARAM, _SETTING)) or _differs(key, aware)]
    return [{key: row.get(key) for key in shown} for row in rows]


def _differs(key: str, rows: Sequence[Mapping[str, Any]]) -> bool:
    return len({repr(row.get(key)) for row in rows}) > 1


def _best(table: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """By key, which runs have the best value; keys that nothing is known of, and single runs, have none."""
    marked: dict[str, list[str]] = {}
    for key in table[0]:
        metric = key.removeprefix(_BEST).removeprefix(_FINAL)
        if metric == key or mode(metric) is None or len(table) < 2:
            continue
        points = [(float(i), row[key]) for i, row in enumerate(table) if row[key] is not None]
        top = best(metric, points)
        if top is not None:
            marked[key] = [str(row["run"]) for row in table if row[key] == top.value]
    return marked


def _page(known: Mapping[str, Facts], table: Sequence[Mapping[str, Any]], marked: Mapping[str, list[str]]) -> str:
    shown = figures.of_runs({name: found.history for name, found in known.items()})
    colours = {name: figures.COLOURS[i % len(figures.COLOURS)] for i, name in enumerate(known)}
    title = f"{len(known)} runs compared"
    problems = [f"{name}: {problem}" for name, found in known.items() for problem in found.problems]
    parts = [
        f"<h1>{page.escape(title)}</h1>",
        page.section("Curves", page.run_keys(colours), page.panels(shown, with_keys=False)) if shown else "",
        page.section("Table", _html_table(table, marked)),
        page.section("Could not be read", *(f"<p>{page.escape(problem)}</p>" for problem in problems)),
    ]
    return page.page(f"{title} - lightdeco", "\n".join(part for part in parts if part), shown)


def _html_table(table: Sequence[Mapping[str, Any]], marked: Mapping[str, list[str]]) -> str:
    """A row for each fact and a column for each run; the best are bold with a star."""
    head = "".join(f"<th>{page.escape(row['run'])}</th>" for row in table)
    lines = [f"<tr><th></th>{head}</tr>"]
    for key in list(table[0])[1:]:
        cells = []
        for row in table:
            top = row["run"] in marked.get(key, ())
            text = html.escape(_text(row[key]))
            cells.append(f'<td class="best">{text} ★</td>' if top else f"<td>{text}</td>")
        lines.append(f"<tr><th>{page.escape(key)}</th>{''.join(cells)}</tr>")
    return f'<div class="card"><div class="wide"><table class="compare">{"".join(lines)}</table></div></div>'


def _text(value: object) -> str:
    if value is None:
        return "-"
    text = f"{value:.5g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 80 else text[:79] + "…"
