"""An ejected script calls nothing of lightdeco and ends in the very weights of `fit`."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld
from lightdeco import seeds
from lightdeco.explain import eject
from tests.models import QUIET, Net, batches, equal, weights

ROOT = Path(__file__).resolve().parents[1]
SEED = 11
_DRIVER = """
import runpy, sys, torch
torch.set_num_threads(int(sys.argv[3]))
script = runpy.run_path(sys.argv[1], run_name="ejected")
made = [script[f"make_{name}"]() for name in ("model", "data", "callbacks") if f"make_{name}" in script]
torch.save(script["main"](*made).state_dict(), sys.argv[2])
"""


class Noisy(torch.utils.data.Dataset[Any]):
    """Samples that are different each time they are read."""

    def __len__(self) -> int:
        return 23

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        import random

        import numpy

        return torch.full((4,), i / 23) + torch.randn(4) + float(numpy.random.rand()) + random.random(), i % 3


def points(count: int) -> TensorDataset:
    """`count` points of (4,) with classes 0 to 2, the same every time."""
    generator = torch.Generator().manual_seed(5)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.randint(3, (count,), generator=generator))


class Augmented:
    """Data with noise of its own, shuffled."""

    def __init__(self, workers: int = 0) -> None:
        self.workers = workers

    @ld.train_dataloader
    def training(self) -> Any:
        return DataLoader(Noisy(), batch_size=5, shuffle=True, num_workers=self.workers)


class Points:
    """50 points to train on, 20 to validate on; made in `setup`."""

    @ld.setup
    def make(self, stage: str) -> None:
        assert stage == "fit"
        self.train, self.val = points(50), points(20)

    @ld.train_dataloader
    def training(self) -> Any:
        return DataLoader(self.train, batch_size=8, shuffle=True)

    @ld.val_dataloader
    def validation(self) -> Any:
        return DataLoader(self.val, batch_size=16)


class OneCycle(Net):
    """A scheduler by step."""

    def adam(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        return ld.Optim(optimizer, OneCycleLR(optimizer, max_lr=0.05, total_steps=20), interval="step")


class Plateau(Net):
    """A scheduler that watches the validation, beside a large learning rate."""

    def adam(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.1)
        return optimizer, ReduceLROnPlateau(optimizer, patience=0, factor=0.5)


class Stopper:
    """A callback that reads `run`, counts, and ends it."""

    def __init__(self, at: int = 17) -> None:
        self.at, self.seen = at, 0

    @ld.on("train_batch_end", every=3)
    def count(self, batch_idx: int) -> None:
        self.seen += 1

    @ld.on_train_batch_end
    def stop(self, run: Any) -> None:
        if run.global_step == self.at:
            run.should_stop, run.stop_reason = True, f"enough after {self.seen}"


class Everything(Net):
    """Each override and event of training, each with an effect on the weights."""

    @ld.on_after_batch_transfer
    def noise(self, batch: Any) -> Any:
        x, y = batch
        return x + 0.1 * torch.randn_like(x), y

    @ld.on_before_backward
    def look(self, loss: Tensor) -> None:
        assert loss.requires_grad

    @ld.backward
    def halve(self, loss: Tensor) -> None:
        (loss / 2).backward()

    @ld.clip_gradients
    def clip(self, optimizer: torch.optim.Optimizer) -> None:
        nn.utils.clip_grad_value_(self.parameters(), 0.01)

    @ld.on_before_optimizer_step
    def shrink(self) -> None:
        for p in self.parameters():
            assert p.grad is not None
            p.grad.mul_(0.9)

    @ld.lr_scheduler_step
    def schedule(self, scheduler: Any, metric: float | None) -> None:
        scheduler.step()

    @ld.on_train_epoch_end
    def perturb(self) -> None:
        with torch.no_grad():
            self.body[0].bias.add_(0.01)

    def adam(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.3)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1)}


class Newton(Net):
    """An optimizer that needs a closure."""

    def adam(self) -> Any:
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


class Frozen(Net):
    """A submodule that stays in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(4).eval()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(self.norm(x))


