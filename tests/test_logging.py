"""What is recorded: names, weights, when, where it goes, and that recording never waits in between."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import lightdeco as ld
from lightdeco import metrics
from tests.models import QUIET, Net, batches


class Constant(Net):
    """Its loss and metric are what the batch says: the mean of x."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        return {"loss": self(batch[0]).sum() * 0 + batch[0].mean(), "twice": 2 * batch[0].mean(), "preds": batch[0]}

    @ld.validation_step
    def check(self, batch: Any) -> Any:
        return {"loss": batch[0].mean()}

    @ld.test_step
    def examine(self, batch: Any) -> Any:
        return batch[0].mean()


def valued(*pairs: tuple[float, int]) -> list[tuple[Tensor, Tensor]]:
    """Batches of `n` samples that are all equal to the value."""
    return [(torch.full((n, 4), float(value)), torch.zeros(n, dtype=torch.long)) for value, n in pairs]


def fit(data: Any, model: Any = None, **settings: Any) -> ld.Run:
    return ld.fit(model or Constant(), data, **(QUIET | {"max_epochs": 1} | settings))


def test_epoch_means_are_weighted_by_samples() -> None:
    """Batches of 256, 256 and 10 samples: the epoch's value is the mean of the whole set."""
    data = valued((1.0, 256), (2.0, 256), (30.0, 10))
    expected = (256 + 512 + 300) / 522
    run = fit((data, data))
    assert run.metrics["val/loss"] == pytest.approx(expected, rel=1e-7)
    assert run.metrics["train/loss"] == run.metrics["train/loss_epoch"] == pytest.approx(expected, rel=1e-7)
    assert run.metrics["train/twice"] == pytest.approx(2 * expected, rel=1e-7)
    assert "train/preds" not in run.metrics
    assert ld.test(Constant(), data, **QUIET) == {"test/loss": pytest.approx(expected, rel=1e-7)}


def test_records_come_every_n_steps_with_the_mean_since_the_last() -> None:
    """`train/x` at global_step 2 and 4 …, `train/x_epoch` once; stage, epoch, step and time in each record."""
    run = fit(valued((1, 1), (3, 1), (5, 1), (9, 3), (1, 1)), log_every_n_steps=2, max_epochs=2)
    steps = [(r["epoch"], r["step"], r["train/loss"]) for r in run.history if "train/loss" in r]
    assert steps == [(0, 2, 2.0), (0, 4, 8.0), (1, 6, 1.0), (1, 8, 4.0), (1, 10, 7.0)]
    epochs = [(r["epoch"], r["step"]) for r in run.history if "train/loss_epoch" in r]
    assert epochs == [(0, 5), (1, 10)]
    assert all(isinstance(r["time"], float) and r["stage"] == "train" for r in run.history)


def test_records_count_updates_under_accumulation() -> None:
    """log_every_n_steps counts global_step; each record has every micro-batch since the last."""
    run = fit(valued((1, 1), (2, 1), (3, 1), (4, 1)), accumulate_grad_batches=2, log_every_n_steps=1)
    assert [(r["step"], r["train/loss"]) for r in run.history if "train/loss" in r] == [(1, 1.5), (2, 3.5)]


def test_a_run_that_stops_inside_an_epoch_records_what_it_has() -> None:
    """Three steps with the default log_every_n_steps=50 still leave a record."""
    run = fit(valued((1, 1), (2, 1), (3, 1), (9, 1)), max_epochs=None, max_steps=3)
    assert run.metrics["train/loss"] == pytest.approx(2.0)
    assert run.history[-1]["step"] == 3


def test_metrics_jsonl_is_written_for_every_run(tmp_path: Path) -> None:
    """It is strict JSON, one record a line, equal to the history."""
    run = fit((valued((1, 2)), valued((2, 2))), root_dir=tmp_path, max_epochs=2)
    lines = (run.dir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == run.history
    assert run.dir == tmp_path / "Constant" / "version_0"


@dataclasses.dataclass
class Sample:
    name: str
    x: Tensor


class Pair(NamedTuple):
    name: str
    x: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: {"name": "a", "x": x},
        lambda x: Sample("a", x),
        lambda x: Pair("a", x),
        lambda x: {"deep": [("text", {"x": x})]},
    ],
)
def test_the_size_of_a_batch_is_the_first_dimension_of_its_first_tensor(wrap: Any) -> None:
    """In lists, dicts, dataclasses, named tuples and any nesting of them."""

    class Any_(Net):
        @ld.validation_step
        def check(self, batch: Any, batch_idx: int) -> Any:
            return {"loss": torch.tensor(float(batch_idx))}

    data = [wrap(torch.zeros(1, 4)), wrap(torch.zeros(3, 4))]
    assert ld.validate(Any_(), data, **QUIET)["val/loss"] == pytest.approx(0.75)


