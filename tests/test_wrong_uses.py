"""Hard to misuse: each wrong use is refused with what, where and what instead, before it does harm."""

import functools
import linecache
import re
import types
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim import SGD
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld
from lightdeco.marks import marks_of
from lightdeco.plan import discover
from lightdeco.roles import ALWAYS, ROLES

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False}
BATCHES = [torch.ones(4, 2)] * 2
DATASET = TensorDataset(torch.ones(4, 2))

#: In `said`: the message has `file:line` of a function in this file.
AT = "test_wrong_uses.py:"


# ---- what is misused -------------------------------------------------------------------------------------------------


class Plain(nn.Linear):
    """A model without marks."""

    def __init__(self) -> None:
        super().__init__(2, 1)


class Net(Plain):
    """A model that trains."""

    @ld.training_step
    def step(self, batch: Tensor) -> Any:
        return self(batch).pow(2).mean()

    @ld.validation_step
    def check(self, batch: Tensor) -> Any:
        return self(batch).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> Any:
        return SGD(self.parameters(), lr=0.1)


class Other(Net):
    """A subclass, so that there is something to inherit."""


class Listener:
    """A callback."""

    @ld.on_train_start
    def start(self) -> None: ...


class Source:
    """A data object."""

    @ld.train_dataloader
    def batches(self) -> Any:
        return BATCHES


class Sequence:
    """A dataset by its methods."""

    def __getitem__(self, index: int) -> Tensor:
        return BATCHES[index]

    def __len__(self) -> int:
        return 2


class Callee:
    """An object that can be called."""

    def __call__(self, *given: object) -> None: ...


def fit(model: Any = None, data: Any = BATCHES, **settings: Any) -> ld.Run:
    """`ld.fit` as briefly as can be."""
    return ld.fit(Net() if model is None else model, data, **{"max_epochs": 1} | QUIET | settings)


def net(base: type = Net, **members: Any) -> Any:
    """An instance of a new class `New` with these members."""
    return type("New", (base,), members)()


def of(kind: type, **members: Any) -> Any:
    """A callback or data object of a new class with these members."""
    return type(kind.__name__, (kind,), members)()


def marked(role: str, function: Any) -> Any:
    """The function with the mark of a role."""
    return getattr(ld, role)(function)


def start(function: Any) -> Any:
    return ld.on_train_start(function)


def optimizing(form: Callable[[SGD, Any], Any]) -> Callable[[], object]:
    """Fit a model whose configure_optimizers returns this form of an optimizer and its scheduler."""

    def optimizers(self: Any) -> Any:
        optimizer = SGD(self.parameters(), lr=0.1)
        return form(optimizer, StepLR(optimizer, 1))

    return lambda: fit(net(optimizers=optimizers))


def returning(result: Callable[[Tensor], Any], **settings: Any) -> Callable[[], object]:
    """Fit a model whose training step returns this, made of its loss."""
    return lambda: fit(net(step=lambda self, batch: result(self(batch).pow(2).mean())), **settings)


def logging(*given: Any, **options: Any) -> Callable[[], object]:
    """Fit a model whose training step calls `ld.log` so."""

    def step(self: Any, batch: Tensor) -> Tensor:
        loss: Tensor = self(batch).mean()
        ld.log(*given, **options)
        return loss

    return lambda: fit(net(step=step))


def configured(role: str, returned: Any) -> Callable[[], object]:
    """Fit a model in which a configure role returns this."""
    return lambda: fit(net(made=marked(role, lambda self: returned(self) if callable(returned) else returned)))


async def coroutine(self: object) -> None: ...


def generator(self: object) -> Iterator[None]:
    yield


async def async_generator(self: object) -> AsyncIterator[None]:
    yield


def fresh(function: Any) -> Any:
    """A copy of the function, which carries no mark yet."""
    return types.FunctionType(function.__code__, function.__globals__, function.__name__)


class Row(NamedTuple):
    """One wrong use: its error or warning, what that says, how many steps begin, whether it writes."""

    name: str
    error: type[Exception]
    do: Callable[[], object]
    said: tuple[str, ...]
    steps: int
    writes: bool


def row(
    name: str, error: type[Exception], do: Callable[[], object], *said: str, steps: int = 0, writes: bool = False
) -> Row:
    return Row(name, error, do, said, steps, writes or steps > 0)


M, S, D, T, W = ld.MarkError, ld.SettingsError, ld.DataError, ld.StepError, ld.LightdecoWarning

# ---- roles -----------------------------------------------------------------------------------------------------------


def two_mixins() -> object:
    class One:
        @ld.training_step
        def one(self, batch: Tensor) -> None: ...

    class Two:
        @ld.training_step
        def two(self, batch: Tensor) -> None: ...

    return fit(type("New", (One, Two, Plain), {"optimizers": Net.optimizers})())


def marked_inside() -> object:
    model = Plain()
    model.inner = Net()
    return fit(model)


def hidden() -> object:
    model = Net()
    model.step = model.step  # type: ignore[method-assign]
    return fit(model)


def on_the_instance(name: str, mark: str) -> object:
    model = net(step=None) if name == "missing" else net()
    model.mine = marked(mark, lambda batch: 0)
    return fit(model)


