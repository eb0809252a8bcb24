"""`profiler=`: where the time goes, what could be faster, and nothing else changes."""

import json
import re
import sys
import time
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightdeco as ld
from lightdeco.loggers.metrics_file import MetricsFile
from lightdeco.profilers import Simple
from lightdeco.profilers.advanced import CALLER, _running
from lightdeco.profilers.advice import advice
from lightdeco.profilers.facts import Facts, Source, _faster
from tests.models import QUIET, Net, batches, equal, weights

KINDS = ["simple", "advanced", "pytorch"]


class Recorder:
    """A profiler of one's own: keeps the names, and checks that actions lie inside each other."""

    def __init__(self) -> None:
        self.open: list[str] = []
        self.seen: list[str] = []
        self.closed = 0

    def start(self, action: str) -> None:
        self.open.append(action)
        self.seen.append(action)

    def stop(self, action: str) -> None:
        assert self.open.pop() == action

    def summary(self) -> str:
        assert self.open == []
        return f"{len(self.seen)} actions"

    def close(self) -> None:
        self.closed += 1


def fit(model: Any, profiler: Any, data: Any = None, **settings: Any) -> ld.Run:
    given = QUIET | {"max_epochs": 2, "checkpoint": False, "seed": 1} | settings
    return ld.fit(model, data or (batches(4), batches(2)), profiler=profiler, **given)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_each_action_is_counted() -> None:
    """Every part of a fit is an action; the sanity check is one of its own."""

    class Watcher:
        @ld.on_train_batch_end
        def look(self) -> None: ...

        @ld.on("train_epoch_end", every=2)
        def rarely(self) -> None: ...

    simple = Simple()
    fit(Net(), simple, log_every_n_steps=2, gradient_clip_val=1.0, checkpoint=True, callbacks=Watcher())
    assert {action: measured.calls for action, measured in simple.actions.items()} == {
        "fit": 1,
        "train_data": 10,  # with the one that finds the end, in each of two epochs
        "optimizer_zero_grad": 8,
        "training_step": 8,
        "backward": 8,
        "clip_gradients": 8,
        "optimizer_step": 8,
        "on_train_batch_end Watcher.look": 8,
        "on_train_epoch_end Watcher.rarely": 1,
        "sanity_check": 1,
        "validation": 2,
        "val_data": 2 + 2 * 3,
        "validation_step": 2 + 2 * 2,
        "record": 4 + 2 + 2,
        "metrics": simple.actions["metrics"].calls,
        "checkpoint": 8 + 2 + 1,  # after each update and epoch it is asked what is due, and at the end
    }


def test_actions_do_not_count_twice() -> None:
    """Own times sum up to the time of the verb; what lies inside is part of the total."""
    simple = Simple()
    start = time.perf_counter()
    fit(Net(), simple)
    wall = time.perf_counter() - start
    actions = simple.actions
    assert sum(action.own_s for action in actions.values()) == pytest.approx(actions["fit"].total_s)
    assert 0 < actions["fit"].total_s <= wall
    assert actions["validation"].total_s > actions["validation"].own_s
    assert actions["training_step"].mean_s == actions["training_step"].total_s / 8


def test_recursion_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """An action inside of itself adds nothing to its total."""
    clock = iter([0.0, 1.0, 3.0, 10.0])
    simple = Simple()
    monkeypatch.setattr(simple, "_now", lambda: next(clock))
    for step in (simple.start, simple.start, simple.stop, simple.stop):
        step("again")
    assert simple.actions == {"again": (1, 10.0, 10.0)}


