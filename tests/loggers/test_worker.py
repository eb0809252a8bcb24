"""Loggers work behind a queue: a run neither waits for them nor fails with them."""

import multiprocessing
import os
import signal
import statistics
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import lightdeco as ld
from lightdeco.errors import LightdecoWarning, StepError
from lightdeco.loggers import Loggers, worker
from lightdeco.loggers.worker import Worker
from tests.models import Net, batches

QUIET: dict[str, Any] = {"progress_bar": False, "summary": False, "num_sanity_val_steps": 0}


class Slow:
    """Waits in each call until it is let go."""

    close_timeout = 0.2

    def __init__(self) -> None:
        self.go = threading.Event()
        self.steps: list[int] = []
        self.threads: set[str] = set()

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.go.wait(30)
        self.threads.add(threading.current_thread().name)
        self.steps.append(step)

    def close(self, status: str) -> None:
        self.steps.append(-1)


class Keeping:
    """Keeps what it is shown."""

    def __init__(self) -> None:
        self.seen: dict[str, Any] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.seen[str(step)] = metrics

    def log_image(self, name: str, value: Any, step: int) -> None:
        self.seen[name] = value

    log_figure = log_histogram = log_text = log_table = log_image

    def log_artifact(self, path: Path) -> None:
        self.seen["path"] = path


def _threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("lightdeco-")]


def test_calls_come_in_order_on_a_thread_that_ends() -> None:
    """All calls arrive in their order on one thread of the logger's own, and it is gone after `close`."""
    slow = Slow()
    slow.close_timeout = 20
    fan = Loggers({"slow": slow})
    for step in range(1000):
        fan.log_metrics({"x": 1.0}, step)
    slow.go.set()
    fan.close("finished")
    assert slow.steps == [*range(1000), -1]
    assert slow.threads == {"lightdeco-slow"}
    assert _threads() == []


def test_a_blocked_logger_holds_neither_run_nor_others_nor_the_end() -> None:
    """Calls come back at once, another logger gets everything, `close` waits no longer than told and says the loss."""
    slow, keeping = Slow(), Keeping()
    fan = Loggers({"slow": slow, "keeping": keeping})
    start = time.monotonic()
    for step in range(50):
        fan.log_metrics({"x": float(step)}, step)
    assert time.monotonic() - start < 0.2
    with pytest.warns(LightdecoWarning, match=r"'slow' did not come to its end in time .*: 50 of 50 calls") as caught:
        fan.close("finished")
    assert time.monotonic() - start < 1.5
    assert len(caught) == 1
    assert len(keeping.seen) == 50
    slow.go.set()
    deadline = time.monotonic() + 5
    while _threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert _threads() == []  # left behind, it ends after the call that it was in, without the others
    assert slow.steps == [0]


def test_a_queue_that_is_full_drops_and_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the bound of calls the newest are dropped; the number is told once, at the end."""
    monkeypatch.setattr(Worker.__init__, "__defaults__", (10, worker.MAX_BYTES))
    slow = Slow()
    slow.close_timeout = 20
    fan = Loggers({"slow": slow})
    for step in range(100):
        fan.log_metrics({"x": 1.0}, step)
    slow.go.set()
    with pytest.warns(LightdecoWarning, match=r"'slow' was too slow: (89|90) of 100 calls were dropped; metrics.jsonl"):
        fan.close("finished")
    assert slow.steps in ([*range(11), -1], [*range(10), -1])


def test_large_values_are_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images that wait take no more than the bound; one that is larger by itself passes."""
    monkeypatch.setattr(Worker.__init__, "__defaults__", (10, 1000))
    keeping, gate = Keeping(), threading.Event()
    keeping.log_metrics = lambda metrics, step: gate.wait(20)  # type: ignore[method-assign,assignment,return-value]
    fan = Loggers({"keeping": keeping})
    fan.log_metrics({}, 0)
    for name, side in (("a", 40), ("b", 10), ("c", 5)):
        fan.log_image(name, torch.zeros(side, side), 1)
    gate.set()
    with pytest.warns(LightdecoWarning, match="2 of 4 calls were dropped"):
        fan.close("finished")
    assert list(keeping.seen) == ["a"]


def test_an_exit_within_a_logger_is_its_failure() -> None:
    """Even SystemExit and KeyboardInterrupt of a logger's own code are one warning, and the next call is tried."""

    class Exiting(Keeping):
        def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
            if step == 1:
                raise SystemExit(3)
            super().log_metrics(metrics, step)

    exiting = Exiting()
    fan = Loggers({"exiting": exiting})
    fan.log_metrics({}, 1)
    fan.log_metrics({}, 2)
    with pytest.warns(LightdecoWarning, match=r"'exiting' failed in log_metrics \(SystemExit: 3\)"):
        fan.close("finished")
    assert list(exiting.seen) == ["2"]


def test_ctrl_c_ends_the_wait_at_the_end() -> None:
    """An interruption while `close` waits for a logger reaches the caller."""
    slow = Slow()
    slow.close_timeout = 20
    fan = Loggers({"slow": slow})
    fan.log_metrics({}, 1)
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        fan.close("finished")
    slow.go.set()
    timer.join()


