"""`strategy="fsdp"`: parameters, gradients and the optimizer's state lie in parts on the processes of a run.

torch's `fully_shard` (FSDP2) does the cutting, the same on GPUs and on CPUs. A marked step runs as a forward of the
user's model: its parameters are gathered layer by layer as it comes to them, and freed behind it.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import nn

from . import strategies
from .dtensor import forget_forward, is_sharded, reshard
from .errors import LaunchError
from .held import InParts
from .materialise import Materialiser
from .session import Session
from .steps import Steps
from .voting import Voting

#: The name under which a model has the marked steps, while a run lasts.
_CALL: Final = "_lightdeco_call"


class _Options(NamedTuple):
    """What the plugin of accelerate says, or the default."""

    options: dict[str, Any]
    """Of `fully_shard`."""
    policy: Callable[[nn.Module], bool] | None
    """Whether a module is a unit of its own; None: `_units` decides."""


class ShardedSteps(Steps):
    """`Steps` whose calls are forwards of the sharded model."""

    def __init__(self, model: nn.Module, calls: Any) -> None:
        from torch.distributed.fsdp import register_fsdp_forward_method

        super().__init__(model, calls)
        object.__setattr__(model, _CALL, super().forward)
        register_fsdp_forward_method(model, _CALL)

    def forward(self, role: str, *offered: object) -> Any:
        """As `Steps.forward`; without gradients nothing stays gathered, with them backward frees it."""
        outputs = getattr(self.model, _CALL)(role, *offered)
        if not torch.is_grad_enabled():
            reshard(self.model)
        return outputs

    def end(self) -> None:
        """Leave nothing of the run in the model; a step may have been left half-way."""
        forget_forward(self.model)
        reshard(self.model)
        delattr(self.model, _CALL)


def wrap(s: Session, calls: Any) -> None:
    """Cut the model, and make of the marked steps what training and evaluation call: forwards of the cut model."""
    assert s.run.accelerator is not None
    s.peers = peers = Voting(s.run, s.signals, s.group)
    s.held = InParts(s.group)
    _shard(s, peers)
    s.steps = steps = ShardedSteps(s.plan.model, calls)
    s.stack.callback(steps.end)
    # For autocast alone: torch has moved and wrapped the model.
    s.wrapped = peers.calling(s.run.accelerator.prepare_model(steps, device_placement=False, evaluation_mode=True))


def _shard(s: Session, peers: Voting) -> None:
    """Cut the model into parts, unless it is already."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    run, model = s.run, s.plan.model
    if not isinstance(model, FSDPModule):
        _refuse_scalars(model)
        _refuse_mixed(model)
        found = _options(strategies.fsdp_plugin(s.settings), model, run.device)
        mesh = init_device_mesh(run.device.type, (s.group.size,))
        name, qualname = type(model).__name__, type(model).__qualname__
        materialiser = Materialiser(model, run.seed)
        units = [unit for unit in _units(model, found.policy) if not _shares(unit, model)]
        for unit in dict.fromkeys([*units, model]):  # a module may be in several places
            materialiser.fill(unit)
            _move(unit, run.device)
            peers.align(unit, weights=True)
            fully_shard(unit, mesh=mesh, **found.options)
        type(model).__name__, type(model).__qualname__ = name, qualname  # and not FSDP… in messages and directories


def _move(unit: nn.Module, device: torch.device) -> None:
    """Move what is not cut yet; parts that were offloaded to the CPU stay there."""
    for tensor in (*unit.parameters(), *unit.buffers()):
        if not is_sharded(tensor):
            tensor.data = tensor.data.to(device)


def _options(strategy: Any, model: nn.Module, device: torch.device) -> _Options:
    if strategy is None:
        return _Options({}, None)
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp import MixedPrecisionPolicy

    options = {
        "reshard_after_forward": strategy.reshard_after_forward,
        "offload_policy": _offload(strategy.cpu_offload, device),
        "mp_policy": strategy.mixed_precision_policy or MixedPrecisionPolicy(),
    }
    return _Options(options, fsdp2_prepare_auto_wrap_policy(strategy, model))


def _offload(policy: Any, device: torch.device) -> Any:
    """The policy; on a CPU without pinned memory, which torch has beside a GPU alone."""
    from torch.distributed.fsdp import CPUOffloadPolicy

    pinned = isinstance(policy, CPUOffloadPolicy) and policy.pin_memory and device.type == "cpu"
    return CPUOffloadPolicy(pin_memory=False) if pinned else policy


def _units(model: nn.Module, policy: Callable[[nn.Module], bool] | None) -> Iterator[nn.Module]:
    """The modules below the model that are gathered one at a time, inner ones first.

    Without a policy: the outermost elements of every `nn.ModuleList`, and those of every `nn.Sequential` that have
    modules in them. A model without such is gathered as a whole.
    """
    for child in model.children():
        if policy is not None:
            yield from _units(child, policy)
            if policy(child) and _can_be_unit(child):
                yield child
        elif isinstance(child, nn.ModuleList):
            for element in child:
                yield from (element,) if _can_be_unit(element) else _units(element, None)
        elif isinstance(child, nn.Sequential):
            for element in child:
                yield from (element,) if _can_be_unit(element) and any(element.children()) else _units(element, None)
        else:
            yield from _units(child, None)


def _shares(unit: nn.Module, model: nn.Module) -> bool:
    """Whether a parameter of the unit is one of the modules outside of it too: then the model itself gathers it."""
    inside, own = set(unit.modules()), {id(p) for p in unit.parameters()}
    outside = (module for module in model.modules() if module not in inside)
    return any(id(p) in own for module in outside for p in module._parameters.values())


def _can_be_unit(module: nn.Module) -> bool:
    """Whether it has parameters, and is called itself and not only its elements."""
    called = type(module).forward is not nn.Module.forward
    return called and any(True for _ in module.parameters())


def _refuse_scalars(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise LaunchError(
                f"strategy='fsdp' cannot cut the parameter {name!r} of {type(model).__name__}, which has no dimension; "
                "make it torch.ones(1), or a buffer"
            )


def _refuse_mixed(model: nn.Module) -> None:
    dtypes: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            dtypes.setdefault(parameter.dtype, name)
    if len(dtypes) > 1:
        found = ", ".join(f"{name!r} is {dtype}" for dtype, name in dtypes.items())
        raise LaunchError(
            f"strategy='fsdp' needs one dtype for all trained parameters of {type(model).__name__}: {found}; convert "
            "the model, or give precision='bf16-true' or the like"
        )


def wanted(s: Session) -> bool:
    """Whether this run holds its model in parts."""
    return strategies.name_of(s.settings) == "fsdp"
