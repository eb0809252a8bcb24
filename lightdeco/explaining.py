"""`ld.explain`: the loop of one very run as text, with the names and places of the functions that it calls."""

import textwrap
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from torch import nn

from . import explaining_heads as heads
from .ejecting.objects import call_text, directory_text, loader_text, made, place, policy_text, recorders
from .hooks import Hook
from .joined import joined
from .plan import Plan
from .preparing import prepare
from .roles import ROLES
from .settings import Settings, explicit, resolve
from .settings_checks import shown

#: Places stand in one column, but for those of longer lines.
_WIDEST: Final = 90


def outline(model: nn.Module, data: Any, settings: Settings | None, overrides: Any) -> str:
    """What `explain` returns."""
    resolved = resolve(settings, overrides)
    plan, given = prepare("fit", model, data, resolved)
    return _Outline(plan, given, resolved).text()


class _Outline:
    """The lines, as they are put down one after another."""

    def __init__(self, plan: Plan, given: Mapping[str, object], settings: Settings) -> None:
        self._plan, self._given, self._settings, self._processes = plan, given, settings, heads.processes_of(settings)
        self._depth = 0
        self._lines: list[tuple[str, str]] = []  # the text, and the file and line
        has_val = "val" in given or plan.one("val_dataloader") is not None
        self._validates = bool(plan.all("validation_step")) and has_val and settings.limit_val_batches != 0

    def text(self) -> str:
        """All of it, with the places in a column."""
        self._beginning()
        with self._block(heads.epochs_text(self._settings)):
            self._epoch()
        self._end()
        width = max((len(text) for text, where in self._lines if where and len(text) <= _WIDEST), default=0)
        return "".join(f"{text:{width}}  {where}".rstrip() + "\n" for text, where in self._lines)

    # ---- putting lines down ------------------------------------------------------------------------------------------

    def _say(self, text: str, hook: Hook | None = None) -> None:
        self._lines.append(("    " * self._depth + text, "" if hook is None else place(hook)))

    @contextmanager
    def _block(self, head: str) -> Iterator[None]:
        self._say(head)
        self._depth += 1
        yield
        self._depth -= 1

    def _hear(self, *events: str) -> None:
        """Whoever listens to these events, in the order of calling."""
        for event in events:
            for hook in self._plan.all(event):
                every = f", every {hook.mark.every} times" if hook.mark.every > 1 else ""
                self._say(f"{event}{every}: {call_text(hook)}", hook)

    def _role(self, role: str, form: str = "{}", otherwise: str | None = None) -> None:
        """The methods with a role, put into a line of pseudocode; or what is done where there is none."""
        hooks = self._plan.all(role)
        for hook in hooks if ROLES[role].shared else hooks[-1:]:
            self._say(form.format(call_text(hook)), hook)
        if not hooks and otherwise is not None:
            self._say(otherwise)

    # ---- before the first epoch --------------------------------------------------------------------------------------

    def _beginning(self) -> None:
        s, plan = self._settings, self._plan
        given = {name: value for name, value in explicit(s).items() if name not in ("callbacks", "hparams")}
        chosen = f"fit {made(plan.model)}: {', '.join(f'{n}={shown(v)}' for n, v in given.items())}"
        for line in textwrap.wrap(chosen, 100, subsequent_indent="    ", break_long_words=False):
            self._say(line)
        self._say("")
        if self._processes > 1:
            self._say(heads.start_text(self._processes))
        self._role("configure_callbacks", "callbacks = {}, and those of the settings")
        callbacks = [o for o in plan.owners if o is not plan.model and o is not plan.data]
        if callbacks:
            self._say(f"callbacks: {', '.join(map(made, callbacks))}")
        self._say(
            "seed torch, NumPy and random with " + ("a number drawn from torch" if s.seed is None else str(s.seed))
        )
        if s.resume is not None:
            self._say(f"go on from a checkpoint: resume={str(s.resume)!r}")
        self._role(
            "prepare_data", "{}, by one process of each machine; the others wait" if self._processes > 1 else "{}"
        )
        self._role("setup")
        self._role("configure_model")
        self._role("configure_accelerator", "accelerator = Accelerator(**{})")
        self._where()
        self._loaders()
        several = any(hook.mark.optimizer or hook.mark.manual for hook in plan.all("training_step"))
        self._role("configure_optimizers", "optimizers = {}" if several else "optimizer, scheduler = {}")
        if s.resume is not None:
            self._hear("on_load_checkpoint")
        if not s.fast_dev_run:
            self._say(f"make {directory_text(s, type(plan.model).__name__)}; log to {recorders(s)}")
        self._hear("on_fit_start")
        if self._validates and s.num_sanity_val_steps and not s.fast_dev_run:
            self._hear("on_sanity_check_start")
            self._say(f"try {s.num_sanity_val_steps} batches of each val loader, recording nothing")
            self._hear("on_sanity_check_end")
        self._say("model.train()")
        self._hear("on_train_start")

    def _where(self) -> None:
        s = self._settings
        for line in heads.placed(s):
            self._say(line)
        if s.compile is not False:
            options = f" ({s.compile})" if isinstance(s.compile, dict) else ""
            self._say(f"compile the model's forward{options}")
        for name in ("deterministic", "benchmark", "detect_anomaly"):
            value = getattr(s, name)
            if value not in (None, False):
                self._say(f"torch runs with {name}={value!r}")
        if s.profiler is not None:
            self._say(f"measure everything from here on: profiler={shown(s.profiler)}")

    def _loaders(self) -> None:
        for stage in ("train", "val") if self._validates else ("train",):
            if stage in self._given:
                self._say(f"{stage}_loader = {loader_text(self._given[stage])}, as given")
            else:
                self._role(f"{stage}_dataloader", f"{stage}_loader = {{}}")
        if self._processes > 1:
            self._say(heads.dealt_text(self._settings, self._processes))

    # ---- an epoch ----------------------------------------------------------------------------------------------------

    def _epoch(self) -> None:
        s = self._settings
        every = s.reload_dataloaders_every_n_epochs
        if every:
            self._say(f"every {every} epochs: make the loaders anew")
        self._hear("on_train_epoch_start")
        with self._block(heads.batches_text(self._settings)):
            self._batch()
        inside = s.val_check_interval not in (None, 1.0)
        if self._validates and not inside:
            self._validation("")
        self._hear("on_train_epoch_end")
        self._say("record train/…_epoch" + self._recorded())
        self._schedule("epoch")
        self._save()

    def _batch(self) -> None:
        s = self._settings
        self._transfer()
        self._hear("on_train_batch_start")
        if self._plan.one("split_batch"):
            self._seed()
            self._role("split_batch", "parts = {}")
        steps = self._plan.all("training_step")
        for i, hook in enumerate(steps):
            with ExitStack() as blocks:
                for head in self._heads(hook, several=len(steps) > 1):
                    blocks.enter_context(self._block(head))
                self._manual(hook) if hook.mark.manual else self._step(hook, seeds=i == 0)
        if len(steps) > 1 or self._plan.one("split_batch") or any(hook.mark.manual for hook in steps):
            self._say("global_step += 1, if any optimizer was updated")
        self._hear("on_train_batch_end")
        self._say(f"every {s.log_every_n_steps} steps: record train/…" + self._recorded())
        if s.on_nan == "raise":
            self._say("at each record, at least every 50 steps: raise where a loss was not finite (on_nan='raise')")
        if self._validates and s.val_check_interval not in (None, 1.0):
            at = s.val_check_interval
            self._validation(f"every {at} batches" if isinstance(at, int) else f"after each {at} of the epoch")
        self._save()
        self._say("end the run here where a limit is reached, or run.should_stop is set")

    def _heads(self, hook: Hook, several: bool) -> Iterator[str]:
        """What a training step stands in."""
        name = hook.mark.optimizer
        if several:
            due = "" if hook.mark.every == 1 else f", for batches 0, {hook.mark.every}, {2 * hook.mark.every}, …"
            yield f"optimizer {name!r}{due}, while only its parameters require grad:"
        elif hook.mark.every > 1:
            yield f"for batches 0, {hook.mark.every}, {2 * hook.mark.every}, …:"
        if self._plan.one("split_batch"):
            yield "for each part, with the carry of the one before:"

    def _transfer(self) -> None:
        self._hear("on_before_batch_transfer")
        self._role("transfer_batch_to_device", "batch = {}")
        self._hear("on_after_batch_transfer")

    def _clear(self) -> None:
        self._hear("on_before_zero_grad")
        self._role("optimizer_zero_grad", otherwise="optimizer.zero_grad()")

    def _seed(self) -> None:
        self._say("seed torch with seeds.step_seed(seed, rank, micro_batch)")

    def _step(self, hook: Hook, seeds: bool) -> None:
        """One training step with its backward and its update; `seeds`: torch is seeded before it."""
        s = self._settings
        alone = s.accumulate_grad_batches == 1
        with ExitStack() as stack:
            if not alone:
                stack.enter_context(self._block(f"at the beginning of a window of {heads.window_text(s)}:"))
            self._clear()
        if seeds and not self._plan.one("split_batch"):
            self._seed()
        self._say(f"outputs = {call_text(hook)}", hook)
        if s.oom == "micro" and not self._plan.one("split_batch"):
            self._say("where memory runs out: the same for parts of the batch, now and from then on (oom='micro')")
        self._hear("on_before_backward")
        self._role("backward", otherwise="loss.backward()")
        self._hear("on_after_backward")
        with ExitStack() as stack:
            if not alone:
                stack.enter_context(self._block("at the end of the window, or of the epoch:"))
            if (averaged := heads.averaged_text(self._processes, window=not alone)) is not None:
                self._say(averaged)
            self._update()

    def _manual(self, hook: Hook) -> None:
        """A manual step, and what happens inside of what it calls."""
        self._seed()
        self._say(f"outputs = {call_text(hook)}", hook)
        with self._block("the step clears and updates by itself; when it calls"):
            with self._block("ld.backward:"):
                self._hear("on_before_backward")
                self._role("backward", otherwise="loss.backward()")
                self._hear("on_after_backward")
            s = self._settings
            if self._plan.one("clip_gradients") or s.gradient_clip_val is not None:
                with self._block("ld.clip_gradients:"):
                    self._role("clip_gradients", otherwise=self._clipping())
            if self._plan.all("on_before_optimizer_step"):
                with self._block("optimizer.step:"):
                    self._hear("on_before_optimizer_step")
            for first in heads.before_manual_step(s, self._processes):
                self._say(f"optimizer.step, first: {first}")
            if s.accumulate_grad_batches != 1:
                self._say(
                    f"optimizer.step and zero_grad, ld.clip_gradients: nothing, until {heads.window_text(s)} have come"
                )

    def _clipping(self) -> str | None:
        s = self._settings
        if s.gradient_clip_val is None:
            return None
        return f"clip the gradients: {s.gradient_clip_algorithm} at most {s.gradient_clip_val}"

    def _update(self) -> None:
        if self._settings.precision == "16-mixed":
            self._say("unscale the gradients; leave this update out where one overflowed in fp16")
        if self._settings.on_nan == "skip":
            self._say("leave this update out where the loss or a gradient is not finite (on_nan='skip')")
        self._hear("on_before_optimizer_step")
        self._role("clip_gradients", otherwise=self._clipping())
        several = len(self._plan.all("training_step")) > 1 or self._plan.one("split_batch") is not None
        counted = "" if several else "; global_step += 1"
        self._role("optimizer_step", "{}" + counted, otherwise="optimizer.step()" + counted)
        self._schedule("step")

    def _recorded(self) -> str:
        return "" if self._settings.fast_dev_run else f" in {recorders(self._settings)}"

    def _schedule(self, interval: str) -> None:
        if any(hook.mark.manual for hook in self._plan.all("training_step")):
            return
        when = f"by {interval}, if configure_optimizers made one: "
        self._role("lr_scheduler_step", when + "{}", when + "scheduler.step()")

    def _save(self) -> None:
        if self._settings.checkpoint is not False and not self._settings.fast_dev_run:
            with self._block(f"where a checkpoint is due ({policy_text(self._settings)}):"):
                self._hear("on_save_checkpoint")
                self._say("save model, optimizer, positions and random state")

    def _validation(self, when: str) -> None:
        s = self._settings
        every = s.check_val_every_n_epoch
        epochs = "" if every == 1 else f"every {every} epochs"
        period = ", ".join(part for part in (when, epochs) if part)
        mode = "inference_mode" if s.inference_mode else "no_grad"
        with self._block(f"{period + ': ' if period else ''}validate, in eval mode and torch.{mode}:"):
            self._hear("on_validation_start", "on_validation_epoch_start")
            limit: object = s.limit_val_batches if s.overfit_batches is None else s.overfit_batches
            limit = int(s.fast_dev_run) or limit
            with self._block(f"for each batch of val_loader{'' if limit is None else f' (at most {limit})'}:"):
                self._transfer()
                self._hear("on_validation_batch_start")
                self._role("validation_step", "outputs = {}")
                self._hear("on_validation_batch_end")
            self._hear("on_validation_epoch_end")
            self._say("record val/…" + self._recorded())
            self._hear("on_validation_end")

    # ---- after the last epoch ----------------------------------------------------------------------------------------

    def _end(self) -> None:
        s = self._settings
        if s.checkpoint is not False and not s.fast_dev_run:
            self._say("save the last checkpoint")
        self._hear("on_train_end", "on_fit_end")
        if self._plan.all("on_exception"):
            with self._block("where an exception ends the run:"):
                self._hear("on_exception")
        self._role("teardown", "in any case: {}")
        if self._processes > 1 and not joined():
            self._say("the processes end; the model here gets the trained weights, and fit returns the Run")
