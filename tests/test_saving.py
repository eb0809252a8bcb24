"""When a run is saved and what stays: the default policy and every argument of `ModelCheckpoint`."""

import math
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightdeco as ld
from lightdeco import ModelCheckpoint, alone, checkpoint
from tests.models import QUIET, Net, batches, equal, weights

SIX, TWO = batches(6), batches(2)


def scored(scores: Iterable[float]) -> Net:
    """A net whose validations log these as "score"."""
    left = iter(scores)

    class Scored(Net):
        @ld.on_validation_epoch_end
        def score(self, run: ld.Run) -> None:
            ld.log("score", next(left))

    return Scored()


def fit(model: Net | None = None, data: Any = (SIX, TWO), **settings: Any) -> ld.Run:
    """Train quietly, without a sanity check, for two epochs of six steps."""
    given = QUIET | {"name": "run", "max_epochs": 2, "seed": 1, "num_sanity_val_steps": 0} | settings
    return ld.fit(model or Net(), data, **given)


def kept(run: ld.Run) -> list[str]:
    """The names of the checkpoints that are there."""
    return sorted(path.name for path in (run.dir / "checkpoints").iterdir())


def steps(run: ld.Run) -> list[int]:
    """The steps of the checkpoints that are there."""
    return [int(name.removeprefix("step=")) for name in kept(run)]


