"""What can happen to a run of several processes, each case with forked ranks; prints a JSON line for each.

python tests/distributed/battery.py [--seed 0] [CASE ...]
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[2]))

import accelerate  # noqa: F401 (imported once, for all ranks)
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lightdeco as ld
from lightdeco.callbacks.model_checkpoint import ModelCheckpoint
from tests.distributed.ranks import Pids, die_together, start, together
from tests.faults.training import Case, Net, fingerprint, run

OFTEN: Final = ModelCheckpoint(monitor="val/loss", save_top_k=2, every_n_steps=1)
QUIET: Final[dict[str, Any]] = {"logger": False, "progress_bar": False, "summary": False, "checkpoint": False}

Rng = random.Random


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A directory for one run."""
    path = Path(tempfile.mkdtemp(prefix="battery-"))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def die() -> None:
    """End this process at once."""
    os.kill(os.getpid(), signal.SIGKILL)


def hash_of(model: nn.Module) -> str:
    """Of all weights and buffers."""
    return hashlib.sha256(b"".join(v.numpy().tobytes() for v in model.state_dict().values())).hexdigest()[:16]


def finish(root: Path, case: Case, number: int = 0, size: int = 2, prepare: Callable[[], None] = int) -> dict[str, str]:
    """Start a run in `root`, or go on with it, to its end; its fingerprint."""

    def work() -> Any:
        prepare()
        model, result = run(root, case, number)
        return (fingerprint(model, result) if result.is_main else None), hash_of(model), result.metrics

    ended = together(work, size)
    assert all(values[1:] == ended[0][1:] for values in ended), f"the ranks end with other weights or metrics: {ended}"
    found: dict[str, str] = ended[0][0]
    return found


def at(event: str, count: int, who: int, act: Callable[[], None]) -> None:
    """Act in the `count`-th event of this kind on rank `who`."""
    left = [count]

    def hear(self: Any, run: ld.Run) -> None:
        left[0] -= run.rank == who and run.stage != "sanity"
        if left[0] == 0:
            left[0] = -1
            act()

    setattr(Net, f"hears_{event}", getattr(ld, event)(hear))


def compare(found: dict[str, str], expected: dict[str, str]) -> None:
    """Raise for what is not the same."""
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"not as in the uninterrupted run: {', '.join(different)}"


# ---- interrupted and resumed -----------------------------------------------------------------------------------------

_EVENTS: Final = ("on_train_batch_start", "on_after_backward", "on_train_batch_end", "on_save_checkpoint")
_VALIDATION: Final = ("on_validation_batch_start", "on_validation_epoch_end", "on_train_epoch_end")


def _interrupted(root: Path, case: Case, number: int, place: tuple[str, int, int, Callable[[], None]]) -> None:
    at(*place)
    run(root, case, number)


def killed(case: Case, events: tuple[str, ...] = _EVENTS, kills: int = 3) -> Callable[[Rng], None]:
    """All ranks or a single one are killed at random places, resumed each time; the end is equal to the bit."""

    def one(rng: Rng) -> None:
        with folder() as root:
            expected = finish(root, case)
        with folder() as root:
            for number in range(kills):
                who, how = rng.randrange(2), rng.choice([die, die_together])
                # The second rank has one batch of validation only, and saves come once per step on each.
                place = rng.choice(events), rng.randint(1, 3 if events is _VALIDATION else 8), who, how
                ended = start(partial(_interrupted, root, case, number, place))
                if [each.status for each in ended] == [0, 0]:
                    break
                assert ended[who].status == -signal.SIGKILL, f"{place}: {ended[who].text[-3000:]}"
            compare(finish(root, case, kills), expected)

    return one


def signalled(number: int, status: int) -> Callable[[Rng], None]:
    """A signal to one rank: all save at the same step and end with its status; resumed, the end is equal."""

    def one(rng: Rng) -> None:
        case = Case({"val_check_interval": 3})
        with folder() as root:
            expected = finish(root, case)
        with folder() as root:
            places = [(rng.choice(_EVENTS[:3]), rng.randint(1, 6)), (rng.choice(_VALIDATION[:2]), rng.randint(1, 2))]
            for n, place in enumerate(places):
                who = rng.randrange(2)
                ended = start(partial(_interrupted, root, case, n, (*place, who, lambda: os.kill(os.getpid(), number))))
                found = [each.status for each in ended]
                assert found == [status] * 2, (
                    f"{place} on {who}: {found}\n{ended[0].text[-2000:]}\n{ended[1].text[-2000:]}"
                )
                assert len(list((root / "run" / "checkpoints").glob("step=*"))) >= 1
            compare(finish(root, case, 2), expected)

    return one


