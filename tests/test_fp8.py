"""`precision="fp8"`: torchao's layers in a run, on a CPU that emulates them; and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import lightdeco as ld
from lightdeco import fp8, launch
from tests.models import QUIET, batches, weights


class Plain(nn.Module):
    """Five linear layers; those in the middle are converted. Notes the classes that a step saw."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 16)
        self.body = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 17))
        self.second = nn.Linear(17, 16)
        self.last = nn.Linear(16, 3)
        self.kept = [self.body[0]]
        self.seen: set[str] = set()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.body(self.first(x))))

    @ld.training_step
    @ld.validation_step
    def step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        self.seen |= {name for name, module in self.named_modules() if type(module).__name__ == "Float8Linear"}
        assert type(self.kept[0]) is type(self.body[0])
        return F.cross_entropy(self(batch[0]), batch[1])

    @ld.configure_optimizers
    def adam(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Emulated(Plain):
    """With a recipe that emulates fp8; `options` are those of `AORecipeKwargs`."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options = options

    @ld.configure_accelerator
    def recipe(self) -> dict[str, Any]:
        return {"kwargs_handlers": [recipe(**self.options)]}


class Checked(Emulated):
    """Looks at the end of training, in whichever process, that the layer was converted."""

    @ld.on_fit_end
    def converted(self) -> None:
        assert self.seen == {"body.0"}


def recipe(emulate: bool = True, **options: Any) -> Any:
    from accelerate.utils import AORecipeKwargs
    from torchao.float8 import Float8LinearConfig

    return AORecipeKwargs(config=Float8LinearConfig(emulate=emulate, enable_fsdp_float8_all_gather=True), **options)


@pytest.fixture
def torchao() -> None:
    """The tests that need it; it is in the development dependencies."""
    pytest.importorskip("torchao")


def fit(model: nn.Module, root: Path, **settings: Any) -> ld.Run:
    data = batches(6)
    given: dict[str, Any] = {"precision": "fp8", "max_epochs": 2, "seed": 1, "root_dir": root, **QUIET, **settings}
    return ld.fit(model, (data, data[:2]), **given)


@pytest.mark.usefixtures("torchao")
def test_a_run_converts_trains_and_leaves_the_model_plain(tmp_path: Path) -> None:
    """Both steps see the converted layers; the same parameters are trained; afterwards all is as it was."""
    model = Emulated()
    layers = {name: (module, type(module), set(vars(module))) for name, module in model.named_modules()}
    before = dict(model.named_parameters())
    copies = {name: value.detach().clone() for name, value in before.items()}
    run = fit(model, tmp_path, max_epochs=8)
    assert model.seen == {"body.0"}
    losses = [record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record]
    assert losses[-1] < losses[0]
    for name, module in model.named_modules():
        there, kind, attributes = layers[name]
        assert module is there
        assert type(module) is kind
        assert set(vars(module)) == attributes
    for name, parameter in model.named_parameters():
        assert parameter is before[name]
        assert not torch.equal(parameter, copies[name]), name


@pytest.mark.usefixtures("torchao")
def test_the_products_are_in_fp8(tmp_path: Path) -> None:
    """A run in fp8 ends in other weights than one in bf16, though not far from them."""
    eight, sixteen = Emulated(), Plain()
    fit(eight, tmp_path)
    fit(sixteen, tmp_path, precision="bf16-mixed")
    assert not torch.equal(eight.body[0].weight, sixteen.body[0].weight)
    assert torch.allclose(eight.body[0].weight, sixteen.body[0].weight, atol=0.1)


@pytest.mark.usefixtures("torchao")
def test_a_run_is_resumed_to_the_last_bit(tmp_path: Path) -> None:
    """The names and dtypes in checkpoints are the plain model's."""
    whole = Emulated()
    fit(whole, tmp_path / "whole", max_epochs=3)
    parts = Emulated()
    run = fit(parts, tmp_path / "parts", max_epochs=1)
    assert run.last_checkpoint is not None
    saved = load_file(next(Path(run.last_checkpoint).glob("model*.safetensors")))
    assert {name: value.dtype for name, value in saved.items()} == dict.fromkeys(Plain().state_dict(), torch.float32)
    again = Emulated()
    fit(again, tmp_path / "parts", max_epochs=3, resume=run.last_checkpoint)
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(again), strict=True))


@pytest.mark.usefixtures("torchao")
def test_the_filter_of_the_recipe_chooses(tmp_path: Path) -> None:
    """It gets the model's own names; with emulation any layer can be chosen."""
    asked = []

    def chosen(layer: nn.Module, name: str) -> bool:
        asked.append(name)
        return name in ("first", "second")

    model = Emulated(module_filter_func=chosen)
    fit(model, tmp_path)
    assert model.seen == {"first", "second"}
    assert asked == ["first", "body.0", "body.2", "second", "last"]


@pytest.mark.usefixtures("torchao")
def test_odd_dimensions_that_a_filter_asks_for_are_refused() -> None:
    """The GPU could not multiply them; the message names the layer and its dimensions."""
    with pytest.raises(ld.SettingsError, match=r"'first', which has 4 inputs and 16 outputs; .* multiples of 16"):
        fp8.convert(Plain(), recipe(emulate=False, module_filter_func=lambda layer, name: True))


