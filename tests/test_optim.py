"""Optimisation: what configure_optimizers may return, weighted windows, closures, clipping and schedules."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

import lightdeco as ld
from lightdeco.branch import clearing
from lightdeco.closure import Closure
from lightdeco.optim import clip, finite_gradients, monitored, needs_closure, read_optimizers
from lightdeco.windows import Window

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}


def sgd(parameter: Tensor | None = None) -> SGD:
    return SGD([nn.Parameter(torch.zeros(2)) if parameter is None else parameter], lr=0.1)


def halving(optimizer: Optimizer) -> StepLR:
    return StepLR(optimizer, 1, 0.5)


A, B = sgd(), sgd()
SA, SB = halving(A), halving(B)


# ---- what configure_optimizers returns -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (A, {"": ld.Optim(A)}),
        ((A, SA), {"": ld.Optim(A, SA)}),
        ([A, SA], {"": ld.Optim(A, SA)}),
        (ld.Optim(A, SA, "step", 3, "x"), {"": ld.Optim(A, SA, "step", 3, "x")}),
        ([A], {"": ld.Optim(A)}),
        ((A, B), {"0": ld.Optim(A), "1": ld.Optim(B)}),
        ([(A, SA), B], {"0": ld.Optim(A, SA), "1": ld.Optim(B)}),
        (([A], [SA]), {"": ld.Optim(A, SA)}),
        (([A, B], [SA]), {"0": ld.Optim(A, SA), "1": ld.Optim(B)}),
        (([A], []), {"": ld.Optim(A)}),
        (([A], [{"scheduler": SA, "interval": "step"}]), {"": ld.Optim(A, SA, "step")}),
        ({"optimizer": A}, {"": ld.Optim(A)}),
        ({"optimizer": A, "lr_scheduler": SA, "monitor": "m"}, {"": ld.Optim(A, SA, monitor="m")}),
        ({"optimizer": A, "lr_scheduler": None}, {"": ld.Optim(A)}),
        (
            {
                "optimizer": A,
                "lr_scheduler": {"scheduler": SA, "interval": "step", "frequency": 2, "monitor": "m", "name": "n"},
            },
            {"": ld.Optim(A, SA, "step", 2, "m")},
        ),
        ({"gen": A, "disc": (B, SB)}, {"gen": ld.Optim(A), "disc": ld.Optim(B, SB)}),
        ({"gen": {"optimizer": A, "lr_scheduler": SA}}, {"gen": ld.Optim(A, SA)}),
        ({"gen": ld.Optim(A)}, {"gen": ld.Optim(A)}),
    ],
)
def test_every_form(returned: Any, expected: Any) -> None:
    """lightdeco's own forms, Lightning's dict and lists, and names."""
    assert read_optimizers(returned, "here") == expected


@pytest.mark.parametrize(
    ("returned", "said"),
    [
        (None, "returned NoneType, which is no optimizer"),
        (SGD, r"returned SGD \(the class\), which is no optimizer"),
        (SA, "returned StepLR, which is no optimizer"),
        ("adam", "returned str"),
        ([], "returned no optimizer"),
        ({}, "returned no optimizer"),
        (([], []), "returned no optimizer"),
        ((SA, A), "returned StepLR"),
        ((A, StepLR), r"StepLR \(the class\)"),
        ({"optimizer": SGD}, "which is no optimizer"),
        (
            {"optimizer": A, "lr_schedule": SA},
            r"with 'lr_schedule'; allowed: optimizer, .*; did you mean 'lr_scheduler'\?$",
        ),
        (
            {"optimizer": A, "lr_scheduler": {"scheduler": SA, "intervall": "step"}},
            r"allowed: .*; did you mean 'interval'\?$",
        ),
        ({"optimizer": A, "lr_scheduler": StepLR}, r"StepLR \(the class\) as a scheduler"),
        ({"optimizer": A, "lr_scheduler": {"scheduler": 3}}, "int as a scheduler"),
        (([A], [SA, SA]), "1 optimizers and 2 schedulers"),
        ({"a": A, 1: B}, "keys are not all names"),
        ({"": A}, "keys are not all names"),
        ((A, SB), "made for another optimizer"),
        ({"a": (A, SA), "b": (B, SA)}, "made for another optimizer"),
        ({"a": A, "b": A}, "the same optimizer twice"),
        ([A, A], "the same optimizer twice"),
    ],
)
def test_every_wrong_form_is_refused_with_the_place(returned: Any, said: str) -> None:
    """By name of the method, with the nearest key."""
    with pytest.raises(ld.MarkError, match=rf"^Net\.optimizers returned .*{said.removeprefix('returned ')}"):
        read_optimizers(returned, "Net.optimizers")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"optimizer": SGD}, r"Optim\(optimizer=SGD \(the class\)\); allowed: a torch.optim.Optimizer"),
        ({"optimizer": None}, "Optim"),
        ({"scheduler": StepLR}, r"Optim\(scheduler=StepLR \(the class\)\)"),
        ({"scheduler": B}, r"Optim\(scheduler=SGD\)"),
        ({"interval": "epochs"}, r"Optim\(interval='epochs'\); allowed: 'epoch', 'step'; did you mean 'epoch'\?"),
        ({"every": 0}, r"Optim\(every=0\); allowed: an integer of at least 1"),
        ({"every": True}, "every=True"),
        ({"monitor": 3}, r"Optim\(monitor=3\)"),
    ],
)
def test_optim_checks_its_arguments(given: Any, said: str) -> None:
    """At once, where it is written."""
    with pytest.raises(ld.SettingsError, match=said):
        ld.Optim(**{"optimizer": A} | given)


# ---- windows ---------------------------------------------------------------------------------------------------------


def gradient(losses: list[Tensor], weights: list[Any], optimizer: Optimizer, size: int) -> Tensor:
    """The gradient of a window of these micro-batches, the last of which may come early."""
    window = Window(size)
    for i, (loss, weight) in enumerate(zip(losses, weights, strict=True)):
        last = i == len(losses) - 1
        window.scale(loss, weight, last).backward()
        assert window.complete(last) is last
    window.normalise(optimizer)
    grad: Tensor = optimizer.param_groups[0]["params"][0].grad
    return grad


@pytest.mark.parametrize("sizes", [(4, 4), (7, 2, 1), (3,)])
@pytest.mark.parametrize(
    "kind",
    [
        int,
        torch.tensor,
        lambda n: torch.tensor([n]),
        lambda n: torch.tensor([[n]], dtype=torch.float64),
        lambda n: torch.tensor(float(n), requires_grad=True) * 1,
    ],
)
def test_a_window_has_the_gradient_of_the_concatenated_batch(sizes: tuple[int, ...], kind: Any) -> None:
    """Weights may be numbers or tensors of one element; they get no gradient."""
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), 2, dtype=torch.float64)
    one, whole = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    losses = [(part @ one).pow(2).mean() for part in x.split(list(sizes))]
    found = gradient(losses, [kind(n) for n in sizes], sgd(one), size=4)
    (x @ whole).pow(2).mean().backward()
    assert not found.requires_grad
    torch.testing.assert_close(found, whole.grad)


def test_a_window_of_one_scales_nothing() -> None:
    """The loss is the very object that the step returned: a run is bit-equal to a hand-written loop."""
    loss = torch.ones((), requires_grad=True)
    for window, last in ((Window(1), False), (Window(4), True)):
        assert window.scale(loss, 0.3, last) is loss
    assert Window(4).scale(loss, 0.3, False) is not loss


def test_a_window_whose_weights_are_all_zero() -> None:
    """Numbers are refused; tensors, which would have to be read, leave the gradients at 0."""
    parameter = nn.Parameter(torch.ones(2))
    losses = [parameter.sum(), parameter.sum()]
    with pytest.raises(ld.StepError, match='every "weight" of an accumulation window was 0'):
        gradient(losses, [0, 0.0], sgd(parameter), 2)
    parameter.grad = None
    losses = [parameter.sum(), parameter.sum()]
    assert gradient(losses, [torch.zeros(()), 0], sgd(parameter), 2).tolist() == [0.0, 0.0]


def test_accumulation_in_a_run_equals_one_large_batch() -> None:
    """Three batches of unequal size, in windows of two: the second window is one short batch."""

    class Net(nn.Linear):
        @ld.training_step
        def step(self, batch: Tensor) -> Tensor:
            return self(batch).pow(2).mean()

        @ld.configure_optimizers
        def optimizers(self) -> Optimizer:
            return SGD(self.parameters(), lr=0.1)

    torch.manual_seed(0)
    parts = [torch.randn(n, 2) for n in (5, 2, 3)]
    one, other = Net(2, 1), Net(2, 1)
    other.load_state_dict(one.state_dict())
    run = ld.fit(one, parts, **QUIET, accumulate_grad_batches=2)
    ld.fit(other, [torch.cat(parts[:2]), parts[2]], **QUIET)
    assert run.global_step == 2
    torch.testing.assert_close(one.weight, other.weight)


# ---- closures --------------------------------------------------------------------------------------------------------


class Sam(Optimizer):
    """Sharpness-aware minimisation: climb, evaluate again, step from where it began."""

    def __init__(self, parameters: Any, clears: bool) -> None:
        super().__init__(parameters, {"lr": 0.1})
        self.clears = clears

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        parameters = self.param_groups[0]["params"]
        before = [p.clone() for p in parameters]
        for p in parameters:
            p.add_(p.grad, alpha=0.05)
        if self.clears:
            self.zero_grad()
        closure()
        for p, old in zip(parameters, before, strict=True):
            p.copy_(old - 0.1 * p.grad)


class Search(Optimizer):
    """A line search that writes through `.data`, as many an old optimizer does."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 1.0})
        self.losses: list[float] = []

    def step(self, closure: Callable[[], Tensor]) -> None:  # type: ignore[override]
        for _ in range(3):
            self.losses.append(closure().item())
            for p in self.param_groups[0]["params"]:
                p.data.sub_(0.1 * p.grad)


