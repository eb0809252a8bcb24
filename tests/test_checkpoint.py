"""Checkpoints as a user meets them: their files, damage, forgeries, weights, copies, the command line."""

import json
import pickle
import random
import re
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import safetensors.torch
import torch
from torch import nn

import lightdeco
from lightdeco import CheckpointError
from lightdeco.checkpoint import State, encoding, load, load_weights, newest_valid, prune, save, snapshot, tensors
from lightdeco.checkpoint.describe import describe
from lightdeco.checkpoint.files import MAX_JSON, Record, Sink, Source
from lightdeco.checkpoint.manifest import Manifest, write_manifest

FILES = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json", "state.safetensors")


class Net(nn.Module):
    """Tied weights, a batch norm and a buffer of each awkward kind."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        self.second.weight = self.first.weight
        self.norm = nn.BatchNorm1d(width)
        self.register_buffer("scalar", torch.tensor(3.0))
        self.register_buffer("empty", torch.empty(0, 4))
        self.register_buffer("view", torch.randn(4, 6)[::2, 1::2].t())
        for dtype in (torch.bool, torch.bfloat16, torch.complex64, torch.float8_e4m3fn):
            self.register_buffer(f"kind_{str(dtype)[6:]}", torch.ones(2, 3).to(dtype))


def state(step: int = 1) -> State:
    """A state with something in every part."""
    torch.manual_seed(step)
    net = Net()
    adam = torch.optim.Adam(net.first.parameters())
    net.first(torch.randn(4, 3)).sum().backward()
    adam.step()
    numbers, other = numpy.random.RandomState(step).get_state(), random.Random(step).getstate()
    randoms = {"torch": torch.get_rng_state(), "numpy": numbers, "python": other}
    return State(
        model=dict(net.state_dict()),
        optimizers={"main": adam.state_dict()},
        schedulers={"main": torch.optim.lr_scheduler.MultiStepLR(adam, [2, 2, 5]).state_dict()},
        scaler={"scale": 65536.0},
        callbacks={"EarlyStopping": {"best": float("inf"), "seen": {1, 2}}},
        data={"position": 7},
        progress={"global_step": step, "epoch": 2},
        metrics={"val/loss": 0.25},
        random=randoms,
        hparams={"lr": 1e-3, "sizes": (3, 4)},
        settings={"max_epochs": None},
        extra={"model": {"memory": torch.ones(3)}},
        versions={"python": "3.11"},
    )


def same(a: State, b: State) -> bool:
    """Whether two states are equal in every part, to the bit."""
    return all(encoding.difference(getattr(a, part), getattr(b, part), part) is None for part in State.__slots__)


def test_everything_comes_back(tmp_path: Path) -> None:
    """What was saved is what is loaded, part by part, in the order it had."""
    kept = state()
    path = save(tmp_path, "step=00000001", kept)
    assert path == tmp_path / "step=00000001"
    assert {file.name for file in path.iterdir()} == set(FILES)
    assert same(load(path), kept)
    assert list(load(path).model) == list(kept.model)


def test_nothing_at_all_comes_back(tmp_path: Path) -> None:
    """An empty state is a state."""
    assert same(load(save(tmp_path, "empty", State())), State())


def test_model_file_needs_no_lightdeco(tmp_path: Path) -> None:
    """`model.safetensors` loads with safetensors alone, strictly, tied tensors under each of their names."""
    kept = state()
    path = save(tmp_path, "a", kept)
    net = Net()
    net.load_state_dict(safetensors.torch.load_file(path / "model.safetensors"))
    assert encoding.difference(dict(net.state_dict()), dict(kept.model), "model") is None
    for file in ("optimizer.safetensors", "state.safetensors"):
        safetensors.torch.load_file(path / file)
    with safetensors.safe_open(path / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_extra_state_that_is_no_tensor(tmp_path: Path) -> None:
    """What modules return from `get_extra_state` is kept too, and `load_weights` gives it back."""

    class Counting(nn.Linear):
        seen: Any = None

        def get_extra_state(self) -> Any:
            return self.seen

        def set_extra_state(self, state: Any) -> None:
            self.seen = state

    net = Counting(2, 1)
    net.seen = {"calls": (3, torch.ones(2))}
    path = save(tmp_path, "a", State(model=net.state_dict()))
    fresh = Counting(2, 1)
    load_weights(fresh, path)
    assert encoding.difference(fresh.seen, net.seen, "seen") is None
    assert torch.equal(fresh.weight, net.weight)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"a.w": nn.LazyLinear(2).weight}, r"model\.a\.w is not initialised yet; run the model once"),
        ({"w": torch.ones(2, device="meta")}, r"model\.w is on the meta device"),
        ({"w": torch.eye(2).to_sparse()}, r"model\.w is sparse"),
        ({"__metadata__": torch.ones(1)}, "cannot name a tensor"),
        ({"\ud800": torch.ones(1)}, "cannot name a tensor"),
        ({"w": object()}, r"model\.w is a object, which"),
    ],
)
def test_model_that_cannot_be_kept(model: dict[str, Any], message: str, tmp_path: Path) -> None:
    """A tensor that has no values, or none that the format can keep, is named; nothing is written."""
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, "a", State(model=model))
    assert list(tmp_path.glob("*")) == []


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A folder with two checkpoints; the newer is `step=2`."""
    save(tmp_path, "step=1", state(1))
    save(tmp_path, "step=2", state(2))
    return tmp_path


