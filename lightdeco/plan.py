"""Discovery: from a model, a data object and callbacks to a frozen `Plan`, with every check before the first batch.

Marks are read from the `__dict__` of each class in the MRO, never with `getattr` on the instance, so that no property
of the model runs. What a method may ask for is resolved here, once; the loop then calls plain functions with the
arguments that the table of roles lists, in its order.
"""

import difflib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from torch import nn

from .errors import MarkError, nearest, warn
from .marks import WRAPPERS, Mark, marks_of, wrapped
from .roles import ALWAYS, REQUIRED, ROLES, TRANSFER, Owner, Role

T = TypeVar("T")

#: Where `attach` keeps its functions, in the `__dict__` of a class or an instance.
ATTACHED: Final = "_lightdeco_attached"

#: What roles are called elsewhere, besides what is spelt nearly the same.
_OTHER_NAMES: Final = {
    "train_step": "training_step",
    "val_step": "validation_step",
    "train_loader": "train_dataloader",
    "val_loader": "val_dataloader",
    "test_loader": "test_dataloader",
    "predict_loader": "predict_dataloader",
}

#: In the path of code that its user did not write: its method names mean what they mean there.
_INSTALLED: Final = ("site-packages", "dist-packages")

#: Method names that suggest a required role when it is not marked.
_LOOKS_LIKE: Final = {
    "training_step": ("training_step", "train_step", "step", "training", "fit_step", "compute_loss", "loss"),
    "validation_step": ("validation_step", "val_step", "valid_step", "eval_step", "validate_step", "check"),
    "test_step": ("test_step", "eval_step", "validation_step"),
    "predict_step": ("predict_step", "prediction_step", "predict", "infer", "inference_step"),
    "configure_optimizers": (
        "configure_optimizers",
        "configure_optimizer",
        "optimizers",
        "optimizer",
        "make_optimizer",
    ),
}


@dataclass(frozen=True)
class Hook:
    """One marked method of one object: its role, the bound method, and the arguments that it asks for."""

    role: Role
    mark: Mark
    owner: object
    method: Callable[..., Any]
    positional: tuple[str, ...]
    keywords: tuple[str, ...]
    where: str

    @property
    def name(self) -> str:
        """`Class.method (file:line)`, as messages show it."""
        return self.where


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

    def bind(self, run: object, counts: dict[str, int]) -> dict[str, Callable[..., Any]]:
        """Every role and event by name, as one function of what the table offers, in the table's order.

        A role without a hook is left out; an event without a hook is a function that does nothing. `counts` holds how
        often each event with `every` happened; it is part of the run's progress.
        """
        constants = (run, self.model)
        bound: dict[str, Callable[..., Any]] = {}
        for role in ROLES.values():
            hooks = self.all(role.name)
            if role.kind == "event" or (hooks and role.shared):
                bound[role.name] = _together(hooks, constants, counts) if hooks else _nothing
            elif hooks:
                bound[role.name] = _together(hooks[-1:], constants, counts)
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

    def step(self, role: str, run: object) -> tuple[Callable[..., Any], "Select"]:
        """The method of a step, and what picks its arguments from (batch, batch_idx, dataloader_idx, …)."""
        hook = self.one(role)
        assert hook is not None
        return hook.method, _select(hook, (run, self.model))


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


def _together(hooks: Sequence[Hook], constants: tuple[object, object], counts: dict[str, int]) -> Callable[..., Any]:
    """One function that calls every hook and returns the last result that is not None."""
    calls = _calls(hooks, constants)

    def together(*given: object) -> Any:
        result = None
        for every, key, method, select in calls:
            if _due(every, key, counts):
                positional, keywords = select(given)
                answer = method(*positional, **keywords)
                result = result if answer is None else answer
        return result

    return together


# ---- reading one object ----------------------------------------------------------------------------------------------


def is_marked(thing: object) -> bool:
    """Whether any method of the object carries a mark."""
    return not isinstance(thing, type) and bool(_marked(thing))


def read(thing: object, owner: Owner) -> list[Hook]:
    """The hooks of one object, base class first, checked."""
    hooks = []
    for name, (function, marks) in _marked(thing).items():
        for mark in marks:
            hooks.append(_hook(thing, owner, name, function, mark))
    _refuse_doubles(hooks)
    return hooks