# ---- which stay ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "arguments", "stay", "best"),
    [
        ([3, 1, 2, 4, 5], {"save_top_k": 2}, [12, 18, 30], 12),
        ([3, 1, 2, 4, 5], {"save_top_k": 2, "mode": "max"}, [24, 30], 30),
        ([3, 1, 2, 4, 5], {"save_top_k": 0}, [30], None),
        ([3, 1, 2, 4, 5], {"save_top_k": None}, [6, 12, 18, 24, 30], 12),
        ([3, 1, 2, 4, 5], {"save_last": False}, [12, 30], 12),
        ([3, 1, 2, 4, 5], {"every_n_epochs": 2}, [12, 30], 12),
        ([3, 1, 1, 1, 5], {"save_top_k": 1}, [12, 30], 12),
        ([3, 1, 1, 1, 5], {"save_top_k": 2}, [12, 18, 30], 12),
        ([math.nan, 2, math.nan, 1, math.nan], {"save_top_k": 3}, [12, 24, 30], 24),
        ([math.nan] * 5, {"save_last": False}, [30], None),
        ([math.inf, -math.inf, 1, 2, 3], {}, [12, 30], 12),
    ],
)
def test_the_best_stay(scores: list[float], arguments: Any, stay: list[int], best: int | None) -> None:
    """The `save_top_k` best and the last; of equal scores the first is the best; NaN is never good."""
    run = fit(scored(scores), max_epochs=5, checkpoint=ModelCheckpoint("score", **arguments))
    assert steps(run) == stay
    assert run.last_checkpoint == run.dir / "checkpoints" / "step=00000030"
    wanted = None if best is None else run.dir / "checkpoints" / f"step={best:08d}"
    assert run.best_checkpoint == wanted
    assert run.best_score == (None if best is None else scores[best // 6 - 1])


@pytest.mark.parametrize(
    ("arguments", "settings", "stay"),
    [
        ({"save_top_k": 2}, {"max_epochs": 4}, [18, 24]),
        ({"save_top_k": 0}, {}, [12]),
        ({"every_n_steps": 4, "save_top_k": None}, {}, [4, 8, 12]),
        ({"every_n_steps": 1, "save_top_k": None}, {"accumulate_grad_batches": 4}, [1, 2, 3, 4]),
        ({"every_n_steps": 3, "save_top_k": None}, {"accumulate_grad_batches": 2}, [3, 6]),
        ({"every_n_epochs": 2, "save_top_k": None}, {"max_epochs": 3}, [12, 18]),
        ({"every_n_epochs": 2, "every_n_steps": 5, "save_top_k": None}, {}, [5, 10, 12]),
        ({"every_seconds": 1e-9, "save_top_k": None}, {"max_epochs": 1}, [1, 2, 3, 4, 5, 6]),
        ({"every_seconds": 1e9, "save_top_k": None}, {}, [12]),
    ],
)
def test_without_a_monitor_the_newest_stay(arguments: Any, settings: Any, stay: list[int]) -> None:
    """`every_n_steps` counts updates; one at the end is always written."""
    run = fit(checkpoint=ModelCheckpoint(**arguments), **settings)
    assert steps(run) == stay
    assert (run.best_checkpoint, run.best_score) == (None, None)


def test_the_best_holds_the_weights_that_were_validated() -> None:
    """With validations within an epoch and saves at other steps."""

    class Remembers(Net):
        seen: dict[float, list[torch.Tensor]]

        @ld.on_validation_end
        def remember(self, run: ld.Run) -> None:
            self.seen[run.metrics["val/loss"]] = weights(self)

    model = Remembers()
    model.seen = {}
    run = fit(model, val_check_interval=2, checkpoint=ModelCheckpoint("val/loss", every_n_steps=3))
    assert run.best_score == min(model.seen)
    other = Net()
    assert run.best_checkpoint is not None
    ld.load_weights(other, run.best_checkpoint)
    assert equal(weights(other), model.seen[min(model.seen)])
    assert ld.validate(Net(), batches(2), weights="best", name="run", **QUIET)["val/loss"] == run.best_score


def test_in_the_background_the_same_stay() -> None:
    """A thread that writes changes nothing but who waits."""
    run = fit(scored([3, 1, 2, 1]), max_epochs=4, checkpoint=ModelCheckpoint("score", background=True))
    assert steps(run) == [12, 24]
    state = checkpoint.load(run.dir / "checkpoints" / "step=00000012")
    assert state.progress["global_step"] == 12


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filename", "names"),
    [
        ("e{epoch}-{score:.2f}-s{step:03d}", ["e1-3.00-s006", "e2-1.00-s012", "e3-2.00-s018"]),
        ("{val/loss:.0f} läuft", ["1 läuft", "1 läuft-step=00000012", "1 läuft-step=00000018"]),
        ("{{x}}{epoch!r}", ["{x}1", "{x}2", "{x}3"]),
    ],
)
def test_names_are_filled_in(filename: str, names: list[str]) -> None:
    """With counters and metrics, also such with a slash; two steps never share one."""
    policy = ModelCheckpoint("score", filename=filename, save_top_k=None)
    assert kept(fit(scored([3, 1, 2]), max_epochs=3, checkpoint=policy)) == names


def test_a_fixed_name_never_replaces_a_better_one() -> None:
    """The best under its name holds its own weights, and the last is another one."""
    run = fit(scored([3, 1, 2]), max_epochs=3, checkpoint=ModelCheckpoint("score", filename="best"))
    assert run.best_checkpoint is not None
    assert run.last_checkpoint is not None
    assert run.best_score == 1
    assert checkpoint.load(run.best_checkpoint).progress["global_step"] == 12
    assert checkpoint.load(run.last_checkpoint).progress["global_step"] == 18
    assert kept(run) == sorted([run.best_checkpoint.name, run.last_checkpoint.name])


@pytest.mark.parametrize(
    "filename", ["", 3, "a/b", "a:b", "{epoch", "{}", "{0}", ".x", "a\0", "{epoch:.zz}", "{epoch!x}", "..", "a\nb"]
)
def test_a_filename_that_names_no_directory_is_refused(filename: Any) -> None:
    """When the policy is made, not at the first save."""
    with pytest.raises(ld.SettingsError, match=r"ModelCheckpoint\(filename="):
        ModelCheckpoint(filename=filename)


@pytest.mark.parametrize(
    ("filename", "words"),
    [
        ("{val/los}", "'val/los' was not recorded; known: .*did you mean 'val/loss'"),
        ("x" * 151, "cannot name a checkpoint"),
        ("{epoch.__class__}", "'epoch.__class__' was not recorded"),
        ("{val/loss:d}", "with 'd'"),
    ],
)
def test_a_filename_that_cannot_be_filled_in_is_refused(filename: str, words: str) -> None:
    """At the first save, with the nearest name; no attribute is looked up."""
    with (
        pytest.warns(ld.LightdecoWarning, match="the last checkpoint is called step=00000006"),
        pytest.raises(ld.SettingsError, match=words),
    ):
        fit(checkpoint=ModelCheckpoint(filename=filename))


def test_a_stop_before_the_first_validation_is_saved_under_a_plain_name() -> None:
    """`filename` asks for what is not there yet; the run must not be lost for it."""
    policy = ModelCheckpoint("val/loss", filename="{val/loss:.2f}")
    with pytest.warns(ld.LightdecoWarning, match=r"the last checkpoint is called step=00000003"):
        run = fit(max_epochs=None, max_steps=3, checkpoint=policy)
    assert kept(run) == ["step=00000003"]


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("monitor", ""),
        ("monitor", 3),
        ("mode", "mi"),
        ("mode", None),
        ("save_top_k", -1),
        ("save_top_k", True),
        ("save_top_k", "all"),
        ("save_last", 1),
        ("every_n_steps", 0),
        ("every_n_steps", 1.5),
        ("every_n_epochs", True),
        ("every_seconds", 0),
        ("every_seconds", math.inf),
        ("on_exception", None),
        ("background", "yes"),
    ],
)
def test_arguments_are_checked(name: str, value: Any) -> None:
    """A wrong one is named, with what is allowed."""
    with pytest.raises(ld.SettingsError, match=rf"ModelCheckpoint\({name}=.*allowed: "):
        ModelCheckpoint(**{name: value})


