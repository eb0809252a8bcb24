"""Values come back from JSON and safetensors as they were, or are refused by name."""

import enum
import functools
import inspect
import math
import random
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import lr_scheduler, swa_utils

from lightdeco import CheckpointError
from lightdeco.checkpoint import State, encoding, load, load_optimizer, save, snapshot
from lightdeco.checkpoint.files import dump, parse


def again(value: Any) -> Any:
    """A value through JSON text and back."""
    encoder = encoding.Encoder()
    text = dump(encoder.encode(value, "x"))
    return encoding.Decoder(encoder.tensors).decode(parse(text, "x"), "x")


VALUES: dict[str, Any] = {
    "plain": [None, True, False, 0, -(2**70), 1.5, -0.0, 5e-324, "", "é\x00\ud800", [], {}],
    "not finite": [math.nan, math.inf, -math.inf, complex(math.nan, -0.0), 1 - 2j],
    "keys": {1: "a", 2.5: "b", True + 1: "c", None: "d", (1, "x"): "e", "f": "f", False: "g"},
    "tag as key": {"$": "tuple", "v": [1]},
    "nan as key": {math.nan: 1, math.inf: 2},
    "keys alike": {"1": 1, 1: 2, "1.0": 3},
    "unicode keys": {"größe 猫 🙂": 1, "": 2, "a.b": 3},
    "tuples": (1, (), (2, [3, (4,)])),
    "sets": [{1, "a", (2, None)}, frozenset({1.5, math.inf}), set()],
    "collections": [
        Counter({3: 2, 9: 1}),
        OrderedDict([("b", 1), ("a", 2)]),
        defaultdict(list, {1: [2]}),
        defaultdict(None, {"a": 1}),
        deque([1, 2], maxlen=5),
        deque(),
    ],
    "bytes": [b"", b"\x00\xff", bytearray(b"ab")],
    "numpy scalars": [numpy.float32(0.1), numpy.int64(-3), numpy.bool_(True), numpy.float64("nan"), numpy.str_("é")],
    "numpy times": [numpy.datetime64("2026-11-23T01:02:03", "ms"), numpy.timedelta64(5, "D")],
    "numpy arrays": [
        numpy.arange(6).reshape(2, 3).T,
        numpy.empty((0, 3), "<f4"),
        numpy.array(3.5, ">f8"),
        numpy.array(["a", "bcd"]),
        numpy.array([1j, math.nan]),
        numpy.array(["2026-01-01"], "M8[D]"),
    ],
    "torch": [torch.float32, torch.bfloat16, torch.device("cpu"), torch.device("cuda", 1), torch.Size([2, 3])],
    "times and paths": [timedelta(days=-1, microseconds=7), Path("/a/../é"), Path(".")],
    "random": [random.Random(1).getstate(), numpy.random.RandomState(1).get_state(), torch.get_rng_state()],
}


@pytest.mark.parametrize("name", VALUES)
def test_values_come_back(name: str) -> None:
    """Each kind of value comes back with its types, order and bits."""
    value = VALUES[name]
    assert encoding.difference(value, again(value), "x") is None


DTYPES = ["bool", "uint8", "int8", "int16", "int32", "int64", "uint16", "uint32", "uint64", "float16", "bfloat16"]
DTYPES += ["float32", "float64", "complex64", "complex128", "float8_e4m3fn", "float8_e5m2", "float8_e5m2fnuz"]
TENSORS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.tensor(2.5),
    "empty": lambda: torch.empty(0, 3),
    "view": lambda: torch.arange(24.0).reshape(4, 6)[::2, 1::2].t(),
    "expanded": lambda: torch.ones(1, 3).expand(4, 3),
    "nan with a payload": lambda: torch.tensor([0x7FC00123, -1, -(2**31)], dtype=torch.int32).view(torch.float32),
    "conjugate": lambda: torch.tensor([1 + 2j]).conj(),
    "negative": lambda: torch.tensor([1 + 2j]).conj().imag,
    "parameter": lambda: nn.Parameter(torch.ones(2)),
    **{
        str(dtype): functools.partial(lambda dtype: torch.arange(6).reshape(2, 3).to(dtype), dtype)
        for name in DTYPES
        for dtype in (getattr(torch, name),)
    },
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_from_files(name: str, tmp_path: Path) -> None:
    """Each kind of tensor is bit-equal after saving, in the model and elsewhere, and has memory of its own."""
    tensor = TENSORS[name]()
    state = load(save(tmp_path, "a", State(model={"w": tensor, "tied": tensor}, extra={"deep": [{1: tensor}]})))
    found = [state.model["w"], state.model["tied"], state.extra["deep"][0][1]]
    assert [encoding.difference(tensor, other, "w") for other in found] == [None] * 3
    assert not any(other.requires_grad for other in found)
    assert len({other.data_ptr() for other in found}) == 3 or not tensor.numel()


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


