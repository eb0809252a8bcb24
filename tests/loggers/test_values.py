"""The plain forms in which every logger gets what it shows."""

from typing import Any

import numpy
import pytest
import torch

from lightdeco.errors import LoggerError, StepError
from lightdeco.loggers import values


def test_tables_of_each_form_are_columns() -> None:
    """Dicts of columns, lists of dicts and data frames become the same plain columns; a missing cell is None."""

    class Frame:  # as pandas' and Polars'
        columns = ("a", "b")

        def __getitem__(self, name: str) -> Any:
            return {"a": numpy.array([1, 2]), "b": ["x", None]}[name]

    plain = {"a": [1, 2], "b": ["x", None]}
    assert values.table({"a": torch.tensor([1, 2]), "b": ["x", None]}) == plain
    assert values.table([{"a": numpy.int64(1), "b": "x"}, {"a": torch.tensor([2])}]) == plain
    assert values.table(Frame()) == plain
    assert all(type(cell) is int for cell in values.table(Frame())["a"])
    assert values.table([]) == values.table({}) == {}
    assert values.table({1: [torch.zeros(2)]}) == {"1": ["tensor([0., 0.])"]}


def test_a_table_is_shown_as_markdown() -> None:
    """Bars and line breaks in cells do not break the table."""
    assert values.markdown({"a|b": ["x\ny", None]}) == "| a\\|b |\n| --- |\n| x y |\n|  |"


@pytest.mark.parametrize("name", ["", None, 5])
def test_a_name_is_a_text(name: object) -> None:
    """Anything but a text that is not empty is refused."""
    with pytest.raises(StepError, match="log_text got the name"):
        values.check("log_text", name, "x")  # type: ignore[arg-type]


def test_a_spread_tensor_is_refused() -> None:
    """A tensor whose parts are on several processes would make the main process wait for ever."""

    class Spread(torch.Tensor):
        def full_tensor(self) -> torch.Tensor:
            raise AssertionError

    for function in ("log_image", "log_histogram"):
        with pytest.raises(StepError, match="spread over processes"):
            values.check(function, "x", torch.zeros(3, 3).as_subclass(Spread))


def test_arrays_are_copies() -> None:
    """Tensors of every type, also with gradients, become arrays that share nothing with them."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool):
        given = torch.ones(3, dtype=dtype)
        copied = values.array(given)
        given.zero_()
        assert copied.tolist() == [1, 1, 1]
    assert values.array(torch.ones(2, requires_grad=True)).tolist() == [1, 1]
    assert values.finite([[1.0, float("inf")], [float("nan"), 2.0]]).tolist() == [1, 2]


def test_an_image_of_another_shape_is_refused() -> None:
    """The error names the shape and what is allowed."""
    with pytest.raises(LoggerError, match=r"shape \(2, 3, 5\); allowed: HxW"):
        values.image(torch.zeros(2, 3, 5))


def test_extremes_are_of_validation_and_without_nan() -> None:
    """Least and greatest are kept for metrics of validations; NaN counts for neither."""
    extremes = values.Extremes()
    for value in (2.0, float("nan"), 1.0, 3.0):
        extremes.add({"val/loss": value, "train/loss": value})
    assert extremes.named() == {"min/val/loss": 1.0, "max/val/loss": 3.0}
