"""Manual training steps: the user drives the optimizers; clipping, accumulation and counting still apply."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import StepLR

import lightdeco as ld
from lightdeco import seeds
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from tests.models import QUIET, equal, weights

SEED = 11


def data(sizes: tuple[int, ...] = (8, 8, 8, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


def fit(model: nn.Module, batches: Any = None, **settings: Any) -> ld.Run:
    return ld.fit(model, batches or data(), **(QUIET | {"max_epochs": 2, "seed": SEED} | settings))


class Base(nn.Module):
    """Two nets with an optimizer each; subclasses train them."""

    def __init__(self, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.gen, self.disc = nn.Linear(3, 6), nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.2), nn.Linear(8, 1))
        self.lr = lr

    def disc_loss(self, batch: Tensor) -> Tensor:
        return F.softplus(-self.disc(batch)).mean() + F.softplus(self.disc(self.gen(torch.randn(len(batch), 3)))).mean()

    def gen_loss(self, batch: Tensor) -> Tensor:
        return F.softplus(-self.disc(self.gen(torch.randn(len(batch), 3)))).mean()

    @ld.configure_optimizers
    def make(self) -> Any:
        gen, disc = Adam(self.gen.parameters(), self.lr), SGD(self.disc.parameters(), self.lr)
        return {"gen": ld.Optim(gen, StepLR(gen, 3, 0.5)), "disc": disc}


class Manual(Base):
    """The usual form, with everything that there is."""

    @ld.training_step(manual=True)
    def step(self, batch: Tensor) -> Any:
        found, made = ld.optimizers(), {}
        assert isinstance(found, dict)
        for name, loss_of in (("disc", self.disc_loss), ("gen", self.gen_loss)):
            optimizer = found[name]
            made[name] = loss_of(batch)
            optimizer.zero_grad()
            ld.backward(made[name])
            ld.clip_gradients(optimizer)
            optimizer.step()
        ld.schedulers()["gen"].step()
        return {"loss": made["gen"], "disc": made["disc"]}


class Marked(Base):
    """The same without manual code."""

    @ld.training_step(optimizer="disc")
    def first(self, batch: Tensor) -> Tensor:
        return self.disc_loss(batch)

    @ld.training_step(optimizer="gen")
    def second(self, batch: Tensor) -> Tensor:
        return self.gen_loss(batch)

    def make(self) -> Any:
        found = super().make()
        return found | {"gen": ld.Optim(found["gen"].optimizer, found["gen"].scheduler, "step")}


def by_hand(model: Base, batches: list[Tensor], clip: float | None) -> None:
    found = model.make()
    gen, scheduler, disc = found["gen"].optimizer, found["gen"].scheduler, found["disc"]
    for k, batch in enumerate(batches):
        torch.manual_seed(seeds.step_seed(SEED, 0, k))
        for optimizer, loss_of in ((disc, model.disc_loss), (gen, model.gen_loss)):
            loss = loss_of(batch)
            optimizer.zero_grad()
            loss.backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], clip)
            optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("clip", [None, 0.05])
def test_manual_is_bit_equal_to_the_loop_by_hand_and_to_marked_steps(clip: float | None) -> None:
    """Clipping comes from the settings; a batch that stepped two optimizers counts once."""
    ours, theirs, marked = Manual(), Base(), Marked()
    run = fit(ours, gradient_clip_val=clip)
    by_hand(theirs, data() * 2, clip)
    fit(marked, gradient_clip_val=clip)
    assert equal(weights(ours), weights(theirs))
    assert equal(weights(ours), weights(marked))
    assert (run.global_step, run.epoch) == (10, 2)
    assert {"train/loss", "train/disc"} <= set(run.metrics)


def test_global_step_counts_batches_in_which_something_stepped() -> None:
    """Several steps in one batch count once, a batch without one not at all; max_steps counts the same."""

    class Sometimes(Base):
        @ld.training_step(manual=True)
        def step(self, batch: Tensor, batch_idx: int) -> None:
            if batch_idx % 2 == 0:
                for optimizer in ld.optimizers().values():  # type: ignore[union-attr]
                    optimizer.zero_grad()
                    ld.backward(self.gen_loss(batch))
                    optimizer.step()

    run = fit(Sometimes())
    assert run.global_step == 6
    assert "train/loss" not in run.metrics
    assert fit(Sometimes(), max_epochs=None, max_steps=4).epoch == 1


class Single(Base):
    """One optimizer; the gradients that it was stepped with are kept."""

    def __init__(self, after: bool = False) -> None:
        super().__init__(lr=0.0)
        self.after, self.kept = after, list[Tensor]()

    def loss(self, batch: Tensor) -> Tensor:
        return self.gen(batch[:, :3]).square().mean()

    @ld.training_step(manual=True)
    def step(self, batch: Tensor) -> Tensor:
        optimizer = ld.optimizers()
        assert isinstance(optimizer, Optimizer)
        loss = self.loss(batch)
        if not self.after:
            optimizer.zero_grad()
        ld.backward(loss)
        ld.clip_gradients(optimizer)
        optimizer.step()
        if self.after:
            optimizer.zero_grad()
        return loss

    @ld.on_before_optimizer_step
    def keep(self, optimizer: Optimizer) -> None:
        assert self.gen.weight.grad is not None
        self.kept.append(self.gen.weight.grad.clone())

    def make(self) -> Any:
        return SGD(self.gen.parameters(), 0.0)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_accumulation_in_a_manual_step(after: bool, clip: float | None) -> None:
    """Weighted by samples, the short last window included, clipped once, cleared first or last."""
    batches = data((8, 5, 7, 3, 8))
    model = Single(after)
    run = fit(model, batches, max_epochs=2, accumulate_grad_batches={0: 2, 1: 1}, gradient_clip_val=clip)
    windows = [[0, 1], [2, 3], [4], [0], [1], [2], [3], [4]]
    assert run.global_step == len(model.kept) == len(windows)
    for kept, window in zip(model.kept, windows, strict=True):
        parameters = list(model.gen.parameters())
        grads = torch.autograd.grad(model.loss(torch.cat([batches[i] for i in window])), parameters)
        norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in grads]))
        factor = 1.0 if clip is None else min(1.0, clip / (float(norm) + 1e-6))
        torch.testing.assert_close(kept, grads[0] * factor, rtol=1e-5, atol=1e-6)


class Two(Base):
    """Accumulates for two optimizers, whose losses reach each other's parameters."""

    named = True

    def __init__(self) -> None:
        super().__init__(lr=0.0)
        self.disc[1].p = 0.0
        self.kept: list[Tensor] = []

    def loss(self, batch: Tensor) -> Tensor:
        return self.disc(self.gen(batch[:, :3])).square().mean()

    @ld.training_step(manual=True)
    def step(self, batch: Tensor) -> None:
        found: Any = ld.optimizers()
        for optimizer in found.values():
            ld.backward(self.loss(batch), *([optimizer] if self.named else []))
            optimizer.step()
            optimizer.zero_grad()

    @ld.on_before_optimizer_step
    def keep(self, optimizer: Optimizer) -> None:
        self.kept.append(optimizer.param_groups[0]["params"][0].grad.clone())


