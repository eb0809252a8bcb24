"""What stands between a verb and the user's code: frames, and library calls per batch."""

import gc
import sys
import traceback
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import lightdeco as ld
from tests.models import QUIET, Net, batches

PACKAGE = str(Path(ld.__file__).parent)


def frames(error: BaseException) -> list[str]:
    """The functions of lightdeco in a traceback."""
    return [f.name for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(PACKAGE)]


class Boom(Exception):
    """The user's own error."""


def explode(thing: Any, batch: Any = None) -> Any:
    raise Boom


@pytest.mark.parametrize(
    "role",
    [
        "training_step",
        "validation_step",
        "configure_optimizers",
        "setup",
        "train_dataloader",
        "on_fit_start",
        "on_train_batch_end",
        "on_before_optimizer_step",
        "on_validation_batch_start",
        "on_validation_end",
        "on_train_epoch_end",
        "on_after_batch_transfer",
    ],
)
@pytest.mark.parametrize("sanity", [0, 1])
@pytest.mark.parametrize("interval", [None, 1])
def test_at_most_five_frames_lie_above_the_users_code(role: str, sanity: int, interval: int | None) -> None:
    """Exceptions reach the caller unchanged, from any role, wherever it is called from."""
    model = ld.attach(Net(), **{role: explode})
    data: Any = batches(2) if role != "train_dataloader" else None
    with pytest.raises(Boom) as caught:
        ld.fit(
            model,
            {"val": batches(1)} | ({"train": data} if data else {}),
            max_epochs=1,
            num_sanity_val_steps=sanity,
            val_check_interval=interval,
            **QUIET,
        )
    assert len(frames(caught.value)) <= 5, frames(caught.value)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_at_most_five_frames_lie_above_an_evaluation_step(verb: str) -> None:
    """The same for the other verbs."""
    role = {"validate": "validation_step", "test": "test_step", "predict": "predict_step"}[verb]
    model = ld.attach(Net(), **{role: explode})
    with pytest.raises(Boom) as caught:
        list(getattr(ld, verb)(model, batches(1), **QUIET))
    assert len(frames(caught.value)) <= 5, frames(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_at_most_five_frames_lie_above_a_dataset(workers: int) -> None:
    """An error of the dataset reaches the caller as it is (from a worker: as torch sends it)."""

    class Broken(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, i: int) -> Any:
            raise Boom(f"sample {i}")

    loader = torch.utils.data.DataLoader(Broken(), batch_size=2, num_workers=workers)
    with pytest.raises(Boom, match="sample 0") as caught:
        ld.fit(Net(), loader, max_epochs=1, **QUIET)
    assert len(frames(caught.value)) <= 5, frames(caught.value)


def test_at_most_four_frames_lie_between_fit_and_the_optimizer() -> None:
    """fit → … → optimizer.step."""
    found: list[str] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            found.extend(f.name for f in traceback.extract_stack() if f.filename.startswith(PACKAGE))
            return super().step(closure)

    class Own(Net):
        @ld.configure_optimizers
        def adam(self) -> Any:
            return Watched(self.parameters(), lr=0.1)

    ld.fit(Own(), batches(1), max_epochs=1, **QUIET)
    assert found[0] == "fit"
    assert len(found) <= 4, found


def test_at_most_sixty_library_calls_per_batch() -> None:
    """Python calls into lightdeco for one training batch, with a logged dict and no callbacks."""

    class Plain(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            return {"loss": loss, "acc": loss}

    count, at_batch = 0, list[int]()

    def profile(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        if event == "call":
            count += frame.f_code.co_filename.startswith(PACKAGE)
            if frame.f_code is Plain.step.__code__:
                at_batch.append(count)

    sys.setprofile(profile)
    try:
        ld.fit(Plain(), batches(6), max_epochs=1, **QUIET)
    finally:
        sys.setprofile(None)
    calls = [b - a for a, b in pairwise(at_batch)]
    assert 5 <= min(calls) <= max(calls) <= 60, calls


def test_after_fit_nothing_of_optimizer_and_batches_survives() -> None:
    """Run and model are kept; batches, losses, gradients' graph and the optimizer with its state are freed."""
    seen: list[weakref.ref[Any]] = []

    class Watched(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            seen.extend(weakref.ref(tensor) for tensor in (batch[0], loss))
            return {"loss": loss, "acc": loss.detach()}

        @ld.configure_optimizers
        def adam(self) -> Any:
            optimizer = torch.optim.Adam(self.parameters())
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
            seen.extend((weakref.ref(optimizer), weakref.ref(scheduler)))
            return optimizer, scheduler

        @ld.on_fit_end
        def look(self, run: ld.Run) -> None:
            state = run.optims[""].optimizer.state
            seen.extend(weakref.ref(values["exp_avg"]) for values in state.values())

    def data() -> Any:
        for _ in range(3):
            yield torch.rand(4, 4), torch.zeros(4, dtype=torch.long)

    class Data:
        @ld.train_dataloader
        @ld.val_dataloader
        def loader(self) -> Any:
            return list(data())

    model = Watched()
    run = ld.fit(model, Data(), max_epochs=2, **QUIET)
    gc.collect()
    assert len(seen) > 10
    assert [each for ref in seen if (each := ref()) is not None] == []
    assert run.global_step == 6
