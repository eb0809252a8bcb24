"""From a batch to new weights: an update, and the batch of a run with more than one plain training step.

The loop itself trains a batch where one step without options has one optimizer. Everything else comes here: several
steps with an optimizer each, `every`, `manual`, and batches cut by `split_batch`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .branch import Branch, Toggle
from .closure import Closure
from .errors import StepError
from .optim import Optim, finite_gradients, monitored
from .run import Run
from .seeds import repeater
from .session import Session
from .steps import read_result

if TYPE_CHECKING:
    from typing import TypeGuard

#: (batch, batch_idx, dataloader_idx, carry)
Inputs = tuple[Any, int, int, Any]

#: What a step returned, the loss of an update that is due now, and what repeats the randomness of the step.
Trained = tuple[Any, Tensor | None, Callable[[], object]]


def log_result(
    run: Run, prefix: str, scalars: Sequence[tuple[str, Any]], metrics: Sequence[tuple[str, Any]], weight: Any
) -> None:
    """Log what a step returned, with the weight of its batch."""
    for name, value in scalars:
        run.means.add_mean(prefix + name, value, weight)
    for name, metric in metrics:
        run.means.add(prefix + name, metric, 1)


# ---- an update -------------------------------------------------------------------------------------------------------


def update(s: Session, branch: Branch, loss: Tensor, inputs: Inputs | None, again: Callable[[], object]) -> bool:
    """Update the weights at the end of a window, and count the batch; False when the update was skipped.

    `inputs` and `again`, which repeats the randomness of the step, are for a closure that evaluates the step anew.
    """
    call, progress, window, optimizer = s.call, s.run.progress, branch.window, branch.optimizer
    if branch.scaler is not None:
        branch.scaler.unscale()
    if not window.plain:
        window.normalise(optimizer)
    loss = window.agreed(loss)
    if s.settings.on_nan == "skip" and not bool(torch.isfinite(loss) & finite_gradients(optimizer)):  # waits
        return _skipped(s, branch)
    call["on_before_optimizer_step"](optimizer)
    if "clip_gradients" in call:
        call["clip_gradients"](optimizer)
    if branch.scaler is not None and not branch.scaler.adapt():
        return _skipped(s, branch, adapted=True)
    if branch.closure:
        closure = Closure(optimizer, loss, lambda: _evaluate_again(s, branch, inputs, again))
        call["optimizer_step"](optimizer, closure)
    elif branch.apply is None:
        optimizer.step()
    elif not branch.apply():
        return _skipped(s, branch)
    if not window.plain:
        window.begin()
    s.count_step()
    updates = progress.updates[branch.name] = progress.updates.get(branch.name, 0) + 1
    optim = branch.optim
    if _due(optim, "step", updates):
        call["lr_scheduler_step"](optim.scheduler, monitored(optim, s.run.metrics, f"{branch.prefix}loss"))
    return True


def _skipped(s: Session, branch: Branch, adapted: bool = False) -> bool:
    """Count an update that is left out; `adapted`: the scaler knows of it."""
    s.run.progress.skipped_updates += 1
    branch.window.begin()
    if branch.scaler is not None and not adapted:
        branch.scaler.adapt()
    return False


def _evaluate_again(s: Session, branch: Branch, inputs: Inputs | None, again: Callable[[], object]) -> Tensor:
    """Loss and gradients at the present weights, for a closure; the same randomness as the first time.

    Gradients that overflow in fp16 are made again with half the factor: an update that has begun cannot be left out.
    """
    window, scaler = branch.window, branch.scaler
    window.refuse_several(branch.hook.where)
    assert inputs is not None  # of a window of one batch they are known
    while True:
        branch.zero_grad()
        again()
        outputs = branch.step(branch.key, *inputs)
        loss: Tensor = read_result(outputs, branch.hook.where, training=True, carries="split_batch" in s.call)[0]
        branch.backward(window.repeat(loss))
        if scaler is not None:
            scaler.unscale()
        if not window.plain:
            window.normalise(branch.optimizer)
        if scaler is None or scaler.adapt() or scaler.factor < 1 or not torch.isfinite(window.agreed(loss)):
            break
    if "clip_gradients" in s.call:
        s.call["clip_gradients"](branch.optimizer)
    return window.agreed(loss)


def step_schedulers(s: Session) -> None:
    """Step the schedulers by epoch, at the end of one; a manual step has stepped its own."""
    for branch in s.branches:
        optim = branch.optim
        if _due(optim, "epoch", s.run.epoch + 1):
            s.call["lr_scheduler_step"](optim.scheduler, monitored(optim, s.run.metrics, f"{branch.prefix}loss"))


def _due(optim: Optim | None, interval: str, count: int) -> "TypeGuard[Optim]":
    """Whether a scheduler steps now, at the `count`-th update or epoch."""
    if optim is None or optim.scheduler is None:
        return False
    return optim.interval == interval and count % optim.every == 0


# ---- a batch ---------------------------------------------------------------------------------------------------------


def train_batch(s: Session, batch: Any, batch_idx: int, dataloader_idx: int, last: bool, seed: int) -> tuple[Any, bool]:
    """Every training step that is due for a batch, for each of its parts; what they returned, and whether it updated.

    torch is seeded once, before the first step: the others go on drawing. Several steps return a dict by the names of
    their optimizers; with `split_batch` there is a list of what the parts returned.
    """
    run, before, outputs = s.run, s.run.global_step, dict[str, Any]()
    split = s.call.get("split_batch")
    fresh: int | None = seed
    if split is not None:
        s.reseed(seed)
    parts = (batch,) if split is None else _parts(split(batch, s.part_size), s.where("split_batch"))
    if split is not None:
        parts = parts[: s.peers.fewest(len(parts))]
    for branch in s.branches:
        if batch_idx % branch.every:
            if last and branch.window.count:  # its window ends with the epoch, though not with a batch of its own
                assert branch.loss is not None
                update(s, branch, branch.loss, None, int)
            continue
        results: list[Any] = []
        carry = None
        train = _train_part if branch.optim is not None else _train_manually
        with Toggle(branch.others):
            for part in parts:
                run.batch = part
                inputs = (part, batch_idx, dataloader_idx, carry)
                result, loss, again = train(s, branch, inputs, last, fresh)
                if loss is not None:
                    update(s, branch, loss, inputs, again)
                fresh = None
                carry = detached(result.get("carry")) if isinstance(result, Mapping) else None
                results.append(result)
        outputs[branch.name] = results[0] if split is None else results
    run.batch = batch
    return outputs if len(s.branches) > 1 else outputs.get(s.branches[0].name), run.global_step > before


def _train_part(s: Session, branch: Branch, inputs: Inputs, last: bool, seed: int | None) -> Trained:
    """One automatic step; `seed` is None where the random numbers of the batch go on."""
    call, run, window, optimizer = s.call, s.run, branch.window, branch.optimizer
    if window.count == 0:
        call["on_before_zero_grad"](optimizer)
        branch.zero_grad()
    if seed is not None:
        s.reseed(seed)
    again = repeater(run.device) if branch.closure else int
    window.coming(last)
    outputs = branch.step(branch.key, *inputs)
    carries = "split_batch" in call
    loss, scalars, metrics, weight, samples = read_result(outputs, branch.hook.where, training=True, carries=carries)
    if weight is None:
        weight = samples or run.size_of_batch()
    scaled = loss if window.plain else window.scale(loss, weight, last)
    branch.loss = scaled.detach()
    call["on_before_backward"](scaled, optimizer)
    if "backward" in call and branch.scaler is None:
        # and not `branch.backward`, which lies around it: one frame less above the user's code
        call["backward"](scaled, optimizer)
    else:
        branch.backward(scaled)
    call["on_after_backward"](optimizer)
    _add_loss(s, branch, loss, weight, inputs[1])
    log_result(run, branch.prefix, scalars, metrics, weight)
    return outputs, scaled if window.plain or window.complete(last) else None, again


def _train_manually(s: Session, branch: Branch, inputs: Inputs, last: bool, seed: int | None) -> Trained:
    """One manual step; `seed` as in `_train_part`."""
    run, manual = s.run, s.run.manual
    manual.begin(last)
    if seed is not None:
        s.reseed(seed)
    try:
        outputs = branch.step(branch.key, *inputs)
    finally:
        manual.end()
    loss, scalars, metrics, weight, samples = read_result(outputs, branch.hook.where, carries="split_batch" in s.call)
    if weight is None and (loss is not None or scalars):
        weight = samples or run.size_of_batch()
    if loss is not None:
        _add_loss(s, branch, loss, weight, inputs[1])
    log_result(run, branch.prefix, scalars, metrics, weight)
    return outputs, None, int


def _add_loss(s: Session, branch: Branch, loss: Tensor, weight: Any, batch_idx: int) -> None:
    s.run.means.series[f"{branch.prefix}loss"].add(loss, weight)
    if s.settings.on_nan == "raise":
        branch.rows.append((batch_idx, s.run.global_step + 1))


def _parts(given: Any, where: str) -> Sequence[Any]:
    """What `split_batch` returned or yields, in order.

    Raises:
        StepError: it is no sequence of parts, or an empty one.
    """
    if isinstance(given, (Tensor, str, Mapping)) or not isinstance(given, Iterable):
        raise StepError(
            f"{where}, marked @split_batch, returned a {type(given).__name__}; return a list of parts, or yield them"
        )
    parts = list(given)
    if not parts:
        raise StepError(f"{where}, marked @split_batch, returned no part; return the batch itself as the only one")
    return parts


def detached(value: Any) -> Any:
    """The same nesting (lists, tuples, dicts, dataclasses) with every tensor cut off from its graph.

    >>> hidden = torch.ones(2, requires_grad=True) * 2
    >>> detached({"h": (hidden, "text")})["h"][0].requires_grad
    False
    """
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(detached, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(detached, value))
    if isinstance(value, dict):
        return {key: detached(each) for key, each in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: detached(getattr(value, f.name)) for f in fields(value) if f.init})
    return value