def _marked(thing: object) -> dict[str, tuple[Any, tuple[Mark, ...]]]:
    """Method name -> (what the class holds under it, its marks)."""
    found: dict[str, tuple[Any, tuple[Mark, ...]]] = {}
    for cls in reversed(type(thing).__mro__):
        for name, value in vars(cls).items():
            marks = marks_of(value) or (found[name][1] if name in found else ())
            if value is None:
                found.pop(name, None)
            elif marks:
                found[name] = (value, marks)
    attached = _attached(thing)
    taken = {a.mark.role for a in attached.values() if ROLES[a.mark.role].kind != "event"}
    found = {n: (f, left) for n, (f, ms) in found.items() if (left := tuple(m for m in ms if m.role not in taken))}
    return found | {key: (a, (a.mark,)) for key, a in attached.items()}


def _attached(thing: object) -> dict[str, "Attachment"]:
    """What was attached to the classes of an object and to itself, under keys that no method can have.

    Of a role the most special one counts; events add up, base class first.
    """
    found: dict[str, Attachment] = {}
    holders = [*(vars(cls) for cls in reversed(type(thing).__mro__)), getattr(thing, "__dict__", {})]
    for level, holder in enumerate(holders):
        for key, attachment in holder.get(ATTACHED, {}).items():
            event = ROLES[attachment.mark.role].kind == "event"
            found[f"attach {level} {key}" if event else f"attach {key}"] = attachment
    return found


def _hook(thing: object, owner: Owner, name: str, value: Any, mark: Mark) -> Hook:
    role = ROLES[mark.role]
    function = value.function if isinstance(value, Attachment) else value
    where = _where(thing, mark.role if isinstance(value, Attachment) else name, function)
    if not isinstance(value, Attachment):
        _refuse_kind(value, role, where)
    if owner not in role.owners:
        allowed = " or ".join(f"the {o}" for o in role.owners)
        raise MarkError(f"{where}, marked @{role.name}, stands on the {owner}; this role belongs on {allowed}")
    _refuse_deferred(function, role, where)
    positional, keywords = _wanted(function, role, where)
    return Hook(role, mark, thing, types.MethodType(function, thing), positional, keywords, where)


def _refuse_deferred(function: Any, role: Role, where: str) -> None:
    """Refuse what returns a coroutine or an iterator, also under functools.wraps: its body would never run."""
    for code in (inspect.unwrap(function), type(function).__call__):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise MarkError(f"{where}, marked @{role.name}, is an async function; make it a plain `def`")
        if inspect.isgeneratorfunction(code):
            raise MarkError(f"{where}, marked @{role.name}, is a generator (it has `yield`); make it return its result")


def _refuse_kind(value: object, role: Role, where: str) -> None:
    if isinstance(value, WRAPPERS):
        kind = type(value).__name__
        raise MarkError(f"{where}, marked @{role.name}, is a {kind}; marks belong on plain methods: remove @{kind}")
    if not inspect.isfunction(value):
        kind = type(value).__name__
        raise MarkError(
            f"{where} carries (or inherits) the mark @{role.name} but is a {kind}, not a plain method; write a "
            f"`def`, or use ld.attach for other callables"
        )


def _wanted(function: Callable[..., Any], role: Role, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that a method asks for: by position and by keyword. Raises MarkError for one that is not offered."""
    offered = (*role.offers, *ALWAYS)
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some builtins have none
        raise MarkError(f"{where}: the arguments of {function!r} are unknown; wrap it in a `def` or lambda") from error
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise MarkError(f"{where}, marked @{role.name}, takes no arguments; its first one must be the object, `self`")
    takes_self = parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    parameters = parameters[1:] if takes_self else parameters
    if role.kind == "step":
        parameters = _name_batch(parameters, offered)
        if [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL]:
            raise MarkError(
                f"{where}, marked @{role.name}, takes *args, which names nothing; name the batch: (self, batch)"
            )
    positional: list[str] = []
    keywords: list[str] = []
    unknown: list[str] = []
    for p in parameters:
        if p.kind is inspect.Parameter.VAR_POSITIONAL:
            continue
        if p.kind is inspect.Parameter.VAR_KEYWORD:
            keywords += [name for name in offered if name not in positional and name not in keywords]
        elif p.name not in offered:
            if p.default is inspect.Parameter.empty:
                unknown.append(p.name)
        elif p.kind is inspect.Parameter.KEYWORD_ONLY or any(q not in offered for q in _before(parameters, p)):
            keywords.append(p.name)
            if p.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise MarkError(
                    f"{where}, marked @{role.name}: {p.name!r} can only be given by position, after another"
                )
        else:
            positional.append(p.name)
    if unknown:
        hint = "".join(nearest(name, offered) for name in unknown[:1])
        raise MarkError(f"{where}, marked @{role.name}, asks for {unknown}; it may ask for {list(offered)}{hint}")
    return tuple(positional), tuple(keywords)


def _before(parameters: list[inspect.Parameter], last: inspect.Parameter) -> list[str]:
    return [p.name for p in parameters[: parameters.index(last)]]


def _name_batch(parameters: list[inspect.Parameter], offered: tuple[str, ...]) -> list[inspect.Parameter]:
    """A step's first parameter may have any name and gets the batch."""
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters]
    if parameters and parameters[0].kind in by_position and names[0] not in offered and "batch" not in names:
        return [parameters[0].replace(name="batch"), *parameters[1:]]
    return parameters


