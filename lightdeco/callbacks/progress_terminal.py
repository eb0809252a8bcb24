"""Bars in a terminal, redrawn in place.

rich lays out and colours; drawing is done here and not by `rich.live.Live`, which leaves lines behind when a terminal
is made narrower, wraps what the user prints, and sends stderr to stdout even where stderr is a file.
"""

import mmap
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from lightdeco import signals

from .progress_layout import Bar, drawing


class Terminal:
    """Bars at the bottom of a terminal, drawn with one write; what is printed meanwhile goes above them.

    The cursor stays visible and rests below the bars, so that nothing has to be repaired after a killed run.
    """

    def __init__(self, refresh_s: float) -> None:
        from rich.console import Console

        self.pause_s = refresh_s
        self._file = sys.stdout
        self._console = Console(file=self._file)
        self._drawn = _Drawn()
        self._answers = signals.answers()
        self._stdout = sys.stdout = _Above(self, sys.stdout)
        # A stderr that is not the terminal stays what it is.
        self._stderr = _Above(self, sys.stderr) if sys.stderr.isatty() else None
        if self._stderr is not None:
            sys.stderr = self._stderr

    def draw(self, bars: Sequence[Bar], facts: Sequence[str]) -> None:
        """Redraw everything in place; takes about 1 ms."""
        console = self._console
        size = console.size
        text = drawing(bars, facts, size.width - 1, console.options.ascii_only)
        lines = text.split("\n")[: max(1, size.height - 1)]
        erase = self._erase()
        with console.capture() as captured:
            for line in lines:
                console.print(line, soft_wrap=True, highlight=False)
        self._drawn.put(captured.get(), [line.cell_len for line in lines])
        self._send(erase + captured.get())

    def epoch_line(self, text: str) -> None:
        """Nothing: bars do not pile up."""

    def close(self, last: str = "", values: str = "") -> None:
        """Remove the bars, give stdout and stderr back, and print the last lines."""
        self.step_aside()
        if sys.stdout is self._stdout:
            sys.stdout = self._file
        if self._stderr is not None and sys.stderr is self._stderr:
            sys.stderr = self._stderr.stream
        for line in (values, last):
            if line:
                self._send(line + "\n")

    def above(self, stream: TextIO, text: str) -> None:
        """Write whole lines to the stream, above the bars."""
        if stream is self._file:
            self._send(self._erase() + text + self._drawn.get()[0])
            return
        self._send(self._erase())
        stream.write(text)
        stream.flush()
        self._send(self._drawn.get()[0])

    def step_aside(self) -> None:
        """Remove the bars until the next drawing, which begins where the cursor is then."""
        self._send(self._erase())
        self._drawn.put("", [])
        for above in (self._stdout, self._stderr):
            if above is not None:
                above.release()

    def _erase(self) -> str:
        # Most terminals wrap what is on the screen anew when they get narrower: a line then takes several rows.
        widths, answered = self._drawn.get()[1], signals.answers() - self._answers
        self._answers += answered
        again = ""
        if answered and widths and os.isatty(2):  # written below the bars, and below the ^C of the terminal
            widths = [*widths, *[len("^C"), len(signals.STOPPING)] * answered]
            again = f"{signals.STOPPING}\n" * answered
        rows = sum(max(1, -(-width // self._console.width)) for width in widths)
        return f"\x1b[{rows}A\r\x1b[J{again}" if rows else ""

    def _send(self, text: str) -> None:
        encoding = self._file.encoding or "utf-8"
        self._file.write(text.encode(encoding, "replace").decode(encoding))
        self._file.flush()


class _Drawn:
    """What is on the screen now, and how wide its lines are; data workers that were forked see it when they print."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 1 << 20)  # shared with forked processes; only what is written takes room

    def put(self, drawn: str, widths: Sequence[int]) -> None:
        content = f"{' '.join(map(str, widths))}\n{drawn}".encode()
        self._memory[: len(content) + 1] = content + b"\0"

    def get(self) -> tuple[str, list[int]]:
        widths, _, drawn = self._memory[: self._memory.find(b"\0")].decode().partition("\n")
        return drawn, [int(width) for width in widths.split()]


class _Above:
    """Stands for stdout or stderr while bars are shown: its lines go above them, a begun line waits for its end."""

    def __init__(self, terminal: Terminal, stream: TextIO) -> None:
        self._terminal, self.stream = terminal, stream
        self._begun = ""

    def write(self, text: str) -> int:
        whole, newline, rest = text.rpartition("\n")
        if newline:
            self._terminal.above(self.stream, self._begun + whole + "\n")
            self._begun = rest
        else:
            self._begun += text
        return len(text)

    def writelines(self, lines: Sequence[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self.stream.flush()

    def fileno(self) -> int:
        # Asked for by `input`, debuggers and subprocesses: they write past this object.
        self._terminal.step_aside()
        return self.stream.fileno()

    def release(self) -> None:
        """Write the begun line as it is."""
        begun, self._begun = self._begun, ""
        if begun:
            self.stream.write(begun)
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)
