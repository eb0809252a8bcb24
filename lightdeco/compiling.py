"""`compile=`: `torch.compile` of a model's forward for the time of a verb."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .errors import SettingsError, nearest, warn


def compile_forward(model: nn.Module, compile: bool | Mapping[str, Any]) -> Callable[[], None]:
    """Compile the forward of a model in place; returns what puts it back.

    What is called as `model(x)` is compiled: neither the marked methods nor the names in `state_dict` change. A model
    without a forward of its own has its submodules compiled, each for itself.

    Raises:
        SettingsError: an option that `torch.compile` does not know or refuses, or there is no forward.

    >>> from lightdeco.compiling import compile_forward
    >>> model = nn.Linear(2, 1)
    >>> undo = compile_forward(model, {"backend": "eager"})
    >>> model(torch.ones(1, 2)).shape, list(model.state_dict())
    (torch.Size([1, 1]), ['weight', 'bias'])
    >>> undo()
    """
    options = dict(compile) if isinstance(compile, Mapping) else {}
    allowed = [name for name in inspect.signature(torch.compile).parameters if name != "model"]
    for name in options:
        if name not in allowed:
            raise SettingsError(
                f"compile has the option {name!r}; allowed: {', '.join(allowed)}{nearest(str(name), allowed)}"
            )
    modules = list(_with_forward(model))
    if not modules:
        raise SettingsError(f"compile: {type(model).__name__} has no forward, and no submodule with one")
    before = [module._compiled_call_impl for module in modules]
    unused: set[nn.Module] = set(modules)
    try:
        for module in modules:
            module.compile(**options)
            module._compiled_call_impl = _noticing(module, module._compiled_call_impl, unused)
    except (RuntimeError, TypeError) as error:
        _restore(modules, before)
        raise SettingsError(f"compile={compile!r} was refused by torch: {error}") from error

    def undo() -> None:
        _restore(modules, before)
        if len(unused) == len(modules):
            warn(
                f"compile had no effect: nothing called {type(model).__name__} as a function; call self(…) in the steps"
            )

    return undo


def _with_forward(module: nn.Module) -> Iterator[nn.Module]:
    """The module itself, or the nearest below it that have a forward."""
    if type(module).forward is not nn.Module.forward:
        yield module
    else:
        for child in module.children():
            yield from _with_forward(child)


def _noticing(module: nn.Module, compiled: Any, unused: set[nn.Module]) -> Callable[..., Any]:
    """The compiled call, which tells that it was used and then makes way."""

    def first(*args: Any, **kwargs: Any) -> Any:
        unused.discard(module)
        module._compiled_call_impl = compiled
        return compiled(*args, **kwargs)

    return first


def _restore(modules: list[nn.Module], before: list[Any]) -> None:
    for module, call in zip(modules, before, strict=True):
        module._compiled_call_impl = call
