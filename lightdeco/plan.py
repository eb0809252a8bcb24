"""Discovery: from a model, a data object and callbacks to a frozen `Plan`, with every check before the first batch.

The loop then calls plain functions with the arguments that the table of roles lists, in its order.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from .callbacks.model_checkpoint import ModelCheckpoint
from .errors import MarkError, SettingsError
from .hints import example, missing, warn_of_undecorated
from .hooks import Hook as Hook
from .hooks import is_marked as is_marked
from .hooks import read
from .roles import ALWAYS, REQUIRED, ROLES, SKIP_EPOCH, TRANSFER
from .settings_checks import shown


@dataclass(frozen=True)
class Plan:
    """What a run will call: every hook of the model, the data object and the callbacks, in the order of calling."""

    verb: str
    model: nn.Module
    data: object | None
    hooks: tuple[Hook, ...]

    def all(self, role: str) -> tuple[Hook, ...]:
        """The hooks of a role or event: the model's, the data object's, then the callbacks'; base class first."""
        return tuple(hook for hook in self.hooks if hook.role.name == role)

    def one(self, role: str) -> Hook | None:
        """The hook of a role that only one method can have. The data object's loaders come before the model's."""
        found = self.all(role)
        return found[-1] if found else None

    @property
    def owners(self) -> list[object]:
        """The model, the data object and the callbacks that mark anything, in the order of calling."""
        return list({id(hook.owner): hook.owner for hook in self.hooks}.values())

    def call(self, hook: Hook, run: object, given: tuple[object, ...]) -> Any:
        """Call one hook with what the table offers, in the table's order."""
        positional, keywords = _select(hook, (run, self.model))(given)
        return hook.method(*positional, **keywords)

    def bind(self, run: object, counts: dict[str, int]) -> dict[str, Callable[..., Any]]:
        """Every role and event by name, as one function of what the table offers, in the table's order.

        A role without a hook is left out; an event without a hook is a function that does nothing. `counts` holds how
        often each event with `every` happened; it is part of the run's progress.
        """
        constants = (run, self.model)
        bound: dict[str, Callable[..., Any]] = {}
        for role in ROLES.values():
            hooks = self.all(role.name)
            if hooks:
                several = role.kind == "event" or role.shared
                bound[role.name] = _together(hooks, constants, counts) if several else _alone(hooks[-1], constants)
            elif role.kind == "event":
                bound[role.name] = _nothing
        return bound

    def transfer(self, run: object, counts: dict[str, int], move: Callable[..., Any]) -> Callable[..., Any]:
        """The way of a batch to the device as one function of (batch, device, dataloader_idx).

        The events before it, the override (or else `move`) and the events after it; what one returns the next one gets.
        """
        constants = (run, self.model)
        before, override, after = (_calls(self.all(role), constants) for role in TRANSFER)
        calls = [*before, *(override or [(1, "", move, lambda given: (given, {}))]), *after]

        def chain(batch: Any, *rest: object) -> Any:
            for every, key, method, select in calls:
                if _due(every, key, counts):
                    positional, keywords = select((batch, *rest))
                    changed = method(*positional, **keywords)
                    batch = batch if changed is None else changed
            return batch

        return chain

    def steps(self) -> dict[str, Hook]:
        """The steps by their roles; where there are several training steps, each with the name of its optimizer."""
        found = {hook.role.name: hook for hook in self.hooks if hook.role.kind == "step"}
        training = self.all("training_step")
        if len(training) > 1:
            del found["training_step"]
            found |= {f"training_step {hook.mark.optimizer}": hook for hook in training}
        return found

    def step(self, hook: Hook, run: object) -> tuple[Callable[..., Any], "Select"]:
        """The method of a step, and what picks its arguments from (batch, batch_idx, dataloader_idx, …)."""
        return hook.method, _select(hook, (run, self.model))

    def direct(self, hook: Hook, run: object) -> Callable[..., Any]:
        """A step as one function of (role, batch, batch_idx, …), for where nothing wraps it."""
        method, select = self.step(hook, run)
        count = len(hook.positional)
        if not hook.keywords and hook.positional == hook.role.offers[:count]:  # it takes the first ones, in their order
            if count == 1:
                return lambda role, batch, *rest: method(batch)
            return lambda role, *given: method(*given[:count])

        def call(role: str, *given: object) -> Any:
            positional, keywords = select(given)
            return method(*positional, **keywords)

        return call


# ---- calling: each method of the user is called from one frame of ours, to keep tracebacks short ---------------------

#: From the values of a role's table row to the positional and the keyword arguments of one method.
Select = Callable[[tuple[Any, ...]], tuple[Sequence[Any], Mapping[str, Any]]]


