"""What a run was made with, read back from what each real logger and the checkpoint keep; and no secret anywhere."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lightdeco as ld
from lightdeco import checkpoint
from lightdeco.loggers import CSV, Loggers
from lightdeco.provenance import provenance
from lightdeco.settings import Settings

from .conftest import Train

SECRETS = ("hush-command-1", "hush-hparam-2", "hush-setting-3", "hush-object-4")


class Watch:
    """A profiler that does nothing and holds a secret."""

    def start(self, action: str) -> None:
        """Nothing."""

    def stop(self, action: str) -> None:
        """Nothing."""

    def __repr__(self) -> str:
        return f"Watch({SECRETS[3]})"


@pytest.fixture
def made(train: Train, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., ld.Run]:
    """Trains with secrets in the command line, the hyperparameters and the settings; the run as it is when it ends."""
    monkeypatch.setattr("sys.argv", ["train.py", "--token", SECRETS[0], "--lr", "0.1", f"--password={SECRETS[0]}"])
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COMET_LOGGING_CONSOLE", "CRITICAL")
    for name in ("WANDB_MODE", "COMET_API_KEY", "NEPTUNE_API_TOKEN", "NEPTUNE_MODE", "NEPTUNE_PROJECT"):
        monkeypatch.delenv(name, raising=False)

    def run(logger: object, **more: Any) -> ld.Run:
        hparams = {"lr": 0.1, "api_key": SECRETS[1], "nested": {"db_password": SECRETS[1]}}
        return train(logger, kinds="", hparams=hparams, profiler=Watch(), seed=7, **more)

    return run


def _refuse_secrets(directory: Path) -> None:
    """No file below a directory, and none inside of a zip archive, holds one of the secrets."""
    contents: dict[str, bytes] = {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}
    for path in directory.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            contents |= {f"{path}!{name}": archive.read(name) for name in archive.namelist()}
    assert len(contents) > 3
    assert [(path, s) for path, data in contents.items() for s in SECRETS if s.encode() in data] == []


def _check(found: dict[str, Any]) -> None:
    """The values that every backend must have, as its reader gives them: flat, with dots."""
    assert found["settings.max_epochs"] in (2, "2")
    assert found["settings.profiler"] == "Watch"
    assert found["seed"] in (7, "7")
    assert found["environment.command"] == "train.py --token *** --lr 0.1 --password=***"
    assert found["environment.lightdeco"] == ld.__version__
    assert str(found["environment.git_commit"])
    assert found["environment.python"].count(".") == 2


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    return {name: each for key, inner in value.items() for name, each in _flat(inner, f"{prefix}{key}.").items()}


def test_csv_tensorboard_and_the_checkpoint(made: Callable[..., ld.Run]) -> None:
    """`hparams.json`, the TEXT tab and the checkpoint tell the same; secrets are in no file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = {"backend": "eager", "options": {"api_key": SECRETS[2]}}
    run = made(["csv", "tensorboard"], compile=options)
    written = json.loads((run.dir / "hparams.json").read_text())
    _check(_flat(written))
    assert written["hparams"] == {"lr": 0.1, "api_key": "***", "nested": {"db_password": "***"}}
    assert written["settings"]["compile"] == {"backend": "eager", "options": {"api_key": "***"}}
    (text,) = EventAccumulator(str(run.dir)).Reload().Tensors("provenance/text_summary")
    rows = text.tensor_proto.string_val[0].decode().splitlines()
    _check({cells[1].strip(): cells[2].strip() for row in rows if len(cells := row.split("|")) > 2})
    assert run.last_checkpoint is not None
    state = checkpoint.load(run.last_checkpoint)
    assert (state.settings, state.versions) == (written["settings"], written["environment"])
    assert state.progress["seed"] == 7
    _refuse_secrets(run.dir)


def test_wandb(made: Callable[..., ld.Run]) -> None:
    """The config has it below `lightdeco`."""
    pytest.importorskip("wandb")
    from .test_wandb import _records

    run = made(ld.loggers.WandB(mode="offline"))
    told = [record.config for record in _records(run.dir) if record.WhichOneof("record_type") == "config"]
    items = [item for each in told for item in each.update]
    config = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in items}
    _check(_flat(config["lightdeco"]))
    assert config["api_key"] == "***"
    _refuse_secrets(run.dir)


def test_comet(made: Callable[..., ld.Run]) -> None:
    """The experiment's others have it."""
    pytest.importorskip("comet_ml")
    from .test_comet import _archive, _payloads

    run = made(ld.loggers.Comet(online=False))
    _check({payload["key"]: payload["value"] for payload in _payloads(_archive(run.dir)[1], "log_other")})
    _refuse_secrets(run.dir)


def test_neptune(made: Callable[..., ld.Run]) -> None:
    """The namespace `lightdeco` has it."""
    pytest.importorskip("neptune")
    from .test_neptune import _operations

    run = made(ld.loggers.Neptune(mode="offline"))
    operations = [o for o in _operations(run.dir) if o["path"][0] == "lightdeco"]
    _check({".".join(o["path"][1:]): o["value"] for o in operations})
    _refuse_secrets(run.dir)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_mlflow(made: Callable[..., ld.Run], tmp_path: Path) -> None:
    """The run's tags have it, and MLflow's own tag the commit; a resumed run may change a setting."""
    mlflow: Any = pytest.importorskip("mlflow")

    def logger() -> Any:
        return ld.loggers.MLflow("p", tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}")

    run = made(logger())
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    tags = client.get_run(run.loggers["mlflow"].state_dict()["run_id"]).data.tags
    _check(tags)
    if tags["environment.git_commit"] != "None":
        assert tags["mlflow.source.git.commit"] == tags["environment.git_commit"]
    again = made(logger(), resume=run.dir, max_epochs=3)
    tags = client.get_run(again.loggers["mlflow"].state_dict()["run_id"]).data.tags
    assert (again.dir, tags["settings.max_epochs"]) == (run.dir, "3")
    _refuse_secrets(tmp_path)


def test_dvclive(made: Callable[..., ld.Run]) -> None:
    """The parameters have it below `lightdeco`, beside the hyperparameters."""
    yaml: Any = pytest.importorskip("dvclive.serialize")
    run = made("dvclive")
    params = yaml.load_yaml(str(run.dir / "dvclive" / "params.yaml"))
    _check({name.removeprefix("lightdeco."): value for name, value in params.items()})
    assert params["lr"] == 0.1
    _refuse_secrets(run.dir)


def test_of_objects_there_is_the_class() -> None:
    """Settings that are objects, and those in lists and dicts, are plain values; JSON takes all of it as it is."""
    found = provenance(Settings(max_epochs=1, logger=[CSV(), "csv"], root_dir=Path("x"), callbacks=[Watch()]), 3)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["settings"]["logger"] == ["CSV", "csv"]
    assert found["settings"]["root_dir"] == "x"
    assert not {"callbacks", "hparams"} & found["settings"].keys()
    assert len(json.dumps(found)) < 5000


def test_it_is_masked_on_the_way_to_each_logger() -> None:
    """Whoever calls it: a logger never sees a secret."""
    seen: list[Any] = []

    class Own:
        def log_metrics(self, metrics: Any, step: int) -> None:
            """Nothing."""

        def log_provenance(self, provenance: Any) -> None:
            seen.append(provenance)

    fan = Loggers({"own": Own()})
    fan.log_provenance({"settings": {"api_key": "abc", "max_epochs": 1}})
    fan.close("finished")
    assert seen == [{"settings": {"api_key": "***", "max_epochs": 1}}]