class Numbers(Dataset[Any]):
    """Samples that are their own number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor([float(i)])


class Seen(nn.Module):
    """A line that keeps which samples it was given."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.line = nn.Linear(1, 1)
        self.seen: list[list[int]] = []

    @ld.training_step
    def step(self, batch: Tensor) -> Tensor:
        """A loss that stays small."""
        self.seen.append(batch.flatten().int().tolist())
        return self.line(batch / 100).square().mean()

    @ld.validation_step
    def check(self, batch: Tensor) -> Tensor:
        """The same."""
        return self.line(batch / 100).square().mean()

    @ld.configure_optimizers
    def sgd(self) -> torch.optim.Optimizer:
        """Plain."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _seen(root: Path, **given: Any) -> Any:
    model = Seen()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ld.fit(model, DataLoader(Numbers(24), 2, shuffle=True), root_dir=root, name="run", resume="auto", seed=1,
               max_epochs=1, logger=False, progress_bar=False, summary=False, **given)  # fmt: skip
    return model.seen, [str(warning.message) for warning in caught]


def other_size(rng: Rng) -> None:
    """2 -> 1 and 1 -> 2 ranks: the samples go on in the order of one process, and a warning says what is different."""
    with folder() as root:
        order = together(partial(_seen, root), 1)[0][0]
    for before, stop, after in ((2, 3, 1), (1, 5, 2), (3, 2, 2)):
        with folder() as root:
            first = together(partial(_seen, root, max_steps=stop), before)
            second = together(partial(_seen, root), after)
        done = [batch for pair in zip(*(seen for seen, _ in first), strict=True) for batch in pair]
        rest = [batch for pair in zip(*(seen for seen, _ in second), strict=True) for batch in pair]
        assert done == order[: before * stop], f"{before} -> {after}: {done}"
        begin = before * stop // after * after
        assert rest == order[begin:], f"{before} -> {after}: {rest} instead of {order[begin:]}"
        said = " ".join(second[0][1])
        assert f"had {before} process" in said, said
        assert f"has {after} now" in said, said


# ---- ranks that differ -----------------------------------------------------------------------------------------------


class Own(IterableDataset[Any]):
    """A stream that shares itself out: `counts[rank]` samples."""

    def __init__(self, *counts: int) -> None:
        self.counts = counts

    def __iter__(self) -> Any:
        return (torch.tensor([float(i)]) for i in range(self.counts[int(os.environ["RANK"])]))


class Claims(Own):
    """The same with a length."""

    def __len__(self) -> int:
        return self.counts[int(os.environ["RANK"])]


class Picks(torch.utils.data.Sampler[int]):
    """A sampler of the user's own: ranks get different numbers of samples."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return 20 if os.environ["RANK"] == "0" else 12


def _unequal(given: dict[str, dict[str, Any]]) -> Any:
    own: Any = {"use_distributed_sampler": False}
    rank = int(os.environ["RANK"])
    lists = [torch.ones(4, 1)] * (5 if rank == 0 else 3)
    data: list[tuple[str, Any, dict[str, Any]]] = [
        ("stream", DataLoader(Own(20, 12), 4), own),
        ("stream, the first is shorter", DataLoader(Own(12, 20), 4), own),
        ("stream with a length", DataLoader(Claims(20, 12), 4), own),
        ("sampler", DataLoader(Numbers(20), 4, sampler=Picks()), own),
        ("lists", lists, own),
        ("lists, shared out", lists * 2, {}),
    ]
    found = []
    for name, loader, more in data:
        for what, settings in given.items():
            print(f"{name}, {what}", flush=True)
            model = Seen()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = ld.fit(
                    model, (loader, [torch.ones(1, 1)] * 3), max_epochs=2, seed=1, **(QUIET | more | settings)
                )
            said = any("different numbers of batches" in str(warning.message) for warning in caught)
            found.append((name, what, result.global_step, result.epoch, hash_of(model), result.metrics, said))
    return found


