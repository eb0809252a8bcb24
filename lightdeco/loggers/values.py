"""What may be shown besides numbers: checked at the call, and copied there, since it may change afterwards.

Every logger gets the same plain forms: images and figures as uint8 arrays (height, width, 1, 3 or 4 channels),
histograms as NumPy arrays, texts as str, tables as dicts of columns.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy
import torch

from lightdeco.errors import LoggerError, StepError

if TYPE_CHECKING:
    from PIL.Image import Image

Array = numpy.ndarray[Any, Any]


def check_name(function: str, name: object) -> None:
    """Refuse a name that is no text.

    Raises:
        StepError: says what is allowed.
    """
    if not isinstance(name, str) or not name:
        raise StepError(f"ld.{function} got the name {name!r}; allowed: a str that is not empty")


def check(function: str, name: str, value: object) -> None:
    """Refuse a value that `log_image`, `log_figure`, `log_histogram`, `log_text` or `log_table` cannot show.

    It costs microseconds for a tensor on any device, whose values are not read.

    Raises:
        StepError: says what is allowed.
    """
    check_name(function, name)
    problem = _PROBLEM[function](value)
    if problem:
        raise StepError(f"ld.{function}({name!r}) got {problem}; allowed: {ALLOWED[function]}")


def check_file(path: object) -> Path:
    """The path of an artifact.

    Raises:
        StepError: it is no path, or nothing is there.
    """
    if not isinstance(path, (str, Path)):
        raise StepError(f"ld.log_artifact got a {type(path).__name__}; allowed: the path of a file or a directory")
    if not Path(path).exists():
        raise StepError(f"ld.log_artifact({str(path)!r}): there is no such file or directory; write it first")
    return Path(path)


def plain(function: str, value: object) -> object:
    """A copy of a checked value in the form that loggers get; waits for the device that holds it."""
    return _PLAIN[function](value)


def array(value: Any) -> Array:
    """The values of a tensor on any device, an array or a list of numbers, as an array."""
    if isinstance(value, torch.Tensor):
        tensor = value.detach().cpu()
        return numpy.array((tensor.float() if tensor.is_floating_point() else tensor).numpy())  # no bfloat16 there
    return numpy.array(value)


def finite(value: Any) -> Array:
    """The finite values of a tensor or array, flat."""
    values = array(value)
    return values[numpy.isfinite(values)]


def image(value: Any) -> Array:
    """An image as uint8 (height, width, channels); floats are taken as 0..1.

    Raises:
        LoggerError: the shape is that of no image.
    """
    picture = array(value)
    if picture.ndim == 2:
        picture = picture[:, :, None]
    elif picture.ndim == 3 and picture.shape[0] in (1, 3, 4):
        picture = picture.transpose(1, 2, 0)
    if picture.ndim != 3 or picture.shape[2] not in (1, 3, 4):
        raise LoggerError(
            f"an image of the shape {picture.shape}; allowed: HxW, CxHxW or HxWxC with 1, 3 or 4 channels"
        )
    if picture.dtype == bool or not numpy.issubdtype(picture.dtype, numpy.integer):
        picture = numpy.nan_to_num(picture.astype(numpy.float32)) * 255 + 0.5
    return numpy.ascontiguousarray(numpy.clip(picture, 0, 255), dtype=numpy.uint8)


def figure(value: Any) -> Array:
    """A matplotlib figure drawn as an image, or an image as it is; the figure stays open and keeps its canvas."""
    from PIL import Image

    if not hasattr(value, "savefig"):
        return image(value)
    with io.BytesIO() as file:
        value.savefig(file, format="png")
        return numpy.array(Image.open(file).convert("RGB"))


def picture(value: Any) -> "Image":
    """A figure or an image for Pillow."""
    from PIL import Image

    pixels = figure(value)
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def table(value: Any) -> dict[str, list[Any]]:
    """The columns of a dict of columns, a list of dicts or a data frame; a cell that a row lacks is None.

    Raises:
        LoggerError: it is none of these, or its columns differ in length.
    """
    if hasattr(value, "columns") and not isinstance(value, Mapping):
        value = {name: list(value[name]) for name in value.columns}
    if isinstance(value, Sequence) and all(isinstance(row, Mapping) for row in value):
        names = list(dict.fromkeys(name for row in value for name in row))
        value = {name: [row.get(name) for row in value] for name in names}
    if not isinstance(value, Mapping) or isinstance(value, str):
        raise LoggerError(f"a {type(value).__name__}")
    columns = {str(name): [_cell(cell) for cell in _cells(cells)] for name, cells in value.items()}
    if len({len(cells) for cells in columns.values()}) > 1:
        raise LoggerError(f"columns of different lengths ({ {name: len(cells) for name, cells in columns.items()} })")
    return columns


def markdown(value: Any) -> str:
    """A table in markdown."""
    columns = table(value)
    rows = zip(*columns.values(), strict=True)
    lines = [list(columns), ["---"] * len(columns), *(["" if cell is None else cell for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(_escaped(cell) for cell in line) + " |" for line in lines)


def flat(hparams: Mapping[str, object], prefix: str = "") -> dict[str, str | float | bool]:
    """Hyperparameters without nesting, named `outer.inner`: numbers, texts and bools; lists and None become text."""
    found: dict[str, str | float | bool] = {}
    for key, value in hparams.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{key}."))
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, str | bool | int | float) else str(value)
    return found


class Extremes:
    """The least and greatest value of each validation metric so far, NaN left out."""

    def __init__(self) -> None:
        self._least: dict[str, float] = {}
        self._greatest: dict[str, float] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Take note of a record; of its metrics only those that begin with "val/"."""
        for name, value in metrics.items():
            if name.startswith("val/") and value == value:
                self._least[name] = min(value, self._least.get(name, value))
                self._greatest[name] = max(value, self._greatest.get(name, value))

    def named(self) -> dict[str, float]:
        """`min/val/…` and `max/val/…` by name."""
        least = {f"min/{name}": value for name, value in self._least.items()}
        return least | {f"max/{name}": value for name, value in self._greatest.items()}


