"""DeepSpeed's configuration: what accelerate's plugin says, and what `fit` decides."""

from copy import deepcopy
from typing import Any, Final

from .errors import LaunchError
from .settings import Settings

#: What `fit` decides, and the plugin has values for in any case.
_OURS: Final = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "steps_per_print")
#: What is no part of a strategy, and what to do instead.
_REFUSED: Final = {
    "optimizer": "return the optimizer from @configure_optimizers",
    "scheduler": "return the scheduler from @configure_optimizers",
    "gradient_clipping": "give fit(…, gradient_clip_val=…)",
    "fp16": "give fit(…, precision=…)",
    "bf16": "give fit(…, precision='bf16-mixed')",
    "amp": "give fit(…, precision=…)",
    "torch_autocast": "give fit(…, precision='bf16-mixed')",
    "compression_training": "lightdeco does not run it",
    "data_efficiency": "lightdeco does not run it",
    "pipeline": "lightdeco does not run it",
}


def configuration(settings: Settings) -> dict[str, Any]:
    """DeepSpeed's configuration: what the plugin says, and what `fit` decides.

    Raises:
        LaunchError: the plugin says what `fit` decides, or a stage that is none.
    """
    plugin: Any = settings.strategy
    given = {} if isinstance(plugin, str) else deepcopy(plugin.deepspeed_config)
    config = {key: value for key, value in _given(given).items() if key not in _OURS}
    for key, instead in _REFUSED.items():
        section = config.get(key)
        if section and (not isinstance(section, dict) or section.get("enabled", True)):
            raise LaunchError(f"DeepSpeedPlugin: its configuration has {key!r}; {instead}")
        config.pop(key, None)
    zero = config.setdefault("zero_optimization", {})
    stage = zero.setdefault("stage", 2)
    if stage not in (1, 2, 3):
        raise LaunchError(f"DeepSpeedPlugin: the stage of ZeRO is {stage}; allowed: 1, 2, 3; 'ddp' is what 0 would be")
    # `calling` and `DataLoader` decide these; DeepSpeed only wants to see them.
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "steps_per_print": None}
    config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    config["gradient_clipping"] = settings.gradient_clip_val or 0.0
    return config


def _given(config: dict[str, Any]) -> dict[str, Any]:
    """Without what accelerate would fill in ("auto"), and without what is switched off by None."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found[key] = _given(value)
        elif value != "auto" and value is not None:
            found[key] = value
    return found
