"""What `data` may be, what is refused and how, and what is found and moved in a batch."""

import collections
import collections.abc
import dataclasses
import types
from typing import Any, NamedTuple

import numpy
import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from lightdeco.data import CombinedLoader, batch_size_of, loaders, split, to_device
from lightdeco.errors import DataError


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Any
    y: Any = None


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> int:
        return i


class Stream(IterableDataset[int]):
    def __iter__(self):
        return iter(range(4))


class Indexed:
    def __getitem__(self, i: int) -> int:
        raise IndexError


class Graph:
    """Something that can be moved and iterated, as the batches of some libraries can."""

    def __init__(self, place: str = "start") -> None:
        self.place = place

    def __iter__(self):
        return iter(("x", "y"))

    def to(self, device: Any) -> "Graph":
        return Graph(str(device))


X, Y = torch.zeros(4, 3), torch.zeros(4)
LOADER = DataLoader(TensorDataset(X, Y), batch_size=2)


# split


@pytest.mark.parametrize(
    ("verb", "stage"), [("fit", "train"), ("validate", "val"), ("test", "test"), ("predict", "predict")]
)
@pytest.mark.parametrize(
    "data",
    [LOADER, [(X, Y)], [X, Y], iter([X]), DataLoader(Stream()), Stream(), CombinedLoader([LOADER, LOADER]), [[X, Y]]],
    ids=["loader", "list", "list of tensors", "iterator", "stream loader", "stream", "combined", "lists"],
)
def test_one_loader_belongs_to_the_stage_of_the_verb(data: Any, verb: str, stage: str) -> None:
    """A loader, a list of batches and any other iterable go to the verb's stage, the same object."""
    given = split(data, verb)
    assert list(given) == [stage]
    assert given[stage] is data


def test_nothing_gives_nothing() -> None:
    """None leaves the loaders to the model's marks."""
    assert split(None, "fit") == {}


def test_two_tuple_is_train_and_val() -> None:
    """Two loaders in a tuple are those of training and validation; None leaves one out."""
    assert split((LOADER, [X]), "fit") == {"train": LOADER, "val": [X]}
    assert split((LOADER, [X]), "validate")["val"] == [X]
    assert split((LOADER, None), "fit") == {"train": LOADER}


@pytest.mark.parametrize("verb", ["test", "predict"])
def test_two_tuple_has_nothing_for_test(verb: str) -> None:
    """Test and predict say which loader is missing from a two-tuple."""
    with pytest.raises(DataError, match=rf"two-tuple.*\(train, val\); {verb} needs a {verb} loader.*'{verb}': loader"):
        split((LOADER, LOADER), verb)


def test_dict_of_stages() -> None:
    """A dict names the stages; None values are dropped."""
    assert split({"train": LOADER, "val": None, "predict": [X]}, "fit") == {"train": LOADER, "predict": [X]}


def test_dict_with_an_unknown_stage() -> None:
    """Another key is refused with the nearest one."""
    with pytest.raises(DataError, match=r"key 'vall'; allowed: 'train', 'val', 'test', 'predict'; did you mean 'val'"):
        split({"vall": LOADER}, "fit")


