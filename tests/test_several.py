"""Several optimizers without manual code: one training step each, only its own parameters requiring grad meanwhile."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

import lightdeco as ld
from lightdeco import seeds
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from tests.models import QUIET, equal, weights

SEED = 11


def data(sizes: tuple[int, ...] = (8, 8, 8, 8, 8)) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, 6, generator=generator) for size in sizes]


class Pair(nn.Module):
    """Two nets, each with an optimizer: `gen` makes samples, `disc` tells them from the real ones."""

    def __init__(self, dropout: float = 0.2, lr: float = 0.05) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.gen = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 6))
        self.disc = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.lr = lr

    def disc_loss(self, batch: Tensor) -> Tensor:
        fake = self.gen(torch.randn(len(batch), 3, device=batch.device))
        return F.softplus(-self.disc(batch)).mean() + F.softplus(self.disc(fake)).mean()

    def gen_loss(self, batch: Tensor) -> Tensor:
        return F.softplus(-self.disc(self.gen(torch.randn(len(batch), 3, device=batch.device)))).mean()

    @ld.training_step(optimizer="disc", every=2)
    def train_disc(self, batch: Tensor) -> Any:
        loss = self.disc_loss(batch)
        return {"loss": loss, "half": loss / 2}

    @ld.training_step(optimizer="gen")
    def train_gen(self, batch: Tensor) -> Any:
        return self.gen_loss(batch)

    @ld.configure_optimizers
    def make(self) -> Any:
        gen, disc = Adam(self.gen.parameters(), self.lr), SGD(self.disc.parameters(), self.lr)
        return {"gen": ld.Optim(gen, StepLR(gen, 2, 0.5)), "disc": ld.Optim(disc, StepLR(disc, 3, 0.5), "step")}


def fit(model: nn.Module, batches: Any = None, **settings: Any) -> ld.Run:
    return ld.fit(model, batches or data(), **(QUIET | {"max_epochs": 2, "seed": SEED} | settings))


def by_hand(model: Pair, batches: list[Tensor], epochs: int, clip: float | None = None) -> None:
    """The loop that the marks stand for."""
    found = model.make()
    disc, gen = found["disc"], found["gen"]
    k = 0
    for _ in range(epochs):
        for i, batch in enumerate(batches):
            torch.manual_seed(seeds.step_seed(SEED, 0, k))
            k += 1
            for optim, loss_of, other, due in (
                (disc, model.disc_loss, model.gen, i % 2 == 0),
                (gen, model.gen_loss, model.disc, True),
            ):
                if not due:
                    continue
                other.requires_grad_(False)
                optim.optimizer.zero_grad()
                loss_of(batch).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_([p for g in optim.optimizer.param_groups for p in g["params"]], clip)
                optim.optimizer.step()
                other.requires_grad_(True)
                if optim is disc:
                    disc.scheduler.step()
        gen.scheduler.step()


@pytest.mark.parametrize("clip", [None, 0.1])
def test_two_optimizers_are_bit_equal_to_the_loop_by_hand(clip: float | None) -> None:
    """With dropout, `every`, a scheduler of each kind and clipping."""
    ours, theirs = Pair(), Pair()
    run = fit(ours, max_epochs=3, gradient_clip_val=clip)
    by_hand(theirs, data(), 3, clip)
    assert equal(weights(ours), weights(theirs))
    assert (run.global_step, run.epoch) == (15, 3)
    assert run.progress.updates == {"disc": 9, "gen": 15}


def test_metrics_have_the_name_of_the_optimizer() -> None:
    """Losses and other scalars, by step and by epoch; outputs reach the batch's end by name."""
    seen: list[Any] = []

    class Watch(Pair):
        @ld.on_train_batch_end
        def look(self, outputs: Any, run: ld.Run) -> None:
            seen.append((sorted(outputs), run.global_step))

        @ld.training_step(optimizer="gen")
        def train_gen(self, batch: Tensor) -> Any:
            ld.log("mine", 3.0)
            return {"loss": self.gen_loss(batch), "one": 1.0}

    run = fit(Watch(), max_epochs=1, log_every_n_steps=1)
    names = {"train/disc/loss", "train/disc/half", "train/gen/loss", "train/gen/one", "mine"}
    assert names <= set(run.metrics)
    assert "train/loss" not in run.metrics
    assert run.metrics["train/disc/half"] == pytest.approx(run.metrics["train/disc/loss"] / 2)
    records = [record for record in run.history if "train/gen/loss" in record]
    assert ["train/disc/loss" in record for record in records] == [True, False, True, False, True]
    assert seen == [(["disc", "gen"], 1), (["gen"], 2), (["disc", "gen"], 3), (["gen"], 4), (["disc", "gen"], 5)]


