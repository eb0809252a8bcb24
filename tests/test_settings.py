"""Settings: what every field takes and refuses, and what the refusal says."""

import dataclasses
import decimal
import enum
import fractions
import math
import pathlib
import pickle
import types
import typing
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightdeco import settings as module
from lightdeco.errors import LightdecoError, SettingsError
from lightdeco.settings import Overrides, Settings, explicit, resolve
from lightdeco.settings_checks import CHECKS, shown

NAMES = [field.name for field in dataclasses.fields(Settings)]
INF, NAN = math.inf, math.nan


class Thing:
    """Stands for a callback, logger, plugin or profiler."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Thing)

    __hash__ = None  # type: ignore[assignment]


class Level(str):
    """A subclass of str, as an Enum of strings is."""


class Backend(str, enum.Enum):
    """An Enum of texts: `str` shows its member as `Backend.CSV`."""

    CSV = "csv"


class Unprintable(Thing):
    """Fails when it is shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def make(values: dict[str, Any]) -> Settings:
    """Settings of values that no type checker has seen."""
    return Settings(**values)


def checked(name: str, value: object) -> object:
    """What the check of one field keeps, whether available yet or not."""
    return CHECKS[name](name, value)


NO_BOOL: list[object] = [None, 0, 1, 0.0, "True", "", [], numpy.int64(1)]
NO_COUNT: list[object] = [
    0,
    -1,
    True,
    False,
    1.0,
    2.5,
    NAN,
    INF,
    "3",
    "three",
    b"3",
    [1],
    {},
    2**63,
    1j,
    torch.tensor(1),
]
NO_COUNT += [numpy.float64(3), numpy.timedelta64(3, "s"), numpy.bool_(True), decimal.Decimal(3), fractions.Fraction(3)]
NO_SHARE: list[object] = [
    -1,
    -0.5,
    0.0,
    -0.0,
    1.0000001,
    2.0,
    NAN,
    INF,
    -INF,
    True,
    False,
    "0.5",
    "all",
    [0.5],
    1j,
    2**63,
]
NO_POSITIVE: list[object] = [0, 0.0, -0.5, -1, NAN, INF, -INF, True, False, "1", [1.0], 10**400, 1j]
NO_OBJECT: list[object] = [1.5, b"x", {}, (x for x in "a"), len, lambda: None, types, Thing, 1j, numpy.float32(1)]
NO_TEXT: list[object] = ["", " ", "a\0b", "a\nb", "\x7f", "\x85"]
NO_PATH: list[object] = [*NO_TEXT, 0, True, b"runs", [], pathlib.Path("a\0b")]

GOOD_COUNTS: list[object] = [1, 7, 2**63 - 1, numpy.int64(3), numpy.uint8(3)]
GOOD_SHARES: list[object] = [1, 10, 0.1, 1.0, numpy.float32(0.5), numpy.int32(2)]
BOOLS: list[object] = [True, False, numpy.bool_(True)]

