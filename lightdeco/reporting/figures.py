"""Curves as plotly's figures: plain dicts, so that plotly itself need not be imported to make them."""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from lightdeco.curves import (
    DENSE,
    Best,
    Curve,
    best,
    curves,
    deciding,
    epochs,
    is_evaluated,
    is_noisy,
    kind,
    not_finite,
    panels,
    smoothed,
    thinned,
    wants_log,
)

#: Of middle lightness: readable on white and on black.
COLOURS: Final = ("#3b82d6", "#e5604d", "#3fa35b", "#e8912d", "#a575c9", "#2aa5a5", "#b0785a", "#c9a227")

Figure = dict[str, Any]


def of_run(history: Sequence[Mapping[str, object]]) -> list[Figure]:
    """One figure for each kind of metric, its curves coloured by name."""
    found, recorded = curves(history), epochs(history)
    name = deciding(found)
    marked = None if name is None else best(name, found[name], recorded)
    figures = []
    for title, members in panels(found).items():
        figure = _figure(title, members.values())
        figure["line"] = marked.step if marked is not None and _drawn(members.values()) else None
        colours: dict[str, str] = {}
        for member, points in members.items():
            colour = colours.setdefault(member.removesuffix("_epoch"), COLOURS[len(colours) % len(COLOURS)])
            ring = best(member, points, recorded) if title == "loss" and member.startswith("val/") else None
            _add(figure, member, points, colour, member, ring)
        figures.append(figure)
    return figures


def of_runs(histories: Mapping[str, Sequence[Mapping[str, object]]]) -> list[Figure]:
    """One figure for each metric, with a curve for each run that has it, coloured by run."""
    found = {run: curves(history) for run, history in histories.items()}
    colours = {run: COLOURS[i % len(COLOURS)] for i, run in enumerate(histories)}
    names = {name: None for each in found.values() for name in each}
    ordered = sorted(names, key=lambda name: (kind(name) != "loss", not is_evaluated(name), kind(name) == "lr"))
    figures = []
    for name in ordered:
        members = {run: each[name] for run, each in found.items() if name in each}
        figure = _figure(name, members.values())
        for run, points in members.items():
            _add(figure, run, points, colours[run], name, None)
        figures.append(figure)
    return figures


def _figure(title: str, members: Iterable[Curve]) -> Figure:
    every = list(members)
    return {"title": title, "log": kind(title) == "loss" and wants_log(every), "keys": [], "traces": [], "line": None}


def _drawn(members: Iterable[Curve]) -> bool:
    return any(len(points) > 1 for points in members)


def _add(figure: Figure, label: str, points: Curve, colour: str, name: str, ring: Best | None) -> None:
    """The traces of one curve, and its key in the legend, which switches all of them."""
    text = html.escape(label)  # plotly reads names as HTML
    first = len(figure["traces"])
    dense = len(points) > DENSE
    style: dict[str, Any] = {"color": colour, "width": 1.8 if is_evaluated(name) else 1.4}
    if name.endswith("_epoch"):
        style["dash"] = "dash"
    if is_noisy(name, points):
        faint = {"color": colour, "width": 0.8}
        figure["traces"].append(_trace(thinned(points), "lines", line=faint, opacity=0.3, hoverinfo="skip"))
        points_shown = smoothed(points, 1000)
    else:
        points_shown = thinned(points)
    mode = "lines" if dense else "lines+markers"
    shown = {"line": style, "marker": {"color": colour, "size": 6 if is_evaluated(name) else 4}}
    figure["traces"].append(_trace(points_shown, mode, hovertemplate=f"%{{y:.5g}}<extra>{text}</extra>", **shown))
    if ring is not None:
        circle = {"symbol": "circle-open", "size": 13, "color": colour, "line": {"width": 2, "color": colour}}
        figure["traces"].append(_trace([(ring.step, ring.value)], "markers", marker=circle, hoverinfo="skip"))
    note = not_finite(points)
    if ring is not None:
        where = f"step {ring.step:g}" + (f", epoch {ring.epoch}" if ring.epoch is not None else "")
        note = f"best {ring.value:.4g} at {where}" + (f"; {note}" if note else "")
    key = {"label": label, "colour": colour, "dash": "dash" in style, "note": note}
    figure["keys"].append(key | {"traces": list(range(first, len(figure["traces"])))})


def _trace(points: Sequence[tuple[float, float]], mode: str, **style: Any) -> dict[str, Any]:
    """JSON has no NaN: what is not finite is null, a gap."""
    values = [_short(value) if math.isfinite(value) else None for _, value in points]
    return {"type": "scatter", "mode": mode, "x": [step for step, _ in points], "y": values} | style


def _short(value: float) -> float:
    """Seven digits are more than a screen shows, and half as long in the page."""
    return float(f"{value:.7g}")