def test_accumulation_with_two_optimizers() -> None:
    """Each gets its own gradients alone; whose they are must be said."""
    batches, model = data((8, 5, 7)), Two()
    run = fit(model, batches, max_epochs=1, accumulate_grad_batches=2)
    assert run.global_step == 2
    for i, window in enumerate(([0, 1], [2])):
        loss = model.loss(torch.cat([batches[k] for k in window]))
        expected = torch.autograd.grad(loss, [model.gen.weight, model.disc[0].weight])
        torch.testing.assert_close(model.kept[2 * i : 2 * i + 2], list(expected), rtol=1e-6, atol=1e-6)
    model.named = False
    with pytest.raises(ld.StepError, match=r"call ld\.backward\(loss, optimizer\)"):
        fit(model, batches, max_epochs=1, accumulate_grad_batches=2)


def wrong(act: Any) -> nn.Module:
    class Wrong(Single):
        @ld.training_step(manual=True)
        def step(self, batch: Tensor) -> None:
            act(self, batch, ld.optimizers())

    return Wrong()


def twice(model: Single, batch: Tensor, optimizer: Optimizer) -> None:
    for _ in range(2):
        ld.backward(model.loss(batch))
        optimizer.step()


@pytest.mark.parametrize(
    ("act", "said"),
    [
        (lambda m, b, o: (m.loss(b).backward(), o.step()), r"gradients must come from ld\.backward"),
        (twice, "one update of each optimizer per batch"),
        (lambda m, b, o: ld.clip_gradients(SGD(m.parameters(), 1)), "configure_optimizers did not return"),
        (lambda m, b, o: ld.backward(m.loss(b), SGD(m.parameters(), 1)), "configure_optimizers did not return"),
    ],
)
def test_what_cannot_be_accumulated_is_refused(act: Any, said: str) -> None:
    """Rather than done wrongly."""
    with pytest.raises(ld.StepError, match=said):
        fit(wrong(act), accumulate_grad_batches=2, max_epochs=1, max_steps=1)


