"""The vocabulary: who may carry what, what a verb cannot do without, and what only looks like a role."""

import types
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.roles import REQUIRED, ROLES, STAGE_LOADER, STAGE_STEP

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2
STEP = ("batch", "batch_idx", "dataloader_idx")
OFFERS: dict[str, tuple[str, ...]] = {
    "training_step": (*STEP, "carry"),
    **{f"{stage}_step": STEP for stage in ("validation", "test", "predict")},
    **{f"on_{stage}_batch_start": STEP for stage in ("train", "validation", "test", "predict")},
    **{f"on_{stage}_batch_end": (*STEP, "outputs") for stage in ("train", "validation", "test", "predict")},
    "on_before_backward": ("loss", "optimizer"),
    "backward": ("loss", "optimizer"),
    "on_after_backward": ("optimizer",),
    "on_before_zero_grad": ("optimizer",),
    "on_before_optimizer_step": ("optimizer",),
    "optimizer_zero_grad": ("optimizer",),
    "clip_gradients": ("optimizer",),
    "optimizer_step": ("optimizer", "closure"),
    "lr_scheduler_step": ("scheduler", "metric"),
    "transfer_batch_to_device": ("batch", "device", "dataloader_idx"),
    "on_before_batch_transfer": ("batch", "device", "dataloader_idx"),
    "on_after_batch_transfer": ("batch", "device", "dataloader_idx"),
    "split_batch": ("batch", "size"),
    "setup": ("stage",),
    "teardown": ("stage",),
    "on_save_checkpoint": ("state",),
    "on_load_checkpoint": ("state",),
    "on_exception": ("exception",),
}


class Net(nn.Linear):
    """A model that trains."""

    def __init__(self) -> None:
        super().__init__(2, 1)

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        return self(batch).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Any, data: Any = BATCHES, **settings: Any) -> ld.Run:
    return ld.fit(model, data, **QUIET | settings)


def methods(*names: str) -> dict[str, Any]:
    return {name: eval(f"lambda self, *given: None  # {name}") for name in names}


# ---- the table -------------------------------------------------------------------------------------------------------


def test_every_role_offers_what_the_contract_lists() -> None:
    """All others offer nothing but `run` and `model`."""
    assert {name: role.offers for name, role in ROLES.items() if role.offers} == OFFERS
    stages = [*STAGE_STEP.values(), *STAGE_LOADER.values(), *(role for needs in REQUIRED.values() for role in needs)]
    assert set(stages) <= set(ROLES)


def test_every_event_of_the_contract_is_there() -> None:
    """Start and end of the verb, the stages, their epochs and their batches; and the single ones."""
    expected = {"on_fit_start", "on_fit_end", "on_sanity_check_start", "on_sanity_check_end", "on_exception"}
    for stage in ("train", "validation", "test", "predict"):
        expected |= {f"on_{stage}{part}_{at}" for part in ("", "_epoch", "_batch") for at in ("start", "end")}
    expected |= {f"on_before_{thing}" for thing in ("zero_grad", "backward", "optimizer_step", "batch_transfer")}
    expected |= {"on_after_backward", "on_after_batch_transfer", "on_save_checkpoint", "on_load_checkpoint"}
    assert {name for name, role in ROLES.items() if role.kind == "event"} == expected


@pytest.mark.parametrize("name", [name for name, role in ROLES.items() if len(role.owners) < 3])
def test_a_role_on_the_wrong_object_is_refused(name: str) -> None:
    """A callback has neither steps nor loaders; a data object no steps."""
    thing = type("Thing", (), {"method": getattr(ld, name)(eval("lambda self: None"))})()
    with pytest.raises(
        ld.MarkError, match=rf"Thing\.method \(.*\), marked @{name}, stands on the callback; .* the mod"
    ):
        fit(Net(), callbacks=[thing])
    if "data" not in ROLES[name].owners:
        with pytest.raises(ld.MarkError, match="stands on the data; this role belongs on the model"):
            fit(Net(), thing)


# ---- the objects themselves ------------------------------------------------------------------------------------------


def test_a_model_that_is_a_class_or_no_module_is_refused() -> None:
    """The message shows what to write instead."""
    with pytest.raises(ld.MarkError, match=r"model is the class Net; give an instance: Net\(…\)"):
        fit(Net)
    for wrong in (None, 3, lambda x: x, Net().state_dict()):
        with pytest.raises(ld.MarkError, match=rf"model is a {type(wrong).__name__}; allowed: a torch.nn.Module"):
            fit(wrong)


def test_a_callback_without_marks_or_a_class_is_refused() -> None:
    """An object that would never be called says so."""

    class Silent:
        def on_train_start(self) -> None: ...

    class Marked:
        @ld.on_train_start
        def start(self) -> None: ...

    with pytest.raises(ld.MarkError, match="the callback Silent marks no method; decorate one"):
        fit(Net(), callbacks=[Silent()])

    class Configured(Net):
        @ld.configure_callbacks
        def callbacks(self) -> list[Any]:
            return [Marked]

    with pytest.raises(ld.MarkError, match=r"the callback Marked is a class; give an instance: Marked\(…\)"):
        fit(Configured())


# ---- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("verb", "role", "name"),
    [
        ("fit", "training_step", "training_step"),
        ("fit", "training_step", "step"),
        ("fit", "training_step", "train_step"),
        ("validate", "validation_step", "val_step"),
        ("test", "test_step", "test_step"),
        ("predict", "predict_step", "predict"),
    ],
)
def test_a_missing_role_names_the_method_that_looks_like_it(verb: str, role: str, name: str) -> None:
    """With class, file and line; nothing else is called the missing one."""
    model = type("Bare", (nn.Linear,), methods(name))(2, 1)
    settings = {"max_epochs": 1} if verb == "fit" else {}
    with pytest.raises(
        ld.MarkError,
        match=rf"ld\.{verb} needs a @{role}, and Bare marks none; `{name}` looks like a {role.replace('_', ' ')} but "
        rf"is not decorated: Bare\.{name} \(",
    ):
        getattr(ld, verb)(model, BATCHES, **settings)