class Quadratic(nn.Module):
    """(w - 3)² of each sample, minimised by the optimizer that a test wants."""

    def __init__(self, make: Callable[[Any], Optimizer]) -> None:
        super().__init__()
        self.w, self.make, self.calls = nn.Parameter(torch.zeros(1)), make, 0

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        self.calls += 1
        return (batch * (self.w - 3)).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> Optimizer:
        self.optimizer = self.make(self.parameters())
        return self.optimizer


def by_hand(make: Callable[[Any], Optimizer], batches: list[Tensor]) -> tuple[Quadratic, list[float]]:
    """The loop of torch's documentation."""
    net, losses = Quadratic(make), []
    optimizer = make(net.parameters())
    for batch in batches:

        def closure(batch: Tensor = batch) -> Tensor:
            optimizer.zero_grad()
            loss = net.step(batch)
            loss.backward()
            return loss

        with torch.enable_grad():
            losses.append(closure().item())
            optimizer.step(torch.enable_grad()(closure))
    return net, losses


@pytest.mark.parametrize(
    "make",
    [
        lambda p: LBFGS(p, lr=0.3, max_iter=5),
        lambda p: LBFGS(p, max_iter=5, line_search_fn="strong_wolfe"),
        lambda p: Sam(p, clears=False),
        lambda p: Sam(p, clears=True),
        Search,
    ],
)
def test_an_optimizer_with_a_closure_does_as_in_the_loop_by_hand(make: Any) -> None:
    """Bit-equal weights; the recorded loss is the first evaluation of each batch, which is not repeated."""
    batches = [torch.tensor([1.0, 2.0]), torch.tensor([0.5, 1.5])]
    net = Quadratic(make)
    run = ld.fit(net, batches, **QUIET, log_every_n_steps=1)
    other, losses = by_hand(make, batches)
    assert torch.equal(net.w, other.w)
    assert [r["train/loss"] for r in run.history if "train/loss" in r] == losses
    assert net.calls <= other.calls
    if isinstance(net.optimizer, LBFGS | Search):
        assert net.calls == other.calls - len(batches)


