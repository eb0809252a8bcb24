"""Reading one object: its marked methods as `Hook`s, with the arguments that each asks for, or a refusal.

Marks are read from the `__dict__` of each class in the MRO, never with `getattr` on the instance, so that no property
of the model runs. What a method may ask for is resolved here, once.
"""

import difflib
import functools
import inspect
import types
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from .attach import Attachment, attachments
from .errors import MarkError, nearest, warn
from .marks import WRAPPERS, Mark, marks_of, wrapped
from .roles import ALWAYS, ROLES, Owner, Role


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


def is_marked(thing: object) -> bool:
    """Whether any method of the object carries a mark."""
    return not isinstance(thing, type) and bool(marked_methods(thing))


def read(thing: object, owner: Owner) -> list[Hook]:
    """The hooks of one object, base class first, checked."""
    hooks = []
    for name, (function, marks) in marked_methods(thing).items():
        for mark in marks:
            hooks.append(_hook(thing, owner, name, function, mark))
    _refuse_doubles(hooks)
    return hooks


def marked_methods(thing: object) -> dict[str, tuple[Any, tuple[Mark, ...]]]:
    """Method name -> (what the class or `attach` holds under it, its marks), base class first."""
    found: dict[str, tuple[Any, tuple[Mark, ...]]] = {}
    for cls in reversed(type(thing).__mro__):
        for name, value in vars(cls).items():
            marks = marks_of(value) or (found[name][1] if name in found else ())
            if value is None:
                found.pop(name, None)
            elif marks:
                found[name] = (value, marks)
    given = attachments(thing)
    taken = {a.mark.role for a in given.values() if ROLES[a.mark.role].kind != "event"}
    found = {n: (f, left) for n, (f, ms) in found.items() if (left := tuple(m for m in ms if m.role not in taken))}
    return found | {key: (a, (a.mark,)) for key, a in given.items()}


def _hook(thing: object, owner: Owner, name: str, value: Any, mark: Mark) -> Hook:
    role = ROLES[mark.role]
    function = value.function if isinstance(value, Attachment) else value
    where = where_is(thing, mark.role if isinstance(value, Attachment) else name, function)
    if not isinstance(value, Attachment):
        _refuse_kind(value, role, where)
    if owner not in role.owners:
        allowed = " or ".join(f"the {o}" for o in role.owners)
        raise MarkError(f"{where}, marked @{role.name}, stands on the {owner}; this role belongs on {allowed}")
    _refuse_options(mark, where)
    _refuse_deferred(function, role, where)
    positional, keywords = _wanted(function, role, where)
    method: Callable[..., Any] = types.MethodType(function, thing)
    if role.name == "configure_model":
        method = _without_result(method, thing, where)
    return Hook(role, mark, thing, method, positional, keywords, where)


def _without_result(method: Callable[..., Any], thing: object, where: str) -> Callable[..., Any]:
    """Refuse what `configure_model` returns: a new model would be dropped without a word."""

    def checked(*positional: object, **keywords: object) -> None:
        returned = method(*positional, **keywords)
        if returned is not None and returned is not thing:
            raise MarkError(
                f"{where}, marked @configure_model, returned a {type(returned).__name__}; it returns nothing: put the "
                "layers that it builds on the model (self.net = …)"
            )

    return checked


def _refuse_options(mark: Mark, where: str) -> None:
    """Refuse options of a decorator that contradict each other."""
    if mark.manual and mark.optimizer is not None:
        raise MarkError(
            f"{where}: a manual step drives every optimizer itself, by ld.optimizers(); leave "
            f"optimizer={mark.optimizer!r} or manual=True out"
        )