def test_a_logger_may_be_closed_on_the_training_thread() -> None:
    """One that says so is closed by the thread that trains, after all its calls; a failure there is a warning."""

    class Choosy(Keeping):
        closes_on_training_thread = True

        def close(self, status: str) -> None:
            self.seen["close"] = threading.current_thread()
            raise ValueError(status)

    choosy = Choosy()
    fan = Loggers({"choosy": choosy})
    fan.log_metrics({}, 1)
    with pytest.warns(LightdecoWarning, match=r"'choosy' failed in close \(ValueError: finished\)"):
        fan.close("finished")
    assert choosy.seen == {"1": {}, "close": threading.current_thread()}


def test_no_thread_left_in_the_system_is_a_failure_of_the_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that cannot be started is a warning, not an exception in the training."""

    def refuse(self: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    fan = Loggers({"keeping": Keeping()})
    with pytest.warns(LightdecoWarning) as caught:  # noqa: PT031 - two calls, both belong to it
        fan.log_metrics({}, 1)
        fan.close("finished")
    assert "can't start new thread" in str(caught[0].message)
    assert "1 of 1 calls were dropped" in str(caught[1].message)


def test_values_are_copied_at_the_call(tmp_path: Path) -> None:
    """What changes after the call was logged as it was, in the plain forms that every logger gets."""
    figures = pytest.importorskip("matplotlib.figure")
    keeping = Keeping()
    fan = Loggers({"keeping": keeping})
    image, weights, rows, metrics = torch.zeros(3, 2, 2), numpy.ones(3), [{"a": torch.tensor(1), "b": "x"}], {"x": 1.0}
    figure = figures.Figure(figsize=(1, 1), dpi=20)
    fan.log_image("image", image, 1)
    fan.log_histogram("weights", weights, 1)
    fan.log_table("rows", rows, 1)
    fan.log_figure("figure", figure, 1)
    fan.log_metrics(metrics, 1)
    fan.log_artifact(tmp_path)
    figure.set_facecolor("black")
    rows[0]["b"] = "y"
    metrics["x"] = 2.0
    image += 1
    weights += 1
    fan.close("finished")
    assert keeping.seen["image"].shape == (2, 2, 3)
    assert keeping.seen["image"].max() == 0
    assert keeping.seen["weights"].tolist() == [1, 1, 1]
    assert keeping.seen["rows"] == {"a": [1], "b": ["x"]}
    assert keeping.seen["figure"].shape == (20, 20, 3)
    assert keeping.seen["figure"].min() == 255
    assert keeping.seen["1"] == {"x": 1.0}
    assert keeping.seen["path"] == tmp_path


@pytest.mark.parametrize(
    ("method", "value", "message"),
    [
        ("log_image", torch.zeros(2, 3, 5), r"Tensor of the shape \(2, 3, 5\); allowed: .*CxHxW"),
        ("log_image", [[1.0]], "got a list; allowed: a tensor or array"),
        ("log_image", torch.zeros(0, 3), r"shape \(0, 3\)"),
        ("log_figure", torch.zeros(3, 3), "allowed: a matplotlib figure"),
        ("log_histogram", "abc", "got a str; allowed: a tensor, array or list of numbers"),
        ("log_histogram", torch.zeros(2, dtype=torch.complex64), "tensor of torch.complex64"),
        ("log_histogram", ["a"], "values of the type <U1"),
        ("log_text", 5, "got a int; allowed: a str"),
        ("log_table", {"a": [1], "b": [1, 2]}, r"columns of different lengths \(\{'a': 1, 'b': 2\}\)"),
        ("log_table", {"a": "text"}, "a column that is a str"),
        ("log_table", 5, "got a int; allowed: a dict of columns"),
    ],
)
def test_a_value_of_another_kind_is_refused(method: str, value: object, message: str) -> None:
    """A wrong value is the caller's error, with any logger or none; it says what is allowed."""
    for fan in (Loggers({}), Loggers({"keeping": Keeping()})):
        with pytest.raises(StepError, match=message):
            getattr(fan, method)("x", value, 1)
        fan.close("finished")


def test_a_missing_artifact_is_refused(tmp_path: Path) -> None:
    """A path where nothing is, and what is no path, are errors at the call."""
    with pytest.raises(StepError, match="no such file"):
        Loggers({}).log_artifact(tmp_path / "nothing")
    with pytest.raises(StepError, match="got a int"):
        Loggers({}).log_artifact(5)  # type: ignore[arg-type]


def test_a_forked_process_logs_nothing() -> None:
    """In a child that was forked, calls and `close` do nothing and do not hang."""
    keeping = Keeping()
    fan = Loggers({"keeping": keeping})
    fan.log_metrics({}, 1)

    def child() -> None:
        for step in range(100):
            fan.log_metrics({}, step)
            fan.log_text("x", "y", step)
        fan.close("finished")
        os._exit(7)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join(20)
    assert process.exitcode == 7
    fan.close("finished")
    assert list(keeping.seen) == ["1"]


