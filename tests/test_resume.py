"""Resuming: an interrupted run goes on, and ends bit for bit as if it had never stopped."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler

import lightdeco as ld
from lightdeco import checkpoint
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from lightdeco.data.loader import Loader
from lightdeco.state import _compare_data
from tests.models import weights

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "seed": 5}


class Noisy(Dataset[Any]):
    """Random augmentation through torch, NumPy and `random`."""

    def __init__(self, size: int = 52) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(size, 4, generator=generator), torch.arange(size) % 3

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> Any:
        import random

        return self.x[i] + 0.1 * torch.randn(4) + 0.1 * numpy.random.randn() + 0.1 * random.random(), self.y[i]


class Net(nn.Module):
    """Dropout, BatchNorm, Adam with a schedule by step, logging of every kind."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))
        self.stop_at: int | None = None

    @ld.training_step
    def step(self, batch: Any) -> Any:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        ld.log("largest", loss, reduce="max")
        return {"loss": loss, "noise": numpy.random.rand()}

    @ld.validation_step
    def check(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.net(batch[0]), batch[1])

    @ld.configure_optimizers
    def adam(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        return ld.Optim(
            optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=100), interval="step"
        )

    @ld.on_train_batch_end
    def stop(self, run: ld.Run) -> None:
        if self.stop_at is not None and run.progress.global_step == self.stop_at:
            raise Stop


class Stop(Exception):
    """Ends a run as an error of the user does."""


def loaders() -> Any:
    return DataLoader(Noisy(), batch_size=8, shuffle=True), DataLoader(Noisy(10), batch_size=4)


def fit(root: Path, model: nn.Module | None = None, **settings: Any) -> tuple[nn.Module, ld.Run]:
    model = model or Net()
    given: Any = QUIET | {"root_dir": root, "name": "run", "max_epochs": 3, "log_every_n_steps": 3} | settings
    return model, ld.fit(model, loaders(), **given)


def records(run: ld.Run) -> list[dict[str, Any]]:
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "time"} for line in lines]


