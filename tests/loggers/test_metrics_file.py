"""metrics.jsonl: strict JSON lines that survive crashes and full disks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lightdeco.errors import LightdecoWarning, LoggerError
from lightdeco.loggers.metrics_file import MetricsFile, read


def _refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is no strict JSON")


def test_records_come_back_and_every_line_is_strict_json(tmp_path: Path) -> None:
    """NaN and infinities are written as texts and read as numbers; the stage stays a text."""
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    record = {"stage": "NaN", "epoch": 0, "step": 1, "a": math.inf, "b": -math.inf, "c": 0.1, "d": math.nan}
    file.write(record)
    file.write({"stage": "val", "x": torch.tensor(2.5), "y": numpy.float32(math.nan), "z": torch.tensor(3)})
    lines = path.read_text().splitlines()  # flushed: read before close
    for line in lines:
        json.loads(line, parse_constant=_refuse)
    first, second = read(path)
    assert math.isnan(float(str(first.pop("d"))))
    assert first == {key: value for key, value in record.items() if key != "d"}
    assert (second["x"], second["z"]) == (2.5, 3)
    file.close()


def test_a_torn_last_line_is_ignored_and_cut_off(tmp_path: Path) -> None:
    """After a crash within a write, the whole lines are read, and a new file object continues after them."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert read(path) == [{"step": 1}, {"step": 2}]
    file = MetricsFile(path)
    file.write({"step": 3})
    file.close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_a_long_torn_line_is_cut_off(tmp_path: Path) -> None:
    """The last newline is found when it is far from the end of the file."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"x" * 200_000)
    MetricsFile(path).close()
    assert path.read_bytes() == b'{"step": 1}\n'


def test_a_wrong_line_in_the_middle_is_an_error(tmp_path: Path) -> None:
    """A line that is no record is not passed over in silence; the message says which line."""
    path = tmp_path / "metrics.jsonl"
    for wrong in ("{", "[1]"):
        path.write_text(f'{{"step": 1}}\n{wrong}\n{{"step": 3}}\n')
        with pytest.raises(LoggerError, match="line 2 is no JSON"):
            read(path)


def test_cut_goes_back_to_a_size(tmp_path: Path) -> None:
    """`cut(size)` brings the file back to the moment when it had that size."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    size = file.size
    file.write({"step": 2})
    file.cut(size)
    file.cut(10**6)
    file.write({"step": 3})
    file.close()
    assert [record["step"] for record in read(file.path)] == [1, 3]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_full_disk_is_one_warning() -> None:
    """A write without space warns once and does not raise; later ones are silent."""
    file = MetricsFile("/dev/full")
    with pytest.warns(LightdecoWarning, match="could not be written.*training goes on") as caught:
        file.write({"step": 1})
    file.write({"step": 2})
    assert len(caught) == 1
    file.close()


def test_a_half_written_line_is_repaired_by_the_next_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a full disk took of a line is cut off when there is space again."""
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1})
    real: Any = file._lines._file

    class Full:
        def write(self, data: bytes) -> int:
            return int(real.write(data[:4]))

        def truncate(self, size: int) -> int:
            return int(real.truncate(size))

    with monkeypatch.context() as patch:
        patch.setattr(file._lines, "_file", Full())
        with pytest.warns(LightdecoWarning, match="only 4 of 12 bytes"):
            file.write({"step": 2})
    assert file.path.read_bytes() == b'{"step": 1}\n{"st'
    file.write({"step": 3})
    file.close()
    assert file.path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'


def test_a_directory_that_is_missing_is_an_error(tmp_path: Path) -> None:
    """A file that cannot be opened is an error at once."""
    with pytest.raises(LoggerError, match="cannot be written"):
        MetricsFile(tmp_path / "missing" / "metrics.jsonl")
