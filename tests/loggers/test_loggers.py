"""Finding loggers by name, and calling them without ever stopping a run."""

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from lightdeco import loggers
from lightdeco.errors import LightdecoWarning, LoggerError
from lightdeco.loggers import CSV, Logger, Loggers, TensorBoard, create, register


class Memory:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def open(self, directory: Path) -> None:
        self.calls.append(("open", directory))

    def log_hparams(self, hparams: Mapping[str, object]) -> None:
        self.calls.append(("hparams", hparams))

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.calls.append(("metrics", metrics, step))

    def log_text(self, name: str, value: object, step: int) -> None:
        self.calls.append(("text", name, value, step))

    def close(self, status: str) -> None:
        self.calls.append(("close", status))


class Minimal:
    """Has only what is required."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.steps.append(step)


class Drawn:
    """Looks like a figure."""

    def savefig(self) -> None: ...


class Failing(Minimal):
    """Fails in every other call."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        super().log_metrics(metrics, step)
        if step % 2:
            raise OSError("no space")

    def close(self, status: str) -> None:
        raise RuntimeError(status)


@pytest.fixture(autouse=True)
def _no_registrations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers, "_registered", {})


def test_what_the_setting_may_be(tmp_path: Path) -> None:
    """True, False, None, names, objects and lists of them give the loggers by name, opened in the directory."""
    assert create(None, tmp_path) == create(False, tmp_path) == create([], tmp_path) == {}
    made = create("csv", tmp_path)
    assert isinstance(made["csv"], CSV)
    Loggers(made).close("finished")
    (default,) = Loggers(made := create(True, tmp_path)).items()
    assert default[0] == "tensorboard"
    assert isinstance(default[1], TensorBoard)
    Loggers(made).close("finished")
    memory, other = Memory(), Memory()
    several = create([memory, "csv", other, Minimal()], tmp_path)
    assert list(several) == ["memory", "csv", "memory_2", "minimal"]
    assert memory.calls == other.calls == [("open", tmp_path)]
    Loggers(several).close("finished")


def test_a_minimal_object_is_a_logger() -> None:
    """`log_metrics` alone fulfils the protocol, at run time too."""
    logger: Logger = Minimal()
    assert isinstance(logger, Logger)
    assert not isinstance(object(), Logger)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("tensorbord", r"no logger 'tensorbord'; did you mean 'tensorboard'\?; available: aim, clearml, comet, csv"),
        (["csv", "csv"], "'csv' is given twice"),
        (Memory, r"Memory is a class; give an instance: Memory\(...\)"),
        (5, r"has no method log_metrics\(metrics, step\).*log_hparams"),
        (object(), "none that starts with 'log'"),
    ],
)
def test_wrong_settings_are_refused(given: object, message: str, tmp_path: Path) -> None:
    """A wrong name or object is an error that says what is allowed."""
    with pytest.raises(LoggerError, match=message):
        create(given, tmp_path)


def test_a_registered_factory_makes_the_logger(tmp_path: Path) -> None:
    """A registered name calls its factory without arguments and opens the result; it comes before a built-in one."""
    register("memory", Memory)
    register("csv", Memory)
    made = create(["memory", "csv"], tmp_path)
    assert all(isinstance(logger, Memory) and logger.calls == [("open", tmp_path)] for logger in made.values())
    with pytest.raises(LoggerError, match="csv, dvclive, memory, mlflow"):
        create("x", tmp_path)


def test_wrong_registrations_are_refused() -> None:
    """A name that is no text and a factory that cannot be called are errors."""
    with pytest.raises(LoggerError, match="not empty"):
        register("", Memory)
    with pytest.raises(LoggerError, match="give a function or a class"):
        register("memory", Memory())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("No module named 'vendor'", name="vendor.sub"), "install it with `pip install vendor`"),
        (ValueError("wrong key"), r"'bad' could not be made \(ValueError: wrong key\)"),
        (LoggerError("as it is"), "^as it is$"),
    ],
)
@pytest.mark.parametrize("where", ["factory", "open"])
def test_a_logger_that_cannot_be_made_ends_the_run(error: Exception, message: str, where: str, tmp_path: Path) -> None:
    """Making and opening may fail: one LoggerError from the cause, and the loggers before it are closed."""

    def fail(*given: object) -> Any:
        raise error

    bad: Any = Minimal()
    bad.open = fail
    register("bad", fail if where == "factory" else lambda: bad)
    before = Memory()
    with pytest.raises(LoggerError, match=message) as caught:
        create([before, "bad"], tmp_path)
    assert caught.value is error or caught.value.__cause__ is error
    assert before.calls == [("open", tmp_path), ("close", "failed")]


