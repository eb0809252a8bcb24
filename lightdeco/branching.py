"""From marks and `configure_optimizers` to the branches of a run: which step has which optimizer, with every check."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor

from . import scaling, strategies
from .branch import Branch, clearing
from .ddp import Balloting
from .errors import LaunchError, MarkError, SettingsError, nearest, warn
from .manual import Manual, refuse_settings
from .metrics import Series
from .optim import Optim, clip, needs_closure, parameters_of, read_optimizers, step_scheduler
from .peers import Peers
from .plan import Hook
from .session import Session
from .voting import Voting
from .zero import Zero


def prepare_optimizers(s: Session, stack: ExitStack) -> None:
    """Call `configure_optimizers` and make the branches of the session, in the order of definition.

    Raises:
        MarkError: steps and optimizers do not fit together.
        SettingsError: a setting cannot work with them.
    """
    where, call, settings = s.where("configure_optimizers"), s.call, s.settings
    s.run.optims = found = read_optimizers(call["configure_optimizers"](), where)
    _refuse_foreign(s, where)
    value, algorithm = settings.gradient_clip_val, settings.gradient_clip_algorithm
    if value is None and algorithm != "norm":
        warn("gradient_clip_algorithm has no effect without gradient_clip_val")
    if value is not None and "clip_gradients" not in call:
        call["clip_gradients"] = lambda optimizer: clip(optimizer, value, algorithm)
    steps = {key: hook for key, hook in s.plan.steps().items() if hook.role.name == "training_step"}
    manual = any(hook.mark.manual for hook in steps.values())
    chosen = {} if manual else _chosen(list(steps.values()), found, where)
    _check_parts(s, list(steps.values()))
    overridden = "optimizer_step" in call
    for key, hook in steps.items():
        name = "" if manual or len(found) == 1 else chosen[hook.where]
        optim = None if manual else found[chosen[hook.where]]
        step = s.plan.direct(hook, s.run) if s.bare else s.wrapped
        branch = Branch(hook, key, step, name, optim, f"train/{name}/" if name else "train/")
        if optim is not None:
            _gradients(s, branch)
            branch.closure = overridden or needs_closure(optim.optimizer)
        s.branches.append(branch)
    _scale(s)
    if manual:
        _check_manual(s, next(iter(steps.values())))
        s.run.manual = Manual(s, stack)
    call.setdefault("lr_scheduler_step", step_scheduler)
    call.setdefault("optimizer_step", lambda optimizer, closure: optimizer.step(closure))
    s.parted = len(steps) > 1 or manual or s.branches[0].every != 1 or "split_batch" in call
    _losses(s)
    if isinstance(s.peers, Balloting):
        s.peers.overridden = "backward" in s.call
    if isinstance(s.peers, Peers):
        s.peers.needs_loss = settings.on_nan == "skip" or any(branch.closure for branch in s.branches)
    if isinstance(s.peers, Zero):
        s.peers.begin(s)
    _plain(s)
    if settings.oom == "micro":
        from .micro import join

        join(s)


def _refuse_foreign(s: Session, where: str) -> None:
    own = {id(p) for p in s.plan.model.parameters()}
    model = type(s.plan.model).__name__
    for name, optim in s.run.optims.items():
        if not any(id(p) in own for p in parameters_of(optim.optimizer)):
            which = f" {name!r}" if name else ""
            raise MarkError(
                f"{where} returned an optimizer{which} that holds no parameter of {model}; give it self.parameters()"
            )
        if needs_closure(optim.optimizer) and isinstance(s.peers, Voting):
            raise LaunchError(
                f"strategy={strategies.name_of(s.settings)!r} cannot run {type(optim.optimizer).__name__}, which looks "
                "at all parameters as one vector; 'ddp' can"
            )
        if needs_closure(optim.optimizer) and s.settings.accumulate_grad_batches != 1:
            kind = type(optim.optimizer).__name__
            raise SettingsError(
                f"accumulate_grad_batches: {kind} evaluates each batch several times, so it cannot accumulate"
            )


def _chosen(steps: list[Hook], optims: dict[str, Optim], where: str) -> dict[str, str]:
    """The name of the optimizer of each step, by the place of the step."""
    names = [name for name in optims if name]
    shown = ", ".join(map(repr, names))
    for hook in steps:
        name = hook.mark.optimizer
        if name is None and len(optims) > 1:
            raise MarkError(
                f"{where} returned {len(optims)} optimizers, {shown}, and {hook.where} is the only training step; mark "
                f"one step for each, @ld.training_step(optimizer={names[0]!r}), or drive them in "
                "@ld.training_step(manual=True)"
            )
        if name is not None and name not in optims:
            there = f"allowed: {shown}{nearest(name, names)}" if names else 'it has no name: return {"name": optimizer}'
            raise MarkError(f"{hook.where} is for the optimizer {name!r}, which {where} did not return; {there}")
    chosen = {hook.where: hook.mark.optimizer or next(iter(optims)) for hook in steps}
    idle = [name for name in names if name not in chosen.values()]
    if idle:
        raise MarkError(
            f"{where} returned the optimizer {idle[0]!r}, for which there is no training step; mark one, "
            f"@ld.training_step(optimizer={idle[0]!r}), or return no such optimizer"
        )
    return chosen


def _check_parts(s: Session, steps: list[Hook]) -> None:
    """What belongs to `split_batch`: its size, the argument `carry`, and no accumulation."""
    hook = s.plan.one("split_batch")
    if hook is None:
        for step in steps:
            if "carry" in inspect.signature(step.method).parameters:
                raise MarkError(
                    f"{step.where} asks for `carry`, which is handed from part to part of a batch; mark the method "
                    "that cuts batches into parts with @ld.split_batch"
                )
        return
    s.part_size, asked = hook.mark.size, "size" in inspect.signature(hook.method).parameters
    if asked and s.part_size is None:
        raise MarkError(f"{hook.where} asks for `size`, which its decorator gives: write @ld.split_batch(size=…)")
    if not asked and s.part_size is not None and not hook.keywords:
        warn(f"{hook.where}: size={s.part_size} has no effect: the method does not ask for `size`")
    if s.settings.accumulate_grad_batches != 1:
        raise SettingsError(
            f"accumulate_grad_batches={s.settings.accumulate_grad_batches!r} cannot go with {hook.where}, marked "
            "@split_batch: each part of a batch has an update of its own; allowed: 1"
        )


def _check_manual(s: Session, step: Hook) -> None:
    refuse_settings(s)
    for role in ("optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"):
        if role in s.call:
            raise MarkError(
                f"{s.where(role)}, marked @{role}, would never be called: the manual step {step.where} does that itself"
            )
    for optim in s.run.optims.values():
        if optim.scheduler is not None and optim != Optim(optim.optimizer, optim.scheduler):
            warn(
                f"interval, every and monitor of ld.Optim have no effect: the manual step {step.where} steps its "
                "schedulers itself, by ld.schedulers()"
            )


def _gradients(s: Session, branch: Branch) -> None:
    branch.zero_grad, branch.backward = clearing(branch.optimizer), s.peers.backward
    if "optimizer_zero_grad" in s.call:
        branch.zero_grad = partial(s.call["optimizer_zero_grad"], branch.optimizer)
    if "backward" in s.call:
        override, optimizer = s.call["backward"], branch.optimizer

        def backward(loss: Any) -> None:
            override(loss, optimizer)

        branch.backward = backward


def _scale(s: Session) -> None:
    """Make a scaler of losses for every optimizer, where the precision asks for one."""
    if not scaling.wanted(s.settings.precision):
        return
    device = s.run.device
    s.scalers = {name: scaling.Scaler(optim.optimizer, device) for name, optim in s.run.optims.items()}
    for branch in s.branches:
        if branch.optim is None:  # `Manual` scales
            continue
        branch.scaler = next(scaler for name, scaler in s.scalers.items() if s.run.optims[name] is branch.optim)
        branch.backward = partial(_scaled, branch.scaler, branch.backward)


def _scaled(scaler: scaling.Scaler, backward: Callable[[Any], object], loss: Tensor) -> None:
    backward(scaler.scale(loss))


def _plain(s: Session) -> None:
    """Find out whether an update is nothing but `optimizer.step()`, and a mean before it."""
    branch = s.branches[0]
    by_step = branch.optim is not None and branch.optim.scheduler is not None and branch.optim.interval == "step"
    more = branch.closure or by_step or "clip_gradients" in s.call or s.settings.on_nan == "skip"
    more = more or branch.scaler is not None or branch.apply is not None
    s.plain_update = not more and s.heard("on_before_optimizer_step") is None


def _losses(s: Session) -> None:
    """Make the series of the losses, which are checked for NaN."""
    s.run.loss_names = {f"{branch.prefix}loss" for branch in s.branches}
    for name in s.run.loss_names:
        series = s.means.series.setdefault(name, Series(s.run.device, "mean", True, True, watched=True))
        series.finite_only = s.settings.on_nan == "skip"
