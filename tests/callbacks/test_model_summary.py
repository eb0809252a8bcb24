"""The model summary: what it counts, what its forward shows and leaves behind, and how it looks."""

import io
import random
import sys
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.callbacks import ModelSummary
from lightdeco.callbacks.model_summary import Row, operations, size, summarize, total, totals_lines
from lightdeco.callbacks.summary_forward import Forward, measure, shapes
from lightdeco.callbacks.summary_table import table
from lightdeco.errors import SettingsError
from tests import models
from tests.callbacks.fake_run import FakeRun, call

CPU = torch.device("cpu")


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


class Busy(nn.Module):
    """Its forward changes all that a forward may change: randomness, statistics, buffers in place and anew."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.norm, self.twice = nn.BatchNorm1d(4), nn.Linear(4, 4)
        self.frozen = nn.BatchNorm1d(4).eval()
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("latest", torch.zeros(4))
        self.fails = fails
        self.example_input: Any = torch.randn(6, 4)

    def forward(self, x: Tensor) -> dict[str, Any]:
        torch.rand(1), random.random(), numpy.random.rand()
        self.seen += 1
        self.latest = x[0]
        self.norm.train()
        y = self.twice(self.twice(self.norm(x)))
        if self.fails:
            raise TypeError("no")
        return {"y": y, "more": (x[0], None)}


def _shown(model: nn.Module, capsys: pytest.CaptureFixture[str], depth: int = 1) -> list[str]:
    call(ModelSummary(depth), "on_fit_start", run=FakeRun(), model=model)
    return capsys.readouterr().out.splitlines()


def test_rows_by_depth() -> None:
    """Each part is a row with all below it; shared parts show under each name; depth decides how far down."""
    own = Row("scale", "Parameter", 3, 3, lazy=False, megabytes=12e-6)
    body = Row("body", "Sequential", 25, 25, lazy=False, megabytes=1e-4)
    again = Row("again", "Sequential", 25, 25, lazy=False, megabytes=1e-4)
    head = Row("head", "Linear", 10, 0, lazy=False, megabytes=4e-5)
    assert summarize(Net(), 0) == []
    assert summarize(Net()) == [own, body, again, head]
    names = [row.name for row in summarize(Net(), 2)]
    assert names == ["scale", "body", "body.0", "body.1", "again", "again.0", "again.1", "head"]


def test_totals_count_shared_parameters_once() -> None:
    """The sums count what is shared once; the size includes buffers and the width of each type."""
    assert total(Net()) == Row("", "Net", 38, 28, lazy=False, megabytes=(38 * 4 + 10 * 8) / 1e6)
    tied = nn.ModuleList([nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)])
    tied[1].weight = tied[0].weight
    assert total(tied).parameters == 9
    assert total(nn.Linear(10, 10, bias=False).half()).megabytes == 200 / 1e6


def test_lazy_parameters_are_shown_as_lazy(capsys: pytest.CaptureFixture[str]) -> None:
    """Parameters without a shape are named lazy, counted nowhere, and stay lazy even with an example."""
    model: Any = nn.Sequential(nn.LazyLinear(3), nn.LazyBatchNorm1d(), nn.Linear(1, 1), nn.Sequential(nn.LazyLinear(2)))
    assert [row.lazy for row in summarize(model)] == [True, True, False, True]
    model.example_input = torch.zeros(2, 5)
    lines = _shown(model, capsys)
    assert lines[1].split() == ["0", "LazyLinear", "lazy", "lazy", "lazy"]
    assert lines[-2].startswith("2 parameters (lazy ones not counted), 2 trainable")
    assert lines[-1] == "(shapes unknown: lazy modules get their parameters from the first batch)"
    assert all(row.lazy for row in summarize(model)[:2])
    mixed = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.LazyLinear(2)))
    assert "2 + lazy" in _shown(mixed, capsys)[1]


def test_plain_text_is_aligned(capsys: pytest.CaptureFixture[str]) -> None:
    """The plain table is aligned, has thousands separated, and no columns about a forward that there was not."""
    assert _shown(nn.Sequential(nn.Linear(1000, 10), nn.ReLU()), capsys) == [
        "name  type    parameters  trainable    MB",
        "0     Linear      10,010     10,010  0.04",
        "1     ReLU             0          0     0",
        "10,010 parameters, 10,010 trainable, 0.04 MB",
    ]
    assert _shown(nn.ReLU(), capsys) == ["0 parameters, 0 trainable, 0 MB"]
    assert _shown(Net(), capsys, depth=0) == ["38 parameters, 28 trainable, 0.000232 MB"]


def test_an_example_shows_shapes_and_operations(capsys: pytest.CaptureFixture[str]) -> None:
    """With `example_input` the table has shapes, calls and FLOPs (a multiply-add counts two) of each part."""
    model: Any = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    model.example_input = torch.zeros(8, 4)
    assert _shown(model, capsys) == [
        "name  type    input    output   parameters  trainable        MB   FLOPs",
        "0     Linear  [8, 4]   [8, 16]          80         80   0.00032  1.02 k",
        "1     ReLU    [8, 16]  [8, 16]           0          0         0       -",
        "2     Linear  [8, 16]  [8, 3]           51         51  0.000204     768",
        "131 parameters, 131 trainable, 0.000524 MB, 1.79 kFLOPs for example_input",
    ]


def test_a_part_that_is_called_twice() -> None:
    """Operations of all calls are counted, shapes are those of the first one, and parts not called have none."""
    model = Busy()
    found = measure(model, CPU)
    assert found.flops == 2 * (2 * 6 * 4 * 4)
    twice = found.parts[id(model.twice)]
    assert (twice.calls, twice.flops, twice.input, twice.output) == (2, found.flops, "[6, 4]", "[6, 4]")
    assert found.parts[id(model)].output == "y: [6, 4], more: [4]"
    assert id(model.frozen) not in found.parts


@pytest.mark.parametrize("fails", [False, True])
def test_the_forward_leaves_no_trace(fails: bool) -> None:
    """Random states, buffers, modes, gradients and hooks are as before, also when the forward fails."""
    model = Busy(fails)
    buffers, values = dict(model.named_buffers()), {name: b.clone() for name, b in model.named_buffers()}
    states = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].tolist()
    fast = torch.backends.mha.get_fastpath_enabled()
    found = measure(model, CPU)
    assert found.failure == ("forward(example_input) failed with TypeError" if fails else "")
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1:] == (random.getstate(), numpy.random.get_state()[1].tolist())
    assert all(b is buffers[name] and torch.equal(b, values[name]) for name, b in model.named_buffers())
    assert model.training
    assert model.norm.training
    assert not model.frozen.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())
    assert torch.backends.mha.get_fastpath_enabled() is fast


def test_the_forward_of_fused_layers_is_counted() -> None:
    """Recurrent layers and attention count like the matrix products that they are, and stay as fast as they were."""
    lstm: Any = nn.LSTM(16, 32, batch_first=True)
    lstm.example_input = torch.zeros(8, 5, 16)
    assert measure(lstm, CPU).flops == 2 * 8 * 5 * (16 + 32) * 4 * 32
    attention: Any = nn.MultiheadAttention(8, 2, batch_first=True)
    attention.example_input = (torch.zeros(1, 5, 8),) * 3
    assert measure(attention, CPU).flops == 2 * 4 * 5 * 8 * 8 + 2 * 2 * 2 * 5 * 5 * 4
    assert torch.backends.mkldnn.enabled
    assert torch.backends.cudnn.enabled


def test_forms_of_the_example(capsys: pytest.CaptureFixture[str]) -> None:
    """A tuple is the positional arguments, a dict the keywords; what is neither is named, and so is a failing one."""

    class Two(nn.Module):
        example_input: Any = None

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return torch.mm(a, b)

    model = Two()
    assert measure(model, CPU) == Forward()
    for given in ((torch.zeros(2, 3), torch.zeros(3, 4)), {"b": torch.zeros(3, 4), "a": torch.zeros(2, 3)}):
        model.example_input = given
        assert measure(model, CPU).flops == 2 * 2 * 3 * 4
    model.example_input = [1]
    assert "(shapes unknown: example_input is a list; allowed: a tensor, a tuple or a dict of arguments)" in _shown(
        model, capsys
    )
    model.example_input = torch.zeros(1)
    assert _shown(model, capsys) == [
        "0 parameters, 0 trainable, 0 MB",
        "(shapes unknown: forward(example_input) failed with TypeError)",
    ]


def test_shapes_of_many_tensors() -> None:
    """Of many tensors three are shown; what holds none is a dash."""
    assert shapes([torch.zeros(i) for i in range(5)]) == "[0], [1], [2], …"
    assert shapes({"a": None, "b": 3}) == "-"


def test_numbers() -> None:
    """Sizes and operations have three digits and a unit."""
    assert [size(value) for value in (0.0, 5.24e-4, 94.61, 12345.6)] == ["0", "0.000524", "94.6", "12,346"]
    assert [operations(value) for value in (0, 999, 1000, 1_234_567, 5 * 10**17)] == [
        "0 ",
        "999 ",
        "1 k",
        "1.23 M",
        "500,000 T",
    ]
    assert totals_lines(total(nn.Linear(9, 10)), Forward(flops=0))[0].endswith("0 FLOPs for example_input")


@pytest.mark.parametrize("columns", [24, 40, 60, 80, 100, 200])
def test_a_narrow_table_fits(columns: int) -> None:
    """No line is wider than the terminal; the name, the type and the parameters stay, what matters least goes first."""
    cells = {
        "name": "encoder.layers.11.attention.projection",
        "type": "NonDynamicallyQuantizableLinear",
        "input": "[8, 225, 32], [8, 225, 32]",
        "output": "[8, 225, 32], [1, 8, 32]",
        "calls": "",
        "parameters": "123,456",
        "trainable": "123,456",
        "MB": "0.494",
        "FLOPs": "6.22 M",
    }
    header, line = table([cells], columns)
    assert len(header) <= columns
    assert len(line) <= columns
    assert {"name", "type", "parameters"} <= set(header.split())
    assert line.startswith("en")
    assert "123,456" in line
    assert ("input" in header) == (columns == 200)
    assert ("FLOPs" in header) == (columns >= 80)
    assert "calls" not in header


def test_other_processes_print_nothing_but_run_the_forward(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the main process prints; the forward runs on all, since it may wait for the others."""
    model, run, calls = Busy(), FakeRun(), []
    model.register_forward_pre_hook(lambda *given: calls.append(1))
    run.is_main = False
    call(ModelSummary(), "on_fit_start", run=run, model=model)
    assert capsys.readouterr().out == ""
    assert calls == [1]