Pair = namedtuple("Pair", "a b")
LOOP: list[Any] = []
LOOP.append(LOOP)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"best": [Fraction(1, 2)]}, r"^callbacks\.EarlyStopping\.best\[0\] is a fractions\.Fraction, which"),
        ({3: {"x": object()}}, r"^callbacks\.EarlyStopping\[3\]\.x is a object, which"),
        (Colour.RED, "is a tests.test_encoding.Colour"),
        (Text("a"), "is a tests.test_encoding.Text"),
        (Pair(1, 2), "is a tests.test_encoding.Pair"),
        (numpy.array([object()]), "is NumPy data of type object"),
        (numpy.zeros(1, [("a", "f4")]), "is NumPy data of type"),
        (numpy.ma.masked_array([1]), "MaskedArray"),
        (defaultdict(Counter), "is a defaultdict of"),
        (lambda: 0, "is a function"),
        (int, "is a type"),
        (LOOP, "does it contain itself"),
        (2**5000, "an int of 5001 bits"),
        ({torch.ones(1)}, "is a tensor; in a set or as a key"),
        ({torch.ones(1): 1}, "is a tensor; in a set or as a key"),
        (torch.ones(2, 2).to_sparse(), "is sparse"),
        (torch.ones(2, device="meta"), "is on the meta device"),
        (nn.LazyLinear(2).weight, "is not initialised yet|UninitializedParameter"),
        (torch.Generator(), "is a torch._C.Generator"),
        ([0] * 1_000_001, "more than 1000000 values"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_cannot_be_kept_is_named(value: Any, message: str) -> None:
    """What would not come back as it was raises, with the path of the value and what is allowed."""
    with pytest.raises(CheckpointError, match=message):
        snapshot(State(callbacks={"EarlyStopping": value}))


def test_what_does_not_come_back_equal_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault in the encoding itself is found before the checkpoint counts, and the key is named."""
    monkeypatch.setitem(encoding._LEAF_OF_TAG, "bytes", lambda text: b"other")
    with pytest.raises(CheckpointError, match=r"^extra\.a\[1\] does not come back"):
        snapshot(State(extra={"a": [0, b"this"]}))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1, True),
        (1, 1.0),
        ((1,), [1]),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({1: 1}, {"1": 1}),
        ({1}, {True}),
        (deque([1], 2), deque([1], 3)),
        (defaultdict(list), defaultdict(dict)),
        (numpy.float32(1), numpy.float64(1)),
        (numpy.zeros(2), numpy.zeros((2, 1))),
        (torch.zeros(1), -torch.zeros(1)),
        (torch.zeros(1), torch.zeros(1, dtype=torch.float64)),
        (torch.zeros(2), torch.zeros(1, 2)),
    ],
)
def test_differences_are_seen(a: Any, b: Any) -> None:
    """Values that differ in type, order, shape or sign of zero are different."""
    assert encoding.difference([a], [b], "x") is not None
    assert encoding.difference([a], [a], "x") is None


def test_names_of_tensors_stay_apart() -> None:
    """Paths that read alike do not mix up tensors."""
    value = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a.b~2": torch.full((1,), 2.0)}
    assert encoding.difference(value, again(value), "x") is None


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
HASHABLE = LEAVES | st.tuples(LEAVES, LEAVES)
NESTED = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.dictionaries(HASHABLE, inner)
        | st.tuples(inner, inner)
        | st.sets(HASHABLE)
        | st.just({"$": 1})
    ),
    max_leaves=12,
)


@given(NESTED)
@hypothesis_settings(max_examples=150, deadline=None)
def test_any_nesting_comes_back(value: Any) -> None:
    """Whatever plain values are nested in whatever way, they come back."""
    assert encoding.difference(value, again(value), "x") is None


@pytest.mark.parametrize(
    "raw",
    [
        {"$": "os.system", "v": "true"},
        {"$": "tensor", "v": "absent"},
        {"$": "tensor"},
        {"$": ["list"], "v": 1},
        {"$": "float", "v": []},
        {"$": "torch.dtype", "v": "nn"},
        {"$": "torch.device", "v": "nowhere"},
        {"$": "torch.Size", "v": ["a"]},
        {"$": "timedelta", "v": [1e300]},
        {"$": "defaultdict", "factory": "eval", "v": []},
        {"$": "dict", "v": [[[], 1]]},
        {"$": "dict", "v": [1]},
        {"$": "set", "v": [[1]]},
        {"$": "deque", "v": [], "maxlen": -1},
        {"$": "bytes", "v": "é"},
        {"$": "path", "v": 3},
        {"$": "numpy", "dtype": "O", "v": ""},
        {"$": "numpy", "dtype": "f8,O", "v": ""},
        {"$": "numpy", "dtype": "<f8", "v": "AAAA"},
        {"$": "Counter", "v": "ab"},
    ],
    ids=str,
)
def test_forged_values_are_refused(raw: Any) -> None:
    """JSON that nothing here wrote is an error of ours, whatever is wrong with it."""
    with pytest.raises(CheckpointError, match=r"^x cannot be read"):
        encoding.Decoder({}).decode([raw], "x")


# ---- schedulers and optimizers ---------------------------------------------------------------------------------------


class Decay:
    """A callable object with state: its attributes are part of LambdaLR's state."""

    def __init__(self) -> None:
        self.rate = 0.9

    def __call__(self, epoch: int) -> float:
        return self.rate**epoch


#: What the constructors ask for, by the name of the parameter.
ARGUMENTS: dict[str, Any] = {
    "lr_lambda": lambda epoch: 0.95**epoch,
    "step_size": 3,
    "milestones": [5],
    "gamma": 0.8,
    "T_max": 20,
    "T_0": 6,
    "base_lr": 0.001,
    "max_lr": 0.1,
    "total_steps": 200,
    "swa_lr": 0.05,
    "total_iters": 30,
    "patience": 2,
}
SCHEDULERS = {
    name: kind
    for module in (lr_scheduler, swa_utils)
    for name, kind in vars(module).items()
    if inspect.isclass(kind) and hasattr(kind, "load_state_dict") and "optimizer" in inspect.signature(kind).parameters
    if kind is not lr_scheduler.LRScheduler and not name.startswith("_")
}


def scheduled(name: str, **more: Any) -> tuple[torch.optim.Optimizer, Any]:
    """An optimizer of two groups and a scheduler of a class, made from what its signature asks for."""
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": 0.2}, {"params": [nn.Parameter(torch.ones(1))]}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    arguments = {key: ARGUMENTS[key] for key in inspect.signature(SCHEDULERS[name]).parameters if key in ARGUMENTS}
    if "schedulers" in inspect.signature(SCHEDULERS[name]).parameters:
        inner = [lr_scheduler.LinearLR(optimizer, 0.1), lr_scheduler.MultiStepLR(optimizer, [4, 4, 9])]
        arguments["schedulers"] = inner
        if name == "ChainedScheduler":
            arguments["optimizer"] = optimizer
            return optimizer, lr_scheduler.ChainedScheduler(inner, optimizer)
    return optimizer, SCHEDULERS[name](optimizer, **{**arguments, **more})


def rates(optimizer: torch.optim.Optimizer, scheduler: Any, count: int) -> list[Any]:
    """The learning rates and momenta of `count` further steps."""
    found = []
    for step in range(count):
        optimizer.step()
        scheduler.step(*([1.0 + step % 3] if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau) else []))
        found.append([(float(group["lr"]), group["momentum"]) for group in optimizer.param_groups])
    return found


