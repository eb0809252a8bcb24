"""Callbacks from functions: events by name, arguments by name, and what is refused."""

import functools
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lightdeco as ld
from lightdeco.callbacks.lambda_callback import LambdaCallback
from tests.models import QUIET, Net, batches, equal, weights


def fit(callback: LambdaCallback, model: Net | None = None, **settings: Any) -> ld.Run:
    """A fit of two epochs of 4 batches."""
    return ld.fit(model or Net(), batches(), callbacks=[callback], **({"max_epochs": 2} | QUIET | settings))


def test_functions_get_what_they_ask_for() -> None:
    """Arguments are given by name, in any order, with defaults, by keyword or all of them."""
    seen: list[Any] = []

    def keyword_only(*, model: Any) -> None:
        seen.append(type(model))

    def everything(**given: Any) -> None:
        seen.append(sorted(given))

    callback = LambdaCallback(
        on_train_batch_end=lambda outputs, batch_idx, scale=2: seen.append((type(outputs), batch_idx * scale)),
        on_train_epoch_end=lambda run: seen.append(run.epoch),
        on_fit_start=lambda: seen.append("start"),
        on_train_start=keyword_only,
        on_fit_end=everything,
        teardown=lambda stage: seen.append(stage),
    )
    fit(callback, max_epochs=1)
    steps = [(torch.Tensor, 2 * i) for i in range(4)]
    assert seen == ["start", Net, *steps, 0, ["model", "run"], "fit"]


def test_several_functions_and_partials() -> None:
    """A list of functions is called in its order; whatever can be called is a function."""

    class Counter:
        def __init__(self) -> None:
            self.epochs: list[int] = []

        def __call__(self, run: ld.Run) -> None:
            self.epochs.append(run.epoch)

        def method(self, run: ld.Run) -> None:
            self.epochs.append(-run.epoch)

    def add(to: list[int], run: ld.Run) -> None:
        to.append(10 * run.epoch)

    counter = Counter()
    fit(LambdaCallback(on_train_epoch_end=[counter, counter.method, functools.partial(add, counter.epochs)]))
    assert counter.epochs == [0, 0, 0, 1, -1, 10]


def test_every_of_a_marked_function_counts() -> None:
    """A function marked with ld.on(…, every=n) keeps that."""
    seen: list[int] = []

    @ld.on("train_batch_end", every=3)
    def third(run: ld.Run) -> None:
        seen.append(run.global_step)

    fit(LambdaCallback(on_train_batch_end=third))
    assert seen == [3, 6]


def test_skip_epoch_is_passed_on() -> None:
    """What the function returns reaches the loop."""
    run = fit(LambdaCallback(on_train_batch_start=lambda batch_idx: ld.SKIP_EPOCH if batch_idx == 1 else None))
    assert (run.epoch, run.global_step) == (2, 2)


def test_objects_do_not_share_functions() -> None:
    """Each object has its own functions, and the class none."""
    seen: list[str] = []
    one, two = (LambdaCallback(on_fit_end=functools.partial(seen.append, name)) for name in ("one", "two"))
    ld.fit(Net(), batches(), max_epochs=1, callbacks=[one, two], **QUIET)
    fit(one)
    assert seen == ["one", "two", "one"]


def test_wrong_events_are_refused() -> None:
    """A name that is no event is refused when the object is made, with the nearest."""
    with pytest.raises(ld.MarkError, match="no event 'on_train_epoc_end'; did you mean 'on_train_epoch_end'"):
        LambdaCallback(on_train_epoc_end=print)
    with pytest.raises(ld.MarkError, match=r"no event 'xyz'; allowed: .*on_fit_start"):
        LambdaCallback(xyz=print)
    with pytest.raises(ld.MarkError, match="no event 'training_step'"):
        LambdaCallback(training_step=lambda batch: batch)
    with pytest.raises(ld.MarkError, match=r"LambdaCallback\(\) is called at no event"):
        LambdaCallback()


def test_wrong_functions_are_refused() -> None:
    """What cannot be called is refused at once; a wrong argument, or an async function, when the run begins."""
    with pytest.raises(ld.MarkError, match=r"LambdaCallback\(on_fit_end=3\) cannot be called"):
        LambdaCallback(on_fit_end=3)  # type: ignore[arg-type]
    with pytest.raises(ld.MarkError, match=r"LambdaCallback\(on_fit_end=None\) cannot be called"):
        LambdaCallback(on_fit_end=[None])  # type: ignore[list-item]
    with pytest.raises(ld.MarkError, match="LambdaCallback: teardown takes one function, not a list"):
        LambdaCallback(teardown=[lambda: None])
    where = rf"LambdaCallback.on_fit_end \({__file__}:\d+\)"
    with pytest.raises(ld.MarkError, match=rf"{where}.* asks for \['bath'\]; it may ask for \['run', 'model'\]"):
        fit(LambdaCallback(on_fit_end=lambda bath: None))

    async def wait() -> None: ...

    with pytest.raises(ld.MarkError, match="is an async function"):
        fit(LambdaCallback(on_fit_end=wait))


def test_failure_shows_at_most_five_frames_of_ours() -> None:
    """An exception of a function reaches the caller as it is, with few frames in between."""

    def fail() -> None:
        raise ArithmeticError("on purpose")

    with pytest.raises(ArithmeticError, match="on purpose") as caught:
        fit(LambdaCallback(on_train_batch_end=fail))
    home = str(Path(ld.__file__).parent)
    frames = [f.name for f in traceback.extract_tb(caught.value.__traceback__) if f.filename.startswith(home)]
    assert 1 <= len(frames) <= 5, frames


def test_leaves_no_trace() -> None:
    """Weights and random state are those of a run without it."""
    found: list[list[Tensor]] = []
    for callbacks in ([], [LambdaCallback(on_train_batch_end=lambda batch, run: run.epoch)]):
        model = Net()
        ld.fit(model, batches(), max_epochs=2, seed=1, callbacks=callbacks, **QUIET)
        found.append([*weights(model), torch.get_rng_state()])
    assert equal(*found)
