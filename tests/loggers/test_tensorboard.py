"""The TensorBoard logger, read back with TensorBoard's own reader."""

import io
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lightdeco.errors import LoggerError
from lightdeco.loggers import Loggers, TensorBoard, create

from .conftest import Train, curves

pytest.importorskip("tensorboard")


def _read(directory: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0, "histograms": 0})
    return events.Reload()


def _opened(directory: Path) -> TensorBoard:
    logger = TensorBoard()
    logger.open(directory)
    return logger


def _pixels(events: Any, tag: str) -> Any:
    from PIL import Image

    return numpy.asarray(Image.open(io.BytesIO(events.Images(tag)[0].encoded_image_string)))


def test_scalars_are_written_at_their_step(tmp_path: Path) -> None:
    """Every scalar comes back with its step, NaN included, from one file in the run's directory itself."""
    logger = _opened(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "lr": 0.1}, 50)
    logger.log_metrics({"train/loss": math.nan}, 100)
    logger.close("finished")
    assert len(list(tmp_path.iterdir())) == 1
    events = _read(tmp_path)
    assert [event.step for event in events.Scalars("train/loss")] == [50, 100]
    assert events.Scalars("train/loss")[0].value == 0.5
    assert math.isnan(events.Scalars("train/loss")[1].value)


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_hyperparameters_are_in_the_same_run(tmp_path: Path, status: str) -> None:
    """The HPARAMS tab gets values and status, the TEXT tab a table, without a second run directory."""
    from tensorboard.plugins.hparams import api_pb2, metadata

    logger = _opened(tmp_path)
    logger.log_hparams({"lr": 0.1, "name": "x|y", "fast": True, "net": {"sizes": [1, 2], "none": None}, "n": math.nan})
    logger.close(status)
    assert len(list(tmp_path.iterdir())) == 1
    events = _read(tmp_path)
    plugin = events.PluginTagToContent(metadata.PLUGIN_NAME)
    start = metadata.parse_session_start_info_plugin_data(plugin[metadata.SESSION_START_INFO_TAG])
    assert start.hparams["lr"].number_value == 0.1
    assert start.hparams["fast"].bool_value is True
    assert start.hparams["net.sizes"].string_value == "[1, 2]"
    end = metadata.parse_session_end_info_plugin_data(plugin[metadata.SESSION_END_INFO_TAG])
    assert end.status == (api_pb2.STATUS_SUCCESS if status == "finished" else api_pb2.STATUS_FAILURE)
    text = events.Tensors("hparams/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| name | x\\|y |" in text


def test_images_of_every_form(tmp_path: Path) -> None:
    """HxW, CxHxW and HxWxC, floats in 0..1, uint8 and bool give the same picture."""
    base = torch.zeros(6, 5)
    base[2, 3] = 1.0
    forms = {
        "hw": base,
        "chw": base.expand(3, 6, 5).to(torch.bfloat16),
        "hwc": base.unsqueeze(2).numpy(),
        "uint8": (base * 255).to(torch.uint8),
        "bool": base.bool(),
        "grad": base.clone().requires_grad_(),
    }
    logger = _opened(tmp_path)
    for name, value in forms.items():
        logger.log_image(name, value, 1)
    with pytest.raises(LoggerError, match=r"shape \(2, 6, 5\)"):
        logger.log_image("wrong", torch.zeros(2, 6, 5), 1)
    logger.close("finished")
    events = _read(tmp_path)
    for name in forms:
        pixels = _pixels(events, name)
        assert pixels.shape[:2] == (6, 5)
        assert (pixels[2, 3] == 255).all()
        assert pixels.astype(int).sum() == 255 * (pixels.size // 30)


def test_figures_keep_their_canvas(tmp_path: Path) -> None:
    """A figure is drawn as it is and stays usable; pyplot is not imported."""
    figures = pytest.importorskip("matplotlib.figure")
    figure = figures.Figure(figsize=(2, 1), dpi=50)
    canvas = figure.canvas
    logger = _opened(tmp_path)
    logger.log_figure("figure", figure, 3)
    logger.close("finished")
    assert _pixels(_read(tmp_path), "figure").shape == (50, 100, 3)
    assert figure.canvas is canvas


def test_histogram_text_and_table(tmp_path: Path) -> None:
    """Histograms leave out what is not finite; texts and tables of each form are shown as markdown."""
    logger = _opened(tmp_path)
    logger.log_histogram("weights", torch.tensor([1.0, 2.0, math.nan, math.inf]), 1)
    logger.log_histogram("nothing", torch.tensor([math.nan]), 1)
    logger.log_text("note", "*hello*", 2)
    logger.log_table("columns", {"a": [1, 2], "b": ["x", "y"]}, 3)
    logger.log_table("rows", [{"a": 1, "b": "x"}, {"a": 2, "b": "y"}], 3)
    logger.close("finished")
    events = _read(tmp_path)
    assert events.Histograms("weights")[0].histogram_value.num == 2
    assert events.Tags()["histograms"] == ["weights"]

    def text(tag: str) -> str:
        value: bytes = events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0]
        return value.decode()

    assert text("note") == "*hello*"
    assert text("columns") == text("rows") == "| a | b |\n| --- | --- |\n| 1 | x |\n| 2 | y |"


def test_a_resumed_run_has_no_step_twice(tmp_path: Path) -> None:
    """What was logged after the step of the cut is hidden by TensorBoard."""
    logger = _opened(tmp_path)
    for step in (10, 20, 30):
        logger.log_metrics({"x": float(step)}, step)
    logger.close("failed")
    time.sleep(1.0 - time.time() % 1 + 0.05)  # files are read by name, which begins with the second of their start
    again = TensorBoard()
    again.open(tmp_path)
    again.cut(20)
    again.log_metrics({"x": -25.0}, 25)
    again.close("finished")
    events = _read(tmp_path).Scalars("x")
    assert [(event.step, event.value) for event in events] == [
        (10, 10.0),
        (20, 20.0),
        (25, -25.0),
    ]


def test_native_is_the_writer_while_it_is_open(tmp_path: Path) -> None:
    """`native` is torch's SummaryWriter with the options given, and an error outside of a run."""
    logger = TensorBoard(tmp_path / "own", flush_secs=7)
    with pytest.raises(LoggerError, match="not open"):
        _ = logger.native
    logger.open(tmp_path)
    assert (logger.native.log_dir, logger.native.flush_secs) == (str(tmp_path / "own"), 7)
    logger.close("finished")
    with pytest.raises(LoggerError, match="not open"):
        logger.log_metrics({"x": 1.0}, 1)


def test_a_missing_package_names_the_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package, asking for the logger says what to install."""
    for name in [name for name in sys.modules if name.startswith(("tensorboard.", "torch.utils.tensorboard"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(LoggerError, match="`pip install tensorboard`"):
        create("tensorboard", tmp_path)


def test_a_fit_is_read_back_whole(train: Train) -> None:
    """Every metric at its step, every kind of value, hyperparameters, and the extremes of validation metrics."""
    run = train("tensorboard", kinds="image figure histogram text table")
    events = _read(run.dir)
    found = curves(run)
    for name, points in found.items():
        read = [(e.step, e.value if e.value == e.value else "nan") for e in events.Scalars(name)]
        assert read == [(step, pytest.approx(value)) for step, value in points], name
    losses = [value for _, value in found["val/loss"]]
    for name, value in (("min/val/loss", min(losses)), ("max/val/loss", max(losses))):
        assert [event.value for event in events.Scalars(name)] == [pytest.approx(value)]
    assert set(events.Tags()["scalars"]) == {*found, "min/val/loss", "max/val/loss", "min/val/acc", "max/val/acc"}
    assert [event.step for event in events.Images("shown/figure")] == [4, 8]
    assert _pixels(events, "shown/image").shape == (6, 5, 3)
    assert events.Histograms("shown/histogram")[0].histogram_value.num == 3
    texts = events.Tensors("shown/text/text_summary")
    assert texts[-1].tensor_proto.string_val[0] == b"*epoch* 1"
    table: bytes = events.Tensors("hparams/text_summary")[0].tensor_proto.string_val[0]
    assert "abc" not in table.decode()
    assert "| url | http://***@host/x |" in table.decode()


def test_the_graph_is_drawn_when_asked_for(tmp_path: Path) -> None:
    """The graph holds the model's layers; neither its state, its mode nor the random state changes."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    fan = Loggers(create(TensorBoard(graph=torch.ones(4, 3)), tmp_path))
    fan.watch(model)
    fan.close("finished")
    assert b"Linear" in _read(tmp_path).Graph().SerializeToString()
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_graph_that_cannot_be_drawn_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """An example input of another shape is a LoggerError that names the logger."""
    fan = Loggers(create(TensorBoard(graph=torch.ones(4, 9)), tmp_path))
    with pytest.raises(LoggerError, match="'tensorboard' could not watch the model"):
        fan.watch(torch.nn.Linear(3, 2))
    fan.close("failed")