def test_a_closure_evaluates_anew_only_after_a_change() -> None:
    """The first call costs nothing while nothing changed; every later one evaluates."""
    w = nn.Parameter(torch.ones(()))
    losses = iter([torch.tensor(2.0), torch.tensor(3.0)])
    closure = Closure(sgd(w), torch.tensor(1.0), lambda: next(losses))
    assert [closure().item() for _ in range(3)] == [1.0, 2.0, 3.0]
    with torch.no_grad():
        for change in (lambda: w.add_(1), lambda: setattr(w, "grad", torch.ones(()))):
            closure = Closure(sgd(w), torch.tensor(1.0), lambda: torch.tensor(5.0))
            change()
            assert closure().item() == 5.0


def test_which_optimizers_need_a_closure() -> None:
    """Those whose `step` cannot be called without one."""
    w = [nn.Parameter(torch.ones(1))]
    for optimizer, needs in ((LBFGS(w), True), (Sam(w, True), True), (SGD(w, 0.1), False), (Adam(w), False)):
        halving(optimizer)  # schedulers wrap `step` of the instance
        assert needs_closure(optimizer) is needs


def test_a_closure_refuses_a_window_of_several_batches() -> None:
    """Only the last batch of the window is still known."""
    window = Window(2)
    window.scale(torch.ones(()), 1, False)
    with pytest.raises(ld.StepError, match="set accumulate_grad_batches=1"):
        window.refuse_several("here")
    with pytest.raises(ld.SettingsError, match="accumulate_grad_batches: LBFGS"):
        ld.fit(Quadratic(LBFGS), [torch.ones(2)] * 2, **QUIET, accumulate_grad_batches=2)


