"""The curves of a run."""

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lightdeco.errors import LightdecoError
from lightdeco.plot import _smoothed, plot

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
    return {line.get_label(): line for line in ax.lines}


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
    assert ring.get_label() == "best: 0.5 at step 4"


def test_many_training_points_are_smoothed_without_a_lag() -> None:
    """A long training curve is drawn with a smoothed line that leaves a straight line as it is."""
    values = [2.0 * i for i in range(200)]
    assert _smoothed(values) == pytest.approx(values)
    noisy = [float(i % 2) for i in range(200)]
    assert all(abs(value - 0.5) < 0.1 for value in _smoothed(noisy)[5:-5])
    ax = _axes(plot(_history(100)))["loss"]
    assert sum(len(line.get_xdata()) == 100 for line in ax.lines) == 2


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