def test_entry_points_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package can bring a logger with an entry point of the group lightdeco.loggers."""
    info = tmp_path / "plug-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[lightdeco.loggers]\nplug = plugged_logger:Plug\ngone = missing_module:X\n")
    (tmp_path / "plugged_logger.py").write_text("class Plug:\n    def log_metrics(self, metrics, step): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    assert type(create("plug", tmp_path)["plug"]).__name__ == "Plug"
    with pytest.raises(LoggerError, match="`pip install missing_module`"):
        create("gone", tmp_path)
    with pytest.raises(LoggerError, match="dvclive, gone, mlflow, neptune, plug, swanlab"):
        create("unknown", tmp_path)


def test_calls_go_to_every_logger_that_has_the_method(tmp_path: Path) -> None:
    """Each call reaches each logger; hyperparameters are masked; a second close does nothing."""
    memory, minimal = Memory(), Minimal()
    fan: Loggers = Loggers({"memory": memory, "minimal": minimal})
    assert list(fan) == ["memory", "minimal"]
    assert fan["memory"] is memory
    fan.log_hparams({"lr": 1, "api_key": "abc"})
    fan.log_metrics({"x": 1.0}, 7)
    fan.log_artifact(tmp_path)
    fan.cut(5)
    fan.close("interrupted")
    fan.close("finished")
    assert memory.calls == [
        ("hparams", {"lr": 1, "api_key": "***"}),
        ("metrics", {"x": 1.0}, 7),
        ("close", "interrupted"),
    ]
    assert minimal.steps == [7]


def test_a_failing_logger_is_one_warning_and_is_still_tried() -> None:
    """One warning per logger names logger, method and exception; the others are called; nothing is raised."""
    failing, healthy = Failing(), Minimal()
    fan = Loggers({"failing": failing, "healthy": healthy})
    message = r"'failing' failed in log_metrics \(OSError: no space\); training goes on"
    with pytest.warns(LightdecoWarning, match=message) as caught:  # noqa: PT031 - at a later call or at the end
        for step in (1, 2, 3, 4):
            fan.log_metrics({}, step)
        fan.close("finished")
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    assert failing.steps == healthy.steps == [1, 2, 3, 4]


def test_what_a_logger_cannot_show_is_said_once_per_kind() -> None:
    """An image, figure, histogram, text or table that a logger has no method for is one warning for each kind."""
    memory = Memory()
    fan = Loggers({"memory": memory, "minimal": Minimal()})
    with pytest.warns(LightdecoWarning) as caught:  # noqa: PT031 - the warnings of all calls count together
        for step in (1, 2):
            fan.log_text("note", "a", step)
            fan.log_image("image", torch.zeros(2, 2), step)
            fan.log_figure("figure", Drawn(), step)
            fan.log_histogram("histogram", [1.0], step)
            fan.log_table("table", {}, step)
    fan.close("finished")
    assert len(caught) == 5 + 4
    assert sum("'minimal' has no log_text: 'note'" in str(warning.message) for warning in caught) == 1
    assert [call for call in memory.calls if call[0] == "text"] == [("text", "note", "a", 1), ("text", "note", "a", 2)]


def test_nothing_heavy_is_imported_before_it_is_asked_for() -> None:
    """Importing the package of loggers imports no logger and no vendor."""
    code = (
        "import sys, lightdeco.loggers as l; vendors = ('tensorboard', 'rich', 'matplotlib', 'PIL', 'wandb', "
        "'comet_ml', 'neptune', 'mlflow', 'torch.utils.tensorboard'); "
        "bad = [m for m in sys.modules if m.startswith(vendors)]; assert not bad, bad; "
        "[l.CSV(), l.TensorBoard(), l.WandB(), l.Comet(), l.Neptune(), l.MLflow(), l.Tracker('aim')]; "
        "bad = [m for m in sys.modules if m.startswith(vendors)]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


def test_unknown_attribute_is_an_attribute_error() -> None:
    """The lazy import of classes does not hide misspelt names."""
    with pytest.raises(AttributeError, match="no attribute 'Csv'"):
        _ = loggers.Csv
