"""Loggers through accelerate's trackers, read back where the package is installed."""

import csv
import importlib.util
import json
import sqlite3
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
    from aim.sdk.index_manager import RepoIndexManager
    from aim.storage.context import Context

    repo = aim.Repo(str(run.dir))
    for name in repo.list_all_runs():  # what `aim up` does before it shows anything
        assert RepoIndexManager.get_index_manager(repo).index(name)
    (found,) = aim.Repo(str(run.dir)).iter_runs()
    for name, points in curves(run, finite=True).items():
        items = found.get_metric(name, Context({})).data.items()
        assert [(step, value) for step, (value, *_) in items] == points
    assert found["hparams"]["lr"] == 0.1
    assert found["hparams"]["api_key"] == "***"


def test_swanlab_holds_every_metric(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SwanLab's local files hold each metric at its step and the configuration, and tell nothing of the machine."""
    pytest.importorskip("swanlab")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["train.py", "--token", "hush-command"])
    run = train(Tracker("swanlab", mode="local", log_dir=str(tmp_path / "swanlog")), kinds="")
    (folder,) = (tmp_path / "swanlog").glob("run-*")
    found = []
    for path in folder.glob("logs/*/*.log"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found.append([(line["index"], line["data"]) for line in lines if line["data"] not in ("NaN", None)])
    expected = curves(run, finite=True).values()
    assert all(points in found for points in expected), found
    config = (folder / "files" / "config.yaml").read_text()
    assert "lightdeco.settings.max_epochs" in config
    files = {path.name: path.read_bytes() for path in (tmp_path / "swanlog").rglob("*") if path.is_file()}
    assert "requirements.txt" not in files
    assert [name for name, data in files.items() if b"hush-command" in data or b'"hostname"' in data] == []


def test_trackio_holds_every_metric(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trackio's database holds each metric at its step, and the configuration."""
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HOME", str(tmp_path))
    pytest.importorskip("trackio")
    run = train(Tracker("trackio", "proj"), kinds="")
    with sqlite3.connect(tmp_path / "trackio" / "proj.db") as database:
        rows = database.execute("select step, metrics from metrics order by id").fetchall()
        ((config,),) = database.execute("select config from configs").fetchall()
    found: dict[str, list[tuple[int, float]]] = {}
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            if isinstance(value, float) and value == value:
                found.setdefault(name, []).append((step, value))
    assert found == curves(run, finite=True)
    kept = json.loads(config)
    assert (kept["lr"], kept["api_key"], kept["lightdeco.settings.max_epochs"]) == (0.1, "***", 2)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_clearml_holds_every_metric(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClearML's offline session holds each metric at its step (NaN as 0, its own doing), and the configuration."""
    monkeypatch.setenv("CLEARML_OFFLINE_MODE", "1")
    monkeypatch.setenv("CLEARML_CACHE_DIR", str(tmp_path / "clearml"))
    monkeypatch.setenv("HOME", str(tmp_path))
    pytest.importorskip("clearml")
    run = train(Tracker("clearml", "proj", close_timeout=120), kinds="")
    (folder,) = (path for path in (tmp_path / "clearml").glob("**/offline-*") if path.is_dir())
    found: dict[str, list[tuple[int, float]]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        for event in json.loads(line):
            value = event.get("value")
            if not event["metric"].startswith("train/none"):
                found.setdefault(event["metric"] + "|" + event["variant"], []).append((event["iter"], value))
    expected = curves(run, finite=True)
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, expected.values())), found.keys()
    task = json.loads((folder / "task.json").read_text())
    configuration = task["configuration"]["General"]["value"]
    assert "lightdeco.settings.max_epochs" in configuration
    assert "abc" not in configuration


def test_two_runs_of_one_object(train: Train) -> None:
    """One object serves two runs, and nothing of accelerate is left behind by it."""
    pytest.importorskip("dvclive")
    logger = Tracker("dvclive")
    first, second = train(logger, kinds=""), train(logger, kinds="")
    assert first.dir != second.dir
    assert (second.dir / "dvclive" / "metrics.json").exists()
    Loggers({"dvclive": logger}).close("finished")
