"""The CSV logger: always a whole table."""

import csv
import math
from pathlib import Path

import pytest

from lightdeco.errors import LoggerError
from lightdeco.loggers import CSV


def _table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_grow_and_rows_stay(tmp_path: Path) -> None:
    """A new metric adds a column; earlier rows get an empty cell; each row is on disk at once."""
    logger = CSV()
    logger.open(tmp_path)
    assert _table(tmp_path / "metrics.csv") == []
    logger.log_metrics({"train/loss": 0.5}, 1)
    assert _table(tmp_path / "metrics.csv") == [{"step": "1", "train/loss": "0.5"}]
    logger.log_metrics({'a,"b"': math.nan}, 2)
    logger.log_metrics({"train/loss": math.inf}, 3)
    logger.close("finished")
    assert _table(tmp_path / "metrics.csv") == [
        {"step": "1", "train/loss": "0.5", 'a,"b"': ""},
        {"step": "2", "train/loss": "", 'a,"b"': "nan"},
        {"step": "3", "train/loss": "inf", 'a,"b"': ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_the_table_is_continued_and_cut(tmp_path: Path) -> None:
    """Opened again, the logger appends to its table, without a torn row and without the rows after the cut."""
    path = tmp_path / "metrics.csv"
    path.write_text("step,x\n10,1.0\n20,2.0\n30,3.0\n4")
    logger = CSV(tmp_path)
    logger.open(tmp_path / "elsewhere")
    logger.cut(20)
    logger.log_metrics({"x": 5.0}, 25)
    logger.close("finished")
    assert path.read_text() == "step,x\n10,1.0\n20,2.0\n25,5.0\n"
    assert not (tmp_path / "elsewhere").exists()


def test_another_file_in_its_place_is_refused(tmp_path: Path) -> None:
    """A table of somebody else is not overwritten."""
    (tmp_path / "metrics.csv").write_text("name,age\nme,3\n")
    with pytest.raises(LoggerError, match="no table of this logger"):
        CSV().open(tmp_path)


def test_a_closed_logger_says_so() -> None:
    """Logging without a run is an error that says what to do."""
    with pytest.raises(LoggerError, match="not open"):
        CSV().log_metrics({"x": 1.0}, 1)


def test_one_object_serves_two_runs(tmp_path: Path) -> None:
    """The same object in a second run writes that run's file and leaves the first one as it was."""
    logger = CSV()
    for name in ("one", "two"):
        logger.open(tmp_path / name)
        logger.log_metrics({name: 1.0}, 1)
        logger.close("finished")
    assert (tmp_path / "one" / "metrics.csv").read_text() == "step,one\n1,1.0\n"
    assert (tmp_path / "two" / "metrics.csv").read_text() == "step,two\n1,1.0\n"
