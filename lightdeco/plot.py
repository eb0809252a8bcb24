"""Curves of a run's records as a matplotlib figure, without touching pyplot or its backend."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from .errors import LightdecoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Curve = list[tuple[float, float]]

_FIELDS = frozenset({"stage", "epoch", "step", "time"})
_COLOURS = ("#4C78A8", "#E45756", "#54A24B", "#F58518", "#B279A2", "#72B7B2", "#9D755D", "#EECA3B")
_GREY = "#666666"
_DENSE = 40  # points above which a training curve gets a smoothed line


def plot(history: Iterable[Mapping[str, object]], path: str | Path | None = None) -> "Figure":
    """Draw every number of the records over the step, one panel for each kind of metric.

    `train/loss`, `train/loss_epoch` and `val/loss` share the panel "loss", `train/acc` and `val/acc` the panel "acc".
    Training is a thin line (smoothed when it has many points, the points behind it), epoch means are dashed, what is
    evaluated has markers; the lowest validation loss is marked.

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

    panels = _panels(_curves(history))
    if not panels:
        raise LightdecoError("there is nothing to plot: the records hold no metrics yet")
    columns = 2 if len(panels) in (2, 4) else min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns + 0.6, 3.4 * rows + 0.3), layout="constrained")
    cast(Any, figure.get_layout_engine()).set(w_pad=0.12, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax, (kind, curves) in zip(axes, panels.items(), strict=False):
        _draw_panel(ax, kind, curves)
    for ax in axes[len(panels) :]:
        ax.remove()
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _curves(history: Iterable[Mapping[str, object]]) -> "dict[str, Curve]":
    """The points (step, value) of every metric, in the order of the steps."""
    curves: dict[str, Curve] = {}
    for record in history:
        step = record.get("step", 0)
        for name, value in record.items():
            if name not in _FIELDS and isinstance(value, int | float) and isinstance(step, int | float):
                curves.setdefault(name, []).append((step, float(value)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in curves.items()}


def _panels(curves: "dict[str, Curve]") -> "dict[str, dict[str, Curve]]":
    """The curves by kind: the last part of the name without `_epoch`; the loss comes first, single ones last."""
    panels: dict[str, dict[str, Curve]] = {}
    for name, points in curves.items():
        kind = name.rpartition("/")[2].removesuffix("_epoch")
        panels.setdefault(kind, {})[name] = points
    return dict(sorted(panels.items(), key=lambda panel: (panel[0] != "loss", len(panel[1]) == 1)))


def _draw_panel(ax: "Axes", kind: str, curves: "dict[str, Curve]") -> None:
    _style(ax, kind)
    colours: dict[str, str] = {}
    # What is evaluated lies on top.
    for name in sorted(curves, key=_is_evaluated):
        colour = colours.setdefault(name.removesuffix("_epoch"), _COLOURS[len(colours) % len(_COLOURS)])
        steps, values = zip(*curves[name], strict=True)
        if _is_evaluated(name):
            ax.plot(steps, values, color=colour, linewidth=1.6, marker="o", markersize=4, label=name)
        elif name.endswith("_epoch"):
            ax.plot(steps, values, color=colour, linewidth=1.2, linestyle="--", marker=".", label=name)
        elif len(steps) > _DENSE:
            ax.plot(steps, values, color=colour, linewidth=0.6, alpha=0.3)
            ax.plot(steps, _smoothed(values), color=colour, linewidth=1.3, label=name)
        else:
            ax.plot(steps, values, color=colour, linewidth=1.0, marker=".", markersize=2.5, label=name)
    if kind == "loss":
        _mark_best(ax, curves)
    if list(curves) != [kind]:
        ax.legend(frameon=False, fontsize=8, labelcolor=_GREY)


def _style(ax: "Axes", kind: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_title(kind, fontsize=11, fontweight="bold", loc="left", color="#333333")
    ax.set_xlabel("step", fontsize=9, color=_GREY)
    ax.grid(color="#E6E6E6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color("#BBBBBB")
    ax.tick_params(colors=_GREY, labelsize=8, length=3)
    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, steps=[1, 2, 5, 10]))


def _mark_best(ax: "Axes", curves: "dict[str, Curve]") -> None:
    """A ring and the value at the lowest finite point of the validation losses."""
    points = [point for name in curves if name.startswith("val/") for point in curves[name] if math.isfinite(point[1])]
    if not points:
        return
    step, value = min(points, key=lambda point: (point[1], point[0]))
    style: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none", "markeredgecolor": "#333333"}
    ax.plot([step], [value], linestyle="none", label=f"best: {value:.4g} at step {step:g}", **style)


def _is_evaluated(name: str) -> bool:
    return name.startswith(("val/", "test/"))


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean around each point over a twentieth of the curve, narrower at its ends; a gap where there is NaN.

    Symmetric, so that a smoothed curve does not lag behind: a straight line (a learning rate, say) stays as it is.
    """
    widest = max(1, len(values) // 40)
    result = []
    for i in range(len(values)):
        half = min(widest, i, len(values) - 1 - i)
        result.append(sum(values[i - half : i + half + 1]) / (2 * half + 1))
    return result
