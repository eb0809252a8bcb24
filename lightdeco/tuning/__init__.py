"""Searches that run `fit` a little and leave no trace: the learning rate, and the batch size.

Weights, buffers, gradients, modes, attributes, generators and random state are afterwards as they were, also when an
exception ends the search; `state.py` says how far that goes.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightdeco.current import optimizers
from lightdeco.data import split
from lightdeco.errors import DataError, MarkError, SettingsError
from lightdeco.hooks import is_marked
from lightdeco.loop import fit
from lightdeco.marks import on_train_batch_start, on_train_start
from lightdeco.memory import is_out_of_memory
from lightdeco.roles import SKIP_EPOCH
from lightdeco.run import Run
from lightdeco.settings import Settings

from .batch import Hunt, Probe
from .curve import LRCurve
from .loaders import Sized, parts
from .search import check_choice, check_count, searching, without_schedulers

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from lightdeco.settings import Overrides

Scale = Literal["exponential", "linear"]
Search = Literal["power", "binsearch"]

#: Weight of the past in the smoothed loss that decides about `early_stop`; it looks back only, over about ten steps.
_PAST: Final = 0.9

# ---- the learning rate -----------------------------------------------------------------------------------------------


def lr_find(
    model: nn.Module,
    data: Any = None,
    *,
    min_lr: float = 1e-8,
    max_lr: float = 1.0,
    steps: int = 100,
    mode: Scale = "exponential",
    early_stop: float | None = 4.0,
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> LRCurve:
    """Train with a learning rate that rises from step to step, and return the losses and a suggestion.

    The learning rate range test of Smith (2015, arXiv:1506.01186). Model, data, callbacks and random state are
    afterwards as before. Schedulers are left out, validation is off, nothing is logged or saved. It searches in this
    process alone, whatever `devices` is.

    Args:
        data: what `fit` takes; no iterator, since it could not be put back.
        min_lr, max_lr: the first and the last learning rate. Of several parameter groups the one with the largest
            learning rate gets it; the others keep their ratio to that one.
        steps: optimizer updates, over as many epochs as they need.
        mode: the learning rate rises by a constant factor ("exponential") or by a constant amount ("linear").
        early_stop: end when the smoothed loss is more than this many times the best so far, or not finite; None: never.

    Raises:
        SettingsError: a wrong argument.
        DataError: `data` is an iterator.
        MarkError: the optimizer has no learning rate; and whatever `fit` raises.
        LaunchError: a launcher started this process as one of several.

    >>> import torch, lightdeco as ld
    >>> from lightdeco import lr_find
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> found = lr_find(Net(2, 1), [torch.ones(4, 2)], min_lr=1e-4, steps=50)
    >>> 1e-4 < found.suggestion < 1
    True
    """
    sweep = _Sweep(_rates(min_lr, max_lr, steps, mode), _check_early_stop(early_stop))
    own = {"max_steps": steps, "limit_val_batches": 0, "log_every_n_steps": 1}
    with searching("lr_find", model, data, sweep, settings, overrides, own) as (given, _):
        _refuse_iterators(data)
        without_schedulers(model)
        try:
            sweep.collect(fit(model, data, settings=given))
        finally:
            sweep.release()
    return LRCurve(sweep.lrs[: len(sweep.losses)], sweep.losses)


class _Sweep:
    """The callback of `lr_find`: sets the learning rate right before each update, and watches the loss."""

    def __init__(self, lrs: list[float], early_stop: float | None) -> None:
        self.lrs, self._early_stop = lrs, early_stop
        self.losses: list[float] = []
        self._records = 0  # of the run's history, those that were read
        self._mean = 0.0
        self._best = math.inf
        self._handles: list[RemovableHandle] = []

    @on_train_start
    def _take_over(self, run: Run) -> None:
        found = optimizers()
        several = list(found.values()) if isinstance(found, dict) else [found]
        if len(several) > 1:
            raise MarkError(
                f"ld.lr_find looks for one learning rate by one loss, and this model has {len(several)} optimizers; "
                "give it a model with one of them"
            )
        largest = max(_base(group, optimizer) for optimizer in several for group in optimizer.param_groups)
        for optimizer in several:
            ratios = [_base(group, optimizer) / largest if largest else 1.0 for group in optimizer.param_groups]
            self._handles.append(optimizer.register_step_pre_hook(self._setter(run, ratios)))

    def _setter(self, run: Run, ratios: list[float]) -> Callable[[Optimizer, Any, Any], None]:
        def set_rates(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
            # Inside of `optimizer.step`: nothing of the user's code can set another one before the update.
            rate = self.lrs[min(run.global_step, len(self.lrs) - 1)]
            for group, ratio in zip(optimizer.param_groups, ratios, strict=False):
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate * ratio)
                else:
                    group["lr"] = rate * ratio

        return set_rates

    @on_train_batch_start
    def _stop(self, run: Run) -> object:
        """Leave the epoch before the next update when the loss has diverged."""
        self.collect(run)
        if self._early_stop is None or not self.losses or not self._diverged(self._early_stop):
            return None
        run.should_stop = True
        return SKIP_EPOCH

    def _diverged(self, times: float) -> bool:
        first, best = self.losses[0], self._best
        # For a loss that can be negative, "times" counts from the best upwards.
        height = best if best > 0 else max(-best, first - best)
        smoothed = self._smoothed()
        return not math.isfinite(smoothed) or smoothed > best + (times - 1) * height

    def _smoothed(self) -> float:
        return self._mean / (1 - _PAST ** len(self.losses))

    def collect(self, run: Run) -> None:
        """Read the loss of each update since the last time: the mean that was recorded for it."""
        for record in run.history[self._records :]:
            if "train/loss" in record:
                self.losses.append(record["train/loss"])
                self._mean = _PAST * self._mean + (1 - _PAST) * self.losses[-1]
                self._best = min(self._best, self._smoothed())
        self._records = len(run.history)

    def release(self) -> None:
        """Let the optimizers go."""
        for handle in self._handles:
            handle.remove()


def _base(group: dict[str, Any], optimizer: Optimizer) -> float:
    """The learning rate that a group was made with; a scheduler may have changed it already."""
    rate = group.get("initial_lr", group.get("lr"))
    if rate is None:
        raise MarkError(f"{type(optimizer).__name__} has no learning rate 'lr' in its groups for ld.lr_find to set")
    return float(rate)


def _rates(min_lr: float, max_lr: float, steps: int, mode: str) -> list[float]:
    for name, value in (("min_lr", min_lr), ("max_lr", max_lr)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise SettingsError(f"lr_find: {name} is {value!r}; allowed: a finite number > 0")
    if min_lr >= max_lr:
        raise SettingsError(f"lr_find: min_lr is {min_lr} and max_lr is {max_lr}; allowed: min_lr < max_lr")
    check_count("lr_find", "steps", steps, 2)
    check_choice("lr_find", mode, get_args(Scale))
    shares = [i / (steps - 1) for i in range(steps)]
    if mode == "linear":
        return [min_lr + (max_lr - min_lr) * share for share in shares]
    return [math.exp(math.log(min_lr) + (math.log(max_lr) - math.log(min_lr)) * share) for share in shares]


def _check_early_stop(value: float | None) -> float | None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 1):
        raise SettingsError(f"lr_find: early_stop is {value!r}; allowed: a number > 1, None")
    return value


def _refuse_iterators(data: Any) -> None:
    if is_marked(data):
        return
    for loader in parts(split(data, "fit").get("train")):
        if isinstance(loader, Iterator):
            raise DataError(
                f"the train loader is a {type(loader).__name__}, which can be read only once: ld.lr_find would use it "
                "up; give a list or a DataLoader"
            )


# ---- the batch size --------------------------------------------------------------------------------------------------


def find_batch_size(
    model: nn.Module,
    data: Any = None,
    *,
    mode: Search = "power",
    start: int = 2,
    max_trials: int = 25,
    steps: int = 3,
    attribute: str = "batch_size",
    settings: Settings | None = None,
    **overrides: "Unpack[Overrides]",
) -> int:
    """The largest batch size with which training and validation fit into memory.

    Each trial trains and validates a little with one size. Model, data, callbacks and random state are afterwards as
    before, the batch size too: set the number that is returned.

    Args:
        data: a marked data object (or None, and the model) with an attribute that its loaders read; or plain
            DataLoaders as `fit` takes them, which are made anew in each size.
        mode: "power" tries twice as much until a size does not fit; "binsearch" then searches between the last two.
        start: the first size. Where it does not fit, halves of it are tried.
        max_trials: trials at most; the largest size that fitted so far is returned.
        steps: updates in a trial, and validation batches. The first update allocates the optimizer's state, so the
            second one needs more memory: at least 2 are sensible.
        attribute: the name of the attribute with the batch size.

    The number of samples is the upper bound: a size at which all of them are one batch ends the search. It searches in
    this process alone; sizes are per process. What a trial raises besides running out of memory is raised as it is.

    Raises:
        SettingsError: a wrong argument.
        DataError: the batch size of `data` cannot be changed, or the loaders do not read the attribute.
        LightdecoError: not even one sample fits; a launcher started several processes.
    """
    check_choice("find_batch_size", mode, get_args(Search))
    counts = {"start": start, "max_trials": max_trials, "steps": steps}
    for name, count in counts.items():
        check_count("find_batch_size", name, count, 1)
    from accelerate.utils.memory import clear_device_cache

    probe = Probe(steps)
    own = {"max_steps": steps + 1, "limit_train_batches": None, "overfit_batches": None, "oom": "raise"}
    with searching("find_batch_size", model, data, probe, settings, overrides, own) as (given, restore):
        sized = Sized(model, data, attribute)
        hunt = Hunt(start, mode, max_trials, sized.samples, sized.reads, sized.where)
        for size in hunt:
            problem = None
            try:
                without_schedulers(model)
                fit(model, sized.at(size), settings=_cut(given, steps))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                problem = str(error)
            # Only now, since the exception held the frames of the trial, and they its tensors.
            restore()
            clear_device_cache(garbage_collection=True)
            hunt.report(size, problem, probe)
    return hunt.found()


def _cut(settings: Settings, steps: int) -> Settings:
    """As little of the data as needs as much memory: gradients wait between two batches, or do not."""
    given = settings.accumulate_grad_batches
    accumulate = min(2, given if isinstance(given, int) else max(given.values()))
    val = 0 if settings.limit_val_batches == 0 else steps
    return replace(settings, accumulate_grad_batches=accumulate, limit_val_batches=val)