def check_schedule(make: Callable[[], tuple[torch.optim.Optimizer, Any]], before: int, folder: Path) -> None:
    """Saved after `before` steps and loaded into fresh objects, a schedule goes on as if nothing had happened."""
    optimizer, scheduler = make()
    rates(optimizer, scheduler, before)
    state = State(optimizers={"a": optimizer.state_dict()}, schedulers={"a": scheduler.state_dict()})
    found = load(save(folder, "a", state))
    fresh_optimizer, fresh = make()
    fresh.load_state_dict(found.schedulers["a"])
    load_optimizer(fresh_optimizer, found.optimizers["a"])
    assert rates(fresh_optimizer, fresh, 50) == rates(optimizer, scheduler, 50)


@pytest.mark.parametrize("before", [0, 7])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_resumes(name: str, before: int, tmp_path: Path) -> None:
    """Every scheduler of torch gives equal learning rates for 50 steps after it was saved and loaded."""
    check_schedule(lambda: scheduled(name), before, tmp_path)


def test_schedulers_are_discovered() -> None:
    """The classes found are those that torch lists, and none is forgotten."""
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= set(SCHEDULERS)
    assert "SWALR" in SCHEDULERS


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("LambdaLR", {"lr_lambda": [Decay(), functools.partial(pow, 0.9)]}),
        ("CyclicLR", {"mode": "exp_range", "gamma": 0.99, "step_size_up": 3}),
        ("CyclicLR", {"scale_fn": lambda x: 0.5, "step_size_up": 3}),
        ("OneCycleLR", {"anneal_strategy": "linear", "three_phase": True}),
        ("SWALR", {"anneal_strategy": "linear", "anneal_epochs": 9}),
        ("ReduceLROnPlateau", {"mode": "max", "min_lr": [0.0, 0.01], "cooldown": 2}),
        ("MultiStepLR", {"milestones": [8, 8, 12, 30]}),
    ],
)
def test_variants_of_schedulers_resume(name: str, more: dict[str, Any], tmp_path: Path) -> None:
    """Callable objects, partials, repeated milestones and infinite bests are no exception."""
    check_schedule(lambda: scheduled(name, **more), 10, tmp_path)


