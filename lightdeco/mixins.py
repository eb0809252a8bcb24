"""The optional mixins, for those who like methods on the model; the functions and verbs of the package do the same."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from . import current, loop, scalars
from .branch import Toggle
from .errors import CheckpointError, LightdecoError, nearest

_SEVERAL: Final = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


class LogMixin:
    """`self.log` and `self.log_dict`, as `ld.log` and `ld.log_dict`."""

    def log(
        self,
        name: str,
        value: Any,
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: scalars.Reduce = "mean",
        batch_size: int | None = None,
    ) -> None:
        """Log a scalar; see `lightdeco.log`."""
        current.log(name, value, prog_bar, on_step, on_epoch, reduce, batch_size)

    def log_dict(
        self,
        values: Mapping[str, Any],
        prog_bar: bool = False,
        on_step: bool | None = None,
        on_epoch: bool | None = None,
        reduce: scalars.Reduce = "mean",
        batch_size: int | None = None,
    ) -> None:
        """Log several scalars; see `lightdeco.log_dict`."""
        current.log_dict(values, prog_bar, on_step, on_epoch, reduce, batch_size)


class OptimizerMixin:
    """`self.optimizers()`, `self.lr_schedulers()`, and what a manual training step needs."""

    def optimizers(self) -> Optimizer | dict[str, Optimizer]:
        """The optimizer of the running `fit`, or a dict of several by name."""
        return current.optimizers()

    def lr_schedulers(self) -> Any:
        """The scheduler of the running `fit` (None without one), or a dict of several by name."""
        return current.schedulers()

    def manual_backward(
        self,
        loss: Tensor,
        optimizer: Optimizer | None = None,
        *,
        retain_graph: bool = False,
        create_graph: bool = False,
    ) -> None:
        """Compute gradients in a manual training step; see `lightdeco.backward`."""
        current.backward(loss, optimizer, retain_graph=retain_graph, create_graph=create_graph)

    def toggle_optimizer(self, optimizer: Optimizer) -> Toggle:
        """From now on only its parameters require grad: `with self.toggle_optimizer(optimizer):`, or until
        `untoggle_optimizer`; at the end of a manual step it is undone in any case.

        Raises:
            LightdecoError: no `fit` with a manual training step is active.
        """
        return current.toggle_optimizer(optimizer)

    def untoggle_optimizer(self, optimizer: Optimizer | None = None) -> None:
        """Undo `toggle_optimizer`."""
        current.untoggle_optimizer()


class Hparams(dict[str, Any]):
    """Hyperparameters by name, as keys and as attributes.

    >>> Hparams(lr=0.1).lr
    0.1
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no hyperparameter {name!r}{nearest(name, self)}") from None


class HparamsMixin:
    """`self.save_hyperparameters()` in `__init__` keeps its arguments in `self.hparams`, and `fit` records them.

    >>> class Net(HparamsMixin):
    ...     def __init__(self, width=8, lr=0.1):
    ...         self.save_hyperparameters()
    >>> Net(width=4).hparams
    {'width': 4, 'lr': 0.1}
    """

    @property
    def hparams(self) -> Hparams:
        """What `save_hyperparameters` kept; empty before."""
        kept: Hparams = vars(self).setdefault("_hparams", Hparams())
        return kept

    def save_hyperparameters(self, *names: str, ignore: str | tuple[str, ...] | list[str] = ()) -> None:
        """Keep the arguments of the `__init__` that calls this: all, or those named; modules are left out.

        Raises:
            LightdecoError: it is not called from an `__init__`, or a name is none of its arguments.
        """
        frame = inspect.currentframe()
        caller = frame.f_back if frame is not None else None
        if caller is None or caller.f_code.co_name != "__init__":
            raise LightdecoError("save_hyperparameters() must be called in the __init__ whose arguments it keeps")
        arguments = inspect.getargvalues(caller)
        given = {name: arguments.locals[name] for name in arguments.args[1:]}
        if arguments.keywords is not None:
            given |= arguments.locals[arguments.keywords]
        ignored = {ignore} if isinstance(ignore, str) else set(ignore)
        for name in (*names, *ignored):
            if name not in given:
                raise LightdecoError(f"save_hyperparameters: __init__ has no argument {name!r}{nearest(name, given)}")
        kept = {name: value for name, value in given.items() if name not in ignored and (not names or name in names)}
        self.hparams.update({name: value for name, value in kept.items() if not isinstance(value, nn.Module)})


class TrainerMixin:
    """The verbs as methods: `net.fit(data, max_epochs=3)` is `ld.fit(net, data, max_epochs=3)`."""

    @classmethod
    def load_from_checkpoint(cls, path: str | Path, strict: bool = True, **arguments: Any) -> Self:
        """Make a model with the hyperparameters of a checkpoint, and load its weights into it.

        Args:
            path: a checkpoint's directory.
            strict: as in `ld.load_weights`.
            arguments: arguments of `__init__` that stand before those of the checkpoint. Without
                `save_hyperparameters()` in the model, the checkpoint has none, and all are given here.

        Raises:
            CheckpointError: it is not valid, holds hyperparameters that `__init__` does not take, or does not fit.
        """
        from . import checkpoint

        held = checkpoint.load(Path(path)).hparams
        parameters = inspect.signature(cls).parameters
        open_ended = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        taken = {name: value for name, value in held.items() if open_ended or name in parameters} | arguments
        missing = [
            name
            for name, p in parameters.items()
            if p.default is inspect.Parameter.empty and p.kind not in _SEVERAL and name not in taken
        ]
        if missing:
            raise CheckpointError(
                f"{path} holds no value for {', '.join(missing)} of {cls.__name__}; give it to load_from_checkpoint, "
                "and call self.save_hyperparameters() in __init__ so that the next checkpoint does"
            )
        model = cls(**taken)
        if not isinstance(model, nn.Module):
            raise CheckpointError(f"{cls.__name__} is no torch.nn.Module, so it has no weights to load")
        checkpoint.load_weights(model, path, strict)
        return model

    fit = loop.fit
    validate = loop.validate
    test = loop.test
    predict = loop.predict


class LightdecoMixin(LogMixin, OptimizerMixin, HparamsMixin, TrainerMixin):
    """All the mixins in one."""
