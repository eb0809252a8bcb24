"""The curves of a run."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightdeco.curves import smoothed, thinned
from lightdeco.errors import LightdecoError
from lightdeco.plot import plot

pytest.importorskip("matplotlib")


def _history(steps: int = 6) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = 1 / step
        records.append({"stage": "train", "epoch": 0, "step": step, "time": 0.0, "train/loss": loss, "lr": 0.1})
        if step % 2 == 0:
            value = abs(step - 4) + 0.5
            records.append({"stage": "val", "epoch": 0, "step": step, "val/loss": value, "val/acc": 1 - loss})
            records.append({"stage": "train", "epoch": 0, "step": step, "train/loss_epoch": loss, "train/acc": loss})
    return records


def _axes(figure: Any) -> dict[str, Any]:
    return {ax.get_title(loc="left"): ax for ax in figure.axes}


def _lines(ax: Any) -> dict[str, Any]:
    """The curves by label; the smoothed ones' points and the line at the best step have none."""
    return {line.get_label(): line for line in ax.lines if not str(line.get_label()).startswith("_child")}


def test_metrics_are_grouped_by_their_last_part() -> None:
    """Training, epoch means and validation of one metric share a panel; the loss comes first."""
    axes = _axes(plot(_history()))
    assert list(axes) == ["loss", "acc", "lr"]
    assert {"train/loss", "train/loss_epoch", "val/loss"} < set(_lines(axes["loss"]))
    assert set(_lines(axes["acc"])) == {"train/acc", "val/acc"}
    assert axes["lr"].get_legend() is None
    assert [text.get_text() for text in axes["acc"].get_legend().get_texts()] == ["train/acc", "val/acc"]


def test_the_points_are_steps_and_values() -> None:
    """Curves hold exactly the records' numbers, in the order of the steps; validation has markers."""
    history = _history()
    lines = _lines(_axes(plot(list(reversed(history))))["loss"])
    expected = [(record["step"], record["val/loss"]) for record in history if "val/loss" in record]
    assert list(zip(*lines["val/loss"].get_data(), strict=True)) == expected
    assert lines["val/loss"].get_marker() == "o"
    assert lines["train/loss"].get_linewidth() < lines["val/loss"].get_linewidth()


def test_the_best_validation_is_marked() -> None:
    """A ring stands at the lowest finite validation loss."""
    history = [*_history(), {"stage": "val", "epoch": 1, "step": 7, "val/loss": math.nan}]
    lines = _lines(_axes(plot(history))["loss"])
    (ring,) = [line for label, line in lines.items() if str(label).startswith("best")]
    assert [list(values) for values in ring.get_data()] == [[4], [0.5]]
    assert ring.get_label() == "best: 0.5 at step 4, epoch 1"


def test_many_training_points_are_smoothed_without_a_lag() -> None:
    """A long training curve is drawn with a smoothed line that leaves a straight line as it is."""
    straight = [(float(i), 2.0 * i) for i in range(200)]
    assert smoothed(straight) == straight
    constant = [(float(i), 0.1) for i in range(9000)]
    assert {value for _, value in smoothed(constant)} == {0.1}
    noisy = [(float(i), float(i % 2)) for i in range(200)]
    assert all(abs(value - 0.5) < 0.1 for _, value in smoothed(noisy)[5:-5])
    ax = _axes(plot(_history(100)))["loss"]
    assert sum(len(line.get_xdata()) == 100 for line in ax.lines) == 2


def test_a_long_curve_is_thinned_with_its_spikes() -> None:
    """What is drawn of a very long curve has its extremes and its gaps."""
    points = [(float(i), 1.0) for i in range(100_000)]
    points[777], points[888] = (777.0, 50.0), (888.0, math.nan)
    kept = thinned(points)
    assert len(kept) <= 2000
    assert (777.0, 50.0) in kept
    assert [step for step, value in kept if math.isnan(value)] == [888.0]


