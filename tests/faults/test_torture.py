"""The battery of kills, each case once; `torture.py` alone runs it for as long as one likes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, sends signals and reads /proc")
def test_every_case_is_survived() -> None:
    """Killed, damaged or full: what is resumed ends as if it had never stopped. The table is shown if not."""
    command = [sys.executable, "tests/faults/torture.py", "--tries", "1", "--seed", "3"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr[-3000:]}"
    assert "| all |" in ended.stdout
