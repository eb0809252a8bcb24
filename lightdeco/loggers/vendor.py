"""What the loggers of vendors' packages share."""

import importlib
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightdeco.errors import LoggerError

_Native = TypeVar("_Native")


def load(module: str) -> Any:
    """Import a vendor's module; what it warns of while it is imported is not the user's to mend, and left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(module)


@contextmanager
def beginning() -> Iterator[None]:
    """Leave out the deprecations that a vendor meets in its own libraries while its run begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield


@contextmanager
def variable(name: str, value: str) -> Iterator[None]:
    """Have an environment variable, for what a vendor reads only from there while it begins; then it is as before."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def opened(native: _Native | None, logger: str) -> _Native:
    """The vendor's object.

    Raises:
        LoggerError: the logger is not open.
    """
    if native is None:
        raise LoggerError(f"the logger {logger} is not open; it opens when a run starts, or with open(directory)")
    return native
