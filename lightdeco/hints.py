"""What only looks like a role: the message for a required role that is missing, warnings about undecorated methods."""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any, Final

from torch import nn

from .attach import Attachment, attachments
from .errors import warn
from .hooks import marked_methods, where_is
from .marks import Mark, marks_of
from .roles import ROLES

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


def missing(verb: str, model: nn.Module, role: str) -> str:
    """The message for a required role that the model does not mark: what looks like it, or what to do."""
    name = type(model).__name__
    message = f"ld.{verb} needs a @{role}, and {name} marks none"
    functions = _functions(model)
    marked = marked_methods(model)
    for other, function, carried in _on_instance(model):
        if carried == role:
            where = where_is(model, other, function)
            return f"{message}; the one on the instance, {where}, is no method: use ld.attach(…, {role}=…)"
    free = [name for name in functions if name not in marked]
    likely = [name for name in _LOOKS_LIKE.get(role, ()) if name in free]
    likely += difflib.get_close_matches(role, free, n=1, cutoff=0.75)
    if likely:
        where = where_is(model, likely[0], functions[likely[0]])
        message += (
            f"; `{likely[0]}` looks like a {role.replace('_', ' ')} but is not decorated: {where}; add @ld.{role}"
        )
    elif role == "test_step" and (check := _carrier(marked, "validation_step")):
        message += f"; to test as you validate, put @ld.test_step on `{check}` as well"
    elif holder := _removed(model, role):
        message += f": {holder} = None removes the inherited one; leave that out, or mark another method"
    else:
        message += f"; decorate the method that does it with @ld.{role}"
    for path, module in model.named_modules():
        if path and any(mark.role == role for _, marks in marked_methods(module).values() for mark in marks):
            message += f" (its submodule `{path}` marks one, but only the marks of the root count)"
            break
    return message


def _carrier(marked: Mapping[str, tuple[Any, tuple[Mark, ...]]], role: str) -> str:
    """The name of the method that carries a role, or an empty string."""
    for name, (value, marks) in marked.items():
        if not isinstance(value, Attachment) and any(mark.role == role for mark in marks):
            return name
    return ""


def _removed(thing: object, role: str) -> str:
    """`Class.method`, where a class puts None in the place of an inherited method with this role, or nothing."""
    found: dict[str, str] = {}
    for cls in reversed(type(thing).__mro__):
        for name, value in vars(cls).items():
            if any(mark.role == role for mark in marks_of(value)):
                found[name] = ""
            elif value is None and name in found:
                found[name] = f"{cls.__name__}.{name}"
    return next((holder for holder in found.values() if holder), "")


def _functions(thing: object) -> dict[str, Any]:
    """The plain functions of the user's own classes of an object, those left out that a subclass replaces."""
    ours_or_theirs = ("torch.", "builtins", "lightdeco.", "lightning.", "pytorch_lightning.", "transformers.")
    found: dict[str, Any] = {}
    for cls in reversed(type(thing).__mro__):
        if not f"{cls.__module__}.".startswith(ours_or_theirs):
            found |= vars(cls)
    return {name: value for name, value in found.items() if inspect.isfunction(value)}


def warn_of_undecorated(thing: object) -> None:
    """Warn of methods that lightdeco never calls although their names, or the marks they hide, suggest it."""
    marked = marked_methods(thing)
    for name, (value, marks) in marked.items():
        if name in getattr(thing, "__dict__", {}):
            warn(
                f"{where_is(thing, name, value)}, marked @{marks[0].role}, is hidden by an attribute of the instance, "
                f"which is not called; to replace it, use ld.attach(…, {marks[0].role}=…)"
            )
    for name, function, role in _on_instance(thing):
        warn(
            f"{where_is(thing, name, function)}, marked @{role}, is an attribute of the instance, so lightdeco never "
            f"calls it; use ld.attach(…, {role}=…)"
        )
    for name, function, role in _undecorated(thing):
        where = where_is(thing, name, function)
        if name == role:
            warn(f"{where} has the name of a role but is not decorated; add @ld.{name}")
        else:
            warn(f"{where} is not decorated, so lightdeco never calls it; is it @ld.{role}?")


def _on_instance(thing: object) -> Iterator[tuple[str, Any, str]]:
    """Marked functions that were put on the instance under a name of their own: name, function, role."""
    for name, value in getattr(thing, "__dict__", {}).items():
        if inspect.isfunction(value) and marks_of(value) and name not in marked_methods(thing):
            yield name, value, marks_of(value)[0].role


def example(callback: object) -> str:
    """What to decorate in a callback without marks: its own method that looks like an event, or any."""
    for name, function, role in _undecorated(callback):
        return f"`{name}` with @ld.{role}: {where_is(callback, name, function)}"
    return "@ld.on_train_epoch_end"


def _undecorated(thing: object) -> Iterator[tuple[str, Any, str]]:
    """Methods without a mark whose names are those of roles, or nearly: name, function, role."""
    marked = marked_methods(thing)
    attached = {a.mark.role for a in attachments(thing).values()}
    carried = {mark.role for _, marks in marked.values() for mark in marks}
    for name, function in _functions(thing).items():
        installed = any(part in function.__code__.co_filename for part in _INSTALLED)
        if name.startswith("_") or name in marked or name in attached or marks_of(function) or installed:
            continue
        role = name if name in ROLES else _near_miss(name)
        if role and (role == name or role not in carried or ROLES[role].kind == "event"):
            yield name, function, role


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
