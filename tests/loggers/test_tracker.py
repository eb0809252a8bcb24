"""Loggers through accelerate's trackers, read back where the package is installed."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lightdeco.errors import LightdecoError, LoggerError
from lightdeco.loggers import Loggers, Tracker, create

from .conftest import Train, curves


def test_an_unknown_tracker_is_refused() -> None:
    """The error names the trackers there are and the nearest one."""
    with pytest.raises(LoggerError, match="no tracker 'swanlap'; did you mean 'swanlab'"):
        Tracker("swanlap")


@pytest.mark.parametrize("name", ["aim", "clearml", "dvclive", "swanlab", "trackio"])
def test_a_missing_package_names_the_pip_command(name: str, tmp_path: Path) -> None:
    """Without the package, asking for the tracker says what to install, by name and as an object."""
    if importlib.util.find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    for given in (name, Tracker(name)):
        with pytest.raises(LoggerError, match=f"`pip install {name}`"):
            create(given, tmp_path)


def test_a_closed_tracker_says_so() -> None:
    """Logging without a run is an error that says what to do."""
    with pytest.raises(LightdecoError, match="not open"):
        Tracker("aim").log_metrics({"x": 1.0}, 1)


def test_dvclive_holds_every_metric(train: Train) -> None:
    """DVCLive's tables hold each metric at its step, its file the hyperparameters, masked."""
    pytest.importorskip("dvclive")
    run = train("dvclive", kinds="")
    for name, points in curves(run, finite=True).items():
        with (run.dir / "dvclive" / "plots" / "metrics" / f"{name}.tsv").open(newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t"))
        assert [(int(row["step"]), float(row[name.split("/")[-1]])) for row in rows] == points
    params = (run.dir / "dvclive" / "params.yaml").read_text()
    assert "lr: 0.1" in params
    assert "abc" not in params


def test_aim_holds_every_metric(train: Train) -> None:
    """Aim's repository holds each metric at its step and the hyperparameters."""
    aim: Any = pytest.importorskip("aim")
    run = train("aim", kinds="")
    (found,) = aim.Repo(str(run.dir)).iter_runs()
    for name, points in curves(run, finite=True).items():
        steps, values = found.get_metric(name, aim.sdk.Context({})).values.sparse_numpy()
        assert list(zip(steps.tolist(), values.tolist(), strict=True)) == points
    assert found["hparams"]["lr"] == 0.1
    assert found["hparams"]["api_key"] == "***"


def test_two_runs_of_one_object(train: Train) -> None:
    """One object serves two runs, and nothing of accelerate is left behind by it."""
    pytest.importorskip("dvclive")
    logger = Tracker("dvclive")
    first, second = train(logger, kinds=""), train(logger, kinds="")
    assert first.dir != second.dir
    assert (second.dir / "dvclive" / "metrics.json").exists()
    Loggers({"dvclive": logger}).close("finished")
