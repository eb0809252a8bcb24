"""The logger of MLflow, read back through its client."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from lightdeco.errors import LoggerError
from lightdeco.loggers import Loggers, MLflow, create

from .conftest import Train, curves

mlflow: Any = pytest.importorskip("mlflow")


# Its own libraries deprecate each other: pandas what MLflow does with a table, SQLAlchemy what it does with a store.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """An empty database in the directory of the test, copied, since making one takes seconds."""
    empty = tmp_path_factory.getbasetemp() / "empty.db"
    if not empty.exists():
        mlflow.MlflowClient(f"sqlite:///{empty}").search_experiments()
    shutil.copy(empty, tmp_path / "mlflow.db")


def _logger(directory: Path, **options: Any) -> MLflow:
    store, files = f"sqlite:///{directory / 'mlflow.db'}", str(directory / "files")
    return MLflow("p", tracking_uri=store, artifact_location=files, **options)


def test_a_run_holds_everything(train: Train, tmp_path: Path) -> None:
    """The client finds each metric at its step, params, images, texts, tables, files and the status."""
    logger = _logger(tmp_path, tags={"who": "me"})
    run = train(logger, kinds="image figure text table artifact")
    client = mlflow.MlflowClient(logger.tracking_uri)
    identity = logger.state_dict()["run_id"]
    found = client.get_run(identity)
    for name, points in curves(run).items():
        history = client.get_metric_history(identity, name)
        read = sorted((point.step, point.value if point.value == point.value else "nan") for point in history)
        assert read == points, name
    assert set(found.data.metrics) == set(curves(run))
    assert found.data.params["lr"] == "0.1"
    assert found.data.params["api_key"] == "***"
    assert found.data.params["net.sizes"] == "[1, 2]"
    assert found.data.tags["who"] == "me"
    assert (found.info.status, found.info.run_name) == ("FINISHED", "Showing/version_0")
    files = {path.relative_to(tmp_path / "files" / identity / "artifacts").as_posix() for path in _files(tmp_path)}
    assert {"kept.txt", "shown/text/step_4.txt", "shown/table/step_8.json"} <= files
    assert sum(name.startswith("images/shown") and name.endswith(".png") for name in files) == 4
    (text,) = [path for path in _files(tmp_path) if path.name == "step_4.txt"]
    assert text.read_text() == "*epoch* 0"
    assert mlflow.active_run() is None


def _files(directory: Path) -> list[Path]:
    return [path for path in (directory / "files").rglob("*") if path.is_file()]


def test_nothing_is_told_of_the_environment(tmp_path: Path) -> None:
    """The tags of a run name neither source nor commit nor command."""
    logger = _logger(tmp_path)
    fan = Loggers(create(logger, tmp_path))
    fan.close("finished")
    tags = mlflow.MlflowClient(logger.tracking_uri).get_run(logger.state_dict()["run_id"]).data.tags
    assert not {name for name in tags if name.startswith("mlflow.source")}


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """The id that a checkpoint keeps names the run that goes on; params that are logged again do no harm."""
    fan = Loggers(create(_logger(tmp_path), tmp_path))
    fan.log_hparams({"lr": 0.1})
    fan.log_metrics({"x": 1.0}, 1)
    state = fan.state_dict()
    fan.close("interrupted")
    logger = _logger(tmp_path)
    client = mlflow.MlflowClient(logger.tracking_uri)
    assert client.get_run(state["mlflow"]["run_id"]).info.status == "KILLED"
    again = Loggers(create(logger, tmp_path, state))
    again.log_hparams({"lr": 0.1})
    again.log_metrics({"x": 2.0}, 2)
    assert again.state_dict() == state
    again.close("failed")
    found = client.get_run(state["mlflow"]["run_id"])
    assert (found.info.status, found.data.metrics["x"]) == ("FAILED", 2.0)


def test_a_wrong_store_ends_the_run_before_it_begins(tmp_path: Path) -> None:
    """A tracking address that cannot be used is a LoggerError."""
    with pytest.raises(LoggerError, match="'mlflow' could not be made"):
        create(MLflow(tracking_uri="nonsense://x"), tmp_path)