# Every field: values that it takes, values that it refuses.
FIELDS: dict[str, tuple[list[object], list[object]]] = {
    "max_epochs": ([None, *GOOD_COUNTS], NO_COUNT),
    "max_steps": ([None, *GOOD_COUNTS], NO_COUNT),
    "min_epochs": ([None, *GOOD_COUNTS], NO_COUNT),
    "min_steps": ([None, *GOOD_COUNTS], NO_COUNT),
    "max_time": (
        [None, 1, 0.5, numpy.float64(2), timedelta(seconds=1), "00:00:00:01", "1:2:3:4", "99:23:59:59"],
        [
            0,
            0.0,
            -1,
            -2.5,
            True,
            NAN,
            INF,
            timedelta(0),
            timedelta(-1),
            "",
            "00:00:00:00",
            "01:00:00",
            "00:24:00:00",
            "00:00:60:00",
            "00:00:00:60",
            "00:00:00:01\n",
            "-1:00:00:00",
            "\u0660:0:0:\u0661",  # digits, but not ASCII ones
            "1h",
            "10",
            [1],
            10**400,
            numpy.timedelta64(1, "s"),
        ],
    ),
    "accelerator": (["auto", "cpu", "gpu", "cuda", "mps", "tpu", "xla"], [None, "", "CPU", "gpus", 0, True, ["cpu"]]),
    "devices": (
        ["auto", -1, 1, 8, numpy.int64(2), [0], [0, 3], (1, 0), [numpy.int32(1)]],
        [
            None,
            0,
            -2,
            True,
            False,
            1.0,
            NAN,
            "1",
            "all",
            "",
            [],
            (),
            [0, 0],
            [-1],
            [True],
            [0.0],
            ["0"],
            [None],
            {0},
            {},
        ],
    ),
    "num_nodes": (GOOD_COUNTS, [None, *NO_COUNT]),
    "strategy": (
        ["auto", "ddp", "fsdp", "deepspeed", Thing()],
        [None, "", "DDP", "ddp_spawn", True, 1, [], *NO_OBJECT],
    ),
    "precision": (
        ["32-true", "16-mixed", "bf16-mixed", "16-true", "bf16-true", "64-true", "fp8", "fp16", "bf16", Level("bf16")],
        [None, 32, 16, 64, "32", "16", "bf16-mix", "", True, 32.0, torch.float16, ["32-true"]],
    ),
    "sync_batchnorm": (BOOLS, NO_BOOL),
    "use_distributed_sampler": (BOOLS, NO_BOOL),
    "compile": ([*BOOLS, {"mode": "max-autotune"}, {}], [None, 1, "max-autotune", {1: 2}, [], len]),
    "benchmark": ([None, *BOOLS], [0, 1, "True", []]),
    "deterministic": ([*BOOLS, "warn"], ["warning", "True", *NO_BOOL]),
    "process_timeout": ([None, 1, 0.5, numpy.float32(2)], [*NO_POSITIVE, timedelta(minutes=1)]),
    "inference_mode": (BOOLS, NO_BOOL),
    "accumulate_grad_batches": (
        [*GOOD_COUNTS, {0: 1, 4: 8}, {numpy.int64(2): numpy.int64(3)}],
        [None, {-1: 2}, {0: 0}, {0: True}, {True: 2}, {"0": 2}, {0: 1.5}, {0: None}, [(0, 2)], *NO_COUNT],
    ),
    "gradient_clip_val": ([None, 1, 0.5, numpy.float64(0.1), 1e-30], NO_POSITIVE),
    "gradient_clip_algorithm": (["norm", "value"], [None, "", "Norm", "norms", True, 2]),
    "detect_anomaly": (BOOLS, NO_BOOL),
    "on_nan": (["raise", "skip", "ignore"], [None, "", "raises", False, NAN]),
    "oom": (["raise", "micro"], [None, "", "macro", True]),
    "limit_train_batches": ([None, *GOOD_SHARES], [0, *NO_SHARE]),
    "limit_val_batches": ([None, 0, *GOOD_SHARES], NO_SHARE),
    "limit_test_batches": ([None, 0, *GOOD_SHARES], NO_SHARE),
    "limit_predict_batches": ([None, 0, *GOOD_SHARES], NO_SHARE),
    "overfit_batches": ([None, *GOOD_SHARES], [0, *NO_SHARE]),
    "fast_dev_run": ([*BOOLS, *GOOD_COUNTS], [None, 0, -1, 1.0, "True", NAN, []]),
    "num_sanity_val_steps": ([0, *GOOD_COUNTS], [None, *(value for value in NO_COUNT if value is False or value != 0)]),
    "val_check_interval": ([None, *GOOD_SHARES], [0, *NO_SHARE]),
    "check_val_every_n_epoch": (GOOD_COUNTS, [None, *NO_COUNT]),
    "reload_dataloaders_every_n_epochs": ([None, *GOOD_COUNTS], NO_COUNT),
    "logger": (
        [*BOOLS, "csv", Level("csv"), Thing(), ["csv", Thing()], ("csv",), []],
        [None, 0, 1, *NO_TEXT, *NO_OBJECT, ["csv", True], [Thing], [[]], [""], [None]],
    ),
    "log_every_n_steps": (GOOD_COUNTS, [None, *NO_COUNT]),
    "checkpoint": ([*BOOLS, Thing()], [None, 0, 1, "last", "", [], [Thing()], pathlib.Path("a"), *NO_OBJECT]),
    "resume": ([None, "auto", "last", "best", "runs/a", pathlib.Path("runs/a")], NO_PATH),
    "root_dir": (["runs", ".", "/tmp/ä b", pathlib.Path("runs")], [None, *NO_PATH]),
    "name": (
        [None, "a", "lr=0.1,bs=32", "Net v1.2", "ünï", "x" * 128, "console", "com", "_"],
        [
            *NO_TEXT,
            "/",
            "a/b",
            "a\\b",
            ".",
            "..",
            "a..b",
            ".a",
            "a.",
            " a",
            "a ",
            "a .",
            "x" * 129,
            "é€" * 60,
            "\ud800",
            "CON",
            "con",
            "NUL",
            "nul.txt",
            "COM1",
            "lpt9",
            "Aux.x",
            0,
            3,
            True,
            b"a",
            ["a"],
            pathlib.Path("a"),
        ],
    ),
    "overwrite": (BOOLS, NO_BOOL),
    "hparams": ([None, {}, {"lr": 0.1}, types.MappingProxyType({"a": 1})], [True, "lr=1", {1: 2}, [("a", 1)], Thing()]),
    "log_gradients": (BOOLS, NO_BOOL),
    "seed": ([None, 0, 1, 2**32 - 1, numpy.int64(5)], [-1, 2**32, True, False, 1.0, NAN, "1", [1], 10**5000]),
    "callbacks": (
        [None, Thing(), [], [Thing()], (Thing(), Thing())],
        [True, 1, "x", [None], ["x"], [Thing], *NO_OBJECT],
    ),
    "progress_bar": (BOOLS, NO_BOOL),
    "summary": ([*BOOLS, *GOOD_COUNTS], [None, 0, -1, 1.0, "full", NAN]),
    "profiler": (["simple", "advanced", "pytorch", Thing(), None], ["", "simpel", True, 1, [], *NO_OBJECT]),
}
GOOD = [(name, value) for name, (good, _) in FIELDS.items() for value in good]
BAD = [(name, value) for name, (_, bad) in FIELDS.items() for value in bad]
DEFAULTS: dict[str, object] = {
    "accelerator": "auto",
    "devices": "auto",
    "num_nodes": 1,
    "strategy": "auto",
    "precision": "32-true",
    "sync_batchnorm": False,
    "use_distributed_sampler": True,
    "compile": False,
    "deterministic": False,
    "inference_mode": True,
    "accumulate_grad_batches": 1,
    "gradient_clip_algorithm": "norm",
    "detect_anomaly": False,
    "on_nan": "raise",
    "oom": "raise",
    "fast_dev_run": False,
    "num_sanity_val_steps": 2,
    "check_val_every_n_epoch": 1,
    "logger": True,
    "log_every_n_steps": 50,
    "checkpoint": True,
    "root_dir": "runs",
    "overwrite": False,
    "log_gradients": False,
    "progress_bar": True,
    "summary": True,
}


