"""What bars look like in a given number of columns. Pure functions: nothing here touches a screen."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.text import Text

#: Columns of a bar at least; where there is less room, other columns go first, in this order, and then the bar.
_SHORTEST = 8
_DISPENSABLE = ("seconds", "rate", "left")
#: Lines of facts at most: however many values are logged, the screen stays bounded.
_MAX_FACT_LINES = 3


@dataclass(frozen=True)
class Bar:
    """What one bar says: `done` of `total` batches (None: not known), and how long that took."""

    title: str
    done: int
    total: int | None
    seconds: float
    """Since the bar began."""
    rate: float | None
    """Batches per second, once it is known."""

    @property
    def left_s(self) -> float | None:
        """Seconds until the end, where total and rate are known."""
        return None if self.total is None or not self.rate else max(0, self.total - self.done) / self.rate


def drawing(bars: Sequence[Bar], facts: Sequence[str], columns: int, ascii_only: bool = False) -> "Text":
    """The bars, one line each with their parts below each other, and the facts in at most three lines.

    No line is wider than `columns`; a narrow screen loses time, rate, time left and the bar, in this order.
    """
    from rich.text import Text

    cells = [_cells(bar, columns // 2) for bar in bars]
    widths = {name: max(len(cell[name]) for cell in cells) for name in cells[0]} if cells else {}
    shown = _fitting(widths, columns)
    room = columns - sum(width + 2 for width in shown.values() if width)
    lines = []
    for bar, cell in zip(bars, cells, strict=True):
        line = Text(cell["title"].ljust(shown["title"]))
        if room >= _SHORTEST and any(bar.total for bar in bars):
            line.append("  ").append(_bar(bar, room, ascii_only))
        line.append("  " + cell["count"].rjust(shown["count"]))
        for name in ("rate", "seconds", "left"):
            if shown.get(name):
                line.append("  " + cell[name].rjust(shown[name]), style="dim")
        lines.append(line)
    lines += [Text(line, style="dim") for line in packed(facts, columns)]
    for line in lines:
        line.rstrip()
        line.truncate(columns)
    return Text("\n").join(lines)


def plain(bars: Sequence[Bar], facts: Sequence[str]) -> str:
    """One line of text for the innermost bar and the facts, for files."""
    cell = _cells(bars[-1], 1000) if bars else {}
    return "  ".join([*(part for part in cell.values() if part), *facts])


def packed(facts: Sequence[str], columns: int) -> list[str]:
    """The facts in lines of at most `columns`, long ones cut in the middle, and how many found no room.

    >>> packed(["step 10", "train/loss 0.25", "a/very/long/name 0.5"], 16)
    ['step 10', 'train/loss 0.25', 'a/very/l…ame 0.5']
    """
    lines: list[list[str]] = [[]]
    for i, fact in enumerate(facts):
        fact = shortened(fact, columns)
        if _width([*lines[-1], fact]) <= columns:
            lines[-1].append(fact)
        elif len(lines) < _MAX_FACT_LINES:
            lines.append([fact])
        else:
            lines[-1] = _with_rest(lines[-1], len(facts) - i, columns)
            break
    return ["  ".join(line) for line in lines if line]


def _with_rest(line: list[str], missing: int, columns: int) -> list[str]:
    """The line with the number of facts that found no room at its end."""
    while len(line) > 1 and _width([*line, f"… {missing} more"]) > columns:
        line, missing = line[:-1], missing + 1
    more = f"… {missing} more"
    return [*line[:-1], shortened(line[-1], columns - _width([*line[:-1], "", more])), more]


def _width(parts: Sequence[str]) -> int:
    return sum(map(len, parts)) + 2 * max(0, len(parts) - 1)


def shortened(text: str, columns: int) -> str:
    """The text, its middle cut out where it is longer than `columns`: names begin and end with what tells them apart.

    >>> shortened("encoder.layers.11.attention", 15)
    'encoder…tention'
    """
    if len(text) <= columns:
        return text
    tail = (columns - 1) // 2
    return text[: max(0, columns - 1 - tail)] + "…" + text[len(text) - tail :] if columns > 0 else ""


def clock(seconds: float) -> str:
    """A time as minutes and seconds, with hours and days where it takes as long.

    >>> clock(9.7), clock(3725), clock(200_000)
    ('0:09', '1:02:05', '2 d 7:33:20')
    """
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days} d {hour}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def speed(rate: float, unit: str = "it/s", inverse: str = "s/it") -> str:
    """Batches per second, or seconds per batch when that is more than one.

    >>> speed(1234.5), speed(12.34), speed(0.25)
    ('1,234 it/s', '12.3 it/s', '4 s/it')
    """
    if rate >= 1:
        return f"{rate:,.0f} {unit}" if rate >= 100 else f"{rate:.3g} {unit}"
    return f"{1 / rate:,.3g} {inverse}" if rate else f"0 {unit}"


def _cells(bar: Bar, title: int) -> dict[str, str]:
    left = bar.left_s
    return {
        "title": shortened(bar.title, title),
        "count": f"{bar.done:,} batches" if bar.total is None else f"{bar.done:,}/{bar.total:,}",
        "rate": speed(bar.rate) if bar.rate else "",
        "seconds": clock(bar.seconds),
        "left": "" if left is None else f"{clock(left)} left",
    }


def _fitting(widths: dict[str, int], columns: int) -> dict[str, int]:
    """The columns for which there is room beside the shortest bar."""
    shown = dict(widths)
    for name in _DISPENSABLE:
        if sum(width + 2 for width in shown.values() if width) + _SHORTEST <= columns:
            break
        shown.pop(name, None)
    return shown


def _bar(bar: Bar, columns: int, ascii_only: bool) -> "Text":
    from rich.text import Text

    if not bar.total:
        return Text(" " * columns)
    full = columns * min(bar.done, bar.total) // bar.total
    done, rest = ("#", "-") if ascii_only else ("━", "─")  # told apart without colours too
    return Text().append(done * full, style="green").append(rest * (columns - full), style="dim")
