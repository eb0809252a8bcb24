"""Names of a package that are imported when they are first asked for."""

import importlib
import sys
from collections.abc import Callable, Mapping


def importer(package: str, modules: Mapping[str, str]) -> Callable[[str], object]:
    """The `__getattr__` of a package: `modules` says for each name in which module it is (".callbacks", say).

    Defined where type checkers do not look, in the `else` of `if TYPE_CHECKING:`, for they take it as a proof that any
    name is there.

    >>> find = importer("lightdeco", {"Timer": ".callbacks.timer"})
    >>> find("Timer").__name__
    'Timer'
    """

    def find(name: str) -> object:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found: object = getattr(importlib.import_module(modules[name], package), name)
        setattr(sys.modules[package], name, found)  # asked once
        return found

    return find