def ran(script: str, tmp_path: Path) -> list[Tensor]:
    """The weights that the script ends with, run in a process of its own."""
    path, saved = written(script, tmp_path), tmp_path / "weights.pt"
    command = [sys.executable, "-c", _DRIVER, str(path), str(saved), str(torch.get_num_threads())]
    started(command, ROOT)
    return list(torch.load(saved, weights_only=True).values())


def ran_here(script: str, tmp_path: Path) -> list[Tensor]:
    """The same in this process, which is faster."""
    with seeds.preserved():
        names = runpy.run_path(str(written(script, tmp_path)), run_name="ejected")
        made = [names[f"make_{name}"]() for name in ("model", "data", "callbacks") if f"make_{name}" in names]
        return weights(names["main"](*made))


def written(script: str, tmp_path: Path) -> Path:
    """The script as a file, after ruff has seen it: no complaint, and formatted."""
    path = tmp_path / "ejected.py"
    path.write_text(script)
    # I001: the order of imports depends on which modules are local, which a script cannot know.
    for arguments in (["check", "--ignore", "I001"], ["format", "--diff"]):
        command = [sys.executable, "-m", "ruff", *arguments, "--config", str(ROOT / "pyproject.toml"), str(path)]
        checked = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    return path


def started(command: list[str], directory: Path) -> str:
    """What a command prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(
    model: nn.Module, data: Any, tmp_path: Path, callbacks: Any = None, apart: bool = False, **settings: Any
) -> tuple[str, ld.Run]:
    """Eject, fit the same objects, run the script (`apart`: in another process), and compare the weights to the bit."""
    settings = {"seed": SEED, "callbacks": callbacks, "checkpoint": False, "root_dir": tmp_path, **QUIET, **settings}
    script = eject(model, data, **settings)
    run = ld.fit(model, data, **settings)
    assert "lightdeco." not in script
    assert "import lightdeco" not in script
    assert equal((ran if apart else ran_here)(script, tmp_path), weights(model))
    return script, run


@pytest.mark.parametrize("workers", [0, 1])
def test_shuffling_augmentation_and_dropout(tmp_path: Path, workers: int) -> None:
    """A map-style dataset that draws from torch, NumPy and random, read in this process or in a worker."""
    script, _ = check(Net(), Augmented(workers), tmp_path, apart=True, max_epochs=2)
    assert ("Augmented(workers=1)" in script) == (workers == 1)
    for absent in ("scheduler", "evaluate", "clip", "stop", "SimpleNamespace", "total_weight", "micro_batch +="):
        assert absent not in script


def test_accumulation_clipping_and_a_schedule_by_step(tmp_path: Path) -> None:
    """Unequal batches and a short last window, the norm clipped, OneCycleLR after each update."""
    script, run = check(
        OneCycle(), Points(), tmp_path, apart=True, max_epochs=3, accumulate_grad_batches=3, gradient_clip_val=0.5,
        limit_val_batches=0, on_nan="ignore",
    )  # fmt: skip
    assert run.global_step == 9  # 50 points in batches of 8: windows of 3, 3 and 1
    assert "clip_grad_norm_(model.parameters(), 0.5)" in script
    assert "isfinite" not in script


def test_a_window_that_differs_from_epoch_to_epoch(tmp_path: Path) -> None:
    """Accumulation by epoch, the last window of several unequal batches, and validation within the epoch."""
    _, run = check(
        OneCycle(), Points(), tmp_path, max_epochs=3, accumulate_grad_batches={1: 4}, val_check_interval=3,
        gradient_clip_val=0.01, gradient_clip_algorithm="value",
    )  # fmt: skip
    assert run.global_step == 7 + 2 + 2


def test_validation_early_stopping_and_plateau(tmp_path: Path) -> None:
    """The metrics of validation are those of the run: they stop it at the same epoch and lower the rate as often."""
    early = ld.EarlyStopping(patience=2, min_delta=0.01)
    script, run = check(Plateau(), Points(), tmp_path, [early], apart=True, max_epochs=30)
    assert str(run.stop_reason).startswith("early stopping")
    assert run.epoch < 30
    assert "- 0.01" in script


def test_early_stopping_within_the_epoch_is_held_off(tmp_path: Path) -> None:
    """`min_steps` holds early stopping off, in the script as in the run; max_steps would come later."""
    early = ld.EarlyStopping("val/acc", mode="max", patience=1, check_finite=False)
    _, run = check(
        Plateau(), Points(), tmp_path, callbacks=[early], max_steps=80, min_steps=20, val_check_interval=2,
    )  # fmt: skip
    assert str(run.stop_reason).startswith("early stopping")
    assert 20 <= run.global_step < 80


@pytest.mark.parametrize("limit", [{"max_steps": 10}, {"max_epochs": 2, "limit_train_batches": 3}])
def test_limits_end_the_script_where_they_end_the_run(tmp_path: Path, limit: dict[str, Any]) -> None:
    """A run cut short within an epoch, and epochs cut short, by the scheduler that would otherwise step once more."""
    check(Plateau(), Points(), tmp_path, **limit)


def test_callbacks_with_run(tmp_path: Path) -> None:
    """A callback gets a plain namespace; what it sets there ends the script with its reason."""
    script, run = check(Net(), Points(), tmp_path, callbacks=[Stopper(at=12)], max_epochs=9)
    assert run.stop_reason == "enough after 4"
    assert "Stopper(at=12)" in script
    assert "SimpleNamespace(" in script


def test_overrides_and_events(tmp_path: Path) -> None:
    """Whatever the model overrides and listens to is called where the run calls it."""
    check(Everything(), Points(), tmp_path, max_epochs=2)


def test_closure(tmp_path: Path) -> None:
    """LBFGS gets a closure that evaluates the step anew with the same dropout."""
    check(Newton(), Points(), tmp_path, max_epochs=2, limit_val_batches=0)


def test_a_frozen_submodule_stays_frozen(tmp_path: Path) -> None:
    """Validation puts each submodule back into its own mode."""
    check(Frozen(), Points(), tmp_path, max_epochs=2)


def test_autocast(tmp_path: Path) -> None:
    """bf16-mixed is torch.autocast around the steps."""
    script, _ = check(Net(), Points(), tmp_path, max_epochs=2, precision="bf16-mixed")
    assert 'torch.autocast("cpu", torch.bfloat16)' in script


def test_updates_that_are_skipped(tmp_path: Path) -> None:
    """With on_nan="skip" the script looks before each update."""
    check(OneCycle(), Points(), tmp_path, max_epochs=2, on_nan="skip")


class Duel(nn.Module):
    """Two nets, each with an optimizer and a step of its own."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.gen, self.disc = nn.Linear(4, 4), nn.Linear(4, 3)

    def generate(self, batch: Any) -> Tensor:
        x, y = batch
        return F.cross_entropy(self.disc(F.dropout(self.gen(x))), y)

    def judge(self, batch: Any) -> dict[str, Tensor]:
        x, y = batch
        return {"loss": F.cross_entropy(self.disc(F.dropout(self.gen(x), 0.2)), y)}

    generate = ld.training_step(optimizer="gen")(generate)
    judge = ld.training_step(optimizer="disc", every=2)(judge)

    @ld.configure_optimizers
    def optimizers(self) -> dict[str, Any]:
        gen, disc = torch.optim.Adam(self.gen.parameters()), torch.optim.SGD(self.disc.parameters(), lr=0.1)
        return {"gen": gen, "disc": (disc, torch.optim.lr_scheduler.StepLR(disc, 1))}


