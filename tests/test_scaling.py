"""fp16's loss scaling: an update whose gradients overflow is left out, and moves nothing but the factor.

The scaler really works on the CPU, in float32: the tests switch it on where a CUDA device with fp16 would.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR

import lightdeco as ld
from lightdeco import scaling
from lightdeco.scaling import Scaler
from tests.models import QUIET, Net, batches, equal, weights


@pytest.fixture
def scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "wanted", lambda precision: True)


class Overflowing(Net):
    """Whose gradients are infinite at some batches, while the loss is finite."""

    def __init__(self, bad: tuple[int, ...] = (), dropout: float = 0.5, **options: Any) -> None:
        super().__init__(dropout=dropout)
        self.bad, self.options = bad, options
        self.rates: list[float] = []
        self.steps: list[int] = []

    @ld.training_step
    def step(self, batch: Any, run: ld.Run) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if run.progress.micro_batch in self.bad:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    @ld.configure_optimizers
    def adam(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return ld.Optim(optimizer, StepLR(optimizer, 1, 0.5), **{"interval": "step", **self.options})

    @ld.on_train_batch_end
    def look(self, run: ld.Run) -> None:
        self.rates.append(run.optims[""].optimizer.param_groups[0]["lr"])
        self.steps.append(run.global_step)


def fit(model: nn.Module, data: Any = None, **settings: Any) -> ld.Run:
    given = QUIET | {"max_epochs": 1, "seed": 2, "checkpoint": False} | settings
    return ld.fit(model, data or batches(4), **given)


@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}, {"oom": "micro"}])
def test_scaling_by_a_power_of_two_changes_no_bit(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an overflow the weights are those of a run without a scaler, clipped gradients too."""
    plain, other = Overflowing(), Overflowing()
    fit(plain, max_epochs=2, **settings)
    monkeypatch.setattr(scaling, "wanted", lambda precision: True)
    run = fit(other, max_epochs=2, **settings)
    assert equal(weights(plain), weights(other))
    assert run.progress.skipped_updates == 0


@pytest.mark.usefixtures("scaled")
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 1.0}, {"on_nan": "skip"}], ids=str)
def test_an_overflow_moves_neither_weights_nor_scheduler_nor_step(settings: Any) -> None:
    """The very first update and a later one are left out and counted; torch has nothing to warn of."""
    model = Overflowing((0, 2))
    run = fit(model, **settings)
    assert model.steps == [0, 1, 1, 2]
    assert model.rates == [0.1, 0.05, 0.05, 0.025]
    assert run.progress.skipped_updates == 2
    assert all(torch.isfinite(each).all() for each in weights(model))


@pytest.mark.usefixtures("scaled")
def test_a_window_with_an_overflow_is_left_out_as_a_whole() -> None:
    """The next window begins anew."""
    model = Overflowing((1,))
    run = fit(model, accumulate_grad_batches=2)
    assert model.steps == [0, 0, 0, 1]
    assert run.progress.skipped_updates == 1


@pytest.mark.usefixtures("scaled")
def test_an_epoch_without_an_update_goes_on_while_the_factor_falls() -> None:
    """A scheduler by epoch steps without a warning; only where the factor is below 1 the run is given up."""
    model = Overflowing((0, 1, 2, 3), interval="epoch")
    run = fit(model, max_epochs=2)
    assert (run.global_step, run.progress.skipped_updates) == (4, 4)
    with pytest.raises(ld.StepError, match="precision='32-true' left out every update of epoch 4"):
        fit(Overflowing(tuple(range(100))), max_steps=1, max_epochs=None)


@pytest.mark.usefixtures("scaled")
def test_each_optimizer_has_a_factor_of_its_own() -> None:
    """The overflow of one leaves out its update alone."""

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 1), nn.Linear(4, 1)

        @ld.training_step(optimizer="a")
        def first(self, batch: Any, batch_idx: int) -> Tensor:
            loss = self.a(batch[0]).square().mean()
            if batch_idx == 1:
                loss.register_hook(lambda grad: grad * float("nan"))
            return loss

        @ld.training_step(optimizer="b")
        def second(self, batch: Any) -> Tensor:
            return self.b(batch[0]).square().mean()

        @ld.backward
        def own(self, loss: Tensor) -> None:
            loss.backward()

        @ld.configure_optimizers
        def make(self) -> Any:
            found = {name: torch.optim.SGD(getattr(self, name).parameters(), 0.1) for name in ("a", "b")}
            return {name: ld.Optim(o, StepLR(o, 1, 0.5), interval="step") for name, o in found.items()}

        @ld.on_fit_end
        def look(self, run: ld.Run) -> None:
            self.rates = {name: optim.optimizer.param_groups[0]["lr"] for name, optim in run.optims.items()}

    model = Two()
    run = fit(model)
    assert run.progress.updates == {"a": 3, "b": 4}
    assert model.rates == {"a": 0.1 * 0.5**3, "b": 0.1 * 0.5**4}
    assert run.global_step == 4


