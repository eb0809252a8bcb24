"""Marks: what a decorator does to a function, which functions it refuses, and how marks are inherited."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.marks import Mark, marks_of
from lightdeco.roles import ROLES

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2
QUIET_EVALUATION: Any = {"progress_bar": False}
DECORATORS = [name for name in ROLES if hasattr(ld, name)]


class Base(nn.Linear):
    """A model that trains; its tests add marks in subclasses."""

    def __init__(self) -> None:
        super().__init__(2, 1)
        self.calls: list[str] = []

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        self.calls.append("Base.step")
        return self(batch).pow(2).mean()

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def called(model: Base, **settings: Any) -> list[str]:
    """What the model noted during a fit of one epoch of two batches."""
    ld.fit(model, BATCHES, **QUIET, **settings)
    return model.calls


# ---- the decorator itself --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DECORATORS)
def test_a_decorator_returns_the_same_function_with_one_more_attribute(name: str) -> None:
    """With and without parentheses: the same object, nothing changed but one attribute."""
    for decorate in (getattr(ld, name), getattr(ld, name)()):

        def method(self: object) -> int:
            return 7

        before = dict(vars(method))
        assert decorate(method) is method
        assert method(None) == 7
        assert [key for key in vars(method) if key not in before] == ["__lightdeco_marks__"]
        assert marks_of(method) == (Mark(name),)


def test_every_role_and_event_has_a_decorator() -> None:
    """The table and the public decorators name the same things, each with a docstring that lists its arguments."""
    assert set(DECORATORS) == set(ROLES)
    for name, role in ROLES.items():
        documentation = getattr(ld, name).__doc__
        assert all(argument in documentation for argument in (*role.offers, "run", "model")), name


def test_no_public_name_is_collected_as_a_test() -> None:
    """`from lightdeco import test_step` in a test file must not make pytest call it."""
    names = [name for name in ld.__all__ if name.startswith("test")]
    assert len(names) >= 3
    assert not any(getattr(getattr(ld, name), "__test__", True) for name in names)


def test_the_options_of_training_step() -> None:
    """`optimizer`, `every` and `manual` are kept in the mark; wrong ones are refused where they are written."""
    marked = ld.training_step(optimizer="disc", every=2, manual=True)(lambda self: None)
    assert marks_of(marked) == (Mark("training_step", every=2, optimizer="disc", manual=True),)
    for wrong in (0, -1, 1.5, True, "2"):
        with pytest.raises(ld.MarkError, match="every"):
            ld.training_step(every=wrong)  # type: ignore[call-overload]
    with pytest.raises(ld.MarkError, match="optimizer"):
        ld.training_step(optimizer=1)  # type: ignore[call-overload]
    with pytest.raises(ld.MarkError, match=r'write @ld\.training_step\(optimizer="disc"\)'):
        ld.training_step("disc")  # type: ignore[call-overload]


def test_options_of_a_decorator_without_options_are_refused() -> None:
    """`every` of an event has a spelling of its own, which the message shows."""
    with pytest.raises(
        ld.MarkError, match=r'^@on_train_batch_end\(every=3\): write @ld\.on\("train_batch_end", every=3\)$'
    ):
        ld.on_train_batch_end(every=3)  # type: ignore[call-overload]
    for decorate, options in ((ld.setup, {"every": 3}), (ld.on_train_end, {"every": 3, "last": True})):
        with pytest.raises(ld.MarkError, match=rf"every=3.*takes no options; write @ld\.{decorate.__name__}$"):
            decorate(**options)


@pytest.mark.parametrize("outside", [True, False])
def test_the_order_with_no_grad_and_wraps_does_not_matter(outside: bool) -> None:
    """A mark above or below a decorator that uses functools.wraps is found, and both work."""

    class Net(Base):
        if outside:

            @ld.on_train_end
            @torch.no_grad()
            def end(self) -> None:
                self.calls.append(f"grad={torch.is_grad_enabled()}")
        else:

            @torch.no_grad()
            @ld.on_train_end
            def end(self) -> None:
                self.calls.append(f"grad={torch.is_grad_enabled()}")

    assert called(Net())[-1] == "grad=False"


def test_two_roles_on_one_method() -> None:
    """One method may be several steps; each is called in its place."""

    class Net(Base):
        @ld.test_step
        @ld.validation_step
        def check(self, batch: Tensor) -> Tensor:
            return self(batch).mean()

    assert list(ld.validate(Net(), BATCHES, **QUIET_EVALUATION)) == ["val/loss"]
    assert list(ld.test(Net(), BATCHES, **QUIET_EVALUATION)) == ["test/loss"]


def test_the_same_role_twice_on_a_method_is_refused() -> None:
    """At the decorator, by either spelling of an event."""
    with pytest.raises(ld.MarkError, match=r"step is marked @training_step twice"):

        @ld.training_step
        @ld.training_step
        def step(self: object, batch: object) -> None: ...

    with pytest.raises(ld.MarkError, match="twice"):
        ld.on("train_end")(ld.on_train_end(lambda self: None))


@pytest.mark.parametrize("kind", [staticmethod, classmethod, property])
def test_a_decorator_on_no_function_is_refused_where_it_stands(kind: Any) -> None:
    """A mark above @staticmethod, @classmethod or @property fails at the decorator."""
    with pytest.raises(ld.MarkError, match=f"@training_step stands on a {kind.__name__}"):
        ld.training_step(kind(lambda self: None))


def test_a_decorator_on_a_class_a_string_or_a_builtin_is_refused() -> None:
    """What cannot carry a mark says so."""
    for wrong in (Base, "disc", len):
        with pytest.raises(ld.MarkError, match="@validation_step"):
            ld.validation_step(wrong)


# ---- ld.on -----------------------------------------------------------------------------------------------------------


def test_on_with_every_counts_over_the_whole_run() -> None:
    """`every=3` calls at the 3rd, 6th, … time, across epochs, with the event's arguments."""
    seen = []

    class Net(Base):
        @ld.on("train_batch_end", every=3)
        def third(self, batch_idx: int, run: ld.Run) -> None:
            seen.append((run.epoch, batch_idx))

    ld.fit(Net(), BATCHES, **QUIET | {"max_epochs": 5})
    assert seen == [(1, 0), (2, 1), (4, 0)]


