"""Steps: what one may return, how short the traceback of a failing one is, and the modes of submodules."""

import inspect
import pathlib
import traceback
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.steps import Steps, evaluating, read_result

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2
HOME = str(pathlib.Path(ld.__file__).parent)


class Net(nn.Linear):
    """A model whose steps return, or raise, what a test gives it."""

    def __init__(self, returns: Any = None, fails: str = "") -> None:
        super().__init__(2, 1)
        self.returns, self.fails = returns, fails

    def act(self, name: str) -> None:
        if self.fails == name:
            raise KeyError(name)

    @ld.training_step
    def step(self, batch: Tensor) -> Any:
        self.act("training_step")
        loss = self(batch).pow(2).mean()
        return loss if self.returns is None else self.returns(loss)

    @ld.validation_step
    @ld.test_step
    def check(self, batch: Tensor) -> Any:
        self.act("validation_step")
        loss = self(batch).pow(2).mean()
        return loss if self.returns is None else self.returns(loss)

    @ld.predict_step
    def guess(self, batch: Tensor) -> Tensor:
        self.act("predict_step")
        return self(batch)

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        self.act("configure_optimizers")
        return torch.optim.SGD(self.parameters(), lr=0.1)

    @ld.on_fit_start
    @ld.on_train_batch_end
    @ld.on_validation_start
    @ld.on_validation_batch_end
    @ld.on_validation_epoch_end
    @ld.on_train_epoch_end
    @ld.on_before_optimizer_step
    @ld.on_predict_batch_start
    @ld.setup
    @ld.backward
    def event(self, **given: Any) -> None:
        if "loss" in given:
            given["loss"].backward()
        keys = set(given) - {"run", "model"}
        self.act("event:" + ",".join(sorted(keys)))


def fit(model: Any, data: Any = BATCHES, **settings: Any) -> ld.Run:
    return ld.fit(model, data, **QUIET | settings)


# ---- tracebacks ------------------------------------------------------------------------------------------------------


def own_frames(verb: Any, *given: Any, **settings: Any) -> list[str]:
    """The functions of lightdeco in the traceback of a KeyError of the model; the last frame is the model's."""
    run = (lambda *a, **k: list(ld.predict(*a, **k))) if verb is ld.predict else verb
    with pytest.raises(KeyError) as caught:
        run(*given, **settings)
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert frames[-1].name == "act"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return [frame.name for frame in frames if frame.filename.startswith(HOME)]


@pytest.mark.parametrize(
    "fails",
    [
        "training_step",
        "validation_step",
        "configure_optimizers",
        "event:",
        "event:stage",
        "event:loss,optimizer",
        "event:optimizer",
        "event:batch,batch_idx,dataloader_idx,outputs",
    ],
)
@pytest.mark.parametrize("sanity", [0, 1])
def test_a_failure_in_fit_shows_at_most_five_frames_of_ours(fails: str, sanity: int) -> None:
    """The user's own line is the last, and little lies between it and the call of fit."""
    frames = own_frames(fit, Net(fails=fails), (BATCHES, BATCHES), num_sanity_val_steps=sanity)
    assert 1 <= len(frames) <= 5, frames


@pytest.mark.parametrize("event", ["on_train_epoch_start", "on_validation_end", "on_train_end", "on_before_zero_grad"])
def test_a_failing_event_of_a_callback_shows_at_most_five_frames(event: str) -> None:
    """Callbacks are called from the same places as the model's own events."""

    def act() -> None:
        raise KeyError(event)

    callback = type("Failing", (), {"event": getattr(ld, event)(eval("lambda self: act()", {"act": act}))})()
    frames = own_frames(fit, Net(), (BATCHES, BATCHES), callbacks=[callback])
    assert 1 <= len(frames) <= 5, frames


class Two(Net):
    """A step for each of two optimizers, and parts of a batch."""

    step = None

    @ld.training_step(optimizer="a")
    def first(self, part: Tensor, carry: Any) -> Tensor:
        self.act("training_step")
        return self(part).pow(2).mean()

    @ld.training_step(optimizer="b")
    def second(self, part: Tensor) -> Tensor:
        return self(part).pow(2).mean()

    @ld.split_batch(size=2)
    def split(self, batch: Tensor, size: int) -> Any:
        self.act("split_batch")
        return batch.split(size)

    @ld.lr_scheduler_step
    def schedule(self, scheduler: Any) -> None:
        scheduler.step()
        self.act("lr_scheduler_step")

    def optimizers(self) -> Any:
        made = torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in made]
        return {n: ld.Optim(o, s, "step") for n, o, s in zip("ab", made, schedulers, strict=True)}


class Driving(Net):
    @ld.training_step(manual=True)
    def step(self, batch: Tensor) -> None:
        self.act("training_step")


@pytest.mark.parametrize(
    ("kind", "fails"),
    [(Two, n) for n in ("training_step", "split_batch", "lr_scheduler_step", "event:loss,optimizer", "event:optimizer")]
    + [(Driving, "training_step")],
)
def test_several_steps_and_manual_ones_show_at_most_five_frames(kind: Any, fails: str) -> None:
    """Batches of more than one plain step have a way of their own, which is as short."""
    assert 1 <= len(own_frames(fit, kind(fails=fails))) <= 5


