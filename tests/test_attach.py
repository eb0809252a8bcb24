"""`ld.attach`: roles for classes and instances that one does not own; what it refuses is in test_wrong_uses.py."""

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2


def step(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).pow(2).mean()
    return loss


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


ROLES: Any = {"training_step": step, "configure_optimizers": sgd}


class Foreign(nn.Linear):
    """A class that nobody decorated."""

    def __init__(self) -> None:
        super().__init__(2, 1)


class Own(Foreign):
    """A class with marks."""

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        raise AssertionError("attached functions come before marked ones")

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Any, **settings: Any) -> ld.Run:
    return ld.fit(model, BATCHES, **QUIET | settings)


# ---- what it does ----------------------------------------------------------------------------------------------------


def test_an_instance_with_attached_roles_trains_and_is_returned() -> None:
    """Functions and lambdas get the object first, the rest by name; other instances of the class have no roles."""
    seen: list[Any] = []
    model = nn.Linear(2, 1)
    attached = ld.attach(
        model,
        training_step=lambda m, x, batch_idx, run: (seen.append((batch_idx, run.verb, m is model)), step(m, x))[1],
        configure_optimizers=sgd,
    )
    assert attached is model
    assert fit(model).global_step == 2
    assert seen == [(0, "fit", True), (1, "fit", True)]
    with pytest.raises(ld.MarkError, match="Linear marks none"):
        fit(nn.Linear(2, 1))


def test_a_class_with_attached_roles_gives_them_to_instances_and_subclasses() -> None:
    """A subclass and an instance may attach others, which count instead."""
    seen: list[str] = []

    class Mine(Foreign): ...

    class Child(Mine): ...

    def noted(name: str) -> Any:
        return lambda m, batch: (seen.append(name), step(m, batch))[1]

    assert ld.attach(Mine, **ROLES | {"training_step": noted("Mine")}) is Mine
    fit(Mine())
    fit(Child())
    ld.attach(Child, training_step=noted("Child"))
    fit(Child())
    fit(ld.attach(Child(), training_step=noted("instance")))
    fit(Mine())
    assert seen == ["Mine"] * 4 + ["Child"] * 2 + ["instance"] * 2 + ["Mine"] * 2


def test_an_attached_role_comes_before_the_marked_one() -> None:
    """The marked method is not called, and other marks of the same method stay."""

    class Both(Own):
        @ld.training_step
        @ld.validation_step
        def step(self, batch: Tensor) -> Tensor:
            assert not self.training
            return step(self, batch)

    assert fit(ld.attach(Own(), training_step=step)).global_step == 2
    run = ld.fit(ld.attach(Both(), training_step=step), (BATCHES, BATCHES), **QUIET)
    assert {"train/loss", "val/loss"} <= set(run.metrics)


def test_a_method_called_like_the_attached_role_keeps_its_other_marks() -> None:
    """Names of methods and names of roles do not get in each other's way."""

    class Odd(Own):
        step = None  # type: ignore[assignment]

        @ld.validation_step
        def training_step(self, batch: Tensor) -> Tensor:
            return step(self, batch)

    run = ld.fit(ld.attach(Odd(), training_step=step), (BATCHES, BATCHES), **QUIET)
    assert {"train/loss", "val/loss"} <= set(run.metrics)


def test_events_add_up_marked_ones_first_then_class_then_instance() -> None:
    """Also when a marked method is called like the event, and in lists."""
    calls: list[str] = []

    class Net(Own):
        @ld.on_fit_start
        def on_fit_start(self) -> None:
            calls.append("marked")

    def note(name: str) -> Any:
        return lambda m: calls.append(name)

    ld.attach(Net, training_step=step, on_fit_start=[note("class 0"), note("class 1")])
    net = ld.attach(Net(), on_fit_start=note("instance"))
    fit(net)
    assert calls == ["marked", "class 0", "class 1", "instance"]
    calls.clear()
    ld.attach(net, on_fit_start=[note("other 0"), note("other 1")])  # a cell that is run again does not double events
    fit(net)
    assert calls == ["marked", "class 0", "class 1", "other 0", "other 1"]


def test_an_attached_function_may_bring_its_options() -> None:
    """`ld.on(…, every=2)` around the function counts; a mark on the function for another role does not."""
    seen: list[int] = []
    every = ld.on("train_batch_end", every=2)(lambda m, batch_idx: seen.append(batch_idx))
    fit(ld.attach(Foreign(), **ROLES, on_train_batch_end=every))
    assert seen == [1]


def test_partials_callable_objects_and_bound_methods_may_be_attached() -> None:
    """Whatever can be called and has a signature."""
    from functools import partial

    class Step:
        def __call__(self, model: nn.Module, batch: Tensor) -> Tensor:
            return step(model, batch)

        def bound(self, model: nn.Module, batch: Tensor) -> Tensor:
            return step(model, batch)

    def factor(model: nn.Module, batch: Tensor, factor: float) -> Tensor:
        return step(model, batch) * factor

    for function in (Step(), Step().bound, partial(factor, factor=2.0)):
        assert fit(ld.attach(Foreign(), training_step=function, configure_optimizers=sgd)).global_step == 2


def test_callbacks_and_data_objects_take_attached_functions() -> None:
    """An object without a marked method becomes a callback, or data."""

    class Plain: ...

    calls: list[str] = []
    callback = ld.attach(Plain(), on_train_start=lambda thing, run: calls.append(run.verb))
    data = ld.attach(Plain(), train_dataloader=lambda thing: BATCHES)
    run = ld.fit(ld.attach(Foreign(), **ROLES), data, callbacks=[callback], **QUIET)
    assert (run.global_step, calls) == (2, ["fit"])


# ---- what it leaves alone --------------------------------------------------------------------------------------------


def test_state_dict_and_the_other_attributes_stay() -> None:
    """Weights are saved as before; parameters, buffers and submodules are the same."""
    model = Foreign()
    before, keys = list(model.state_dict()), set(vars(model))
    ld.attach(model, **ROLES)
    assert list(model.state_dict()) == before
    assert set(vars(model)) - keys == {"_lightdeco_attached"}
    Foreign().load_state_dict(model.state_dict())


def test_deepcopy_keeps_the_roles_of_its_own() -> None:
    """A copy trains by itself; attaching to it leaves the original alone, and so does a shallow copy."""
    model = ld.attach(Foreign(), **ROLES)
    for other in (copy.deepcopy(model), copy.copy(model)):
        ld.attach(other, on_fit_start=lambda m: pytest.fail("called"))
        assert fit(model).global_step == 2
    assert fit(copy.deepcopy(model)).global_step == 2


def test_pickle_leaves_the_functions_out() -> None:
    """Also lambdas, which pickle refuses; the object that comes back has no role."""
    model = ld.attach(nn.Linear(2, 1), training_step=lambda m, batch: step(m, batch), configure_optimizers=sgd)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        assert b"lightdeco." not in pickle.dumps(model, protocol)
    again = pickle.loads(pickle.dumps(model))
    with pytest.raises(ld.MarkError, match="Linear marks none"):
        fit(again)
    assert fit(ld.attach(again, **ROLES)).global_step == 2
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False).weight, model.weight)


def test_a_pickled_object_loads_without_lightdeco() -> None:
    """In a process where `import lightdeco` fails."""
    data = pickle.dumps(ld.attach(nn.Linear(2, 1), **ROLES))
    code = (
        "import sys, pickle; sys.modules['lightdeco'] = None\n"
        f"model = pickle.loads({data!r}); print(type(model).__name__, model._lightdeco_attached)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.split() == ["Linear", "{}"], result.stderr
