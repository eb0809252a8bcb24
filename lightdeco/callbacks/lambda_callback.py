"""A callback from functions, without a class."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from lightdeco.attach import attach
from lightdeco.errors import MarkError, nearest
from lightdeco.roles import ROLES


class LambdaCallback:
    """Calls functions at events: `LambdaCallback(on_train_epoch_end=lambda run: print(run.epoch))`.

    Each keyword is an event, or `setup`, `teardown` or another role that a callback may carry; each value a function
    that declares the arguments that it wants by name, as a marked method does but without `self`; for an event, also a
    list of functions.

    Raises:
        MarkError: there is no such event, or a value cannot be called; and when a run begins, a function asks for an
            argument that its event does not offer.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> tell = LambdaCallback(on_train_epoch_end=lambda run: print("epoch", run.epoch))
    >>> quiet = {"logger": False, "progress_bar": False, "summary": False}
    >>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)], max_epochs=2, callbacks=[tell], **quiet)
    epoch 0
    epoch 1
    """

    def __init__(self, **events: Callable[..., object] | Sequence[Callable[..., object]]) -> None:
        allowed = [role.name for role in ROLES.values() if "callback" in role.owners]
        if not events:
            raise MarkError("LambdaCallback() is called at no event; give one: LambdaCallback(on_fit_end=function)")
        for name, given in events.items():
            if name not in allowed:
                hint = nearest(name, allowed) or f"; allowed: {', '.join(allowed)}"
                raise MarkError(f"LambdaCallback: there is no event {name!r}{hint}")
            if not isinstance(given, Sequence):
                attach(self, **{name: _method(name, given)})
            elif ROLES[name].kind == "event":
                attach(self, **{name: [_method(name, function) for function in given]})
            else:
                raise MarkError(f"LambdaCallback: {name} takes one function, not a {type(given).__name__}")


def _method(event: str, function: Callable[..., object]) -> Callable[..., object]:
    """The function as `attach` wants it: with the object as its first argument, and the rest by name."""
    if not callable(function):
        raise MarkError(f"LambdaCallback({event}={function!r}) cannot be called; give a function")
    try:
        signature = inspect.signature(function)
    except ValueError as error:  # some builtins have none
        raise MarkError(
            f"LambdaCallback({event}={function!r}): its arguments are unknown; wrap it in a lambda"
        ) from error

    @functools.wraps(function)
    def method(_callback: object, /, *given: Any, **named: Any) -> object:
        return function(*given, **named)

    itself = inspect.Parameter("_callback", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [itself, *signature.parameters.values()]
    vars(method)["__signature__"] = signature.replace(parameters=parameters)
    return method