REFUSED = {
    "path": ("data/train", "the str 'data/train'; give a loader"),
    "bytes": (b"data", "the bytes b'data'"),
    "tensor": (X, r"a Tensor, not a loader; .*TensorDataset\(x, y\)"),
    "array": (numpy.zeros(3), r"a ndarray, not a loader; .*TensorDataset"),
    "tensors": ((X, Y), r"a tuple of two arrays \(Tensor, Tensor\).*DataLoader\(TensorDataset"),
    "arrays": ((numpy.zeros(3), Y), r"a tuple of two arrays \(ndarray, Tensor\)"),
    "dataset": (Numbers(), r"the dataset Numbers, .*DataLoader\(dataset"),
    "tensor dataset": (TensorDataset(X), "the dataset TensorDataset"),
    "indexed": (Indexed(), "a Indexed, which has __getitem__ but no __iter__"),
    "number": (3, "a int, which cannot be iterated"),
    "function": (len, "a builtin_function_or_method, which cannot be iterated"),
    "class": (Stream, r"the class Stream; give an instance of it: Stream\(…\)"),
    "module": (torch.nn.Sequential(), r"the module Sequential; the order of arguments is \(model, data\)"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    """What is no loader is refused with what it is and what to do: as data, of a stage, and as a part."""
    given, message = REFUSED[name]
    with pytest.raises(DataError, match=f"^data is {message}"):
        split(given, "fit")
    with pytest.raises(DataError, match=f"^the train loader is {message}"):
        loaders(given, "train", seed=0)
    with pytest.raises(DataError, match=f"^the val loader 'a' is {message}"):
        loaders({"a": given}, "val", seed=0)
    with pytest.raises(DataError, match=f"^loader 1 of the CombinedLoader is {message}"):
        CombinedLoader([LOADER, given])


def test_three_loaders_in_a_tuple() -> None:
    """Three loaders in a tuple mean nothing; the message says how to name them."""
    with pytest.raises(DataError, match=r"a tuple of 3 loaders; allowed: two.*'test': …"):
        split((LOADER, LOADER, LOADER), "fit")


def test_mapping_that_is_no_dict() -> None:
    """Only a dict names stages; another mapping is refused rather than iterated over its keys."""
    with pytest.raises(DataError, match=r"a UserDict with the keys \['train'\]"):
        split(collections.UserDict(train=LOADER), "fit")


# loaders


def test_single_loader_has_no_name() -> None:
    """One loader is unnamed, in every stage."""
    assert [[loader.name for loader in loaders(LOADER, stage, 0)] for stage in ("train", "val")] == [[None], [None]]


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("stage", ["val", "test", "predict"])
def test_several_loaders_are_named_by_number(kind: type, stage: str) -> None:
    """A list or tuple of loaders is numbered; generators and combined loaders are loaders too."""
    given = kind([LOADER, CombinedLoader([LOADER]), (x for x in [X]), Stream()])
    assert [loader.name for loader in loaders(given, stage, 0)] == ["0", "1", "2", "3"]


def test_dict_of_loaders_is_named_by_its_keys() -> None:
    """A dict's keys are the names, and its values may be lists of batches."""
    first, second = loaders({"clean": LOADER, "noisy": [X, X]}, "val", 0)
    assert (first.name, second.name) == ("clean", "noisy")
    assert list(second.batches(0)) == [X, X]


@pytest.mark.parametrize(
    "batches",
    [
        [[X, Y], [X, Y]],
        [(X, Y)],
        [{"x": X}, {"x": X}],
        [X, X],
        ["a", "b"],
        [numpy.zeros(2)],
        [Graph(), Graph()],
        (Pair(X, Y),),
    ],
    ids=["lists", "tuples", "dicts", "tensors", "strings", "arrays", "graphs", "named tuples"],
)
def test_list_of_batches_is_one_loader(batches: Any) -> None:
    """A list of what batches look like is one loader, and its batches are the very same objects."""
    for stage in ("train", "val"):
        (loader,) = loaders(batches, stage, 0)
        assert all(got is given for got, given in zip(loader.batches(0), batches, strict=True))


@pytest.mark.parametrize("given", [[LOADER, LOADER], {"a": LOADER, "b": LOADER}], ids=["list", "dict"])
def test_training_reads_one_loader(given: Any) -> None:
    """Several loaders for training are refused, and CombinedLoader is named."""
    with pytest.raises(DataError, match=r"train was given 2 loaders.*CombinedLoader\(loaders, mode="):
        loaders(given, "train", 0)
    (loader,) = loaders(CombinedLoader(given), "train", 0)
    assert loader.length == 2


@pytest.mark.parametrize("name", ["a/b", "", 3])
def test_names_of_loaders(name: Any) -> None:
    """A name that could not stand in a metric's name is refused."""
    with pytest.raises(DataError, match=r"allowed: a string without '/'"):
        loaders({name: LOADER}, "val", 0)


def test_list_inside_a_dict_of_loaders() -> None:
    """One name means one loader."""
    with pytest.raises(DataError, match=r"the test loader 'a' is a list of 2 loaders, where one loader is needed"):
        loaders({"a": [LOADER, LOADER]}, "test", 0)


@pytest.mark.parametrize("stage", ["train", "val"])
def test_none_from_a_method(stage: str) -> None:
    """A method that returned None is refused: it forgot to return its loader."""
    with pytest.raises(DataError, match=rf"the {stage} loader is None; give \(or return\) a loader"):
        loaders(None, stage, 0)


def test_empty() -> None:
    """A loader of known length 0 is refused before the run, with its stage, its name and a hint."""
    with pytest.raises(DataError, match=r"the train loader is empty.*drop_last=True"):
        loaders(DataLoader(Numbers(), batch_size=5, drop_last=True), "train", 0)
    with pytest.raises(DataError, match=r"the val loader 'b' is empty: its length is 0; leave it out$"):
        loaders({"a": LOADER, "b": []}, "val", 0)
    with pytest.raises(DataError, match="the val loader is empty"):
        loaders([], "val", 0)
    with pytest.raises(DataError, match="val was given an empty dict"):
        loaders({}, "val", 0)


# CombinedLoader


A, B = [1, 2, 3], [10, 20]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("min_size", [[1, 10], [2, 20]]),
        ("max_size", [[1, 10], [2, 20], [3, None]]),
        ("max_size_cycle", [[1, 10], [2, 20], [3, 10]]),
        ("sequential", [1, 2, 3, 10, 20]),
    ],
)
def test_combined_loader_is_a_plain_iterable(mode: Any, expected: list[Any]) -> None:
    """Each mode gives its batches in the given structure, as often as it is iterated, and knows its length."""
    combined = CombinedLoader([A, B], mode)
    assert list(combined) == list(combined) == expected
    assert len(combined) == len(expected)
    named = [dict(zip("ab", row, strict=True)) if isinstance(row, list) else row for row in expected]
    assert list(CombinedLoader({"a": A, "b": B}, mode)) == named


