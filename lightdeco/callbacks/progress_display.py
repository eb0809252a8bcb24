"""Where a progress bar is shown: bars on a terminal, or plain lines."""

import math
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, TaskID


class Display(Protocol):
    """The place where a progress bar is shown."""

    #: Seconds between two drawings at least; inf where single batches are not shown.
    refresh_s: float

    def train(self, title: str, done: int, total: int | None, values: str) -> None:
        """Show a training epoch: `done` of `total` batches (None: not known), and values as a text."""

    def evaluate(self, title: str, done: int, total: int | None) -> None:
        """Show an evaluation, below the training if there is one."""

    def draw(self) -> None:
        """Bring to the screen what was given since the last time."""

    def end_evaluation(self) -> None:
        """Remove the evaluation."""

    def epoch_line(self, text: str) -> None:
        """Show how an epoch ended, where lines stay."""

    def close(self, last: str = "", values: str = "") -> None:
        """Remove all bars, then print the last line, and before it the values if no line of an epoch shows them."""


def display(refresh_s: float) -> Display:
    """Bars when stdout is a terminal that can move its cursor, else lines."""
    if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        return Bars(refresh_s)
    return Lines()


class Bars:
    """One bar for training, one for an evaluation, and a line of values, redrawn in place with rich.

    rich's own refresh thread stays off: nothing is drawn but in `draw`, which takes about 3 ms.
    """

    def __init__(self, refresh_s: float) -> None:
        from rich.console import Console
        from rich.live import Live

        self.refresh_s = refresh_s
        self._progress = _progress()
        self._train = self._progress.add_task("", visible=False, times="")
        self._evaluation = self._progress.add_task("", visible=False, times="")
        self._title = ""
        self._values = ""
        self._live = Live(
            console=Console(), get_renderable=self._render, auto_refresh=False, transient=True, vertical_overflow="crop"
        )
        self._live.start()

    def train(self, title: str, done: int, total: int | None, values: str) -> None:
        """Set the training bar; a new title starts it anew."""
        if title != self._title:
            self._title = title
            self._progress.reset(self._train, description=title, total=total, visible=True)
            self._set_total(self._train, total)
        self._values = values
        self._advance(self._train, done)

    def evaluate(self, title: str, done: int, total: int | None) -> None:
        """Set the evaluation bar."""
        if not self._progress.tasks[self._evaluation].visible:
            self._progress.reset(self._evaluation, description=title, total=total, visible=True)
            self._set_total(self._evaluation, total)
        self._advance(self._evaluation, done)

    def draw(self) -> None:
        """Redraw everything in place."""
        self._live.refresh()

    def end_evaluation(self) -> None:
        """Hide the evaluation bar with the next drawing."""
        self._progress.update(self._evaluation, visible=False)

    def epoch_line(self, text: str) -> None:
        """Nothing: bars do not pile up."""

    def close(self, last: str = "", values: str = "") -> None:
        """Remove the bars, give the terminal its cursor back, and print the last lines."""
        self._live.stop()
        for line in (values, last):
            if line:
                print(line, flush=True)

    def _set_total(self, task: "TaskID", total: int | None) -> None:
        # reset() takes None for "as before".
        self._progress.tasks[task].total = total

    def _advance(self, task: "TaskID", done: int) -> None:
        self._progress.update(task, completed=done)
        state = self._progress.tasks[task]
        elapsed, left, speed = state.elapsed, state.time_remaining, state.speed
        texts = [f"{speed:.4g} it/s"] if speed else []
        texts += [str(timedelta(seconds=int(elapsed)))] if elapsed is not None else []
        texts += [f"{timedelta(seconds=int(left))} left"] if left is not None else []
        self._progress.update(task, times="  ".join(texts))

    def _render(self) -> "RenderableType":
        from rich.console import Group
        from rich.text import Text

        values = [Text(self._values, style="dim", no_wrap=True, overflow="ellipsis")] if self._values else []
        return Group(self._progress, *values)


def _progress() -> "Progress":
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[times]}", style="progress.elapsed"),
        auto_refresh=False,
        expand=True,
    )


class Lines:
    """Plain lines: for each of the first epochs, then for ever fewer; 20 for a thousand epochs."""

    refresh_s = math.inf

    def __init__(self, first: int = 8) -> None:
        self._first = first
        self._epochs = self._printed = 0
        self._next = self._interval = 1

    def train(self, title: str, done: int, total: int | None, values: str) -> None:
        """Nothing: single batches are not shown."""

    def evaluate(self, title: str, done: int, total: int | None) -> None:
        """Nothing: single batches are not shown."""

    def draw(self) -> None:
        """Nothing."""

    def end_evaluation(self) -> None:
        """Nothing."""

    def epoch_line(self, text: str) -> None:
        """Print the line of an epoch, if it is its turn; after the first ones the interval doubles with each line."""
        self._epochs += 1
        if self._epochs < self._next:
            return
        print(text, flush=True)
        self._printed += 1
        if self._printed >= self._first:
            self._interval *= 2
        self._next += self._interval

    def close(self, last: str = "", values: str = "") -> None:
        """Print the last line."""
        if last:
            print(last, flush=True)
