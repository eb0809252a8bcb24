"""Offline and local loggers reach for no network, seen in a process of its own from its first import on."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import socket, sys

tried = []
connect, lookup = socket.socket.connect, socket.getaddrinfo

def watched(self, address):
    if self.family != socket.AF_UNIX:
        tried.append(address)
        raise OSError("no network")
    return connect(self, address)

def looked_up(*given, **named):
    tried.append(given)
    raise OSError("no network")

socket.socket.connect, socket.getaddrinfo = watched, looked_up

from pathlib import Path
from lightdeco import loggers

made = {
    "wandb": lambda: loggers.WandB(mode="offline"),
    "comet_ml": lambda: loggers.Comet(online=False),
    "neptune": lambda: loggers.Neptune(mode="offline"),
    "mlflow": lambda: loggers.MLflow(tracking_uri="sqlite:///mlflow.db"),
}[sys.argv[1]]()
fan = loggers.Loggers(loggers.create(made, Path.cwd()))
fan.log_hparams({"lr": 0.1})
fan.log_metrics({"x": 1.0}, 1)
fan.close("finished")
print("tried", tried)
"""


@pytest.mark.parametrize("package", ["wandb", "comet_ml", "neptune", "mlflow"])
def test_no_address_is_tried(package: str, tmp_path: Path) -> None:
    """From import to close, no connection is tried and no name looked up: telemetry and error reports are off too."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", CODE, package],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "tried []"
