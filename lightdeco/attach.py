"""`ld.attach`: roles and events for classes and instances that one does not own."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from .errors import MarkError, nearest
from .marks import Mark, marks_of
from .roles import ROLES
from .settings_checks import shown

T = TypeVar("T")

#: Where `attach` keeps its functions, in the `__dict__` of a class or an instance.
ATTACHED: Final = "_lightdeco_attached"


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
    name, as a marked method does; for an event, and for training steps with an optimizer each, also a list of
    functions. A role attached hides the same role marked in
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
            roles = ", ".join(role.name for role in ROLES.values() if role.kind != "event")
            hint = nearest(name, ROLES) or f"; allowed: {roles}, and events, such as on_train_epoch_end"
            raise MarkError(f"ld.attach: {name!r} is no role{hint}")
        several = isinstance(given, (list, tuple))
        if several and ROLES[name].kind != "event" and name != "training_step":
            raise MarkError(f"ld.attach: {name} takes one function, not {type(given).__name__}")
        new = _Attachments({key: a for key, a in new.items() if a.mark.role != name})
        for i, function in enumerate(given if several else [given]):
            if isinstance(function, type) or not callable(function):
                what = "is a class" if isinstance(function, type) else "cannot be called"
                raise MarkError(f"ld.attach: {name}={shown(function)} {what}; give a function of the object")
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


def attachments(thing: object) -> dict[str, Attachment]:
    """What was attached to the classes of an object and to itself, under keys that no method can have.

    Of a role the most special one counts; events add up, base class first.
    """
    found: dict[str, Attachment] = {}
    holders = [*(vars(cls) for cls in reversed(type(thing).__mro__)), getattr(thing, "__dict__", {})]
    for level, holder in enumerate(holders):
        given = holder.get(ATTACHED, {})
        replaced = {a.mark.role for a in given.values() if ROLES[a.mark.role].kind != "event"}
        found = {key: a for key, a in found.items() if a.mark.role not in replaced}
        for key, attachment in given.items():
            event = ROLES[attachment.mark.role].kind == "event"
            found[f"attach {level} {key}" if event else f"attach {key}"] = attachment
    return found
