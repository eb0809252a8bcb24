"""The steps of a run, and what accelerate wraps around them: autocast, DDP."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from . import flat, fp8, launch, sharding, strategies, xla, zero
from .alone import Alone
from .ballot import SharedSteps
from .ddp import Balloting, InDDP
from .dtensor import is_sharded
from .errors import LaunchError, warn
from .flat import Flat
from .peers import Peers
from .session import Session
from .steps import Steps

if TYPE_CHECKING:
    from accelerate import Accelerator


def wrap(s: Session) -> None:
    """Make the Accelerator, and of the marked steps what training and evaluation call.

    Raises:
        MarkError: `configure_accelerator` returned something else than arguments of `Accelerator`.
        LaunchError: this machine cannot do what the settings ask for.
    """
    run, settings, model = s.run, s.settings, s.plan.model
    hooks = s.plan.steps()
    training = frozenset(key for key, hook in hooks.items() if hook.role.name == "training_step")
    manual = any(hooks[key].mark.manual for key in training)
    hook = s.plan.one("configure_accelerator")
    configured = launch.accelerator_arguments(hook, None if hook is None else s.call["configure_accelerator"]())
    accelerator = run.accelerator = launch.make_accelerator(settings, configured, len(training) > 1)
    run.device = accelerator.device
    if settings.precision == "fp8":
        recipe = accelerator.ao_recipe_handler
        assert recipe is not None  # `launch` has seen to it
        s.stack.callback(fp8.convert(model, recipe))
    calls = {key: s.plan.step(hook, run) for key, hook in hooks.items()}
    if zero.wanted(s):
        zero.wrap(s, calls)
        return
    if sharding.wanted(s):
        sharding.wrap(s, calls)
        return
    if any(is_sharded(parameter) for parameter in model.parameters()):
        raise LaunchError(
            f"{type(model).__name__} lies in parts on several processes since a run with strategy='fsdp'; give this "
            "one the same strategy, or load its checkpoint into a new model"
        )
    shared = s.group.size > 1 and s.plan.verb == "fit"
    _refuse_without_effect(s)
    if not shared:
        s.peers = Alone(run, s.signals)
        with xla.same_parameters(model, run.device):
            _wrap_for_autocast(s, calls)
        return
    if settings.sync_batchnorm:
        s.stack.callback(_synchronise_batchnorm(model, run.device))
    hooked = strategies.compression(accelerator.ddp_handler)
    if manual:  # calls backward inside of its forward, where DDP cannot follow: `Peers.average` instead
        if hooked:
            warn(f"comm_hook={hooked!r} has no effect: a manual step averages its gradients without DDP")
        s.peers = Peers(run, s.signals, s.group)
        _wrap_for_autocast(s, calls)
        s.peers.align(model, weights=True)
    elif accelerator.ddp_handler is None and flat.fits(s):
        s.peers = Flat(run, s.signals, s.group)
        _wrap_for_autocast(s, calls)
        s.peers.refresh()
    else:
        s.steps = Steps(model, calls) if hooked else SharedSteps(model, calls, training)
        s.peers = together = (InDDP if hooked else Balloting)(run, s.signals, s.group)
        s.wrapped = together.wrap(
            s.steps, accelerator.prepare_model(s.steps), partial(_in_ddp, accelerator, run.device)
        )


def _wrap_for_autocast(s: Session, calls: Any) -> None:
    """The steps with nothing else around them."""
    assert s.run.accelerator is not None
    s.steps = Steps(s.plan.model, calls)
    s.wrapped = s.run.accelerator.prepare_model(s.steps, evaluation_mode=s.plan.verb != "fit" or s.group.size > 1)
    # Where nothing wraps them at all, training calls its own without the way round.
    s.bare = s.wrapped is s.steps and "forward" not in vars(s.steps)


def _in_ddp(accelerator: "Accelerator", device: torch.device, module: nn.Module) -> nn.Module:
    """The module wrapped in DDP anew, as accelerate does it."""
    handler = accelerator.ddp_handler
    options = {} if handler is None else handler.to_kwargs()
    wrapped = DistributedDataParallel(module, device_ids=[device.index] if device.type == "cuda" else None, **options)
    if handler is not None:
        handler.register_comm_hook(wrapped)
    return wrapped


def _refuse_without_effect(s: Session) -> None:
    settings = s.settings
    if s.group.size > 1:
        return
    for name, default in (("sync_batchnorm", False), ("use_distributed_sampler", True), ("process_timeout", None)):
        if getattr(settings, name) != default:
            warn(f"{name}={getattr(settings, name)!r} has no effect: this run has one process")


def _synchronise_batchnorm(model: nn.Module, device: torch.device) -> Callable[[], None]:
    """Replace every BatchNorm by `SyncBatchNorm`, with the same parameters and buffers; what is returned undoes it."""
    if device.type == "cpu":
        raise LaunchError(launch.NO_SYNC)
    replaced = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, nn.modules.batchnorm._BatchNorm)
    ]
    for parent, name, child in replaced:
        setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]

    def undo() -> None:
        for parent, name, child in replaced:
            setattr(parent, name, child)

    return undo