def labels(pairs: list[tuple[str, object]]) -> list[str]:
    return [f"{name}-{index}" for index, (name, _) in enumerate(pairs)]


def test_the_tables_cover_every_field() -> None:
    """Each field has a check and a row here, in one order."""
    assert list(CHECKS) == list(FIELDS) == NAMES


def test_defaults() -> None:
    """The defaults are those of the contract: what is not listed is None."""
    for name in NAMES:
        value, default = getattr(Settings(), name), DEFAULTS.get(name)
        assert value == default, name
        assert type(value) is type(default), name


def test_overrides_have_the_fields_and_types_of_settings() -> None:
    """The two written-out lists agree in names, order and types."""
    assert list(Overrides.__annotations__) == NAMES
    assert typing.get_type_hints(Overrides) == typing.get_type_hints(Settings)
    assert not Overrides.__required_keys__


@pytest.mark.parametrize(("name", "value"), GOOD, ids=labels(GOOD))
def test_good_values(name: str, value: object) -> None:
    """A good value is kept as a plain Python value, and is kept again unchanged."""
    kept = checked(name, value)
    again = checked(name, kept)
    assert type(again) is type(kept)
    assert again == kept
    assert not isinstance(kept, numpy.generic | Level)
    if name == "precision":
        assert kept in {"fp16": ["16-mixed"], "bf16": ["bf16-mixed"]}.get(str(value), [value])
    elif isinstance(value, tuple):
        assert kept == list(value)
    else:
        assert kept == value
    assert getattr(make({name: value}), name) == kept