def test_only_its_own_parameters_require_grad() -> None:
    """In each step; what the user froze stays frozen, what no optimizer holds rests, and all is put back."""
    seen: dict[str, list[str]] = {}

    class Watch(Pair):
        def __init__(self) -> None:
            super().__init__()
            self.free = nn.Parameter(torch.zeros(1))
            self.disc[0].bias.requires_grad_(False)

        def live(self) -> list[str]:
            return [name for name, p in self.named_parameters() if p.requires_grad]

        def disc_loss(self, batch: Tensor) -> Tensor:
            seen["disc"] = self.live()
            return super().disc_loss(batch)

        def gen_loss(self, batch: Tensor) -> Tensor:
            seen["gen"] = self.live()
            return super().gen_loss(batch)

    model = Watch()
    before = model.live()
    frozen = model.disc[0].bias.detach().clone()
    fit(model)
    assert seen["gen"] == ["gen.0.weight", "gen.0.bias", "gen.2.weight", "gen.2.bias"]
    assert seen["disc"] == ["disc.0.weight", "disc.3.weight", "disc.3.bias"]
    assert model.live() == before
    assert torch.equal(model.disc[0].bias, frozen)


@pytest.mark.parametrize("place", ["disc_loss", "gen_loss"])
def test_requires_grad_is_put_back_after_an_exception(place: str) -> None:
    """Wherever the step fails."""
    model = Pair()

    def fails(batch: Tensor) -> Tensor:
        raise KeyError("mine")

    setattr(model, place, fails)
    with pytest.raises(KeyError, match="mine"):
        fit(model)
    assert all(p.requires_grad for p in model.parameters())


def test_a_parameter_of_two_optimizers_is_trained_by_both() -> None:
    """Each step sees what its own optimizer holds."""
    seen: list[bool] = []

    class Shared(Pair):
        @ld.training_step(optimizer="disc")
        def train_disc(self, batch: Tensor) -> Any:
            seen.append(self.gen[0].weight.requires_grad)
            return self.disc_loss(batch)

        def make(self) -> Any:
            return {"disc": SGD(self.parameters(), 0.1), "gen": SGD(self.gen.parameters(), 0.1)}

    fit(Shared(), max_epochs=1)
    assert seen == [True] * 5


def test_events_and_overrides_get_the_right_optimizer() -> None:
    """Every event and override of an update, in the order of the steps, with the optimizer that it is about."""
    heard: list[tuple[str, str]] = []

    def hear(name: str) -> Callable[..., None]:
        def event(self: Any, optimizer: Optimizer) -> None:
            heard.append((name, type(optimizer).__name__))

        return event

    class Watch(Pair):
        @ld.optimizer_zero_grad
        def clear(self, optimizer: Optimizer) -> None:
            heard.append(("zero_grad", type(optimizer).__name__))
            optimizer.zero_grad()

        @ld.backward
        def back(self, loss: Tensor, optimizer: Optimizer) -> None:
            heard.append(("backward", type(optimizer).__name__))
            loss.backward()

        @ld.clip_gradients
        def clip(self, optimizer: Optimizer) -> None:
            heard.append(("clip", type(optimizer).__name__))

        @ld.optimizer_step
        def update(self, optimizer: Optimizer, closure: Any) -> None:
            heard.append(("step", type(optimizer).__name__))
            optimizer.step(closure)

    class Listener:
        pass

    names = ("on_before_zero_grad", "on_before_backward", "on_after_backward", "on_before_optimizer_step")
    listener = ld.attach(Listener(), **{name: hear(name) for name in names})
    ours, theirs = Watch(), Pair()
    fit(ours, max_epochs=1, callbacks=listener)
    fit(theirs, max_epochs=1)
    zero, before, after, step = names
    order = [zero, "zero_grad", before, "backward", after, step, "clip", "step"]
    both = [(name, kind) for kind in ("SGD", "Adam") for name in order]
    assert heard == both + both[8:] + both + both[8:] + both
    assert equal(weights(ours), weights(theirs))


