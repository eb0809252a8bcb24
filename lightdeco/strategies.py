"""What `strategy=` means, and what is refused before anything starts."""

import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from .errors import LaunchError, SettingsError
from .plan import Plan
from .settings import Settings
from .zero_config import configuration

#: The classes of accelerate that stand for a strategy.
_PLUGINS: Final = {
    "DistributedDataParallelKwargs": "ddp",
    "FullyShardedDataParallelPlugin": "fsdp",
    "DeepSpeedPlugin": "deepspeed",
}

#: What accelerate's launcher sets, and what it stands for.
_LAUNCHED: Final = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}
_PRECISIONS: Final = {
    "fsdp": ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"),
    "deepspeed": ("32-true", "bf16-mixed"),
}
#: Settings with what they may be, and what to do instead.
_NOT_BESIDE_DEEPSPEED: Final = (
    ("gradient_clip_algorithm", ("norm",), "DeepSpeed clips by the norm alone"),
    ("on_nan", ("raise",), "DeepSpeed leaves out updates by rules of its own; give 'raise'"),
    ("log_gradients", (False,), "its engine keeps the gradients"),
)
#: Arguments of `Accelerator` that would choose another strategy behind lightdeco's back, and what to do instead.
ARGUMENTS: Final = {
    "fsdp_plugin": "give it as fit(…, strategy=plugin)",
    "deepspeed_plugin": "give it as fit(…, strategy=plugin)",
    "deepspeed_plugins": "give one as fit(…, strategy=plugin)",
    "megatron_lm_plugin": "lightdeco does not run Megatron-LM",
    "parallelism_config": "lightdeco runs data parallelism and FSDP alone: give strategy='ddp' or 'fsdp'",
}


def name_of(settings: Settings) -> str:
    """ "ddp" (which "auto" is), "fsdp" or "deepspeed".

    Raises:
        SettingsError: it is no plugin of accelerate.
    """
    strategy = settings.strategy
    if isinstance(strategy, str):
        return "ddp" if strategy == "auto" else strategy
    name = _PLUGINS.get(type(strategy).__name__)
    if name is None:
        raise SettingsError(
            f"strategy is a {type(strategy).__name__}; allowed: 'auto', 'ddp', 'fsdp', 'deepspeed', or an object of "
            f"accelerate: {', '.join(_PLUGINS)}"
        )
    return name


def check(settings: Settings, kind: str, processes: int, plan: Plan | None) -> None:
    """Refuse a strategy that this machine, or so many processes, or these settings and marks cannot run.

    Raises:
        LaunchError: where accelerate would run another strategy in silence.
        SettingsError: it is no plugin of accelerate, or another setting does not go with it.
    """
    name = name_of(settings)
    asked = next((meant for variable, meant in _LAUNCHED.items() if _true(variable)), name)
    if asked != name:
        raise LaunchError(
            f"accelerate's launcher was configured for {asked}, and this run has strategy={settings.strategy!r}; give "
            "strategy='fsdp' (its FSDP_… variables count then), or configure the launcher anew"
        )
    if name == "ddp":
        return
    if kind not in ("cpu", "cuda"):
        raise LaunchError(f"strategy={name!r} runs on GPUs and CPUs, and this run is on {kind!r}")
    if processes < 2:
        raise LaunchError(
            f"strategy={name!r} cuts a model into parts for several processes, and this run has one: give devices=2 or "
            "more, or leave strategy out"
        )
    _refuse_beside_parts(name, settings, plan)
    if name == "fsdp":
        _refuse_beside_fsdp(settings)
    else:
        _refuse_beside_deepspeed(settings, plan)