def check_passed_over(folder: Path, file: str) -> str:
    """`step=2` is refused, with the file named, and `step=1` is chosen; the reason."""
    with pytest.raises(CheckpointError, match=re.escape(file)):
        load(folder / "step=2")
    found, passed = newest_valid(folder)
    assert found == folder / "step=1"
    assert [path for path, _ in passed] == [folder / "step=2"]
    assert str(folder / "step=2" / file) in passed[0][1]
    assert same(load(found), state(1))
    return passed[0][1]


@pytest.mark.parametrize("file", FILES)
def test_truncated(file: str, two: Path) -> None:
    """Each file cut at five lengths is found, named and passed over."""
    path = two / "step=2" / file
    whole = path.read_bytes()
    for length in (0, 1, 7, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        check_passed_over(two, file)
    path.write_bytes(whole + b"\0")
    check_passed_over(two, file)


@pytest.mark.parametrize("file", FILES)
def test_flipped_bit(file: str, two: Path) -> None:
    """One flipped bit anywhere in a file is found by its hash, named and passed over."""
    path = two / "step=2" / file
    whole = path.read_bytes()
    places = random.Random(file).sample(range(len(whole) * 8), 6)
    for place in [0, *places, len(whole) * 8 - 1]:
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        check_passed_over(two, file)


@pytest.mark.parametrize("file", FILES)
def test_missing(file: str, two: Path) -> None:
    """A file that is missing makes a checkpoint invalid, whichever it is."""
    (two / "step=2" / file).unlink()
    reason = check_passed_over(two, file)
    assert "is missing" in reason or "No such file" in reason


@pytest.mark.parametrize("file", FILES)
def test_mixed(file: str, two: Path) -> None:
    """A file of another checkpoint, valid in itself, is not taken for this one's."""
    shutil.copy(two / "step=1" / file, two / "step=2" / file)
    with pytest.raises(CheckpointError):
        load(two / "step=2")


def test_all_bad(two: Path) -> None:
    """When none is valid, an error lists the reason for each; it is never taken for an empty folder."""
    (two / "step=1" / "state.json").unlink()
    shutil.rmtree(two / "step=2")
    (two / "step=2").mkdir()
    with pytest.raises(CheckpointError) as caught:
        newest_valid(two)
    assert "holds no valid checkpoint" in str(caught.value)
    assert "step=1/state.json: is missing" in str(caught.value)
    assert "step=2/manifest.json: cannot be opened" in str(caught.value)


def test_none_at_all(tmp_path: Path) -> None:
    """An empty folder, and none, hold no checkpoint, which is no error."""
    (tmp_path / "file").write_text("")
    assert newest_valid(tmp_path) == (None, [])
    assert newest_valid(tmp_path / "absent") == (None, [])


def test_another_format(tmp_path: Path) -> None:
    """A checkpoint of a format to come is refused by its number."""
    path = save(tmp_path, "a", State())
    forge(path, {}, format_number=2)
    with pytest.raises(CheckpointError, match="has format 2; this lightdeco reads 1"):
        load(path)


# ---- forgeries: every hash fits, the content is meant to harm -------------------------------------------------------


def forge(path: Path, files: dict[str, bytes], format_number: int = 1) -> None:
    """Replace files and seal the manifest anew."""
    from lightdeco.checkpoint import manifest

    for name, data in files.items():
        (path / name).write_bytes(data)
    records = {}
    for name in set(FILES) - {"manifest.json"}:
        (path / "sink").unlink(missing_ok=True)
        with Sink(path / "sink") as sink:
            sink.write((path / name).read_bytes())
            records[name] = sink.finish()
        (path / "sink").unlink()
    (path / "manifest.json").unlink()
    before, manifest.FORMAT = manifest.FORMAT, format_number  # type: ignore[misc]
    try:
        write_manifest(path, Manifest(1, {}, records))
    finally:
        manifest.FORMAT = before  # type: ignore[misc]


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("file", FILES)
def test_pickles_are_never_read(file: str, tmp_path: Path) -> None:
    """A pickle under the name of any file is refused, though its hash fits, and does nothing."""
    path = save(tmp_path, "a", state())
    pickled = pickle.dumps(Bomb(tmp_path / "mark"))
    if file == "manifest.json":
        (path / file).write_bytes(pickled)
    else:
        forge(path, {file: pickled})
    reading = (load, newest_of, weights_of) if file in ("manifest.json", "model.safetensors") else (load, newest_of)
    for job in reading:
        with pytest.raises(CheckpointError, match=re.escape(file)):
            job(path)
    assert not (tmp_path / "mark").exists()


def newest_of(path: Path) -> Any:
    """The newest checkpoint beside a path, loaded."""
    found = newest_valid(path.parent)[0]
    assert found is not None
    return load(found)


def weights_of(path: Path) -> Any:
    """The weights of a path, loaded into a model."""
    return load_weights(Net(), path)


def body(text: str) -> bytes:
    """state.json with one part replaced by a text."""
    parts = {part: "null" if part == "scaler" else "{}" for part in State.__slots__} | {"extra": text}
    return ("{" + ",".join(f'"{part}":{content}' for part, content in parts.items()) + "}").encode()


JSON_BOMBS: dict[str, Callable[[], bytes]] = {
    "deep lists": lambda: body("[" * 100_000 + "]" * 100_000),
    "deep enough for the parser": lambda: body('{"a":' + "[" * 100 + "]" * 100 + "}"),
    "many keys": lambda: body("{" + ",".join(f'"{n}":0' for n in range(1_000_001)) + "}"),
    "huge integer": lambda: body('{"a":' + "9" * 100_000 + "}"),
    "huge float": lambda: body('{"a":1e999}'),
    "nan": lambda: body('{"a":NaN}'),
    "infinity": lambda: body('{"a":-Infinity}'),
    "too long": lambda: body('"' + "a" * MAX_JSON + '"'),
    "no object": lambda: b"[]",
    "no such part": lambda: b'{"model":{}}',
    "a list for a part": lambda: body("[]"),
    "not utf-8": lambda: body('{"a":1}').replace(b"1", b'"\xff"'),
    "a name to import": lambda: body('{"a":{"$":"os.system","v":"true"}}'),
}


@pytest.mark.parametrize("name", JSON_BOMBS)
def test_json_bombs(name: str, tmp_path: Path) -> None:
    """JSON that is too deep, too long, too big or not strict is a CheckpointError within seconds."""
    path = save(tmp_path, "a", State())
    forge(path, {"state.json": JSON_BOMBS[name]()})
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"state\.json"):
        load(path)
    assert time.monotonic() - start < 5


