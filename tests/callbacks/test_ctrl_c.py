"""Ctrl-C in a real terminal, where the system writes ^C wherever the cursor is: below the bars."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.callbacks.test_progress_bar import _plain, _screen

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = """
    import fcntl, signal, sys, termios, time
    import lightdeco as ld
    from tests.models import Net, batches

    class Slow(Net):
        @ld.training_step
        def step(self, batch):
            time.sleep(0.05)
            return super().step(batch)

    if __name__ == "__main__":
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        settings = {"accelerator": "cpu", "devices": int(sys.argv[1]), "summary": False, "logger": False}
        try:
            ld.fit(Slow(), (batches(2000), batches(3)), max_epochs=9, log_every_n_steps=1, **settings)
        except KeyboardInterrupt:
            print("the end")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="makes a pseudo-terminal the controlling one")
@pytest.mark.parametrize("devices", [1, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("columns", [100, 40])
def test_the_screen_after_ctrl_c(devices: int, columns: int, tmp_path: Path) -> None:
    """Neither ^C nor an old bar stays; what was said and the last line do."""
    import fcntl
    import pty
    import struct
    import termios

    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    main, other = pty.openpty()
    fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    process = subprocess.Popen(
        [sys.executable, "script.py", str(devices)], stdin=other, stdout=other, stderr=other, cwd=tmp_path,
        env=kept | {"TERM": "xterm-256color", "PYTHONPATH": str(ROOT)}, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(other)
    sent, asked = b"", False
    while True:
        try:
            sent += os.read(main, 65536)
        except OSError:  # the other end is closed
            break
        if not asked and re.search(r"step [1-9]", _plain(sent.decode(errors="ignore"))):
            asked = os.write(main, b"\x03") > 0
    os.close(main)
    assert process.wait(timeout=20) == 0
    text = sent.decode()
    assert "^C" in text
    whole = "\n".join(_screen(text, columns))
    assert not set("━─") & set(whole), whole
    assert "^C" not in whole, whole
    lines = whole.replace("\n", "") if columns == 40 else whole
    assert lines.count("stopping after this step; press Ctrl-C again to stop at once") == 1, whole
    assert re.search(r"interrupted: KeyboardInterrupt in epoch ?1/9 after \d+ of [12],000 batches, step", lines), whole
    assert whole.rstrip().endswith("the end")
