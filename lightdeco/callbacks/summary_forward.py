"""What one forward with the model's `example_input` shows: shapes and floating point operations of each part."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightdeco import seeds
from lightdeco.data import to_device
from lightdeco.dtensor import forget_forward, reshard
from lightdeco.steps import evaluating

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass
class Measured:
    """What a forward showed of one module."""

    input: str
    """The shapes of the arguments of its first call."""
    output: str
    """The shapes of what its first call returned."""
    calls: int = 0
    flops: int = 0
    """Of all calls, with what was called in them."""


@dataclass
class Forward:
    """The result of one forward."""

    parts: dict[int, Measured] = field(default_factory=dict)
    """By the `id` of the module."""
    flops: int | None = None
    """Of the whole forward; None when there was none."""
    failure: str = ""
    """Why there is no result, where one was asked for."""


def measure(model: nn.Module, device: torch.device, accelerator: "Accelerator | None" = None) -> Forward:
    """Run the model once on its `example_input`; an empty result without one.

    In eval mode, without gradients, under the accelerator's autocast. The random state, the modes and the buffers are
    as before afterwards, and no hook stays. Whatever fails in it is named in `failure` and raised nowhere.
    """
    example = getattr(model, "example_input", None)
    if example is None:
        return Forward()
    if not isinstance(example, (Tensor, tuple, Mapping)):
        kind = type(example).__name__
        return Forward(failure=f"example_input is a {kind}; allowed: a tensor, a tuple or a dict of arguments")
    if any(is_lazy(parameter) for parameter in model.parameters()):
        return Forward(failure="lazy modules get their parameters from the first batch")
    # Not at module level: it is slow to import and rarely needed.
    from torch.utils.flop_counter import FlopCounterMode

    parts: dict[int, Measured] = {}
    autocast = nullcontext() if accelerator is None else accelerator.autocast()
    try:
        with torch.no_grad(), seeds.preserved(), evaluating(model), _buffers_kept(model), autocast, _countable(model):
            positional, keywords = _arguments(to_device(example, device))
            with FlopCounterMode(display=False) as counter, _hooked(model, parts, counter):
                model(*positional, **keywords)
    except Exception as error:  # the user's forward with the user's example: a table is no reason to end a run
        forget_forward(model)
        return Forward(failure=f"forward(example_input) failed with {type(error).__name__}")
    finally:
        reshard(model)
    return Forward(parts, int(counter.get_total_flops()))


def _arguments(example: Any) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
    if isinstance(example, Mapping):
        return (), example
    return (example if isinstance(example, tuple) else (example,)), {}


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put every buffer back at the end: the same tensors with the same values."""
    kept = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    values = [(tensor, tensor.clone()) for _, own in kept for tensor in own.values() if tensor is not None]
    try:
        yield
    finally:
        for live, own in kept:
            live.clear()
            live.update(own)
        for tensor, value in values:
            tensor.copy_(value)


@contextmanager
def _countable(model: nn.Module) -> Iterator[None]:
    """Switch off the fused kernels of attention and recurrent layers, whose operations torch does not count."""
    backends: Any = torch.backends
    fast = backends.mha.get_fastpath_enabled()
    recurrent = any(isinstance(module, nn.RNNBase) for module in model.modules())
    libraries = [backends.mkldnn, backends.cudnn] if recurrent else []
    enabled = [library.enabled for library in libraries]
    try:
        backends.mha.set_fastpath_enabled(False)
        for library in libraries:
            library.enabled = False
        yield
    finally:
        backends.mha.set_fastpath_enabled(fast)
        for library, before in zip(libraries, enabled, strict=True):
            library.enabled = before


@contextmanager
def _hooked(model: nn.Module, parts: dict[int, Measured], counter: Any) -> Iterator[None]:
    """Note each call of each module meanwhile."""
    begun: list[int] = []

    def before(module: nn.Module, positional: Any, keywords: dict[str, Any]) -> None:
        begun.append(counter.get_total_flops())
        parts.setdefault(id(module), Measured(shapes((*positional, *keywords.values())), ""))

    def after(module: nn.Module, positional: Any, keywords: dict[str, Any], output: Any) -> None:
        part = parts[id(module)]
        part.output = part.output or shapes(output)
        part.calls += 1
        part.flops += counter.get_total_flops() - begun.pop()

    with ExitStack() as stack:
        for module in model.modules():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        yield


def shapes(value: Any) -> str:
    """The shapes of the tensors in a value, three at most.

    >>> shapes(torch.zeros(2, 3)), shapes((torch.zeros(1), {"h": torch.zeros(4)})), shapes(None)
    ('[2, 3]', '[1], h: [4]', '-')
    """
    found = [f"{name}: {shape}" if name else shape for name, shape in _tensors("", value)]
    return ", ".join([*found[:3], *(["…"] if len(found) > 3 else [])]) or "-"


def _tensors(name: str, value: Any) -> Iterator[tuple[str, str]]:
    if isinstance(value, Tensor):
        yield name, str(list(value.shape))
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _tensors(str(key), part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(name, part)
