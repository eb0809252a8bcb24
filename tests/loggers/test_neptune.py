"""The logger of Neptune, its offline queue read back."""

import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest

import lightdeco as ld
from lightdeco.errors import LightdecoWarning, LoggerError
from lightdeco.loggers import Loggers, Neptune, create

from .conftest import Train, curves

pytest.importorskip("neptune")


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEPTUNE_API_TOKEN", "NEPTUNE_MODE", "NEPTUNE_PROJECT", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)


def _operations(directory: Path) -> list[dict[str, Any]]:
    """The operations in the queue of an offline run, in order."""
    decoder, found = json.JSONDecoder(), []
    for path in sorted(directory.rglob("data-*.log")):
        text, position = path.read_text(), 0
        while position < len(text):
            entry, position = decoder.raw_decode(text, position)
            position += len(text[position:]) - len(text[position:].lstrip())
            found.append(entry["obj"])
    return found


def _token(address: str) -> str:
    return base64.b64encode(json.dumps({"api_address": address, "api_url": address, "api_key": "x"}).encode()).decode()


def test_an_offline_run_holds_everything(train: Train) -> None:
    """Without a network, the queue holds each finite metric at its step, parameters, images, files and the status."""
    run = train(Neptune(mode="offline", name="mine"), kinds="image figure text table artifact")
    operations = _operations(run.dir)
    found: dict[str, list[tuple[int, float]]] = {}
    for operation in operations:
        if operation["type"] == "LogFloats":
            points = [(int(value["step"]), value["value"]) for value in operation["values"]]
            found.setdefault("/".join(operation["path"]), []).extend(points)
    assert found == curves(run, finite=True)
    assigned = {"/".join(o["path"]): o.get("value") for o in operations if o["type"].startswith("Assign")}
    assert assigned["parameters/lr"] == 0.1
    assert assigned["parameters/api_key"] == "***"
    assert assigned["parameters/url"] == "http://***@host/x"
    assert (assigned["status"], assigned["sys/failed"], assigned["sys/name"]) == ("finished", False, "mine")
    kinds = {"/".join(o["path"]): o["type"] for o in operations if o["path"][0] in ("shown", "artifacts")}
    assert kinds == {
        "shown/image": "LogImages",
        "shown/figure": "LogImages",
        "shown/text": "LogStrings",
        "shown/table/step_4": "UploadFile",
        "shown/table/step_8": "UploadFile",
        "artifacts/kept": "UploadFile",
    }
    tables = [path.read_text() for path in run.dir.rglob("*.csv")]
    assert "name,value\nx,1\ny,2.5\n" in tables


def test_nothing_is_told_of_the_environment(train: Train) -> None:
    """Output, machine and git state are in no operation unless that was asked for."""
    run = train(Neptune(mode="offline"), kinds="")
    paths = {operation["path"][0] for operation in _operations(run.dir)}
    assert "monitoring" not in paths
    files = [o for o in _operations(run.dir) if o["path"][:2] == ["source_code", "files"]]
    assert [o["file_globs"] for o in files] == [[]]


def test_by_name_it_is_offline_and_says_so_at_once(train: Train) -> None:
    """Without a server of one's own it warns that the service closed, in less than a second, and works offline."""
    import neptune  # noqa: F401 - its import takes longer than what is measured here

    start = time.monotonic()
    with pytest.warns(LightdecoWarning, match="hosted service closed in March 2026.*offline") as caught:
        run = train("neptune", kinds="")
    assert time.monotonic() - start < 1
    assert len([w for w in caught if issubclass(w.category, LightdecoWarning)]) == 1
    assert _operations(run.dir)


@pytest.mark.parametrize(
    ("mode", "token", "message"),
    [
        ("async", None, "needs an api_token"),
        ("sync", "no token", "is none of Neptune's"),
        ("async", _token("https://app.neptune.ai"), "belongs to https://app.neptune.ai, which closed in March 2026"),
        (None, _token("http://127.0.0.1:9"), "http://127.0.0.1:9 of the logger 'neptune' does not answer"),
        (
            "async",
            _token("https://no.such.host.invalid"),
            "no.such.host.invalid of the logger 'neptune' does not answer",
        ),
    ],
)
def test_without_a_server_the_answer_is_clear_and_quick(mode: Any, token: str, message: str, tmp_path: Path) -> None:
    """A mode that needs a server, without one, is a LoggerError in less than a second that says what to do."""
    start = time.monotonic()
    with pytest.raises(LoggerError, match=message):
        create(Neptune(mode=mode, api_token=token), tmp_path)
    assert time.monotonic() - start < 1


def test_a_token_of_the_closed_service_means_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that is left over in the environment does not reach for the closed service."""
    monkeypatch.setenv("NEPTUNE_API_TOKEN", _token("https://app.neptune.ai"))
    with pytest.warns(LightdecoWarning, match="works offline"):
        made = create("neptune", tmp_path)
    Loggers(made).close("finished")
    assert _operations(tmp_path)


def test_the_id_goes_through_a_resume(tmp_path: Path) -> None:
    """The id that a checkpoint keeps names the run that goes on; a failed one is marked."""
    fan = Loggers(create(Neptune(mode="offline"), tmp_path / "one"))
    state = fan.state_dict()
    fan.close("failed")
    again = Loggers(create(Neptune(mode="offline"), tmp_path / "two", state))
    assert again.state_dict() == state
    again.close("finished")
    failed = [o["value"] for o in _operations(tmp_path / "one") if o["path"] == ["sys", "failed"]]
    assert failed[-1] is True
    assert ld.loggers.Neptune is Neptune
