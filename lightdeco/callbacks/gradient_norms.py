"""How large the gradients are, with the records of training: what the setting `log_gradients` adds."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightdeco.dtensor import is_sharded, local
from lightdeco.marks import (
    on_before_optimizer_step,
    on_train_batch_end,
    on_train_batch_start,
    on_train_epoch_end,
    on_train_start,
)

if TYPE_CHECKING:
    from lightdeco.run import Run


class GradientNorms:
    """Logs `train/grad_norm` and `train/grad_norm/<module>`: the 2-norms of the gradients of the recorded step.

    They are those of the update, after accumulation and before clipping. The modules are the model's own; where it has
    a single one, those inside of it, and so on; a parameter that is in none goes by its own name. With several
    optimizers the names are `train/<optimizer>/grad_norm…`, of the parameters that each one updates. An epoch that ends
    between two records has them in its own record. Nothing is computed for other steps, and nothing waits for the
    device.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}  # the module of each parameter, by id
        self._latest: dict[str, Tensor] = {}
        self._step = -1  # whose norms `_latest` holds, or is to hold; -1 where they are not wanted

    @on_train_start
    def _start(self, run: "Run") -> None:
        self._names, self._latest, self._step = modules(run.model), {}, -1

    @on_train_batch_start
    def _before_batch(self, run: "Run") -> None:
        step = run.global_step + 1
        wanted = step % run.settings.log_every_n_steps == 0 or run.batch_idx + 1 == run.num_train_batches
        self._latest, self._step = {}, step if wanted else -1

    @on_before_optimizer_step
    def _before_update(self, run: "Run", optimizer: Optimizer) -> None:
        if self._step >= 0:
            several = len(run.optims) > 1
            name = next((f"{name}/" for name, optim in run.optims.items() if optim.optimizer is optimizer), "")
            self._latest |= norms(optimizer, self._names, f"train/{name if several else ''}grad_norm")

    @on_train_batch_end
    def _after_batch(self, run: "Run") -> None:
        if run.global_step == self._step and self._step % run.settings.log_every_n_steps == 0:
            self._log(run)

    @on_train_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if run.global_step == self._step and self._step % run.settings.log_every_n_steps:
            self._log(run)

    def _log(self, run: "Run") -> None:
        for name, norm in self._latest.items():
            run.log(name, norm, on_epoch=False, reduce="last")


def modules(model: nn.Module) -> dict[int, str]:
    """For each parameter, by id, the name of the module that it is shown under: the first level with more than one.

    >>> net = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 1))))
    >>> sorted(set(modules(net).values()))
    ['0.0', '0.2']
    """
    prefix, module = "", model
    while True:
        children = [(name, child) for name, child in module.named_children() if any(True for _ in child.parameters())]
        own = list(module.named_parameters(recurse=False))
        if own or len(children) != 1:
            break
        prefix, module = f"{prefix}{children[0][0]}.", children[0][1]
    found = {id(p): f"{prefix}{name}" for name, child in reversed(children) for p in child.parameters()}
    return found | {id(p): f"{prefix}{name}" for name, p in own}


def norms(optimizer: Optimizer, names: dict[int, str], name: str) -> dict[str, Tensor]:
    """The norm of the gradients of all parameters of an optimizer as `name`, and of each module's as `name/module`.

    Parameters without a gradient count as zero; scalars on the device, of float32 or, with such gradients, float64.
    """
    found = [(p, p.grad.detach()) for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    if not found:
        return {}
    grads = [_dense(local(grad)) for _, grad in found]
    dtype = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    with torch.no_grad():
        each = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads, 2, dtype)]
        parts: dict[str, list[Tensor]] = {}
        for (p, _), norm in zip(found, each, strict=True):
            if id(p) in names:  # not one that the optimizer has from elsewhere
                parts.setdefault(f"{name}/{names[id(p)]}", []).append(norm)
        every = {name: each} | parts
        sums = {key: torch.linalg.vector_norm(torch.stack(values)) for key, values in every.items()}
        if any(is_sharded(grad) for _, grad in found):  # these are the norms of this process's parts
            squares = torch.stack(list(sums.values())).square()
            torch.distributed.all_reduce(squares)
            sums = dict(zip(sums, squares.sqrt(), strict=True))
        return sums


def _dense(grad: Tensor) -> Tensor:
    values = grad.coalesce().values() if grad.is_sparse else grad
    return torch.view_as_real(values) if values.is_complex() else values