def _refuse_beside_parts(strategy: str, settings: Settings, plan: Plan | None) -> None:
    steps = list(plan.all("training_step")) if plan is not None else []
    if len(steps) > 1 or any(hook.mark.manual for hook in steps):
        which = "several training steps" if len(steps) > 1 else "a manual training step"
        raise LaunchError(
            f"strategy={strategy!r}: {steps[-1].where} is one of {which}; it needs a single automatic one"
        )
    for name, allowed, why in (
        ("sync_batchnorm", (False,), "convert the model itself: nn.SyncBatchNorm.convert_sync_batchnorm(model)"),
        ("oom", ("raise",), "a step that fails half-way cannot be repeated where others wait for it"),
        ("precision", _PRECISIONS[strategy], "use 'bf16-mixed'"),
        *(_NOT_BESIDE_DEEPSPEED if strategy == "deepspeed" else ()),
    ):
        value = getattr(settings, name)
        if value not in allowed:
            raise SettingsError(f"strategy={strategy!r} does not go with {name}={value!r}: {why}")


def _refuse_beside_deepspeed(settings: Settings, plan: Plan | None) -> None:
    """Refuse what needs the gradients, which DeepSpeed keeps, and what its engine does itself."""
    if importlib.util.find_spec("deepspeed") is None:
        raise LaunchError("strategy='deepspeed' needs the package deepspeed: pip install 'lightdeco[deepspeed]'")
    if configuration(settings)["zero_optimization"]["stage"] == 3 and settings.compile is not False:
        raise SettingsError(
            f"strategy='deepspeed' at stage 3 does not go with compile={settings.compile!r}: torch's compiler fails on "
            "parameters that come and go; stages 1 and 2 can"
        )
    if plan is None or plan.verb != "fit":
        return
    for role in ("backward", "optimizer_step", "optimizer_zero_grad", "clip_gradients"):
        if (hook := plan.one(role)) is not None:
            raise LaunchError(
                f"{hook.where}, marked @{role}, cannot go with strategy='deepspeed', whose engine does that itself; "
                "'ddp' and 'fsdp' can"
            )


def _refuse_beside_fsdp(settings: Settings) -> None:
    strategy = fsdp_plugin(settings)
    if strategy is None:
        return
    for name, what in (
        ("ignored_modules", "cut all modules, or freeze these"),
        ("activation_checkpointing", "call torch.utils.checkpoint in the model's forward"),
        ("param_init_fn", "build layers on the meta device; their reset_parameters is called"),
    ):
        if getattr(strategy, name, None):
            raise LaunchError(f"FullyShardedDataParallelPlugin({name}=…) is not supported; {what}")
    if strategy.fsdp_version != 2:
        raise LaunchError(
            f"FullyShardedDataParallelPlugin(fsdp_version={strategy.fsdp_version}): torch replaced the first FSDP by "
            "the second; give fsdp_version=2"
        )


def arguments(settings: Settings, several: bool) -> dict[str, Any]:
    """The arguments of `Accelerator` that the strategy means; of "fsdp" none: see sharding.py.

    `several`: the run has several training steps, each of which leaves out some parameters.
    """
    from accelerate.utils import DistributedDataParallelKwargs

    if name_of(settings) != "ddp":
        return {}
    if not isinstance(settings.strategy, str):
        return {"kwargs_handlers": [settings.strategy]}
    return {"kwargs_handlers": [DistributedDataParallelKwargs(find_unused_parameters=True)]} if several else {}


def fsdp_plugin(settings: Settings) -> Any:
    """The plugin of "fsdp" that was given, or that accelerate's launcher was configured with; None: neither."""
    if not isinstance(settings.strategy, str):
        return settings.strategy
    if not _true("ACCELERATE_USE_FSDP"):
        return None
    from accelerate.utils import FullyShardedDataParallelPlugin

    return FullyShardedDataParallelPlugin()


@contextmanager
def launcher_unheard() -> Iterator[None]:
    """While an Accelerator is made: it would take the strategy from variables of its launcher."""
    kept = {name: os.environ.pop(name) for name in _LAUNCHED if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _true(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes", "y", "on", "t")


def compression(handler: Any) -> str | None:
    """The name of the hook that compresses gradients, in accelerate's options of DDP; None: there is none."""
    from accelerate.utils import DDPCommunicationHookType

    if handler is None or handler.comm_hook == DDPCommunicationHookType.NO:
        return None
    return str(handler.comm_hook.value)
