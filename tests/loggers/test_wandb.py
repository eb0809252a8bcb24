"""The logger of Weights & Biases, its offline file read back with its own messages."""

import json
import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from lightdeco.errors import LoggerError
from lightdeco.loggers import Loggers, WandB, create

from .conftest import Train, curves

wandb: Any = pytest.importorskip("wandb")


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)


def _records(directory: Path) -> list[Any]:
    """The messages of a finished run's file: W&B's service may write the last ones just after `finish`."""
    deadline = time.monotonic() + 20
    while True:
        found = list(_read(directory))
        if (found and found[-1].WhichOneof("record_type") == "exit") or time.monotonic() > deadline:
            return found
        time.sleep(0.02)


def _read(directory: Path) -> Iterator[Any]:
    """The messages of a `.wandb` file: LevelDB's log format, after a header of seven bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = directory.rglob("*.wandb")
    data, position, parts = file.read_bytes(), 7, b""
    assert data[:4] in (b":W&B", b"")
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(parts)
            parts = b""


def _items(items: Any) -> dict[str, Any]:
    """The values of a message by name; those of a nested one are a dict."""
    found: dict[str, Any] = {}
    for item in items:
        name, *inner = item.nested_key or [item.key]
        if inner:
            found.setdefault(name, {})["/".join(inner)] = json.loads(item.value_json)
        else:
            found[name] = json.loads(item.value_json)
    return found


def _history(directory: Path) -> list[dict[str, Any]]:
    return [_items(r.history.item) for r in _records(directory) if r.WhichOneof("record_type") == "history"]


def _number(value: Any) -> Any:
    return "nan" if value == "NaN" or (isinstance(value, float) and math.isnan(value)) else value


def test_an_offline_run_holds_everything(train: Train) -> None:
    """Without a network, the file holds each metric at its step, config, images, tables, artifact and how it ended."""
    run = train(WandB(project="p", mode="offline", tags=["a"]))
    history = _history(run.dir)
    found: dict[str, list[tuple[int, float]]] = {}
    for row in history:
        for name, value in row.items():
            if not name.startswith(("_", "shown", "global_step")):
                found.setdefault(name, []).append((row["global_step"], _number(value)))
    assert found == curves(run)
    kinds = {key: value["_type"] for row in history for key, value in row.items() if isinstance(value, dict)}
    assert kinds == {
        "shown/image": "image-file",
        "shown/figure": "image-file",
        "shown/histogram": "histogram",
        "shown/text": "table-file",
        "shown/table": "table-file",
    }
    histogram = next(row["shown/histogram"] for row in history if "shown/histogram" in row)
    assert sum(histogram["values"]) == 3
    tables = [json.loads(path.read_text()) for path in run.dir.rglob("*.table.json")]
    assert {"columns": ["name", "value"], "data": [["x", 1], ["y", 2.5]]} in [
        {key: table[key] for key in ("columns", "data")} for table in tables
    ]
    records = _records(run.dir)
    by_kind = {
        kind: [r for r in records if r.WhichOneof("record_type") == kind] for kind in ("run", "exit", "artifact")
    }
    config = _items([item for r in records for item in [*r.config.update, *r.run.config.update]])
    assert config["lr"] == 0.1
    assert config["api_key"] == "***"
    assert config["url"] == "http://***@host/x"
    assert by_kind["run"][0].run.project == "p"
    assert list(by_kind["run"][0].run.tags) == ["a"]
    assert "kept.txt" in [entry.path for r in by_kind["artifact"] for entry in r.artifact.manifest.contents]
    assert by_kind["exit"][-1].exit.exit_code == 0
    summary = _items([item for r in records for item in r.summary.update])
    losses = [value for _, value in curves(run)["val/loss"]]
    assert (summary["min/val/loss"], summary["max/val/loss"]) == (min(losses), max(losses))
    metrics = {
        r.metric.name or r.metric.glob_name: r.metric for r in records if r.WhichOneof("record_type") == "metric"
    }
    assert metrics["*"].step_metric == "global_step"


def test_nothing_is_told_of_the_environment(train: Train) -> None:
    """Command line, code, packages, git state and machine are in no file unless that was asked for."""
    run = train(WandB(mode="offline"), kinds="")
    names = {path.name for path in run.dir.rglob("*")}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "conda-environment.yaml"}
    kinds = {record.WhichOneof("record_type") for record in _records(run.dir)}
    assert not kinds & {"output", "output_raw"}
    assert [r.environment.host for r in _records(run.dir) if r.WhichOneof("record_type") == "environment"] in ([], [""])


def test_steps_may_come_in_any_order(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Records at earlier steps are kept, and W&B does not say that steps must increase."""
    fan = Loggers(create(WandB(mode="offline"), tmp_path))
    for step in (5, 3, 3, 7):
        fan.log_metrics({"x": float(step)}, step)
    fan.close("failed")
    assert [(row["global_step"], row["x"]) for row in _history(tmp_path)] == [(5, 5), (3, 3), (3, 3), (7, 7)]
    assert "increas" not in "".join(capfd.readouterr())
    (ended,) = [r for r in _records(tmp_path) if r.WhichOneof("record_type") == "exit"]
    assert ended.exit.exit_code == 1