def test_several_optimizers(tmp_path: Path) -> None:
    """One block for each optimizer, in the order of definition; the other's parameters need no gradient meanwhile."""
    try:
        eject(Duel(), Augmented(), max_epochs=1)
    except ld.MarkError as error:
        pytest.skip(f"fit refuses several optimizers in this tree: {error}")
    script, _ = check(Duel(), Augmented(), tmp_path, apart=True, max_epochs=2)
    assert "if batch_idx % 2 == 0:" in script
    assert "disc_scheduler.step()" in script


# ---- what the script says --------------------------------------------------------------------------------------------


def test_loaders_cannot_be_made_again(tmp_path: Path) -> None:
    """`make_data` says what to return; with it, the script ends in the weights of the run."""
    data = (DataLoader(points(50), batch_size=8, shuffle=True), {"a": [points(4)[:4]], "b": [points(6)[:6]]})
    model = Net(lr=0.03)
    script = eject(model, data, max_epochs=2, seed=SEED, **QUIET)
    assert "raise NotImplementedError" in script
    assert "batch_size=8, 50 samples, shuffled" in script
    assert "Net(lr=0.03)" in script
    a = script.index("    raise NotImplementedError")
    b = script.index("def main")
    code = (
        "    from tests.test_eject import points\n    from torch.utils.data import DataLoader\n\n"
        "    loader = DataLoader(points(50), batch_size=8, shuffle=True)\n"
        '    return loader, {"a": [points(4)[:4]], "b": [points(6)[:6]]}\n\n\n'
    )
    ld.fit(model, data, max_epochs=2, seed=SEED, root_dir=tmp_path, **QUIET)
    assert equal(ran_here(script[:a] + code + script[b:], tmp_path), weights(model))