def same(found: tuple[nn.Module, ld.Run], expected: tuple[nn.Module, ld.Run]) -> None:
    """Weights, buffers, records, counters and latest metrics are equal to the last bit."""
    assert all(torch.equal(a, b) for a, b in zip(weights(found[0]), weights(expected[0]), strict=True))
    assert records(found[1]) == records(expected[1])
    assert found[1].metrics == expected[1].metrics
    strip = [{k: v for k, v in record.items() if k != "time"} for record in found[1].history]
    assert strip == [{k: v for k, v in record.items() if k != "time"} for record in expected[1].history]
    a, b = found[1].progress, expected[1].progress
    a.seconds = b.seconds = 0.0
    assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, ld.Run]:
    """The run that nobody interrupts."""
    return fit(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("at", [1, 3, 6, 7, 8, 14, 20])
def test_a_run_that_failed_goes_on(tmp_path: Path, whole: Any, at: int) -> None:
    """Within an epoch, at its end and at its start; a checkpoint is written every step."""
    model = Net()
    model.stop_at = at
    with pytest.raises(Stop):
        fit(tmp_path, model, checkpoint=ModelCheckpoint(every_n_steps=1))
    found = fit(tmp_path, resume="auto", checkpoint=ModelCheckpoint(every_n_steps=1))
    same(found, whole)


def test_max_steps_can_be_raised(tmp_path: Path, whole: Any) -> None:
    """A run that ended within an epoch goes on as if it had not."""
    for steps in (2, 5, 12):
        fit(tmp_path, max_epochs=None, max_steps=steps, resume="auto")
    same(fit(tmp_path, resume="auto"), whole)


def test_a_finished_run_trains_nothing(tmp_path: Path, whole: Any) -> None:
    """It returns its run with its final weights."""
    fit(tmp_path)
    model, run = fit(tmp_path, resume="auto")
    same((model, run), whole)
    assert run.stop_reason == "max_epochs"
    assert run.best_checkpoint is not None
    assert run.best_checkpoint.is_dir()
    assert run.best_score == whole[1].best_score


def test_what_a_checkpoint_holds(tmp_path: Path) -> None:
    """The last and the best stay; the weights load without lightdeco."""
    from safetensors.torch import load_file

    model, run = fit(tmp_path)
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.name == "step=00000021"
    names = sorted(path.name for path in (run.dir / "checkpoints").iterdir())
    assert set(names) == {run.last_checkpoint.name, run.best_checkpoint.name}  # type: ignore[union-attr]
    assert load_file(run.last_checkpoint / "model.safetensors").keys() == model.state_dict().keys()
    assert checkpoint.load(run.last_checkpoint).progress["global_step"] == 21


# ---- another run than before -----------------------------------------------------------------------------------------


class Counts:
    """A callback with a state, and a note of what it was given back."""

    def __init__(self, value: int = 0) -> None:
        self.value, self.loaded, self.corner = value, None, None

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loaded = state["value"]

    @ld.on_save_checkpoint
    def keep(self, state: Any) -> None:
        state["value"] = -self.value

    @ld.on_load_checkpoint
    def take(self, state: Any) -> None:
        self.corner = state.get("value")


class Others(Counts):
    """Another class."""


def changed(model: nn.Module, tmp_path: Path) -> str:
    """Resume with another model; the refusal, before any step."""
    steps: list[int] = []

    class Watches:
        @ld.on_train_batch_start
        def watch(self) -> None:
            steps.append(1)

    with pytest.raises(ld.CheckpointError) as error:
        fit(tmp_path, model, resume="auto", max_epochs=4, callbacks=[Watches()])
    assert not steps
    return str(error.value)


def with_optimizer(make: Any) -> nn.Module:
    """A net with another optimizer or scheduler."""

    class Other(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            return make(self)

    return Other()


def test_another_model_is_refused(tmp_path: Path) -> None:
    """With the names and shapes that differ."""
    fit(tmp_path, max_epochs=1)
    wider, renamed = Net(), Net()
    wider.net[4] = nn.Linear(16, 5)
    renamed.body, renamed.net = renamed.net, nn.Sequential()
    assert "'net.4.weight' is (3, 16) in the file, (5, 16) in the model" in changed(wider, tmp_path)
    assert "'body.0.weight'; did you mean 'net.0.weight'?" in changed(renamed, tmp_path)


def test_another_optimizer_or_scheduler_is_refused(tmp_path: Path) -> None:
    """Also of a kind with the same state, and with parameters in another order, which no state shows."""
    adamw, cycle = torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR
    step = torch.optim.lr_scheduler.StepLR

    def with_(optimizer: Any, scheduler: Any) -> Any:
        return ld.Optim(optimizer, scheduler, interval="step")

    def schedule(optimizer: Any) -> Any:
        return with_(optimizer, cycle(optimizer, 0.05, total_steps=100))

    fit(tmp_path, max_epochs=1)
    cases = {
        "the optimizer: 'AdamW' in the checkpoint, 'Adam'": lambda m: schedule(torch.optim.Adam(m.parameters())),
        "the scheduler: 'OneCycleLR' in the checkpoint, None": lambda m: adamw(m.parameters()),
        "'OneCycleLR' in the checkpoint, 'StepLR'": lambda m: with_(o := adamw(m.parameters()), step(o, 1)),
        "'net.0.weight' in the checkpoint, 'net.4.bias'": lambda m: schedule(adamw([*m.parameters()][::-1])),
        "first: 'net.4.bias' in the checkpoint, 'none'": lambda m: schedule(adamw([*m.parameters()][:-1])),
        "first: [6] in the checkpoint, [2, 4]": lambda m: schedule(
            adamw([{"params": [*m.parameters()][:2]}, {"params": [*m.parameters()][2:]}])
        ),
        "the names of the optimizers: [''] in the checkpoint, ['a']": lambda m: {"a": schedule(adamw(m.parameters()))},
    }
    for words, make in cases.items():
        message = changed(with_optimizer(make), tmp_path)
        assert words in message
        assert "ld.load_weights(model, path)" in message


def test_callbacks_are_found_by_class_and_order(tmp_path: Path) -> None:
    """Moved ones get their own state, new ones none, and what nobody takes is named."""
    fit(tmp_path, max_epochs=1, callbacks=[Counts(1), Counts(2), Others(3)])
    moved = [Others(), Counts(), Counts()]
    fit(tmp_path, max_epochs=2, resume="auto", callbacks=moved)
    assert [(c.loaded, c.corner) for c in moved] == [(3, -3), (1, -1), (2, -2)]
    fit(tmp_path, max_epochs=3, resume="auto", callbacks=[*(one := [Counts(7)]), Counts(), Counts(), Others()])
    assert one[0].loaded == 0
    with pytest.warns(ld.LightdecoWarning, match="holds a state of the callback Others, which this run does not have"):
        fit(tmp_path, max_epochs=4, resume="auto", callbacks=[Counts(), Counts(), Counts()])


def test_scores_of_another_monitor_count_no_more(tmp_path: Path) -> None:
    """They cannot be compared; from no monitor to one there is nothing to say."""
    fit(tmp_path, max_epochs=1, checkpoint=ModelCheckpoint())
    fit(tmp_path, max_epochs=2, resume="auto", checkpoint=ModelCheckpoint("val/loss"))
    with pytest.warns(ld.LightdecoWarning, match=r"goes on with monitor='val/loss', mode='max'.*step=00000014"):
        run = fit(tmp_path, max_epochs=3, resume="auto", checkpoint=ModelCheckpoint("val/loss", mode="max"))[1]
    assert run.best_score == run.metrics["val/loss"]
    assert run.best_checkpoint == run.last_checkpoint


def test_the_seed_stays(tmp_path: Path, whole: Any) -> None:
    """One that was drawn is taken from the checkpoint; another one is refused."""
    fit(tmp_path, max_epochs=1)
    with pytest.raises(ld.SettingsError, match=r"seed=6: the run to resume has seed=5.*; leave it out"):
        fit(tmp_path, resume="auto", seed=6)
    same(fit(tmp_path, resume="auto", seed=None), whole)


def test_what_changes_the_batches_is_named(tmp_path: Path) -> None:
    """A dataset of another size."""
    fit(tmp_path, max_epochs=1)
    other = DataLoader(Noisy(30), batch_size=8, shuffle=True), DataLoader(Noisy(10), batch_size=4)
    with pytest.warns(ld.LightdecoWarning, match="had 7 batches when the checkpoint was written and has 4 now"):
        ld.fit(Net(), other, **QUIET, root_dir=tmp_path, name="run", max_epochs=2, resume="auto")


def test_another_batch_size_is_named(tmp_path: Path) -> None:
    """Also where there are as many batches as before."""
    fit(tmp_path, max_epochs=1)
    other = DataLoader(Noisy(28), batch_size=4, shuffle=True), DataLoader(Noisy(10), batch_size=4)
    given: Any = QUIET | {"root_dir": tmp_path, "name": "run"}
    with pytest.warns(ld.LightdecoWarning, match=r"batches of 8 samples \(7 of them\) when .* of 4 \(7 of them\) now"):
        ld.fit(Net(), other, **given, max_epochs=2, resume="auto")


@pytest.mark.parametrize("known", [True, False])
def test_the_batch_sizes_of_several_loaders_are_compared(known: bool) -> None:
    """Part by part; of a part that does not tell, nothing is said."""
    parts: list[Any] = [DataLoader(Noisy(), batch_size=8), [1, 2] if not known else DataLoader(Noisy(), batch_size=2)]
    loader = Loader(ld.CombinedLoader(parts, mode="min_size"), seed=0)
    assert loader.batch_sizes == (8, 2 if known else None)
    sampler = BatchSampler(SequentialSampler(Noisy()), 5, drop_last=False)
    assert Loader(DataLoader(Noisy(), batch_sampler=sampler), seed=0).batch_sizes == (5,)
    assert Loader([1, 2], seed=0).batch_sizes == (None,)


def test_a_checkpoint_without_batch_sizes_says_nothing_of_them() -> None:
    """Those of the first days do not hold them."""
    session: Any = SimpleNamespace(loaders={"train": (Loader(DataLoader(Noisy(), batch_size=8), seed=0),)})
    _compare_data(session, {"length": 7, "stream_workers": None})


@pytest.mark.parametrize("left", [0, 2])
def test_lost_records_are_named(tmp_path: Path, left: int) -> None:
    """One warning says which steps they were of, and the run goes on."""
    _, run = fit(tmp_path, max_epochs=1)
    path = run.dir / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    if left:
        path.write_bytes(b"".join(lines[:left]))
    else:
        path.unlink()
    where = r"up to step 6" if left else "no record"
    with pytest.warns(ld.LightdecoWarning, match=rf"metrics.jsonl.*{where}.*global_step 7") as seen:
        _, more = fit(tmp_path, resume="auto", max_epochs=2)
    assert len(seen) == 1
    assert more.global_step == 14
    assert [record["step"] for record in more.history][:left] == [3, 6][:left]


class Counter(Net):
    """Logs a torchmetrics object that is no part of it."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["outside"] = torchmetrics.MeanMetric()

    @ld.training_step
    def step(self, batch: Any) -> Any:
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        vars(self)["outside"].update(loss.detach())
        ld.log("outside", vars(self)["outside"])
        return loss


def test_a_metric_outside_of_the_model_is_named_when_it_is_lost(tmp_path: Path) -> None:
    """Once, by a checkpoint within an epoch; those between two epochs lose nothing."""
    fit(tmp_path, Counter(), name="ends")
    fit(tmp_path, Counter(), name="none", checkpoint=False)
    warnings.simplefilter("always")
    with pytest.warns(ld.LightdecoWarning, match="'outside' is no part of the model") as seen:
        fit(tmp_path, Counter(), checkpoint=ModelCheckpoint(every_n_steps=2))
    assert len(seen) == 1


def test_the_data_object_gets_its_state_first(tmp_path: Path) -> None:
    """Before it is asked for a loader, whose samples may depend on it."""

    class Data:
        size, asked = 8, list[int]()

        def state_dict(self) -> dict[str, Any]:
            return {"size": self.size}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.size = state["size"]

        @ld.train_dataloader
        def loader(self) -> Any:
            self.asked.append(self.size)
            return DataLoader(Noisy(self.size), batch_size=8)

    data = Data()
    data.size = 24
    ld.fit(Net(), data, **QUIET, root_dir=tmp_path, name="run", max_epochs=1)
    ld.fit(Net(), Data(), **QUIET, root_dir=tmp_path, name="run", max_epochs=2, resume="auto")
    assert Data.asked == [24, 24]


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path) -> None:
    """More epochs do not wake it."""
    stop = {"callbacks": ld.EarlyStopping(patience=1, min_delta=1e9), "checkpoint": ModelCheckpoint()}
    first = fit(tmp_path, max_epochs=9, **stop)[1]
    stop["callbacks"] = ld.EarlyStopping(patience=1, min_delta=1e9)
    again = fit(tmp_path, max_epochs=20, resume="auto", **stop)[1]
    assert first.epoch < 9
    assert (again.epoch, again.stop_reason) == (first.epoch, first.stop_reason)


def test_resume_without_files(tmp_path: Path) -> None:
    """fast_dev_run begins anew and says so; checkpoint=False goes on and saves nothing."""
    fit(tmp_path, max_epochs=1)
    with pytest.warns(ld.LightdecoWarning, match="resume='auto' has no effect with fast_dev_run"):
        assert fit(tmp_path, resume="auto", fast_dev_run=True)[1].global_step == 1
    run = fit(tmp_path, resume="auto", checkpoint=False, max_epochs=2)[1]
    assert run.global_step == 14
    assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step=00000007"]


class Drawing(Net):
    """A step that draws from NumPy."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    @ld.on_train_batch_end
    def draw(self) -> None:
        """One number."""
        self.drawn.append(float(numpy.random.rand()))


@pytest.mark.parametrize("data", ["list", "loader"])
@pytest.mark.parametrize("size", [1, 3])
def test_numpy_in_a_step_goes_on(data: str, size: int, tmp_path: Path) -> None:
    """NumPy's numbers are the run's own: they depend on its seed, not on the caller, and go on where it was stopped.

    Of 4 batches with accumulation 3, the last was read before the checkpoint was written.
    """
    given: Any = DataLoader(Noisy(52), 13) if data == "loader" else [(torch.ones(4, 4), torch.zeros(4).long())] * 4
    found = []
    for number, stops in enumerate(([], [1, 2, 3])):
        numpy.random.seed(number)
        drawn: list[float] = []
        for stop in [*stops, None]:
            model = Drawing()
            options: Any = {"max_steps": stop} if stop else {"max_epochs": 2}
            ld.fit(
                model, given, root_dir=tmp_path, name=str(number), resume="auto", accumulate_grad_batches=size,
                **QUIET, **options,
            )  # fmt: skip
            drawn += model.drawn
        found.append(drawn)
    assert len(found[0]) == 8
    assert found[0] == found[1]