def test_combined_loader_starts_none_again_at_the_end() -> None:
    """With loaders of one length nothing is started again when all of them end together."""
    started = []

    class Counted:
        def __iter__(self):
            started.append(self)
            return iter(A)

    assert len(list(CombinedLoader([Counted(), Counted()], "max_size_cycle"))) == 3
    assert len(started) == 2


def test_combined_loader_cycles_a_loader_more_than_once() -> None:
    """The shorter loader starts again as often as the longest one needs."""
    assert list(CombinedLoader([[1, 2, 3, 4, 5], [7, 8]], "max_size_cycle")) == [[1, 7], [2, 8], [3, 7], [4, 8], [5, 7]]


def test_combined_loader_cannot_restart_a_generator() -> None:
    """A generator that would have to start again is named, rather than looping for ever."""
    combined = CombinedLoader([A, (x for x in B)], "max_size_cycle")
    with pytest.raises(DataError, match="loader 1 of the CombinedLoader gave nothing when it was started again"):
        list(combined)


def test_combined_loader_refusals() -> None:
    """A wrong mode, nothing to combine, and a list of loaders as one part are refused."""
    with pytest.raises(DataError, match=r"mode='max_sise'; allowed: 'min_size'.*did you mean 'max_size'"):
        CombinedLoader([A], mode="max_sise")  # type: ignore[arg-type]
    for nothing in ([], {}, LOADER):
        with pytest.raises(DataError, match="takes a list or a dict of loaders"):
            CombinedLoader(nothing)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="loader 'a' of the CombinedLoader is a list of 2 loaders"):
        CombinedLoader({"a": [LOADER, LOADER]})


def test_combined_loader_of_unknown_length() -> None:
    """The length is unknown where one part's is."""
    with pytest.raises(TypeError):
        len(CombinedLoader([A, iter(B)]))
    assert loaders(CombinedLoader([A, iter(B)]), "train", 0)[0].length is None


