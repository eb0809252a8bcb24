"""`compile=`: the forward is compiled, nothing else changes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import lightdeco as ld
from tests.models import QUIET, Net, batches

EAGER: Any = {"backend": "aot_eager", "fullgraph": True}  # no compiler is run: traces and graphs alone


class Logging(nn.Module):
    """Logs in its forward and in its steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        ld.log("hidden", hidden.mean())
        ld.log("constant", 2.0)
        return self.second(hidden)

    @ld.training_step
    def step(self, batch: Any) -> Any:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        ld.log("in_step", loss)
        return {"loss": loss, "twice": 2 * loss}

    @ld.validation_step
    def check(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]), batch[1])

    @ld.configure_optimizers
    def optimizer(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: nn.Module, **settings: Any) -> ld.Run:
    return ld.fit(model, (batches(6), batches(2)), **(QUIET | {"max_epochs": 2, "log_every_n_steps": 2} | settings))


@pytest.mark.parametrize("options", [EAGER, {"fullgraph": True}], ids=["traced", "inductor"])
def test_results_and_records_agree_with_eager(options: Any) -> None:
    """With `fullgraph=True`: no graph break comes from us, logging in the forward included; names stay."""
    torch._dynamo.reset()
    eager, compiled = Logging(), Logging()
    expected, found = fit(eager), fit(compiled, compile=options)
    assert list(compiled.state_dict()) == list(eager.state_dict())
    for a, b in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    for record, other in zip(found.history, expected.history, strict=True):
        assert record.pop("stage") == other.pop("stage")
        assert record | {"time": 0} == pytest.approx(other | {"time": 0}, rel=1e-4)
    assert {"hidden", "constant", "in_step", "train/twice"} <= found.metrics.keys()
    assert compiled._compiled_call_impl is None, "put back"


def test_the_forward_is_compiled_and_the_marks_are_not() -> None:
    """The backend sees the graph of the forward; Python of the step runs every time."""
    torch._dynamo.reset()
    graphs: list[Any] = []
    steps: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    class Counting(Net):
        @ld.training_step
        def step(self, batch: Any) -> Tensor:
            steps.append(1)
            return F.cross_entropy(self(batch[0]), batch[1])

    ld.fit(Counting(), batches(5), max_epochs=1, compile={"backend": backend}, **QUIET)
    assert len(graphs) == 1
    assert len(steps) == 5
    assert not any("cross_entropy" in node.name for node in graphs[0].graph.nodes)


def test_without_a_forward_the_submodules_are_compiled() -> None:
    """A model whose steps call `self.net(x)`."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 3))

        @ld.training_step
        def step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        @ld.configure_optimizers
        def optimizer(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch._dynamo.reset()
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    ld.fit(Outer(), batches(2), max_epochs=1, compile={"backend": backend}, **QUIET)
    assert len(graphs) == 1


def test_a_compile_without_effect_warns() -> None:
    """The model has a forward, but the step goes round it."""

    class Around(Net):
        @ld.training_step
        def step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.forward(batch[0]), batch[1])

    with pytest.warns(ld.LightdecoWarning, match=r"compile had no effect: nothing called Around as a function"):
        ld.fit(Around(), batches(2), max_epochs=1, compile=EAGER, **QUIET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fullgrap": True}, r"compile has the option 'fullgrap'; .* did you mean 'fullgraph'"),
        ({"backend": "inducto"}, "compile=.*refused by torch"),
        ({"mode": "default", "options": {}}, "compile=.*refused by torch"),
    ],
)
def test_wrong_options_are_refused(options: Any, message: str) -> None:
    """Before the first batch; the model is as before."""
    model = Net()
    with pytest.raises(ld.SettingsError, match=message):
        ld.fit(model, batches(2), max_epochs=1, compile=options, **QUIET)
    assert model._compiled_call_impl is None


def test_a_graph_break_of_the_user_is_the_users_error() -> None:
    """`fullgraph=True` refuses what the user's own forward does; the error passes unchanged."""

    class Breaking(Net):
        def forward(self, x: Tensor) -> Tensor:
            torch._dynamo.graph_break()
            return super().forward(x)

    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        ld.fit(Breaking(), batches(2), max_epochs=1, compile=EAGER, **QUIET)