def test_overrides_and_closures_are_measured() -> None:
    """An overridden update is an action; the optimizer's step and the step that its closure repeats lie inside."""

    class Own(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

        @ld.optimizer_step
        def update(self, optimizer: Any, closure: Any) -> None:
            optimizer.step(closure)

    simple = Simple()
    run = fit(Own(dropout=0.0), simple, data=batches(2), max_epochs=1)
    assert run.global_step == 2
    actions = simple.actions
    assert actions["optimizer_step"].calls == actions["optimizer.step"].calls == 2
    assert actions["training_step"].calls > 2
    assert actions["optimizer_step"].own_s < actions["optimizer.step"].total_s < actions["optimizer_step"].total_s


def test_transfer_stands_beside_its_events() -> None:
    """Moving a batch, and the methods marked for the events around it, are actions of their own."""

    class Moving(Net):
        @ld.on_before_batch_transfer
        def before(self, batch: Any) -> Any:
            return [batch[0] * 2, batch[1]]

        @ld.transfer_batch_to_device
        def move(self, batch: Any, device: Any) -> Any:
            return [tensor.to(device) for tensor in batch]

    plain, measured, simple = Moving(), Moving(), Simple()
    fit(plain, None)
    fit(measured, simple)
    assert equal(weights(plain), weights(measured))
    assert simple.actions["transfer_batch_to_device"].calls == 8 + 2 + 2 * 2
    assert simple.actions["on_before_batch_transfer Moving.before"].calls == 8 + 2 + 2 * 2


def test_loaders_made_anew_are_measured() -> None:
    """`reload_dataloaders_every_n_epochs` makes loaders that are measured too, and making them is an action."""

    class Own(Net):
        @ld.train_dataloader
        def data(self) -> Any:
            return batches(3)

    simple = Simple()
    ld.fit(Own(), max_epochs=3, reload_dataloaders_every_n_epochs=1, profiler=simple, checkpoint=False, **QUIET)
    assert simple.actions["train_data"].calls == 3 * 4
    assert simple.actions["train_dataloader"].calls == 2


def test_no_batch_is_held() -> None:
    """While a batch is read, the one before is not kept alive by the profiler."""
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Data(Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            alive.append(sum(ref() is not None for ref in kept))
            x = torch.ones(4)
            kept.append(weakref.ref(x))
            return x, 0

    def together(samples: Any) -> Any:
        return samples[0][0][None], torch.tensor([0])

    def count(profiler: Any) -> list[int]:
        kept.clear()
        alive.clear()
        fit(Net(), profiler, data=DataLoader(Data(), collate_fn=together), max_epochs=1)
        return list(alive)

    assert count(None) == count("simple")


@pytest.mark.parametrize(("verb", "step"), [("validate", "validation_step"), ("test", "test_step")])
def test_evaluations(verb: str, step: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`validate` and `test` are measured and print a table; without a directory nothing is written."""
    simple = Simple()
    values = getattr(ld, verb)(Net(), batches(3), profiler=simple, **QUIET)
    assert values == getattr(ld, verb)(Net(), batches(3), **QUIET)
    assert simple.actions[verb].calls == 1
    assert simple.actions[step].calls == 3
    assert capsys.readouterr().out.splitlines()[1].split()[0] == verb
    assert not Path("runs").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_predict_leaves_its_caller_out(kind: str) -> None:
    """Between two outputs the caller may do anything, another profile included."""
    outputs = list(ld.predict(Net(), batches(3), **QUIET))
    found = []
    for output in ld.predict(Net(), batches(3), profiler=kind, **QUIET):
        assert sys.getprofile() is None
        found.append(output)
    assert equal(outputs, found)
    assert _running == []


def test_predict_knows_how_long_its_caller_took(capsys: pytest.CaptureFixture[str]) -> None:
    """The time of the caller is an action, also when the generator is left half-way; the table comes then."""
    simple = Simple()
    outputs = ld.predict(Net(), batches(3), profiler=simple, **QUIET)
    next(outputs)
    time.sleep(0.05)
    next(outputs)
    time.sleep(0.05)
    assert capsys.readouterr().out == ""
    outputs.close()  # type: ignore[attr-defined]  # it is a generator
    assert simple.actions["predict_step"].calls == 2
    assert 0.1 <= simple.actions[CALLER].total_s <= simple.actions["predict"].total_s
    assert CALLER in capsys.readouterr().out


# ---- nothing else changes --------------------------------------------------------------------------------------------


class Scheduled(Net):
    """With a scheduler by step, and the optimizer kept for a look at it."""

    @ld.configure_optimizers
    def adam(self) -> Any:
        self.kept = torch.optim.SGD(self.parameters(), lr=0.1)
        return ld.Optim(self.kept, torch.optim.lr_scheduler.StepLR(self.kept, 2), interval="step")


@pytest.mark.parametrize("profiler", [*KINDS, Recorder()], ids=[*KINDS, "own"])
@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.1}], ids=str)
def test_results_are_equal_to_the_bit(profiler: Any, settings: dict[str, Any]) -> None:
    """Weights and records are those of a run without a profiler."""
    plain, measured = Scheduled(), Scheduled()
    runs = [fit(plain, None, **settings), fit(measured, profiler, **settings)]
    assert equal(weights(plain), weights(measured))
    records = [[{k: v for k, v in record.items() if k != "time"} for record in run.history] for run in runs]
    assert records[0] == records[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fails", [False, True])
def test_nothing_stays_changed(kind: str, fails: bool) -> None:
    """Optimizer, run and callbacks have their own methods again, after an exception too; nothing is switched on."""
    kept: list[Any] = []

    class Failing(Scheduled):
        @ld.configure_optimizers
        def adam(self) -> Any:
            optim = super().adam()
            kept.append(self.kept.step)  # the one that the scheduler put there
            return optim

        @ld.on_train_epoch_end
        def fail(self, run: ld.Run) -> None:
            kept.append(run)
            if fails:
                raise ZeroDivisionError

    model = Failing()
    if fails:
        with pytest.raises(ZeroDivisionError):
            fit(model, kind)
    else:
        fit(model, kind)
    assert model.kept.step is kept[0]
    assert "record" not in vars(kept[1])
    assert "during" not in vars(kept[1])
    assert sys.getprofile() is None
    assert not torch._C._autograd._profiler_enabled()
    assert _running == []

    plain = Net()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    fit(ld.attach(plain, configure_optimizers=lambda model: optimizer), kind)
    assert "step" not in vars(optimizer)


def test_a_scheduler_may_be_made_while_it_runs() -> None:
    """Schedulers replace `optimizer.step` themselves; what one of them built on stays."""

    class Late(Scheduled):
        @ld.configure_optimizers
        def adam(self) -> Any:
            self.kept = torch.optim.SGD(self.parameters(), lr=0.1)
            return self.kept

        @ld.on_train_epoch_start
        def schedule(self) -> None:
            torch.optim.lr_scheduler.StepLR(self.kept, 1)

    plain, measured = Late(), Late()
    fit(plain, None)
    fit(measured, "simple")
    assert equal(weights(plain), weights(measured))
    measured.kept.step()


@pytest.mark.parametrize("role", ["training_step", "validation_step", "on_train_batch_end", "on_after_batch_transfer"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_frame_more(role: str, kind: str) -> None:
    """Errors of the user's code reach the caller as they are, with one frame more than without a profiler."""

    def explode(thing: Any, batch: Any = None) -> Any:
        raise ZeroDivisionError

    package = str(Path(ld.__file__).parent)

    def frames(profiler: Any) -> list[str]:
        with pytest.raises(ZeroDivisionError) as caught:
            fit(ld.attach(Net(), **{role: explode}), profiler)
        found = traceback.extract_tb(caught.value.__traceback__)
        return [f.name for f in found if f.filename.startswith(package)]

    assert len(frames(kind)) <= len(frames(None)) + 1 <= 6


# ---- what is shown and written ---------------------------------------------------------------------------------------


def test_table_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is printed and written; its shares sum up; `profile.json` holds the same numbers."""
    run = fit(Net(), "simple")
    table = capsys.readouterr().out
    assert (run.dir / "profile.txt").read_text(encoding="utf-8") == table
    rows = [line for line in table.splitlines()[1:] if line.endswith("%")]
    assert rows[0].split() == ["fit", "1", *rows[0].split()[2:6], "100.0", "%"]
    first_level = [line for line in rows if line.startswith("  ") and not line.startswith("   ")]
    assert sum(float(line.split()[-2]) for line in first_level) == pytest.approx(100, abs=0.05 * len(first_level))
    assert first_level[-1].startswith("  the loop itself")
    content = json.loads((run.dir / "profile.json").read_text(encoding="utf-8"))
    by_path = {tuple(action["path"]): action for action in content["actions"]}
    assert by_path["fit", "validation", "validation_step"]["calls"] == 4
    assert by_path["fit",]["share"] == 1
    assert sum(action["own_s"] for action in content["actions"]) == pytest.approx(by_path["fit",]["total_s"])
    assert content["advice"] == []


def test_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal no row of the table is wider than it."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)

    class WithALongNameThatIsCut:
        @ld.on_train_batch_end
        def and_a_method_with_a_long_name_as_well(self) -> None: ...

    run = fit(Net(), "simple", callbacks=WithALongNameThatIsCut())
    lines = capsys.readouterr().out.splitlines()
    assert "training_step" in "".join(lines)
    assert max(len(line.replace("\x1b[1m", "").replace("\x1b[0m", "")) for line in lines) <= 60
    assert max(map(len, (run.dir / "profile.txt").read_text(encoding="utf-8").splitlines())) > 60


@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_still_shows_the_table(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that fails, or is interrupted, is profiled up to there."""

    class Failing(Net):
        @ld.on_validation_batch_end
        def fail(self, run: ld.Run) -> None:
            if run.global_step == 12:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(Failing(), kind, data=(batches(12), batches(2)), name="failed")
    text = capsys.readouterr().out
    assert "training_step" in text
    assert Path("runs/failed/profile.txt").read_text(encoding="utf-8") == text


def test_without_a_directory_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """`fast_dev_run` writes nothing."""
    fit(Net(), "simple", fast_dev_run=True)
    assert "the loop itself" in capsys.readouterr().out
    assert not Path("runs").exists()


def test_an_unwritable_profile_is_a_warning() -> None:
    """The run is done: it does not fail for a profile."""

    def block(model: Any, run: ld.Run) -> None:
        (run.dir / "profile.txt").mkdir()

    with pytest.warns(ld.LightdecoWarning, match="the profile could not be written"):
        run = fit(ld.attach(Net(), on_fit_end=block), "simple")
    assert run.global_step == 8


# ---- verbs inside of verbs, and after each other ---------------------------------------------------------------------


def test_an_object_adds_its_verbs_up() -> None:
    """One object given to two verbs has both; a verb inside of another is part of it."""
    simple = Simple()

    class Outer(Net):
        @ld.on_train_epoch_end
        def look(self) -> None:
            ld.validate(self, batches(2), profiler=simple, **QUIET)

    fit(Outer(), simple, data=batches(2))
    ld.test(Net(), batches(3), profiler=simple, **QUIET)
    actions = simple.actions
    assert (actions["validate"].calls, actions["validation_step"].calls, actions["test_step"].calls) == (2, 4, 3)
    total = actions["fit"].total_s + actions["test"].total_s
    assert sum(action.own_s for action in actions.values()) == pytest.approx(total)
    hook = "on_train_epoch_end Outer.look"
    assert actions[hook].total_s > actions["validate"].total_s > 0


@pytest.mark.parametrize("kind", ["simple", "advanced"])
def test_verbs_inside_have_a_table_of_their_own(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Given by name, each verb measures itself."""

    class Outer(Net):
        @ld.on_train_epoch_end
        def look(self) -> None:
            ld.validate(self, batches(2), profiler=kind, **QUIET)

    fit(Outer(), kind, data=batches(2), max_epochs=1)
    inner, outer = capsys.readouterr().out.split("validation_step", 1)
    assert "training_step" not in inner
    assert "training_step" in outer


# ---- advanced --------------------------------------------------------------------------------------------------------


def test_advanced_lists_functions(capsys: pytest.CaptureFixture[str]) -> None:
    """Each action has its functions, at most `top`, without those of the actions inside of it."""
    run = fit(Net(), ld.profilers.Advanced(top=4, sort="time", pstats=True))
    text = capsys.readouterr().out
    assert (run.dir / "profile.txt").read_text(encoding="utf-8") == text
    listed = {part.partition(":")[0]: part for part in text.split("\n\n")}
    assert listed["training_step"].startswith("training_step: 8 calls, ")
    assert "cross_entropy" in listed["training_step"]
    assert "run_backward" in listed["backward"]
    assert "cross_entropy" not in listed["fit"]
    assert all(len(part.strip().splitlines()) <= 2 + 4 for part in listed.values())
    assert "lsprof" not in text
    names = {path.name for path in (run.dir / "profile").iterdir()}
    assert {"fit.pstats", "training_step.pstats", "backward.pstats"} <= names


def test_advanced_refuses_another_profiler() -> None:
    """Python has room for one."""
    sys.setprofile(lambda *given: None)
    try:
        with pytest.raises(ld.SettingsError, match="another profiler of Python is running"):
            fit(Net(), "advanced")
    finally:
        sys.setprofile(None)
    fit(Net(), "advanced")


# ---- torch -----------------------------------------------------------------------------------------------------------


def traces(run: ld.Run) -> list[list[Any]]:
    """The events of each trace of a run."""
    files = sorted((run.dir / "profile").glob("*.pt.trace.json"))
    return [json.loads(path.read_text(encoding="utf-8"))["traceEvents"] for path in files]


def test_pytorch_records_a_few_steps(capsys: pytest.CaptureFixture[str]) -> None:
    """As many training steps as were asked for, with the actions as spans, and a table of the operators."""
    run = fit(Net(), ld.profilers.PyTorch(wait=2, warmup=1, active=3, top=30), data=(batches(10), batches(2)))
    (events,) = traces(run)
    steps = sorted(e["name"] for e in events if e.get("name", "").startswith("ProfilerStep") and e["ph"] == "X")
    assert set(steps) == {"ProfilerStep#3", "ProfilerStep#4", "ProfilerStep#5"}
    spans = [e["name"] for e in events if e.get("cat") == "user_annotation"]
    assert spans.count("training_step") == spans.count("backward") == spans.count("optimizer_step") == 3
    text = capsys.readouterr().out
    assert text.startswith("operators in 3 of the steps; traces: ")
    assert "aten::addmm" in text
    assert (run.dir / "profile.txt").read_text(encoding="utf-8") == text


def test_pytorch_repeats_and_ends_early() -> None:
    """Each cycle has a trace; one that the run cuts short is kept as far as it came."""
    profiler = ld.profilers.PyTorch(wait=1, warmup=0, active=2, repeat=3)
    run = fit(Net(), profiler, data=batches(4))  # 8 steps: the third cycle has one recorded step and a bit
    assert len(traces(run)) == 3
    assert profiler.summary().count("Self CPU time total") == 3
    with pytest.raises(ZeroDivisionError):
        ld.fit(Net(), (1 / 0 for _ in "a"), max_epochs=1, profiler=profiler, **QUIET)
    assert "recorded nothing" in profiler.summary()


def test_pytorch_without_room_for_its_trace(capsys: pytest.CaptureFixture[str]) -> None:
    """A trace that cannot be written does not end the run; the summary says so."""

    def block(model: Any, run: ld.Run) -> None:
        (run.dir / "profile").write_text("a file where the directory should be")

    run = fit(ld.attach(Net(), on_fit_start=block), "pytorch")
    assert run.global_step == 8
    assert "the trace could not be written: " in capsys.readouterr().out


def test_pytorch_says_that_a_run_was_too_short(capsys: pytest.CaptureFixture[str]) -> None:
    """A run of fewer steps than `wait` and `warmup` has no table."""
    fit(Net(), ld.profilers.PyTorch(wait=9), data=batches(3))
    assert capsys.readouterr().out == (
        "torch's profiler recorded nothing: it begins after 10 steps (wait=9, warmup=1), and training_step ran 6 "
        "times\n"
    )


def test_pytorch_refuses_a_second_one() -> None:
    """torch has room for one: neither in a verb inside, nor in a profile of one's own."""

    class Outer(Net):
        @ld.on_train_epoch_start
        def look(self) -> None:
            ld.validate(self, batches(2), profiler="pytorch", **QUIET)

    with pytest.raises(ld.SettingsError, match="torch's profiler is running already"):
        fit(Outer(), "pytorch")
    with torch.profiler.profile(), pytest.raises(ld.SettingsError, match="torch's profiler is running already"):
        fit(Net(), "pytorch")
    fit(Net(), "pytorch")


# ---- objects and names -----------------------------------------------------------------------------------------------


def test_an_object_of_ones_own(capsys: pytest.CaptureFixture[str]) -> None:
    """It gets every action in order; its summary is printed and written, and it is closed once."""
    own = Recorder()
    run = fit(Net(), own, data=batches(1), max_epochs=1)
    assert own.open == []
    assert own.closed == 1
    step = ["train_data", "optimizer_zero_grad", "training_step", "backward", "optimizer_step"]
    assert [action for action in own.seen if action not in ("metrics", "record")] == ["fit", *step, "train_data"]
    assert capsys.readouterr().out == f"{len(own.seen)} actions\n"
    assert (run.dir / "profile.txt").read_text(encoding="utf-8") == f"{len(own.seen)} actions\n"


def test_start_and_stop_are_enough(capsys: pytest.CaptureFixture[str]) -> None:
    """Without `summary` nothing is shown or written."""

    class Least:
        def start(self, action: str) -> None: ...

        def stop(self, action: str) -> None: ...

    run = fit(Net(), Least())
    assert capsys.readouterr().out == ""
    assert not (run.dir / "profile.txt").exists()


class NoStop:
    def start(self, action: str) -> None: ...


class NoAction(NoStop):
    def stop(self) -> None: ...


class WrongSummary(Recorder):
    def summary(self, columns: int) -> str:  # type: ignore[override]
        return ""


class WrongClose(Recorder):
    close = 3  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("simpel", r"did you mean 'simple'\?"),
        (NoStop(), r"a NoStop without stop\(action\)"),
        (NoAction(), r"a NoAction that cannot be called as stop\(action\)"),
        (WrongSummary(), r"cannot be called as summary\(\)"),
        (WrongClose(), r"a WrongClose without close\(\)"),
        (Simple, r"the class.* Simple\(\)"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "validate", "predict"])
def test_wrong_profilers_are_refused_at_once(given: Any, message: str, verb: str) -> None:
    """Before anything runs, `predict` included: with what is wrong, and the nearest name."""
    called: list[int] = []
    model = ld.attach(Net(), setup=lambda model: called.append(1))
    extra = {"max_epochs": 1} if verb == "fit" else {}
    with pytest.raises(ld.SettingsError, match=message):
        getattr(ld, verb)(model, batches(1), profiler=given, **extra, **QUIET)
    assert called == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ld.profilers.create("advance"), "did you mean 'advanced'"),
        (lambda: ld.profilers.Simple(synchronize=1), "Simple.synchronize=1"),  # type: ignore[arg-type]
        (lambda: ld.profilers.Advanced(top=0), "Advanced.top=0"),
        (lambda: ld.profilers.Advanced(sort="cumulativ"), "did you mean 'cumulative'"),  # type: ignore[arg-type]
        (lambda: ld.profilers.Advanced(pstats="a"), "Advanced.pstats='a'"),  # type: ignore[arg-type]
        (lambda: ld.profilers.PyTorch(active=0), "PyTorch.active=0.; allowed: an integer of at least 1"),
        (lambda: ld.profilers.PyTorch(wait=True), "PyTorch.wait=True"),
        (lambda: ld.profilers.PyTorch(with_stack=2), "PyTorch.with_stack=2"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make: Any, message: str) -> None:
    """Options are checked when the profiler is made."""
    with pytest.raises(ld.SettingsError, match=message):
        make()


@pytest.mark.parametrize("kind", [ld.profilers.Simple, ld.profilers.Advanced])
def test_stop_without_start(kind: Any) -> None:
    """It is refused, not counted."""
    with pytest.raises(ld.LightdecoError, match=r"stop\('a'\) without start\('a'\)"):
        kind().stop("a")


def test_what_an_exception_left_open_ends() -> None:
    """Actions of one's own that were not ended end with the action around them."""
    simple = Simple()

    class Careless(Net):
        @ld.on_train_batch_end
        def work(self) -> None:
            simple.start("mine")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(Careless(), simple)
    assert simple.actions["mine"].calls == 1
    assert simple.actions["fit"].calls == 1


def test_synchronize_measures_the_same_actions() -> None:
    """On a CPU there is nothing to wait for."""
    waiting, simple = Simple(synchronize=True), Simple()
    fit(Net(), waiting)
    fit(Net(), simple)
    assert {n: a.calls for n, a in waiting.actions.items()} == {n: a.calls for n, a in simple.actions.items()}


# ---- advice ----------------------------------------------------------------------------------------------------------


class Slow(Dataset[Any]):
    """Samples that take some milliseconds each."""

    def __init__(self, pause_s: float) -> None:
        self.pause_s = pause_s

    def __len__(self) -> int:
        return 12

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        time.sleep(self.pause_s)
        return torch.full((4,), float(i)), i % 3


class Steady(Net):
    """A step that takes 5 ms whatever the machine does, so that nothing of the loop is large beside it."""

    @ld.training_step
    def step(self, batch: Any) -> Tensor:
        time.sleep(0.005)
        return F.cross_entropy(self(batch[0]), batch[1])


def advised(profiler: Simple) -> list[str]:
    """The causes that the advice names, sorted."""
    causes = {
        "Waiting for train data": "data",
        "Validation": "validation",
        "Writing checkpoints": "checkpoints",
        "Making records": "records",
        "on_train_batch_end": "hook",
        "optimizer_step": "optimizer",
        "The loop itself": "batch",
    }
    found = (cause for line in profiler.advice() for begin, cause in causes.items() if line.startswith(begin))
    named = sorted(found)
    assert len(named) == len(profiler.advice()), profiler.advice()
    return named


def slow(*given: Any, **more: Any) -> None:
    """What takes 10 ms."""
    time.sleep(0.01)


class Keeper:
    """A callback whose state takes long to make."""

    @ld.on_fit_start
    def begin(self) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        slow()
        return {}

    def load_state_dict(self, state: Any) -> None: ...


class Hook:
    @ld.on_train_batch_end
    def look(self) -> None:
        slow()


@pytest.mark.parametrize(
    ("causes", "settings"),
    [
        ([], {}),
        (["data"], {"train": DataLoader(Slow(0.01))}),
        (["hook"], {"callbacks": Hook()}),
        (["records"], {"log_every_n_steps": 1, "slow_file": True}),
        ([], {"log_every_n_steps": 12, "slow_file": True}),
        (["checkpoints"], {"callbacks": Keeper(), "checkpoint": ld.ModelCheckpoint(every_n_steps=1)}),
        (["validation"], {"val": DataLoader(Slow(0.01), batch_size=2), "validates": True}),
    ],
    ids=["nothing", "data", "hook", "records", "rare records", "checkpoints", "validation"],
)
def test_advice_names_its_cause(causes: list[str], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A real cause is found, with its share, and nothing else is."""
    simple = Simple()
    settings = dict(settings)
    if settings.pop("slow_file", False):
        monkeypatch.setattr(MetricsFile, "write", slow)
    train, val = settings.pop("train", batches(12)), settings.pop("val", None)
    expected = sorted(causes)
    if settings.pop("validates", False):
        settings |= {"num_sanity_val_steps": 0}
        data: Any = (train, val)
    else:
        data = train
    fit(Steady(), simple, data=data, **settings)
    found = advised_but_val_data(simple)
    assert found == expected, simple.summary()


def advised_but_val_data(simple: Simple) -> list[str]:
    """The causes, without that validation waits for its slow data, which is a cause of its own."""
    lines = [line for line in simple.advice() if not line.startswith("Waiting for val data")]
    simple.advice = lambda: lines  # type: ignore[method-assign]
    return advised(simple)


def facts(**given: Any) -> Facts:
    """A fit in which nothing is left to do better."""
    source = Source("DataLoader", 4, True)
    return Facts("fit", **({"device": "cuda", "data": {"train": source, "val": source}, "log_every": 10} | given))


#: A fit of 10 s in which nothing but the step takes long.
FINE = {"fit": (1, 10.0, 0.5), "training_step": (200, 9.0, 9.0)}


@pytest.mark.parametrize(
    ("given", "measured", "sentence"),
    [
        (
            {"data": {"train": Source("DataLoader", 0)}},
            {"train_data": 1.6},
            r"Waiting for train data took 16 % of the time \(1.6 s\): DataLoader\(num_workers",
        ),
        ({}, {"train_data": 1.6}, "with num_workers=4: try more workers"),
        ({"data": {"train": Source("list")}}, {"train_data": 1.6}, "a list is read in this process"),
        ({}, {"val_data": 1.6}, "Waiting for val data took 16 %"),
        ({"data": {"train": Source("DataLoader", 1, False)}}, {"transfer_batch_to_device": 0.6}, "pin_memory=True"),
        ({"optimizer": "Adam", "faster": "fused=True"}, {"optimizer_step": 2.1}, r"took 21 % .*Adam\(…, fused=True\)"),
        ({}, {"record": 0.6}, "Making records took 6 % .*log_every_n_steps larger; it is 10"),
        ({"device": "cpu"}, {"metrics": 0.6}, "Making records took 6 %"),
        ({}, {"validation": 3.1}, r"Validation took 31 % of the time \(3.1 s, 50 times\): .*check_val_every_n_epoch"),
        ({"checkpoints": 2}, {"checkpoint": 1.1}, r"took 11 % of the time \(1.1 s, 2 of them\): .*background=True"),
        (
            {},
            {"on_train_batch_end A.b": 1.1},
            r"on_train_batch_end A.b took 11 % .*@ld.on\('on_train_batch_end', every",
        ),
        ({}, {"on_after_batch_transfer A.b": 1.1}, "do it in the workers of the data"),
    ],
)
def test_each_rule_needs_its_cost(given: Any, measured: dict[str, float], sentence: str) -> None:
    """Above its share a rule speaks, alone; below it is silent."""
    ((action, part),) = measured.items()
    (line,) = advice(facts(**given), FINE | {action: (50, part, part)})
    assert re.search(sentence, line), line
    assert advice(facts(**given), FINE | {action: (50, part - 0.2, part - 0.2)}) == []


@pytest.mark.parametrize(
    ("given", "measured"),
    [
        (
            {"device": "cpu", "data": {"train": Source("DataLoader", 1, False)}},
            {"transfer_batch_to_device": (50, 5, 5)},
        ),
        ({}, {"transfer_batch_to_device": (50, 5, 5)}),  # it is pinned
        ({"faster": None}, {"optimizer_step": (50, 5, 5)}),
        ({"log_every": 50}, {"record": (4, 5, 5)}),  # records that are made anyway
        ({}, {"metrics": (50, 5, 5)}),  # the GPU is waited for
        ({}, {"validation": (1, 5, 5)}),
        ({"checkpoints": 1}, {"checkpoint": (50, 5, 5)}),
        ({}, {"on_fit_start A.b": (1, 5, 5)}),
        ({}, {"fit": (1, 10.0, 5.0)}),  # steps of 45 ms: not many small ones
        ({"data": {"train": Source("DataLoader", 0)}}, {"train_data": (9, 5, 5), "training_step": (9, 5, 5)}),
        ({}, {"fit": (0, 0.0, 0.0)}),
    ],
)
def test_each_rule_needs_its_cause(given: Any, measured: Any) -> None:
    """However long something takes, there is no advice where it could not help, or where too little was seen."""
    assert advice(facts(**given), FINE | measured) == []


def test_short_steps_want_larger_batches() -> None:
    """Where the loop takes long because its steps are short; the largest share comes first."""
    measured = {"fit": (1, 1.0, 0.3), "training_step": (1000, 0.4, 0.4), "train_data": (1000, 0.2, 0.2)}
    first, second = advice(facts(), measured)
    assert first == (
        "The loop itself took 30 % of the time (300 ms), the work of one batch only 400 µs: larger batches need fewer "
        "rounds."
    )
    assert second.startswith("Waiting for train data took 20 % of the time (200 ms)")


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.Adam(p), "fused=True"),
        (lambda p: torch.optim.Adam(p, fused=True), None),
        (lambda p: torch.optim.Adam(p, foreach=True), None),
        (lambda p: torch.optim.Adam(p, differentiable=True), None),
        (lambda p: torch.optim.Adagrad(p), "fused=True"),
        (lambda p: torch.optim.NAdam(p), "foreach=True"),
        (lambda p: torch.optim.LBFGS(p), None),
    ],
)
def test_a_faster_optimizer_is_one_that_exists(make: Any, expected: str | None) -> None:
    """Only arguments that this optimizer takes, and that work: the advice is tried out."""
    optimizer = make([torch.nn.Parameter(torch.ones(2))])
    assert _faster(optimizer, "cpu") == expected
    if expected is not None:
        faster = type(optimizer)([torch.nn.Parameter(torch.ones(2))], **{expected.partition("=")[0]: True})
        faster.param_groups[0]["params"][0].sum().backward()
        faster.step()


def test_the_facts_of_a_fit() -> None:
    """What the advice knows of loaders, optimizer and checkpoints is true."""
    simple = Simple()
    loader = DataLoader(Slow(0.0), num_workers=0)
    both = ld.CombinedLoader({"a": DataLoader(Slow(0.0)), "b": DataLoader(Slow(0.0))}, "sequential")
    policy = ld.ModelCheckpoint(every_n_steps=4, background=True)
    fit(Net(), simple, data=(loader, both), max_epochs=1, checkpoint=policy)
    known = simple._facts["fit"]
    assert known.data == {"train": Source("DataLoader", 0, False), "val": Source("DataLoader", 0, False)}
    assert (known.optimizer, known.faster) == ("Adam", "fused=True")
    assert (known.background, known.checkpoints, known.device) == (True, 3, "cpu")

    def stream() -> Iterator[Any]:
        yield from batches(2)

    fit(Net(), simple, data=stream(), max_epochs=1)
    assert simple._facts["fit"].data == {"train": Source("generator")}
    assert simple._facts["fit"].checkpoints == 0
