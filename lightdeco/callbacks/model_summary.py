"""The model summary: a table of the parts of a model and their parameters, printed when a fit starts."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightdeco.errors import SettingsError
from lightdeco.marks import on_fit_start

if TYPE_CHECKING:
    from lightdeco.run import Run


@dataclass(frozen=True)
class Row:
    """One line of the summary: a part of the model, with all that lies below it."""

    name: str
    type: str
    parameters: int
    trainable: int
    lazy: bool
    """Some parameters have no shape yet; they are not counted."""


@dataclass(frozen=True)
class Total:
    """The sums over the whole model; what is shared counts once."""

    parameters: int
    trainable: int
    lazy: bool
    megabytes: float
    """Size of the parameters and buffers in 10**6 bytes."""


class ModelSummary:
    """Prints the parts of the model and how many parameters they have, in the main process, when a fit starts.

    Args:
        depth: levels of submodules that are listed, >= 0; with 0 only the sums.

    Raises:
        SettingsError: `depth` is no such integer.
    """

    def __init__(self, depth: int = 1) -> None:
        if not (hasattr(depth, "__index__") and depth >= 0):
            raise SettingsError(f"ModelSummary(depth={depth!r}); allowed: an integer of at least 0")
        self.depth = depth

    @on_fit_start
    def _print(self, run: "Run", model: nn.Module) -> None:
        if run.is_main:
            rows, sums = summarize(model, self.depth), total(model)
            _print_table(rows, sums) if sys.stdout.isatty() else print(text(rows, sums), flush=True)


def summarize(model: nn.Module, depth: int = 1) -> list[Row]:
    """The submodules down to `depth` levels, in order of definition, and the root's own parameters.

    A row counts each of its parameters once, with those of its submodules; rows of different depth overlap.

    >>> summarize(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))[0]
    Row(name='0', type='Linear', parameters=9, trainable=9, lazy=False)
    """
    own = [
        Row(name, type(value).__name__, *_counts([value]))
        for name, value in model.named_parameters(recurse=False)
        if depth > 0
    ]
    return [*own, *_below(model, depth, "")]


def total(model: nn.Module) -> Total:
    """The sums over all parameters; the size in megabytes also counts the buffers.

    >>> total(nn.Linear(9, 10)).parameters
    100
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if not _is_lazy(tensor))
    return Total(*_counts(model.parameters()), size / 1e6)


def text(rows: Iterable[Row], sums: Total) -> str:
    """The table as plain text."""
    lines = [_HEADER, *(_cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEADER))]
    table = [
        f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {count:>{widths[2]}}  {trainable:>{widths[3]}}"
        for name, kind, count, trainable in lines
    ]
    return "\n".join([*(table if len(lines) > 1 else []), totals_line(sums)])


def totals_line(sums: Total) -> str:
    """The sums as one line.

    >>> totals_line(Total(1200, 200, False, 0.0048))
    '1,200 parameters, 200 trainable, 0.0048 MB'
    """
    lazy = " (lazy ones not counted)" if sums.lazy else ""
    return f"{sums.parameters:,} parameters{lazy}, {sums.trainable:,} trainable, {sums.megabytes:,.3g} MB"


_HEADER = ("name", "type", "parameters", "trainable")


def _cells(row: Row) -> tuple[str, str, str, str]:
    if row.lazy and not row.parameters:
        return row.name, row.type, "lazy", "lazy"
    mark = " + lazy" if row.lazy else ""
    return row.name, row.type, f"{row.parameters:,}{mark}", f"{row.trainable:,}{mark}"


def _print_table(rows: Iterable[Row], sums: Total) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*_HEADER[:2], box=None, pad_edge=False)
    for name in _HEADER[2:]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in _cells(row)))  # Text: a "[" in a name is no markup
    console = Console()
    if table.row_count:
        console.print(table)
    console.print(totals_line(sums), style="bold", highlight=False)


def _below(module: nn.Module, depth: int, prefix: str) -> Iterator[Row]:
    if depth <= 0:
        return
    # Not named_children(): it leaves out the second name of a shared module.
    for name, child in module._modules.items():
        if child is not None:
            yield Row(prefix + name, type(child).__name__, *_counts(child.parameters()))
            yield from _below(child, depth - 1, f"{prefix}{name}.")


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int, bool]:
    """The numbers of all and of trainable values, and whether some are lazy."""
    known, lazy = [], False
    for parameter in parameters:
        if _is_lazy(parameter):
            lazy = True
        else:
            known.append(parameter)
    return sum(p.numel() for p in known), sum(p.numel() for p in known if p.requires_grad), lazy


def _is_lazy(tensor: Tensor) -> bool:
    return bool(is_lazy(tensor))
