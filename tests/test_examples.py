"""The examples run as a user runs them, and the hand-written loop ends in the same weights."""

import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lightdeco as ld

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def start(*arguments: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run an example in a process and a directory of its own; warnings are errors there as well."""
    command = [sys.executable, "-W", "error", *arguments]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def load(name: str) -> ModuleType:
    """An example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_digits_reaches_its_accuracy_and_leaves_its_files(tmp_path: Path) -> None:
    """The main job, run as the README says, gets 97 % of the test images right and leaves every file it promises."""
    done = start(str(EXAMPLES / "digits.py"), folder=tmp_path)
    assert done.returncode == 0, done.stderr
    found = re.search(r"test accuracy ([\d.]+)%; .* are in (\S+)", done.stdout)
    assert found, done.stdout
    assert float(found[1]) >= 97
    folder = tmp_path / found[2]
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path for path in folder.rglob("events.out.tfevents*") if path.stat().st_size > 1000]
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    accuracies = [record["val/acc"] for record in records if record.get("stage") == "val"]
    assert len(accuracies) == 30
    assert accuracies[-1] > 0.95


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_digits_equals_plain_pytorch(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """lightdeco and the loop written by hand end in the same weights, bit for bit, with shuffling and augmentation."""
    digits, plain = load("digits"), load("plain_pytorch")
    by_hand, accuracy_by_hand = plain.main(["--epochs", "2", "--model", kind])
    # The command line has no switch for the device: the comparison is one of CPUs.
    train_loader, val_loader, test_loader = digits.make_loaders()
    ld.seed_everything(digits.SEED)
    model = digits.Digits(2 * len(train_loader), kind)
    run = ld.fit(model, (train_loader, val_loader), max_epochs=2, seed=digits.SEED, accelerator="cpu")
    ours, theirs = model.state_dict(), by_hand.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert ld.test(model, test_loader, accelerator="cpu")["test/acc"] == pytest.approx(accuracy_by_hand)
    last = capsys.readouterr().out.split("epoch 1: loss ")[1]
    assert f"{run.metrics['val/loss']:.4f}" == last[:6]


def test_digits_shown_shows_each_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Figure, images, histograms and tables are there for each epoch; a logger that cannot show them says so."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sys.path.insert(0, str(EXAMPLES))  # as it is when the file is run
    try:
        shown = load("digits_shown")
        with pytest.warns(ld.LightdecoWarning, match="the logger 'csv' has no log_"):
            _, run = shown.main(["--epochs", "2", "--logger", "tensorboard", "csv", "--root-dir", str(tmp_path)])
    finally:
        sys.path.remove(str(EXAMPLES))
    events = EventAccumulator(str(run.dir), size_guidance={"images": 0, "tensors": 0}).Reload()
    assert [event.step for event in events.Images("val/confusion")] == [38, 76]
    assert (events.Images("val/confusion")[0].width, events.Images("val/misread")[0].width) == (500, 400)
    assert events.Tags()["histograms"] == ["weights/net.1.weight", "weights/net.3.weight", "weights/net.6.weight"]
    table = events.Tensors("val/predictions/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert table.startswith("| image | is | read as | sure |")
    assert len(table.splitlines()) == 2 + 32
    assert "train/grad_norm/net.3" in run.metrics
    assert "validation accuracy" in capsys.readouterr().out


def write_mnist(folder: Path, num_train: int, num_test: int) -> None:
    """Files of MNIST's format with random images, where torchvision looks for them."""
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for name, count in (("train", num_train), ("t10k", num_test)):
        images = torch.randint(0, 256, (count, 28, 28), generator=generator, dtype=torch.uint8)
        labels = torch.randint(0, 10, (count,), generator=generator, dtype=torch.uint8)
        header = struct.pack(">iiii", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.numpy().tobytes())
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">ii", 0x801, count) + labels.numpy().tobytes())


def test_mnist_data_gives_the_loaders_of_every_verb(tmp_path: Path) -> None:
    """The data object trains, validates, tests and predicts: each sample of each split once."""
    mnist = load("mnist")
    write_mnist(tmp_path, num_train=96, num_test=40)
    data, model = mnist.MNISTData(str(tmp_path), batch_size=16, num_val=32), mnist.Net()
    quiet = ld.Settings(progress_bar=False, summary=False, logger=False, accelerator="cpu")
    run = ld.fit(model, data, settings=quiet, max_epochs=2)
    assert run.global_step == 2 * 64 // 16
    assert {"train/loss", "train/acc", "val/loss", "val/acc"} <= set(run.metrics)
    assert set(ld.test(model, data, settings=quiet)) == {"test/loss", "test/acc"}
    outputs = list(ld.predict(model, data, settings=quiet))
    assert [len(output) for output in outputs] == [16, 16, 8]


def test_mnist_without_a_network_names_the_other_example(tmp_path: Path) -> None:
    """Where MNIST cannot be downloaded, the example ends with status 1 and one line that says what to run instead."""
    # A proxy that refuses at once makes the download fail on every machine, with a network or without.
    refuses = "http://127.0.0.1:9"
    done = start(str(EXAMPLES / "mnist.py"), folder=tmp_path, http_proxy=refuses, https_proxy=refuses, no_proxy="")
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert "could not be downloaded" in done.stderr
    assert "examples/digits.py" in done.stderr


def test_both_forms_of_the_gan_end_in_the_same_weights(tmp_path: Path) -> None:
    """Two marked steps and a manual one, with dropout, noise, clipping and schedules: bit for bit."""
    gan = load("gan")
    ends = [
        gan.main(["--form", form, "--epochs", "3", "--root-dir", str(tmp_path / form)]) for form in ("marked", "manual")
    ]
    (marked, run), (manual, other) = ends
    ours, theirs = marked.state_dict(), manual.state_dict()
    assert list(ours) == list(theirs)
    assert [key for key in ours if not torch.equal(ours[key], theirs[key])] == []
    assert run.global_step == other.global_step == 3 * 29
    assert {"train/gen/loss", "train/disc/loss"} <= set(run.metrics)


def test_the_character_model_learns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The loss goes down by more than a half of a nat, an update is made for each part, and a sample is printed."""
    run = load("char_rnn").main(["--epochs", "2", "--root-dir", str(tmp_path)])
    losses = [record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record]
    assert losses[1] < losses[0] - 0.5
    assert run.global_step == 2 * 4
    assert run.progress.updates == {"": 2 * 4 * 15}
    assert len(capsys.readouterr().out.splitlines()[-1]) > 0