def header(text: bytes, length: int | None = None, data: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> bytes:
    """A file with one tensor of two floats, changed."""
    fields = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    return header(json.dumps({"w": fields}).encode(), data=b"\0" * 8)


HEADERS = {
    "empty file": b"",
    "giant header": header(b"{}", 2**63),
    "longer than the file": header(b"{}", 100),
    "no object": header(b"[1]"),
    "no entry": header(b'{"w":3}'),
    "metadata is a list": header(b'{"__metadata__":[]}'),
    "deep": header(b'{"w":' + b"[" * 10_000 + b"]" * 10_000 + b"}"),
    "unknown dtype": entry(dtype="O"),
    "wrong size": entry(shape=[3]),
    "negative": entry(shape=[-2]),
    "overflow": entry(shape=[2**62, 2**62]),
    "impossible": header(
        b'{"w":{"dtype":"F32","shape":[0,4611686018427387904,4611686018427387904],"data_offsets":[0,0]}}'
    ),
    "float": entry(shape=[2.0]),
    "bool": entry(shape=[True, 2]),
    "gap": entry(data_offsets=[4, 8], shape=[1]),
    "behind the end": entry(data_offsets=[0, 800], shape=[200]),
    "surplus": entry(data_offsets=[0, 4], shape=[1]),
    "overlap": header(
        b'{"a":{"dtype":"U8","shape":[8],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
        data=b"\0" * 8,
    ),
    "forged note": header(
        b'{"__metadata__":{"lightdeco":"{\\"w\\":[\\"nn\\",[1]]}"},'
        b'"w":{"dtype":"U8","shape":[8],"data_offsets":[0,8]}}',
        data=b"\0" * 8,
    ),
}


@pytest.mark.parametrize("name", HEADERS)
def test_bad_headers(name: str, tmp_path: Path) -> None:
    """A malformed safetensors file is a CheckpointError that names it, and takes no memory beyond its size."""
    file = tmp_path / "model.safetensors"
    file.write_bytes(HEADERS[name])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"), Source(file) as source:
        tensors.read(source)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        load_weights(nn.Linear(2, 1), file)


def test_manifest_of_foreign_names(tmp_path: Path) -> None:
    """A manifest that lists other files, or such outside of its folder, is refused."""
    path = save(tmp_path, "a", State())
    (tmp_path / "outside").write_bytes(b"")
    for name in ("../outside", "other"):
        (path / "manifest.json").unlink()
        write_manifest(path, Manifest(1, {}, {name: Record(0, "")}))
        with pytest.raises(CheckpointError, match=r"is missing"):
            load(path)


def test_no_pickle_in_the_source() -> None:
    """Neither the checkpoints nor callbacks and loggers name pickle, `torch.load` or `torch.save`."""
    root = Path(lightdeco.__file__).parent
    places = [root / name for name in ("checkpoint", "callbacks", "loggers")]
    found = [
        (path.relative_to(root).as_posix(), line)
        for place in places
        for path in sorted(place.rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if re.search(
            r"\b(import|from) (c?pickle|dill|joblib|shelve|marshal)\b|torch\.(load|save)\b|(?<![\w.])(eval|exec)\(",
            line,
        )
    ]
    assert found == []


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_load_weights_in_place(tmp_path: Path) -> None:
    """The model's tensors stay the same objects with the same memory and hold the checkpoint's values."""
    kept = state()
    path = save(tmp_path, "a", kept)
    net = Net()
    before = {name: (id(value), value.data_ptr()) for name, value in net.state_dict(keep_vars=True).items()}
    assert load_weights(net, path) == ([], [])
    after = {name: (id(value), value.data_ptr()) for name, value in net.state_dict(keep_vars=True).items()}
    assert before == after
    assert encoding.difference(dict(net.state_dict()), dict(kept.model), "model") is None
    assert net.second.weight is net.first.weight


def test_load_weights_of_a_damaged_checkpoint(tmp_path: Path) -> None:
    """The manifest and the model's file are verified; nothing is copied from a damaged one."""
    path = save(tmp_path, "a", state())
    data = bytearray((path / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (path / "model.safetensors").write_bytes(data)
    net = Net()
    before = snapshot(State(model=net.state_dict())).model
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        load_weights(net, path)
    assert encoding.difference(before, dict(net.state_dict()), "model") is None


def test_load_weights_shows_the_difference(tmp_path: Path) -> None:
    """Missing and unexpected names with the nearest, and shapes, at most ten of each; before anything is copied."""
    path = save(tmp_path, "a", State(model={f"layer.{n}.weight": torch.ones(2) for n in range(14)}))
    net = nn.Module()
    for n in range(13):
        net.register_parameter(f"layer{n}_weight" if n else "other", nn.Parameter(torch.zeros(2)))
    with pytest.raises(CheckpointError) as caught:
        load_weights(net, path)
    message = str(caught.value)
    assert message.startswith(f"{path} does not fit Module; nothing was loaded:\n  missing in the file (13):")
    assert "\n    'layer1_weight'; did you mean 'layer.1.weight'?" in message
    assert "\n  not in the model (14):" in message
    assert message.count("\n    'layer.") == 10
    assert "… and 3 more" in message
    assert not any(value.any() for value in net.state_dict().values())
    with pytest.raises(CheckpointError, match=r"'weight' is \(2, 3\) in the file, \(1, 3\) in the model"):
        load_weights(nn.Linear(3, 1), save(tmp_path, "b", State(model=nn.Linear(3, 2).state_dict())), strict=False)


def test_load_weights_not_strict(tmp_path: Path) -> None:
    """With strict=False, names that one side lacks are left out and told; nothing in common is still an error."""
    path = save(tmp_path, "a", State(model={"0.weight": torch.ones(1, 2), "9.weight": torch.ones(3)}))
    net = nn.Sequential(nn.Linear(2, 1))
    bias = net[0].bias.detach().clone()
    loaded = load_weights(net, path, strict=False)
    assert loaded.missing == ["0.bias"]
    assert loaded.unexpected == ["9.weight"]
    assert torch.equal(net[0].weight, torch.ones(1, 2))
    assert torch.equal(net[0].bias, bias)
    with pytest.raises(CheckpointError, match="does not fit Linear"):
        load_weights(nn.Linear(2, 1), path, strict=False)


def test_load_weights_of_another_dtype(tmp_path: Path) -> None:
    """Numbers that fit are widened, those that would be rounded are refused unless strict=False; the dtype stays."""
    narrow = save(tmp_path, "a", State(model=nn.Linear(2, 1).bfloat16().state_dict()))
    wide = save(tmp_path, "b", State(model=nn.Linear(2, 1).double().state_dict()))
    net = nn.Linear(2, 1)
    load_weights(net, narrow)
    assert torch.equal(net.weight, load(narrow).model["weight"].float())
    with pytest.raises(CheckpointError, match=r"'weight' is torch\.float64 in the file, torch\.float32 in the model"):
        load_weights(net, wide)
    load_weights(net, wide, strict=False)
    assert torch.equal(net.weight, load(wide).model["weight"].float())
    assert net.weight.dtype == torch.float32


def test_load_weights_of_any_safetensors_file(tmp_path: Path) -> None:
    """Files of the safetensors library load too; it leaves out tied names, which are found by their tensor."""
    net, fresh = (nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)) for _ in range(2))
    for each in (net, fresh):
        each[1].weight = each[0].weight
    file = tmp_path / "hub.safetensors"
    safetensors.torch.save_model(net, str(file))
    (tmp_path / "link.safetensors").symlink_to(file)
    assert "1.weight" not in safetensors.torch.load_file(file)
    assert load_weights(fresh, str(tmp_path / "link.safetensors")) == ([], [])
    assert encoding.difference(dict(fresh.state_dict()), dict(net.state_dict()), "model") is None


def test_load_weights_lazy_and_meta(tmp_path: Path) -> None:
    """A lazy module takes its shapes from the file; a model on the meta device is refused."""
    path = save(tmp_path, "a", State(model=nn.Linear(3, 2).state_dict()))
    lazy = nn.LazyLinear(2)
    load_weights(lazy, path)
    assert lazy.weight.shape == (2, 3)
    with pytest.raises(CheckpointError, match=r"meta device; call model\.to_empty"):
        load_weights(nn.Linear(3, 2, device="meta"), path)


@pytest.mark.parametrize(
    ("name", "message"), [("absent", "does not exist"), ("weights.pt", "nothing is unpickled"), ("", "manifest.json")]
)
def test_load_weights_of_something_else(name: str, message: str, tmp_path: Path) -> None:
    """What is no checkpoint is refused with what is allowed; a pickle is not opened."""
    (tmp_path / "weights.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(CheckpointError, match=message):
        load_weights(nn.Linear(2, 1), tmp_path / name)
    assert not (tmp_path / "mark").exists()


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_snapshot_is_a_copy(tmp_path: Path) -> None:
    """Training may go on after a snapshot: what is written is what was there when it was taken."""
    net = Net()
    settings = {"list": [1]}
    adam = torch.optim.Adam(net.parameters())
    net.first(torch.ones(2, 3)).sum().backward()
    adam.step()
    taken = State(model=net.state_dict(), optimizers={"a": adam.state_dict()}, settings=settings)
    copied = snapshot(taken)
    taken.model = dict(taken.model)
    wanted = load(save(tmp_path, "now", taken))
    adam.step()
    settings["list"].append(2)
    assert same(load(save(tmp_path, "later", copied)), wanted)
    assert same(copied.state(), wanted)
    assert not same(taken, wanted)


def test_snapshot_counts_its_bytes() -> None:
    """`nbytes` is what the tensors and the JSON take; tied tensors are copied once."""
    shared = torch.zeros(1000)
    copied = snapshot(State(model={"a": shared, "b": shared, "c": shared[:10]}))
    assert 8040 < copied.nbytes < 8040 + 500
    assert copied.model["a"].data_ptr() == copied.model["b"].data_ptr() != shared.data_ptr()
    assert copied.model["c"].untyped_storage().nbytes() == 40


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_from_a_gpu_and_back(tmp_path: Path) -> None:
    """Weights, states and tensor learning rates of a GPU are saved, and come back where they were."""
    from lightdeco.checkpoint import load_optimizer

    def make() -> tuple[nn.Linear, torch.optim.Optimizer]:
        torch.manual_seed(0)
        net = nn.Linear(3, 2, device="cuda")
        rate = torch.tensor(0.1, device="cuda")
        return net, torch.optim.Adam(net.parameters(), lr=rate, capturable=True)

    def step(net: nn.Linear, adam: torch.optim.Optimizer) -> None:
        adam.zero_grad()
        net(torch.ones(4, 3, device="cuda")).pow(2).sum().backward()
        adam.step()

    net, adam = make()
    step(net, adam)
    copied = snapshot(State(model=net.state_dict(), optimizers={"a": adam.state_dict()}))
    assert all(value.device.type == "cpu" for value in (*copied.model.values(), *copied.optimizer.values()))
    path = save(tmp_path, "a", copied)
    fresh, fresh_adam = make()
    load_weights(fresh, path)
    load_optimizer(fresh_adam, load(path).optimizers["a"])
    assert fresh_adam.param_groups[0]["lr"].device.type == "cuda"
    for _ in range(5):
        step(net, adam)
        step(fresh, fresh_adam)
    assert torch.equal(net.weight, fresh.weight)


def test_prune_after_save(two: Path) -> None:
    """Saving, then pruning, leaves what is to be kept and nothing else, hidden or not."""
    save(two, "step=3", state(3))
    assert prune(two, {"step=3"}) == ["step=1", "step=2"]
    assert [entry.name for entry in two.iterdir()] == ["step=3"]


# ---- the command line ------------------------------------------------------------------------------------------------


def test_command_line(tmp_path: Path) -> None:
    """`python -m lightdeco.checkpoint` shows a checkpoint and exits with 0, and with 1 when it is not valid."""
    path = save(tmp_path, "step=00000012", state(12))
    command = [sys.executable, "-W", "error", "-m", "lightdeco.checkpoint", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert done.stdout.startswith("step=00000012: valid\n  step: 12\n  epoch: 2\n")
    (path / "state.json").unlink()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "step=00000012: NOT VALID" in done.stdout
    assert "state.json: is missing" in done.stdout


def test_describe(tmp_path: Path) -> None:
    """A checkpoint, a folder of them and a run's directory are described, oldest first, without a change to them."""
    folder = tmp_path / "run" / "checkpoints"
    for step in (9, 5):
        save(folder, f"step={step}", state(step))
    (folder / ".step=5.new-00000000-1-0123abcd").mkdir()
    text, valid = describe(folder / "step=5")
    assert valid
    for line in (
        "step=5: valid",
        "  step: 5",
        "  metrics: val/loss = 0.25",
        "  hparams: lr = 0.001, sizes = (3, 4)",
        "  callbacks: EarlyStopping",
        "    first.weight: float32 [3, 3]",
    ):
        assert line in text.splitlines()
    assert re.search(r"model\.safetensors: [\d.]+ k?B, 16 tensors, float32 \d+ B", text)
    everything = describe(folder)
    assert everything == describe(tmp_path / "run")
    assert everything[0].index("step=9: valid") < everything[0].index("step=5: valid")
    assert len(list(folder.iterdir())) == 3
    (folder / "step=9" / "state.json").write_bytes(b"")
    text, valid = describe(folder)
    assert not valid
    assert "step=9: NOT VALID" in text
    assert describe(tmp_path / "absent")[1] is False
    assert describe(tmp_path)[1] is False


def test_weights_of_a_run_are_asked_for_by_checkpoint(tmp_path: Path) -> None:
    """A run's directory and its folder of checkpoints are no checkpoint: what is there is listed, the newest last."""
    for name in ("b", "a"):
        save(tmp_path / "checkpoints", name, State(model=nn.Linear(2, 1).state_dict()))
    for given in (tmp_path, tmp_path / "checkpoints"):
        with pytest.raises(CheckpointError, match=r"give the path of one of its checkpoints: .*/b, .*checkpoints/a$"):
            load_weights(nn.Linear(2, 1), given)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="manifest"):
        load_weights(nn.Linear(2, 1), tmp_path / "empty")