def _select(hook: Hook, constants: tuple[object, object]) -> Select:
    offered = (*hook.role.offers, *ALWAYS)
    picks = tuple(offered.index(name) for name in hook.positional)
    named = tuple((name, offered.index(name)) for name in hook.keywords)
    if not named and picks == tuple(range(len(picks))) and len(picks) <= len(hook.role.offers):
        count, nothing = len(picks), dict[str, Any]()
        return lambda given: (given[:count], nothing)

    def select(given: tuple[Any, ...]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        values = given + constants
        return [values[i] for i in picks], {name: values[i] for name, i in named}

    return select


#: A hook's `every` and the key of its count, its method, and what picks its arguments.
_Calls = list[tuple[int, str, Callable[..., Any], Select]]


def _calls(hooks: Sequence[Hook], constants: tuple[object, object]) -> _Calls:
    """What is needed to call each hook. Two objects of one class have a count each; line numbers are left out of keys,
    which are saved."""
    names = [f"{hook.role.name} {hook.where.partition(' (')[0]}" for hook in hooks]
    keys = [f"{name} {names[:i].count(name)}" for i, name in enumerate(names)]
    every = [hook.mark.every if hook.role.kind == "event" else 1 for hook in hooks]
    return [(n, k, h.method, _select(h, constants)) for n, k, h in zip(every, keys, hooks, strict=True)]


def _due(every: int, key: str, counts: dict[str, int]) -> bool:
    """Count an event that happens, and tell whether its `every` is full."""
    if every == 1:
        return True
    counts[key] = counts.get(key, 0) + 1
    return counts[key] % every == 0


def _nothing(*given: object) -> None:
    pass


def _alone(hook: Hook, constants: tuple[object, object]) -> Callable[..., Any]:
    method, select = hook.method, _select(hook, constants)

    def alone(*given: object) -> Any:
        positional, keywords = select(given)
        return method(*positional, **keywords)

    return alone


def _together(hooks: Sequence[Hook], constants: tuple[object, object], counts: dict[str, int]) -> Callable[..., Any]:
    """One function that calls every hook; SKIP_EPOCH, if one returns it, is the only result that means anything."""
    calls = _calls(hooks, constants)
    if len(calls) == 1 and calls[0][0] == 1:
        return _alone(hooks[0], constants)

    def together(*given: object) -> Any:
        result = None
        for every, key, method, select in calls:
            if _due(every, key, counts):
                positional, keywords = select(given)
                if method(*positional, **keywords) is SKIP_EPOCH:
                    result = SKIP_EPOCH
        return result

    return together


# ---- the whole plan --------------------------------------------------------------------------------------------------


def discover(verb: str, model: object, data: object | None, callbacks: Sequence[object]) -> Plan:
    """Read the marks of the model, the data object and the callbacks, check them, and return the plan.

    `data` is the marked data object, or None when `data` has another form.

    Raises:
        MarkError: a required role is missing, given twice, on the wrong object, or asks for what is not offered.
        SettingsError: a callback is there twice.
    """
    if isinstance(model, type):
        raise MarkError(f"model is the class {model.__name__}; give an instance: {model.__name__}(…)")
    if not isinstance(model, nn.Module):
        raise MarkError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module with marked methods")
    hooks = read(model, "model")
    things: list[tuple[str, object]] = [("model", model)]
    if data is not None and data is not model:
        hooks += read(data, "data")
        things.append(("data object", data))
    made = "".join(hook.where for hook in hooks if hook.role.name == "configure_callbacks")
    for callback in callbacks:
        hooks += _read_callback(callback, things, made)
        things.append(("callback", callback))
    plan = Plan(verb, model, data, tuple(hooks))
    for role in REQUIRED[verb]:
        if plan.one(role) is None:
            raise MarkError(missing(verb, model, role))
    for _, thing in things:
        warn_of_undecorated(thing)
    return plan


def _read_callback(callback: object, others: Sequence[tuple[str, object]], made: str) -> list[Hook]:
    """The hooks of a callback; `others`: what is read before it, with what it is; `made`: what may have made it."""
    kind = type(callback).__name__
    source = f" (it is in `callbacks`, or {made} returned it)" if made else ""
    if isinstance(callback, type):
        name = callback.__name__
        raise MarkError(f"the callback {name} is a class; give an instance: {name}(…){source}")
    for what, other in others:
        if callback is other and what == "callback":
            raise SettingsError(f"callbacks holds the same {kind} twice; remove one{source}")
        if callback is other:
            raise SettingsError(f"callbacks holds the {what} itself, whose events are called anyway; remove it{source}")
    if found := read(callback, "callback"):
        return found
    if isinstance(callback, ModelCheckpoint):
        raise MarkError(f"callbacks holds a ModelCheckpoint; give it as fit(…, checkpoint=ModelCheckpoint(…)){source}")
    if type(callback).__module__ == "builtins":
        raise MarkError(
            f"the callback {shown(callback)} is a {kind}; give an object with marked methods, or a list of such{source}"
        )
    raise MarkError(f"the callback {kind} marks no method; decorate one, such as {example(callback)}{source}")