def test_nan_names_the_optimizer_and_the_batch() -> None:
    """The earliest one, with the batch of a step that does not run for each."""

    class Bad(Pair):
        @ld.training_step(optimizer="disc", every=2)
        def train_disc(self, batch: Tensor, batch_idx: int) -> Any:
            return self.disc_loss(batch) * (float("nan") if batch_idx == 4 else 1.0)

    with pytest.raises(ld.StepError, match=r"loss of the optimizer 'disc' was not finite .* at batch 4 of epoch 0"):
        fit(Bad())


def test_nan_skip_leaves_out_the_update_of_one_optimizer() -> None:
    """The other goes on, and counts the batch."""

    class Bad(Pair):
        @ld.training_step(optimizer="disc")
        def train_disc(self, batch: Tensor) -> Any:
            return self.disc_loss(batch) * float("nan")

    model = Bad()
    before = model.disc[0].weight.detach().clone()
    run = fit(model, on_nan="skip")
    assert run.global_step == run.progress.skipped_updates == 10
    assert torch.equal(model.disc[0].weight, before)
    assert torch.isfinite(model.gen[0].weight).all()


def test_a_plateau_scheduler_watches_the_loss_of_its_optimizer() -> None:
    """Without validation and without `monitor`."""
    got: list[Any] = []

    class Plateau(Pair):
        def make(self) -> Any:
            gen, disc = SGD(self.gen.parameters(), 0.1), SGD(self.disc.parameters(), 0.1)
            return {"gen": (gen, ReduceLROnPlateau(gen)), "disc": disc}

        @ld.lr_scheduler_step
        def step(self, scheduler: Any, metric: Any, run: ld.Run) -> None:
            got.append(metric == run.metrics["train/gen/loss"])
            scheduler.step(metric)

    fit(Plateau())
    assert got == [True, True]


# ---- accumulation ----------------------------------------------------------------------------------------------------


