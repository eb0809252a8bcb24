"""The order of events is what the loop's docstring and the table of roles say."""

import re
from typing import Any

import pytest
import torch

import lightdeco as ld
from lightdeco import loop
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from lightdeco.roles import ROLES
from tests.models import QUIET, Net, batches

EVENTS = [role.name for role in ROLES.values() if role.kind == "event"]


class Recorder:
    """Writes down every event with `global_step`."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.steps: list[tuple[str, int]] = []


def recorder() -> Any:
    """A callback that hears everything."""

    def hear(name: str) -> Any:
        def event(self: Recorder, run: ld.Run) -> None:
            self.seen.append(name)
            self.steps.append((name, run.global_step))

        return event

    return ld.attach(Recorder(), **{name: hear(name) for name in [*EVENTS, "setup", "teardown"]})


TRAIN_BATCH = [
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
]
TRANSFER = ["on_before_batch_transfer", "on_after_batch_transfer"]


def evaluation(name: str, count: int) -> list[str]:
    batch = [*TRANSFER, f"on_{name}_batch_start", f"on_{name}_batch_end"]
    return [f"on_{name}_start", f"on_{name}_epoch_start", *batch * count, f"on_{name}_epoch_end", f"on_{name}_end"]


def test_the_order_of_a_whole_fit() -> None:
    """Every event of a fit with sanity check, two epochs of two batches and validation, in the documented order."""
    heard = recorder()
    settings: Any = {"num_sanity_val_steps": 1, "checkpoint": ModelCheckpoint(every_n_epochs=1)}
    ld.fit(Net(), (batches(2), batches(1)), max_epochs=2, callbacks=heard, **settings, **QUIET)
    steps = (TRANSFER + TRAIN_BATCH) * 2
    end = ["on_train_epoch_end", "on_save_checkpoint"]
    epoch = ["on_train_epoch_start", *steps, *evaluation("validation", 1), *end]
    assert heard.seen == [
        "setup",
        "on_fit_start",
        "on_sanity_check_start",
        *evaluation("validation", 1),
        "on_sanity_check_end",
        "on_train_start",
        *epoch * 2,
        "on_train_end",
        "on_fit_end",
        "teardown",
    ]


def test_the_order_with_accumulation() -> None:
    """Gradients are cleared at the start of a window and the update comes at its end, the short last one included."""
    heard = recorder()
    ld.fit(Net(), batches(3), max_epochs=1, accumulate_grad_batches=2, callbacks=heard, **QUIET)
    ours = ("on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end")
    parts = [name for name in heard.seen if name in ours]
    first = ["on_before_zero_grad", "on_train_batch_end", "on_before_optimizer_step", "on_train_batch_end"]
    assert parts == [*first, "on_before_zero_grad", "on_before_optimizer_step", "on_train_batch_end"]


def test_the_docstring_of_the_loop_names_every_event_in_the_order_in_which_they_fire() -> None:
    """The pseudocode is the documentation of the order, so it must agree with what happens."""
    written = re.findall(r"\bon_[a-z_]+[a-z]\b", loop.__doc__ or "")
    ours = [name for name in written if name not in ("on_exception", "on_load_checkpoint")]
    heard = recorder()
    settings: Any = {"num_sanity_val_steps": 1, "checkpoint": ModelCheckpoint(every_n_steps=1)}
    ld.fit(Net(), (batches(1), batches(1)), max_epochs=1, callbacks=heard, **settings, **QUIET)
    sanity = slice(heard.seen.index("on_sanity_check_start") + 1, heard.seen.index("on_sanity_check_end"))
    del heard.seen[sanity]
    fired = [n for n in dict.fromkeys(heard.seen) if n.startswith("on_") and "validation" not in n]
    assert ours[: len(fired)] == fired
    explained = set(written) | {f"on_{stage}{rest}" for stage in ("validation", "test", "predict") for rest in _rests()}
    missing = set(EVENTS) - explained
    assert not missing


def _rests() -> list[str]:
    return ["_start", "_end", "_epoch_start", "_epoch_end", "_batch_start", "_batch_end"]


def test_the_events_of_the_other_verbs() -> None:
    """validate, test and predict fire their own events between setup and teardown."""
    for verb, name in ((ld.validate, "validation"), (ld.test, "test"), (ld.predict, "predict")):
        heard = recorder()
        result = verb(Net(), batches(2), callbacks=heard, **QUIET)
        if name == "predict":
            list(result)
        assert heard.seen == ["setup", *evaluation(name, 2), "teardown"]


def test_on_train_batch_end_counts_its_batch() -> None:
    """When on_train_batch_end runs, global_step already counts this batch."""
    heard = recorder()
    ld.fit(Net(), batches(3), max_epochs=1, callbacks=heard, **QUIET)
    assert [step for name, step in heard.steps if name == "on_train_batch_end"] == [1, 2, 3]
    assert [step for name, step in heard.steps if name == "on_train_batch_start"] == [0, 1, 2]


def test_events_get_the_arguments_of_the_table() -> None:
    """Every event of a fit may ask for everything that its row of the table offers, and for run and model."""
    got: dict[str, dict[str, Any]] = {}

    def taker(name: str) -> Any:
        names = (*ROLES[name].offers, "run", "model")
        source = f"def event(self, {', '.join(names)}): got[{name!r}] = dict({', '.join(f'{n}={n}' for n in names)})"
        space: dict[str, Any] = {"got": got}
        exec(source, space)
        return space["event"]

    names = [
        n for n in EVENTS if n not in ("on_exception", "on_load_checkpoint") and not re.match("on_(test|predict)_", n)
    ]
    model = Net()
    ld.fit(
        model,
        (batches(1), batches(1)),
        max_epochs=1,
        callbacks=ld.attach(Recorder(), **{n: taker(n) for n in names}),
        **QUIET,
    )
    assert set(got) == set(names)
    for name, arguments in got.items():
        assert arguments["model"] is model, name
        assert isinstance(arguments["run"], ld.Run), name
    batch = got["on_train_batch_end"]
    assert batch["batch_idx"] == 0
    assert batch["dataloader_idx"] == 0
    assert isinstance(batch["outputs"], torch.Tensor)
    assert isinstance(got["on_before_backward"]["loss"], torch.Tensor)
    assert isinstance(got["on_before_optimizer_step"]["optimizer"], torch.optim.Adam)
    assert got["on_before_batch_transfer"]["device"] == torch.device("cpu")


def test_the_model_the_data_object_and_the_callbacks_hear_in_this_order() -> None:
    """One mechanism for all three, base class first within each."""
    order: list[str] = []

    class Base(Net):
        @ld.on_train_start
        def first(self) -> None:
            order.append("base")

    class Child(Base):
        @ld.on_train_start
        def second(self) -> None:
            order.append("child")

    class Data:
        @ld.train_dataloader
        def train(self) -> Any:
            return batches(1)

        @ld.on_train_start
        def hear(self) -> None:
            order.append("data")

    class Callback:
        def __init__(self, name: str) -> None:
            self.name = name

        @ld.on_train_start
        def hear(self) -> None:
            order.append(self.name)

    ld.fit(Child(), Data(), max_epochs=1, callbacks=[Callback("one"), Callback("two")], **QUIET)
    assert order == ["base", "child", "data", "one", "two"]


def test_an_exception_reaches_on_exception_before_teardown() -> None:
    """on_exception gets the exception, teardown follows, and the exception reaches the caller unchanged."""
    seen: list[object] = []
    failure = KeyError("mine")

    class Failing(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            raise failure

        @ld.on_exception
        def hear(self, exception: BaseException) -> None:
            seen.append(exception)

        @ld.teardown
        def end(self, stage: str) -> None:
            seen.append(stage)

    with pytest.raises(KeyError) as caught:
        ld.fit(Failing(), batches(1), max_epochs=1, **QUIET)
    assert caught.value is failure
    assert seen == [failure, "fit"]


def test_skip_epoch_ends_the_epoch_before_the_batch() -> None:
    """SKIP_EPOCH leaves out the rest of the epoch, which still counts and still validates."""
    ended: list[int] = []

    class Skipping(Net):
        @ld.on_train_batch_start
        def skip(self, batch_idx: int) -> object:
            return ld.SKIP_EPOCH if batch_idx == 1 else None

        @ld.on_train_epoch_end
        def end(self, run: ld.Run) -> None:
            ended.append(run.global_step)

    run = ld.fit(Skipping(), (batches(3), batches(1)), max_epochs=2, **QUIET)
    assert ended == [1, 2]
    assert run.epoch == 2
    assert "val/loss" in run.metrics


def test_every_fires_the_nth_time() -> None:
    """`ld.on(…, every=n)` fires the n-th, 2n-th, … time that the event happens, over epochs."""
    steps: list[int] = []

    class Callback:
        @ld.on("train_batch_end", every=3)
        def hear(self, run: ld.Run) -> None:
            steps.append(run.global_step)

    ld.fit(Net(), batches(4), max_epochs=2, callbacks=Callback(), **QUIET)
    assert steps == [3, 6]