@pytest.mark.usefixtures("scaled")
def test_a_resumed_run_goes_on_with_its_factor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The factor after an overflow is saved and restored, and the weights are bit-equal."""
    made: list[Scaler] = []
    begin = Scaler.__init__
    monkeypatch.setattr(Scaler, "__init__", lambda self, *given: (begin(self, *given), made.append(self))[0])
    given: Any = {"root_dir": tmp_path, "checkpoint": True, "max_epochs": 3}
    whole, parts, again = Overflowing((1, 6)), Overflowing((1, 6)), Overflowing((1, 6))
    fit(whole, name="whole", **given)
    fit(parts, name="parts", **given | {"max_epochs": None, "max_steps": 3})
    fit(again, name="parts", resume="last", **given)
    assert equal(weights(whole), weights(again))
    assert [scaler.factor for scaler in made] == [2.0**14, 2.0**15, 2.0**14]


class Driven(Overflowing):
    """The same by hand, with clipping."""

    @ld.training_step(manual=True)
    def step(self, batch: Any, run: ld.Run) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        if run.progress.micro_batch in self.bad:
            loss.register_hook(lambda grad: grad * float("inf"))
        optimizer, scheduler = ld.optimizers(), ld.schedulers()
        optimizer.zero_grad()
        ld.backward(loss)
        ld.clip_gradients(optimizer, 0.1)
        before = run.global_step
        optimizer.step()
        if run.global_step > before:
            scheduler.step()
        return loss

    @ld.configure_optimizers
    def adam(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return optimizer, StepLR(optimizer, 1, 0.5)


@pytest.mark.usefixtures("scaled")
def test_a_manual_step_is_scaled_as_an_automatic_one() -> None:
    """Same weights, same updates left out, same counts."""
    automatic, manual = Overflowing(bad=(1,)), Driven(bad=(1,))
    manual.load_state_dict(automatic.state_dict())
    left = [fit(model, gradient_clip_val=0.1 if model is automatic else None) for model in (automatic, manual)]
    assert equal(weights(automatic), weights(manual))
    assert [run.progress.skipped_updates for run in left] == [1, 1]
    assert manual.steps == automatic.steps == [1, 1, 2, 3]
    assert manual.rates == automatic.rates


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}])
def test_scaling_a_manual_step_changes_no_bit(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are divided before they are clipped, once, with accumulation too."""
    plain, scaled_ = Driven(), Driven()
    scaled_.load_state_dict(plain.state_dict())
    fit(plain, **settings)
    monkeypatch.setattr(scaling, "wanted", lambda precision: True)
    fit(scaled_, **settings)
    assert equal(weights(plain), weights(scaled_))


class Pair(nn.Module):
    """Two optimizers in one manual step; the gradients of one are infinite at batch 1."""

    def __init__(self, bad: int = -1) -> None:
        super().__init__()
        self.a, self.b, self.bad = Net(), Net(), bad

    @ld.training_step(manual=True)
    def step(self, batch: Any, run: ld.Run) -> None:
        for name, net in (("a", self.a), ("b", self.b)):
            optimizer = ld.optimizers()[name]
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch[0]), batch[1])
            if name == "b" and run.progress.micro_batch == self.bad:
                loss.register_hook(lambda grad: grad * float("inf"))
            ld.backward(loss, optimizer)
            ld.clip_gradients(optimizer, 0.1)
            optimizer.step()

    @ld.configure_optimizers
    def two(self) -> Any:
        return {"a": torch.optim.SGD(self.a.parameters(), 0.1), "b": torch.optim.SGD(self.b.parameters(), 0.1)}


def test_each_optimizer_of_a_manual_step_has_a_scaler_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What overflows for one leaves the other's gradients true; its own update is the one left out."""
    plain, whole, bad = Pair(), Pair(), Pair(bad=1)
    for model in (whole, bad):
        model.load_state_dict(plain.state_dict())
    fit(plain)
    monkeypatch.setattr(scaling, "wanted", lambda precision: True)
    fit(whole)
    run = fit(bad)
    assert equal(weights(plain), weights(whole))
    assert equal(weights(plain.a), weights(bad.a))
    assert not equal(weights(plain.b), weights(bad.b))
    assert run.progress.skipped_updates == 1
    assert run.global_step == 4  # the other optimizer made its updates


