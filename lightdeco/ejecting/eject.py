"""`ld.eject`: the loop of one very run as a script of plain PyTorch, which needs no lightdeco."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from lightdeco import launch
from lightdeco.errors import LightdecoError, MarkError, SettingsError
from lightdeco.hooks import Hook
from lightdeco.joined import place
from lightdeco.opening import opened
from lightdeco.optim import is_plateau
from lightdeco.plan import Plan
from lightdeco.preparing import prepare
from lightdeco.settings import Settings, resolve

from .makers import importable
from .objects import attached
from .script import Script
from .text import written


def script(
    model: nn.Module, data: Any, path: str | os.PathLike[str] | None, settings: Settings | None, overrides: Any
) -> str:
    """What `eject` returns, written to `path`."""
    target = None if path is None else Path(path)
    if target is not None and target.exists():
        raise LightdecoError(f"there is a file at {target}; eject overwrites none: remove it or give another path")
    resolved = resolve(settings, overrides)
    plan, given = prepare("fit", model, data, resolved)
    _refuse(plan, resolved)
    here = replace(resolved, accelerator="cpu", devices="auto", compile=False, resume=None)
    seen: list[Any] = []
    with opened(_recording(plan, seen), given, here, writes=False) as session:
        made = Script(plan, resolved, session, seen[0], launch.kind_of(resolved))
        _refuse_several(made)
        _refuse_monitors(made)
        text = written(made, data)
    if target is not None:
        target.write_text(text, encoding="utf-8")
    return text


def _refuse_several(script: Script) -> None:
    """Refuse what is counted for each optimizer by itself, where steps leave batches out."""
    if len(script.parts) == 1 and script.parts[0].hook.mark.every == 1:
        return
    if script.by_size:
        raise SettingsError("eject writes no accumulate_grad_batches for several optimizers; leave it out")
    if any(part.optim.every > 1 and part.optim.interval == "step" for part in script.parts):
        raise SettingsError("eject writes no scheduler with interval='step' and every > 1 for several optimizers")


def _refuse_monitors(script: Script) -> None:
    """Refuse schedulers by metrics that the script does not have when they step."""
    for part in script.parts:
        optim = part.optim
        if optim.scheduler is None or (optim.monitor is None and not is_plateau(optim.scheduler)):
            continue
        single = script.validates and script.session.loaders["val"][0].name is None
        name = optim.monitor or ("val/loss" if single else f"{part.prefix}loss")
        kind = type(optim.scheduler).__name__
        if optim.interval == "step" and name.startswith("train/"):
            raise SettingsError(
                f"eject cannot write {kind} with interval='step' and monitor={name!r}: fit takes the value of the "
                "latest record, which a script has none of; use interval='epoch', or a monitor 'val/…'"
            )
        if not name.startswith(("train/", "val/")):
            raise SettingsError(
                f"eject cannot write {kind} with monitor={name!r}, which ld.log records and no step returns; return it "
                "from the step, in its dict"
            )


def _recording(plan: Plan, seen: list[Any]) -> Plan:
    """The plan with a `configure_optimizers` that also keeps what it returned."""

    def recorded(hook: Hook) -> Hook:
        def method(*given: Any, **named: Any) -> Any:
            seen.append(hook.method(*given, **named))
            return seen[-1]

        return replace(hook, method=method) if hook.role.name == "configure_optimizers" else hook

    return replace(plan, hooks=tuple(map(recorded, plan.hooks)))


def _refuse(plan: Plan, settings: Settings) -> None:
    """Refuse what a plain script cannot have."""
    if (processes := max(launch.count(settings), place().world_size)) > 1:
        raise SettingsError(
            f"devices={settings.devices!r}: fit would train in {processes} processes here, and eject writes a script "
            "for one; give devices=1"
        )
    for hook in plan.hooks:
        if hook.mark.manual or hook.role.name in ("split_batch", "configure_accelerator"):
            raise MarkError(
                f"eject cannot write {hook.where} as a plain loop: it works through lightdeco or accelerate"
            )
        function = attached(hook)
        ours = type(hook.owner).__module__.startswith("lightdeco.")
        if function is not None and not ours and importable(function) is None:
            raise MarkError(f"eject cannot import {hook.where}; attach a function that has a name in a module")
    if settings.precision not in ("32-true", "bf16-mixed"):
        raise SettingsError(f"eject cannot write precision={settings.precision!r}; allowed: '32-true', 'bf16-mixed'")
