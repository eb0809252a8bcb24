"""What the tests of vendors' loggers share: no network, and one training that shows every kind of value."""

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightdeco as ld
from lightdeco import current
from tests.models import Net, batches

HPARAMS = {"lr": 0.1, "api_key": "abc", "net": {"sizes": [1, 2], "none": None}, "url": "http://me:word@host/x"}


class Showing(Net):
    """Shows a value of each kind that it is told to, once per epoch."""

    def __init__(self, kinds: str) -> None:
        super().__init__()
        self.kinds = kinds.split()

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return {"loss": super().step(batch), "none": float("nan")}

    @ld.on_train_epoch_end
    def show(self, run: ld.Run) -> None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(2, 1), dpi=50)
        figure.add_subplot().plot([1, 2])
        kept = run.dir / "kept.txt"
        kept.write_text("kept")
        shown = {
            "image": torch.eye(6, 5),
            "figure": figure,
            "histogram": torch.tensor([1.0, 2.0, 2.0, float("nan")]),
            "text": f"*epoch* {run.epoch}",
            "table": {"name": ["x", "y"], "value": [1, torch.tensor(2.5)]},
        }
        for kind in self.kinds:
            if kind == "artifact":
                current.log_artifact(kept)
            else:
                getattr(current, f"log_{kind}")(f"shown/{kind}", shown[kind])


Train = Callable[..., ld.Run]


@pytest.fixture
def train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """Trains for two epochs of four batches with a logger, in `tmp_path`, where no address can be reached."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX:
            raise OSError(f"this test reaches for {address}")
        connect(self, address)

    def refuse(*given: object, **named: object) -> Any:
        raise OSError(f"this test looks up {given[:2]}")

    monkeypatch.setattr(socket.socket, "connect", local_only)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)

    def run(logger: object, kinds: str = "image figure histogram text table artifact", **more: Any) -> ld.Run:
        settings = {"max_epochs": 2, "log_every_n_steps": 1, "hparams": HPARAMS, "root_dir": tmp_path / "runs"}
        quiet = {"progress_bar": False, "summary": False, "num_sanity_val_steps": 0}
        data = batches(), batches(2)
        return ld.fit(Showing(kinds), data, logger=logger, **quiet | settings | more)  # type: ignore[arg-type]

    return run


def curves(run: ld.Run, finite: bool = False) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each metric of a run, NaN as the text "nan" so that lists can be compared."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for record in run.history:
        for name, value in record.items():
            if name not in ("stage", "epoch", "step", "time") and not (finite and value != value):
                found.setdefault(name, []).append((record["step"], value if value == value else "nan"))
    return found