def test_a_batch_without_a_tensor_names_batch_size() -> None:
    """It is an error unless the step says how many samples there are."""

    class Text(Net):
        size: Any = None

        @ld.validation_step
        def check(self, batch: Any) -> Any:
            return {"loss": torch.tensor(float(len(batch)))} | ({"batch_size": len(batch)} if self.size else {})

    data = [["a", "b", "c"], ["d"]]
    with pytest.raises(ld.DataError, match="batch_size"):
        ld.validate(Text(), data, **QUIET)
    model = Text()
    model.size = True
    assert ld.validate(model, data, **QUIET)["val/loss"] == pytest.approx((9 + 1) / 4)


def test_log_keeps_the_name_and_works_anywhere_below_a_verb() -> None:
    """By step and by epoch in training, by epoch in evaluation, at once elsewhere; nothing outside of a run."""
    ld.log("nowhere", 1.0)

    def deep(value: float) -> None:
        ld.log("deep", value)

    class Logging(Constant):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            deep(float(batch[0].mean()))
            ld.log("only_step", 1, on_epoch=False)
            ld.log("only_epoch", 1, on_step=False)
            ld.log("count", 1, reduce="sum")
            ld.log("largest", batch[0].max(), reduce="max")
            return self(batch[0]).mean()

        @ld.validation_step
        def check(self, batch: Any) -> None:
            ld.log("my/val", batch[0].mean())

        @ld.on_validation_epoch_end
        def extra(self) -> None:
            ld.log_dict({"a": 1, "b": torch.tensor(2.0)})

        @ld.on_train_epoch_end
        def end(self) -> None:
            ld.log("end", 5.0)

        @ld.on_train_start
        def start(self) -> None:
            ld.log("start", 7.0)

    data = valued((1, 1), (5, 3))
    run = fit((data, data), Logging(), log_every_n_steps=2)
    start, step, val, epoch = run.history
    assert start["start"] == 7
    names = {k: v for k, v in step.items() if k not in ("time", "train/loss")}
    assert names == {"stage": "train", "epoch": 0, "step": 2, "deep": 4, "only_step": 1, "count": 2, "largest": 5}
    assert {k: val[k] for k in ("my/val", "a", "b")} == {"my/val": 4, "a": 1, "b": 2}
    expected = {"deep_epoch": 4, "only_epoch": 1, "count_epoch": 2, "largest_epoch": 5, "end": 5}
    assert {k: epoch[k] for k in expected} == expected
    assert ld.validate(Logging(), data, **QUIET) == {"my/val": 4, "a": 1, "b": 2}


