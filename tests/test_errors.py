"""Errors and warnings: what they are, and the line that a warning shows."""

import linecache
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.errors import nearest

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2


class Net(nn.Linear):
    """A model that trains."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        return self(batch).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Logging(Net):
    """It logs from a validation step in a way that warns."""

    @ld.validation_step
    def check(self, batch: Tensor) -> None:
        ld.log("x", 1.0, on_step=True)  # the line of ld.log


class Misspelt(Net):
    """It has a method that nobody calls."""

    def on_trian_start(self) -> None: ...


def unused() -> None:
    ld.fit(Net(), (BATCHES, BATCHES), **QUIET)  # the line of unused


def logged() -> None:
    ld.validate(Logging(), BATCHES, progress_bar=False)


def evaluated() -> None:
    ld.fit(Net().eval(), BATCHES, **QUIET)  # the line of evaluated


def misspelt() -> None:
    list(ld.predict(Predicting(), BATCHES, progress_bar=False))  # the line of misspelt


class Predicting(Misspelt):
    """It also predicts."""

    @ld.predict_step
    def infer(self, batch: Tensor) -> Tensor:
        return self(batch).detach()


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Run once before: what the first run imports makes Python forget which warnings it has shown."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unused()


@pytest.mark.parametrize(
    ("act", "said", "line"),
    [
        (unused, "val data was given", "the line of unused"),
        (evaluated, "was in eval mode", "the line of evaluated"),
        (misspelt, "on_trian_start", "the line of misspelt"),
        (logged, "on_step=True", "the line of ld.log"),
    ],
)
def test_a_warning_points_at_the_line_of_the_user(act: Callable[[], None], said: str, line: str) -> None:
    """However deep in lightdeco it was found; with the default filters it is shown once for each line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        act()
        act()
    ours = [w for w in caught if w.category is ld.LightdecoWarning and said in str(w.message)]
    assert [(w.filename, linecache.getline(w.filename, w.lineno).rpartition("# ")[2].strip()) for w in ours] == [
        (__file__, line)
    ]


def test_every_error_is_a_lightdeco_error_and_the_wrong_setting_a_value_error() -> None:
    """One `except` catches all refusals; `ValueError` catches those of values."""
    errors = [getattr(ld, name) for name in ld.__all__ if name.endswith("Error")]
    assert len(errors) >= 8
    assert all(issubclass(error, ld.LightdecoError) for error in errors)
    assert [error for error in errors if issubclass(error, ValueError)] == [ld.SettingsError]
    assert issubclass(ld.LightdecoWarning, UserWarning)


def test_nearest_names_the_likeliest_word_or_nothing() -> None:
    """It ends a message, so it begins with a semicolon."""
    assert nearest("max_epoch", ["max_steps", "max_epochs"]) == "; did you mean 'max_epochs'?"
    assert nearest("zzz", ["max_epochs"]) == nearest("max_epoch", []) == ""
