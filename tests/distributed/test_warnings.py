"""Warnings of verbs that start processes: each once, at the caller's line; under a launcher, from rank 0 alone."""

import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs processes on the CPU")

SCRIPT = """
    import sys
    import warnings
    from tests.models import QUIET, Net, batches
    import lightdeco as ld

    class Other(Net):
        validation_step = check = None

        def on_train_end(self):
            pass

    if __name__ == "__main__":
        devices = {"devices": 2} if sys.argv[1] == "start" else {}
        model = Other().eval()
        ld.fit(model, (batches(4), batches(2)), max_epochs=1, checkpoint=False, accelerator="cpu", **QUIET, **devices)
        ld.validate(Net(), batches(2), max_epochs=3, accelerator="cpu", progress_bar=False, **devices)
"""

#: What is said of the script above, and of which call.
SAID = {
    "has the name of a role but is not decorated; add @ld.on_train_end": "ld.fit",
    "val data was given, but Other marks no @validation_step": "ld.fit",
    "Other was in eval mode": "ld.fit",
    "max_epochs=3 has no effect in ld.validate": "ld.validate",
}


@pytest.mark.parametrize("how", ["start", "join"])
def test_a_warning_comes_once_at_the_line_of_the_caller(how: str, tmp_path: Path) -> None:
    """Those of planning, which both sides do, and those of the run, which starts elsewhere."""
    script = tmp_path / "script.py"
    script.write_text(dedent(SCRIPT).lstrip())
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"] if how == "join" else []
    ended = subprocess.run(
        [sys.executable, *torchrun, str(script), how],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    said = [line for line in ended.stderr.splitlines() if "LightdecoWarning" in line]
    lines = script.read_text().splitlines()
    for text, call in SAID.items():
        number = next(i for i, line in enumerate(lines, 1) if call in line)
        found = [each for each in said if text in each]
        assert [each.startswith(f"{script}:{number}: ") for each in found] == [True], (text, ended.stderr)
    assert len(said) == len(SAID), ended.stderr
