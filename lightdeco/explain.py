"""`explain` and `eject`: the loop of one very run, as text and as a script."""

import os
from typing import TYPE_CHECKING, Any

from torch import nn

from .settings import Settings

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .settings import Overrides


def explain(
    model: nn.Module, data: Any = None, *, settings: Settings | None = None, **overrides: "Unpack[Overrides]"
) -> str:
    """The text of the loop that `ld.fit` with these arguments would run, in the order of time.

    Each role and event that something listens to is there, with the function's file and line; what is switched off or
    absent is not. Nothing is trained, written or read, and no function of yours runs but `configure_callbacks`. What
    `configure_optimizers` returns is therefore not known: it is shown as a call.

    Raises:
        MarkError, SettingsError, DataError: what `fit` would refuse before it begins.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def sgd(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> text = explain(Net(2, 1), [torch.ones(4, 2)], max_epochs=3)
    >>> "for each epoch, until 3 are done:" in text
    True
    """
    from .explaining import outline

    return outline(model, data, settings, overrides)


def eject(
    model: nn.Module,
    data: Any = None,
    *,
    path: str | os.PathLike[str] | None = None,
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> str:
    """A script of plain PyTorch that trains as `ld.fit` with these arguments would, to the same weights bit for bit.

    It calls the marked methods by their names and nothing of lightdeco; only what this run uses is in it. What fit does
    before its first event is done once, on the CPU, to see optimizers and loaders: `configure_callbacks`,
    `prepare_data`, `setup`, `configure_model`, the methods for loaders, `configure_optimizers`, `teardown`. No batch is
    read.

    Args:
        model, data, settings: as for `fit`.
        path: where the script is written; None: it is only returned.

    Raises:
        LightdecoError: there is a file at `path`.
        MarkError, SettingsError: the run has something that a plain script cannot have; and what `fit` would refuse.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def sgd(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> script = eject(Net(2, 1), [torch.ones(4, 2)], max_epochs=3)
    >>> "outputs = model.step(batch)" in script
    True
    """
    from .ejecting.eject import script

    return script(model, data, path, settings, overrides)
