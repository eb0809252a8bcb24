"""The model summary: a table of the parts of a model, printed when a fit starts."""

import math
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightdeco.dtensor import numel
from lightdeco.errors import SettingsError
from lightdeco.marks import on_fit_start

from .summary_forward import Forward, Measured, measure
from .summary_table import show

if TYPE_CHECKING:
    from lightdeco.run import Run


_LETTERS = ("", "k", "M", "G", "T")


@dataclass(frozen=True)
class Row:
    """One line of the summary: a part of the model, with all that lies below it."""

    name: str
    type: str
    parameters: int
    trainable: int
    lazy: bool
    """Some parameters have no shape yet; they are not counted."""
    megabytes: float
    """Size of the parameters and buffers in 10**6 bytes."""
    measured: Measured | None = None
    """What a forward showed of this part; None where there was none, or it did not call it."""


class ModelSummary:
    """Prints the parts of the model, their parameters and sizes, in the main process, when a fit starts.

    A model with an attribute `example_input` also gets the shapes of what goes into and comes out of each part, and
    the floating point operations of one forward (of matrix products, convolutions and attention, counted by torch).
    It is a tensor (`forward(x)`), a tuple (`forward(*x)`) or a dict (`forward(**x)`). The forward runs once on every
    process, in eval mode, without gradients; random state, modes and buffers are put back. Anything else that a
    `forward` changes stays changed. Without the attribute nothing is run, and no batch is read.

    Args:
        depth: levels of submodules that are listed, >= 0; with 0 only the sums.

    Raises:
        SettingsError: `depth` is no such integer.

    >>> ModelSummary(depth=2).depth
    2
    """

    def __init__(self, depth: int = 1) -> None:
        if not (hasattr(depth, "__index__") and depth >= 0):
            raise SettingsError(f"ModelSummary(depth={depth!r}); allowed: an integer of at least 0")
        self.depth = depth

    @on_fit_start
    def _print(self, run: "Run", model: nn.Module) -> None:
        forward = measure(model, run.device, run.accelerator)  # everywhere: a forward may wait for other processes
        if run.is_main:
            rows = summarize(model, self.depth, forward.parts)
            show([_cells(row) for row in rows], totals_lines(total(model), forward), sys.stdout)


def summarize(model: nn.Module, depth: int = 1, measured: Mapping[int, Measured] | None = None) -> list[Row]:
    """The submodules down to `depth` levels, in order of definition, and the root's own parameters.

    A row counts each of its parameters once, with those of its submodules; rows of different depth overlap.
    `measured` is what `measure` found, by the `id` of the module.

    >>> summarize(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))[0]
    Row(name='0', type='Linear', parameters=9, trainable=9, lazy=False, megabytes=3.6e-05, measured=None)
    """
    own = [
        Row(name, type(value).__name__, *_counts([value]), _megabytes([value]))
        for name, value in model.named_parameters(recurse=False)
        if depth > 0
    ]
    return [*own, *_below(model, depth, "", measured or {})]


def total(model: nn.Module) -> Row:
    """The sums over the whole model, what is shared counted once.

    >>> total(nn.Linear(9, 10)).parameters
    100
    """
    return _row("", model, {})


def totals_lines(sums: Row, forward: Forward | None = None) -> list[str]:
    """The sums as a line, and a second one about the forward where there was one.

    >>> totals_lines(Row("", "Net", 1200, 200, False, 0.0048))
    ['1,200 parameters, 200 trainable, 0.0048 MB']
    """
    lazy = " (lazy ones not counted)" if sums.lazy else ""
    line = f"{sums.parameters:,} parameters{lazy}, {sums.trainable:,} trainable, {size(sums.megabytes)} MB"
    if forward is None:
        return [line]
    if forward.flops is not None:
        line += f", {operations(forward.flops)}FLOPs for example_input"
    return [line, f"(shapes unknown: {forward.failure})"] if forward.failure else [line]


def size(megabytes: float) -> str:
    """Megabytes with three digits.

    >>> size(0.000524), size(1234.5), size(0.0)
    ('0.000524', '1,234', '0')
    """
    return f"{megabytes:,.0f}" if megabytes >= 1000 else f"{megabytes:.3g}"


def operations(flops: int) -> str:
    """A number of operations with three digits and the letter of its thousands.

    >>> operations(352), operations(1_234_567), operations(2 * 10**15)
    ('352 ', '1.23 M', '2,000 T')
    """
    power = min(4, max(0, math.floor(math.log10(flops) / 3))) if flops else 0
    value = flops / 1000**power
    return f"{value:,.0f} {_LETTERS[power]}" if value >= 1000 else f"{value:.3g} {_LETTERS[power]}"


def _cells(row: Row) -> dict[str, str]:
    """The cells by the name of their column; columns without any content are left out by the table."""
    lazy = row.lazy and not row.parameters
    mark = " + lazy" if row.lazy else ""
    cells = {
        "name": row.name,
        "type": row.type,
        "input": "",
        "output": "",
        "calls": "",
        "parameters": "lazy" if lazy else f"{row.parameters:,}{mark}",
        "trainable": "lazy" if lazy else f"{row.trainable:,}{mark}",
        "MB": "lazy" if lazy else size(row.megabytes),
        "FLOPs": "",
    }
    if row.measured is not None:
        cells["input"], cells["output"] = row.measured.input, row.measured.output
        cells["calls"] = str(row.measured.calls) if row.measured.calls > 1 else ""
        cells["FLOPs"] = operations(row.measured.flops).strip() if row.measured.flops else ""
    return cells


def _below(module: nn.Module, depth: int, prefix: str, measured: Mapping[int, Measured]) -> Iterator[Row]:
    if depth <= 0:
        return
    # Not named_children(): it leaves out the second name of a shared module.
    for name, child in module._modules.items():
        if child is not None:
            yield _row(prefix + name, child, measured)
            yield from _below(child, depth - 1, f"{prefix}{name}.", measured)


def _row(name: str, module: nn.Module, measured: Mapping[int, Measured]) -> Row:
    megabytes = _megabytes([*module.parameters(), *module.buffers()])
    return Row(name, type(module).__name__, *_counts(module.parameters()), megabytes, measured.get(id(module)))


def _counts(parameters: Iterable[nn.Parameter]) -> tuple[int, int, bool]:
    """The numbers of all and of trainable values, and whether some are lazy."""
    known, lazy = [], False
    for parameter in parameters:
        if _is_lazy(parameter):
            lazy = True
        else:
            known.append(parameter)
    return sum(map(numel, known)), sum(numel(p) for p in known if p.requires_grad), lazy


def _megabytes(tensors: Iterable[Tensor]) -> float:
    return sum(numel(tensor) * tensor.element_size() for tensor in tensors if not _is_lazy(tensor)) / 1e6


def _is_lazy(tensor: Tensor) -> bool:
    return bool(is_lazy(tensor))
