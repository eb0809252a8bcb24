"""What a run was made with: its settings, its seed, versions, commit and command, as plain values without secrets."""

import os
from datetime import timedelta
from typing import Any

from .loggers.environment import environment
from .loggers.masking import mask
from .settings import Settings

#: Settings that are told elsewhere (hyperparameters), or are objects of the user's.
_LEFT_OUT = ("callbacks", "hparams")


def provenance(settings: Settings, seed: int) -> dict[str, Any]:
    """The seed, every setting and the environment of a run; small enough for JSON and for each logger.

    >>> found = provenance(Settings(max_epochs=3), seed=7)
    >>> found["seed"], found["settings"]["max_epochs"], "torch" in found["environment"]
    (7, 3, True)
    """
    return {"seed": seed, "settings": plain_settings(settings), "environment": environment()}


def plain_settings(settings: Settings) -> dict[str, Any]:
    """The settings as plain values, for people; nothing reads them back. Of an object there is its class."""
    found = {name: value for name, value in vars(settings).items() if name not in _LEFT_OUT}
    return mask({name: _plain(value) for name, value in found.items()})


def _plain(value: object) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (os.PathLike, timedelta)):
        return str(value)
    # Of an object its class: what it was made with may be secret.
    return value if isinstance(value, (bool, int, float, str, type(None))) else type(value).__name__
