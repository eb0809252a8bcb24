"""Records as curves: grouped into panels, smoothed, thinned, with their best points; what plot and report draw."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

#: The points (step, value) of one metric, in the order of the steps.
Curve = list[tuple[float, float]]

#: A curve of training with more points than this is drawn as a smoothed line over the points.
DENSE: Final = 40

_FIELDS: Final = frozenset({"stage", "epoch", "step", "time"})
#: What comes before the name of an optimizer or of a part, rather than after it: "lr/gen", "lr/group0".
_FIRST: Final = frozenset({"lr", "momentum", "weight_decay", "grad_norm", "throughput"})
_LESS: Final = frozenset({"loss", "error", "err", "perplexity", "ppl", "mae", "mse", "rmse", "nll", "wer", "cer"})
_MORE: Final = frozenset(
    {"acc", "accuracy", "f1", "auc", "auroc", "precision", "recall", "iou", "dice", "bleu", "rouge", "psnr", "ssim"}
)


class Best(NamedTuple):
    """The best point of a curve."""

    step: float
    value: float
    epoch: int | None
    """The epoch in which it was recorded, counted from 1."""


def curves(history: Iterable[Mapping[str, object]]) -> dict[str, Curve]:
    """The points (step, value) of every metric, in the order of the steps.

    >>> curves([{"stage": "val", "step": 2, "val/loss": 0.5}, {"step": 1, "val/loss": 1.0, "note": "text"}])
    {'val/loss': [(1, 1.0), (2, 0.5)]}
    """
    found: dict[str, Curve] = {}
    for record in history:
        step = record.get("step", 0)
        for name, value in record.items():
            if name not in _FIELDS and isinstance(value, int | float) and isinstance(step, int | float):
                found.setdefault(name, []).append((step, float(value)))
    return {name: sorted(points, key=lambda point: point[0]) for name, points in found.items()}


def panels(found: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """The curves by kind: first the loss, then what is evaluated and trained, then single ones, learning rates last."""
    grouped: dict[str, dict[str, Curve]] = {}
    for name, points in found.items():
        grouped.setdefault(kind(name), {})[name] = points
    for members in grouped.values():
        if len(members) > 1:  # train before val, whichever was recorded first
            ordered = sorted(members.items(), key=lambda item: (is_evaluated(item[0]), item[0].endswith("_epoch")))
            members.clear()
            members.update(ordered)
    return dict(sorted(grouped.items(), key=lambda panel: (panel[0] != "loss", panel[0] in _FIRST, len(panel[1]) == 1)))


def kind(name: str) -> str:
    """What a metric measures: the part of its name that it shares with those it is compared to.

    >>> kind("train/loss_epoch"), kind("val/noisy/loss"), kind("lr/gen"), kind("grad_norm")
    ('loss', 'loss', 'lr', 'grad_norm')
    """
    first, _, rest = name.partition("/")
    if first == "throughput" and rest:
        return name  # samples and batches per second have units of their own
    if "/grad_norm/" in name:  # of one module
        return "grad_norm"
    return first if first in _FIRST else name.rpartition("/")[2].removesuffix("_epoch") or name


def is_evaluated(name: str) -> bool:
    """Whether a metric was measured in validation or test.

    >>> is_evaluated("val/loss"), is_evaluated("train/loss")
    (True, False)
    """
    return name.startswith(("val/", "test/"))


def is_noisy(name: str, points: Curve) -> bool:
    """Whether a curve is drawn smoothed: one of training with many points, that is not set but measured."""
    chosen = kind(name) in ("lr", "momentum", "weight_decay")
    return len(points) > DENSE and not chosen and not is_evaluated(name) and not name.endswith("_epoch")


def mode(name: str) -> str | None:
    """Whether less ("min") or more ("max") of a metric is better, or None where its name does not tell.

    >>> mode("val/loss"), mode("val/top5_acc"), mode("lr"), mode("train/loss_spikes")
    ('min', 'max', None, None)
    """
    words = set(kind(name).lower().replace("-", "_").split("_"))
    if "spikes" in words:  # a number of values, not a value
        return None
    return "min" if words & _LESS else "max" if words & _MORE else None


def best(
    name: str, points: Sequence[tuple[float, float]], epochs: Mapping[tuple[str, float], int] | None = None
) -> Best | None:
    """The best finite point of a metric, the first of equals; None where the name does not say what is better.

    >>> best("val/loss", [(1, 0.5), (2, 0.25), (3, math.nan)])
    Best(step=2, value=0.25, epoch=None)
    """
    sign = {"min": 1.0, "max": -1.0}.get(mode(name) or "")
    finite = [point for point in points if math.isfinite(point[1])]
    if sign is None or not finite:
        return None
    step, value = min(finite, key=lambda point: (sign * point[1], point[0]))
    return Best(step, value, (epochs or {}).get((name, step)))


def epochs(history: Iterable[Mapping[str, object]]) -> dict[tuple[str, float], int]:
    """The epoch, counted from 1, in which each metric was recorded at each step."""
    found: dict[tuple[str, float], int] = {}
    for record in history:
        epoch, step = record.get("epoch"), record.get("step")
        if isinstance(epoch, int) and isinstance(step, int | float):
            found.update({(name, step): epoch + 1 for name in record if name not in _FIELDS})
    return found


def deciding(names: Iterable[str]) -> str | None:
    """The metric that says which epoch was the best: `val/loss`, or the loss of the first of several loaders.

    >>> deciding(["train/loss", "val/clean/loss", "val/noisy/loss"])
    'val/clean/loss'
    """
    losses = [name for name in names if name.startswith("val/") and kind(name) == "loss"]
    return "val/loss" if "val/loss" in losses else losses[0] if losses else None


def wants_log(found: Iterable[Curve]) -> bool:
    """Whether curves are positive and span so much that a linear axis would show a flat line and a spike."""
    values = sorted(value for points in found for _, value in points if math.isfinite(value))
    if not values or values[0] <= 0:
        return False
    middle = values[len(values) // 2]
    return values[-1] > 1000 * values[0] or values[-1] > 50 * middle


def not_finite(points: Sequence[tuple[float, float]]) -> str:
    """How many values are not finite and where the first is, or an empty text.

    >>> not_finite([(1, 0.5), (2, math.nan), (3, math.inf)])
    '2 not finite, from step 2'
    """
    steps = [step for step, value in points if not math.isfinite(value)]
    return f"{len(steps):,} not finite, from step {steps[0]:g}" if steps else ""


def smoothed(points: Sequence[tuple[float, float]], most: int = 4000) -> Curve:
    """The mean around each point over a twentieth of the curve, narrower at its ends; NaN where no value is finite.

    Symmetric, so that a smoothed curve does not lag behind: a straight line (a learning rate, say) stays as it is.
    Values that are not finite are left out of the means. Of more than `most` points, stretches are averaged first.

    >>> smoothed([(1, 2.0), (2, 4.0), (3, 0.0)])
    [(1, 2.0), (2, 2.0), (3, 0.0)]
    """
    stretch = math.ceil(len(points) / most)
    if stretch > 1:
        chunks = [points[start : start + stretch] for start in range(0, len(points), stretch)]
        points = [(sum(step for step, _ in chunk) / len(chunk), _mean([v for _, v in chunk])) for chunk in chunks]
    values = [value for _, value in points]
    widest = max(1, len(points) // 40)
    result: Curve = []
    for i, (step, value) in enumerate(points):
        half = min(widest, i, len(points) - 1 - i)
        result.append((step, _mean(values[i - half : i + half + 1]) if math.isfinite(value) else math.nan))
    return result


def _mean(values: Sequence[float]) -> float:
    """The mean of the finite ones, never outside of them: a constant curve stays constant."""
    finite = [value for value in values if math.isfinite(value)]
    return min(max(math.fsum(finite) / len(finite), min(finite)), max(finite)) if finite else math.nan


def thinned(points: Sequence[tuple[float, float]], most: int = 2000) -> Curve:
    """At most about `most` points: the least and the greatest of each stretch, so that spikes and gaps stay.

    >>> len(thinned([(i, float(i % 7)) for i in range(100_000)])) <= 2000
    True
    """
    if len(points) <= most:
        return list(points)
    stretch = math.ceil(3 * len(points) / most)
    kept: Curve = []
    for start in range(0, len(points), stretch):
        chunk = range(start, min(start + stretch, len(points)))
        finite = [i for i in chunk if math.isfinite(points[i][1])]
        chosen = {i for i in chunk if not math.isfinite(points[i][1])}
        chosen = {min(chosen)} if chosen else set()
        if finite:
            chosen |= {min(finite, key=lambda i: points[i][1]), max(finite, key=lambda i: points[i][1])}
        kept += [points[i] for i in sorted(chosen)]
    return kept
