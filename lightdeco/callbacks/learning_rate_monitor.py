"""The learning rate, with the records of training."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from lightdeco.errors import SettingsError, warn
from lightdeco.marks import on_train_batch_end, on_train_batch_start, on_train_epoch_end, on_train_start

if TYPE_CHECKING:
    from lightdeco.run import Run


class LearningRateMonitor:
    """Logs `lr`: the learning rate that the update of the recorded step used.

    It joins the record that training writes every `log_every_n_steps`, and the record of an epoch at whose last step
    there was none. With several optimizers the name is `lr/<optimizer>`, with several param groups it ends with
    `/group0`, `/group1`, … or the group's own "name". A learning rate that is a tensor is read together with the other
    metrics of the record; nothing waits for the device before.

    Args:
        momentum: also log `momentum`: the group's "momentum", or the first of its "betas".
        weight_decay: also log `weight_decay`.

    Raises:
        SettingsError: an argument is no bool.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> quiet = {"logger": False, "progress_bar": False, "summary": False}
    >>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)], max_epochs=3, callbacks=[LearningRateMonitor()], **quiet)
    >>> [record["lr"] for record in run.history]
    [0.1, 0.1, 0.1]
    """

    def __init__(self, momentum: bool = False, weight_decay: bool = False) -> None:
        for name, value in (("momentum", momentum), ("weight_decay", weight_decay)):
            if not isinstance(value, bool):
                raise SettingsError(f"LearningRateMonitor({name}={value!r}); allowed: True, False")
        self.momentum, self.weight_decay = momentum, weight_decay
        self._wanted = ["lr", *(["momentum"] if momentum else []), *(["weight_decay"] if weight_decay else [])]
        self._used: dict[str, Any] = {}
        self._used_at = -1  # the update that used it, as global_step counts

    @on_train_start
    def _start(self, run: "Run") -> None:
        self._used, self._used_at = {}, -1
        kinds = ", ".join(sorted({type(optim.optimizer).__name__ for optim in run.optims.values()}))
        for quantity in self._wanted:
            if not _read(run, quantity):
                argument = "" if quantity == "lr" else f"{quantity}=True"
                warn(f"LearningRateMonitor({argument}) has no effect: {kinds} has no {quantity!r} in its param groups")

    @on_train_batch_start
    def _before(self, run: "Run") -> None:
        # Read before the update: when the batch ends, a scheduler by step has moved on.
        step, last = run.global_step + 1, run.num_train_batches
        if step % run.settings.log_every_n_steps == 0 or last is None or run.batch_idx + 1 == last:
            self._used, self._used_at = self._values(run), step

    @on_train_batch_end
    def _after(self, run: "Run") -> None:
        # Not in the batches of a window before its update: those were read for the update to come.
        if run.global_step == self._used_at and run.global_step % run.settings.log_every_n_steps == 0:
            self._log(run)

    @on_train_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if run.global_step % run.settings.log_every_n_steps == 0:
            return  # this step has its record
        if self._used_at != run.global_step:  # the epoch was skipped, or its last update was
            self._used = self._values(run)
        self._log(run)

    def _log(self, run: "Run") -> None:
        for name, value in self._used.items():
            run.log(name, value, on_epoch=False, reduce="last")

    def _values(self, run: "Run") -> dict[str, Any]:
        return {name: value for quantity in self._wanted for name, value in _read(run, quantity).items()}


def _read(run: "Run", quantity: str) -> dict[str, Any]:
    """The values of one quantity by the name under which they are logged; tensors as copies."""
    found: dict[str, Any] = {}
    for name, optim in run.optims.items():
        base = quantity if len(run.optims) == 1 else f"{quantity}/{name}"
        groups = optim.optimizer.param_groups
        for suffix, group in zip(_suffixes(groups), groups, strict=True):
            value = _value(group, quantity)
            if value is not None:
                # A copy: schedulers change a tensor in place.
                found[base + suffix] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    return found


def _value(group: Mapping[str, Any], quantity: str) -> Any:
    if quantity == "momentum" and "betas" in group:
        return group["betas"][0]
    return group.get(quantity)


def _suffixes(groups: list[dict[str, Any]]) -> Iterator[str]:
    """What tells the param groups apart: nothing for a single one; a name that two groups have is not used."""
    names = Counter(group.get("name") for group in groups)
    for i, group in enumerate(groups):
        name = group.get("name")
        usable = isinstance(name, str) and name and names[name] == 1
        yield "" if len(groups) == 1 else f"/{name}" if usable else f"/group{i}"
