"""The decorators. Each writes one attribute on the function and returns the same function.

>>> import lightdeco as ld
>>> def step(self, batch): ...
>>> ld.training_step(step) is step
True
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar, cast, overload

from .errors import MarkError, nearest
from .roles import ROLES

F = TypeVar("F", bound=Callable[..., object])

#: The one attribute. Its value is a tuple of `Mark`, so that `functools.wraps` of other decorators carries it along.
ATTRIBUTE: Final = "__lightdeco_marks__"


@dataclass(frozen=True)
class Mark:
    """One role or event that a function carries, with the decorator's options."""

    role: str
    every: int = 1
    optimizer: str | None = None
    manual: bool = False
    size: int | None = None


#: What may lie around a function in a class body and makes something else of it than a method.
WRAPPERS: Final = (property, staticmethod, classmethod, functools.cached_property, functools.partialmethod)


def wrapped(value: object) -> object:
    """The function inside of a property, staticmethod and the like; other values as they are."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    if isinstance(value, property):
        return value.fget
    return value.func if isinstance(value, (functools.cached_property, functools.partialmethod)) else value


def marks_of(value: object) -> tuple[Mark, ...]:
    """The marks on a function, or on what a property, staticmethod and the like wraps."""
    # vars() and not getattr(): a mock or a proxy answers any getattr.
    found = getattr(wrapped(value), "__dict__", {}).get(ATTRIBUTE, ())
    return cast("tuple[Mark, ...]", found)


def _write(function: F, mark: Mark) -> F:
    present = marks_of(function)
    name = getattr(function, "__qualname__", repr(function))
    if not callable(function) or isinstance(function, (staticmethod, classmethod, type)):
        kind = type(function).__name__
        raise MarkError(
            f"@{mark.role} stands on a {kind}; it belongs on a plain method: put the decorator on a "
            f"`def` inside the class, with nothing that makes a {kind} around or below it"
        )
    if any(m.role == mark.role for m in present):
        raise MarkError(f"{name} is marked @{mark.role} twice; remove one of the two")
    try:
        setattr(function, ATTRIBUTE, (*present, mark))
    except AttributeError as error:
        raise MarkError(f"@{mark.role} cannot mark {function!r}; mark a plain function") from error
    return function


class _Decorator(Protocol):
    """`@role` and `@role()`, both of the type F -> F."""

    @overload
    def __call__(self, function: F, /) -> F: ...
    @overload
    def __call__(self) -> Callable[[F], F]: ...


def _no_options(role: str, options: dict[str, object]) -> str:
    given = ", ".join(f"{name}={value!r}" for name, value in options.items())
    if ROLES[role].kind == "event" and set(options) == {"every"}:
        return f'@{role}({given}): write @ld.on("{role.removeprefix("on_")}", {given})'
    return f"@{role}({given}): this decorator takes no options; write @ld.{role}"


def _decorator(role: str) -> _Decorator:
    def decorate(function: Any = None, /, **options: object) -> Any:
        if options:
            raise MarkError(_no_options(role, options))
        mark = Mark(role)
        if function is None:
            return lambda function: _write(function, mark)
        return _write(function, mark)

    row = ROLES[role]
    arguments = ", ".join((*row.offers, "run", "model"))
    decorate.__name__ = decorate.__qualname__ = role
    decorate.__doc__ = f"Mark a method: {row.when}.\n\nIt may ask by name for: {arguments}."
    return cast(_Decorator, decorate)


@overload
def training_step(function: F, /) -> F: ...
@overload
def training_step(*, optimizer: str | None = None, every: int = 1, manual: bool = False) -> Callable[[F], F]: ...
def training_step(
    function: Any = None, /, *, optimizer: str | None = None, every: int = 1, manual: bool = False
) -> Any:
    """Mark the method that computes the training loss of a batch.

    It may ask by name for: batch, batch_idx, dataloader_idx, run, model (and, beside a `split_batch`, carry); its first
    parameter may have any name and gets the batch. It returns the loss (a scalar tensor, the mean over its batch) or a
    dict with `"loss"`, whose other scalars are logged as `train/<key>`. Reserved keys: `loss`, `weight`, `batch_size`,
    `carry`.

    Several steps may be marked, each for an optimizer of its own. They run in the order of definition, and only the
    parameters of its optimizer require grad during each.

    Args:
        optimizer: with several optimizers, the name of the one that this step is for.
        every: run this step for every n-th batch (0, n, 2n, …) of each epoch.
        manual: the step calls `ld.backward`, and `step` and `zero_grad` of the optimizers, itself.

    Raises:
        MarkError: `every` is no positive integer, or the function cannot be marked.

    >>> import lightdeco as ld
    >>> class Net:
    ...     @ld.training_step
    ...     def step(self, batch): ...
    """
    if isinstance(function, str):
        raise MarkError(f'@training_step("{function}"): write @ld.training_step(optimizer="{function}")')
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise MarkError(f"@training_step(every={every!r}): allowed: an integer of at least 1")
    if optimizer is not None and not isinstance(optimizer, str):
        raise MarkError(f"@training_step(optimizer={optimizer!r}): allowed: the name of an optimizer, a str")
    mark = Mark("training_step", every=every, optimizer=optimizer, manual=manual)
    if function is None:
        return lambda function: _write(function, mark)
    return _write(function, mark)


@overload
def split_batch(function: F, /) -> F: ...
@overload
def split_batch(*, size: int | None = None) -> Callable[[F], F]: ...
def split_batch(function: Any = None, /, *, size: int | None = None) -> Any:
    """Mark the method that cuts a training batch into parts, for truncated backpropagation through time.

    It may ask by name for: batch, size, run, model. It returns the parts in order, as a list or a tuple, or yields
    them. Each is a training step of its own with an update of its own. What the step returns under "carry" (nested
    tensors) is detached and handed to the next part as the argument `carry`, which is None for the first one.

    Args:
        size: what the method gets as `size`, such as the length of a part.

    Raises:
        MarkError: `size` is no positive integer, or the function cannot be marked.

    >>> import lightdeco as ld
    >>> class Net:
    ...     @ld.split_batch(size=32)
    ...     def split(self, batch, size):
    ...         return batch.split(size, dim=1)
    """
    if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
        raise MarkError(f"@split_batch(size={size!r}): allowed: an integer of at least 1")
    mark = Mark("split_batch", size=size)
    if function is None:
        return lambda function: _write(function, mark)
    return _write(function, mark)


def on(event: str, *, every: int = 1) -> Callable[[F], F]:
    """Mark a method for an event by name: `@ld.on("train_batch_end", every=100)`.

    The name may be given with or without `on_`. With `every=n` the method is called the n-th, 2n-th, … time that the
    event happens in a run.

    Raises:
        MarkError: there is no such event, or `every` is no positive integer.
    """
    events = [role.name for role in ROLES.values() if role.kind == "event"]
    name = event if isinstance(event, str) and event.startswith("on_") else f"on_{event}"
    if name not in events:
        hint = nearest(name, events) or f"; allowed: {', '.join(events)}"
        raise MarkError(f"there is no event {event!r}{hint}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise MarkError(f"@on({event!r}, every={every!r}): allowed: an integer of at least 1")
    return lambda function: _write(function, Mark(name, every=every))


validation_step = _decorator("validation_step")
test_step = _decorator("test_step")
vars(test_step)["__test__"] = False  # pytest must not collect it
predict_step = _decorator("predict_step")

configure_optimizers = _decorator("configure_optimizers")
configure_model = _decorator("configure_model")
configure_callbacks = _decorator("configure_callbacks")
configure_accelerator = _decorator("configure_accelerator")

backward = _decorator("backward")
optimizer_step = _decorator("optimizer_step")
optimizer_zero_grad = _decorator("optimizer_zero_grad")
clip_gradients = _decorator("clip_gradients")
lr_scheduler_step = _decorator("lr_scheduler_step")
transfer_batch_to_device = _decorator("transfer_batch_to_device")

prepare_data = _decorator("prepare_data")
setup = _decorator("setup")
teardown = _decorator("teardown")
train_dataloader = _decorator("train_dataloader")
val_dataloader = _decorator("val_dataloader")
test_dataloader = _decorator("test_dataloader")
vars(test_dataloader)["__test__"] = False
predict_dataloader = _decorator("predict_dataloader")

on_fit_start = _decorator("on_fit_start")
on_fit_end = _decorator("on_fit_end")
on_sanity_check_start = _decorator("on_sanity_check_start")
on_sanity_check_end = _decorator("on_sanity_check_end")
on_train_start = _decorator("on_train_start")
on_train_end = _decorator("on_train_end")
on_train_epoch_start = _decorator("on_train_epoch_start")
on_train_epoch_end = _decorator("on_train_epoch_end")
on_train_batch_start = _decorator("on_train_batch_start")
on_train_batch_end = _decorator("on_train_batch_end")
on_validation_start = _decorator("on_validation_start")
on_validation_end = _decorator("on_validation_end")
on_validation_epoch_start = _decorator("on_validation_epoch_start")
on_validation_epoch_end = _decorator("on_validation_epoch_end")
on_validation_batch_start = _decorator("on_validation_batch_start")
on_validation_batch_end = _decorator("on_validation_batch_end")
on_test_start = _decorator("on_test_start")
on_test_end = _decorator("on_test_end")
on_test_epoch_start = _decorator("on_test_epoch_start")
on_test_epoch_end = _decorator("on_test_epoch_end")
on_test_batch_start = _decorator("on_test_batch_start")
on_test_batch_end = _decorator("on_test_batch_end")
on_predict_start = _decorator("on_predict_start")
on_predict_end = _decorator("on_predict_end")
on_predict_epoch_start = _decorator("on_predict_epoch_start")
on_predict_epoch_end = _decorator("on_predict_epoch_end")
on_predict_batch_start = _decorator("on_predict_batch_start")
on_predict_batch_end = _decorator("on_predict_batch_end")
on_before_zero_grad = _decorator("on_before_zero_grad")
on_before_backward = _decorator("on_before_backward")
on_after_backward = _decorator("on_after_backward")
on_before_optimizer_step = _decorator("on_before_optimizer_step")
on_before_batch_transfer = _decorator("on_before_batch_transfer")
on_after_batch_transfer = _decorator("on_after_batch_transfer")
on_save_checkpoint = _decorator("on_save_checkpoint")
on_load_checkpoint = _decorator("on_load_checkpoint")
on_exception = _decorator("on_exception")
