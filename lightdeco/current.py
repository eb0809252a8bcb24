"""The run that is active in this process, and the functions that talk to it from anywhere below a verb."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch.optim import Optimizer

from .errors import LightdecoError
from .loggers.values import check, check_file
from .metrics import Reduce
from .optim import Optim
from .run import Run

# A plain module-level variable: reading a ContextVar inside a compiled step would break its graph.
_active: Run | None = None


@contextmanager
def active(run: Run) -> Iterator[None]:
    """Make `run` the one that `ld.log` and the like talk to; a verb inside a verb has a run of its own."""
    global _active
    before, _active = _active, run
    try:
        yield
    finally:
        _active = before


def log(
    name: str,
    value: Any,
    prog_bar: bool = False,
    on_step: bool | None = None,
    on_epoch: bool | None = None,
    reduce: Reduce = "mean",
    batch_size: int | None = None,
) -> None:
    """Log a scalar under the name as given, from anywhere below a verb; outside a run this does nothing.

    Args:
        name: how it is recorded; not one of `stage`, `epoch`, `step`, `time`.
        value: a number, a tensor of one element on any device, or a torchmetrics `Metric`, which is computed and reset
            at the end of the epoch.
        prog_bar: show it in the progress bar.
        on_step: record the mean since the last record every `log_every_n_steps`. Default: in training, yes.
        on_epoch: record the mean over the epoch; the name gets `_epoch` when `on_step` holds as well. Default: yes.
        reduce: "mean" (weighted by the batch's samples), "sum", "min", "max" or "last".
        batch_size: samples in this batch, when it is not the first dimension of the batch's first tensor.

    In an epoch-end event the value joins the epoch's record; in other events it is a record of its own.

    Raises:
        StepError: a wrong name, value or reduction.
        DataError: the number of samples is unknown.

    >>> import lightdeco as ld
    >>> ld.log("outside/a/run", 1.0)
    """
    if _active is None:
        return
    if torch.compiler.is_compiling() and (isinstance(value, (torch.Tensor, float, int))):
        tensor = value.detach() if isinstance(value, torch.Tensor) else torch.tensor(float(value))
        torch.ops.lightdeco.log(_compiled, tensor, name, prog_bar, on_step, on_epoch, reduce, batch_size)
    else:
        _active.log(name, value, prog_bar, on_step, on_epoch, reduce, batch_size)


@torch.library.custom_op("lightdeco::log", mutates_args=("graph",))
def _log(
    graph: torch.Tensor,
    value: torch.Tensor,
    name: str,
    prog_bar: bool,
    on_step: bool | None,
    on_epoch: bool | None,
    reduce: str,
    batch_size: int | None,
) -> None:
    """`log` as one operation of a compiled graph, so that it does not break it.

    An operation without a result would be removed; one that changes `graph` stays.
    """
    if _active is not None:
        _active.log(name, value, prog_bar, on_step, on_epoch, cast(Reduce, reduce), batch_size)


_log.register_fake(lambda *given: None)
_compiled = torch.zeros((), device="cpu")


def log_dict(
    values: Mapping[str, Any],
    prog_bar: bool = False,
    on_step: bool | None = None,
    on_epoch: bool | None = None,
    reduce: Reduce = "mean",
    batch_size: int | None = None,
) -> None:
    """Log several scalars at once, each as `log` does."""
    for name, value in values.items():
        log(name, value, prog_bar, on_step, on_epoch, reduce, batch_size)


def log_image(name: str, value: Any) -> None:
    """Show an image at the present step in the loggers that can; outside a run this does nothing.

    This and its like are recorded on the main process only, at once, not as means. Values are copied at the call, which
    waits for the device that holds them.

    Args:
        name: the name it is shown under.
        value: a tensor or array, HxW, CxHxW or HxWxC with 1, 3 or 4 channels, floats in 0..1 or uint8.

    Raises:
        StepError: a wrong name or value.

    >>> import lightdeco as ld
    >>> log_image("outside/a/run", None)
    """
    _show("log_image", name, value)


def log_figure(name: str, value: Any) -> None:
    """Show a matplotlib figure at the present step, as `log_image` does; it is drawn at the call and stays open."""
    _show("log_figure", name, value)


def log_histogram(name: str, value: Any) -> None:
    """Show the distribution of a tensor's, array's or list's values at the present step, as `log_image` does."""
    _show("log_histogram", name, value)


def log_text(name: str, value: str) -> None:
    """Show a text at the present step, as `log_image` does; some loggers read markdown."""
    _show("log_text", name, value)


def log_table(name: str, value: Any) -> None:
    """Show a table at the present step, as `log_image` does: a dict of columns, a list of dicts, or a data frame."""
    _show("log_table", name, value)


def log_artifact(path: str | Path) -> None:
    """Keep a file or directory with the loggers that can; outside a run this does nothing.

    It is read later, on another thread, so it must stay as it is until the run ends.

    Raises:
        StepError: it is no path, or nothing is there.
    """
    if _active is not None and _active.is_main and _active.stage != "sanity":
        _active.loggers.log_artifact(check_file(path))


def _show(function: str, name: str, value: Any) -> None:
    run = _active
    if run is None:
        return
    check(function, name, value)  # on every process, so that all of them end
    if run.is_main and run.stage != "sanity":
        getattr(run.loggers, function)(name, value, run.global_step)


def optimizers() -> Optimizer | dict[str, Optimizer]:
    """The optimizer of the active run, or a dict of several by name.

    Raises:
        LightdecoError: no `fit` is active, or it has no optimizers yet.
    """
    found = {name: optim.optimizer for name, optim in _optims().items()}
    return found[""] if list(found) == [""] else found


def schedulers() -> Any:
    """The scheduler of the active run (None without one), or a dict of several by name.

    Raises:
        LightdecoError: no `fit` is active, or it has no optimizers yet.
    """
    found = {name: optim.scheduler for name, optim in _optims().items()}
    return found[""] if list(found) == [""] else found


def _optims() -> dict[str, Optim]:
    if _active is None or not _active.optims:
        raise LightdecoError("there is no optimizer: ld.optimizers() and ld.schedulers() work inside a running ld.fit")
    return _active.optims