def _refuse_doubles(hooks: Iterable[Hook]) -> None:
    seen: dict[str, Hook] = {}
    for hook in hooks:
        if hook.role.kind == "event":
            continue
        if hook.mark.optimizer is not None or hook.mark.manual or hook.mark.every != 1:
            raise MarkError(
                f"{hook.where}: @training_step(optimizer=…, every=…, manual=…) is not available yet; "
                "mark one training step without options"
            )
        if hook.role.name in seen:
            raise MarkError(
                f"@{hook.role.name} stands on two methods, {seen[hook.role.name].where} and {hook.where}; "
                f"keep one: remove a decorator, or write `name = None` in the subclass to drop an inherited one"
            )
        seen[hook.role.name] = hook


def _where(thing: object, name: str, function: object) -> str:
    """`Class.method (file:line)`."""
    function = wrapped(function)
    code = getattr(inspect.unwrap(function) if callable(function) else function, "__code__", None)
    line = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{type(thing).__name__}.{name}{line}"


# ---- attach ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Attachment:
    """A function that `attach` gave to an object, with its mark."""

    mark: Mark
    function: Callable[..., Any]


class _Attachments(dict[str, Attachment]):
    """The attached functions of one object. deepcopy keeps them; pickle leaves an empty dict in their place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Attachments":
        return _Attachments(self)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return dict, ()


def attach(thing: T, /, **functions: Any) -> T:
    """Give a class or an instance that you do not own the roles and events of lightdeco; returns `thing`.

    Each keyword is a role or an event, each value a function that gets the object as its first argument and the rest by
    name, as a marked method does; for an event, also a list of functions. A role attached hides the same role marked in
    the class. `state_dict` stays as it was, `copy.deepcopy` keeps the roles, `pickle` leaves them out.

    Raises:
        MarkError: no such role, something that cannot be called, or an object without a `__dict__`.

    >>> import torch, lightdeco as ld
    >>> model = ld.attach(torch.nn.Linear(2, 1), training_step=lambda m, batch: m(batch).mean())
    """
    if not hasattr(thing, "__dict__"):
        raise MarkError(f"ld.attach cannot write on a {type(thing).__name__}; give it a class or an ordinary instance")
    new = _Attachments(vars(thing).get(ATTACHED, {}))
    for name, given in functions.items():
        if name not in ROLES:
            raise MarkError(f"ld.attach: {name!r} is no role{nearest(name, ROLES)}; allowed: {', '.join(ROLES)}")
        several = isinstance(given, (list, tuple))
        if several and ROLES[name].kind != "event":
            raise MarkError(f"ld.attach: {name} takes one function, not {type(given).__name__}")
        new = _Attachments({key: a for key, a in new.items() if a.mark.role != name})
        for i, function in enumerate(given if several else [given]):
            if not callable(function):
                raise MarkError(f"ld.attach: {name}={function!r} cannot be called; give a function of the object")
            mark = next((m for m in marks_of(function) if m.role == name), Mark(name))
            new[f"{name}[{i}]" if several else name] = Attachment(mark, function)
    if isinstance(thing, type):
        try:
            setattr(thing, ATTACHED, new)
        except TypeError as error:
            raise MarkError(f"ld.attach cannot write on the class {thing.__name__}; give a subclass of it") from error
    else:
        vars(thing)[ATTACHED] = new  # not setattr: an nn.Module's own __setattr__ need not know of it
    return thing


# ---- the whole plan --------------------------------------------------------------------------------------------------


def discover(verb: str, model: object, data: object | None, callbacks: Sequence[object]) -> Plan:
    """Read the marks of the model, the data object and the callbacks, check them, and return the plan.

    `data` is the marked data object, or None when `data` has another form.

    Raises:
        MarkError: a required role is missing, given twice, on the wrong object, or asks for what is not offered.
    """
    if isinstance(model, type):
        raise MarkError(f"model is the class {model.__name__}; give an instance: {model.__name__}(…)")
    if not isinstance(model, nn.Module):
        raise MarkError(f"model is a {type(model).__name__}; allowed: a torch.nn.Module with marked methods")
    hooks = read(model, "model")
    if data is not None and data is not model:
        hooks += read(data, "data")
    for callback in callbacks:
        if isinstance(callback, type):
            raise MarkError(f"the callback {callback.__name__} is a class; give an instance: {callback.__name__}(…)")
        found = read(callback, "callback")
        if not found:
            raise MarkError(
                f"the callback {type(callback).__name__} marks no method; decorate one, such as @ld.on_train_epoch_end"
            )
        hooks += found
    plan = Plan(verb, model, data, tuple(hooks))
    for role in REQUIRED[verb]:
        if plan.one(role) is None:
            raise MarkError(_missing(verb, model, role))
    things = [model, *([data] if data is not None and data is not model else []), *callbacks]
    for thing in things:
        _warn_of_undecorated(thing)
    return plan


def _missing(verb: str, model: nn.Module, role: str) -> str:
    name = type(model).__name__
    message = f"ld.{verb} needs a @{role}, and {name} marks none"
    functions = _functions(model)
    marked = _marked(model)
    likely = [n for n in _LOOKS_LIKE.get(role, ()) if n in functions and n not in marked]
    if likely:
        where = _where(model, likely[0], functions[likely[0]])
        message += f"; `{likely[0]}` looks like a {role.replace('_', ' ')} but is not decorated: {where}"
    elif role == "test_step" and (check := _carrier(marked, "validation_step")):
        message += f"; to test as you validate, put @ld.test_step on `{check}` as well"
    else:
        message += f"; decorate the method that does it with @ld.{role}"
    for path, module in model.named_modules():
        if path and any(mark.role == role for _, marks in _marked(module).values() for mark in marks):
            message += f" (its submodule `{path}` marks one, but only the marks of the root count)"
            break
    return message


def _carrier(marked: Mapping[str, tuple[Any, tuple[Mark, ...]]], role: str) -> str:
    """The name of the method that carries a role, or an empty string."""
    for name, (value, marks) in marked.items():
        if not isinstance(value, Attachment) and any(mark.role == role for mark in marks):
            return name
    return ""


def _functions(thing: object) -> dict[str, Any]:
    """The plain functions of the user's own classes of an object."""
    ours_or_theirs = ("torch.", "builtins", "lightdeco.", "lightning.", "pytorch_lightning.", "transformers.")
    found: dict[str, Any] = {}
    for cls in reversed(type(thing).__mro__):
        if not f"{cls.__module__}.".startswith(ours_or_theirs):
            found |= {name: value for name, value in vars(cls).items() if inspect.isfunction(value)}
    return found