ROLE_ROWS = [
    row("on-the-instance", W, lambda: on_the_instance("", "test_step"), "New.mine (", "ld.attach(…, test_step=…)", AT),
    row(
        "step-on-the-instance",
        M,
        lambda: on_the_instance("missing", "training_step"),
        "needs a @training_step, and New marks none; the one on the instance, New.mine (",
        "use ld.attach(…, training_step=…)",
        AT,
    ),
    row("fit-without-step", M, lambda: fit(Plain()), "ld.fit needs a @training_step, and Plain marks none", "decorate"),
    row("validate-without", M, lambda: ld.validate(Plain(), BATCHES, **QUIET), "ld.validate needs a @validation_step"),
    row("test-without", M, lambda: ld.test(Plain(), BATCHES, **QUIET), "ld.test needs a @test_step"),
    row("test-as-validation", M, lambda: ld.test(Net(), BATCHES, **QUIET), "put @ld.test_step on `check` as well"),
    row("predict-without", M, lambda: ld.predict(Plain(), BATCHES, **QUIET), "ld.predict needs a @predict_step"),
    row("without-optimizer", M, lambda: fit(net(Plain, step=Net.step)), "needs a @configure_optimizers"),
    row("removed", M, lambda: fit(net(step=None)), "needs a @training_step", "New.step = None removes the inherited"),
    row("removed-optimizer", M, lambda: fit(net(optimizers=None)), "New.optimizers = None removes"),
    row(
        "undecorated",
        M,
        lambda: fit(net(Plain, training_step=lambda self, batch: 0)),
        "`training_step` looks like a training step but is not decorated: New.training_step",
        AT,
    ),
    row(
        "misspelt",
        M,
        lambda: fit(net(Plain, trainning_step=lambda self, batch: 0)),
        "`trainning_step` looks like a training step",
        AT,
    ),
    row(
        "misspelt-optimizer",
        M,
        lambda: fit(net(Plain, step=Net.step, configure_optimisers=lambda self: 0)),
        "`configure_optimisers` looks like a configure optimizers",
        AT,
    ),
    row(
        "misspelt-predict",
        M,
        lambda: ld.predict(net(predict_stp=lambda self, batch: 0), BATCHES, **QUIET),
        "`predict_stp` looks like a predict step but is not decorated",
        AT,
    ),
    row("marked-submodule", M, marked_inside, "its submodule `inner` marks one", "only the marks of the root count"),
    row(
        "twice-in-a-class",
        M,
        lambda: fit(net(Plain, one=marked("test_step", lambda s, b: 0), two=marked("test_step", lambda s, b: 0))),
        "@test_step stands on two methods, New.one (",
        "and New.two (",
        AT,
    ),
    row("twice-in-mixins", M, two_mixins, "@training_step stands on two methods", "New.two (", "New.one (", AT),
    row(
        "twice-in-base-and-subclass",
        M,
        lambda: fit(net(Other, mine=marked("training_step", lambda self, batch: 0))),
        "New.step (",
        "New.mine (",
        "write `name = None` in the subclass",
        AT,
    ),
    row(
        "twice-on-a-method",
        M,
        lambda: marked("training_step", marked("training_step", fresh(coroutine))),
        "coroutine is marked @training_step twice; remove one",
    ),
    row("training-step-on-data", M, lambda: fit(data=of(Source, s=Net.step)), "stands on the data", "on the model", AT),
    row(
        "optimizers-on-callback",
        M,
        lambda: fit(callbacks=of(Listener, o=Net.optimizers)),
        "Listener.o (",
        "marked @configure_optimizers, stands on the callback; this role belongs on the model",
        AT,
    ),
    row("step-on-callback", M, lambda: fit(callbacks=of(Listener, s=Net.check)), "stands on the callback", AT),
    row(
        "backward-on-data",
        M,
        lambda: fit(data=of(Source, b=marked("backward", lambda self, loss: None))),
        "marked @backward, stands on the data; this role belongs on the model",
        AT,
    ),
    row(
        "loader-on-callback",
        M,
        lambda: fit(callbacks=of(Listener, b=Source.batches)),
        "stands on the callback; this role belongs on the model or the data",
        AT,
    ),
    row(
        "prepare-on-callback",
        M,
        lambda: fit(callbacks=of(Listener, p=marked("prepare_data", lambda self: None))),
        "marked @prepare_data, stands on the callback",
        AT,
    ),
    row(
        "hidden-by-an-attribute", W, hidden, "Net.step (", "is hidden by an attribute of the instance", "ld.attach", AT
    ),
]

# ---- what carries a mark, and asks for what --------------------------------------------------------------------------


def kind(name: str, thing: Callable[[], Any], *said: str) -> Row:
    """A mark for on_train_start on something else than a plain method."""
    return row(name, M, lambda: fit(net(start=thing())), "New.start (", "@on_train_start", *said, AT)


def asks(name: str, step: Any, *said: str) -> Row:
    """A training step with wrong arguments."""
    return row(name, M, lambda: fit(net(step=fresh(step))), "New.step (", "marked @training_step", AT, *said)


METHOD_ROWS = [
    kind("staticmethod", lambda: staticmethod(start(lambda: None)), "is a staticmethod", "remove @staticmethod"),
    kind("classmethod", lambda: classmethod(start(lambda cls: None)), "is a classmethod"),
    kind("property", lambda: property(start(lambda self: None)), "is a property"),
    kind("cached_property", lambda: functools.cached_property(start(lambda self: None)), "is a cached_property"),
    kind("partialmethod", lambda: functools.partialmethod(start(lambda self, a: None), 1), "is a partialmethod"),
    kind("lru_cache", lambda: functools.lru_cache(start(lambda self: None)), "_lru_cache_wrapper, not a plain method"),
    kind("partial", lambda: start(functools.partial(fresh(coroutine))), "partial, not a plain method"),
    kind("callable-object", lambda: start(Callee()), "Callee, not a plain method"),
    kind("async", lambda: start(fresh(coroutine)), "is an async function"),
    kind("async-below-no-grad", lambda: start(torch.no_grad()(fresh(coroutine))), "is an async function"),
    kind("async-generator", lambda: start(fresh(async_generator)), "is an async function"),
    kind("generator", lambda: start(fresh(generator)), "is a generator"),
    kind("generator-below-no-grad", lambda: start(torch.no_grad()(fresh(generator))), "is a generator"),
    row("property-overrides", M, lambda: fit(net(step=property(lambda self: 0))), "New.step", "is a property", AT),
    row("number-overrides", M, lambda: fit(net(step=3)), "New.step carries (or inherits) the mark", "is a int"),
    row("generator-overrides", M, lambda: fit(net(step=fresh(generator))), "@training_step, is a generator", AT),
    asks("batch_index", lambda self, batch, batch_index: 0, "asks for ['batch_index']; it may", "mean 'batch_idx'?"),
    asks("second", lambda self, x, y: 0, "asks for ['y']"),
    asks("optimizer", lambda self, batch, *, optimizer: 0, "asks for ['optimizer']"),
    asks("after-a-default", lambda self, batch, other=0, run=None, /: 0, "'run' can only be given by position"),
    asks("no-self", lambda: 0, "takes no arguments; its first one must be the object"),
    asks("no-self-but-batch", lambda *, batch: 0, "takes no arguments"),
    asks("star", lambda self, *args: 0, "takes *args, which names nothing"),
    row(
        "event-asks",
        M,
        lambda: fit(net(s=start(lambda self, loss: None))),
        "asks for ['loss']; it may ask for ['run', 'model']",
        AT,
    ),
    row(
        "callback-asks",
        M,
        lambda: fit(callbacks=of(Listener, s=marked("on_train_batch_end", lambda self, output: None))),
        "Listener.s (",
        "did you mean 'outputs'?",
        AT,
    ),
    row("data-asks", M, lambda: fit(data=of(Source, s=marked("setup", lambda self, stag: 0))), "mean 'stage'?", AT),
    row("optimizers-ask", M, lambda: fit(net(optimizers=lambda self, lr: 0)), "New.optimizers (", "['lr']", AT),
    row(
        "run-before-the-run",
        M,
        lambda: fit(net(c=marked("configure_callbacks", lambda self, run: []))),
        "marked @configure_callbacks, asks for `run`; there is no run yet",
        AT,
    ),
    row(
        "misspelt-default",
        W,
        lambda: fit(net(step=lambda self, batch, batch_index=0: self(batch).mean())),
        "no argument is called 'batch_index', so it keeps its default; did you mean 'batch_idx'?",
        AT,
    ),
    row(
        "misspelt-keyword-default",
        W,
        lambda: fit(net(step=lambda self, batch, *, models=None: self(batch).mean())),
        "did you mean 'model'?",
        AT,
    ),
]


# ---- decorators, near misses -----------------------------------------------------------------------------------------


def wrong_mark(name: str, do: Callable[[], object], *said: str) -> Row:
    return row(name, M, do, *said)