# batch_size_of


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (X, 4),
        (torch.tensor(3.0), 1),
        (torch.zeros(0, 3), 0),
        ((X, Y), 4),
        ([Y, X], 4),
        ((torch.tensor(1.0), X), 1),
        ({"name": "a", "x": X}, 4),
        (collections.OrderedDict(x=X), 4),
        (types.MappingProxyType({"x": X}), 4),
        (Pair(torch.zeros(2), X), 2),
        (Sample(None, {"deep": [(), "a", X]}), 4),
        (["a", [[torch.zeros(5)], X]], 5),
        (Sample, None),
        ("text", None),
        (["text", 3, None], None),
        ([], None),
        ((), None),
        ({}, None),
        (None, None),
        (numpy.zeros((3, 2)), None),
    ],
)
def test_batch_size(batch: Any, size: int | None) -> None:
    """The size is the first dimension of the first tensor, in order and depth first; None without a tensor."""
    assert batch_size_of(batch) == size


# to_device: "meta" stands for another device, since every machine has it


def moved(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta"


def test_to_device_keeps_the_structure() -> None:
    """Tensors in lists, tuples, named tuples, mappings and dataclasses move; kinds and other things stay."""
    name = object()
    batch = [X, (Y, name), {"x": X, 1: None}, Pair(X, "a"), Sample(X, [Y])]
    got = to_device(batch, "meta")
    assert [type(part) for part in got] == [torch.Tensor, tuple, dict, Pair, Sample]
    assert got[1][1] is name
    assert list(got[2]) == ["x", 1]
    assert all(map(moved, [got[0], got[1][0], got[2]["x"], got[3].x, got[4].x, got[4].y[0]]))
    assert (got[3].y, got[4].y[0].shape) == ("a", (4,))
    assert not moved(batch[4].x), "the given batch stays as it was"


def test_to_device_keeps_subclasses() -> None:
    """Subclasses of dict, list and tuple, other mappings and slotted dataclasses keep their kind and settings."""

    class Rows(list):  # type: ignore[type-arg]
        title = ""

    class Point(tuple):  # type: ignore[type-arg]
        __slots__ = ()

    @dataclasses.dataclass
    class Derived:
        __slots__ = ("x",)
        x: Any

    default = collections.defaultdict(list, x=X)
    rows = Rows([X])
    rows.title = "kept"
    got = to_device((default, rows, Point((X,)), collections.UserDict(x=X), Derived(X)), torch.device("meta"))
    assert [type(part) for part in got] == [collections.defaultdict, Rows, Point, collections.UserDict, Derived]
    assert got[0]["missing"] == []
    assert got[1].title == "kept"
    assert all(map(moved, [got[0]["x"], got[1][0], got[2][0], got[3]["x"], got[4].x]))
    assert moved(to_device(ReadOnly(x=X), "meta")["x"])


class ReadOnly(collections.abc.Mapping):  # type: ignore[type-arg]
    def __init__(self, *args: Any, **items: Any) -> None:
        self._items = dict(*args, **items)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __iter__(self):
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)


def test_to_device_uses_an_objects_own_method() -> None:
    """An object with `to` moves itself, also a named tuple; one whose `to` returns None has moved in place."""

    class InPlace:
        place = "start"

        def to(self, device: Any) -> None:
            self.place = str(device)

    here = InPlace()
    graph, same, packed = to_device([Graph(), here, pack_padded_sequence(X, [2, 2, 1])], "meta")
    assert graph.place == "meta"
    assert same is here
    assert here.place == "meta"
    assert moved(packed.data)
    assert to_device(Graph, "cpu") is Graph


def test_to_device_copies_nothing_that_is_there() -> None:
    """On the same device the tensors are the same objects."""
    got = to_device([X, {"y": Y}], "cpu", non_blocking=True)
    assert got[0] is X
    assert got[1]["y"] is Y
