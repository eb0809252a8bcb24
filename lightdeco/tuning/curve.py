"""What `lr_find` returns: the losses over the learning rates, the suggestion, and a picture of both."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final

from lightdeco.errors import LightdecoError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Shares of the steps left out at the two ends: the first losses are noise, the last ones diverge.
_FIRST, _LAST = 0.1, 0.05
_GREY: Final = "#666666"


@dataclass(frozen=True, repr=False)
class LRCurve:
    """The training loss of each step of a learning rate range test.

    Attributes:
        lrs: the learning rate of each update.
        losses: the training loss of each update, computed before it; as long as `lrs`. May end in NaN or infinity.
        suggestion: the learning rate at which the smoothed loss falls most steeply, or None where it never falls.
        smoothed: `losses` without noise: running medians, averaged; as long as `losses`.

    Each of them has one value per update, in the order of the updates. The test is Smith's (2015, arXiv:1506.01186);
    the rule of the steepest descent with both ends left out is fastai's.
    """

    lrs: list[float]
    losses: list[float]
    smoothed: list[float] = field(init=False)
    suggestion: float | None = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "smoothed", _smoothed(self.losses))
        at = _steepest(self.smoothed)
        object.__setattr__(self, "suggestion", None if at is None else self.lrs[at])

    def plot(self, path: str | Path | None = None) -> "Figure":
        """The curve as a matplotlib figure over a logarithmic axis; also saved when a path is given.

        The losses are points, the smoothed loss is a line, a ring marks the suggestion. The axis of the losses leaves
        out what has diverged.

        Raises:
            LightdecoError: matplotlib is not installed (`pip install matplotlib`).
        """
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ImportError as error:
            raise LightdecoError("plot needs matplotlib; install it with `pip install matplotlib`") from error
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        FigureCanvasAgg(figure)
        self._draw(figure.subplots())
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def _draw(self, ax: "Axes") -> None:
        ax.set_title("learning rate range test", fontsize=11, fontweight="bold", loc="left", color="#333333")
        ax.set_xlabel("learning rate", fontsize=9, color=_GREY)
        ax.set_ylabel("training loss", fontsize=9, color=_GREY)
        ax.set_xscale("log")
        ax.grid(color="#E6E6E6", linewidth=0.8)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
        ax.spines[["left", "bottom"]].set_color("#BBBBBB")
        ax.tick_params(colors=_GREY, labelsize=8, length=3)
        points: dict[str, Any] = {"linestyle": "none", "marker": ".", "markersize": 4, "alpha": 0.45}
        ax.plot(self.lrs, self.losses, color="#4C78A8", label="loss of a step", **points)
        ax.plot(self.lrs, self.smoothed, color="#4C78A8", linewidth=1.8, label="smoothed")
        if self.suggestion is not None:
            at = self.lrs.index(self.suggestion)
            ax.axvline(self.suggestion, color="#E45756", linewidth=0.9, linestyle="--")
            ring: dict[str, Any] = {"marker": "o", "markersize": 10, "markerfacecolor": "none"}
            name = f"suggestion: {self.suggestion:.2g}"
            ax.plot(
                [self.suggestion], [self.smoothed[at]], linestyle="none", color="#E45756", label=name, zorder=3, **ring
            )
        if limits := _visible(self.losses):
            ax.set_ylim(*limits)
        ax.legend(frameon=False, fontsize=8, labelcolor=_GREY)

    def __repr__(self) -> str:
        steps = f"{len(self.lrs)} steps"
        span = f", lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g}" if self.lrs else ""
        found = "None (the loss never falls)" if self.suggestion is None else f"{self.suggestion:.3g}"
        return f"<LRCurve: suggestion {found}; {steps}{span}>"


def _smoothed(losses: Sequence[float]) -> list[float]:
    """The running median of the losses, a twentieth of them to either side, then the mean over half as many.

    Symmetric: an average that looks back only would lag, and so suggest too high a learning rate. The median keeps the
    curve where it is when the loss explodes a few steps later.
    """
    widest = max(1, len(losses) // 20)
    return _around(_around(losses, widest, median), (widest + 1) // 2, lambda values: sum(values) / len(values))


def _around(values: Sequence[float], widest: int, middle: Callable[[Sequence[float]], float]) -> list[float]:
    """`middle` of each value and its neighbours, fewer at the ends; what is not finite is left as it is, and out."""
    result = []
    for i, value in enumerate(values):
        half = min(widest, i, len(values) - 1 - i)
        near = [other for other in values[i - half : i + half + 1] if math.isfinite(other)]
        result.append(middle(near) if math.isfinite(value) else value)
    return result


def _steepest(smoothed: Sequence[float]) -> int | None:
    """The index of the steepest descent per step, before the lowest point; None where nothing falls.

    What comes after the lowest point is divergence: its zigzag has steep descents too.
    """
    count = next((i for i, value in enumerate(smoothed) if not math.isfinite(value)), len(smoothed))
    first, last = max(1, int(count * _FIRST)), count - max(1, int(count * _LAST))
    if first >= last:
        return None
    lowest = min(range(count), key=smoothed.__getitem__)
    slopes = {i: smoothed[i + 1] - smoothed[i - 1] for i in range(first, last) if i <= lowest}
    steepest = min(slopes, key=slopes.__getitem__, default=None)
    return steepest if steepest is not None and slopes[steepest] < 0 else None


def _visible(losses: Sequence[float]) -> tuple[float, float] | None:
    """The part of the axis that shows the curve down to its lowest point; what diverged is cut at twice that height."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if not finite:
        return None
    low = min(finite)
    high = max(finite[: finite.index(low) + 1])
    if high == low:
        return None
    height = high - low
    return low - 0.1 * height, min(max(finite), high + 0.6 * height) + 0.1 * height