class Weighted(Pair):
    """No dropout, no noise; the gradients at each update are kept by the kind of the optimizer."""

    def __init__(self) -> None:
        super().__init__(dropout=0.0, lr=0.0)
        self.kept: list[tuple[str, list[Tensor]]] = []

    def losses(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        tokens = batch[:, 0] > 0
        weight = tokens.sum()
        gen = self.gen(batch[:, :3]).square().mean(1)
        disc = self.disc(batch).square().mean(1)
        return (disc * tokens).sum() / weight, (gen * tokens).sum() / weight

    @ld.training_step(optimizer="disc", every=2)
    def train_disc(self, batch: Tensor) -> Any:
        return {"loss": self.losses(batch)[0], "weight": (batch[:, 0] > 0).sum()}

    @ld.training_step(optimizer="gen")
    def train_gen(self, batch: Tensor) -> Any:
        return {"loss": self.losses(batch)[1], "weight": int((batch[:, 0] > 0).sum())}

    @ld.on_before_optimizer_step
    def keep(self, optimizer: Optimizer) -> None:
        grads = [p.grad.clone() for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
        self.kept.append(("gen" if isinstance(optimizer, Adam) else "disc", grads))


def test_accumulated_gradients_of_each_optimizer_are_those_of_its_concatenated_batches() -> None:
    """Unequal batches, token weights, a schedule by epoch, `every`, and the short last window of both."""
    batches = data((8, 5, 7, 3, 8, 6))
    model = Weighted()
    run = fit(model, batches, max_epochs=2, accumulate_grad_batches={0: 4, 1: 1})
    expected = [("gen", [0, 1, 2, 3]), ("disc", [0, 2, 4]), ("gen", [4, 5])]
    expected += [(name, [i]) for i in range(6) for name in (("disc", "gen") if i % 2 == 0 else ("gen",))]
    assert sorted(name for name, _ in model.kept) == sorted(name for name, _ in expected)
    for which in ("gen", "disc"):
        ours = [grads for name, grads in model.kept if name == which]
        for grads, window in zip(ours, [w for name, w in expected if name == which], strict=True):
            loss = model.losses(torch.cat([batches[i] for i in window]))[which == "gen"]
            net = model.gen if which == "gen" else model.disc
            for ours_one, theirs in zip(grads, torch.autograd.grad(loss, list(net.parameters())), strict=True):
                torch.testing.assert_close(ours_one, theirs, rtol=1e-6, atol=1e-6)
    assert run.global_step == 2 + 6


def test_each_micro_batch_has_a_dropout_mask_of_its_own() -> None:
    """By its number in the run, for both steps of a batch and over windows."""
    masks: list[Tensor] = []

    class Masks(Pair):
        def gen_loss(self, batch: Tensor) -> Tensor:
            masks.append(F.dropout(torch.ones(64)))
            return super().gen_loss(batch)

        def disc_loss(self, batch: Tensor) -> Tensor:
            masks.append(F.dropout(torch.ones(64)))
            return super().disc_loss(batch)

    fit(Masks(), max_epochs=2, accumulate_grad_batches=2)
    assert len({tuple(mask.tolist()) for mask in masks}) == len(masks) == 16


# ---- checks before the first batch -----------------------------------------------------------------------------------


def nothing(self: Any, batch: Tensor) -> Tensor:
    raise AssertionError("a step ran")


def with_steps(*options: dict[str, Any], base: type = Pair) -> nn.Module:
    new = {
        f"step_{i}": ld.training_step(**given)(lambda self, batch: nothing(self, batch))
        for i, given in enumerate(options)
    }
    return type("Net", (base,), {"train_disc": None, "train_gen": None, **new})()


class One(Pair):
    def make(self) -> Any:
        return SGD(self.parameters(), 0.1)


class Named(Pair):
    def make(self) -> Any:
        return {"all": SGD(self.parameters(), 0.1)}


class Foreign(Pair):
    def make(self) -> Any:
        return {"gen": SGD(self.gen.parameters(), 0.1), "disc": SGD([nn.Parameter(torch.zeros(1))], 0.1)}


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (with_steps({"optimizer": "gan"}, {"optimizer": "disc"}), "allowed: 'gen', 'disc'; did you mean 'gen'"),
        (with_steps({"optimizer": "gen"}), "returned the optimizer 'disc', for which there is no training step"),
        (with_steps({}), r"returned 2 optimizers, 'gen', 'disc', and .* is the only training step"),
        (with_steps({"optimizer": "gen"}, {}), "does not say for which optimizer"),
        (with_steps({}, {}), r"stands on two methods, .*; or name the optimizer of each"),
        (with_steps({"optimizer": "gen"}, {"optimizer": "gen"}), r"\(optimizer='gen'\) stands on two methods"),
        (with_steps({"optimizer": "gen"}, {"manual": True}), "so that no other can stand beside it"),
        (with_steps({"manual": True}, {}), "so that no other can stand beside it"),
        (with_steps({"manual": True, "optimizer": "gen"}), "a manual step drives every optimizer itself"),
        (with_steps({"optimizer": "gen"}, base=One), r"'gen', which .* did not return; it has no name"),
        (with_steps({"optimizer": "al"}, base=Named), "allowed: 'all'; did you mean 'all'"),
        (with_steps({"optimizer": "gen"}, {"optimizer": "disc"}, base=One), "did not return; it has no name"),
        (Foreign(), "an optimizer 'disc' that holds no parameter of Foreign"),
    ],
)  # fmt: skip
def test_steps_and_optimizers_that_do_not_fit_are_refused(model: nn.Module, said: str) -> None:
    """Before the first batch, with what is allowed and the nearest name."""
    with pytest.raises(ld.MarkError, match=said):
        fit(model)