def test_on_with_every_counts_for_each_object_by_itself() -> None:
    """Two callbacks of one class do not share a count."""

    class Every:
        def __init__(self) -> None:
            self.seen: list[int] = []

        @ld.on("on_train_batch_end", every=2)
        def second(self, batch_idx: int) -> None:
            self.seen.append(batch_idx)

    first, second = Every(), Every()
    ld.fit(Base(), BATCHES * 2, callbacks=[first, second], **QUIET)
    assert first.seen == second.seen == [1, 3]


def test_on_refuses_wrong_names_and_counts() -> None:
    """The nearest event is named; roles are no events; `@ld.on` without parentheses is told apart."""
    with pytest.raises(ld.MarkError, match=r"no event 'train_batch_ends'; did you mean 'on_train_batch_end'\?$"):
        ld.on("train_batch_ends")
    for wrong in ("training_step", "", lambda self: None):
        with pytest.raises(ld.MarkError, match="there is no event"):
            ld.on(wrong)  # type: ignore[arg-type]
    for every in (0, True, 2.0):
        with pytest.raises(ld.MarkError, match="every"):
            ld.on("train_end", every=every)  # type: ignore[arg-type]


# ---- inheritance -----------------------------------------------------------------------------------------------------


def test_events_run_base_class_first_and_an_override_keeps_its_mark_and_place() -> None:
    """Any number of methods; an override without a decorator is called instead, once, in the base's place."""

    class Parent(Base):
        @ld.on_train_start
        def first(self) -> None:
            self.calls.append("Parent.first")

        @ld.on_train_start
        def second(self) -> None:
            self.calls.append("Parent.second")

    class Child(Parent):
        @ld.on_train_start
        def third(self) -> None:
            self.calls.append("Child.third")

        def first(self) -> None:
            self.calls.append("Child.first")

        def step(self, inputs: Tensor) -> Tensor:  # another name for the batch
            self.calls.append("Child.step")
            return self(inputs).pow(2).mean()

    assert called(Child()) == ["Child.first", "Parent.second", "Child.third", "Child.step", "Child.step"]


def test_none_removes_a_mark() -> None:
    """`name = None` in a subclass drops what it inherits; a later override does not bring it back."""

    class Loud(Base):
        @ld.on_train_start
        def start(self) -> None:
            self.calls.append("start")

    class Silent(Loud):
        start = None  # type: ignore[assignment]

    class Again(Silent):
        def start(self) -> None:  # type: ignore[override]
            self.calls.append("never")

    assert called(Loud())[0] == "start"
    assert called(Silent()) == called(Again()) == ["Base.step"] * 2


def test_none_makes_room_for_the_role_under_another_name() -> None:
    """The same role under two names is refused with both places; `name = None` solves it."""

    class Two(Base):
        @ld.training_step
        def mine(self, batch: Tensor) -> Tensor:
            self.calls.append("mine")
            return self(batch).pow(2).mean()

    class One(Two):
        step = None  # type: ignore[assignment]

    with pytest.raises(
        ld.MarkError, match=r"Two\.step \(.*test_marks\.py:\d+\) and Two\.mine \(.*test_marks\.py:\d+\)"
    ):
        called(Two())
    assert called(One()) == ["mine"] * 2


def test_a_mixin_diamond_is_read_in_the_order_of_the_mro() -> None:
    """Each class counts once; of two overrides the one that Python would call is called."""

    class Root(Base):
        @ld.on_train_start
        def start(self) -> None:
            self.calls.append("Root")

    class Left(Root):
        def start(self) -> None:
            self.calls.append("Left")

        @ld.on_train_start
        def left(self) -> None:
            self.calls.append("left")

    class Right(Root):
        def start(self) -> None:
            self.calls.append("Right")

        @ld.on_train_start
        def right(self) -> None:
            self.calls.append("right")

    class Bottom(Left, Right): ...

    assert called(Bottom())[:3] == ["Left", "right", "left"]