def test_learning_rates_share_a_panel_and_are_not_smoothed() -> None:
    """`lr/gen` and `lr/disc` are one panel, drawn as they are; so are the losses of two optimizers."""
    names = ("train/gen/loss", "train/disc/loss", "lr/gen", "lr/disc")
    history = [{"stage": "train", "epoch": 0, "step": s, **dict.fromkeys(names, 1 / s)} for s in range(1, 101)]
    axes = _axes(plot(history))
    assert list(axes) == ["loss", "lr"]
    assert set(_lines(axes["lr"])) >= {"lr/gen", "lr/disc"}
    assert all(len(line.get_xdata()) == 100 for label, line in _lines(axes["lr"]).items() if label.startswith("lr"))


def test_every_loader_has_its_best_and_one_line_marks_the_step() -> None:
    """Of several validation loaders each has a ring with its name; a dotted line is at the best step of the first."""
    values = {"val/clean/loss": (3.0, 1.0, 2.0), "val/noisy/loss": (3.0, 2.0, 1.5), "val/acc": (0.1, 0.2, 0.3)}
    history = [
        {"stage": "val", "epoch": i, "step": 10 * i + 10, **{name: each[i] for name, each in values.items()}}
        for i in range(3)
    ]
    axes = _axes(plot(history))
    assert {"best clean: 1 at step 20, epoch 2", "best noisy: 1.5 at step 30, epoch 3"} < set(_lines(axes["loss"]))
    for ax in axes.values():
        assert [list(line.get_xdata()) for line in ax.lines if line.get_linestyle() == ":"] == [[20, 20]]


def test_a_loss_that_spans_much_has_a_logarithmic_axis() -> None:
    """A positive loss over more than three powers of ten is drawn on a logarithmic axis; others are not."""
    long = [{"stage": "train", "step": s, "train/loss": 900.0 / 2**s, "train/acc": 0.1 * s} for s in range(1, 15)]
    axes = _axes(plot(long))
    assert axes["loss"].get_yscale() == "log"
    assert axes["acc"].get_yscale() == "linear"
    assert _axes(plot(_history()))["loss"].get_yscale() == "linear"


def test_the_figure_is_saved(tmp_path: Path) -> None:
    """A path saves the figure in the format of its suffix."""
    plot(_history(), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    plot(_history(), str(tmp_path / "curves.svg"))
    assert "<svg" in (tmp_path / "curves.svg").read_text()


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7])
def test_any_number_of_panels(count: int) -> None:
    """There are as many panels as kinds of metrics, and no empty one."""
    figure = plot([{"stage": "train", "epoch": 0, "step": 1} | {f"m{i}": 1.0 for i in range(count)}])
    assert len(figure.axes) == count


def test_values_that_cannot_be_drawn_do_not_break_it() -> None:
    """NaN, infinities, texts and records without a step are no error."""
    history: list[dict[str, Any]] = [
        {"stage": "val", "step": 1, "val/loss": math.nan, "note": "text"},
        {"stage": "val", "step": 2, "val/loss": math.inf},
        {"stage": "train", "train/loss": 0.5},
    ]
    figure = plot(history)
    figure.canvas.draw()
    assert list(_axes(figure)) == ["loss"]
    assert "val/loss (2 not finite, from step 1)" in _lines(_axes(figure)["loss"])


def test_nothing_to_plot_is_an_error() -> None:
    """An empty history is refused with the reason."""
    with pytest.raises(LightdecoError, match="nothing to plot"):
        plot([{"stage": "train", "epoch": 0, "step": 1}])


def test_without_matplotlib_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing matplotlib is an error that says what to install."""
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LightdecoError, match="pip install matplotlib"):
        plot(_history())


def test_pyplot_is_not_touched() -> None:
    """Plotting does not import pyplot, so no backend is chosen and no figure is kept open."""
    code = (
        "import sys; from lightdeco.plot import plot; assert 'matplotlib' not in sys.modules; "
        "plot([{'step': 1, 'train/loss': 1.0}]); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
