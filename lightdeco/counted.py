"""What the torchmetrics objects in a model have counted, which `state_dict` leaves out."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn


def metric_modules(model: nn.Module) -> dict[str, Any]:
    """The torchmetrics objects in the model, by their path."""
    return {n: m for n, m in model.named_modules() if hasattr(m, "_defaults") and hasattr(m, "_update_count")}


def counted(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What they have counted, by their path; the tensors are theirs."""
    return {
        path: {"count": m._update_count, **{name: getattr(m, name) for name in m._defaults}}
        for path, m in metric_modules(model).items()
        if m._update_count
    }


def set_counted(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Give them what `counted` returned, of this model or another; those that are not there stay as they are."""
    modules = metric_modules(model)
    for path, values in state.items():
        if path in modules:
            metric = modules[path]
            for name in metric._defaults:
                setattr(metric, name, _moved(values[name], metric.device))
            metric._update_count, metric._computed = values["count"], None


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Put what they have counted back at the end."""
    before = {path: {name: _copied(each) for name, each in state.items()} for path, state in counted(model).items()}
    try:
        yield
    finally:
        for metric in metric_modules(model).values():
            if metric._update_count:
                metric.reset()
        set_counted(model, before)


def _moved(value: Any, device: Any) -> Any:
    return [v.to(device) for v in value] if isinstance(value, list) else value.to(device)


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return list(value)  # lists grow, what is in them stays
    return value.clone() if hasattr(value, "clone") else value
