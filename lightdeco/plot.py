"""Curves of a run's records as a matplotlib figure, without touching pyplot or its backend."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .curves import (
    DENSE,
    Best,
    Curve,
    best,
    curves,
    deciding,
    epochs,
    is_evaluated,
    is_noisy,
    not_finite,
    panels,
    smoothed,
    wants_log,
)
from .errors import LightdecoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = ("#4C78A8", "#E45756", "#54A24B", "#F58518", "#B279A2", "#72B7B2", "#9D755D", "#D4A72C")
_GREY = "#666666"
_LEGEND = 8  # entries above which a legend has a smaller font and two columns


def plot(history: Iterable[Mapping[str, object]], path: str | Path | None = None) -> "Figure":
    """Draw every number of the records over the step, one panel for each kind of metric.

    `train/loss`, `train/loss_epoch` and `val/loss` share the panel "loss", `train/acc` and `val/acc` the panel "acc",
    learning rates the panel "lr". Training is a thin line (smoothed when it has many points, the points behind it),
    epoch means are dashed, what is evaluated has markers. The lowest loss of each validation has a ring, and a dotted
    line in every panel marks the step of the lowest `val/loss` (of several loaders: the first). A loss that is positive
    and spans a factor of a thousand has a logarithmic axis. Values that are not finite are gaps, and counted.

    Args:
        history: records as `run.history` holds them: `stage`, `epoch`, `step`, `time`, and metrics by name.
        path: where to save the figure as well; its suffix decides the format (".png", ".svg", ".pdf", …).

    Raises:
        LightdecoError: matplotlib is not installed, or the records hold no numbers.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise LightdecoError("plot needs matplotlib; install it with `pip install matplotlib`") from error

    records = list(history)
    found = curves(records)
    shown = panels(found)
    if not shown:
        raise LightdecoError("there is nothing to plot: the records hold no metrics yet")
    recorded = epochs(records)
    bests = {name: point for name in found if (point := best(name, found[name], recorded)) is not None}
    marked = bests.get(deciding(found) or "")
    columns = 2 if len(shown) in (2, 4) else min(3, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(5.2 * columns + 0.6, 3.4 * rows + 0.3), layout="constrained")
    cast(Any, figure.get_layout_engine()).set(w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    last = max((points[-1][0] for points in found.values()), default=0)
    for ax, (kind, members) in zip(axes, shown.items(), strict=False):
        _style(ax, kind)
        if marked is not None and any(len(points) > 1 for points in members.values()):
            ax.axvline(marked.step, color="#999999", linewidth=0.9, linestyle=":")
        _draw(ax, kind, members, bests)
        if last > 0 and any(len(points) > 1 for points in members.values()):
            ax.set_xlim(-0.02 * last, 1.02 * last)  # the same for all panels, so that they can be compared
    for ax in axes[len(shown) :]:
        ax.remove()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _draw(ax: "Axes", kind: str, members: Mapping[str, Curve], bests: Mapping[str, Best]) -> None:
    colours: dict[str, str] = {}
    for name, points in members.items():
        colour = colours.setdefault(name.removesuffix("_epoch"), _COLOURS[len(colours) % len(_COLOURS)])
        steps, values = [step for step, _ in points], [value for _, value in points]
        note = not_finite(points)
        label = _short(_escaped(name)) + (f" ({note})" if note else "")
        if is_evaluated(name):
            ax.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=_size(points), label=label)
        elif name.endswith("_epoch"):
            ax.plot(steps, values, color=colour, linewidth=1.2, linestyle="--", marker=".", label=label)
        elif is_noisy(name, points):
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            ax.plot(*zip(*smoothed(points), strict=True), color=colour, linewidth=1.3, label=label)
        else:
            marker = "." if len(steps) <= DENSE else ""
            ax.plot(steps, values, color=colour, linewidth=1.0, marker=marker, markersize=4, label=label)
    if kind == "loss":
        _ring(ax, members, bests)
        if wants_log(members.values()):
            ax.set_yscale("log")
    if list(members) != [kind] or any(not_finite(points) for points in members.values()):
        _legend(ax)


def _style(ax: "Axes", kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(_escaped(kind), fontsize=11, fontweight="bold", loc="left", color="#333333")
    ax.set_xlabel("step", fontsize=9, color=_GREY)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    ax.tick_params(colors=_GREY, labelsize=8, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def _ring(ax: "Axes", members: Mapping[str, Curve], bests: Mapping[str, Best]) -> None:
    """A ring and the value at the lowest finite point of each validation loss."""
    names = [name for name in members if name.startswith("val/") and name in bests]
    style: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": "#333333"}
    for name in names:
        step, value, epoch = bests[name]
        place = f"at step {step:g}" + (f", epoch {epoch}" if epoch is not None else "")
        # Of several loaders the part between "val/" and "/loss" says which.
        which = "" if len(names) == 1 else f" {_short(_escaped(name.removeprefix('val/').rpartition('/')[0]), 20)}"
        ax.plot([step], [value], linestyle="none", label=f"best{which}: {value:.4g} {place}", **style)


def _legend(ax: "Axes") -> None:
    handles, labels = ax.get_legend_handles_labels()
    many = len(labels) > _LEGEND
    ax.legend(
        handles,
        labels,
        fontsize=6 if many else 8,
        ncols=2 if many else 1,
        labelcolor=_GREY,
        facecolor="white",
        edgecolor="none",
        framealpha=0.75,
    )


def _size(points: Curve) -> float:
    """The size of markers: many of them would hide the line."""
    return 4.0 if len(points) <= DENSE else 2.0


def _short(text: str, longest: int = 40) -> str:
    """A text cut in its middle: names differ at their ends."""
    return text if len(text) <= longest else f"{text[: longest // 2]}…{text[-longest // 2 + 1 :]}"


def _escaped(text: str) -> str:
    """A name as matplotlib shows it as it is: no formulas, and no leading underscore, which would hide it."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