@pytest.mark.parametrize(("name", "value"), BAD, ids=labels(BAD))
def test_bad_values(name: str, value: object) -> None:
    """A bad value is refused as such, by the setting's name and with what is allowed."""
    with pytest.raises(SettingsError) as caught:
        make({name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} is {shown(value)}; allowed: ")
    assert "not available" not in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.parametrize(
    ("name", "value", "end"),
    [
        ("max_epochs", "three", "max_epochs is 'three'; allowed: an integer >= 1, None"),
        ("max_epochs", -1, "; no limit is None"),
        ("max_steps", numpy.int64(-1), "; no limit is None"),
        ("max_time", -1, "; no limit is None"),
        ("max_time", INF, "; no limit is None"),
        ("limit_val_batches", -1, "; no limit is None"),
        ("seed", -1, "seed is -1; allowed: an integer >= 0 and <= 4294967295, None"),
        ("precision", 32, "; did you mean '32-true'?"),
        ("precision", "32", "; did you mean '32-true'?"),
        ("precision", 16, "; did you mean '16-mixed'?"),
        ("precision", "BF16", "; did you mean 'bf16-mixed'?"),
        ("strategy", "dpp", "; did you mean 'ddp'?"),
        ("accelerator", "gpus", "; did you mean 'gpu'?"),
        ("deterministic", "warning", "; did you mean 'warn'?"),
        ("gradient_clip_algorithm", "vlaue", "; did you mean 'value'?"),
        ("callbacks", Thing, "; this is the class: call it, as in Thing()"),
        ("callbacks", [Thing()] * 2 + [Thing], "; this is the class: call it, as in Thing()"),
        ("checkpoint", Thing, "; this is the class: call it, as in Thing()"),
        ("name", "a/b", "; it has a '/' or '\\'"),
        ("name", "NUL", "; Windows reserves it"),
    ],
)
def test_messages(name: str, value: object, end: str) -> None:
    """The message ends with what to do about the value."""
    with pytest.raises(SettingsError) as caught:
        make({name: value})
    assert str(caught.value).endswith(end)


def test_shown_values_are_short() -> None:
    """A value is shown on one line of at most 80 characters, even one that cannot be shown."""
    assert shown("x" * 500) == "'" + "x" * 78 + "…"
    assert shown(numpy.zeros((3, 3))).count("\n") == 0
    assert shown(Unprintable()) == "<Unprintable>"
    assert shown(10**5000).startswith(("<int>", "1000"))


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_minimum_and_maximum(unit: str) -> None:
    """A minimum above the maximum is refused; an equal one, or one alone, is not."""
    low = {f"min_{unit}": 3}
    assert explicit(make(low)) == low
    assert make({**low, f"max_{unit}": 3}) == resolve(make(low), {f"max_{unit}": 3})
    with pytest.raises(SettingsError, match=rf"^min_{unit} is 3; allowed: at most max_{unit}, which is 2$"):
        make({**low, f"max_{unit}": 2})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (90, 90.0),
        (0.5, 0.5),
        (timedelta(minutes=2, milliseconds=500), 120.5),
        ("00:00:01:30", 90.0),
        ("1:2:3:4", 93784.0),
    ],
)
def test_max_seconds(value: Any, expected: float | None) -> None:
    """Every form of `max_time` is read in seconds."""
    assert Settings(max_time=value).max_seconds == expected