DECORATOR_ROWS = [
    wrong_mark(
        "on-misspelt", lambda: ld.on("train_batch_ends"), "no event 'train_batch_ends'", "'on_train_batch_end'?"
    ),
    wrong_mark("on-a-role", lambda: ld.on("training_step"), "there is no event 'training_step'"),
    wrong_mark("on-nothing", lambda: ld.on(""), "there is no event ''", "allowed: on_fit_start"),
    wrong_mark("on-without-a-name", lambda: ld.on(lambda self: None), "there is no event"),  # type: ignore[arg-type]
    wrong_mark("every-0", lambda: ld.on("train_end", every=0), "every=0): allowed: an integer of at least 1"),
    wrong_mark("every-true", lambda: ld.on("train_end", every=True), "every=True"),
    wrong_mark("every-text", lambda: ld.on("train_end", every="3"), "every='3'"),  # type: ignore[arg-type]
    wrong_mark("every-float", lambda: ld.on("train_end", every=2.0), "every=2.0"),  # type: ignore[arg-type]
    wrong_mark("every-on-event", lambda: ld.on_train_end(every=3), 'write @ld.on("train_end", every=3)'),  # type: ignore[call-overload]
    wrong_mark("every-on-role", lambda: ld.validation_step(every=2), "this decorator takes no options"),  # type: ignore[call-overload]
    wrong_mark("every-on-step", lambda: ld.training_step(every=0), "@training_step(every=0): allowed: an integer"),
    wrong_mark("step-by-name", lambda: ld.training_step("disc"), 'write @ld.training_step(optimizer="disc")'),  # type: ignore[call-overload]
    wrong_mark("optimizer-by-number", lambda: ld.training_step(optimizer=1), "optimizer=1): allowed: the name"),  # type: ignore[call-overload]
    wrong_mark("above-staticmethod", lambda: ld.setup(staticmethod(lambda: None)), "@setup stands on a staticmethod"),
    wrong_mark("above-classmethod", lambda: ld.setup(classmethod(lambda cls: None)), "stands on a classmethod"),  # type: ignore[call-overload]
    wrong_mark("above-property", lambda: ld.setup(property(lambda self: None)), "@setup stands on a property"),  # type: ignore[call-overload]
    wrong_mark("above-a-class", lambda: ld.training_step(Net), "@training_step stands on a type"),
    wrong_mark("above-a-number", lambda: ld.validation_step(3), "@validation_step stands on a int"),  # type: ignore[call-overload]
    wrong_mark("above-a-builtin", lambda: ld.validation_step(len), "@validation_step cannot mark"),
    row(
        "near-event",
        W,
        lambda: fit(net(on_train_epoch_strat=lambda self: None)),
        "New.on_train_epoch_strat (",
        "is it @ld.on_train_epoch_start?",
        AT,
    ),
    row(
        "event-without-on",
        W,
        lambda: fit(net(train_epoch_end=lambda self: None)),
        "is it @ld.on_train_epoch_end?",
        AT,
    ),
    row(
        "undecorated-event",
        W,
        lambda: fit(callbacks=of(Listener, on_train_end=lambda self: None)),
        "Listener.on_train_end (",
        "has the name of a role but is not decorated; add @ld.on_train_end",
        AT,
    ),
    row(
        "undecorated-test-step",
        W,
        lambda: fit(net(test_step=lambda self, batch: 0)),
        "New.test_step (",
        "add @ld.test_step",
        AT,
    ),
    row(
        "undecorated-loader",
        W,
        lambda: fit(data=of(Source, val_dataloader=lambda self: BATCHES)),
        "Source.val_dataloader (",
        "add @ld.val_dataloader",
        AT,
    ),
    row("near-loader", W, lambda: fit(data=of(Source, val_loader=lambda self: 0)), "is it @ld.val_dataloader?", AT),
]

# ---- what configure roles return -------------------------------------------------------------------------------------

_PLAIN_OPTIMIZERS: list[tuple[str, Callable[[Any, Any], Any], tuple[str, ...]]] = [
    ("none", lambda o, s: None, ("returned NoneType, which is no optimizer", "allowed: an optimizer, (optimizer,")),
    ("class", lambda o, s: SGD, ("returned SGD (the class), which is no optimizer",)),
    ("scheduler", lambda o, s: s, ("returned StepLR, which is no optimizer",)),
    ("text", lambda o, s: "adam", ("returned str, which is no optimizer",)),
    ("function", lambda o, s: lambda: o, ("returned function",)),
    ("set", lambda o, s: {o}, ("returned set",)),
    ("parameters", lambda o, s: o.param_groups, ("returned dict, which is no optimizer",)),
    ("empty-list", lambda o, s: [], ("returned no optimizer",)),
    ("empty-lists", lambda o, s: ([], []), ("returned no optimizer",)),
    ("swapped", lambda o, s: (s, o), ("returned StepLR, which is no optimizer",)),
    ("scheduler-class", lambda o, s: (o, StepLR), ("StepLR (the class) beside an optimizer", "neither a scheduler")),
    ("scheduler-text", lambda o, s: (o, "cosine"), ("returned str beside an optimizer",)),
    ("key", lambda o, s: {"optimizer": o, "lr_schedule": s}, ("'lr_schedule'", "did you mean 'lr_scheduler'?")),
    (
        "inner-key",
        lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": s, "freq": 2}},
        ("with 'freq'; allowed",),
    ),
    ("lr-class", lambda o, s: {"optimizer": o, "lr_scheduler": StepLR}, ("StepLR (the class) as a scheduler",)),
    ("lr-number", lambda o, s: {"optimizer": o, "lr_scheduler": {"scheduler": 3}}, ("int as a scheduler",)),
    ("lists", lambda o, s: ([o], [s, s]), ("1 optimizers and 2 schedulers",)),
    ("key-number", lambda o, s: {1: o}, ("a dict whose keys are not all names",)),
    ("key-empty", lambda o, s: {"": o}, ("a dict whose keys are not all names",)),
    ("twice", lambda o, s: {"a": o, "b": o}, ("the same optimizer twice",)),
    ("foreign-scheduler", lambda o, s: (SGD(o.param_groups, lr=1.0), s), ("made for another optimizer",)),
    ("foreign-parameters", lambda o, s: SGD(Plain().parameters(), lr=1.0), ("holds no parameter of New",)),
]


def sgd() -> SGD:
    return SGD(Plain().parameters(), lr=0.1)


def optim(name: str, options: Callable[[], dict[str, Any]], *said: str) -> Row:
    return row(f"optim-{name}", S, lambda: ld.Optim(**{"optimizer": sgd()} | options()), "Optim", *said)


def own_callbacks(name: str, returned: Any, *said: str, error: type[Exception] = M) -> Row:
    return row(f"callbacks-{name}", error, configured("configure_callbacks", returned), "New.made (", AT, *said)


TWICE = Listener()