_UNEQUAL: Final[dict[str, dict[str, Any]]] = {
    "plain": {},
    "accumulation": {"accumulate_grad_batches": 2},
    "max_steps where the shorter ends": {"max_steps": 3},
    "validation within": {"val_check_interval": 2},
    "limit": {"limit_train_batches": 4},
}


def unequal(rng: Rng) -> None:
    """Ranks with 5 and 3 batches end together, with equal weights, and say that something was left out."""
    first, second = together(partial(_unequal, _UNEQUAL))
    for one, other in zip(first, second, strict=True):
        assert one[:6] == other[:6], f"{one} and {other}"
        expected = {"accumulation": 4, "max_steps where the shorter ends": 3}.get(one[1], 6)
        assert one[2] == expected, one


def _shares(rank: int) -> Any:
    lists = [torch.ones(4, 1)] * (6 if rank == 0 else 3)
    found = []
    for settings in ({"val_check_interval": 0.5}, {"limit_train_batches": 0.5}, {"val_check_interval": 5}):
        print(settings, flush=True)
        model = Seen()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = ld.fit(model, (lists, [torch.ones(1, 1)] * 3), max_epochs=2, seed=1,
                                use_distributed_sampler=False, **QUIET, **settings)  # fmt: skip
        except ld.SettingsError as error:
            found.append(str(error))
        else:
            found.append([result.global_step, [(r["stage"], r["step"]) for r in result.history], hash_of(model)])
    return found