def test_a_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal the same cells are in a table of its width; brackets in names are no markup, frozen parts dim."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stdout = Terminal()
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("TERM", "xterm-256color")
    model = nn.ModuleDict({"[bold]x": nn.Linear(10, 200).requires_grad_(False), "y" * 60: nn.ReLU()})
    call(ModelSummary(), "on_fit_start", run=FakeRun(), model=model)
    shown = stdout.getvalue()
    for cell in ("[bold]x", "Linear", "2,200", "0.0088", "\x1b[2m[bold]x"):
        assert cell in shown
    assert max(len(line) for line in shown.replace("\x1b", "").splitlines()) <= 40 + len("[1m[0m")


def test_a_summary_changes_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    """A fit with a summary and an example ends with the same weights, to the bit, as one without."""
    ended = []
    for summary in (False, 2):
        model: Any = models.Net()
        model.example_input = torch.randn(2, 4)
        ld.fit(model, models.batches(), max_epochs=1, seed=1, **(models.QUIET | {"summary": summary}))
        ended.append(models.weights(model))
    assert models.equal(*ended)
    assert "FLOPs for example_input" in capsys.readouterr().out


@pytest.mark.parametrize("depth", [-1, 1.5, "1", None])
def test_a_wrong_depth_is_refused(depth: Any) -> None:
    """`depth` must be an integer of at least 0."""
    with pytest.raises(SettingsError, match=r"depth=.*allowed"):
        ModelSummary(depth)