CONFIGURE_ROWS = [
    *(
        row(f"optimizers-{name}", M, optimizing(form), "New.optimizers (", AT, *said)
        for name, form, said in _PLAIN_OPTIMIZERS
    ),
    optim("class", lambda: {"optimizer": SGD}, "optimizer=SGD (the class)); allowed: a torch.optim.Optimizer"),
    optim("none", lambda: {"optimizer": None}, "optimizer=NoneType)"),
    optim("scheduler-class", lambda: {"scheduler": StepLR}, "scheduler=StepLR (the class)); allowed: an object with"),
    optim("scheduler-optimizer", lambda: {"scheduler": sgd()}, "scheduler=SGD)"),
    optim("interval", lambda: {"interval": "epochs"}, "interval='epochs'); allowed: 'epoch', 'step'; did you mean"),
    optim("interval-none", lambda: {"interval": None}, "interval=None)"),
    optim("every-0", lambda: {"every": 0}, "every=0); allowed: an integer of at least 1"),
    optim("every-true", lambda: {"every": True}, "every=True)"),
    optim("every-float", lambda: {"every": 1.0}, "every=1.0)"),
    optim("monitor", lambda: {"monitor": 3}, "monitor=3); allowed: the name of a metric"),
    optim("monitor-empty", lambda: {"monitor": ""}, "monitor=''); allowed: the name of a metric"),
    row("optim-interval-alone", W, optimizing(lambda o, s: ld.Optim(o, interval="step")), "returned no scheduler", AT),
    row("optim-monitor-alone", W, optimizing(lambda o, s: {"optimizer": o, "monitor": "a"}), "have no effect", AT),
    own_callbacks("class", lambda self: [Listener], "Listener is a class; give an instance: Listener(…)"),
    own_callbacks("text", "early", "the callback 'early' is a str; give an object with marked methods"),
    own_callbacks("number", 3, "the callback 3 is a int"),
    own_callbacks("dict", {"a": Listener()}, "is a dict"),
    own_callbacks("none-in-it", [None], "the callback None is a NoneType"),
    own_callbacks("nested", [[Listener()]], "is a list; give an object with marked methods, or a list of such"),
    own_callbacks("without-marks", lambda self: [Callee()], "the callback Callee marks no method; decorate one"),
    own_callbacks("same-twice", [TWICE, TWICE], "callbacks holds the same Listener twice", error=S),
    own_callbacks("itself", lambda self: [self], "callbacks holds the model itself", error=S),
    row(
        "callbacks-same-as-setting",
        S,
        lambda: fit(net(made=marked("configure_callbacks", lambda self: TWICE)), callbacks=[TWICE]),
        "callbacks holds the same Listener twice",
        AT,
    ),
    row("accelerator-none", M, configured("configure_accelerator", None), "New.made (", "returned NoneType", AT),
    row("accelerator-keys", M, configured("configure_accelerator", {1: 2}), "a dict of arguments for Accelerator", AT),
    row("accelerator-list", M, configured("configure_accelerator", ["cpu"]), "returned list", AT),
    row("model-new", M, configured("configure_model", lambda self: Plain()), "New.made (", "returned a Plain", AT),
    row(
        "model-layers", M, configured("configure_model", [1]), "returned a list; it returns nothing", "self.net = …", AT
    ),
]

# ---- models, data, callbacks, settings -------------------------------------------------------------------------------


def data(name: str, error_data: Callable[[], Any], *said: str) -> Row:
    return row(f"data-{name}", D, lambda: fit(data=error_data()), *said)


def setting(name: str, given: dict[str, Any], *said: str) -> Row:
    return row(f"setting-{name}", S, lambda: ld.fit(Net(), BATCHES, **QUIET | given), *said)


GIVEN_ROWS = [
    row("model-class", M, lambda: fit(Net), "model is the class Net; give an instance: Net(…)"),
    row("model-function", M, lambda: fit(lambda x: x), "model is a function; allowed: a torch.nn.Module"),
    row("model-state-dict", M, lambda: fit(Net().state_dict()), "model is a OrderedDict"),
    row("model-none", M, lambda: ld.validate(None, BATCHES), "model is a NoneType"),  # type: ignore[arg-type]
    row("model-wrapped", M, lambda: fit(nn.Sequential(Net())), "its submodule `0` marks one"),
    row("swapped", M, lambda: ld.fit(BATCHES, Net(), max_epochs=1), "model is a list"),  # type: ignore[arg-type]
    data("none", lambda: None, "ld.fit has no train data: give a loader", "@ld.train_dataloader"),
    data("text", lambda: "mnist", "data is the str 'mnist'; give a loader"),
    data("number", lambda: 3, "data is a int, which cannot be iterated; give a DataLoader"),
    data("class", lambda: DataLoader, "data is the class DataLoader; give an instance"),
    data("dataset", lambda: DATASET, "the dataset TensorDataset, which gives single samples; wrap it"),
    data("like-a-dataset", Sequence, "has __getitem__ but no __iter__, as a dataset has; wrap it"),
    data("tensor", lambda: torch.ones(4, 2), "data is a Tensor, not a loader"),
    data("two-tensors", lambda: (torch.ones(4, 2), torch.ones(4)), "a tuple of two arrays"),
    data("module", Plain, "data is the module Plain; the order of arguments is (model, data)"),
    data("three", lambda: (DataLoader(DATASET),) * 3, "data is a tuple of 3 loaders; allowed: two, (train, val)"),
    data("key", lambda: {"trian": BATCHES}, "the key 'trian'; allowed: 'train'", "did you mean 'train'?"),
    data("key-number", lambda: {0: BATCHES}, "data is a dict with the key 0"),
    data("only-val", lambda: {"val": BATCHES}, "ld.fit has no train data"),
    data("empty", list, "the train loader is empty: its length is 0"),
    data("empty-loader", lambda: DataLoader(DATASET, batch_size=8, drop_last=True), "drop_last=True"),
    row("data-empty-iterator", D, lambda: fit(data=iter([])), "train loader yielded no batch in epoch 0", writes=True),
    data(
        "several", lambda: {"train": {"a": BATCHES, "b": BATCHES}}, "training reads one: join them with CombinedLoader"
    ),
    data("val-name", lambda: {"train": BATCHES, "val": {"a/b": BATCHES}}, "the name 'a/b'; allowed: a string without"),
    data("val-empty", lambda: {"train": BATCHES, "val": {}}, "val was given an empty dict"),
    data("unmarked-class", lambda: Source, "data is the class Source; give an instance of it: Source(…)"),
    row(
        "data-role-yields",
        M,
        lambda: fit(data=of(Source, batches=fresh(generator))),
        "Source.batches (",
        "marked @train_dataloader, is a generator (it has `yield`)",
        AT,
    ),
    row("val-without-step", W, lambda: fit(net(check=None), (BATCHES, BATCHES)), "New marks no @validation_step, so"),
    row("eval-mode", W, lambda: fit(Net().eval()), "Net was in eval mode; it is put into train()"),
    data("role-none", lambda: of(Source, batches=lambda self: None), "Source.batches (", "returned None; return a", AT),
    data("role-dataset", lambda: of(Source, batches=lambda self: DATASET), "the dataset TensorDataset"),
    data("role-text", lambda: of(Source, batches=lambda self: "a"), "the train loader is the str 'a'"),
    row(
        "data-for-test",
        D,
        lambda: ld.test(net(check=ld.test_step(fresh(Net.check))), ([], [])),
        "means (train, val); test",
    ),
    row(
        "data-mode",
        D,
        lambda: ld.CombinedLoader([BATCHES], mode="min_siz"),  # type: ignore[arg-type]
        "allowed: 'min_size'",
        "did you mean 'min_size'?",
    ),
    row("callback-class", S, lambda: fit(callbacks=Listener), "callbacks is", "call it, as in Listener()"),
    row("callback-class-in-list", S, lambda: fit(callbacks=[Listener]), "call it, as in Listener()"),
    row(
        "callback-text",
        S,
        lambda: fit(callbacks="early_stopping"),
        "callbacks is 'early_stopping'; allowed: an object with marked methods, a list of such",
    ),
    row("callback-none-in-list", S, lambda: fit(callbacks=[None]), "callbacks is [None]"),
    row("callback-function", S, lambda: fit(callbacks=lambda run: None), "callbacks is <function"),
    row(
        "callback-without-marks", M, lambda: fit(callbacks=Callee()), "Callee marks no method", "@ld.on_train_epoch_end"
    ),
    row(
        "callback-undecorated",
        M,
        lambda: fit(callbacks=of(Callee, on_train_end=lambda self: None)),
        "the callback Callee marks no method; decorate one, such as `on_train_end` with @ld.on_train_end: Callee.on_tr",
        AT,
    ),
    row("callback-twice", S, lambda: fit(callbacks=[TWICE, Listener(), TWICE]), "the same Listener twice; remove one"),
    row(
        "callback-is-data", S, lambda: fit(data=(s := Source()), callbacks=s), "callbacks holds the data object itself"
    ),
    setting("no-limit", {}, "fit needs an end", "max_epochs, max_steps and max_time"),
    setting("max_epoch", {"max_epoch": 3}, "max_epoch is no setting; did you mean 'max_epochs'?"),
    setting("epochs", {"epochs": 3}, "epochs is no setting; did you mean"),
    setting("lr", {"lr": 0.1}, "lr is no setting; the settings are max_epochs, "),
    setting("endless", {"max_epochs": -1}, "max_epochs is -1; allowed: an integer >= 1, None; no limit is None"),
    setting("text", {"max_steps": "100"}, "max_steps is '100'; allowed: an integer >= 1"),
    setting("bool", {"max_epochs": True}, "max_epochs is True; allowed: an integer"),
    setting("order", {"max_epochs": 2, "min_epochs": 3}, "min_epochs is 3; allowed: at most max_epochs, which is 2"),
    setting("precision", {"max_epochs": 1, "precision": 16}, "precision is 16; allowed", "did you mean '16-mixed'?"),
    setting("root_dir", {"max_epochs": 1, "root_dir": "a\0b"}, "root_dir is 'a\\x00b'; allowed: a path"),
    setting("name", {"max_epochs": 1, "name": "../x"}, "name is '../x'; allowed: a directory's name"),
    setting("dict", {"settings": {"max_epochs": 1}}, "settings is {'max_epochs': 1}; allowed: a Settings(…) or None"),
    row("setting-in-test", W, lambda: ld.validate(Net(), BATCHES, max_epochs=1, **QUIET), "max_epochs=1 has no effect"),
    row("seed", S, lambda: ld.seed_everything(-1), "seed is -1; allowed: an integer from 0"),
]