def test_fit_needs_an_end() -> None:
    """`fit` without any limit is refused by the names of all three; other verbs and fast_dev_run need none."""
    with pytest.raises(SettingsError) as caught:
        Settings(min_epochs=1).check_for("fit")
    assert all(name in str(caught.value) for name in ("max_epochs", "max_steps", "max_time"))
    for verb in ("validate", "test", "predict", "lr_find", "find_batch_size"):
        Settings().check_for(verb)
    for limit in ({"max_epochs": 1}, {"max_steps": 1}, {"max_time": 1}, {"fast_dev_run": True}, {"fast_dev_run": 2}):
        resolve(None, limit).check_for("fit")


@pytest.mark.parametrize("name", NAMES)
def test_resolve_names_the_nearest_setting(name: str) -> None:
    """A near miss of any setting is refused with that setting's name (or one still nearer to the miss)."""
    missed = name[:-1]
    with pytest.raises(SettingsError, match=rf"^{missed} is no setting; did you mean '\w+'\?$") as caught:
        resolve(None, {missed: 1})
    assert f"'{name}'" in str(caught.value)


def test_resolve_refuses_what_is_far_from_everything() -> None:
    """A name near to none is refused with the list of all."""
    with pytest.raises(SettingsError, match=r"^zzz is no setting; the settings are max_epochs, .*, profiler$"):
        resolve(None, {"zzz": 1})


def test_resolve_puts_overrides_in() -> None:
    """Overrides win over the settings, None included, and are checked; the settings themselves stay."""
    base = Settings(max_epochs=3, seed=1)
    changed = resolve(base, {"max_epochs": None, "max_steps": 7})
    assert explicit(changed) == {"max_steps": 7, "seed": 1}
    assert explicit(base) == {"max_epochs": 3, "seed": 1}
    assert resolve(base, {}) == base
    assert resolve(None, {}) == Settings()
    with pytest.raises(SettingsError, match=r"^max_epochs is 0; allowed: "):
        resolve(base, {"max_epochs": 0})
    with pytest.raises(SettingsError, match=r"^min_epochs is 4; allowed: at most max_epochs, which is 3$"):
        resolve(base, {"min_epochs": 4})


@pytest.mark.parametrize("wrong", [{"max_epochs": 3}, 3, Settings, "x"])
def test_resolve_refuses_other_settings(wrong: Any) -> None:
    """`settings=` must be a `Settings`: no dict, no class."""
    with pytest.raises(SettingsError, match=r"^settings is .*; allowed: a Settings\(…\) or None$"):
        resolve(wrong, {})


@pytest.mark.parametrize("name", ["logger", "name", "root_dir"])
def test_a_member_of_an_enum_of_texts_is_its_text(name: str) -> None:
    """Not its name, and a plain `str`."""
    kept = getattr(make({name: Backend.CSV}), name)
    assert (kept, type(kept)) == ("csv", str)


def test_a_value_that_cannot_be_read_is_refused_with_its_error() -> None:
    """What a value's own class raises is the cause of the refusal, and not in its place."""

    class Broken(int):
        def __int__(self) -> int:
            raise RuntimeError("broken")

    with pytest.raises(
        SettingsError, match=r"^max_epochs is 3; allowed: .*; to read it raised RuntimeError$"
    ) as caught:
        make({"max_epochs": Broken(3)})
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_explicit_tells_one_from_true() -> None:
    """Only what differs from the default is listed; 1 is not True, and odd `__eq__`s are not asked."""
    assert explicit(Settings()) == {}
    assert explicit(Settings(max_epochs=2, logger=True, num_nodes=1)) == {"max_epochs": 2}
    assert explicit(Settings(summary=1, fast_dev_run=1)) == {"fast_dev_run": 1, "summary": 1}
    thing = Thing()
    assert explicit(Settings(logger=thing)) == {"logger": thing}


def test_frozen_and_keyword_only() -> None:
    """Settings cannot be changed, nor given by position, nor changed through a list or dict kept elsewhere."""
    epochs, hparams, loggers = {0: 2}, {"lr": 0.1}, ["csv"]
    settings = Settings(accumulate_grad_batches=epochs, hparams=hparams, logger=loggers)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.max_epochs = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        Settings(3)  # type: ignore[call-arg]
    epochs[0], hparams["lr"] = -5, -5
    loggers.append("")
    assert settings.accumulate_grad_batches == {0: 2}
    assert settings.hparams == {"lr": 0.1}
    assert settings.logger == ["csv"]