def test_one_optimizer_may_have_a_name() -> None:
    """Its step may say it; metrics keep their short names, and `every` works with one step too."""

    class Single(Pair):
        train_disc = None

        @ld.training_step(optimizer="all", every=2)
        def train_gen(self, batch: Tensor) -> Any:
            return self.gen_loss(batch)

        def make(self) -> Any:
            return {"all": SGD(self.parameters(), 0.1)}

    run = fit(Single(), max_epochs=2)
    assert run.global_step == 6
    assert "train/loss" in run.metrics


def test_attached_steps() -> None:
    """A list of marked functions gives an instance several steps, which hide those of the class."""

    def disc(model: Pair, batch: Tensor) -> Tensor:
        return model.disc_loss(batch)

    def gen(model: Pair, batch: Tensor) -> Tensor:
        return model.gen_loss(batch)

    marked = [ld.training_step(optimizer="disc", every=2)(disc), ld.training_step(optimizer="gen")(gen)]
    ours, theirs = ld.attach(Pair(), training_step=marked), Pair()
    fit(ours)
    fit(theirs)
    assert equal(weights(ours), weights(theirs))


def test_lr_find_refuses_several_optimizers() -> None:
    """There is no one learning rate, and no one loss."""
    with pytest.raises(ld.MarkError, match="this model has 2 optimizers"):
        ld.lr_find(Pair(), data())


# ---- resuming --------------------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run as an error of the user does."""


class Stopping(Pair):
    stop_at = -1

    @ld.on_train_batch_end
    def stop(self, run: ld.Run) -> None:
        if run.global_step == self.stop_at:
            raise Stop


@pytest.mark.parametrize("at", [1, 2, 5, 6, 8])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_run_with_two_optimizers_goes_on_bit_for_bit(tmp_path: Path, at: int, accumulate: int) -> None:
    """In the middle of an epoch, with a scheduler of each kind, `every` and accumulation."""
    settings: Any = {"max_epochs": 4, "accumulate_grad_batches": accumulate, "name": "run"}
    whole, broken, resumed = Stopping(), Stopping(), Stopping()
    first = fit(whole, root_dir=tmp_path / "whole", **settings)
    broken.stop_at = at
    settings |= {"root_dir": tmp_path, "checkpoint": ModelCheckpoint(every_n_steps=1)}
    with pytest.raises(Stop):
        fit(broken, **settings)
    second = fit(resumed, resume="auto", **settings)
    assert equal(weights(resumed), weights(whole))
    first.progress.seconds = second.progress.seconds = 0.0
    assert second.progress == first.progress
    assert {k: v for k, v in second.metrics.items() if "loss" in k} == {
        k: v for k, v in first.metrics.items() if "loss" in k
    }


class Checked(Pair):
    """With a validation."""

    @ld.validation_step
    def check(self, batch: Tensor) -> Any:
        return {"loss": self.gen_loss(batch)}


@pytest.mark.parametrize("on_nan", ["raise", "skip"])
def test_several_steps_with_a_sanity_check_before_training(on_nan: str) -> None:
    """A validation before the first step, when there are no losses yet."""
    run = ld.fit(Checked(), (data(), data()), max_epochs=1, seed=SEED, on_nan=on_nan, **QUIET)
    assert {"val/loss", "train/gen/loss", "train/disc/loss"} <= run.metrics.keys()