# ---- what steps return and log ---------------------------------------------------------------------------------------


def result(name: str, made: Callable[[Tensor], Any], *said: str, **settings: Any) -> Row:
    return row(f"step-{name}", T, returning(made, **settings), "New.step (", AT, *said, steps=1)


def log(name: str, do: Callable[[], object], *said: str) -> Row:
    return row(f"log-{name}", T, do, "ld.log", *said, steps=1)


STEP_ROWS = [
    result("none", lambda loss: None, "returned no loss; return a scalar tensor"),
    result("text", lambda loss: "loss", "returned a str; return a scalar loss or a dict"),
    result("number", lambda loss: loss.item(), "returned a float; return a scalar loss"),
    result("numpy", lambda loss: loss.detach().numpy(), "returned a ndarray"),
    result("tuple", lambda loss: (loss, {}), "returned a tuple"),
    result("vector", lambda loss: loss.expand(4), "a tensor of shape (4,); return a scalar loss, such as its mean()"),
    result("empty-tensor", lambda loss: loss.expand(0), "a tensor of shape (0,)"),
    result("detached", lambda loss: loss.detach(), "returned a loss without gradient", ".detach()"),
    result("detached-in-dict", lambda loss: {"loss": loss.detach()}, "returned a loss without gradient"),
    result(
        "no-loss", lambda loss: {"acc": 1.0}, 'returned no loss; return a scalar tensor, or a dict with one under "loss'
    ),
    result("losss", lambda loss: {"losss": loss}, "returned no loss", "not under 'losss'"),
    result("mse_loss", lambda loss: {"acc": 1.0, "MSE_Loss": loss}, "returned no loss", "not under 'MSE_Loss'"),
    result("loss-none", lambda loss: {"loss": None}, "returned no loss"),
    result("loss-number", lambda loss: {"loss": 0.5}, 'returned a float under "loss"; it must be a scalar tensor'),
    result("loss-vector", lambda loss: {"loss": loss.expand(2)}, 'a tensor of shape (2,) under "loss"'),
    result("key-number", lambda loss: {"loss": loss, 0: loss}, "a dict with the key 0; keys must be str"),
    result("key-empty", lambda loss: {"loss": loss, "": loss}, "a dict with the key ''"),
    result("weight-negative", lambda loss: {"loss": loss, "weight": -1}, '"weight": -1; allowed: a finite number'),
    result("weight-tensor", lambda loss: {"loss": loss, "weight": torch.tensor(-1)}, '"weight": -1; allowed'),
    result("weight-nan", lambda loss: {"loss": loss, "weight": float("nan")}, '"weight": nan'),
    result("weight-text", lambda loss: {"loss": loss, "weight": "2"}, 'a str under "weight"'),
    result("weight-bool", lambda loss: {"loss": loss, "weight": True}, 'a bool under "weight"'),
    result("weight-vector", lambda loss: {"loss": loss, "weight": torch.ones(2)}, 'a Tensor under "weight"'),
    result(
        "batch_size-0", lambda loss: {"loss": loss, "batch_size": 0}, '"batch_size": 0; allowed: an int of at least 1'
    ),
    result("batch_size-float", lambda loss: {"loss": loss, "batch_size": 4.0}, '"batch_size": 4.0'),
    result("batch_size-bool", lambda loss: {"loss": loss, "batch_size": True}, '"batch_size": True'),
    result(
        "carry",
        lambda loss: {"loss": loss, "carry": 1},
        'returned "carry", which nothing takes up: it is handed from part to part',
    ),
    row("val-text", T, lambda: ld.validate(net(check=lambda s, b: "a"), BATCHES, **QUIET), "returned a str", AT),
    row("val-vector", T, lambda: ld.validate(net(check=lambda s, b: s(b)), BATCHES, **QUIET), "shape (4, 1)", AT),
    row("step-nan", T, returning(lambda loss: loss * float("nan")), "not finite", "batch 0 of epoch 0", steps=2),
    row(
        "batch-without-tensor",
        D,
        lambda: fit(net(step=lambda s, b: s(BATCHES[0]).mean()), ["a"]),
        '"batch_size"',
        steps=1,
    ),
    log("name-empty", logging("", 1.0), "the name ''; allowed: a str that is not empty"),
    log("name-number", logging(3, 1.0), "the name 3"),
    log("name-reserved", logging("step", 1.0), "the name 'step'; allowed", "none of"),
    log("name-of-the-loss", logging("train/loss", 1.0), "the loss that the step returns is logged under this name"),
    log("text", logging("a", "b"), "'a') got a str; allowed: a number, a tensor of one element"),
    log("none", logging("a", None), "got a NoneType"),
    log("vector", logging("a", torch.ones(3)), "got a tensor of shape (3,)"),
    log("reduce", logging("a", 1.0, reduce="avg"), "reduce='avg'); allowed: ('mean',"),
    log("reduce-near", logging("a", 1.0, reduce="means"), "did you mean 'mean'?"),
    log("nowhere", logging("a", 1.0, on_step=False, on_epoch=False), "would record nothing; leave one of them out"),
    row(
        "log-batch_size", T, logging("a", 1.0, batch_size=0), "batch_size is 0; allowed: an int of at least 1", steps=1
    ),
    row("log-batch_size-float", T, logging("a", 1.0, batch_size=4.0), "batch_size is 4.0", steps=1),
]