@pytest.mark.parametrize("copy", [lambda one: pickle.loads(pickle.dumps(one)), lambda one: dataclasses.replace(one)])
def test_copies_are_equal(copy: Callable[[Settings], Settings]) -> None:
    """Settings survive pickling (they travel to started processes), `replace` and `asdict`."""
    settings = Settings(
        max_time=timedelta(hours=1),
        root_dir=pathlib.Path("x"),
        hparams=types.MappingProxyType({"lr": 0.1}),
        callbacks=[Thing()],
        precision="bf16",
        accumulate_grad_batches={0: 1, 2: 4},
    )
    assert copy(settings) == settings
    assert Settings(**dataclasses.asdict(settings)) == settings
    assert list(dataclasses.asdict(settings)) == NAMES


def test_errors_are_value_errors() -> None:
    """A refusal can be caught as `ValueError` and as `LightdecoError`."""
    assert issubclass(SettingsError, ValueError)
    assert issubclass(SettingsError, LightdecoError)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=4)
    | st.complex_numbers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=5,
)
# What no field of the kind takes, whatever is drawn.
NEVER_A_NUMBER = st.text().filter(lambda text: ":" not in text) | st.binary() | st.complex_numbers() | st.lists(JUNK)
NEVER_A_COUNT = NEVER_A_NUMBER | st.integers(max_value=-1) | st.floats() | st.integers(min_value=2**63)
NEVER_A_FLOAT = NEVER_A_NUMBER | st.integers(max_value=-1) | st.floats(max_value=0) | st.sampled_from([NAN, INF])
NEVER_A_BOOL = st.integers(max_value=0) | st.floats() | st.binary() | st.complex_numbers() | st.sets(st.integers())
NEVER_A_NAME = st.text().map(lambda text: text + "?") | st.booleans() | st.integers() | st.floats() | st.lists(JUNK)


def wrong_values(name: str) -> st.SearchStrategy[object]:
    """A strategy of values that the field must refuse, by what its default and its row say of its kind."""
    good = FIELDS[name][0]
    if name in ("logger", "checkpoint", "callbacks", "compile", "hparams", "resume", "root_dir", "name", "devices"):
        return st.floats() | st.binary() | st.complex_numbers() | st.integers(max_value=-2) | st.sets(st.integers())
    if any(isinstance(value, str) for value in good) and name not in ("max_time", "deterministic"):
        return NEVER_A_NAME
    if any(isinstance(value, bool) for value in good):
        return NEVER_A_BOOL
    if any(isinstance(value, float) for value in good):
        return NEVER_A_FLOAT
    return NEVER_A_COUNT


@given(data=st.data())
def test_wrong_values_are_refused_by_name(data: st.DataObject) -> None:
    """Whatever wrong value any field gets, the refusal names the field."""
    name = data.draw(st.sampled_from(NAMES))
    value = data.draw(wrong_values(name))
    with pytest.raises(SettingsError) as caught:
        resolve(None, {name: value})
    assert str(caught.value).startswith(f"{name} is ")


@given(name=st.sampled_from(NAMES), value=JUNK)
def test_any_value_is_taken_or_refused(name: str, value: object) -> None:
    """No value makes a check fail in another way, and what is kept is stable."""
    try:
        kept = checked(name, value)
    except SettingsError:
        with pytest.raises(SettingsError, match=rf"^{name} is "):
            make({name: value})
        return
    assert repr(checked(name, kept)) == repr(kept)
    assert not (isinstance(value, float) and not math.isfinite(value))
    assert not isinstance(kept, bool) or isinstance(value, bool)


def test_every_field_is_documented() -> None:
    """Each field is followed by a docstring of one line."""
    source = pathlib.Path(str(module.__file__)).read_text(encoding="utf-8")
    for name in NAMES:
        _, _, after = source.partition(f"\n    {name}: ")
        line = after.splitlines()[1].strip()
        assert line.startswith('"""'), name
        assert line.endswith('."""'), name
