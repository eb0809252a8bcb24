"""What every test gets: a directory of its own to run in, one thread, and marks that know the machine."""

import importlib.util
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` or `xla` where there is no such device."""
    missing = {}
    if not torch.cuda.is_available():
        missing["gpu"] = "needs a CUDA device"
    if os.environ.get("LIGHTDECO_TEST_ACCELERATOR") not in ("tpu", "xla"):
        missing["xla"] = "needs LIGHTDECO_TEST_ACCELERATOR=tpu and torch_xla: scripts/test_xla.sh"
    elif importlib.util.find_spec("torch_xla") is None:
        raise pytest.UsageError("LIGHTDECO_TEST_ACCELERATOR asks for XLA, and torch_xla is not installed")
    for item in items:
        for mark, reason in missing.items():
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def ctrl_c() -> None:
    """SIGINT interrupts, also where the tests were started in the background of a shell, which has it ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """One thread: small models are faster with it, and sums have one order on every machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run in a temporary directory, so that the default `root_dir="runs"` never writes into the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