def _warn_of_undecorated(thing: object) -> None:
    marked = _marked(thing)
    for name, (value, marks) in marked.items():
        if name in getattr(thing, "__dict__", {}):
            warn(
                f"{_where(thing, name, value)}, marked @{marks[0].role}, is hidden by an attribute of the instance, "
                f"which is not called; to replace it, use ld.attach(…, {marks[0].role}=…)"
            )
    attached = {a.mark.role for a in _attached(thing).values()}
    carried = {mark.role for _, marks in marked.values() for mark in marks}
    for name, function in _functions(thing).items():
        installed = any(part in function.__code__.co_filename for part in _INSTALLED)
        if name.startswith("_") or name in marked or name in attached or marks_of(function) or installed:
            continue
        if name in ROLES:
            warn(f"{_where(thing, name, function)} has the name of a role but is not decorated; add @ld.{name}")
        elif (role := _near_miss(name)) and (role not in carried or ROLES[role].kind == "event"):
            warn(f"{_where(thing, name, function)} is not decorated, so lightdeco never calls it; is it @ld.{role}?")


def _near_miss(name: str) -> str:
    """The role that a method's name nearly is, or an empty string."""
    if name in _OTHER_NAMES:
        return _OTHER_NAMES[name]
    if name.endswith(("_start", "_end")) and f"on_{name}" in ROLES:
        return f"on_{name}"
    event = name.startswith("on_")
    words = [role for role in ROLES if role.startswith("on_") is event]
    # Methods are called `on_…` for one purpose only; other names mean something else more often than not.
    found = difflib.get_close_matches(name, words, n=1, cutoff=0.8 if event else 0.9)
    return found[0] if found else ""