def unequal_shares(rng: Rng) -> None:
    """A share of an epoch is the same on ranks whose epochs differ, and so is what is refused."""
    first, second = together(lambda: _shares(int(os.environ["RANK"])))
    assert first == second, f"{first}\n{second}"
    assert first[0][0] == 6


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Measured(nn.Module):
    """A model whose validation logs in every way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(2, 3)
        self.accuracy, self.rare = MulticlassAccuracy(3, average="micro"), MeanMetric()
        self.loose = [MeanMetric()]  # no part of the model

    @ld.training_step
    def step(self, batch: Any) -> Tensor:
        """Plain."""
        return F.cross_entropy(self.body(batch[0]), batch[1])

    @ld.validation_step
    @ld.test_step
    def check(self, batch: Any, dataloader_idx: int) -> Any:
        """Scalars by weight, by size, as sums and extremes; torchmetrics objects, some of them seldom."""
        x, y = batch
        logits = self.body(x)
        self.accuracy.update(logits, y)
        self.loose[0].update(x.mean(), len(x))
        if 3.0 in x[:, 1]:
            self.rare.update(x.sum())
            ld.log("rare", self.rare)
            ld.log("seldom", x.sum())
        ld.log("loose", self.loose[0])
        ld.log("acc", self.accuracy)
        for reduce in ("sum", "max", "min"):
            ld.log(reduce, x[:, 0].sum(), reduce=reduce)
        ld.log("last", x[:, 1].sum(), reduce="last")
        if len(x) < 5 or 7.0 in x[:, 1]:
            ld.log("last of some", x[:, 1].sum(), reduce="last")
        return {"loss": F.cross_entropy(logits, y), "other": x.mean(), "weight": 1.0 + y.sum()}

    @ld.predict_step
    def infer(self, batch: Any) -> list[float]:
        """Which samples these are."""
        result: list[float] = batch[0][:, 1].tolist()
        return result

    @ld.configure_optimizers
    def sgd(self) -> torch.optim.Optimizer:
        """Plain."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Pairs(Dataset[Any]):
    """x (2,), whose second entry is the sample's number; y ()."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Any:
        return torch.tensor([float(i * 7 % 5) - 2, float(i)]), torch.tensor(i % 3)


def _values(size: int) -> Any:
    found: dict[str, Any] = {}
    for count in (1, 7, 21):
        loader = DataLoader(Pairs(count), 5)
        several: dict[str, Any] = {"one": loader, "list": [loader, DataLoader(Pairs(2), 1)]}
        several["dict"] = {"a": DataLoader(Pairs(6), 5), "b": loader}
        for name, given in several.items():
            print(count, name, flush=True)
            found[f"{count} {name}"] = ld.validate(Measured(), {"val": given}, **QUIET, seed=1)
        found[f"{count} predicted"] = list(ld.predict(Measured(), loader, **QUIET))
        print(count, "fit", flush=True)
        model = Measured()  # the weights do not move: training is another matter
        result = ld.fit(model, (DataLoader(Pairs(12), 2), loader), max_epochs=2, limit_train_batches=2, seed=1,
                        gradient_clip_val=1e-30, **QUIET)  # fmt: skip
        found[f"{count} in fit"] = {k: v for k, v in result.metrics.items() if not k.startswith("train/")}
    return found


def evaluated(rng: Rng) -> None:
    """For any number of samples and ranks: the values of one process, on every rank; predictions in order."""
    (expected,) = together(partial(_values, 1), 1)
    for size in (2, 3):
        for found in together(partial(_values, size), size):
            for what, values in expected.items():
                if isinstance(values, list):
                    assert found[what] == values, f"{what} on {size}: {found[what]}"
                    continue
                assert found[what].keys() == values.keys(), f"{what} on {size}: {sorted(found[what])} {sorted(values)}"
                for name, value in values.items():
                    close = abs(found[what][name] - value) <= 1e-6 * max(1, abs(value))
                    assert close, f"{what}, {name} on {size} ranks: {found[what][name]} and not {value}"


# ---- numbers, directories, disks -------------------------------------------------------------------------------------


def _bad(who: int, step: int, settings: dict[str, Any]) -> Any:
    class Bad(Seen):
        @ld.training_step
        def step(self, batch: Tensor, run: ld.Run) -> Tensor:
            loss: Tensor = self.line(batch / 100).square().mean()
            return loss * float("nan") if run.rank == who and run.progress.micro_batch == step else loss

    model = Bad()
    try:
        result = ld.fit(model, DataLoader(Numbers(48), 2), max_epochs=1, seed=1, **QUIET, **settings)
    except ld.StepError as error:
        return str(error)
    return result.global_step, result.progress.skipped_updates, result.metrics, hash_of(model)


def not_finite(rng: Rng) -> None:
    """A NaN on one rank is named with the rank and the step, by all; "skip" skips on all together."""
    for every in (1, 2, 5, 50):
        who, step = rng.randrange(2), rng.randint(1, 8)
        found = together(partial(_bad, who, step, {"log_every_n_steps": every}))
        assert found[0] == found[1], found
        assert f"batch {step} of epoch 0, global_step {step + 1}" in found[0], f"{step}: {found[0]}"
        assert f"rank {who}" in found[0], found[0]
    first, second = together(partial(_bad, 1, 4, {"on_nan": "skip", "log_every_n_steps": 3}))
    assert first == second, f"{first} {second}"
    assert first[:2] == [11, 1], first


def _only(root: Path, case: Case, **given: Any) -> None:
    run(root, case, **given)


def two_at_once(rng: Rng) -> None:
    """A second run of the same name is refused on all its ranks, with one clear error; the first is not disturbed."""
    case = Case({"checkpoint": OFTEN})
    with folder() as root:
        expected = finish(root, case)
    with folder() as root:
        second: list[Any] = []

        def act(pids: Pids) -> None:
            lock = root / "run" / "run.lock"
            while not lock.exists() or not lock.read_text():
                time.sleep(0.002)
            second.extend(start(partial(_only, root, case)))
            second.extend(start(partial(_only, root, case, resume=None)))

        def slowly() -> Any:
            at("on_train_start", 1, 0, partial(time.sleep, 2.0))
            model, result = run(root, case)
            return fingerprint(model, result) if result.is_main else None

        first = start(slowly, act=act)
        assert [end.status for end in first] == [0, 0], first[0].text[-3000:]
        compare(first[0].value, expected)
        assert [end.status for end in second] == [1] * 4, [end.status for end in second]
        for end in second[:2]:
            assert "LaunchError" in end.text, end.text
            assert "is in use by process" in end.text, end.text
        for end in second[2:]:
            assert "SettingsError: name='run'" in end.text, end.text


def _policy(**given: Any) -> Any:
    with folder() as root:
        case = Case({"checkpoint": ModelCheckpoint(monitor="val/loss", save_top_k=2, **given), "val_check_interval": 2})

        def work() -> Any:
            _, result = run(root, case)
            assert result.last_checkpoint is not None
            assert result.best_checkpoint is not None
            ld.checkpoint.verify(result.best_checkpoint)  # type: ignore[attr-defined]
            return result.best_checkpoint.name, result.last_checkpoint.name, result.best_score

        first, second = together(work)
        assert first == second, f"{first} {second}"
        return sorted(path.name for path in (root / "run" / "checkpoints").iterdir()), first


def policies(rng: Rng) -> None:
    """In the background or not, the same checkpoints are kept, and all ranks know which."""
    expected = _policy()
    assert _policy(background=True) == expected
    assert len(expected[0]) == 3 or expected[1][0] == expected[1][1], expected
    assert _policy(every_n_steps=1, background=True) == _policy(every_n_steps=1)


def _full(root: Path, case: Case, until: int) -> Any:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    def fill(self: Any, run: ld.Run) -> None:
        if run.is_main and run.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        if run.is_main and run.global_step == until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    Net.fills = ld.on_train_batch_end(fill)  # type: ignore[attr-defined]
    model, result = run(root, case)
    return hash_of(model), result.global_step, str(result.last_checkpoint)


def disk_full(rng: Rng) -> None:
    """No more space on rank 0: all train on and save later; where it stays full, all end with the same error."""
    case = Case({"checkpoint": OFTEN})
    with folder() as root:
        expected = together(lambda: hash_of(run(root, case)[0]))[0]
    with folder() as root:
        first, second = together(partial(_full, root, case, 7))
        assert first == second, f"{first} {second}"
        assert first[0] == expected
        left = [path.name for path in (root / "run" / "checkpoints").iterdir() if path.name.startswith(".")]
        assert not left, left
    with folder() as root:
        ended = start(partial(_full, root, case, -1))
        assert [end.status for end in ended] == [1, 1], [end.text[-2000:] for end in ended]
        last = [end.text.strip().splitlines()[-1] for end in ended]  # what the first rank writes stands under its limit
        assert "CheckpointError" in last[1], last
        assert "File too large" in last[1], last
    with folder() as root:
        (root / "file").touch()
        ended = start(partial(_only, root / "file", case))
        for end in ended:
            assert end.status == 1
            assert "cannot be written" in end.text, end.text[-2000:]


CASES: Final[dict[str, Callable[[Rng], None]]] = {
    "killed": killed(Case({"checkpoint": OFTEN})),
    "killed in an accumulation window": killed(
        Case({"accumulate_grad_batches": 3, "checkpoint": ModelCheckpoint(every_n_steps=1)}), _EVENTS[:3]
    ),
    "killed in validation": killed(Case({"checkpoint": OFTEN, "val_check_interval": 3}), _VALIDATION),
    "killed, workers": killed(
        Case({"checkpoint": OFTEN}, workers=(0, 2, 2, 0), persistent=True, draws=lambda: torch.rand(())), kills=2
    ),
    "killed, saving in the background": killed(
        Case({"checkpoint": ModelCheckpoint(every_n_steps=1, background=True)}), kills=2
    ),
    "SIGTERM to one rank": signalled(signal.SIGTERM, 143),
    "SIGINT to one rank": signalled(signal.SIGINT, 130),
    "another number of ranks": other_size,
    "unequal lengths": unequal,
    "unequal shares": unequal_shares,
    "evaluation": evaluated,
    "not finite": not_finite,
    "two runs at once": two_at_once,
    "policies": policies,
    "disk full": disk_full,
}


def main() -> None:
    """Run each case, and print how it went."""
    parser = argparse.ArgumentParser()
    parser.add_argument("cases", nargs="*", metavar="CASE", choices=[*CASES, []])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.cases or CASES:
        begun, error = time.monotonic(), ""
        try:
            CASES[name](random.Random(f"{options.seed} {name}"))
        except Exception as raised:
            error = f"{type(raised).__name__}: {raised}"
        print(json.dumps({"case": name, "error": error, "seconds": round(time.monotonic() - begun, 1)}), flush=True)


if __name__ == "__main__":
    main()