class Numbers(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        ld.current.log_text("from a worker", "ignored")
        return torch.full((4,), float(index))


def test_loaders_with_workers_beside_the_loggers_threads(tmp_path: Path) -> None:
    """Worker processes forked while loggers work neither hang nor log; every record arrives in order."""

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 1)

        @ld.training_step
        def step(self, batch: torch.Tensor) -> torch.Tensor:
            return self.layer(batch / 64).square().mean()

        @ld.configure_optimizers
        def sgd(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    keeping = Keeping()
    data = torch.utils.data.DataLoader(Numbers(), batch_size=8, num_workers=2)
    run = ld.fit(Line(), data, max_epochs=3, log_every_n_steps=1, logger=[keeping, "csv"], root_dir=tmp_path, **QUIET)
    assert list(keeping.seen) == [str(step) for step in range(1, run.global_step + 1)]
    assert _threads() == []


def test_functions_show_values_of_the_active_run(tmp_path: Path) -> None:
    """`log_image` and its like reach the loggers with `global_step`, in no sanity check, and nothing outside a run."""

    class Showing(Net):
        @ld.validation_step
        def check(self, batch: Any, run: Any) -> torch.Tensor:
            ld.current.log_image("image", batch[0])
            ld.current.log_histogram("histogram", self.body[0].weight)
            ld.current.log_text("text", f"{run.stage} {run.global_step}")
            ld.current.log_table("table", {"a": [1]})
            ld.current.log_artifact(tmp_path)
            return super().check(batch)["loss"]

    keeping = Keeping()
    quiet = QUIET | {"num_sanity_val_steps": 2}
    ld.fit(Showing(), (batches(), batches(1)), max_epochs=1, logger=keeping, root_dir=tmp_path / "runs", **quiet)
    assert keeping.seen["text"] == "val 4"
    assert keeping.seen["image"].shape == (8, 4, 1)
    assert keeping.seen["histogram"].shape == (16, 4)
    assert keeping.seen["table"] == {"a": [1]}
    assert keeping.seen["path"] == tmp_path
    for name in ("log_image", "log_figure", "log_histogram", "log_text", "log_table"):
        getattr(ld.current, name)("x", object())


def test_a_wrong_value_in_a_step_ends_the_run(tmp_path: Path) -> None:
    """A wrong kind raises StepError from the step, whatever the loggers."""

    class Wrong(Net):
        @ld.training_step
        def step(self, batch: Any) -> torch.Tensor:
            ld.current.log_text("note", batch)
            return super().step(batch)

    with pytest.raises(StepError, match=r"ld.log_text\('note'\) got a tuple; allowed: a str"):
        ld.fit(Wrong(), batches(), max_epochs=1, logger=False, root_dir=tmp_path, **QUIET)


def test_many_runs_leave_no_thread(tmp_path: Path) -> None:
    """Threads end with their run: 200 sets of loggers leave as many threads as there were."""
    before = threading.active_count()
    for _ in range(200):
        fan = Loggers({"a": Keeping(), "b": Keeping()})
        fan.log_metrics({"x": 1.0}, 1)
        fan.close("finished")
    assert threading.active_count() == before


def test_handing_over_is_cheap() -> None:
    """Handing a record of ten metrics to two loggers costs less than 20 µs."""
    fan = Loggers({"a": Keeping(), "b": Keeping()})
    metrics = {f"train/{name}": float(name) for name in range(10)}
    times = []
    for step in range(2000):
        start = time.perf_counter()
        fan.log_metrics(metrics, step)
        times.append(time.perf_counter() - start)
    fan.close("finished")
    assert statistics.median(times) < 20e-6


def test_state_goes_through_a_resume(tmp_path: Path) -> None:
    """`state_dict` names what each logger keeps, and `create` hands it back before opening."""

    class Named(Keeping):
        def __init__(self) -> None:
            super().__init__()
            self.calls: list[object] = []

        def load_state_dict(self, state: Mapping[str, object]) -> None:
            self.calls.append(dict(state))

        def open(self, directory: Path) -> None:
            self.calls.append("open")

        def state_dict(self) -> dict[str, object]:
            return {"id": len(self.calls)}

    first, second = Named(), Named()
    made = ld.loggers.create([first, second, Keeping()], tmp_path)
    assert Loggers(made).state_dict() == {"named": {"id": 1}, "named_2": {"id": 1}}
    again = Named()
    ld.loggers.create([again], tmp_path, {"named": {"id": 1}, "gone": {}})
    assert again.calls == [{"id": 1}, "open"]


def test_opening_leaves_randomness_alone(tmp_path: Path) -> None:
    """What a vendor draws while it opens changes no random state of the run."""
    import random

    class Drawing(Keeping):
        def open(self, directory: Path) -> None:
            self.drawn = random.random(), numpy.random.rand(), torch.rand(1)

    before = random.getstate(), torch.get_rng_state(), numpy.random.get_state()[1]
    ld.loggers.create(Drawing(), tmp_path)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert (numpy.random.get_state()[1] == before[2]).all()
