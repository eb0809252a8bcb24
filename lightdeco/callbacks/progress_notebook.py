"""Bars in a notebook: one output of the cell, replaced at each drawing."""

import io
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .progress_layout import Bar, drawing

if TYPE_CHECKING:
    from rich.text import Text

_COLUMNS = 100
_HTML = '<pre style="white-space:pre;overflow-x:auto;line-height:normal">{code}</pre>'


class Notebook:
    """One live output below the cell; the saved notebook keeps what it showed last, the final lines."""

    def __init__(self, refresh_s: float) -> None:
        self.pause_s = refresh_s
        self._ipython = import_module("IPython.display")
        self._handle: Any = None

    def draw(self, bars: Sequence[Bar], facts: Sequence[str]) -> None:
        """Replace the output."""
        self._show(drawing(bars, facts, _COLUMNS))

    def epoch_line(self, text: str) -> None:
        """Nothing: bars do not pile up."""

    def close(self, last: str = "", values: str = "") -> None:
        """Replace the bars by the last lines."""
        from rich.text import Text

        lines = [line for line in (values, last) if line]
        if lines or self._handle is not None:
            self._show(Text("\n".join(lines)))

    def _show(self, text: "Text") -> None:
        content = _bundle(text)
        if self._handle is None:
            self._handle = self._ipython.display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


def _bundle(text: "Text") -> dict[str, str]:
    """The text as HTML and, for what shows no HTML, as it is."""
    from rich.console import Console

    console = Console(
        file=io.StringIO(),
        record=True,
        width=_COLUMNS,
        force_terminal=True,
        force_jupyter=False,
        color_system="standard",
    )
    if console.no_color:
        text = text.copy()
        text.spans.clear()
    console.print(text, soft_wrap=True, highlight=False, end="")
    return {"text/html": console.export_html(inline_styles=True, code_format=_HTML), "text/plain": text.plain}