@pytest.mark.parametrize(
    ("name", "value", "options", "message"),
    [
        ("x", torch.zeros(3), {}, r"shape \(3,\)"),
        ("x", "text", {}, "a str"),
        ("", 1, {}, "name ''"),
        ("step", 1, {}, "name 'step'"),
        ("x", 1, {"reduce": "men"}, "did you mean 'mean'"),
        ("x", 1, {"on_step": False, "on_epoch": False}, "would record nothing"),
        ("x", 1, {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_what_cannot_be_logged_is_refused(name: str, value: Any, options: dict[str, Any], message: str) -> None:
    """StepError says what was logged and what is allowed."""

    class Wrong(Constant):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            ld.log(name, value, **options)
            return self(batch[0]).mean()

    with pytest.raises(ld.StepError, match=message):
        fit(valued((1, 1)), Wrong())


def test_several_loaders_have_metrics_of_their_own() -> None:
    """`val/<name>/loss` by the names of a dict, by numbers for a list."""
    one, two = valued((1, 1)), valued((2, 3))
    run = fit({"train": one, "val": {"clean": one, "noisy": two}})
    assert (run.metrics["val/clean/loss"], run.metrics["val/noisy/loss"]) == (1, 2)
    loaders = [torch.utils.data.DataLoader(TensorDataset(*data[0]), batch_size=2) for data in (one, two)]
    assert ld.validate(Constant(), loaders, **QUIET) == {"val/0/loss": 1, "val/1/loss": 2}


def test_torchmetrics_objects_are_computed_and_reset_at_the_end_of_the_epoch() -> None:
    """Over all samples, in training and validation, in a returned dict and through ld.log."""
    computed: list[float] = []

    class Accuracy(Net):
        def __init__(self) -> None:
            super().__init__(dropout=0.0, lr=0.0)
            self.train_acc, self.val_acc = (
                MulticlassAccuracy(3, average="micro"),
                MulticlassAccuracy(3, average="micro"),
            )

        @ld.training_step
        def step(self, batch: Any) -> Any:
            x, y = batch
            logits = self(x)
            self.train_acc.update(logits, y)
            return {"loss": F.cross_entropy(logits, y), "acc": self.train_acc}

        @ld.validation_step
        def check(self, batch: Any) -> None:
            self.val_acc.update(self(batch[0]), batch[1])
            ld.log("val/acc", self.val_acc)

    data = [*batches(3), (batches(1)[0][0][:3], batches(1)[0][1][:3])]
    model = Accuracy()
    run = fit((data, data), model, max_epochs=2)
    x, y = (torch.cat([b[i] for b in data]) for i in (0, 1))
    expected = float((model(x).argmax(1) == y).float().mean())
    computed = [r[k] for r in run.history for k in ("train/acc", "val/acc") if k in r]
    assert computed == [pytest.approx(expected)] * 4
    assert model.val_acc.update_count == 0


def test_nothing_waits_for_the_device_on_a_step_that_records_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No .item(), .tolist(), .cpu(), float(), int() or bool() of a tensor between records.

    The CPU is taken for a device that must be waited for, as a GPU is.
    """
    calls: list[str] = []
    monkeypatch.setattr(metrics, "waits", lambda device: True)
    monkeypatch.setattr(metrics, "_item", lambda tensor: calls.append("_item"))
    for name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "numpy"):
        real = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _real: Any = real, _name: str = name) -> Any:
            calls.append(_name)
            return _real(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    at_step: dict[int, int] = {}

    class Counting(Net):
        @ld.training_step
        def step(self, batch: Any) -> Any:
            loss = F.cross_entropy(self(batch[0]), batch[1])
            ld.log("more", loss)
            return {"loss": loss, "acc": loss * 2}

        @ld.configure_optimizers
        def adam(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

        @ld.on_train_batch_start
        def look(self, run: ld.Run) -> None:
            at_step[run.global_step] = len(calls)

    fit(batches(70), Counting(), log_every_n_steps=60, on_nan="ignore", gradient_clip_val=1.0)
    assert at_step[59] == at_step[1]
    assert at_step[61] > at_step[60 - 1]
    assert at_step[69] == at_step[61]


def test_values_changed_in_place_afterwards_were_logged_as_they_were() -> None:
    """What is logged is copied: a buffer or parameter that changes later does not change the record."""

    class Buffered(Constant):
        def __init__(self) -> None:
            super().__init__()
            self.counter = torch.zeros(())

        @ld.training_step
        def step(self, batch: Any) -> Any:
            self.counter += 1
            return {"loss": self(batch[0]).mean(), "counter": self.counter}

    run = fit(valued((1, 1), (1, 1), (1, 1)), Buffered())
    assert run.metrics["train/counter"] == 2


def test_infinite_values_keep_the_file_strict_json(tmp_path: Path) -> None:
    """NaN and infinities are recorded, and every line stays valid for strict readers."""

    class Infinite(Constant):
        @ld.validation_step
        def check(self, batch: Any) -> Any:
            return {"inf": math.inf, "nan": math.nan}

    run = fit((valued((1, 1)), valued((1, 1))), Infinite(), root_dir=tmp_path)

    def refuse(name: str) -> None:
        raise AssertionError(name)

    for line in (run.dir / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert run.metrics["val/inf"] == math.inf


class Failing:
    """A logger whose every call fails."""

    def __init__(self) -> None:
        self.calls = 0

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.calls += 1
        raise OSError("no space")


def test_a_logger_that_fails_is_one_warning(tmp_path: Path) -> None:
    """Training goes on and ends as without it; the other logger and metrics.jsonl have everything."""
    logger = Failing()
    with pytest.warns(ld.LightdecoWarning, match=r"failing.*no space") as caught:
        run = fit(valued((1, 1)), max_epochs=3, logger=[logger, "csv"], root_dir=tmp_path)
    assert len([w for w in caught if issubclass(w.category, ld.LightdecoWarning)]) == 1
    assert logger.calls == len(run.history) == 3
    assert len((run.dir / "metrics.csv").read_text().splitlines()) == 4


def test_a_logger_that_does_not_exist_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    """LoggerError with the nearest name."""
    with pytest.raises(ld.LoggerError, match="did you mean 'tensorboard'"):
        fit(valued((1, 1)), logger="tensorbord", root_dir=tmp_path)


def test_hyperparameters_reach_run_and_loggers_with_secrets_masked(tmp_path: Path) -> None:
    """From the mixin and from the setting; what looks like a secret never leaves."""
    seen: dict[str, Any] = {}

    class Keeping:
        def log_hparams(self, hparams: Any) -> None:
            seen.update(hparams)

        def log_metrics(self, metrics: Any, step: int) -> None:
            pass

    class Configured(ld.HparamsMixin, Constant):
        def __init__(self, width: int = 8, api_key: str = "secret-1") -> None:
            super().__init__()
            self.save_hyperparameters()

    run = fit(valued((1, 1)), Configured(), hparams={"note": "x"}, logger=Keeping(), root_dir=tmp_path)
    assert seen == run.hparams
    assert seen["width"] == 8
    assert seen["note"] == "x"
    assert "secret" not in str(seen["api_key"])