@pytest.mark.parametrize("verb", [ld.validate, ld.test, ld.predict])
def test_a_failure_in_an_evaluation_shows_at_most_five_frames(verb: Any) -> None:
    """The same for the other verbs."""
    fails = "predict_step" if verb is ld.predict else "validation_step"
    assert len(own_frames(verb, Net(fails=fails), BATCHES, progress_bar=False)) <= 5


def test_signatures_are_read_once_and_never_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """`inspect.signature` runs as often for 40 batches as for 2."""
    original, counts = inspect.signature, []
    monkeypatch.setattr(inspect, "signature", lambda *a, **k: counts.append(1) or original(*a, **k))

    class Noted(Net):
        @ld.on_train_batch_end
        def end(self, batch_idx: int) -> None: ...

    def used(batches: int) -> int:
        counts.clear()
        fit(Noted(), BATCHES[:1] * batches)
        return len(counts)

    used(1)
    assert used(2) == used(40) > 0


# ---- what a step returns ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "returns",
    [
        lambda loss: loss,
        lambda loss: loss.reshape(1),
        lambda loss: {"loss": loss},
        lambda loss: {"loss": loss, "acc": 0.5, "flag": True, "n": 3, "text": "no metric", "logits": torch.ones(3)},
        lambda loss: {"loss": loss, "weight": torch.tensor(2), "batch_size": 4},
    ],
)
def test_the_forms_of_a_result(returns: Any) -> None:
    """A scalar tensor, or a dict whose scalars are logged and whose other values are left alone."""
    run = fit(Net(returns), (BATCHES, BATCHES))
    assert {"train/loss", "val/loss"} <= set(run.metrics)
    assert not {"train/text", "train/logits", "train/weight", "train/batch_size"} & set(run.metrics)


@pytest.mark.parametrize(
    ("returns", "said"),
    [
        (lambda loss: loss.expand(2), r"tensor of shape \(2,\); return a scalar loss, such as its mean"),
        (lambda loss: 0.5, "float"),
        (lambda loss: (loss, 1), "tuple"),
        (lambda loss: {1: loss}, "with the key 1; keys must be str"),
        (lambda loss: {"acc": loss}, 'loss; .* a dict with one under "loss"'),
        (lambda loss: {"loss": loss.expand(2)}, r'tensor of shape \(2,\) under "loss"'),
        (lambda loss: {"loss": 0.5}, 'float under "loss"'),
        (lambda loss: loss.detach(), "loss without gradient"),
        (lambda loss: {"loss": loss, "weight": -1}, 'weight": -1; allowed: a finite number of at least 0'),
        (lambda loss: {"loss": loss, "weight": float("nan")}, 'weight": nan'),
        (lambda loss: {"loss": loss, "weight": "2"}, 'str under "weight"'),
        (lambda loss: {"loss": loss, "weight": torch.ones(2)}, 'Tensor under "weight"'),
        (lambda loss: {"loss": loss, "batch_size": 0}, 'batch_size": 0; allowed: an int of at least 1'),
        (lambda loss: {"loss": loss, "batch_size": True}, 'batch_size": True'),
    ],
)
def test_a_wrong_result_is_refused_with_the_place(returns: Any, said: str) -> None:
    """What was returned, by which method, and what is allowed."""
    with pytest.raises(ld.StepError, match=rf"Net\.step \(.*test_steps\.py:\d+\) returned .*{said}"):
        fit(Net(returns))


def test_a_training_step_without_a_result_is_refused_and_an_evaluation_step_may_have_none() -> None:
    """A validation step that logs by itself returns nothing."""

    class Silent(Net):
        def step(self, batch: Tensor) -> None:
            return None

        def check(self, batch: Tensor) -> None:
            ld.log("seen", 1.0)

    with pytest.raises(ld.StepError, match=r"Silent\.step .* returned no loss"):
        fit(Silent())
    assert ld.validate(Silent(), BATCHES, progress_bar=False) == {"seen": 1.0}


def test_an_evaluation_needs_no_gradient_and_no_loss() -> None:
    """A dict of metrics without "loss" is enough."""
    loss, scalars, *_ = read_result({"acc": torch.tensor(0.5)}, "here")
    assert loss is None
    assert [name for name, _ in scalars] == ["acc"]
    with pytest.raises(ld.StepError, match="here returned no loss"):
        read_result({"acc": torch.tensor(0.5)}, "here", training=True)


# ---- the wrapper and modes -------------------------------------------------------------------------------------------


def test_the_wrapper_holds_the_model_itself_and_passes_what_is_asked_for() -> None:
    """The parameters are the user's own objects; the step gets its arguments by position and by keyword."""
    net = Net()

    def method(*given: Any, **named: Any) -> Any:
        return given, named

    steps = Steps(net, {"test_step": (method, lambda given: (given[:1], {"last": given[-1]}))})
    assert [id(p) for p in steps.parameters()] == [id(p) for p in net.parameters()]
    assert list(net.state_dict()) == ["weight", "bias"]
    assert steps("test_step", 1, 2, 3) == ((1,), {"last": 3})


def test_each_submodule_gets_its_own_mode_back() -> None:
    """A frozen submodule stays in eval after an evaluation, also after one that failed; the rest trains on."""
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))
    model[1].eval()
    with pytest.raises(KeyError), evaluating(model):
        {}["fails"]
    assert [module.training for module in model.modules()] == [True, True, False]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == [True, True, False]