@pytest.mark.usefixtures("scaled")
def test_a_manual_run_that_is_resumed_goes_on_with_its_factors(tmp_path: Path) -> None:
    """The factor halves at the bad batch before and after the interruption."""
    whole, again = Driven(bad=(1, 5)), Driven(bad=(1, 5))
    again.load_state_dict(whole.state_dict())
    given: dict[str, Any] = {"root_dir": tmp_path, "checkpoint": True}
    fit(whole, max_epochs=2, name="whole", **given)
    fit(again, max_epochs=1, name="parts", **given)
    run = fit(again, max_epochs=2, name="parts", resume="last", **given)
    assert equal(weights(whole), weights(again))
    assert run.progress.skipped_updates == 2


class Sharp(Net):
    """Sharpness-aware: the closure is evaluated anew at other weights; its first time may overflow."""

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad, self.evaluations = bad, 0

    @ld.training_step
    def step(self, batch: Any) -> Tensor:
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.evaluations += 1
        if self.bad and self.evaluations == 2:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    @ld.optimizer_step
    def sam(self, optimizer: Any, closure: Any) -> None:
        closure()
        moves = [0.05 * p.grad for p in self.parameters()]
        with torch.no_grad():
            for p, move in zip(self.parameters(), moves, strict=True):
                p.add_(move)
        closure()
        with torch.no_grad():
            for p, move in zip(self.parameters(), moves, strict=True):
                p.sub_(move)
        optimizer.step()


class Newton(Net):
    """LBFGS evaluates its closure as often as it likes."""

    @ld.configure_optimizers
    def adam(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


@pytest.mark.parametrize(("kind", "options"), [(Sharp, {}), (Sharp, {"bad": True}), (Newton, {})])
def test_a_closure_gets_true_gradients(kind: Any, options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every evaluation is scaled and unscaled; one that overflows is made again with half the factor."""
    plain, scaled_ = kind(), kind(**options)
    scaled_.load_state_dict(plain.state_dict())
    fit(plain, gradient_clip_val=0.5)
    monkeypatch.setattr(scaling, "wanted", lambda precision: True)
    run = fit(scaled_, gradient_clip_val=0.5)
    assert equal(weights(plain), weights(scaled_))
    assert run.progress.skipped_updates == 0
    if kind is Sharp:
        assert scaled_.evaluations == plain.evaluations + len(options)


@pytest.mark.usefixtures("scaled")
def test_what_cannot_be_scaled_is_refused() -> None:
    """In a manual step: gradients not from `ld.backward`, a closure, a loss of nobody knows which optimizer."""

    class Own(Driven):
        @ld.training_step(manual=True)
        def step(self, batch: Any) -> None:
            F.cross_entropy(self(batch[0]), batch[1]).backward()
            ld.optimizers().step()

    class Closed(Driven):
        @ld.training_step(manual=True)
        def step(self, batch: Any) -> None:
            ld.backward(F.cross_entropy(self(batch[0]), batch[1]))
            ld.optimizers().step(lambda: None)

    class Unknown(Pair):
        @ld.training_step(manual=True)
        def step(self, batch: Any) -> None:
            ld.backward(F.cross_entropy(self.a(batch[0]), batch[1]))

    with pytest.raises(ld.StepError, match=r"gradients must come from ld\.backward, which scales the loss"):
        fit(Own())
    with pytest.raises(ld.StepError, match=r"optimizer\.step\(closure\) in a manual step cannot go with"):
        fit(Closed())
    with pytest.raises(ld.StepError, match=r"several optimizers, call ld\.backward\(loss, optimizer\)"):
        fit(Unknown())


@pytest.mark.parametrize(("precision", "instead"), [("16-mixed", "bf16-mixed"), ("16-true", "bf16-true")])
def test_on_a_cpu_fp16_is_refused(precision: Any, instead: str) -> None:
    """With the reason, and what to use."""
    with pytest.raises(ld.SettingsError, match=f"needs a CUDA device, and this run is on 'cpu'.*use '{instead}'"):
        fit(Net(), precision=precision, accelerator="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["16-mixed", "16-true"])
@pytest.mark.filterwarnings("ignore:precision='16-true' does not scale")
def test_fp16_on_a_device(precision: Any) -> None:
    """The loss goes down, in the dtype that was asked for."""
    model = Overflowing(dropout=0.0, interval="epoch")
    run = fit(model, max_epochs=5, precision=precision, accelerator="cuda")
    losses = [record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record]
    assert losses[-1] < losses[0]