@pytest.mark.parametrize("name", ["every_n_steps", "every_n_epochs", "every_seconds"])
def test_what_would_be_written_and_removed_at_once_is_refused(name: str) -> None:
    """With a monitor and without `save_last` only the best stay, and they are written in any case."""
    every: Any = {name: 2}
    with pytest.raises(ld.SettingsError, match=rf"monitor='val/loss', save_last=False, {name}=2\).*leave {name} out"):
        ModelCheckpoint("val/loss", save_last=False, **every)
    assert ModelCheckpoint("val/loss", **every).save_last
    assert not ModelCheckpoint(save_last=False, **every).save_last  # without a monitor the newest stay


@pytest.mark.parametrize("given", ["best", ModelCheckpoint, None, [ModelCheckpoint()], object()])
def test_checkpoint_takes_a_policy(given: Any) -> None:
    """True, False or one ModelCheckpoint; an object of another kind too is refused."""
    with pytest.raises(ld.SettingsError, match="checkpoint is"):
        fit(checkpoint=given)


@pytest.mark.parametrize("monitor", ["val/los", "val_loss"])
def test_a_wrong_monitor_ends_the_run_at_the_first_validation(monitor: str) -> None:
    """It names what the validation recorded and the nearest of it."""
    with pytest.raises(ld.SettingsError, match=r"recorded: val/acc, val/loss; did you mean 'val/loss'"):
        fit(checkpoint=ModelCheckpoint(monitor))


def test_a_monitor_that_is_logged_elsewhere_is_refused() -> None:
    """A training metric says nothing about the weights that were validated."""
    with pytest.raises(ld.SettingsError, match=r"'train/loss'\) was not recorded by the validation"):
        fit(checkpoint=ModelCheckpoint("train/loss"))


@pytest.mark.parametrize("settings", [{"data": SIX}, {"limit_val_batches": 0}])
def test_a_monitor_without_a_validation_is_refused(settings: Any) -> None:
    """Before the first batch: nothing would ever be saved for it."""
    with pytest.raises(ld.SettingsError, match="this run has no validation that could record it"):
        fit(checkpoint=ModelCheckpoint("val/loss"), **settings)


# ---- the default policy ----------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """The clock of the policies stands still; what is returned moves it on."""
    now = [0.0]
    monkeypatch.setattr(alone, "monotonic", lambda: now[0])

    def on(seconds: float) -> None:
        now[0] += seconds

    return on


class Watch:
    """Notes what is on the disk after each step, and lets time pass."""

    def __init__(self, on: Callable[[float], None], seconds: float) -> None:
        self.on, self.seconds, self.seen = on, seconds, list[list[str]]()

    @ld.on_train_batch_end
    def note(self, run: ld.Run) -> None:
        """Called before what is due at this step is written."""
        folder = run.dir / "checkpoints"
        self.seen.append(kept(run) if folder.exists() else [])
        self.on(self.seconds)


def test_the_default_writes_every_30_seconds(clock: Callable[[float], None]) -> None:
    """At most: with 20 s per step at every second one; the last stays."""
    watch = Watch(clock, 20)
    run = fit(data=SIX, max_epochs=1, callbacks=[watch])
    one, two, three = (["step=00000002"], ["step=00000004"], ["step=00000006"])
    assert watch.seen == [[], [], one, one, two, two]
    assert kept(run) == three