# ---- attach and mixins -----------------------------------------------------------------------------------------------


def attach(name: str, thing: Callable[[], Any], given: dict[str, Any], *said: str) -> Row:
    """A call of attach that is refused at once and changes nothing."""

    def do() -> object:
        target = thing()
        before = dict(getattr(target, "__dict__", {}))
        try:
            return ld.attach(target, **given)
        finally:
            assert dict(getattr(target, "__dict__", {})) == before

    return row(f"attach-{name}", M, do, "ld.attach", *said)


def attached(name: str, step: Any, *said: str) -> Row:
    """A training step that attach takes and the verb refuses."""
    return row(f"attached-{name}", M, lambda: fit(ld.attach(Net(), training_step=step)), "training_step", *said)


class Asynchronous:
    """An object whose call is a coroutine."""

    async def __call__(self, model: nn.Module, batch: Tensor) -> None: ...


class Mixed(ld.LightdecoMixin, Plain):
    """A model with every mixin."""

    def __init__(self, width: int = 3, keep: str = "") -> None:
        super().__init__()
        if keep:
            self.save_hyperparameters(keep)

    def later(self) -> None:
        self.save_hyperparameters()


ATTACH_ROWS = [
    attach("misspelt", Net, {"trainig_step": Net.step}, "'trainig_step' is no role; did you mean 'training_step'?"),
    attach("without-on", Net, {"fit_start": Net.step}, "did you mean 'on_fit_start'?"),
    attach("far", Net, {"zzz": Net.step}, "'zzz' is no role; allowed: training_step, ", "and events"),
    attach("none", Net, {"training_step": None}, "training_step=None cannot be called"),
    attach("text", Net, {"training_step": "step"}, "training_step='step' cannot be called"),
    attach("class", Net, {"training_step": Net}, "is a class; give a function of the object"),
    attach("list", Net, {"validation_step": [Net.step]}, "validation_step takes one function, not list"),
    attach("list-of-numbers", Net, {"on_fit_start": [Net.step, 3]}, "on_fit_start=3 cannot be called"),
    attach("slots", object, {"training_step": Net.step}, "cannot write on a object"),
    attach("number", lambda: 3, {"training_step": Net.step}, "cannot write on a int"),
    attach("builtin", lambda: int, {"training_step": Net.step}, "cannot write on the class int; give a subclass"),
    attached("argument", lambda m, batch, index: 0, "Net.training_step (", "asks for ['index']", AT),
    attached("no-arguments", lambda: 0, "takes no arguments", AT),
    attached("builtin", torch.relu, "the arguments of", "are unknown; wrap it in a `def` or lambda"),
    attached("async", coroutine, "is an async function", AT),
    attached("generator", generator, "is a generator", AT),
    attached("async-object", Asynchronous(), "is an async function"),
    row(
        "attached-owner",
        M,
        lambda: fit(callbacks=ld.attach(Callee(), training_step=Net.step)),
        "stands on the callback",
    ),
    row(
        "mixin-optimizers", ld.LightdecoError, lambda: Mixed().optimizers(), "there is no optimizer", "a running ld.fit"
    ),
    row("mixin-hparams-later", ld.LightdecoError, lambda: Mixed().later(), "must be called in the __init__"),
    row(
        "mixin-hparams-name",
        ld.LightdecoError,
        lambda: Mixed(keep="widht"),
        "no argument 'widht'; did you mean 'width'?",
    ),
    row(
        "mixin-fit", M, lambda: Mixed().fit(BATCHES, max_epochs=1, **QUIET), "ld.fit needs a @training_step, and Mixed"
    ),
    row("mixin-setting", S, lambda: Mixed().fit(BATCHES, max_epoch=1), "max_epoch is no setting"),  # type: ignore[call-arg]
]

TABLE = [
    *ROLE_ROWS, *METHOD_ROWS, *DECORATOR_ROWS, *CONFIGURE_ROWS, *GIVEN_ROWS, *STEP_ROWS, *ATTACH_ROWS
]  # fmt: skip


class Counts:
    """How often a model of this file was called in training, and how often an optimizer made a step."""

    steps = updates = 0

    def module(self, module: nn.Module, given: object) -> None:
        self.steps += isinstance(module, Plain) and module.training and torch.is_grad_enabled()

    def optimizer(self, optimizer: object, args: object, kwargs: object) -> None:
        self.updates += 1


@pytest.fixture
def counts() -> Iterator[Counts]:
    """Counts steps while the test runs."""
    counting = Counts()
    handles = (register_module_forward_pre_hook(counting.module), register_optimizer_step_pre_hook(counting.optimizer))
    yield counting
    for handle in handles:
        handle.remove()


