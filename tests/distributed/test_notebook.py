"""`fit(devices=2)` in a cell of a real Jupyter kernel."""

import importlib.util
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

_NEEDED = [name for name in ("ipykernel", "jupyter_client", "cloudpickle") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(_NEEDED), reason=f"needs {', '.join(_NEEDED)} for a kernel and its classes"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]

CLASSES = """
    import os
    from pathlib import Path
    import torch
    from torch import nn
    import lightdeco as ld

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        @ld.training_step
        @ld.validation_step
        def step(self, batch):
            x, y = batch
            return nn.functional.mse_loss(self.layer(x).squeeze(1), y)

        @ld.predict_step
        def infer(self, batch):
            return self.layer(batch[0])

        @ld.configure_optimizers
        def sgd(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Counter:
        count = 0

        @ld.on_train_batch_end
        def add(self, run):
            self.count += 1
            if self.count == 3:
                Path(f"pid-{run.rank}").write_text(str(os.getpid()))

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    x = torch.randn(96, 3)
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1)), batch_size=8)
    quiet = {"devices": 2, "accelerator": "cpu", "summary": False}
"""


class Kernel:
    """A kernel, and what its cells gave."""

    def __init__(self, client: Any, manager: Any) -> None:
        self.client, self.manager = client, manager

    def run(self, code: str) -> tuple[str, str]:
        """What a cell wrote to stdout and stderr, and the name and text of its error."""
        written: list[str] = []

        def hear(message: Any) -> None:
            written.append(message["content"].get("text", ""))

        reply = self.client.execute_interactive(dedent(code), timeout=120, output_hook=hear)["content"]
        return "".join(written), f"{reply['ename']}: {reply['evalue']}" if reply["status"] == "error" else ""


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A new kernel of this interpreter."""
    from jupyter_client.manager import start_new_kernel

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("PYTEST_CURRENT_TEST")  # a kernel in a test does not pass on what its processes write
    manager, client = start_new_kernel(startup_timeout=60)
    try:
        yield Kernel(client, manager)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def _pids(folder: Path) -> list[int]:
    limit = time.monotonic() + 60
    while len(found := [path for path in folder.glob("pid-*") if path.read_text()]) < 2:
        assert time.monotonic() < limit
        time.sleep(0.05)
    return [int(path.read_text()) for path in found]


def _gone(pids: list[int]) -> bool:
    limit = time.monotonic() + 5
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < limit:
        time.sleep(0.05)
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_cells_train_on_two_processes(kernel: Kernel) -> None:
    """Classes and callbacks of cells travel; bar, warnings, errors come to the cell; weights and states come back."""
    assert kernel.run(CLASSES)[1] == ""
    written, error = kernel.run("""
        counter, model = Counter(), Line().eval()
        before = model.layer.weight.detach().clone()
        run = ld.fit(model, (data, data), max_epochs=2, seed=5, callbacks=[counter], **quiet)
        print("steps", run.global_step, "counted", counter.count, "moved", not torch.equal(model.layer.weight, before))
    """)
    assert error == ""
    assert "steps 12 counted 12 moved True" in written
    assert "finished: max_epochs reached after 2 epochs, 12 steps" in written
    assert written.count("Line was in eval mode") == 1
    assert "ipykernel_" in next(line for line in written.splitlines() if "Line was in eval mode" in line)
    written, error = kernel.run("print('outputs', len(list(ld.predict(model, data, **quiet))))")
    assert (error, "outputs 12" in written) == ("", True)
    _, error = kernel.run("""
        class Bad(Line):
            @ld.training_step
            def step(self, batch, run):
                if run.rank == 1:
                    raise ValueError("no good")
                return super().step(batch)

        ld.fit(Bad(), data, max_epochs=1, **quiet)
    """)
    assert error.startswith("ValueError: no good")


def test_interrupting_a_cell_saves_the_run(kernel: Kernel, own_directory: Path) -> None:
    """The kernel's "interrupt" is a Ctrl-C: saved, `KeyboardInterrupt` in the cell, no process left; it works on."""
    assert kernel.run(CLASSES)[1] == ""
    kernel.client.execute('ld.fit(Line(), data, max_epochs=10**6, callbacks=[Counter()], name="run", **quiet)')
    pids = _pids(own_directory)
    kernel.manager.interrupt_kernel()
    reply = kernel.client.get_shell_msg(timeout=60)["content"]
    assert reply["ename"] == "KeyboardInterrupt"
    assert _gone(pids)
    assert len(list((own_directory / "runs" / "run" / "checkpoints").glob("step=*"))) == 1
    written, error = kernel.run("print(ld.fit(Line(), data, max_epochs=1, **quiet).global_step)")
    assert (error, written.splitlines()[-1]) == ("", "6")


def test_a_kernel_that_is_killed_leaves_no_process(kernel: Kernel, own_directory: Path) -> None:
    """ "Restart" and "shutdown" of a notebook, in the midst of a cell."""
    assert kernel.run(CLASSES)[1] == ""
    kernel.client.execute("ld.fit(Line(), data, max_epochs=10**6, callbacks=[Counter()], **quiet)")
    pids = _pids(own_directory)
    kernel.manager.shutdown_kernel(now=True)
    assert _gone(pids)