def test_the_optimizers_are_as_before_after_the_run() -> None:
    """No hook and no replaced method stays on them, also when the run fails."""
    held: list[Any] = []

    def act(model: Single, batch: Tensor, optimizer: Any) -> None:
        held.append((optimizer, set(vars(optimizer))))
        raise KeyError("mine")

    with pytest.raises(KeyError):
        fit(wrong(act), accumulate_grad_batches=2)
    ((optimizer, during),) = held
    assert {"zero_grad", "step"} <= during
    assert not {"zero_grad", "step"} & set(vars(optimizer))
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_overrides_and_events_in_a_manual_step() -> None:
    """ld.backward and ld.clip_gradients call the overrides, in which they mean torch's own way."""
    heard: list[str] = []

    class Override(Single):
        @ld.backward
        def back(self, loss: Tensor, optimizer: Optimizer) -> None:
            heard.append("backward")
            ld.backward(loss * 2, retain_graph=True)

        @ld.clip_gradients
        def clip(self, optimizer: Optimizer) -> None:
            heard.append("clip")
            ld.clip_gradients(optimizer, 0.5, "value")

        @ld.on_before_backward
        def before(self, loss: Tensor, optimizer: Optimizer) -> None:
            heard.append(f"before {type(optimizer).__name__}")

        @ld.on_after_backward
        def following(self, optimizer: Optimizer) -> None:
            heard.append("after")

    model = Override()
    fit(model, data((8,)), max_epochs=1)
    assert heard == ["before SGD", "backward", "after", "clip"]
    (expected,) = torch.autograd.grad(model.loss(data((8,))[0]) * 2, [model.gen.weight])
    torch.testing.assert_close(model.kept[0], expected.clamp(-0.5, 0.5))


class Toggling(ld.OptimizerMixin, Base):
    """Toggles in both ways."""

    fails = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[list[bool]] = []
        self.disc[0].bias.requires_grad_(False)

    def live(self) -> list[bool]:
        return [self.gen.weight.requires_grad, self.disc[0].weight.requires_grad, self.disc[0].bias.requires_grad]

    @ld.training_step(manual=True)
    def step(self, batch: Tensor) -> None:
        found: Any = self.optimizers()
        with self.toggle_optimizer(found["gen"]):
            self.seen.append(self.live())
            self.manual_backward(self.gen_loss(batch))
            found["gen"].step()
        self.seen.append(self.live())
        self.toggle_optimizer(found["disc"])
        self.seen.append(self.live())
        self.untoggle_optimizer(found["disc"])
        self.seen.append(self.live())
        self.toggle_optimizer(found["gen"])
        if self.fails:
            raise KeyError("mine")


@pytest.mark.parametrize("fails", [False, True])
def test_toggle_optimizer(fails: bool) -> None:
    """As a context manager and as two calls; what is left toggled is put back at the end of the step."""
    model = Toggling()
    model.fails = fails
    if fails:
        with pytest.raises(KeyError):
            fit(model, data((8,)), max_epochs=1)
    else:
        fit(model, data((8,)), max_epochs=1)
    usual = [True, True, False]
    assert model.seen == [[True, False, False], usual, [False, True, False], usual]
    assert model.live() == usual
    with pytest.raises(ld.LightdecoError, match="works inside a @ld"):
        model.toggle_optimizer(SGD(model.parameters(), 0.1))


def test_outside_of_a_run_they_do_as_torch_does() -> None:
    """backward is loss.backward(), clipping needs a value."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = SGD([weight], 0.1)
    ld.backward((weight * 3).sum())
    assert weight.grad is not None
    assert weight.grad.tolist() == [3.0] * 4
    ld.clip_gradients(optimizer, 2.0, "value")
    assert weight.grad.tolist() == [2.0] * 4
    ld.clip_gradients(optimizer, 1.0)
    torch.testing.assert_close(weight.grad, torch.full((4,), 0.5))
    loss = (weight * 3).sum()
    ld.backward(loss, retain_graph=True)
    ld.backward(loss)
    for given, said in (((), "needs a value"), ((-1,), "value=-1"), ((1, "nrm"), "did you mean 'norm'")):
        with pytest.raises(ld.SettingsError, match=said):
            ld.clip_gradients(optimizer, *given)  # type: ignore[arg-type]


def test_both_are_decorators_too() -> None:
    """With and without parentheses; other options are refused."""

    def back(self: Any, loss: Tensor) -> None: ...

    assert ld.backward(back) is back
    assert ld.clip_gradients()(back) is back
    for decorate in (ld.backward, ld.clip_gradients):
        with pytest.raises(ld.MarkError, match="takes no options"):
            decorate(every=2)  # type: ignore[call-overload]


def test_in_an_automatic_step_clip_gradients_uses_the_settings() -> None:
    """As in an event of the user; backward is torch's own."""
    seen: list[float] = []

    class Automatic(Single):
        @ld.training_step
        def step(self, batch: Tensor) -> Tensor:
            return self.loss(batch)

        @ld.on_after_backward
        def look(self, optimizer: Optimizer) -> None:
            ld.clip_gradients(optimizer)
            seen.append(float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in self.gen.parameters()]))))  # type: ignore[union-attr]

    fit(Automatic(), gradient_clip_val=0.01, max_epochs=1)
    assert max(seen) == pytest.approx(0.01, rel=1e-3)