@pytest.mark.usefixtures("torchao")
def test_a_model_without_a_layer_to_convert_warns(tmp_path: Path) -> None:
    """A setting without effect is named; the run goes on as "bf16-mixed" does."""

    class Small(Emulated):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(16, 17))
            self.kept = [self.body[0]]

    model = Small()
    with pytest.warns(ld.LightdecoWarning, match="precision='fp8' is as 'bf16-mixed' for Small: it has no nn.Linear"):
        fit(model, tmp_path)
    assert not model.seen


@pytest.mark.usefixtures("torchao")
def test_hooks_and_subclasses_are_kept(tmp_path: Path) -> None:
    """A hook on a converted layer is called; a layer with a class of its own is left alone."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model, calls = Emulated(), []
    model.body[2] = Doubled(32, 32)
    model.second = nn.Linear(32, 16)
    model.body[0].register_forward_hook(lambda *given: calls.append(type(given[0]).__name__))
    fit(model, tmp_path, max_epochs=1)
    assert model.seen == {"body.0", "second"}
    assert set(calls) == {"Float8Linear"}


@pytest.mark.usefixtures("torchao")
def test_compiled(tmp_path: Path) -> None:
    """`compile` sees the converted layers, whichever module it compiles."""
    model = Emulated()
    fit(model, tmp_path, max_epochs=1, compile={"backend": "eager"})
    assert model.seen == {"body.0"}


@pytest.mark.usefixtures("torchao")
def test_two_processes(tmp_path: Path) -> None:
    """The processes train the same layers, and the model comes back plain."""
    model = Checked()
    before = [value.clone() for value in weights(model)]
    fit(model, tmp_path, max_epochs=1, devices=2, accelerator="cpu")
    assert type(model.body[0]) is nn.Linear
    assert not any(torch.equal(a, b) for a, b in zip(before, weights(model), strict=True))


# ---- refusals --------------------------------------------------------------------------------------------------------


class Unprepared(Plain):
    """Whose data must not be asked for."""

    @ld.setup
    def never(self) -> None:
        raise AssertionError("setup was called")


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize("devices", [1, 2])
def test_a_cpu_is_refused_before_anything_starts(tmp_path: Path, devices: int) -> None:
    """With the reason and what to use instead; no process is started and no file written."""
    with pytest.raises(ld.SettingsError, match=r"capability 8\.9 or higher .* on the cpu; use 'bf16-mixed'"):
        fit(Unprepared(), tmp_path, accelerator="cpu", devices=devices)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("torchao")
def test_a_recipe_that_does_not_emulate_is_refused_on_a_cpu(tmp_path: Path) -> None:
    """The recipe is known when `configure_accelerator` was called, before the first batch."""
    model = Emulated(emulate=False)
    with pytest.raises(ld.SettingsError, match="on the cpu; use 'bf16-mixed'"):
        fit(model, tmp_path, accelerator="cpu")
    assert type(model.body[0]) is nn.Linear


@pytest.mark.usefixtures("torchao")
def test_an_older_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would go on in fp16 in silence; the message names the GPU."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 0)][index])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "A100")
    fp8.require(ld.Settings(precision="fp8", devices=1), "cuda", configured=False)
    for devices in ("auto", 2, [1]):
        settings = ld.Settings(precision="fp8", devices=devices)  # type: ignore[arg-type]
        with pytest.raises(ld.SettingsError, match=r"GPU 1, A100, has 8\.0; use 'bf16-mixed'"):
            fp8.require(settings, "cuda", configured=False)


def test_without_torchao_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the device is looked at."""
    monkeypatch.setattr("accelerate.utils.is_torchao_available", lambda: False)
    with pytest.raises(ld.SettingsError, match=r"pip install 'lightdeco\[fp8\]'"):
        fit(Unprepared(), tmp_path)


@pytest.mark.usefixtures("torchao")
@pytest.mark.parametrize(
    ("precision", "returned", "message"),
    [
        ("32-true", lambda: {"kwargs_handlers": [recipe()]}, "precision is '32-true'; give precision='fp8'"),
        ("bf16-mixed", lambda: {"mixed_precision": "fp8"}, "precision is 'bf16-mixed'; give precision='fp8'"),
        ("fp8", lambda: {"mixed_precision": "bf16"}, "returned mixed_precision='bf16'; leave it out"),
        ("fp8", lambda: {"kwargs_handlers": [type("TERecipeKwargs", (), {})()]}, "allowed: .*AORecipeKwargs"),
    ],
)
def test_what_configure_accelerator_may_not_ask_for(
    tmp_path: Path, precision: Any, returned: Any, message: str
) -> None:
    """A recipe and `precision` that do not fit together, which accelerate would take or refuse without a reason."""

    class Asking(Plain):
        @ld.configure_accelerator
        def arguments(self) -> dict[str, Any]:
            return returned()  # type: ignore[no-any-return]

    with pytest.raises(ld.SettingsError, match=message):
        fit(Asking(), tmp_path, precision=precision)


def test_handlers_of_configure_accelerator_do_not_drop_those_of_the_strategy() -> None:
    """Several training steps find unused parameters also where the model returns handlers; its own of a class win."""
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

    settings = ld.Settings(accelerator="cpu")
    own = DistributedDataParallelKwargs(find_unused_parameters=False)
    for handlers, expected in (([InitProcessGroupKwargs()], True), ([own], False)):
        with launch.Process(settings).entered():
            made = launch.make_accelerator(settings, {"kwargs_handlers": handlers}, several=True)
            assert made.ddp_handler.find_unused_parameters is expected