def test_the_default_holds_the_best_in_memory(clock: Callable[[float], None]) -> None:
    """The best of the first epoch is written with the next one that is due, with its own weights."""

    class Falls(Net):
        @ld.validation_step
        @ld.test_step
        def check(self, batch: Any) -> dict[str, torch.Tensor]:
            return {"loss": torch.tensor(float(self.count))}

        @ld.on_validation_epoch_start
        def starts(self) -> None:
            self.count = getattr(self, "count", 0) + 1
            if self.count == 1:
                self.first = weights(self)

    watch, model = Watch(clock, 4), Falls()  # 30 s are over at step 8
    run = fit(model, max_epochs=3, callbacks=[watch])
    assert watch.seen[7] == []
    assert watch.seen[8] == ["step=00000006", "step=00000008"]
    assert kept(run) == ["step=00000006", "step=00000018"]
    assert run.best_checkpoint == run.dir / "checkpoints" / "step=00000006"
    other = Net()
    ld.load_weights(other, run.dir / "checkpoints" / "step=00000006")
    assert equal(weights(other), model.first)


def test_a_held_best_is_written_when_the_run_fails(clock: Callable[[float], None]) -> None:
    """With the last good state beside it."""

    class Fails(Net):
        @ld.on_train_batch_start
        def fails(self, run: ld.Run) -> None:
            if run.global_step == 9:
                raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        fit(Fails())
    assert [path.name for path in sorted(Path("runs/run/checkpoints").iterdir())] == ["step=00000006", "step=00000009"]


def test_nothing_is_written_without_checkpoints() -> None:
    """checkpoint=False and fast_dev_run; the run says that there is none."""
    run = fit(checkpoint=False)
    assert not (run.dir / "checkpoints").exists()
    assert (run.last_checkpoint, run.best_checkpoint) == (None, None)
    assert fit(name="other", fast_dev_run=True).last_checkpoint is None
    assert not Path("runs/other").exists()


# ---- errors ----------------------------------------------------------------------------------------------------------


class Interrupts(Net):
    """Raises between two steps, or within the fifth."""

    within = False

    @ld.on_train_batch_start
    def before(self, run: ld.Run) -> None:
        if run.global_step == 4 and not self.within:
            raise RuntimeError("mine")

    @ld.on_train_batch_end
    def after(self, run: ld.Run) -> None:
        if run.global_step == 5:
            raise RuntimeError("mine")


@pytest.mark.parametrize(
    ("within", "on_exception", "stay"), [(False, True, [4]), (False, False, [3]), (True, True, [3])]
)
def test_an_error_is_saved_between_steps(within: bool, on_exception: bool, stay: list[int]) -> None:
    """And never in the middle of one; what was due before is there."""
    model = Interrupts()
    model.within = within
    with pytest.raises(RuntimeError, match="mine"):
        fit(model, checkpoint=ModelCheckpoint(every_n_steps=3, on_exception=on_exception))
    names = [path.name for path in Path("runs/run/checkpoints").iterdir()]
    assert names == [f"step={step:08d}" for step in stay]


def test_the_state_of_an_error_stays_without_save_last() -> None:
    """It is what the run goes on from."""
    with pytest.raises(RuntimeError, match="mine"):
        fit(Interrupts(), val_check_interval=3, checkpoint=ModelCheckpoint("val/loss", save_last=False))
    assert sorted(path.name for path in Path("runs/run/checkpoints").iterdir()) == ["step=00000003", "step=00000004"]


def test_what_cannot_be_kept_ends_the_run_at_the_first_save() -> None:
    """It would fail at each save to come; the place is named."""

    class Bad:
        @ld.on_save_checkpoint
        def keep(self, state: Any) -> None:
            """A function in the author's corner."""
            state["x"] = print

    with pytest.raises(ld.CheckpointError, match=r"extra\..*Bad\.x is a"):
        fit(callbacks=[Bad()], checkpoint=ModelCheckpoint(every_n_steps=2))


def test_the_first_error_is_the_one_that_is_seen() -> None:
    """An error of the author's own while a failed run is saved is a warning beside it."""

    class Bad:
        @ld.on_save_checkpoint
        def keep(self) -> None:
            """Fails too."""
            raise ValueError("second")

    with (
        pytest.warns(ld.LightdecoWarning, match="could not be saved after RuntimeError: ValueError: second"),
        pytest.raises(RuntimeError, match="mine"),
    ):
        fit(Interrupts(), callbacks=[Bad()])


