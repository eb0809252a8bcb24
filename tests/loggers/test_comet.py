"""The logger of Comet, its offline archive read back."""

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from lightdeco.errors import LoggerError
from lightdeco.loggers import Comet, Loggers, create

from .conftest import Train, curves

pytest.importorskip("comet_ml")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "CRITICAL")
    monkeypatch.delenv("COMET_API_KEY", raising=False)


def _archive(directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, bytes]]:
    """The experiment, its messages and the files of an offline archive."""
    (path,) = directory.rglob("*.zip")
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    messages = [json.loads(line) for line in files["messages.json"].splitlines()]
    return json.loads(files["experiment.json"]), messages, files


def _payloads(messages: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [message["payload"] for message in messages if message["type"] == kind]


def test_an_offline_experiment_holds_everything(train: Train) -> None:
    """Without a network, the archive holds each metric at its step, parameters, images, files and the status."""
    run = train(Comet(project="p", online=False, name="mine"))
    experiment, messages, files = _archive(run.dir)
    found: dict[str, list[tuple[int, float]]] = {}
    for payload in _payloads(messages, "metric_msg"):
        metric = payload["metric"]
        value = metric["metricValue"]
        found.setdefault(metric["metricName"], []).append((metric["step"], "nan" if value == "NaN" else value))
    assert found == curves(run)
    params = {p["param"]["paramName"]: p["param"]["paramValue"] for p in _payloads(messages, "parameter_msg")}
    assert {"lr": 0.1, "api_key": "***", "net.sizes": "[1, 2]", "url": "http://***@host/x"}.items() <= params.items()
    others = {payload["key"]: payload["value"] for payload in _payloads(messages, "log_other")}
    assert (others["status"], others["Name"]) == ("finished", "mine")
    assert experiment["project_name"] == "p"
    uploads = [p for kind in {m["type"] for m in messages} if "upload" in kind for p in _payloads(messages, kind)]
    shown = [str(upload.get("additional_params")) for upload in uploads]
    for name in ("shown/image", "shown/figure", "shown/histogram", "shown/text", "shown/table_step_4.csv", "kept.txt"):
        assert any(name in one for one in shown + [str(u) for u in uploads]), name
    assert b"name,value\nx,1\ny,2.5" in b"".join(data.replace(b"\r", b"") for data in files.values())


def test_nothing_is_told_of_the_environment(train: Train) -> None:
    """Code, git state, machine and output are in no message unless that was asked for."""
    run = train(Comet(online=False), kinds="")
    _, messages, _ = _archive(run.dir)
    kinds = {message["type"] for message in messages}
    assert kinds <= {"metric_msg", "parameter_msg", "log_other", "log_dependency", "file_name"}
    assert "code" not in kinds


def test_the_key_goes_through_a_resume(tmp_path: Path) -> None:
    """The key that a checkpoint keeps names the experiment that goes on."""
    fan = Loggers(create(Comet(online=False), tmp_path / "one"))
    state = fan.state_dict()
    fan.close("interrupted")
    again = Loggers(create(Comet(online=False), tmp_path / "two", state))
    assert again.state_dict() == state
    again.close("finished")
    assert _archive(tmp_path / "two")[0]["offline_id"] == state["comet"]["experiment_key"]


def test_wrong_options_end_the_run_before_it_begins(tmp_path: Path) -> None:
    """An option that Comet does not know is a LoggerError that names it."""
    with pytest.raises(LoggerError, match="taggs"):
        create(Comet(online=False, taggs=["x"]), tmp_path)