OPTIMIZERS = {
    name: kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
}


def trained(kind: type[torch.optim.Optimizer], steps: int, **more: Any) -> tuple[nn.Embedding, torch.optim.Optimizer]:
    """A table of weights after some steps; every gradient is a function of the step alone."""
    torch.manual_seed(0)
    net = nn.Embedding(6, 4, sparse=kind is torch.optim.SparseAdam)
    optimizer = kind(net.parameters(), **more)  # type: ignore[call-arg]
    advance(net, optimizer, range(steps))
    return net, optimizer


def advance(net: nn.Embedding, optimizer: torch.optim.Optimizer, steps: range) -> Tensor:
    """The weights after further steps."""
    for step in steps:

        def closure(step: int = step) -> float:
            optimizer.zero_grad()
            loss = ((net(torch.arange(6)) - step) ** 2).sum()
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
    return net.weight.detach().clone()


@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resumes(name: str, steps: int, tmp_path: Path) -> None:
    """Every optimizer of torch, with and without state, makes the same 5 steps, to the bit, after it was loaded."""
    more = {"lr": 0.1} if name == "SGD" else {}
    check_optimizer(OPTIMIZERS[name], steps, more, tmp_path)


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
        (torch.optim.SGD, {"lr": torch.tensor(0.1), "momentum": 0.9}),
        (torch.optim.Adam, {"lr": torch.tensor(0.1), "foreach": False, "amsgrad": True}),
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.RMSprop, {"centered": True, "momentum": 0.5}),
        (torch.optim.LBFGS, {"line_search_fn": "strong_wolfe"}),
    ],
)
def test_variants_of_optimizers_resume(kind: Any, more: dict[str, Any], tmp_path: Path) -> None:
    """Momentum, tensor learning rates, fused kernels and line searches are no exception."""
    check_optimizer(kind, 3, more, tmp_path)


def check_optimizer(kind: Any, steps: int, more: dict[str, Any], folder: Path) -> None:
    """Saved after some steps and loaded into fresh objects, an optimizer goes on to the bit."""
    net, optimizer = trained(kind, steps, **more)
    found = load(save(folder, "a", State(model=net.state_dict(), optimizers={"main": optimizer.state_dict()})))
    fresh, fresh_optimizer = trained(kind, 0, **more)
    fresh.load_state_dict(found.model)
    load_optimizer(fresh_optimizer, found.optimizers["main"])
    assert torch.equal(advance(fresh, fresh_optimizer, range(5)), advance(net, optimizer, range(5)))


def test_load_optimizer_keeps_dtypes() -> None:
    """A float32 state of a bfloat16 parameter stays float32, which torch's own load would round."""
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    optimizer.state[parameter]["master"] = torch.full((3,), 1.0001)
    state = snapshot(State(optimizers={"a": optimizer.state_dict()})).state().optimizers["a"]
    fresh = torch.optim.SGD([parameter], lr=0.1)
    load_optimizer(fresh, state)
    assert torch.equal(fresh.state[parameter]["master"], torch.full((3,), 1.0001))


def test_load_optimizer_refuses_another() -> None:
    """The state of other groups, of another kind, or of nothing at all is refused by name."""
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(2)]
    adam = torch.optim.Adam(parameters)
    with pytest.raises(CheckpointError, match=r"'gen' has 1 groups of \[1\] parameters; .* for \[2\]"):
        load_optimizer(torch.optim.Adam(parameters[:1]), adam.state_dict(), "gen")
    with pytest.raises(CheckpointError, match=r"another optimizer than Adam: no \['betas', 'eps'\]"):
        load_optimizer(torch.optim.Adam(parameters), torch.optim.SGD(parameters, lr=1.0).state_dict())
    with pytest.raises(CheckpointError, match="none of an optimizer"):
        load_optimizer(adam, {"state": {}})