def with_override(role: str) -> nn.Module:
    return ld.attach(Manual(), **{role: lambda self: None})


@pytest.mark.parametrize("role", ["optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"])
def test_overrides_of_what_the_step_does_itself_are_refused(role: str) -> None:
    """They would never be called."""
    with pytest.raises(ld.MarkError, match=f"@{role}, would never be called"):
        fit(with_override(role))


def test_settings_that_cannot_work_are_refused_and_options_without_effect_warn() -> None:
    """on_nan='skip', LBFGS with accumulation, a scheduler's interval."""
    with pytest.raises(ld.SettingsError, match="on_nan='skip'"):
        fit(Manual(), on_nan="skip")

    class Every(Manual):
        def make(self) -> Any:
            found = super().make()
            return found | {"gen": ld.Optim(found["gen"].optimizer, found["gen"].scheduler, "step")}

    with pytest.warns(ld.LightdecoWarning, match="interval, every and monitor"):
        fit(Every(), max_epochs=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(Manual(), max_epochs=1)


def test_a_loss_that_is_not_finite_names_its_batch() -> None:
    """The loss that the step returns is checked."""

    class Bad(Single):
        @ld.training_step(manual=True)
        def step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("nan") if batch_idx == 3 else 1.0)

    with pytest.raises(ld.StepError, match=r"training loss was not finite .* at batch 3 of epoch 0"):
        fit(Bad())


def test_manual_lbfgs() -> None:
    """The closure is the user's own."""

    class Newton(Single):
        keep = None  # the event comes before the first gradient

        @ld.training_step(manual=True)
        def step(self, batch: Tensor) -> Tensor:
            optimizer = ld.optimizers()
            assert isinstance(optimizer, Optimizer)

            def closure() -> float:
                optimizer.zero_grad()
                loss = self.loss(batch)
                ld.backward(loss)
                return float(loss.detach())

            return torch.tensor(optimizer.step(closure))

        def make(self) -> Any:
            return torch.optim.LBFGS(self.gen.parameters())

    run = fit(Newton(), data((8,)))
    assert run.global_step == 2
    assert run.metrics["train/loss"] < 1e-3


class Stop(Exception):
    """Ends a run as an error of the user does."""


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_manual_run_goes_on_bit_for_bit(tmp_path: Path, accumulate: int) -> None:
    """Interrupted in the middle of an epoch; a checkpoint is never written within a window."""

    class Stopping(Base):
        stop = False

        @ld.training_step(manual=True)
        def step(self, batch: Tensor) -> Tensor:
            found: Any = ld.optimizers()
            for name, loss_of in (("disc", self.disc_loss), ("gen", self.gen_loss)):
                loss = loss_of(batch)
                found[name].zero_grad()
                ld.backward(loss, found[name])
                found[name].step()
            return loss

        @ld.on_train_batch_end
        def look(self, run: ld.Run) -> None:
            if self.stop and run.progress.micro_batch == 8:
                raise Stop

        @ld.on_save_checkpoint
        def saved(self, run: ld.Run) -> None:
            assert not run.manual.pending

    settings: Any = {"name": "run", "max_epochs": 3, "accumulate_grad_batches": accumulate}
    whole, broken, resumed = Stopping(), Stopping(), Stopping()
    fit(whole, root_dir=tmp_path / "whole", **settings)
    broken.stop = True
    settings |= {"root_dir": tmp_path, "checkpoint": ModelCheckpoint(every_n_steps=1)}
    with pytest.raises(Stop):
        fit(broken, **settings)
    fit(resumed, resume="auto", **settings)
    assert equal(weights(resumed), weights(whole))