# ---- clipping, schedules ---------------------------------------------------------------------------------------------


def test_clipping_by_norm_and_by_value() -> None:
    """The common norm of all groups, and each element; without gradients nothing happens."""
    a, b = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    optimizer = SGD([{"params": [a]}, {"params": [b]}], lr=0.1)
    clip(optimizer, 1.0, "norm")
    for algorithm, expected in (("norm", 5 * 0.8), ("value", 5.0)):
        a.grad, b.grad = torch.tensor([30.0]), torch.tensor([40.0])
        clip(optimizer, 5.0, algorithm)
        assert b.grad.item() == pytest.approx(expected)
    assert bool(finite_gradients(optimizer))
    a.grad = torch.tensor([math.inf])
    assert not bool(finite_gradients(optimizer))


def test_the_metric_of_a_scheduler() -> None:
    """Only who wants one gets one; the default is val/loss, or train/loss without validation."""
    plateau = ReduceLROnPlateau(A)
    assert monitored(ld.Optim(A, SA), {}) is None
    assert monitored(ld.Optim(A, plateau), {"train/loss": 1.0, "val/loss": 2.0}) == 2.0
    assert monitored(ld.Optim(A, plateau), {"train/loss": 1.0}) == 1.0
    assert monitored(ld.Optim(A, plateau, monitor="x"), {"val/loss": 2.0, "x": 3.0}) == 3.0
    with pytest.raises(
        ld.SettingsError, match=r"'val_loss'\) was never recorded; recorded: val/loss; did you mean 'val/loss'\?$"
    ):
        monitored(ld.Optim(A, plateau, monitor="val_loss"), {"val/loss": 2.0})
    with pytest.raises(ld.SettingsError, match="recorded: none yet"):
        monitored(ld.Optim(A, plateau), {})


@pytest.mark.parametrize(
    ("interval", "every", "steps"), [("epoch", 1, 2), ("epoch", 2, 1), ("step", 1, 6), ("step", 4, 1)]
)
def test_a_scheduler_steps_when_it_should(interval: Any, every: int, steps: int) -> None:
    """Counted in epochs or in updates of the optimizer."""

    class Net(Quadratic):
        def optimizers(self) -> Any:
            optimizer = super().optimizers()
            return ld.Optim(optimizer, LambdaLR(optimizer, lambda n: 1 - 0.01 * n), interval, every)

    net = Net(lambda p: SGD(p, lr=1.0))
    ld.fit(net, [torch.ones(2)] * 3, **QUIET | {"max_epochs": 2})
    assert net.optimizer.param_groups[0]["lr"] == pytest.approx(1 - 0.01 * steps)


def test_gradients_are_cleared_as_by_zero_grad() -> None:
    """Of parameters that came after a resume too; and by a `zero_grad` that somebody puts in its place meanwhile."""
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([first], lr=0.1)
    clear = clearing(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.add_param_group({"params": [second]})
    first.grad = second.grad = torch.ones(2)
    clear()
    assert first.grad is None
    assert second.grad is None
    called: list[bool] = []
    optimizer.zero_grad = lambda set_to_none=True: called.append(set_to_none)  # type: ignore[method-assign]
    clear()
    assert called == [True]
