"""How the model summary looks: columns in a terminal's width, or as plain text."""

import os
from collections.abc import Mapping, Sequence
from typing import Final, TextIO

from .progress_layout import shortened

_RIGHT: Final = frozenset({"calls", "parameters", "trainable", "MB", "FLOPs"})
#: Where the terminal is too narrow for all columns, these go, in this order.
_DISPENSABLE: Final = ("input", "MB", "trainable", "calls", "FLOPs", "output")
#: Cells are cut to this before a column goes, and names and types further only when none is left to go.
_CUT: Final = {"input": 18, "output": 18, "name": 16, "type": 12}

Cells = Mapping[str, str]


def show(rows: Sequence[Cells], notes: Sequence[str], file: TextIO) -> None:
    """Print the table and the lines below it: cut to the width of a terminal, in full anywhere else."""
    if not file.isatty() or os.environ.get("TERM", "") == "dumb":
        print("\n".join([*table(rows), *notes]), file=file, flush=True)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(file=file)
    header, *lines = table(rows, console.width) or [""]
    if lines:
        console.print(Text(header, style="bold"), soft_wrap=True)
    for line, row in zip(lines, rows, strict=True):
        frozen = row.get("trainable") == "0" != row.get("parameters")
        console.print(Text(line, style="dim" if frozen else ""), soft_wrap=True)
    for i, note in enumerate(notes):
        console.print(Text(note, style="dim" if i else "bold"))


def table(rows: Sequence[Cells], columns: int | None = None) -> list[str]:
    """The header and a line for each row, no wider than `columns`; empty columns are left out.

    >>> table([{"name": "body", "type": "Linear", "input": ""}, {"name": "a", "type": "ReLU", "input": ""}])
    ['name  type', 'body  Linear', 'a     ReLU']
    """
    if not rows:
        return []
    names = [name for name in rows[0] if any(row[name] for row in rows)]
    widths = {name: max(len(name), *(len(row[name]) for row in rows)) for name in names}
    if columns is not None:
        _narrow(widths, columns)
    lines = [dict(zip(widths, widths, strict=True)), *rows]
    return ["  ".join(_aligned(line[name] or "-", name, widths[name]) for name in widths).rstrip() for line in lines]


def _aligned(text: str, name: str, width: int) -> str:
    if name in ("input", "output") and len(text) > width:  # of several shapes the first tells most
        text = text[: width - 1] + "…"
    text = shortened(text, width)
    return text.rjust(width) if name in _RIGHT else text.ljust(width)


def _narrow(widths: dict[str, int], columns: int) -> None:
    """Take columns away, and make names and types shorter, until the table fits."""

    def excess() -> int:
        return sum(widths.values()) + 2 * (len(widths) - 1) - columns

    for name in _DISPENSABLE:
        if excess() <= sum(max(0, widths.get(cut, 0) - least) for cut, least in _CUT.items()):
            break
        widths.pop(name, None)
    for leasts in (_CUT, {"name": 4, "type": 4}):
        for cut, least in leasts.items():
            if cut in widths:
                widths[cut] -= min(max(0, widths[cut] - least), max(0, excess()))
