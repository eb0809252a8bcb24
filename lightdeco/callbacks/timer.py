"""How long training, validation and test take."""

from collections.abc import Mapping
from time import perf_counter
from typing import TYPE_CHECKING, Final, Literal

from lightdeco.errors import SettingsError, nearest
from lightdeco.marks import (
    on_fit_start,
    on_test_end,
    on_test_epoch_end,
    on_test_start,
    on_train_end,
    on_train_epoch_end,
    on_train_start,
    on_validation_end,
    on_validation_epoch_end,
    on_validation_start,
    teardown,
)

if TYPE_CHECKING:
    from lightdeco.run import Run

Stage = Literal["train", "val", "test"]

_STAGES: Final[tuple[str, ...]] = ("train", "val", "test")


class Timer:
    """Measures the seconds of training, validation and test; the setting `max_time` limits them.

    Time is counted once: a validation inside of training counts as validation alone, the sanity check not at all. It is
    the host's time. Nothing waits for the device, but the end of each epoch does so anyway.

    All runs that the object is given to add up, until a `fit` starts anew; after `load_state_dict` it goes on instead.

    Args:
        log: also log `time/train`, `time/val` and `time/test`, in seconds, with the record of each epoch, validation
            and test.

    Raises:
        SettingsError: `log` is no bool.

    >>> import torch, lightdeco as ld
    >>> class Net(torch.nn.Linear):
    ...     @ld.training_step
    ...     def step(self, batch):
    ...         return self(batch).pow(2).mean()
    ...
    ...     @ld.configure_optimizers
    ...     def optimizers(self):
    ...         return torch.optim.SGD(self.parameters(), lr=0.1)
    >>> timer = Timer()
    >>> quiet = {"logger": False, "progress_bar": False, "summary": False}
    >>> run = ld.fit(Net(2, 1), [torch.ones(4, 2)], max_epochs=3, callbacks=[timer], **quiet)
    >>> timer.elapsed("train") > 0, timer.elapsed("val")
    (True, 0.0)
    """

    def __init__(self, log: bool = False) -> None:
        if not isinstance(log, bool):
            raise SettingsError(f"Timer(log={log!r}); allowed: True, False")
        self.log = log
        self._seconds: dict[str, float] = dict.fromkeys(_STAGES, 0.0)
        # What runs now, and around it what it interrupted: only the last one's time is counted.
        self._running: list[tuple[str, Run]] = []
        self._since = 0.0
        self._loaded = False

    def elapsed(self, stage: Stage = "train") -> float:
        """Seconds spent in "train", "val" or "test" so far, whether it runs now or not.

        Raises:
            SettingsError: there is no such stage.
        """
        if stage not in _STAGES:
            allowed = ", ".join(map(repr, _STAGES))
            raise SettingsError(f"Timer.elapsed({stage!r}); allowed: {allowed}{nearest(str(stage), _STAGES)}")
        self._count()
        return self._seconds[stage]

    def state_dict(self) -> dict[str, float]:
        """The seconds of each stage so far, as plain values."""
        self._count()
        return dict(self._seconds)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Take over what `state_dict` returned: the next `fit` adds to it."""
        self._seconds = {stage: state[stage] for stage in _STAGES}
        self._since = perf_counter()
        self._loaded = True

    def _count(self) -> None:
        """Add the time since the last call to what runs now."""
        now = perf_counter()
        if self._running:
            self._seconds[self._running[-1][0]] += now - self._since
        self._since = now

    @on_fit_start
    def _fit_start(self) -> None:
        if not self._loaded and not self._running:
            self._seconds = dict.fromkeys(_STAGES, 0.0)

    @on_train_start
    @on_validation_start
    @on_test_start
    def _begin(self, run: "Run") -> None:
        if run.stage != "sanity":
            self._count()
            self._running.append((run.stage, run))

    @on_train_end
    @on_validation_end
    @on_test_end
    def _end(self, run: "Run") -> None:
        if run.stage != "sanity":
            self._count()
            self._running.pop()

    @teardown
    def _over(self, run: "Run", stage: str) -> None:
        self._count()
        self._running = [entry for entry in self._running if entry[1] is not run]  # an exception left some
        self._loaded = self._loaded and stage != "fit"

    @on_train_epoch_end
    @on_validation_epoch_end
    @on_test_epoch_end
    def _epoch_end(self, run: "Run") -> None:
        if self.log and run.stage != "sanity":
            self._count()
            run.log(f"time/{run.stage}", self._seconds[run.stage])
