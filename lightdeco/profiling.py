"""`profiler=`: for the time of a verb, the functions that the loop calls are replaced by ones that are measured.

    action                                    what it is
    ----------------------------------------  --------------------------------------------------------------------
    the verb: fit, validate, test, predict    everything; what no other action takes is the loop itself
    train_data, val_data, …                   waiting for the next batch, the call that finds the end included
    transfer_batch_to_device                  moving a batch
    training_step, validation_step, …         the steps
    optimizer_zero_grad, backward, clip_gradients, optimizer_step, lr_scheduler_step
    on_train_batch_end Class.method, …        each method that is marked for an event
    validation, sanity_check                  a whole evaluation inside `fit`
    metrics                                   reading losses and metrics, which waits for the device
    record                                    writing a record, to files and loggers
    checkpoint                                between two steps, what is due is written
    train_dataloader, val_dataloader          making loaders anew
    the caller of predict                     between two outputs

Without a profiler nothing of this exists, so that it costs nothing.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Final, cast

from .errors import warn
from .profilers import Advanced, Profiler, PyTorch, Simple
from .profilers.advanced import CALLER
from .profilers.facts import Facts, gather
from .profilers.timed import Loaders, Timed, optimizer_step, shadow
from .roles import STAGE_LOADER
from .session import Call, Session
from .steps import Steps

#: The evaluations that run inside of `fit`.
_EVALUATIONS: Final = {"val": "validation", "sanity": "sanity_check"}


def profile(session: Session, profiler: Profiler, move: Call) -> Callable[[], None]:
    """Measure a verb that is set up and about to begin; returns what ends it, in any case.

    At the end whatever was replaced is put back, and the main process prints the summary and writes `profile.txt`.

    Args:
        session: everything of the verb; loaders, optimizer and directory are there.
        profiler: what `profilers.create` returned.
        move: what moves (batch, device, dataloader_idx) where the model does not override it.

    Raises:
        SettingsError: the profiler cannot begin, because another one runs.
    """
    verb = session.plan.verb
    facts = gather(session)
    if isinstance(profiler, (Simple, PyTorch)):
        profiler.begin(facts)
    profiler.start(verb)
    with ExitStack() as undone:
        undone.callback(_finish, session, profiler)
        undone.callback(profiler.stop, verb)
        timed = Timed(profiler)
        _events(session, timed, move)
        _evaluation(session, timed)
        _records(session, timed, undone)
        if verb == "fit":
            _training(session, timed, undone)
            _saving(session, timed, facts)
            _during(session, undone, _evaluations(session, profiler))
        if verb == "predict":
            _during(session, undone, _outputs(session, profiler, undone))
        return undone.pop_all().close
    raise AssertionError


# ---- what is measured ------------------------------------------------------------------------------------------------


def _events(s: Session, timed: Timed, move: Call) -> None:
    """Each marked method of an event, wherever it is called from."""
    hooks = []
    for hook in s.plan.hooks:
        if hook.role.kind == "event":
            name = f"{hook.role.name} {hook.where.partition(' (')[0]}"
            hook = replace(hook, method=timed(name, hook.method))
        hooks.append(hook)
    s.plan = replace(s.plan, hooks=tuple(hooks))
    bound = s.plan.bind(s.run, s.run.progress.calls)
    for event in {hook.role.name for hook in hooks if hook.role.kind == "event"}:
        s.call[event] = bound[event]
    if s.transfer is not None:
        # The events stand beside the transfer, not in it: advice about one is not advice about the other.
        moved = timed("transfer_batch_to_device", s.call.get("transfer_batch_to_device", move))
        s.transfer = _around(s, moved)


def _around(s: Session, moved: Call) -> Call:
    """The way of a batch to the device: its events as they are in the plan, and between them `moved`."""
    events = replace(s.plan, hooks=tuple(h for h in s.plan.hooks if h.role.name != "transfer_batch_to_device"))
    return events.transfer(s.run, s.run.progress.calls, moved)


def _evaluation(s: Session, timed: Timed) -> None:
    """Loaders and evaluation steps, which every verb may have."""
    steps, start, stop = s.steps, timed.start, timed.stop

    def measured(role: str, *offered: object) -> Any:
        start(role)
        try:
            return steps(role, *offered)
        finally:
            stop(role)

    s.steps = cast(Steps, measured)  # the loop only calls it
    s.loaders = Loaders(s.loaders, timed)
    for stage in s.loaders:
        if (role := STAGE_LOADER[stage]) in s.call:
            s.call[role] = timed(role, s.call[role])


def _training(s: Session, timed: Timed, undone: ExitStack) -> None:
    for branch in s.branches:
        branch.step = timed("training_step", branch.step)
        branch.zero_grad = timed("optimizer_zero_grad", branch.zero_grad)
        branch.backward = timed("backward", branch.backward)
    overridden = s.plan.one("optimizer_step") is not None
    if overridden:
        s.call["optimizer_step"] = timed("optimizer_step", s.call["optimizer_step"])
    for role in ("clip_gradients", "lr_scheduler_step"):
        if role in s.call:
            s.call[role] = timed(role, s.call[role])
    for optim in s.run.optims.values():
        step = optimizer_step(optim.optimizer, timed, "optimizer.step" if overridden else "optimizer_step")
        shadow(optim.optimizer, "step", step, undone)


def _records(s: Session, timed: Timed, undone: ExitStack) -> None:
    shadow(s.run, "record", timed("record", s.run.record), undone)
    if s.plan.verb == "fit":
        for thing, name in ((s, "bad"), (s, "refuse_nan"), (s.means, "window_and"), (s.means, "epoch")):
            shadow(thing, name, timed("metrics", getattr(thing, name)), undone)


def _saving(s: Session, timed: Timed, facts: Facts) -> None:
    saver = s.saver
    if saver is None:
        return

    def counted(save: Call) -> Call:
        def saving(*args: Any, **kwargs: Any) -> Any:
            before = saver.policy.last
            try:
                return save(*args, **kwargs)
            finally:
                facts.checkpoints += saver.policy.last != before

        return saving

    for name in ("boundary", "finish", "fail"):
        vars(saver)[name] = timed("checkpoint", counted(getattr(saver, name)))


# ---- stages ----------------------------------------------------------------------------------------------------------


def _during(s: Session, undone: ExitStack, measured: Call) -> None:
    shadow(s.run, "during", measured, undone)


def _evaluations(s: Session, profiler: Profiler) -> Call:
    """`run.during`, in which each evaluation inside of `fit` runs, as an action."""
    during, start, stop = s.run.during, profiler.start, profiler.stop

    @contextmanager
    def measured(stage: str, means: Any) -> Iterator[None]:
        action = _EVALUATIONS.get(stage, stage)
        start(action)
        try:
            with during(stage, means):
                yield
        finally:
            stop(action)

    return measured


def _outputs(s: Session, profiler: Profiler, undone: ExitStack) -> Call:
    """`run.during`, outside of which the caller of `predict` has the floor, as an action between two of them."""
    during, start, stop = s.run.during, profiler.start, profiler.stop
    outside = False

    def enter() -> None:
        nonlocal outside
        if outside:
            outside = False
            stop(CALLER)

    @contextmanager
    def measured(stage: str, means: Any) -> Iterator[None]:
        nonlocal outside
        enter()
        try:
            with during(stage, means):
                yield
        finally:
            start(CALLER)
            outside = True

    undone.callback(enter)  # left half-way, or at the end
    return measured


# ---- the end ---------------------------------------------------------------------------------------------------------


def _finish(s: Session, profiler: Profiler) -> None:
    """Show and write what was measured, on the main process; then close the profiler."""
    summary, close = getattr(profiler, "summary", None), getattr(profiler, "close", None)
    try:
        if summary is not None and s.run.is_main:
            text = str(summary())
            _show(profiler, text)
            if s.run.has_dir:
                _write(s, profiler, text)
    finally:
        if close is not None:
            close()


def _show(profiler: Profiler, text: str) -> None:
    """Print the summary; in a terminal in its width."""
    if not sys.stdout.isatty() or os.environ.get("TERM", "") == "dumb":
        print(text, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console()
    if isinstance(profiler, Simple):
        text = profiler.summary(columns=console.width)
    for i, line in enumerate(text.splitlines()):
        console.print(Text(line, style="bold" if i == 0 or line == "Advice:" else ""), soft_wrap=True)


def _write(s: Session, profiler: Profiler, text: str) -> None:
    try:
        (s.run.dir / "profile.txt").write_text(text + "\n", encoding="utf-8")
        if isinstance(profiler, (Simple, Advanced)):
            profiler.write(s.run.dir)
    except OSError as error:
        warn(f"the profile could not be written to {s.run.dir}: {error}")
