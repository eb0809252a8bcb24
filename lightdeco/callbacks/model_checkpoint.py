"""Which checkpoints are written and kept: the policy. `saving.py` writes them."""

import math
import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, Literal

from lightdeco.errors import CheckpointError, SettingsError, nearest, warn, wrong_argument

#: The policy's own name among the states of callbacks in a checkpoint.
POLICY: Final = "ModelCheckpoint"
_MODES = ("min", "max")
_wrong = partial(wrong_argument, "ModelCheckpoint")
_FORBIDDEN = '/\\:*?"<>|'
_CONVERSIONS: dict[str | None, Callable[[float], object]] = {None: lambda value: value, "r": repr, "s": str, "a": ascii}


class ModelCheckpoint:
    """Says when a run is saved and which checkpoints stay; given as `fit(…, checkpoint=ModelCheckpoint(…))`.

    A checkpoint is written when one of these comes true, and always at the end of the run:

    - `every_n_steps`, `every_n_epochs`, `every_seconds`: so much has passed. Where none of the three is given: at each
      validation with a `monitor`, else after each epoch;
    - `monitor`: a validation was among the `save_top_k` best so far.

    Args:
        monitor: the metric that decides which are best, such as "val/loss". Without one the newest are kept.
        mode: whether less ("min") or more ("max") is better.
        save_top_k: how many of the best (without `monitor`: of the newest) stay; None for all, 0 for none.
        save_last: with a `monitor`, also keep the newest. The one at the end of the run is kept in any case. False
            goes with none of the three `every_…`: what they write would be removed at once.
        every_n_steps: steps between two checkpoints; counts `global_step`.
        every_n_epochs: epochs between two checkpoints.
        every_seconds: seconds between two checkpoints, at least.
        filename: the name of a checkpoint's directory, filled in with `epoch`, `step` and metrics by name:
            "epoch={epoch}-{val/loss:.3f}".
        on_exception: also write when an error or a signal ends the run, if the state is between two steps.
        background: write in a thread, from a copy of the state; the next one waits for it.

    Raises:
        SettingsError: an argument is not allowed; at the first validation, if `monitor` was not recorded.

    >>> ModelCheckpoint(monitor="val/acc", mode="max", save_top_k=3).save_top_k
    3
    """

    #: Whether the monitored metric may be missing: the default policy looks for "val/loss" where there is one.
    optional = False
    #: Whether a new best is held in memory until the next write is due.
    holds = False

    def __init__(
        self,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        save_top_k: int | None = 1,
        save_last: bool = True,
        every_n_steps: int | None = None,
        every_n_epochs: int | None = None,
        every_seconds: float | None = None,
        filename: str | None = None,
        on_exception: bool = True,
        background: bool = False,
    ) -> None:
        if monitor is not None and (not isinstance(monitor, str) or not monitor):
            raise _wrong("monitor", monitor, "the name of a metric, such as 'val/loss', None")
        if mode not in _MODES:
            raise _wrong("mode", mode, "'min', 'max'" + nearest(str(mode), _MODES))
        if save_top_k is not None and not _integer(save_top_k, 0):
            raise _wrong("save_top_k", save_top_k, "an integer of at least 0, None for all")
        for name, count in (("every_n_steps", every_n_steps), ("every_n_epochs", every_n_epochs)):
            if count is not None and not _integer(count, 1):
                raise _wrong(name, count, "an integer of at least 1, None")
        if every_seconds is not None and not _positive(every_seconds):
            raise _wrong("every_seconds", every_seconds, "a number above 0, None")
        for name, flag in (("save_last", save_last), ("on_exception", on_exception), ("background", background)):
            if not isinstance(flag, bool):
                raise _wrong(name, flag, "True, False")
        if filename is not None:
            _check_filename(filename)
        every = {"every_n_steps": every_n_steps, "every_n_epochs": every_n_epochs, "every_seconds": every_seconds}
        _check_occasions(monitor, save_last, every)
        self.monitor, self.mode, self.save_top_k, self.save_last = monitor, mode, save_top_k, save_last
        self.every_n_steps, self.every_n_epochs, self.every_seconds = every_n_steps, every_n_epochs, every_seconds
        self.filename, self.on_exception, self.background = filename, on_exception, background
        self.begin()

    def begin(self) -> None:
        """Forget an earlier run."""
        #: The checkpoints that stay for their score (without a monitor: for their age), by name, worst or oldest first.
        self.kept: dict[str, float | None] = {}
        #: The newest checkpoint.
        self.last: str | None = None
        #: The `global_step` of each of them.
        self.steps: dict[str, int] = {}
        #: Seconds of training at the last write, or when the run began.
        self.written_at = 0.0
        self._step = 0

    def state_dict(self) -> dict[str, Any]:
        """The kept checkpoints and the last one, by name, and what decides."""
        decides = {"monitor": self.monitor, "mode": self.mode}
        return {"kept": dict(self.kept), "last": self.last, "steps": dict(self.steps)} | decides

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned; scores of another monitor or mode count no more."""
        self.last, self.steps = state["last"], dict(state["steps"])
        same = (self.monitor, self.mode) == (state["monitor"], state["mode"])
        self.kept = dict(state["kept"]) if same else {}
        if not same and any(score is not None for score in state["kept"].values()):
            warn(
                f"the run was begun with ModelCheckpoint(monitor={state['monitor']!r}, mode={state['mode']!r}) and "
                f"goes on with monitor={self.monitor!r}, mode={self.mode!r}: its checkpoints {sorted(state['kept'])} "
                "are no longer kept for their score"
            )

    @property
    def validates(self) -> bool:
        """Whether each validation is an occasion to write: there is a monitor, and no other occasion was named."""
        occasions = (self.every_n_steps, self.every_n_epochs, self.every_seconds)
        return self.monitor is not None and occasions == (None, None, None)

    # ---- when --------------------------------------------------------------------------------------------------------

    def due(self, step: int, epoch: int | None = None, seconds: float = 0.0) -> bool:
        """Whether to write after this step, `seconds` after the beginning of the run.

        `epoch`: the number of finished ones, where one has just ended.
        """
        if self.every_n_steps is not None and step != self._step and step % self.every_n_steps == 0:
            return True
        if self.every_seconds is not None and seconds - self.written_at >= self.every_seconds:
            return True
        every = self.every_n_epochs
        if self.monitor is None and (self.every_n_steps, self.every_seconds, every) == (None, None, None):
            every = 1
        return epoch is not None and every is not None and epoch % every == 0

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """The monitored metric of the validation that has just ended; None without a monitor.

        Raises:
            SettingsError: it was not recorded.
        """
        if self.monitor is None:
            return None
        if self.monitor not in metrics:
            if self.optional:
                return None
            names = ", ".join(sorted(metrics)) or "none"
            hint = nearest(self.monitor, metrics)
            raise SettingsError(
                f"ModelCheckpoint(monitor={self.monitor!r}) was not recorded by the validation; recorded: {names}{hint}"
            )
        return metrics[self.monitor]

    def improves(self, score: float) -> bool:
        """Whether a score is among the `save_top_k` best so far; NaN never is."""
        if math.isnan(score) or self.save_top_k == 0:
            return False
        if self.save_top_k is None or len(self.kept) < self.save_top_k:
            return True
        worst = next(iter(self.kept.values()))
        return worst is None or self._better(score, worst)

    def _better(self, a: float, b: float) -> bool:
        return a < b if self.mode == "min" else a > b

    # ---- which -------------------------------------------------------------------------------------------------------

    def name(self, step: int, epoch: int, metrics: Mapping[str, float]) -> str:
        """The name of a checkpoint's directory; a name that another step has taken gets the step in addition.

        Raises:
            SettingsError: `filename` asks for a metric that was not recorded, or gives no name of a directory.
        """
        from lightdeco.checkpoint.storage import check_name

        if self.filename is None:
            return f"step={step:08d}"
        values = {**metrics, "step": step, "epoch": epoch}
        where, found = f"ModelCheckpoint(filename={self.filename!r})", ""
        for literal, field, spec, conversion in string.Formatter().parse(self.filename):
            found += literal
            if field is None:
                continue
            if field not in values:
                known = ", ".join(sorted(values))
                raise SettingsError(f"{where}: {field!r} was not recorded; known: {known}{nearest(field, values)}")
            try:
                found += f"{_CONVERSIONS[conversion](values[field]):{spec}}"
            except ValueError as error:
                raise SettingsError(f"{where}: {field}={values[field]!r} with {spec!r}: {error}") from error
        if self.steps.get(found, step) != step:
            found += f"-step={step:08d}"
        try:
            check_name(found)
        except CheckpointError as error:
            raise SettingsError(f"{where}: {error}") from error
        return found

    def written(self, name: str, step: int, seconds: float = 0.0) -> None:
        """Take note of a checkpoint that was written, `seconds` after the beginning of the run."""
        self.written_at, self._step, self.last = seconds, step, name
        self.steps = {known: self.steps[known] for known in self.keep(ending=True)}

    def rank(self, name: str, score: float | None, step: int) -> None:
        """Take a checkpoint among those that stay; `score` is None for one that no validation chose."""
        self.steps[name] = step
        if score is None and self.monitor is not None:
            return
        self.kept.pop(name, None)
        if self.monitor is None:
            self.kept[name] = score
        else:  # of equal ones the first is the best, as when only one is kept
            self.kept = dict(sorted({name: score, **self.kept}.items(), key=self._order))
        while self.save_top_k is not None and len(self.kept) > self.save_top_k:
            del self.kept[next(iter(self.kept))]

    def _order(self, item: tuple[str, float | None]) -> float:
        score = item[1]
        assert score is not None
        return -score if self.mode == "min" else score

    def forget(self, name: str) -> None:
        """Drop a checkpoint that could not be written, or is no longer there."""
        self.kept.pop(name, None)
        self.last = None if self.last == name else self.last

    @property
    def best(self) -> tuple[str, float] | None:
        """The name and score of the best one, or None."""
        if self.monitor is None or not self.kept:
            return None
        name, score = list(self.kept.items())[-1]
        return None if score is None else (name, score)

    def keep(self, ending: bool = False) -> set[str]:
        """The names of all that stay; `ending`: the run is over, so that the newest stays whatever the policy."""
        last = {self.last} if self.last is not None and (ending or self.save_last or not self.kept) else set()
        return set(self.kept) | last


class DefaultCheckpoint(ModelCheckpoint):
    """`checkpoint=True`: the last, and the best by val/loss where there is one; written every 30 s at most."""

    optional = True
    holds = True

    def __init__(self) -> None:
        super().__init__(monitor="val/loss", every_seconds=30)


def _integer(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _check_occasions(monitor: str | None, save_last: bool, every: Mapping[str, object]) -> None:
    """Refuse to write what would be removed at once, since it is neither among the best nor kept as the newest."""
    named = [name for name, value in every.items() if value is not None]
    if monitor is not None and not save_last and named:
        given = ", ".join(f"{name}={every[name]!r}" for name in named)
        raise SettingsError(
            f"ModelCheckpoint(monitor={monitor!r}, save_last=False, {given}): what is written then would be removed at "
            f"once: only the best stay, and they are written at each validation; leave {' and '.join(named)} out, or "
            "give save_last=True"
        )


def _check_filename(filename: object) -> None:
    if not isinstance(filename, str) or not filename:
        raise _wrong("filename", filename, "a text such as 'epoch={epoch}', None")
    try:
        for literal, field, spec, conversion in string.Formatter().parse(filename):
            if found := [c for c in literal if c in _FORBIDDEN or c < " "]:
                raise ValueError(f"{found[0]!r} cannot be in the name of a directory")
            if field is not None and (not field or field.isdecimal()):
                raise ValueError("a field needs a name")
            if conversion not in _CONVERSIONS:
                raise ValueError(f"unknown conversion {conversion!r}")
            _check_spec(spec or "")
        if filename.startswith("."):
            raise ValueError("it begins with a dot")
    except ValueError as error:
        raise _wrong("filename", filename, f"a text such as 'epoch={{epoch}}' ({error})") from error


def _check_spec(spec: str) -> None:
    try:
        format(1.0, spec)
    except ValueError:
        format(1, spec)
