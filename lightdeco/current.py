"""The run that is active in this process, and the functions that talk to it from anywhere below a verb."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload

import torch
from torch.optim import Optimizer

from . import marks
from .branch import Toggle
from .errors import LightdecoError, SettingsError, nearest
from .loggers.values import check, check_file
from .optim import Optim, clip
from .run import Run
from .scalars import Reduce

F = TypeVar("F", bound=Callable[..., object])

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


# ---- manual training steps -------------------------------------------------------------------------------------------


@overload
def backward(
    loss: torch.Tensor,
    /,
    optimizer: Optimizer | None = None,
    *,
    weight: Any = None,
    retain_graph: bool = False,
    create_graph: bool = False,
) -> None: ...
@overload
def backward(function: F, /) -> F: ...
@overload
def backward() -> Callable[[F], F]: ...
def backward(
    given: Any = None,
    /,
    optimizer: Optimizer | None = None,
    *,
    weight: Any = None,
    retain_graph: bool = False,
    create_graph: bool = False,
    **options: Any,
) -> Any:
    """Called with a loss: compute gradients, in a manual training step. As a decorator: mark an override of that.

    With a tensor it fires `on_before_backward` and `on_after_backward`, calls the override if there is one, and runs
    outside of autocast. Outside of a manual run it is `loss.backward()`.

    Args:
        given: the loss, a 0-dim tensor, the mean over its batch; or the method to mark, instead of `loss.backward()`,
            which may ask by name for: loss, optimizer, run, model.
        optimizer: whose parameters get gradients. Without it all do; needed where several optimizers accumulate.
        weight: how much this batch counts in an accumulation window; by default its number of samples.
        retain_graph, create_graph: as in `torch.Tensor.backward`.

    Raises:
        StepError: accumulation does not know whose gradients these are.
    """
    if not isinstance(given, torch.Tensor):
        if optimizer is not None or weight is not None or retain_graph or create_graph:
            options |= {"optimizer": optimizer, "weight": weight}
        return marks.backward(given, **options) if given is not None else marks.backward(**options)
    keep: Any = {"retain_graph": retain_graph or create_graph, "create_graph": create_graph}
    if _active is None or _active.manual is None:
        return torch.autograd.backward(given, **keep)
    return _active.manual.backward(given, optimizer, weight, keep)


@overload
def clip_gradients(
    optimizer: Optimizer, /, value: float | None = None, algorithm: Literal["norm", "value"] | None = None
) -> None: ...
@overload
def clip_gradients(function: F, /) -> F: ...
@overload
def clip_gradients() -> Callable[[F], F]: ...
def clip_gradients(
    given: Any = None,
    /,
    value: float | None = None,
    algorithm: Literal["norm", "value"] | None = None,
    **options: Any,
) -> Any:
    """Called with an optimizer: clip its gradients, in a manual training step. As a decorator: mark an override.

    Without a value it does what the settings or the override say, and nothing if there is neither. Inside of an
    accumulation window it waits for the batch that completes it. Outside of a run a value is needed.

    Args:
        given: the optimizer; or the method to mark, instead of the clipping that the settings ask for, which may ask by
            name for: optimizer, run, model.
        value: the largest norm or value; None: `gradient_clip_val`.
        algorithm: "norm" or "value"; None: `gradient_clip_algorithm`.

    Raises:
        SettingsError: the value or the algorithm is none.
    """
    if not isinstance(given, Optimizer):
        if value is not None or algorithm is not None:
            options |= {"value": value, "algorithm": algorithm}
        return marks.clip_gradients(given, **options) if given is not None else marks.clip_gradients(**options)
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
        raise SettingsError(f"ld.clip_gradients(value={value!r}); allowed: a number > 0")
    if algorithm not in (None, "norm", "value"):
        hint = nearest(str(algorithm), ("norm", "value"))
        raise SettingsError(f"ld.clip_gradients(algorithm={algorithm!r}); allowed: 'norm', 'value'{hint}")
    if _active is not None and _active.manual is not None:
        return _active.manual.clip(given, value, algorithm)
    settings = None if _active is None else _active.settings
    value = settings.gradient_clip_val if value is None and settings is not None else value
    if value is None and settings is None:
        raise SettingsError("ld.clip_gradients(optimizer) needs a value outside of a run")
    if value is not None:
        clip(given, value, algorithm or (settings.gradient_clip_algorithm if settings is not None else "norm"))
    return None


def toggle_optimizer(optimizer: Optimizer) -> Toggle:
    """From now on only the parameters of this optimizer require grad, until the end of a `with` block or of the step.

    Raises:
        LightdecoError: no `fit` with a manual training step is active.
    """
    if _active is None or _active.manual is None:
        raise LightdecoError("toggle_optimizer works inside a @ld.training_step(manual=True); other steps do it alone")
    toggle: Toggle = _active.manual.toggle(optimizer)
    return toggle


def untoggle_optimizer() -> None:
    """Undo `toggle_optimizer`; outside of a manual run there is nothing to undo."""
    if _active is not None and _active.manual is not None:
        _active.manual.end()
