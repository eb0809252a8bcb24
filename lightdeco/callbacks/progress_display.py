"""Where a progress bar is shown: bars in a terminal or a notebook, plain lines elsewhere."""

import os
import sys
from collections.abc import Sequence
from typing import Protocol

from .progress_layout import Bar, plain


class Display(Protocol):
    """The place where a progress bar is shown."""

    #: Seconds until the next drawing at least.
    pause_s: float

    def draw(self, bars: Sequence[Bar], facts: Sequence[str]) -> None:
        """Show the bars instead of those before, and below them facts such as "train/loss 0.5"."""

    def epoch_line(self, text: str) -> None:
        """Show how an epoch ended, where lines stay."""

    def close(self, last: str = "", values: str = "") -> None:
        """Remove all bars, then print the last line, and before it the values if no line of an epoch shows them."""


def display(refresh_s: float) -> Display:
    """One live output in a notebook, bars when stdout is a terminal that can move its cursor, else lines."""
    if in_notebook():
        from .progress_notebook import Notebook

        return Notebook(refresh_s)
    if sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        from .progress_terminal import Terminal

        return Terminal(refresh_s)
    return Lines()


def in_notebook() -> bool:
    """Whether this code runs in a cell of Jupyter (or Colab); imports nothing.

    >>> in_notebook()
    False
    """
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return any(kind.__name__ == "ZMQInteractiveShell" for kind in type(shell).__mro__)


class Lines:
    """Plain lines: for each of the first epochs, then for ever fewer; 20 for a thousand epochs.

    An epoch or an evaluation that takes long gets lines of its own: after a minute, 3, 7, 15, … minutes of the run.
    """

    def __init__(self, first: int = 8, pause_s: float = 60.0) -> None:
        self.pause_s = pause_s
        self._first = first
        self._epochs = self._printed = 0
        self._next = self._interval = 1
        self._begun = False

    def draw(self, bars: Sequence[Bar], facts: Sequence[str]) -> None:
        """Print a line, and wait twice as long for the next one; the very first drawing prints nothing."""
        if self._begun:
            print(plain(bars, facts), flush=True)
            self.pause_s *= 2
        self._begun = True

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
