"""Truncated backpropagation through time: `split_batch` cuts a batch, `carry` goes from part to part."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam

import lightdeco as ld
from lightdeco import seeds
from lightdeco.stepping import detached
from tests.models import QUIET, equal, weights

SEED = 3


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(4, length, 3, generator=generator) for length in (7, 6)]


def fit(model: nn.Module, **settings: Any) -> ld.Run:
    return ld.fit(model, data(), **(QUIET | {"max_epochs": 2, "seed": SEED} | settings))


class Rnn(nn.Module):
    """Predicts the next vector."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn, self.out = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 3)

    def loss(self, part: Tensor, carry: Any) -> tuple[Tensor, Any]:
        hidden, carry = self.rnn(F.dropout(part, 0.1), carry)
        return F.mse_loss(self.out(hidden), part), carry

    @ld.training_step
    def step(self, part: Tensor, carry: Any, batch_idx: int) -> Any:
        loss, carry = self.loss(part, carry)
        return {"loss": loss, "carry": carry}

    @ld.split_batch(size=3)
    def split(self, batch: Tensor, size: int) -> Any:
        return batch.split(size, dim=1)

    @ld.configure_optimizers
    def adam(self) -> Any:
        return Adam(self.parameters(), 0.01)


class Yielding(Rnn):
    def split(self, batch: Tensor, size: int) -> Iterator[Tensor]:
        yield from batch.split(size, dim=1)


@pytest.mark.parametrize("kind", [Rnn, Yielding])
def test_truncated_backpropagation_is_bit_equal_to_the_loop_by_hand(kind: type[Rnn]) -> None:
    """Each part has its update, the carry is detached and begins anew with each batch; one step per batch."""
    lengths: list[int] = []

    class Watch:
        @ld.on_train_batch_end
        def look(self, outputs: Any) -> None:
            lengths.append(len(outputs))

    ours, theirs = kind(), Rnn()
    run = fit(ours, callbacks=Watch())
    optimizer = theirs.adam()
    for k, batch in enumerate(data() * 2):
        torch.manual_seed(seeds.step_seed(SEED, 0, k))
        carry = None
        for part in batch.split(3, dim=1):
            optimizer.zero_grad()
            loss, carry = theirs.loss(part, carry)
            carry = tuple(c.detach() for c in carry)
            loss.backward()
            optimizer.step()
    assert equal(weights(ours), weights(theirs))
    assert (run.global_step, run.progress.updates) == (4, {"": 10})
    assert lengths == [3, 2, 3, 2]


def test_each_step_of_several_has_a_carry_of_its_own() -> None:
    """And a manual one gets the parts too."""
    seen: list[Any] = []

    class Several(Rnn):
        step = None

        @ld.training_step(optimizer="a")
        def first(self, part: Tensor, carry: Any) -> Any:
            seen.append(("a", carry))
            return {"loss": self.rnn(part)[0].mean(), "carry": (carry or 0) + 1}

        @ld.training_step(optimizer="b")
        def second(self, part: Tensor, carry: Any) -> Any:
            seen.append(("b", carry))
            return {"loss": self.out(torch.ones(5)).mean(), "carry": (carry or 0) + 10}

        def adam(self) -> Any:
            return {"a": SGD(self.rnn.parameters(), 0.1), "b": SGD(self.out.parameters(), 0.1)}

    fit(Several(), max_epochs=1, limit_train_batches=1)
    assert seen == [("a", None), ("a", 1), ("a", 2), ("b", None), ("b", 10), ("b", 20)]

    class Manual(Rnn):
        @ld.training_step(manual=True)
        def step(self, part: Tensor, carry: Any) -> Any:
            optimizer: Any = ld.optimizers()
            loss, carry = self.loss(part, carry)
            optimizer.zero_grad()
            ld.backward(loss)
            optimizer.step()
            return {"carry": carry}

    ours, theirs = Manual(), Rnn()
    assert fit(ours).global_step == 4
    fit(theirs)
    assert equal(weights(ours), weights(theirs))


class Point(NamedTuple):
    x: Any
    y: Any


def test_detached_keeps_the_nesting() -> None:
    """Tuples, named tuples, lists and dicts; what is no tensor stays as it is."""
    live = torch.ones(2, requires_grad=True) * 2
    found = detached({"a": Point(live, [live, "text"]), "b": (live, None)})
    assert isinstance(found["a"], Point)
    assert [t.requires_grad for t in (found["a"].x, found["a"].y[0], found["b"][0])] == [False] * 3
    assert (found["a"].y[1], found["b"][1]) == ("text", None)


def with_split(given: Any) -> nn.Module:
    return type("Net", (Rnn,), {"split": given})()


@pytest.mark.parametrize(
    ("split", "said"),
    [
        (lambda self, batch: batch, "returned a Tensor; return a list of parts"),
        (lambda self, batch: None, "returned a NoneType"),
        (lambda self, batch: [], "returned no part"),
    ],
)
def test_what_is_no_sequence_of_parts_is_refused(split: Any, said: str) -> None:
    """With the place of the method."""
    with pytest.raises(ld.StepError, match=rf"test_split.py:\d+\), marked @split_batch, {said}"):
        fit(with_split(ld.split_batch(split)))


def test_what_does_not_fit_is_refused_before_the_first_batch() -> None:
    """A size that nobody gives, accumulation, and `carry` without parts."""
    with pytest.raises(ld.MarkError, match=r"asks for `size`.*write @ld\.split_batch\(size=…\)"):
        fit(with_split(ld.split_batch(lambda self, batch, size: batch.split(size, 1))))
    with pytest.warns(ld.LightdecoWarning, match="size=2 has no effect"):
        fit(with_split(ld.split_batch(size=2)(lambda self, batch: batch.split(3, 1))))
    with pytest.raises(ld.SettingsError, match=r"accumulate_grad_batches=2 cannot go with .*Rnn\.split"):
        fit(Rnn(), accumulate_grad_batches=2)
    with pytest.raises(ld.MarkError, match=r"asks for `carry`.*@ld\.split_batch"):
        fit(with_split(None))
    for wrong in (0, True, "3"):
        with pytest.raises(ld.MarkError, match="size="):
            ld.split_batch(size=wrong)  # type: ignore[call-overload]


def test_carry_outside_of_training_is_refused() -> None:
    """Parts are a matter of training; also beside a split_batch."""

    class Validated(Rnn):
        @ld.validation_step
        def check(self, batch: Tensor) -> Any:
            loss, carry = self.loss(batch, None)
            return {"loss": loss, "carry": carry}

    with pytest.raises(ld.StepError, match='returned "carry", which nothing takes up'):
        ld.validate(Validated(), data(), **QUIET)


def test_lbfgs_and_parts() -> None:
    """A closure evaluates a part again with the carry and the randomness of the first time."""
    seen: list[tuple[Any, Any]] = []

    class Newton(Rnn):
        @ld.training_step
        def step(self, part: Tensor, carry: Any) -> Any:
            seen.append((None if carry is None else float(carry[0].sum()), float(torch.rand(()))))
            loss, carry = self.loss(part, carry)
            return {"loss": loss, "carry": carry}

        def adam(self) -> Any:
            return torch.optim.LBFGS(self.parameters(), max_iter=3)

    fit(Newton(), max_epochs=1, limit_train_batches=1)
    assert len(seen) > len(set(seen)) == 3