@pytest.mark.parametrize("background", [False, True])
def test_a_write_that_fails_is_tried_again(monkeypatch: pytest.MonkeyPatch, background: bool) -> None:
    """One warning; training goes on; the next write counts. At the end a failure is an error."""
    real, fails = checkpoint.save, {2, 4}

    def save(directory: Path, name: str, state: Any) -> Path:
        if state.facts["global_step"] in fails:
            raise ld.CheckpointError("no space")
        return real(directory, name, state)

    monkeypatch.setattr(checkpoint, "save", save)
    policy = ModelCheckpoint(every_n_steps=2, save_top_k=None, background=background)
    with pytest.warns(ld.LightdecoWarning, match="training goes on: no space") as said:
        run = fit(checkpoint=policy, max_epochs=1)
    assert len(said) == 1
    assert steps(run) == [6]
    fails.add(12)
    with pytest.raises(ld.CheckpointError, match="no space"), pytest.warns(ld.LightdecoWarning):
        fit(name="other", checkpoint=ModelCheckpoint(every_n_steps=2, background=background))


def test_an_old_one_is_pruned_only_when_the_new_one_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in the background: the best that is replaced stays until its successor is written."""
    real = checkpoint.prune

    def prune(directory: Path, keep: set[str]) -> list[str]:
        assert all((directory / name).is_dir() for name in keep), keep
        return real(directory, keep)

    monkeypatch.setattr(checkpoint, "prune", prune)
    fit(scored([4, 3, 2, 1]), max_epochs=4, checkpoint=ModelCheckpoint("score", background=True))


def test_deleted_checkpoints_are_not_believed_in() -> None:
    """Somebody deletes the folder: it is made anew, and what is gone is not called the best."""

    class Deletes:
        @ld.on_train_batch_end
        def delete(self, run: ld.Run) -> None:
            """After the best was written."""
            if run.global_step == 8:
                shutil.rmtree(run.dir)

    run = fit(scored([1, 2, 3]), max_epochs=3, callbacks=[Deletes()], checkpoint=ModelCheckpoint("score"))
    assert run.best_checkpoint is not None
    assert run.best_checkpoint.is_dir()
    assert run.last_checkpoint is not None
    assert run.last_checkpoint.is_dir()


@pytest.mark.parametrize(
    ("on_nan", "saved"), [("raise", [1, 2, 3]), ("skip", [1, 2, 3, 4, 5]), ("ignore", [*range(1, 7)])]
)
def test_bad_numbers_are_saved_only_when_told_to(on_nan: Any, saved: list[int]) -> None:
    """The loss of the fourth batch is NaN."""

    class Bad(Net):
        count = 0

        @ld.training_step
        def step(self, batch: Any) -> torch.Tensor:
            self.count += 1
            return super().step(batch) * (math.nan if self.count == 4 else 1)

    policy = ModelCheckpoint(every_n_steps=1, save_top_k=None)
    try:
        fit(Bad(), data=SIX, max_epochs=1, on_nan=on_nan, checkpoint=policy)
    except ld.StepError:
        assert on_nan == "raise"
    names = [path.name for path in sorted(Path("runs/run/checkpoints").iterdir())]
    assert names == [f"step={step:08d}" for step in saved]


# ---- what is in one --------------------------------------------------------------------------------------------------


def test_no_secret_is_in_a_checkpoint() -> None:
    """Neither of `hparams`, nor of a logger that was made with one."""

    class Vendor:
        def __init__(self, api_key: str) -> None:
            self.api_key = api_key

        def __repr__(self) -> str:
            return f"Vendor({self.api_key!r})"

        def log_metrics(self, metrics: Any, step: int) -> None:
            """Send nothing."""

    secret = "SECRETSECRET"
    hparams = {"api_key": secret, "url": f"https://me:{secret}@host/x", "lr": 0.1}
    run = fit(hparams=hparams, logger=Vendor(secret))
    files = [path for path in run.dir.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path.name for path in files if secret.encode() in path.read_bytes()] == []
    assert run.last_checkpoint is not None
    state = checkpoint.load(run.last_checkpoint)
    assert state.hparams["lr"] == 0.1
    assert state.settings["logger"] == "Vendor"