def test_the_script_runs_as_it_is(tmp_path: Path) -> None:
    """Started as a script it trains, and prints the metrics of each epoch; they are those of the run."""
    path = tmp_path / "loop.py"
    script = eject(Net(), Points(), path=path, max_epochs=2, seed=SEED, **QUIET)
    assert path.read_text(encoding="utf-8") == script
    printed = started([sys.executable, str(path)], ROOT)
    run = ld.fit(Net(), Points(), max_epochs=2, seed=SEED, root_dir=tmp_path, **QUIET)
    last = printed.splitlines()[-1]
    for name in ("val/loss", "val/acc", "train/loss"):
        assert f"{name} {run.metrics[name]:.4f}" in last


def test_a_file_is_never_overwritten(tmp_path: Path) -> None:
    """An existing file is refused before anything runs, and stays as it was."""
    path = tmp_path / "mine.py"
    path.write_text("mine")
    with pytest.raises(ld.LightdecoError, match="overwrites none"):
        eject(Net(), Points(), path=path, max_epochs=1)
    assert path.read_text() == "mine"


def test_the_text_is_the_same_every_time_and_nothing_is_touched() -> None:
    """Two ejections give one text; weights, modes and random state are as they were."""
    model = Net()
    before, state = weights(model), torch.get_rng_state()
    first = eject(model, Points(), max_epochs=3, callbacks=[ld.EarlyStopping()])
    assert first == eject(model, Points(), max_epochs=3, callbacks=[ld.EarlyStopping()])
    assert equal(weights(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert "none was given" in first


def test_a_class_of_a_script_is_loaded_from_its_file(tmp_path: Path) -> None:
    """A model whose class stands in the script that ejects is loaded from that file."""
    training = tmp_path / "train.py"
    training.write_text(
        "import torch, lightdeco as ld\n"
        "from lightdeco.explain import eject\n"
        "class Mine(torch.nn.Linear):\n"
        "    def __init__(self, width=2):\n"
        "        torch.manual_seed(0)\n"
        "        super().__init__(width, 1)\n"
        "    @ld.training_step\n"
        "    def step(self, batch):\n"
        "        return self(batch).pow(2).mean()\n"
        "    @ld.configure_optimizers\n"
        "    def sgd(self):\n"
        "        return torch.optim.SGD(self.parameters(), lr=0.1)\n"
        "    @ld.train_dataloader\n"
        "    def batches(self):\n"
        "        return [torch.ones(4, 2)]\n"
        "if __name__ == '__main__':\n"
        "    eject(Mine(), max_epochs=3, path='loop.py')\n"
    )
    for name in ("train.py", "loop.py"):
        printed = started([sys.executable, name], tmp_path)
    assert "epoch 2: train/loss" in printed
    assert 'spec_from_file_location("train", "train.py")' in (tmp_path / "loop.py").read_text()


def test_what_cannot_be_written_is_refused() -> None:
    """A function without a name in a module cannot be imported by a script."""
    model = ld.attach(nn.Linear(2, 1), training_step=lambda m, batch: m(batch).mean(), configure_optimizers=_sgd)
    with pytest.raises(ld.MarkError, match=r"cannot import Linear\.training_step"):
        eject(model, [torch.ones(4, 2)], max_epochs=1)


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1)


def _mean(model: nn.Module, batch: Tensor) -> Tensor:
    return model(batch).pow(2).mean()


def test_attached_functions_are_imported() -> None:
    """Functions of a module that were attached are called with the model."""
    model = ld.attach(nn.Linear(2, 1), training_step=_mean, configure_optimizers=_sgd)
    script = eject(model, [torch.ones(4, 2)], max_epochs=1)
    assert "from tests.test_eject import _mean, _sgd" in script
    assert "outputs = _mean(model, batch)" in script


class Lazy(torch.utils.data.Sampler[int]):
    """Draws each index when it is asked for."""

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Any:
        return (int(torch.randint(50, ())) for _ in range(20))


def test_what_differs_from_fit_is_said(tmp_path: Path) -> None:
    """A sampler that may draw late, workers that stay, memory and the clock; with torch's own samplers nothing."""

    def head(loader: Any, **settings: Any) -> str:
        script = eject(Net(), loader, **{"max_epochs": 1, "seed": SEED, "checkpoint": False, **QUIET, **settings})
        return " ".join(script[: script.index("\nimport")].split())

    plain = head(DataLoader(points(50), 5, shuffle=True))
    assert "bit for bit." in plain
    assert "Differs" not in plain
    lazy = head(DataLoader(points(50), 5, sampler=Lazy()))
    assert "bit for bit but for what differs" in lazy
    assert "Differs from fit: - the order of the batches, if Lazy draws random numbers from batch to batch" in lazy
    assert "persistent_workers=True" in head(DataLoader(points(50), 5, num_workers=1, persistent_workers=True))
    assert "fit goes on in parts (oom='micro')" in head(DataLoader(points(50), 5), oom="micro")
    assert "max_time measures by the clock" in head(DataLoader(points(50), 5), max_time=100)


@pytest.mark.parametrize(
    ("interval", "monitor", "said"),
    [
        ("step", "train/loss", r"interval='step' and monitor='train/loss': fit takes the value of the "),
        ("step", None, r"interval='step' and monitor='train/loss'"),
        ("epoch", "mine", r"monitor='mine', which ld\.log records"),
    ],
)
def test_a_metric_that_the_script_does_not_have_is_refused(interval: Any, monitor: Any, said: str) -> None:
    """ReduceLROnPlateau by something that only a logger's record or `ld.log` knows."""

    class Plateau(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            adam = super().adam()
            return ld.Optim(adam, ReduceLROnPlateau(adam), interval=interval, monitor=monitor)

    with pytest.raises(ld.SettingsError, match=said):
        eject(Plateau(), DataLoader(points(50), 5), max_epochs=1, **QUIET)


def test_several_processes_are_refused() -> None:
    """A script is for one process."""
    with pytest.raises(ld.SettingsError, match=r"devices=2: fit would train in 2 processes here.*devices=1"):
        ld.eject(Net(), batches(), max_epochs=1, devices=2, accelerator="cpu")
