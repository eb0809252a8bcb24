"""The optional mixins: the same as the functions and verbs, as methods of the model."""

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2


class Net(ld.LightdecoMixin, nn.Linear):
    """A model with every mixin."""

    def __init__(self, width: int = 1, *, lr: float = 0.1, backbone: nn.Module | None = None, **more: Any) -> None:
        super().__init__(2, width)
        self.save_hyperparameters()

    @ld.training_step
    @ld.validation_step
    @ld.test_step
    def step(self, batch: Tensor) -> Tensor:
        loss: Tensor = self(batch).pow(2).mean()
        self.log("logged", loss, reduce="max")
        self.log_dict({"a": 1.0, "b": torch.tensor(2.0)}, batch_size=3)
        if self.training:
            assert self.optimizers().param_groups[0]["lr"] == self.hparams.lr
            assert isinstance(self.lr_schedulers(), torch.optim.lr_scheduler.StepLR)
        return loss

    @ld.predict_step
    def guess(self, batch: Tensor) -> Tensor:
        return self(batch)

    @ld.configure_optimizers
    def configure(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.hparams.lr)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1)


def test_the_verbs_as_methods() -> None:
    """`net.fit(…)` and the others take the same arguments and return the same."""
    net = Net(lr=0.2)
    run = net.fit(BATCHES, **QUIET)
    assert run.model is net
    assert run.global_step == 2
    assert run.metrics.keys() >= {"train/loss", "logged", "a", "b"}
    assert net.validate(BATCHES, progress_bar=False) == ld.validate(net, BATCHES, progress_bar=False)
    assert net.test(BATCHES, progress_bar=False)["b"] == 2.0
    assert [output.shape for output in net.predict(BATCHES, progress_bar=False)] == [(4, 1)] * 2
    with pytest.raises(ld.SettingsError, match="max_epoch"):
        net.fit(BATCHES, max_epoch=1)  # type: ignore[call-arg]


def test_the_verbs_need_a_module() -> None:
    """A class that forgot to inherit from nn.Module is told so."""

    class Bare(ld.TrainerMixin): ...

    with pytest.raises(ld.LightdecoError, match=r"model is a Bare; allowed: a torch\.nn\.Module"):
        Bare().fit(BATCHES, max_epochs=1)


def test_outside_a_run_logging_does_nothing_and_optimizers_are_refused() -> None:
    """A model with mixins stays usable by itself."""
    net = Net()
    net.log("x", 1.0)
    net.log_dict({"x": object()})
    for method in (net.optimizers, net.lr_schedulers):
        with pytest.raises(ld.LightdecoError, match=r"work inside a running ld\.fit"):
            method()


def test_the_mixins_bring_no_warning_and_no_state() -> None:
    """Their methods are no near misses of roles (warnings are errors here), and state_dict has the weights alone."""
    net = Net()
    net.fit(BATCHES, **QUIET)
    assert list(net.state_dict()) == ["weight", "bias"]


# ---- hyperparameters -------------------------------------------------------------------------------------------------


def test_save_hyperparameters_keeps_the_arguments_but_modules() -> None:
    """Positional, keyword-only and collected ones; as keys and attributes; `fit` records them."""
    net = Net(3, backbone=nn.ReLU(), note="x")
    assert net.hparams == {"width": 3, "lr": 0.1, "note": "x"}  # no backbone
    assert net.hparams.note == net.hparams["note"] == "x"
    assert net.fit(BATCHES, **QUIET).hparams == net.hparams


def test_each_class_of_a_hierarchy_may_save_its_own() -> None:
    """The subclass adds to what its base class kept."""

    class Child(Net):
        def __init__(self, depth: int, width: int) -> None:
            super().__init__(width)
            self.save_hyperparameters("depth")

    assert Child(7, 2).hparams == {"width": 2, "lr": 0.1, "backbone": None, "depth": 7}


def test_names_and_ignored_names() -> None:
    """Some, or all but some; a wrong name is refused with the nearest."""

    class Some(ld.HparamsMixin):
        def __init__(self, call: Any, a: int = 1, b: int = 2) -> None:
            call(self)

    assert Some(lambda s: None).hparams == {}
    for arguments, kept in ((("a",), {"a": 1}), (("a", "b"), {"a": 1, "b": 2})):
        some = _some(*arguments)
        assert some.hparams == kept
    assert _some(ignore="a").hparams == {"b": 2}
    assert _some(ignore=["a", "b"]).hparams == {}
    with pytest.raises(ld.LightdecoError, match="__init__ has no argument 'aa'"):
        _some("aa")
    with pytest.raises(ld.LightdecoError, match="no argument 'widht'; did you mean 'width'"):
        Wide(3, ignore="widht")


class Wide(ld.HparamsMixin):
    def __init__(self, width: int, ignore: Any) -> None:
        self.save_hyperparameters(ignore=ignore)


def _some(*names: str, ignore: Any = ()) -> Any:
    class Some(ld.HparamsMixin):
        def __init__(self, a: int = 1, b: int = 2) -> None:
            self.save_hyperparameters(*names, ignore=ignore)

    return Some()


def test_it_belongs_into_init() -> None:
    """Elsewhere, as in a dataclass's __post_init__, there are no arguments to keep."""

    @dataclass
    class Data(ld.HparamsMixin):
        a: int = 1

        def __post_init__(self) -> None:
            self.save_hyperparameters()

    with pytest.raises(ld.LightdecoError, match="must be called in the __init__"):
        Data()


def test_hyperparameters_are_copied_and_pickled() -> None:
    """Each instance has its own; an unknown attribute names the nearest."""
    net = Net(2)
    other = copy.deepcopy(net)
    other.hparams["width"] = 5
    assert (net.hparams.width, Net(4).hparams.width) == (2, 4)
    assert pickle.loads(pickle.dumps(net.hparams)) == net.hparams
    assert pickle.loads(pickle.dumps(net)).hparams == net.hparams
    with pytest.raises(AttributeError, match="no hyperparameter 'widht'; did you mean 'width'"):
        _ = net.hparams.widht


def test_hyperparameters_before_the_modules_own_init() -> None:
    """The call may stand before `super().__init__()`."""

    class Early(ld.HparamsMixin, nn.Module):
        def __init__(self, a: int = 1) -> None:
            self.save_hyperparameters()
            super().__init__()

    assert Early(3).hparams == {"a": 3}
