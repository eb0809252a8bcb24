"""`precision="fp8"`: the products of linear layers in 8 bits, by torchao; everything else as in "bf16-mixed"."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from .errors import SettingsError, warn
from .settings import Settings

if TYPE_CHECKING:
    from typing import TypeGuard

    from accelerate.utils import AORecipeKwargs

#: Compute capability of the first GPUs that multiply fp8: Ada and Hopper.
_CAPABLE: Final = (8, 9)

#: Recipes of accelerate whose layers have other parameters than `nn.Linear`, or more in their `state_dict`.
_FOREIGN: Final = frozenset({"FP8RecipeKwargs", "TERecipeKwargs", "MSAMPRecipeKwargs"})

_INSTEAD: Final = "use 'bf16-mixed'"


def require(settings: Settings, kind: str, configured: bool) -> None:
    """Refuse "fp8" before anything starts where it cannot work.

    Args:
        settings, kind: of the run; the kind of its device.
        configured: the model marks `configure_accelerator`, whose recipe may ask torchao to emulate fp8, which every
            device can; whether it does is seen when it was called.

    Raises:
        SettingsError: torchao is missing, or the device cannot multiply fp8.
    """
    if settings.precision != "fp8":
        return
    _check_installed()
    if not configured:
        _check_device(settings, kind)


def _check_installed() -> None:
    from accelerate.utils import is_torchao_available

    if not is_torchao_available():
        raise SettingsError(
            f"precision='fp8' needs torchao, which is not installed: pip install 'lightdeco[fp8]'; or {_INSTEAD}"
        )


def _check_device(settings: Settings, kind: str) -> None:
    if kind != "cuda":
        raise SettingsError(
            "precision='fp8' needs GPUs of compute capability 8.9 or higher (Ada, Hopper and newer), and this run is "
            f"on the {kind}; {_INSTEAD}"
        )
    there, devices = torch.cuda.device_count(), settings.devices
    used = (
        devices if isinstance(devices, list) else range(devices if isinstance(devices, int) and devices > 0 else there)
    )
    for index in used:
        if index < there and (found := torch.cuda.get_device_capability(index)) < _CAPABLE:
            raise SettingsError(
                "precision='fp8' needs GPUs of compute capability 8.9 or higher (Ada, Hopper and newer); GPU "
                f"{index}, {torch.cuda.get_device_name(index)}, has {found[0]}.{found[1]}; {_INSTEAD}"
            )


def with_recipe(settings: Settings, kind: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `Accelerator` with the recipe of torchao that "fp8" means, where they have none.

    Raises:
        SettingsError: a recipe without "fp8", or a recipe of another library; or the device cannot multiply fp8.
    """
    from accelerate.utils import AORecipeKwargs

    handlers: list[Any] = list(arguments.get("kwargs_handlers") or ())
    recipes: list[Any] = [handler for handler in handlers if isinstance(handler, AORecipeKwargs)]
    if settings.precision != "fp8":
        if recipes or str(arguments["mixed_precision"]) == "fp8":
            raise SettingsError(
                f"configure_accelerator asks for fp8, and precision is {settings.precision!r}; give precision='fp8'"
            )
        return arguments
    if str(arguments["mixed_precision"]) != "fp8":
        raise SettingsError(
            f"precision='fp8', but configure_accelerator returned mixed_precision={arguments['mixed_precision']!r}; "
            "leave it out"
        )
    for handler in handlers:
        if type(handler).__name__ in _FOREIGN:
            raise SettingsError(
                f"precision='fp8' with {type(handler).__name__}: the layers of that library hold other weights than "
                "the model's, so checkpoints would fit neither; allowed: accelerate.utils.AORecipeKwargs (torchao)"
            )
    _check_installed()
    if not recipes:
        from torchao.float8 import Float8LinearConfig

        handlers.append(AORecipeKwargs(config=Float8LinearConfig(pad_inner_dim=True)))
    if not any(recipe.config.emulate for recipe in recipes):
        _check_device(settings, kind)
    return arguments | {"kwargs_handlers": handlers}


def convert(model: nn.Module, recipe: "AORecipeKwargs") -> Callable[[], None]:
    """Let linear layers of a model multiply in fp8; what is returned undoes it.

    The layers stay the same objects with the same parameters, hooks and names: they change their class, as torch's own
    parametrizations do. A layer of a subclass of `nn.Linear` is left as it is, since its class is its author's.

    Raises:
        SettingsError: the recipe's filter asks for a layer whose dimensions the GPU cannot take.
    """
    from torchao.float8 import convert_to_float8_training

    # To gather weights in fp8 is for FSDP; it would put other parameters into the layers.
    config: Any = recipe.config
    config = replace(config, enable_fsdp_float8_all_gather=False)
    changed: list[tuple[nn.Module, list[str]]] = []
    for layer in _chosen(model, recipe, config.emulate):
        made: Any = next(convert_to_float8_training(nn.Sequential(layer), config=config).children())
        added = {name: value for name, value in vars(made).items() if name not in vars(layer)}
        layer.__class__ = type(made)
        vars(layer).update(added)
        changed.append((layer, list(added)))

    def undo() -> None:
        for layer, added in changed:
            layer.__class__ = nn.Linear
            for name in added:
                del vars(layer)[name]

    return undo


def _chosen(model: nn.Module, recipe: "AORecipeKwargs", emulate: bool) -> list[nn.Linear]:
    from accelerate.utils.ao import filter_linear_layers, find_first_last_linear_layers
    from torchao.float8.float8_linear import Float8Linear

    wanted = recipe.module_filter_func
    if wanted is None:
        ends = [name for name in find_first_last_linear_layers(model) if name is not None]
        wanted = partial(filter_linear_layers, layers_to_filter=ends)
    chosen = list[nn.Linear]()
    for name, layer in model.named_modules():
        if not _is_plain(layer) or not wanted(layer, name):
            continue
        odd = layer.in_features % 16 or layer.out_features % 16
        if odd and not emulate:
            raise SettingsError(
                f"precision='fp8': the module_filter_func of the recipe takes {name!r}, which has "
                f"{layer.in_features} inputs and {layer.out_features} outputs; both must be multiples of 16"
            )
        chosen.append(layer)
    if not chosen and not any(isinstance(layer, Float8Linear) for layer in model.modules()):
        warn(
            f"precision='fp8' is as 'bf16-mixed' for {type(model).__name__}: it has no nn.Linear to convert apart "
            "from the first and the last one and those whose inputs or outputs are no multiple of 16; "
            "AORecipeKwargs(module_filter_func=…) from configure_accelerator chooses others"
        )
    return chosen


def _is_plain(layer: nn.Module) -> "TypeGuard[nn.Linear]":
    """Whether a layer is `nn.Linear` and nothing else, and its weight a parameter of its own."""
    return type(layer) is nn.Linear and "forward" not in vars(layer) and layer._parameters.get("weight") is not None