def test_a_missing_optimizer_is_named_too() -> None:
    """A model with a step alone lacks the second required role."""
    model = type("Bare", (Net,), {"optimizers": None, **methods("configure_optimizer")})()
    with pytest.raises(ld.MarkError, match=r"needs a @configure_optimizers.*`configure_optimizer` looks like"):
        fit(model)


def test_without_a_lookalike_the_message_says_what_to_do() -> None:
    """A plain module has nothing to point at; torch's own methods are no candidates."""
    with pytest.raises(ld.MarkError, match=r"Linear marks none; decorate the method that does it with @ld\.training"):
        fit(nn.Linear(2, 1))


def test_a_missing_test_step_points_at_the_validation_step() -> None:
    """The usual wish, to test as one validates, is one decorator more; also when that method has several marks."""

    class Checked(Net):
        @ld.validation_step
        @ld.on_train_start
        def check(self, batch: Any = None) -> None: ...

    with pytest.raises(ld.MarkError, match=r"put @ld\.test_step on `check` as well"):
        ld.test(Checked(), BATCHES)


def test_a_role_that_only_a_submodule_marks_is_named() -> None:
    """Marks of submodules do not count, and the error says where they were seen."""
    model = nn.Sequential(nn.ReLU(), nn.Sequential(Net()))
    with pytest.raises(ld.MarkError, match=r"its submodule `1\.0` marks one, but only the marks of the root count"):
        fit(model)


def test_a_trained_model_as_a_backbone_brings_no_noise() -> None:
    """Its steps, events and loaders are not called, not warned of and not in the way of the root's."""

    class Noisy(Net):
        @ld.on_train_start
        def start(self) -> None:
            raise AssertionError("called")

        def on_train_stat(self) -> None: ...

    class Root(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Noisy()

    assert fit(Root()).global_step == 2


# ---- what only looks like a role -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ROLES))
def test_an_undecorated_method_with_the_name_of_a_role_warns(name: str) -> None:
    """On the model, on a data object and on a callback, with the place and the decorator."""
    started = {"start": ld.on_train_start(eval("lambda self: None"))}
    rest = rf"but is not decorated; add @ld\.{name}$"
    message = rf"\.{name} \(.*\) has the name of a role {rest}"
    with pytest.warns(ld.LightdecoWarning, match="Model" + message):
        fit(type("Model", (Net,), methods(name))())
    with pytest.warns(ld.LightdecoWarning, match="Callback" + message):
        fit(Net(), callbacks=[type("Callback", (), started | methods(name))()])


@pytest.mark.parametrize("name", list(STAGE_LOADER.values()))
def test_data_whose_loader_methods_are_not_decorated_says_so(name: str) -> None:
    """An object without any mark is no data object, so the error is about its form and names the method."""
    thing = type("Thing", (), methods(name))()
    with pytest.raises(ld.DataError, match=rf"a Thing, which has a method `{name}` that is not .*; add @ld\.{name}$"):
        fit(Net(), thing)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("on_trian_start", "on_train_start"),
        ("on_train_epoch_ends", "on_train_epoch_end"),
        ("on_epoch_end", "_epoch_end"),
        ("train_epoch_end", "on_train_epoch_end"),
        ("val_step", "validation_step"),
        ("valdation_step", "validation_step"),
        ("val_loader", "val_dataloader"),
        ("tear_down", "teardown"),
        ("set_up", "setup"),
        ("clip_gradient", "clip_gradients"),
    ],
)
def test_a_near_miss_warns(name: str, role: str) -> None:
    """A method that is nearly called like a role is never called: the warning asks which one is meant."""
    with pytest.warns(ld.LightdecoWarning, match=rf"Model\.{name} \(.*never calls it; is it @ld\.\w*{role}\?"):
        fit(type("Model", (Net,), methods(name))())


ORDINARY = """
forward encode decode embed loss loss_fn compute_loss step_size reset train eval on off on_device update sample
generate features get_loss compute_metrics configure config init_weights reset_parameters optimizer get_optimizer
scheduler lr_scheduler schedulers validate loaders dataloader get_dataloader prepare prepare_batch prepare_dataset
preprocess transform transfer_weights to_device batch_size split split_heads backward_hook backbone clip clip_grads
zero_grads save load save_checkpoint load_checkpoint exception log freeze attention training_loss predict test start
end startup predict_proba
"""
TAKEN = ["train_step", "training_steps"]  # `step` is marked, so nobody is missed


def test_ordinary_names_of_methods_bring_no_warning() -> None:
    """Neither do private ones, nor a near miss of a role that the object carries already."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        body = {
            name: method
            for name, method in methods(*ORDINARY.split(), *TAKEN, "_training_step").items()
            if name not in dir(Net)
        }
        assert len(body) > 50
        fit(type("Model", (Net,), body)())


def test_the_class_of_another_library_brings_no_warning() -> None:
    """What lies in site-packages means something else by `setup` or `backward`; it is trained through attach."""
    module = types.ModuleType("vision_zoo")
    source = "import torch\nclass Zoo(torch.nn.Linear):\n    def setup(self): ...\n    def backward(self): ...\n"
    exec(compile(source, "/usr/lib/python3/site-packages/vision_zoo/zoo.py", "exec"), vars(module))
    model = ld.attach(
        module.Zoo(2, 1),
        training_step=lambda m, batch: m(batch).pow(2).mean(),
        configure_optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    )
    assert fit(model).global_step == 2