def test_a_resumed_run_has_the_same_id(tmp_path: Path) -> None:
    """The id that a checkpoint keeps names the run that goes on."""
    fan = Loggers(create([WandB(mode="offline")], tmp_path / "one"))
    state = fan.state_dict()
    fan.close("interrupted")
    again = create([WandB(mode="offline")], tmp_path / "two", state)
    assert Loggers(again).state_dict() == state
    Loggers(again).close("finished")
    ids = [r.run.run_id for folder in ("one", "two") for r in _records(tmp_path / folder) if r.run.run_id]
    assert set(ids) == {state["wandb"]["id"]}


def test_gradients_are_watched_when_asked_for(tmp_path: Path) -> None:
    """Histograms of gradients come with the next record; the hooks are gone when the run ends."""
    model = torch.nn.Linear(3, 1)
    fan = Loggers(create(WandB(mode="offline", watch="gradients", watch_every=1), tmp_path))
    fan.watch(model)
    for step in range(3):
        model(torch.ones(2, 3)).sum().backward()
        fan.log_metrics({"x": 1.0}, step)
    fan.close("finished")
    assert any(key.startswith("gradients/weight") for row in _history(tmp_path) for key in row)
    assert not getattr(model.weight, "_post_accumulate_grad_hooks", None)


def test_a_run_of_ones_own_is_not_finished(tmp_path: Path) -> None:
    """A run that was given is written to and stays open; several runs are open side by side."""
    (tmp_path / "own").mkdir()
    own = wandb.init(mode="offline", dir=str(tmp_path / "own"))
    fan = Loggers(create([WandB(run=own), WandB(mode="offline")], tmp_path / "ours"))
    fan.log_metrics({"x": 1.0}, 1)
    assert fan["wandb"].native is own  # type: ignore[attr-defined]
    assert fan["wandb_2"].native is not own  # type: ignore[attr-defined]
    fan.close("finished")
    own.log({"y": 2.0})
    own.finish()
    assert [row.get("x", row.get("y")) for row in _history(tmp_path / "own")] == [1.0, 2.0]
    assert len(_history(tmp_path / "ours")) == 1


def test_disabled_writes_nothing(train: Train) -> None:
    """With mode="disabled" the same code runs and leaves no file of W&B."""
    run = train(WandB(mode="disabled"))
    assert list(run.dir.rglob("*.wandb")) == []


def test_wrong_options_end_the_run_before_it_begins(tmp_path: Path) -> None:
    """An option that `wandb.init` does not know is a LoggerError that names it."""
    with pytest.raises(LoggerError, match="projekt"):
        create(WandB(mode="offline", projekt="x"), tmp_path)