def _refuse_deferred(function: Any, role: Role, where: str) -> None:
    """Refuse what returns a coroutine or an iterator, also under functools.wraps: its body would never run."""
    for code in (inspect.unwrap(function), type(function).__call__):
        if inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            raise MarkError(f"{where}, marked @{role.name}, is an async function; make it a plain `def`")
        if inspect.isgeneratorfunction(code) and role.name != "split_batch":  # its parts may be yielded
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
    parameters = _parameters(function, role, where)
    names = [p.name for p in parameters]
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
            else:
                _warn_of_misspelt(p.name, [name for name in offered if name not in names], where)
        elif p.kind is inspect.Parameter.KEYWORD_ONLY or any(q not in offered for q in _before(parameters, p)):
            keywords.append(p.name)
            if p.kind is inspect.Parameter.POSITIONAL_ONLY:
                raise MarkError(
                    f"{where}, marked @{role.name}: {p.name!r} can only be given by position, after another that is "
                    "not offered; remove the `/`"
                )
        else:
            positional.append(p.name)
    if unknown:
        hint = "".join(nearest(name, offered) for name in unknown[:1])
        raise MarkError(f"{where}, marked @{role.name}, asks for {unknown}; it may ask for {list(offered)}{hint}")
    return tuple(positional), tuple(keywords)


def _parameters(function: Callable[..., Any], role: Role, where: str) -> list[inspect.Parameter]:
    """The parameters of a method without `self`; the first one of a step is called `batch`."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:  # some builtins have none
        raise MarkError(f"{where}: the arguments of {function!r} are unknown; wrap it in a `def` or lambda") from error
    if not parameters or parameters[0].kind is inspect.Parameter.KEYWORD_ONLY:
        raise MarkError(f"{where}, marked @{role.name}, takes no arguments; its first one must be the object, `self`")
    takes_self = parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL
    parameters = parameters[1:] if takes_self else parameters
    if role.kind == "step":
        parameters = _name_batch(parameters, (*role.offers, *ALWAYS))
        if [p.kind for p in parameters] == [inspect.Parameter.VAR_POSITIONAL]:
            raise MarkError(
                f"{where}, marked @{role.name}, takes *args, which names nothing; name the batch: (self, batch)"
            )
    return parameters


def _warn_of_misspelt(name: str, offered: list[str], where: str) -> None:
    """Warn of an argument with a default whose name is very nearly an offered one: it would never be given."""
    if near := difflib.get_close_matches(name, offered, n=1, cutoff=0.9):
        warn(f"{where}: no argument is called {name!r}, so it keeps its default; did you mean {near[0]!r}?")


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
    steps: list[Hook] = []
    for hook in hooks:
        if hook.role.kind == "event":
            continue
        if hook.role.name == "training_step":
            _refuse_rivals([*steps, hook])
            steps.append(hook)
        elif hook.role.name in seen:
            raise _double(seen[hook.role.name], hook)
        seen[hook.role.name] = hook


def _double(first: Hook, second: Hook, which: str = "", more: str = "") -> MarkError:
    return MarkError(
        f"@{first.role.name}{which} stands on two methods, {first.where} and {second.where}; "
        f"keep one: remove a decorator, or write `name = None` in the subclass to drop an inherited one{more}"
    )


def _refuse_rivals(steps: list[Hook]) -> None:
    """Refuse several training steps that are not each for an optimizer of its own."""
    first, last = steps[0], steps[-1]
    if first is last:
        return
    for step in steps[:-1]:
        if step.mark.optimizer == last.mark.optimizer and not (step.mark.manual or last.mark.manual):
            name = last.mark.optimizer
            if name is not None:
                raise _double(step, last, f"(optimizer={name!r})")
            raise _double(step, last, more="; or name the optimizer of each: @ld.training_step(optimizer=…)")
    for step in steps:
        if step.mark.manual:
            other = last if step is first else first
            raise MarkError(
                f"{step.where} is a manual training step and drives every optimizer itself, so that no other can stand "
                f"beside it; remove manual=True, or the mark of {other.where}"
            )
        if step.mark.optimizer is None:
            raise MarkError(
                f"{step.where} is one of several training steps and does not say for which optimizer; write "
                "@ld.training_step(optimizer=…)"
            )


def where_is(thing: object, name: str, function: object) -> str:
    """`Class.method (file:line)`."""
    function = wrapped(function)
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function) if callable(function) else function
    code = getattr(function, "__code__", None) or getattr(vars(type(function)).get("__call__"), "__code__", None)
    line = f" ({code.co_filename}:{code.co_firstlineno})" if code is not None else ""
    return f"{type(thing).__name__}.{name}{line}"
