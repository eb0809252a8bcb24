"""When a run is saved: after a step or an epoch, at the end, on a signal and on an error. `ModelCheckpoint` decides."""

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from . import checkpoint
from .callbacks.model_checkpoint import POLICY, ModelCheckpoint
from .checkpoint import Snapshot, State, dealt
from .checkpoint.content import encode
from .child import beat
from .dtensor import local
from .errors import CheckpointError, LightdecoError, SettingsError, StepError, warn
from .group import Group, Kept
from .session import Session
from .state import collect, collect_metrics

T = TypeVar("T")


class Saver:
    """Writes the checkpoints of one run into `directory`.

    Every process of the run has one and calls it at the same places; all decide the same, and rank 0 writes.

    `boundary` is called between two steps, where a run can be continued. A write that fails is one warning, and is
    tried again when the next one is due; at the end of the run it raises.
    """

    def __init__(self, session: Session, policy: ModelCheckpoint, directory: Path) -> None:
        self._session, self.policy, self.directory = session, policy, directory
        self._group, policy.written_at = session.group, session.peers.seconds()
        self._validated = False  # since the last boundary
        self._metrics: dict[str, Any] | None = None  # of an epoch that is being ended
        self._score: float | None = None  # of a validation that improved, and is not saved yet
        #: Every process writes its part of a model that is cut; in the foreground, since they write together.
        self._cut = session.held.cut
        self._held: tuple[Kept[Snapshot], str, tuple[int, ...]] | None = None
        self._saved: tuple[int, ...] | None = self._position()  # of the last write, or where the run began
        self._thread: threading.Thread | None = None
        self._writing = ""  # the name of what the thread writes
        self._failure: BaseException | None = None
        self._warned = False

    # ---- called by the loop ------------------------------------------------------------------------------------------

    def validated(self, metrics: Mapping[str, float]) -> None:
        """A validation has ended: decide whether these weights are among the best."""
        self._validated = True
        score = self.policy.score(metrics)
        if score is not None and self.policy.improves(score):
            self._score = score

    def epoch_ends(self) -> None:
        """The metrics of an epoch are about to be taken: keep them for a stop in the validation that follows."""
        self._metrics = collect_metrics(self._session)

    def boundary(self, epoch: int | None = None) -> None:
        """Between two steps: write or hold what is due. `epoch`: how many are finished, where one has just ended.

        Raises:
            StepError: the losses, the weights or the state of the optimizer are not finite; nothing is written then.
        """
        policy = self.policy
        self._metrics = None
        due = policy.due(self._session.run.global_step, epoch, self._session.peers.seconds())
        if not due and not self._validated:
            return
        score, self._score, self._validated = self._score, None, False
        if policy.holds and not due:
            if score is not None:
                self._hold(score)
        elif due or score is not None or (policy.validates and policy.save_last):
            if score is None:
                self._write_held()
            self._held = None  # what is written now is better
            self._write_now(score)

    def finish(self) -> None:
        """At the end of the run: write what is held and, unless it was just written, the state as it is now.

        Raises:
            CheckpointError: it could not be written.
        """
        self._write_held(final=True)
        run, policy = self._session.run, self.policy
        pruned = run.global_step > 0 and policy.last not in policy.keep()  # or there is none in this directory
        if self._saved != self._position() or pruned:
            self._write_now(self._score, final=True)
        self._score = None
        self._join(final=True)

    def saved(self) -> bool:
        """Whether a checkpoint holds the run as it is now."""
        there = self._session.run.last_checkpoint is not None
        return there and self._thread is None and self._saved == self._position()

    def fail(self, error: BaseException) -> None:
        """On an error: write what is held and, where the error came between two updates, the state; never raises."""
        if isinstance(error, CheckpointError) or self._group.rank > 0 or self._cut:
            return
        alone = self._group.size == 1
        self._group = Group()  # the other processes are elsewhere
        try:
            self._write_held(final=True)
            if alone and self.policy.on_exception and self._sound(error) and self._saved != self._position():
                self._write_now(final=True)
            self._join(final=True)
        except Exception as failure:  # the first error is the one to be seen; this one may be the user's own
            if str(failure) != str(error):
                what = "" if isinstance(failure, LightdecoError) else f"{type(failure).__name__}: "
                warn(f"the run could not be saved after {type(error).__name__}: {what}{failure}")

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _position(self) -> tuple[int, ...]:
        progress = self._session.run.progress
        return progress.epoch, progress.batch, progress.global_step

    def _sound(self, error: BaseException) -> bool:
        """Whether the run can be continued from here: no step is half done, and nothing has gone bad."""
        if isinstance(error, StepError) or not self._session.between_steps():
            return False
        try:
            self._session.refuse_nan()
            self._refuse_bad_weights()
        except StepError:
            return False
        return True

    def _state(self, final: bool) -> tuple[State, str]:
        s = self._session
        s.refuse_nan()
        self._refuse_bad_weights()
        step = s.run.global_step
        try:
            name = self.policy.name(step, s.run.epoch, s.run.metrics)
        except SettingsError as error:
            if not final:
                raise
            name = f"step={step:08d}"  # a signal may come before the first validation
            warn(f"the last checkpoint is called {name}: {error}")
        return collect(s, self._metrics), name

    def _refuse_bad_weights(self) -> None:
        """A finite loss does not show that the update after it was finite. Waits for the device."""
        run = self._session.run
        if self._session.settings.on_nan != "raise":
            return
        names = _not_finite(run.model)
        if self._cut:
            names = list(dict.fromkeys(name for each in self._group.gather(names) for name in each))
        if names:
            raise StepError(
                f"the weights are not finite (NaN or infinite) after global_step {run.global_step}: "
                f"{', '.join(names[:5])}{' …' if len(names) > 5 else ''}; they were not saved. "
                "detect_anomaly=True finds the operation"
            )

    def _hold(self, score: float) -> None:
        """Keep a copy of the state in memory, until the next write is due."""
        state, name = self._ranked(score)
        held = self._together(lambda: Kept(checkpoint.snapshot(state)))
        self._held = held, name, self._position()

    def _together(self, function: Callable[[], T]) -> T:
        """Call a function where something is written: on rank 0, or on every process."""
        return self._group.every(function) if self._cut else self._group.first(function)

    def _ranked(self, score: float | None, final: bool = False) -> tuple[State, str]:
        """The state as it is now, with what the policy knows once it is written."""
        self._join()  # before the policy changes, by which the thread prunes
        state, name = self._state(final)
        self.policy.rank(name, score, self._session.run.global_step)
        state.callbacks[POLICY] = self.policy.state_dict() | {"last": name}
        return state, name

    @property
    def _holding(self) -> str | None:
        return None if self._held is None else self._held[1]

    def _write_held(self, final: bool = False) -> None:
        held, self._held = self._held, None
        if held is not None:
            self._write(*held, final)

    def _write_now(self, score: float | None = None, final: bool = False) -> None:
        self._write(*self._ranked(score, final), self._position(), final)

    def _write(self, state: State | Kept[Snapshot], name: str, position: tuple[int, ...], final: bool) -> None:
        self._join(final)
        beat(self._session.run.global_step, "saving")
        self.policy.written(name, self._session.run.global_step, self._session.peers.seconds())
        self._saved = position
        background = self.policy.background and not final and not self._cut
        if isinstance(state, State):
            # Encoded first: what cannot be kept never can, so that it ends the run now.
            copied, encoded = checkpoint.snapshot if background else encode, state
            state = self._together(lambda: Kept(copied(encoded)))
        content = state.thing
        if not background:
            self._attempt(lambda: self._save(content, name, final), name, final)
            return

        def work() -> None:
            try:
                self._save(content, name, final)
            except BaseException as error:
                self._failure = error

        self._writing = name
        if content is not None:
            self._thread = threading.Thread(target=work, name="lightdeco checkpoint", daemon=False)
            self._thread.start()

    def _join(self, final: bool = False) -> None:
        """Wait for a write in the background, and say how it failed."""
        name, self._writing = self._writing, ""
        if name:
            self._attempt(self._joined, name, final)

    def _joined(self) -> None:
        assert self._thread is not None
        self._thread.join()
        self._thread, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _attempt(self, write: Callable[[], None], name: str, final: bool) -> None:
        try:
            self._together(write)
            self.show()
        except CheckpointError as error:
            self.policy.forget(name)
            self._saved = None
            if final:
                raise
            if not self._warned:
                self._warned = True
                warn(f"the run could not be saved, training goes on: {error}; it is tried again, and fails at the end")

    def _save(self, content: Snapshot | None, name: str, final: bool) -> None:
        assert content is not None
        if self._cut:
            dealt.save(self.directory, name, content, self._group)
        else:
            checkpoint.save(self.directory, name, content)
        if self._group.rank == 0:
            self._prune(final)

    def show(self) -> None:
        """Tell the run which checkpoints are the last and the best, of those that are there."""
        known = self.policy.keep(ending=True) - {self._holding}
        for name in self._group.first(lambda: [n for n in known if not (self.directory / n).is_dir()]):
            self.policy.forget(name)
        run, last, best = self._session.run, self.policy.last, self.policy.best
        run.last_checkpoint = None if last is None else self.directory / last
        run.best_checkpoint, run.best_score = (None, None) if best is None else (self.directory / best[0], best[1])

    def _prune(self, ending: bool) -> None:
        keep = self.policy.keep(ending)
        if keep:
            checkpoint.prune(self.directory, keep)


def _not_finite(model: nn.Module) -> list[str]:
    """The parameters that are not finite, of each the part of this process. Waits for the device."""
    parameters = {name: local(p).detach() for name, p in model.named_parameters() if p.is_floating_point()}
    there = [p for p in parameters.values() if p.numel()]
    finite = [torch.isfinite(norm) for norm in torch._foreach_norm(there)] if there else []
    if all(bool(each) for each in finite):
        return []
    return [name for name, p in parameters.items() if not bool(torch.isfinite(p).all())]
