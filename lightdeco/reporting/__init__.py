"""Runs as pages: `report` for one, `compare` for several. Each page is one file that opens without a network."""

import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path

from lightdeco.checkpoint.describe import size
from lightdeco.curves import best, curves, deciding, epochs, mode
from lightdeco.errors import LightdecoError

from . import figures, page
from .comparing import Comparison, compare
from .source import Facts, RunOrDir, facts

__all__ = ["Comparison", "compare", "report"]

_NAME = "report.html"


def report(source: RunOrDir, path: str | os.PathLike[str] | None = None) -> Path:
    """Write what is known of a run as one HTML page, and return the page's path.

    It holds the curves, how the run ended, hyperparameters, settings, model, checkpoints, versions and, where there is
    one, the profile. Of a directory only files are read, and none of them is changed: the run may still go on, or have
    been killed. The page has about 5 MB (the library that draws the curves) and fetches nothing. Secrets are masked.

    Args:
        source: a `Run`, or the path of a run's directory.
        path: where to write; default: `report.html` in the run's directory.

    Raises:
        LightdecoError: plotly is not installed; `source` is no run; the run has no directory and no path was given.
    """
    found = facts(source)
    if path is None and found.directory is None:
        raise LightdecoError("this run has no directory; give the report a path: run.report('report.html')")
    target = Path(path) if path is not None else Path(found.directory or "") / _NAME
    return page.write(target, _page(found))


def _page(found: Facts) -> str:
    shown = figures.of_run(found.history)
    parts = [
        f"<h1>{page.escape(found.title)}</h1>",
        f'<p class="{found.state}">{page.escape(found.ending)}</p>',
        f'<p class="soft">{page.escape(_where(found))}</p>',
        page.tiles(_tiles(found)),
        page.section("Curves", page.panels(shown) or '<p class="card">no metrics were recorded yet</p>'),
        page.section("Hyperparameters and settings", _settings(found)),
        page.section("Model", _model(found)),
        page.section("Checkpoints", _checkpoints(found)),
        page.section("Environment", page.pairs({k: v for k, v in found.environment.items() if v is not None})),
        page.section("Profile", f'<div class="card"><pre>{_preformatted(found.profile)}</pre></div>')
        if found.profile
        else "",
        page.section("Could not be read", *(f"<p>{page.escape(problem)}</p>" for problem in found.problems)),
    ]
    return page.page(f"{found.title} - lightdeco", "\n".join(part for part in parts if part), shown)


def _where(found: Facts) -> str:
    """Directory, steps, epochs, and the time between the first record and the last."""
    last = found.history[-1] if found.history else {}
    step = found.progress.get("global_step")
    steps = max(step if isinstance(step, int) else 0, int(last.get("step", 0)))
    words = [f"{steps:,} steps"]
    if isinstance(epoch := found.progress.get("epoch"), int):
        words.append(f"{epoch:,} epochs finished")
    times = [float(record["time"]) for record in found.history if isinstance(record.get("time"), int | float)]
    if times and math.isfinite(times[0]) and times[0] > 0:
        words.append(f"first record {_time(times[0])}, last {_time(times[-1])}")
    return " · ".join([*words, *([str(found.directory)] if found.directory is not None else [])])


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def _tiles(found: Facts) -> dict[str, tuple[object, str]]:
    """The best value of what decides, and the last of what is evaluated (else of the training loss)."""
    known, recorded = curves(found.history), epochs(found.history)
    result: dict[str, tuple[object, str]] = {}
    name = deciding(known)
    top = None if name is None else best(name, known[name], recorded)
    if top is not None:
        result[f"best {name}"] = (top.value, f"step {top.step:g}" + (f", epoch {top.epoch}" if top.epoch else ""))
    evaluated = [name for name in known if name.startswith(("val/", "test/"))]
    for each in (evaluated or [name for name in known if mode(name)])[:7]:
        step, value = known[each][-1]
        result[f"last {each}"] = (value, f"step {step:g}")
    return result


def _settings(found: Facts) -> str:
    cards = page.pairs(found.hparams, "hyperparameters") + page.pairs(
        found.settings, "settings other than the defaults"
    )
    return f'<div class="pair">{cards}</div>' if cards else ""


def _model(found: Facts) -> str:
    if not found.model:
        return ""
    content = page.table(found.model, ("parameters", "trainable", "MB", "FLOPs", "calls"), found.totals)
    return content if len(found.model) <= 20 else page.folded(f"{found.totals} in {len(found.model)} rows", content)


def _checkpoints(found: Facts) -> str:
    rows: list[Mapping[str, object]] = [
        {
            "name": one.name,
            "step": one.step,
            "epoch": one.epoch,
            "score": one.score,
            "size": size(one.size) if not one.problem else "cannot be read",
            "written": one.written.replace("T", " ").removesuffix("+00:00"),
        }
        for one in found.checkpoints
    ]
    total = f"{size(sum(one.size for one in found.checkpoints))} in all"
    return page.table(rows, ("step", "epoch", "score", "size"), total if len(rows) > 1 else "")


def _preformatted(text: str) -> str:
    return "\n".join(page.escape(line) for line in text.splitlines())