def outcome(do: Callable[[], object]) -> tuple[Exception | None, list[warnings.WarningMessage]]:
    """What a call raises, and the warnings that it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            do()
        except Exception as error:
            return error, caught
    return None, caught


@pytest.mark.parametrize("wrong", TABLE, ids=lambda wrong: wrong.name)
def test_a_wrong_use_is_refused(wrong: Row, counts: Counts) -> None:
    """By the right error, with what, where and what instead; before the first batch, or before the first update."""
    error, caught = outcome(wrong.do)
    if wrong.error is ld.LightdecoWarning:
        assert error is None
        (message,) = {str(warning.message) for warning in caught}
        assert all(issubclass(warning.category, ld.LightdecoWarning) for warning in caught)
    else:
        assert type(error) is wrong.error, repr(error)
        assert not caught
        assert counts.steps == wrong.steps
        assert counts.updates == max(0, wrong.steps - 1) * 2
        assert wrong.writes or not [path for path in Path().rglob("*") if path.is_file() and path.stat().st_size]
        message = str(error)
    for part in wrong.said:
        assert part in message, message
    assert len(message) < 1000
    assert "\n" not in message
    if AT in wrong.said:
        for line in re.findall(rf"{re.escape(AT)}(\d+)\)", message):
            assert re.search(r"\bdef |lambda|@", linecache.getline(__file__, int(line))), message


def test_the_table_is_large_and_its_names_differ() -> None:
    """At least a hundred wrong uses, each once."""
    assert len(TABLE) == len({wrong.name for wrong in TABLE}) >= 100


def required(role: str) -> dict[str, Any]:
    """What `fit` cannot do without, but for this role."""
    return {name: value for name, value in vars(Net).items() if {m.role for m in marks_of(value)} & NEEDED - {role}}


NEEDED = {"training_step", "configure_optimizers"}
KINDS: dict[str, Callable[[Any], Any]] = {
    "staticmethod": staticmethod,
    "classmethod": classmethod,
    "property": property,
    "cached_property": functools.cached_property,
    "partialmethod": functools.partialmethod,
    "lru_cache": functools.lru_cache,
    "partial": lambda function: functools.partial(function, 1),
    "async function": lambda function: fresh(coroutine),
    "generator": lambda function: fresh(generator),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mark_outside", [True, False])
def test_no_role_may_stand_on_anything_but_a_plain_method(kind: str, mark_outside: bool) -> None:
    """For every role and event, with the mark around or inside: a MarkError that names the role, before anything."""

    def discovered(role: str) -> object:
        function = fresh(lambda self: None)
        made = KINDS[kind](function if mark_outside else marked(role, function))
        made = marked(role, made) if not marks_of(made) else made
        return discover("fit", net(Plain, **required(role), made=made), None, [])

    for role in ROLES:
        if (role, kind) != ("split_batch", "generator"):  # which may yield its parts
            with pytest.raises(ld.MarkError, match=rf"@{role}\b.*( an? |_){kind}"):
                discovered(role)


# ---- what looks wrong and is right -----------------------------------------------------------------------------------


def attached_twice() -> Any:
    return ld.attach(ld.attach(Net(), training_step=lambda m, b: 1 / 0), training_step=lambda m, b: m(b).mean())


def building_itself() -> Any:
    return net(made=marked("configure_model", lambda self: self))


@pytest.mark.parametrize(
    "model",
    [
        lambda: net(step=lambda self, batch: self(batch).mean()),
        lambda: net(step=ld.training_step(lambda self, batch: self(batch).mean())),
        lambda: net(step=None, other=ld.training_step(lambda self, batch: self(batch).mean())),
        lambda: net(Plain, both=ld.training_step(ld.validation_step(fresh(Net.step))), optimizers=Net.optimizers),
        lambda: net(step=torch.enable_grad()(Net.step)),
        lambda: net(made=marked("configure_callbacks", lambda self: None)),
        lambda: net(made=marked("configure_callbacks", lambda self: (Listener(), Listener()))),
        lambda: net(made=marked("configure_accelerator", lambda self: {})),
        lambda: net(step=lambda self, batch: {"loss": self(batch).mean(), "carry": None, "weight": torch.tensor(2.0)}),
        lambda: net(tool=staticmethod(lambda: None), training=True, mode=property(lambda self: 1 / 0)),
        attached_twice,
        building_itself,
    ],
)
def test_what_looks_wrong_but_is_right_works(model: Callable[[], Any]) -> None:
    """An override without a decorator keeps its mark, `None` makes room for another, and the like; no warning."""
    assert fit(model()).global_step == 2


# ---- generated settings ----------------------------------------------------------------------------------------------


def raising(*given: object, **options: object) -> Any:
    raise RuntimeError("of the value's own class")


#: Methods that a check might call without thinking of it.
DANGEROUS = (
    "__eq__", "__ne__", "__lt__", "__gt__", "__le__", "__ge__", "__repr__", "__str__", "__bool__", "__len__",
    "__iter__", "__int__", "__float__", "__index__", "__contains__", "__getitem__", "__format__", "lower", "items",
)  # fmt: skip


def hostile(base: Any, *given: Any) -> Any:
    """An instance of a subclass of `base` of which every method above raises."""
    return type("Hostile", (base,), dict.fromkeys(DANGEROUS, raising) | {"__hash__": base.__hash__})(*given)


NAN, INF = float("nan"), float("inf")

#: No setting takes these.
NEVER: list[Callable[[], Any]] = [
    lambda: 2**63, lambda: 10**400, lambda: 10**5000, lambda: -(2**63) - 1, lambda: -2, lambda: NAN, lambda: -INF,
    lambda: INF, lambda: 1j, lambda: b"auto", lambda: "", lambda: " ", lambda: "a\0b", lambda: "\x7f", lambda: {1.5},
    lambda: frozenset({1}), lambda: range(3), lambda: (x for x in "ab"), lambda: len, lambda: types, lambda: Net,
    lambda: torch.tensor, lambda: numpy.ones(2), lambda: numpy.float64(NAN), lambda: numpy.timedelta64(3, "s"),
    lambda: [[1]], lambda: [NAN], lambda: [b"x", {"a": [None]}], lambda: {1: {2: 3}}, lambda: {(): [1]}, lambda: [[[]]],
    lambda: ((), ()), lambda: [None], lambda: slice(1), lambda: Ellipsis, lambda: NotImplemented, lambda: bytearray(1),
    lambda: hostile(str, "a\0b"), lambda: hostile(int, -5), lambda: hostile(float, NAN), lambda: hostile(list, [1]),
    lambda: hostile(tuple, (1,)), lambda: hostile(dict, {1: 2}), lambda: hostile(complex, 1),
    lambda: hostile(set, ()), lambda: hostile(bytes, b"a"),
]  # fmt: skip

#: Objects of any class are allowed here: as a callback, a logger, a plugin, ….
TAKE_OBJECTS = {"strategy", "logger", "checkpoint", "callbacks", "profiler"}
NAMES = list(ld.Settings.__dataclass_fields__)
_WORDS = {
    "accelerator": ["auto", "cpu", "gpu", "cuda", "mps", "tpu", "xla"],
    "devices": ["auto"],
    "strategy": ["auto", "ddp", "fsdp", "deepspeed"],
    "precision": ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "fp8", "fp16", "bf16"],
    "deterministic": ["warn"],
    "gradient_clip_algorithm": ["norm", "value"],
    "on_nan": ["raise", "skip", "ignore"],
    "oom": ["raise", "micro"],
    "profiler": ["simple", "advanced", "pytorch"],
}


def near(words: list[str]) -> st.SearchStrategy[str]:
    """Near misses: a letter left out, doubled, exchanged with the next one, or in capitals."""

    def missed(word: str, at: int, how: int) -> str:
        i = at % len(word)
        pair = word[i : i + 2][::-1] + word[i + 2 :]
        return (word[:i] + (word[i + 1 :], word[i] + word[i:], pair, word[i:].upper())[how]).strip()

    drawn = st.builds(missed, st.sampled_from(words), st.integers(0, 30), st.integers(0, 3))
    return drawn.filter(lambda word: word not in words)


def wrong_value(name: str) -> st.SearchStrategy[Any]:
    """Values that no setting, or not this one, takes."""
    kind = str(ld.Settings.__dataclass_fields__[name].type)
    default = ld.Settings.__dataclass_fields__[name].default
    found: list[st.SearchStrategy[Any]] = [st.sampled_from(NEVER).map(lambda make: make())]
    if name not in TAKE_OBJECTS:
        found.append(st.builds(lambda: hostile(object)))
    if name in _WORDS:
        found.append(near(_WORDS[name]))
    if "bool" not in kind:
        found.append(st.booleans())
    if kind in ("bool", "bool | None"):
        found += [st.integers(), st.text(), st.floats()]
    if kind in ("int", "int | None"):
        found += [st.floats(), st.text(), st.integers(max_value=-1), st.lists(st.integers())]
    if kind == "int | float | None":
        found += [
            st.text(),
            st.floats(max_value=0),
            st.integers(max_value=-1),
            st.dictionaries(st.integers(), st.none()),
        ]
    if default is not None:
        found.append(st.none())
    return st.one_of(found)


@settings(max_examples=1000, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(drawn=st.data())
def test_a_thousand_wrong_settings_are_refused_by_name(drawn: st.DataObject) -> None:
    """Each by `SettingsError`, which starts with the name and stays short; no step runs and nothing is written."""
    if misspelt := drawn.draw(st.integers(0, 5)) == 0:
        name = drawn.draw(near(NAMES).filter(lambda word: word not in ("model", "data", "settings")))
        value: Any = 1
    else:
        name = drawn.draw(st.sampled_from(NAMES))
        value = drawn.draw(wrong_value(name))
    batches = (pytest.fail("a batch was read") for _ in range(2))
    with pytest.raises(ld.SettingsError) as caught:
        ld.fit(Net(), batches, **{"max_epochs": 1} | QUIET | {name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is no setting" if misspelt else f"{name} is ")
    assert len(message) < 1000
    assert not set(message) & {"\n", "\0"}
    assert next(Path().iterdir(), None) is None


# ---- generated signatures --------------------------------------------------------------------------------------------


class Parameter(NamedTuple):
    """One parameter: its name, 0 positional-only, 1 either, 2 keyword-only, and whether it has a default."""

    name: str
    kind: int
    default: bool


class Signature(NamedTuple):
    """The parameters of a method after `self`."""

    parameters: list[Parameter]
    star: bool
    keywords: bool

    def source(self) -> str:
        def text(kind: int) -> list[str]:
            return [p.name + "='default'" * p.default for p in self.parameters if p.kind == kind]

        parts = ["self", *text(0), *(["/"] if text(0) else []), *text(1)]
        parts += ["*args"] if self.star else ["*"] if text(2) else []
        parts += [*text(2), *(["**rest"] if self.keywords else [])]
        # `locals()` is evaluated in the method itself, as the first iterable of a comprehension is.
        return f"def method({', '.join(parts)}):\n    seen.append({{k: v for k, v in locals().items() if k != 'self'}})"


@st.composite
def signatures(draw: st.DrawFn, role: str) -> Signature:
    """Any signature that Python allows, of names that the role offers, nearly offers or does not."""
    offered = [*ROLES[role].offers, *ALWAYS]
    pool = [*offered, *offered, *(name + "s" for name in offered), "x", "batch", "optimizer", "loss", "epoch"]
    names = draw(st.lists(st.sampled_from(pool), unique=True, max_size=4))
    kinds = sorted(draw(st.sampled_from([0, 1, 1, 1, 2])) for _ in names)
    first_default = draw(st.integers(0, len(names) + 2))
    defaults = [i >= first_default if kind < 2 else draw(st.booleans()) for i, kind in enumerate(kinds)]
    parameters = [Parameter(*each) for each in zip(names, kinds, defaults, strict=True)]
    return Signature(parameters, draw(st.integers(0, 3)) == 0, draw(st.integers(0, 3)) == 0)


def documented(role: str, signature: Signature) -> dict[str, object] | str:
    """What the method is given, by the documentation; or a text that the refusal must hold."""
    offered = [*ROLES[role].offers, *ALWAYS]
    gets = {p.name: p.name for p in signature.parameters}
    step, first = ROLES[role].kind == "step", signature.parameters[0] if signature.parameters else None
    if step and first and first.kind < 2 and first.name not in (*ROLES[role].offers, *ALWAYS) and "batch" not in gets:
        gets[first.name] = "batch"
    if step and first is None and signature.star and not signature.keywords:
        return "takes *args, which names nothing"
    for i, p in enumerate(signature.parameters):
        left_out = [q for q in signature.parameters[:i] if gets[q.name] not in offered]
        if p.kind == 0 and gets[p.name] in offered and left_out:
            return f"{p.name!r} can only be given by position" if all(q.default for q in left_out) else "New.method"
        if gets[p.name] not in offered and not p.default:
            return "New.method"  # which of several wrong parameters is named first is left open
    given: dict[str, object] = {name: f"the {got}" if got in offered else "default" for name, got in gets.items()}
    if signature.star:
        given["args"] = ()
    if signature.keywords:
        given["rest"] = {name: f"the {name}" for name in offered if name not in gets.values()}
    return given


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, database=None)
@given(drawn=st.data())
def test_three_hundred_signatures_get_what_is_documented_or_are_refused(drawn: st.DataObject) -> None:
    """A method of any role with any signature: each argument has its value, or a MarkError names `file:line`."""
    role = drawn.draw(st.sampled_from(list(ROLES)))
    signature = drawn.draw(signatures(role))
    names: dict[str, Any] = {"seen": []}
    exec(compile(signature.source(), "generated.py", "exec"), names)
    model = net(Plain, **required(role), method=marked(role, names["method"]))
    wanted = documented(role, signature)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ld.LightdecoWarning)  # near misses that have a default
        if isinstance(wanted, str):
            with pytest.raises(ld.MarkError) as caught:
                discover("fit", model, None, [])
            assert "New.method (generated.py:1)" in str(caught.value)
            assert wanted in str(caught.value)
            return
        plan = discover("fit", model, None, [])
    run: Any = "the run"
    offers = [f"the {name}" for name in ROLES[role].offers]
    plan.bind(run, {})[role](*offers)
    (seen,) = names["seen"]
    model_given = {name: value for name, value in seen.items() if value is model}
    assert {name: wanted[name] for name in model_given} == dict.fromkeys(model_given, "the model")
    rest = {k: "the model" if v is model else v for k, v in seen.get("rest", {}).items()}
    assert seen | model_given | ({"rest": rest} if "rest" in seen else {}) == wanted | model_given