def _cells(cells: Any) -> list[Any]:
    if isinstance(cells, torch.Tensor | numpy.ndarray):
        return list(array(cells).tolist())
    if isinstance(cells, str) or not hasattr(cells, "__iter__"):
        raise LoggerError(f"a column that is a {type(cells).__name__}")
    return list(cells)


def _cell(cell: Any) -> Any:
    """A number, text, bool or None; one element of a tensor or array becomes a number, the rest its text."""
    if isinstance(cell, torch.Tensor | numpy.ndarray | numpy.generic) and numpy.prod(cell.shape) == 1:
        cell = cell.item()
    return cell if cell is None or isinstance(cell, str | bool | int | float) else str(cell)


def _escaped(cell: object) -> str:
    return str(cell).replace("|", "\\|").replace("\n", " ")


def _sharded(value: object) -> str:
    spread = hasattr(value, "full_tensor")  # reading it would wait for the other processes, which do not log
    return "a tensor that is spread over processes (call full_tensor() on all of them first)" if spread else ""


def _image_problem(value: Any) -> str:
    if not isinstance(value, torch.Tensor | numpy.ndarray):
        return f"a {type(value).__name__}"
    shape = tuple(value.shape)
    fits = len(shape) == 2 or (len(shape) == 3 and (shape[0] in (1, 3, 4) or shape[2] in (1, 3, 4)))
    return _sharded(value) or ("" if fits and 0 not in shape else f"a {type(value).__name__} of the shape {shape}")


def _figure_problem(value: Any) -> str:
    return "" if callable(getattr(value, "savefig", None)) else f"a {type(value).__name__}"


def _histogram_problem(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return _sharded(value) or (f"a tensor of {value.dtype}" if value.is_complex() else "")
    if isinstance(value, numpy.ndarray | list | tuple):
        kind = numpy.asarray(value).dtype
        return "" if kind.kind in "biuf" else f"values of the type {kind}"
    return f"a {type(value).__name__}"


def _text_problem(value: object) -> str:
    return "" if isinstance(value, str) else f"a {type(value).__name__}"


def _table_problem(value: object) -> str:
    try:
        table(value)
    except LoggerError as error:
        return str(error)
    return ""


ALLOWED: Final = {
    "log_image": "a tensor or array, HxW, CxHxW or HxWxC with 1, 3 or 4 channels, floats in 0..1 or uint8",
    "log_figure": "a matplotlib figure",
    "log_histogram": "a tensor, array or list of numbers",
    "log_text": "a str",
    "log_table": "a dict of columns of one length, a list of dicts, or a data frame",
}
_PROBLEM: Final[Mapping[str, Callable[[Any], str]]] = {
    "log_image": _image_problem,
    "log_figure": _figure_problem,
    "log_histogram": _histogram_problem,
    "log_text": _text_problem,
    "log_table": _table_problem,
}
_PLAIN: Final[Mapping[str, Callable[[Any], object]]] = {
    "log_image": image,
    "log_figure": figure,
    "log_histogram": array,
    "log_text": str,
    "log_table": table,
}
