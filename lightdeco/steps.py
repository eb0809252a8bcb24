"""The one indirection: `Steps` is the module that accelerate wraps; its `forward` calls the marked step.

A step called on the user's own model would silently lose what the wrapper does: autocast, DDP's gradient
synchronisation, FSDP's gathering. Also here: what a step may return, and how it is read.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from numbers import Real
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor, nn

from .errors import StepError, nearest
from .plan import Select

#: Keys of a step's result that are not metrics of their own.
RESERVED: Final = frozenset({"loss", "weight", "batch_size", "carry"})


class Steps(nn.Module):
    """The user's model behind one `forward(role, batch, batch_idx, dataloader_idx)`."""

    def __init__(self, model: nn.Module, calls: Mapping[str, tuple[Callable[..., Any], Select]]) -> None:
        super().__init__()
        self.model = model
        self.calls = dict(calls)

    def forward(self, role: str, *offered: object) -> Any:
        """Call the method marked with `role`, inside whatever wraps this module."""
        method, select = self.calls[role]
        positional, keywords = select(offered)
        return method(*positional, **keywords)


#: What a step returned, read: the loss (None for evaluation without one), the other scalars and torchmetrics objects to
#: log, by name, and the "weight" and "batch_size" if the step gave them. A plain tuple: one is made for each step.
Result: TypeAlias = tuple[Any, Sequence[tuple[str, Any]], Sequence[tuple[str, Any]], Any, int | None]


def is_metric(value: object) -> bool:
    """Whether the value is a torchmetrics `Metric` (recognised without importing torchmetrics)."""
    return not isinstance(value, type) and all(hasattr(value, name) for name in ("compute", "reset", "update"))


def is_scalar(value: object) -> bool:
    """Whether a value is logged: a number or a tensor of one element."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, Real)


def read_result(outputs: object, where: str, training: bool = False, carries: bool = False) -> Result:
    """Read what a step returned; `where` names the step in errors; `carries`: something takes up a "carry".

    Raises:
        StepError: not a scalar tensor, not a dict with str keys, or a reserved key with a wrong value; in training also
            no loss, or a loss without gradient.
    """
    if isinstance(outputs, Tensor):
        if outputs.numel() != 1:
            raise StepError(
                f"{where} returned a tensor of shape {tuple(outputs.shape)}; return a scalar loss, such as its "
                "mean() over the batch, or a dict"
            )
        if training and not outputs.requires_grad:
            raise _no_gradient(where)
        return outputs, (), (), None, None
    if isinstance(outputs, Mapping):
        result = _read_dict(outputs, where, carries)
    elif outputs is None:
        result = None, (), (), None, None
    else:
        raise StepError(f"{where} returned a {type(outputs).__name__}; return a scalar loss or a dict of values")
    loss = result[0]
    if training and loss is None:
        other = _instead_of_loss(outputs)
        raise StepError(f'{where} returned no loss; return a scalar tensor, or a dict with one under "loss"{other}')
    if training and loss is not None and not loss.requires_grad:
        raise _no_gradient(where)
    return result


def _instead_of_loss(outputs: object) -> str:
    """`", not under 'losss'"` for the key that was probably meant to be "loss", or an empty string."""
    keys = outputs if isinstance(outputs, Mapping) else ()
    like = [key for key in keys if key not in RESERVED and ("loss" in key.lower() or nearest("loss", [key]))]
    return f", not under {like[0]!r}" if like else ""


def _no_gradient(where: str) -> StepError:
    return StepError(
        f"{where} returned a loss without gradient: it depends on no parameter that requires grad; look for "
        ".item(), .detach(), torch.no_grad() or frozen parameters on the way to it"
    )


def _read_dict(outputs: Mapping[Any, Any], where: str, carries: bool) -> Result:
    scalars, metrics = [], []
    for key, value in outputs.items():
        if not isinstance(key, str) or not key:
            raise StepError(f"{where} returned a dict with the key {key!r}; keys must be str, and not empty")
        if key in RESERVED:
            continue  # the loss too: it is logged for itself
        if is_scalar(value):
            scalars.append((key, value))
        elif is_metric(value):
            metrics.append((key, value))
    loss = outputs.get("loss")
    if loss is not None and not (isinstance(loss, Tensor) and is_scalar(loss)):
        shown = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise StepError(f'{where} returned {shown} under "loss"; it must be a scalar tensor')
    weight, size = outputs.get("weight"), outputs.get("batch_size")
    if weight is not None:
        _check_weight(weight, where)
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise StepError(f'{where} returned "batch_size": {size!r}; allowed: an int of at least 1')
    if not carries and outputs.get("carry") is not None:
        raise StepError(
            f'{where} returned "carry", which nothing takes up: it is handed from part to part of a batch in training, '
            "which a @split_batch cuts; keep what the next batch needs in an attribute of the model"
        )
    return loss, scalars, metrics, weight, size


def _check_weight(weight: Any, where: str) -> None:
    if isinstance(weight, bool) or not is_scalar(weight):
        raise StepError(
            f'{where} returned a {type(weight).__name__} under "weight"; allowed: a number or scalar tensor'
        )
    if isinstance(weight, Tensor) and weight.device.type != "cpu":
        return  # to read it would wait for the device
    number = weight.item() if isinstance(weight, Tensor) else weight
    if not 0 <= number < float("inf"):
        raise StepError(f'{where} returned "weight": {number!r}; allowed: a finite number of at least 0')


def modes_of(model: nn.Module) -> list[tuple[nn.Module, bool]]:
    """The training/eval mode of every submodule, to be put back by `restore_modes`."""
    return [(module, module.training) for module in model.modules()]


def restore_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    """Put back the modes that `modes_of` returned: each submodule's own, a frozen one stays frozen."""
    for module, training in modes:
        module.training = training


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode, and each submodule back into its own mode at the end."""
    modes = modes_of(model)
    model.eval()
    try:
        yield
    finally:
        restore_modes(modes)


def no_grad(inference_mode: bool, device: torch.device) -> AbstractContextManager[None]:
    """The context of an evaluation step: `torch.inference_mode()`, or `torch.no_grad()` when that is switched off.

    On XLA it is `no_grad` too: most operations of torch_xla fail in inference mode. So do torchao's under autocast, and
    what FSDP gathers in it could not be trained: see `Session.inference`.
    """
    return torch.inference_mode() if inference_mode and device.type != "xla" else torch.no_grad()
