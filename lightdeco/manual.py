"""`Manual`: what `ld.backward`, `ld.clip_gradients` and the optimizers do in a run whose training step is manual."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .branch import Toggle, others
from .errors import SettingsError, StepError
from .limits import accumulation
from .optim import clip, parameters_of
from .peers import Peers
from .scaling import Scaler
from .session import Session
from .windows import SharedPending, Window


class Manual:
    """Events, overrides, clipping, accumulation and counting for a step that drives its optimizers itself.

    With `accumulate_grad_batches` n > 1 each optimizer has a window of n batches in which `ld.backward` was called for
    it. Until the window is full, `optimizer.step()` and `optimizer.zero_grad()` do nothing on those optimizers.
    """

    def __init__(self, session: Session, stack: ExitStack) -> None:
        self._s = session
        self._optimizers = {name: optim.optimizer for name, optim in session.run.optims.items()}
        self._last = False
        self._shared = session.group.size > 1
        self._begin_windows(1)
        self._toggles: list[Toggle] = []
        self._inside = ""  # the override that runs now
        for optimizer in self._optimizers.values():
            before = optimizer.register_step_pre_hook(self._before_step)
            after = optimizer.register_step_post_hook(self._after_step)
            stack.callback(before.remove)
            stack.callback(after.remove)
            if session.settings.accumulate_grad_batches != 1 or self._shared or session.scalers:
                stack.callback(_replace(optimizer, "step", self._when_due(optimizer)))
                stack.callback(_replace(optimizer, "zero_grad", self._when_empty(optimizer)))

    # ---- called by the loop ------------------------------------------------------------------------------------------

    def begin_epoch(self) -> None:
        """Begin a window for each optimizer."""
        self._begin_windows(accumulation(self._s.settings, self._s.run.epoch))

    def _begin_windows(self, size: int) -> None:
        peers, scalers = self._s.peers, self._s.scalers
        self._windows = {
            id(optimizer): _Pending(
                SharedPending(size, peers) if isinstance(peers, Peers) else Window(size), scalers.get(name)
            )
            for name, optimizer in self._optimizers.items()
        }

    def begin(self, last: bool) -> None:
        """A step is about to run; `last`: no batch follows in this epoch."""
        self._last = last

    def end(self) -> None:
        """The step is over, also by an exception: what is still toggled is put back."""
        for toggle in self._toggles:
            toggle.end()
        self._toggles = []

    @property
    def pending(self) -> bool:
        """Whether gradients of some window wait for the batches that follow."""
        return any(pending.window.count for pending in self._windows.values())

    # ---- called by the step ------------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, optimizer: Optimizer | None, weight: Any, options: Any) -> None:
        """See `lightdeco.backward`."""
        if self._inside == "backward":
            torch.autograd.backward(loss, **options)
            return
        s = self._s
        several = len(self._optimizers) > 1
        if optimizer is not None:
            self._known(optimizer, "backward")
        elif not several:
            (optimizer,) = self._optimizers.values()
        scaled = self._scaled(loss, optimizer, weight)
        s.call["on_before_backward"](scaled, optimizer)
        if optimizer is not None:
            scaled = self._windows[id(optimizer)].scale_up(scaled)
        with torch.autocast(scaled.device.type, enabled=False):
            if "backward" in s.call:
                self._override("backward", scaled, optimizer)
            elif several and optimizer is not None:
                own = [p for p in parameters_of(optimizer) if p.requires_grad]
                torch.autograd.backward(scaled, inputs=own, **options)
            else:
                torch.autograd.backward(scaled, **options)
        s.call["on_after_backward"](optimizer)

    def clip(self, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
        """See `lightdeco.clip_gradients`."""
        self._known(optimizer, "clip_gradients")
        pending = self._windows[id(optimizer)]
        if not pending.due(self._last):
            return
        pending.normalise(optimizer)
        settings = self._s.settings
        if value is not None or self._inside == "clip_gradients":
            value = settings.gradient_clip_val if value is None else value
            if value is not None:
                clip(optimizer, value, algorithm or settings.gradient_clip_algorithm)
        elif "clip_gradients" in self._s.call:
            self._override("clip_gradients", optimizer)

    def toggle(self, optimizer: Optimizer) -> Toggle:
        """From now on only the parameters of this optimizer require grad."""
        self._known(optimizer, "toggle_optimizer")
        self.end()
        toggle = Toggle(others(optimizer, self._s.parameters()))
        self._toggles.append(toggle)
        return toggle

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _known(self, optimizer: Optimizer, function: str) -> None:
        if not any(optimizer is known for known in self._optimizers.values()):
            raise StepError(f"{function} got an optimizer that configure_optimizers did not return: see ld.optimizers")

    def _override(self, role: str, *given: object) -> None:
        """Call an override, in which the function of its name means torch's own way."""
        self._inside = role
        try:
            self._s.call[role](*given)
        finally:
            self._inside = ""

    def _scaled(self, loss: Tensor, optimizer: Optimizer | None, weight: Any) -> Tensor:
        single = accumulation(self._s.settings, self._s.run.epoch) == 1
        if optimizer is None and (self._s.scalers or not single):
            raise StepError(
                "ld.backward needs to know whose gradients these are: with accumulate_grad_batches or "
                "precision='16-mixed', and several optimizers, call ld.backward(loss, optimizer)"
            )
        if optimizer is None or (single and not self._shared):
            return loss
        batch = self._s.run.progress.micro_batch
        weight = self._s.run.size_of_batch() if weight is None else weight
        return self._windows[id(optimizer)].scale(loss, weight, batch, self._last)

    def _before_step(self, optimizer: Optimizer, *given: Any) -> None:
        self._s.call["on_before_optimizer_step"](optimizer)

    def _after_step(self, optimizer: Optimizer, *given: Any) -> None:
        self._s.count_step()

    def _when_due(self, optimizer: Optimizer) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(step: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(step)
            def when_due(*given: Any, **options: Any) -> Any:
                pending = self._windows[id(optimizer)]
                pending.refuse_empty()
                if not pending.due(self._last):
                    return None
                pending.refuse_unscaled(closure=bool(given) or options.get("closure") is not None)
                pending.normalise(optimizer)
                if pending.overflowed():
                    self._s.run.progress.skipped_updates += 1
                    pending.updated(self._s.run.progress.micro_batch)
                    return None
                result = step(*given, **options)
                pending.updated(self._s.run.progress.micro_batch)
                return result

            return when_due

        return around

    def _when_empty(self, optimizer: Optimizer) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def around(zero_grad: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(zero_grad)
            def when_empty(*given: Any, **options: Any) -> None:
                if self._windows[id(optimizer)].window.count == 0:
                    zero_grad(*given, **options)

            return when_empty

        return around


class _Pending:
    """The window of one optimizer in a manual run, which counts batches and not calls of backward."""

    def __init__(self, window: Window, scaler: Scaler | None) -> None:
        self.window, self._scaler = window, scaler
        self._batch = self._updated = -1
        self._normalised = self._scaled = False

    def scale(self, loss: Tensor, weight: Any, batch: int, last: bool) -> Tensor:
        """The loss as it goes into backward; the batch is counted once."""
        if batch == self._updated and self.window.size > 1:
            raise StepError(
                "ld.backward was called for an optimizer that was updated in this batch already; "
                "accumulate_grad_batches allows one update of each optimizer per batch"
            )
        if batch == self._batch:
            return loss if self.window.single else loss * weight
        self._batch = batch
        return self.window.scale(loss, weight, last)

    def scale_up(self, loss: Tensor) -> Tensor:
        """With fp16: the loss times the factor of this optimizer's scaler."""
        self._scaled = True
        return loss if self._scaler is None else self._scaler.scale(loss)

    def refuse_unscaled(self, closure: bool) -> None:
        """With fp16: refuse gradients that were not scaled, and a closure, which would make such."""
        if self._scaler is None:
            return
        if closure:
            raise StepError(
                "optimizer.step(closure) in a manual step cannot go with precision='16-mixed': gradients are unscaled "
                "before the update, and a closure makes new ones; use an automatic step, or 'bf16-mixed'"
            )
        if not self._scaled:
            raise StepError(
                "optimizer.step() without an ld.backward(loss, optimizer) since its last update; with "
                "precision='16-mixed' gradients must come from ld.backward, which scales the loss"
            )

    def overflowed(self) -> bool:
        """With fp16: adapt the factor; whether a gradient was not finite, so that the update is left out. Waits."""
        return self._scaler is not None and not self._scaler.adapt()

    def refuse_empty(self) -> None:
        """Refuse an update without gradients from `ld.backward`, which alone knows how much each batch counts."""
        if self.window.size > 1 and self.window.count == 0:
            raise StepError(
                "optimizer.step() without an ld.backward(loss, optimizer) since its last update; with "
                "accumulate_grad_batches gradients must come from ld.backward, not from loss.backward()"
            )

    def due(self, last: bool) -> bool:
        """Whether the update may be made now."""
        return self.window.size == 1 or (self.window.count > 0 and self.window.complete(last))

    def normalise(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the sum of weights and by the scaler's factor, once."""
        if self._normalised:
            return
        self._normalised = True
        if not self.window.plain:
            self.window.normalise(optimizer)
        if self._scaler is not None:  # after the processes have averaged, so that all see the same
            self._scaler.unscale()

    def updated(self, batch: int) -> None:
        """Begin the next window."""
        self._updated, self._batch, self._normalised, self._scaled = batch, -1, False, False
        self.window.begin()


def _replace(thing: Any, name: str, around: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Callable[[], None]:
    """Put a function around a method of one object; what is returned takes it away again."""
    own = vars(thing).get(name)
    setattr(thing, name, around(getattr(thing, name)))

    def back() -> None:
        if own is None:
            delattr(thing, name)
        else:
            setattr(thing, name, own)

    return back


def refuse_settings(s: Session) -> None:
    """Refuse settings that cannot work where the step drives the optimizers.

    Raises:
        SettingsError: `on_nan` is "skip".
    """
    if s.settings.on_nan == "skip":
        raise SettingsError(
            "on_nan='skip' leaves out updates that lightdeco makes, and a manual step makes its own; "
            "use 'raise' or 'ignore', and look at the loss before optimizer.step()"
        )
