"""The model summary: what it counts and how it looks."""

import io
import sys
from typing import Any

import pytest
import torch
from torch import nn

from lightdeco.callbacks import ModelSummary
from lightdeco.callbacks.model_summary import Row, Total, summarize, text, total
from lightdeco.errors import SettingsError
from tests.callbacks.fake_run import FakeRun, call


class Net(nn.Module):
    """Nested, with a parameter of its own, a shared part, a frozen one and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.body = nn.Sequential(nn.Linear(4, 5), nn.ReLU())
        self.again = self.body
        self.head = nn.Linear(5, 2, bias=False).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(10, dtype=torch.float64))
        self.nothing = None


def test_rows_by_depth() -> None:
    """Each part is a row with all below it; shared parts show under each name; depth decides how far down."""
    own = Row("scale", "Parameter", 3, 3, lazy=False)
    body = Row("body", "Sequential", 25, 25, lazy=False)
    again = Row("again", "Sequential", 25, 25, lazy=False)
    head = Row("head", "Linear", 10, 0, lazy=False)
    assert summarize(Net(), 0) == []
    assert summarize(Net()) == [own, body, again, head]
    names = [row.name for row in summarize(Net(), 2)]
    assert names == ["scale", "body", "body.0", "body.1", "again", "again.0", "again.1", "head"]


def test_totals_count_shared_parameters_once() -> None:
    """The sums count what is shared once; the size includes buffers and the width of each type."""
    assert total(Net()) == Total(38, 28, lazy=False, megabytes=(38 * 4 + 10 * 8) / 1e6)
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    tied[1].weight = tied[0].weight
    assert total(tied).parameters == 9
    assert total(nn.Linear(10, 10, bias=False).half()).megabytes == 200 / 1e6


def test_lazy_parameters_are_shown_as_lazy() -> None:
    """Parameters without a shape are named lazy, counted nowhere, and their module still prints."""
    model = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(1, 1), nn.Sequential(nn.LazyLinear(2)))
    rows = summarize(model)
    assert [row.lazy for row in rows] == [True, True, False, True]
    lines = text(rows, total(model)).splitlines()
    assert lines[1].split() == ["0", "LazyLinear", "lazy", "lazy"]
    assert lines[-1].startswith("2 parameters (lazy ones not counted), 2 trainable")
    mixed = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2)))
    assert "2 + lazy" in text(summarize(mixed), total(mixed))


def test_plain_text_is_aligned() -> None:
    """The plain table is aligned and has thousands separated."""
    model = nn.Sequential(nn.Linear(1000, 10), nn.ReLU())
    assert text(summarize(model), total(model)).splitlines() == [
        "name  type    parameters  trainable",
        "0     Linear      10,010     10,010",
        "1     ReLU             0          0",
        "10,010 parameters, 10,010 trainable, 0.04 MB",
    ]
    assert text([], total(nn.ReLU())) == "0 parameters, 0 trainable, 0 MB"


def test_printed_once_by_the_main_process(capsys: pytest.CaptureFixture[str]) -> None:
    """Without a terminal the plain text is printed when a fit starts, in the main process alone."""
    model, run = Net(), FakeRun()
    call(ModelSummary(depth=2), "on_fit_start", run=run, model=model)
    assert capsys.readouterr().out == text(summarize(model, 2), total(model)) + "\n"
    run.is_main = False
    call(ModelSummary(), "on_fit_start", run=run, model=model)
    assert capsys.readouterr().out == ""


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the same cells are in a table; brackets in names are no markup."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", "100")
    model = nn.ModuleDict({"[bold]x": nn.Linear(10, 200)})
    call(ModelSummary(), "on_fit_start", run=FakeRun(), model=model)
    for cell in ("[bold]x", "Linear", "2,200", "0.0088 MB"):
        assert cell in stdout.getvalue()


@pytest.mark.parametrize("depth", [-1, 1.5, "1", None])
def test_a_wrong_depth_is_refused(depth: Any) -> None:
    """`depth` must be an integer of at least 0."""
    with pytest.raises(SettingsError, match=r"depth=.*allowed"):
        ModelSummary(depth)
