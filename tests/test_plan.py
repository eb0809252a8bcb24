"""Discovery: what a marked method may ask for, and the order of calls; what is refused is in test_wrong_uses.py."""

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2


class Base(nn.Linear):
    """A model that trains; `seen` takes what its tests want to know."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.seen: list[Any] = []

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        return self(batch).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Any, data: Any = BATCHES, **settings: Any) -> ld.Run:
    return ld.fit(model, data, **QUIET | settings)


def with_step(function: Callable[..., Any]) -> Base:
    """A model whose training step is this function."""
    return type("Net", (Base,), {"step": ld.training_step(function)})()


def refusal(model: Any, **settings: Any) -> str:
    """The message with which fit refuses the model, before any batch is read."""

    def batches() -> Iterator[Tensor]:
        raise AssertionError("a batch was read")
        yield

    with pytest.raises(ld.MarkError) as caught:
        fit(model, batches(), **settings)
    return str(caught.value)


# ---- never getattr on the instance -----------------------------------------------------------------------------------


def test_no_property_and_no_getattr_of_the_instance_runs() -> None:
    """Discovery reads class dictionaries: a property that raises and a catch-all __getattr__ are left alone."""

    class Net(Base):
        @property
        def broken(self) -> int:
            raise AssertionError("the property ran")

        def __getattr__(self, name: str) -> Any:
            if name.startswith(("on_", "training", "_lightdeco")):
                raise AssertionError(f"getattr of {name}")
            return super().__getattr__(name)

    assert fit(Net()).global_step == 2


def fresh(function: Any) -> Any:
    """A copy of the function, which carries no mark yet."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__)


def plain(self: object) -> None: ...


# ---- arguments -------------------------------------------------------------------------------------------------------


def test_the_first_parameter_of_a_step_may_have_any_name() -> None:
    """It gets the batch; the others are by name, in any order, keyword-only or positional-only."""
    seen: list[Any] = []

    def one(self: Base, x: Tensor, dataloader_idx: int, batch_idx: int) -> Tensor:
        seen.append((x.shape, dataloader_idx, batch_idx))
        return self(x).mean()

    def two(self: Base, x: Tensor, /, *, batch_idx: int, run: ld.Run) -> Tensor:
        seen.append((x.shape, run.verb, batch_idx))
        return self(x).mean()

    fit(with_step(one))
    fit(with_step(two))
    assert seen == [((4, 2), 0, 0), ((4, 2), 0, 1), ((4, 2), "fit", 0), ((4, 2), "fit", 1)]


def test_run_and_model_are_offered_everywhere() -> None:
    """Also before other arguments, by keyword, and to callbacks."""
    seen: list[Any] = []

    class Note:
        @ld.on_train_batch_end
        def end(self, model: nn.Module, outputs: Any, run: ld.Run, batch_idx: int) -> None:
            seen.append((run.model is model, outputs.requires_grad, batch_idx))

        @ld.setup
        def setup(self, run: ld.Run, stage: str, *, model: nn.Module) -> None:
            seen.append((run.model is model, stage))

    class Net(Base):
        @ld.configure_optimizers
        def optimizers(self, model: nn.Module, run: ld.Run) -> torch.optim.Optimizer:
            assert (model, run.model) == (self, self)
            return super().optimizers()

        def step(self, model: nn.Module, batch: Tensor, run: ld.Run) -> Tensor:  # type: ignore[override]
            assert (model, run.model) == (self, self)
            return self(batch).mean().abs()

    fit(Net(), callbacks=[Note()])
    assert seen == [(True, "fit"), (True, True, 0), (True, True, 1)]


def test_defaults_keep_their_value_and_offered_names_are_given() -> None:
    """A default of a name that no role offers stays; what follows it is given by keyword."""

    def step(self: Base, batch: Tensor, factor: float = 3.0, batch_idx: int = -1) -> Tensor:
        self.seen.append((factor, batch_idx))
        return self(batch).mean()

    fit(net := with_step(step))
    assert net.seen == [(3.0, 0), (3.0, 1)]


def test_keywords_take_all_that_is_offered() -> None:
    """`**kwargs` gets every argument of the role that has no parameter of its own; `*args` gets nothing."""

    def step(self: Base, x: Tensor, *args: Any, batch_idx: int, **rest: Any) -> Tensor:
        assert not args
        self.seen.append(sorted(rest))
        return self(x).mean()

    def everything(*args: Any, **kwargs: Any) -> Tensor:
        (self,) = args
        self.seen.append(sorted(kwargs))
        return self(kwargs["batch"]).mean()

    fit(net := with_step(step))
    assert net.seen == [["carry", "dataloader_idx", "model", "run"]] * 2
    fit(net := with_step(everything))
    assert net.seen == [["batch", "batch_idx", "carry", "dataloader_idx", "model", "run"]] * 2


def test_an_argument_beside_the_one_that_it_resembles_does_not_warn() -> None:
    """Whoever asks for `model` as well knows its name; other defaults are the author's own."""

    def step(self: Base, batch: Tensor, model: nn.Module, models: int = 3, weight: float = 1.0) -> Tensor:
        return self(batch).mean() * models * weight

    assert fit(with_step(step)).global_step == 2


# ---- the order of calls ----------------------------------------------------------------------------------------------


def test_the_model_comes_before_the_data_object_and_the_callbacks() -> None:
    """Also for an event that all of them carry, and with each object once even if the model is the data object."""
    calls: list[str] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        @ld.on_train_start
        def start(self) -> None:
            calls.append(self.name)

    class Data(Noted):
        @ld.train_dataloader
        def batches(self) -> list[Tensor]:
            return BATCHES

    class Net(Base):
        @ld.on_train_start
        def start(self) -> None:
            calls.append("model")

        @ld.configure_callbacks
        def callbacks(self) -> Noted:
            return Noted("the model's callback")

    class Both(Net):
        @ld.train_dataloader
        def batches(self) -> list[Tensor]:
            return BATCHES

    fit(Net(), Data("data"), callbacks=[Noted("first"), Noted("second")])
    assert calls == ["model", "data", "the model's callback", "first", "second"]
    calls.clear()
    both = Both()
    fit(both, both)
    assert calls == ["model", "the model's callback"]


def test_each_hook_before_a_transfer_may_replace_the_batch() -> None:
    """The model's comes first; one that returns nothing leaves the batch as it is."""

    class Plus:
        @ld.on_before_batch_transfer
        def plus(self, batch: Tensor) -> Tensor:
            return batch + 1

    class Net(Base):
        @ld.on_before_batch_transfer
        def times(self, batch: Tensor) -> Tensor:
            return batch * 10

        @ld.on_after_batch_transfer
        def look(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> None:
            self.seen.append((batch[0, 0].item(), device.type, dataloader_idx))

    fit(net := Net(), callbacks=[Plus()], accelerator="cpu")
    assert net.seen == [(11, "cpu", 0)] * 2


@pytest.mark.parametrize("first", [True, False])
def test_skip_epoch_wins_over_what_other_events_return(first: bool) -> None:
    """It is the only result of an event that means something; every event is still called."""

    class Skipping(Base):
        @ld.on_train_batch_start
        def one(self) -> Any:
            self.seen.append("one")
            return ld.SKIP_EPOCH if first else "other"

        @ld.on_train_batch_start
        def two(self) -> Any:
            self.seen.append("two")
            return "other" if first else ld.SKIP_EPOCH

    class Loud(Base):
        @ld.on_train_batch_start
        def one(self) -> Any:
            return "other"

    assert fit(net := Skipping()).global_step == 0
    assert net.seen == ["one", "two"]
    assert fit(Loud()).global_step == 2
