"""What each logger and `metrics.jsonl` still has after SIGKILL: 200 steps are logged, then the files are read back.

    python benchmarks/logger_kill.py [name …]

Each child logs a record every 10 ms, tells its parent after the last one, and is killed right then, or `--wait` seconds
later. Packages that are missing are left out. Local and offline modes only.
"""

import argparse
import io
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightdeco import loggers
from lightdeco.errors import LoggerError
from lightdeco.loggers.metrics_file import MetricsFile, read

STEPS = 200


def make(name: str, folder: Path) -> object:
    """A logger in its local or offline mode."""
    return {
        "tensorboard": lambda: "tensorboard",
        "csv": lambda: "csv",
        "wandb": lambda: loggers.WandB(mode="offline"),
        "comet": lambda: loggers.Comet(online=False),
        "neptune": lambda: loggers.Neptune(mode="offline"),
        "mlflow": lambda: loggers.MLflow(tracking_uri=f"sqlite:///{folder / 'mlflow.db'}"),
    }[name]()


def child(name: str, folder: Path) -> None:
    """Log until killed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file = MetricsFile(folder / "metrics.jsonl") if name == "metrics.jsonl" else None
        fan = loggers.Loggers(loggers.create(None if file else make(name, folder), folder))
    print("opened", flush=True)
    for step in range(STEPS):
        values = {"train/loss": 1.0 / (step + 1), "step": float(step)}
        if file is not None:
            file.write({"stage": "train", "epoch": 0, "time": time.time(), **values})
        else:
            fan.log_metrics(values, step)
        time.sleep(0.01)
    print("done", flush=True)
    time.sleep(120)


def read_tensorboard(folder: Path) -> int:
    """Steps in the event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return len(events.Scalars("train/loss")) if "train/loss" in events.Tags()["scalars"] else 0


def read_jsonl(folder: Path) -> int:
    """Records of the file that every run writes."""
    return len(read(folder / "metrics.jsonl"))


def read_csv(folder: Path) -> int:
    """Rows of the table."""
    return len((folder / "metrics.csv").read_text().splitlines()) - 1


def read_wandb(folder: Path) -> int:
    """Histories in the `.wandb` file (LevelDB's log format after a header of seven bytes)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (file,) = folder.rglob("*.wandb")
    data, position, parts, found = file.read_bytes(), 7, b"", 0
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            found += Record.FromString(parts).WhichOneof("record_type") == "history"
            parts = b""
    return found


def read_comet(folder: Path) -> int:
    """Metrics in the archive; after a kill it is empty, and what was logged is in a temporary directory."""
    texts = [path.read_bytes() for path in Path(os.environ["TMPDIR"]).rglob("messages.json")]
    for path in folder.rglob("*.zip"):
        with zipfile.ZipFile(path) as archive:
            texts += [archive.read(name) for name in archive.namelist() if name == "messages.json"]
    lines = [line for text in texts for line in io.BytesIO(text) if line.endswith(b"}\n")]
    return sum(
        json.loads(line).get("payload", {}).get("metric", {}).get("metricName") == "train/loss" for line in lines
    )


def read_neptune(folder: Path) -> int:
    """Points in the queue."""
    text, found = "".join(path.read_text() for path in folder.rglob("data-*.log")), 0
    for line in text.splitlines():
        try:
            operation = json.loads(line)["obj"]
        except ValueError:  # torn by the kill
            continue
        found += len(operation.get("values", [])) if operation["path"] == ["train", "loss"] else 0
    return found


def read_mlflow(folder: Path) -> int:
    """Points in the database."""
    import mlflow

    client: Any = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    return len(client.get_metric_history(run.info.run_id, "train/loss"))


READ: dict[str, Callable[[Path], int]] = {
    "metrics.jsonl": read_jsonl,
    "tensorboard": read_tensorboard,
    "csv": read_csv,
    "wandb": read_wandb,
    "comet": read_comet,
    "neptune": read_neptune,
    "mlflow": read_mlflow,
}


def kept_after_kill(name: str, wait: float) -> int:
    """How many of the steps a logger has after its process was killed `wait` seconds after the last one."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder, temporary = Path(place) / "run", Path(place) / "tmp"
        folder.mkdir()
        temporary.mkdir()
        os.environ["TMPDIR"] = str(temporary)
        command = [sys.executable, __file__, "--child", name, "--folder", str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=folder)
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip() == "done":
                break
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        time.sleep(3.0)  # what another process of the vendor does about it
        return READ[name](folder)


def main() -> None:
    """Measure the loggers that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*READ, []])
    parser.add_argument("--wait", type=float, default=0.0)
    parser.add_argument("--child", choices=READ)
    parser.add_argument("--folder", type=Path)
    given = parser.parse_args()
    if given.child:
        child(given.child, given.folder)
        return
    print(f"| logger | of {STEPS} steps kept, killed {given.wait:g} s after the last |\n|---|---|")
    for name in given.names or READ:
        try:
            print(f"| {name} | {kept_after_kill(name, given.wait)} |", flush=True)
        except (ImportError, LoggerError, ValueError, OSError) as error:
            print(f"| {name} | not measured: {error} |", flush=True)


if __name__ == "__main__":
    main()
