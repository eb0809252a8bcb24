"""The parts of `find_batch_size`: which size to try next, and what is seen of a trial."""

from collections.abc import Iterator
from typing import Any

from lightdeco.data import batch_size_of
from lightdeco.errors import DataError, LightdecoError
from lightdeco.marks import on_train_batch_start, on_train_epoch_end, on_train_start
from lightdeco.roles import SKIP_EPOCH
from lightdeco.run import Run


class Probe:
    """A callback that ends a trial after some updates and a validation, and sees how much data there are.

    Attributes:
        batches: training batches of an epoch, None when unknown.
        seen: samples in the first training batch, None when unknown.
    """

    def __init__(self, steps: int) -> None:
        self._steps = steps
        self.batches: int | None = None
        self.seen: int | None = None
        self.read = False

    @on_train_start
    def _begin(self, run: Run) -> None:
        self.batches, self.seen, self.read = run.num_train_batches, None, False

    @on_train_batch_start
    def _look(self, batch: Any, run: Run) -> object:
        size = batch_size_of(batch)
        if not self.read:
            self.seen, self.read = size, True
        # A short last batch says nothing about memory; of a single sample, it may be more than BatchNorm can bear.
        short = size is not None and self.seen is not None and size < self.seen and run.global_step > 0
        # The end of an epoch brings the validation; max_steps would end the run before it.
        return SKIP_EPOCH if short or run.global_step >= self._steps else None

    @on_train_epoch_end
    def _end(self, run: Run) -> None:
        run.should_stop = run.should_stop or run.global_step >= self._steps or run.epoch + 1 >= self._steps


class Hunt:
    """The sizes to try: twice as much until one does not fit, and with "binsearch" those in between.

    Iterate over it, and `report` each size before the next one is taken.

    Args:
        start: the first size; where it does not fit, halves of it follow.
        samples: the largest size that makes sense, or None where it is not known.
        reads: whether nobody knows that the data follow the size, so that it has to be checked.
        where: what the size is written on, for messages.
    """

    def __init__(self, start: int, mode: str, max_trials: int, samples: int | None, reads: bool, where: str) -> None:
        self._start = start if samples is None else max(1, min(start, samples))
        self._mode, self._max_trials, self._samples = mode, max_trials, samples
        self._reads, self._where = reads, where
        self._good = 0
        self._bad: int | None = None
        self._whole = False  # all samples fit in one batch
        self._problem = ""
        self._last: tuple[int, int | None, int | None] | None = None

    def __iter__(self) -> Iterator[int]:
        """The next size to try, given what was reported."""
        size = self._start
        for _ in range(self._max_trials):
            yield size
            following = self._next()
            if following is None:
                return
            size = following

    def _next(self) -> int | None:
        if self._whole:
            return None
        if self._bad is None:
            doubled = 2 * self._good
            return doubled if self._samples is None else min(doubled, self._samples)
        if self._good == 0:
            return self._bad // 2 or None
        if self._mode == "power" or self._bad - self._good <= 1:
            return None
        return (self._good + self._bad) // 2

    def report(self, size: int, problem: str | None, probe: Probe) -> None:
        """Take note of a trial; `problem` is the message of the error when the memory did not suffice.

        Raises:
            DataError: the batches did not change with the size.
        """
        if probe.read:
            self._refuse_unread(size, probe)
        if problem is not None:
            self._bad, self._problem = size, problem
            return
        if self._samples is not None:
            self._whole = size >= self._samples
        elif probe.batches == 1 or (probe.batches is None and (probe.seen or size) < size):
            self._whole = True
            size = probe.seen if probe.seen is not None and self._good < probe.seen < size else size
        self._good = size

    def _refuse_unread(self, size: int, probe: Probe) -> None:
        before, self._last = self._last, (size, probe.batches, probe.seen)
        if not self._reads or before is None or probe.seen is None or 2 * min(size, before[0]) > max(size, before[0]):
            return
        if before[1:] == (probe.batches, probe.seen) and probe.batches != 1:
            raise DataError(
                f"{self._where} was {before[0]} and then {size}, but the first training batch had {probe.seen} samples "
                f"both times: the loaders do not read it; make them with DataLoader(…, batch_size=self.…)"
            )

    def found(self) -> int:
        """The largest size that fits.

        Raises:
            LightdecoError: none does.
        """
        if self._good:
            return self._good
        tried = f"down to {self._bad}" if self._bad != self._start else f"of {self._bad}"
        more = "" if self._bad == 1 else "; give a larger max_trials or a smaller start"
        raise LightdecoError(
            f"no batch size fits into memory, {tried}: {' '.join(self._problem.split())[:200]!r}{more}; a smaller "
            "model, shorter inputs or precision='bf16-mixed' need less"
        )
