"""`strategy="fsdp"` on two processes of the CPU, by torch's `fully_shard`, as on GPUs."""

import errno
import hashlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

import lightdeco as ld
from lightdeco import scaling
from lightdeco.checkpoint import files, verify
from lightdeco.checkpoint.describe import describe
from lightdeco.dtensor import is_sharded, local, whole
from tests.distributed import ranks
from tests.distributed.ranks import together
from tests.distributed.test_fit import Closing, Manual, Net, Scheduled, Thawing, Two, Weighted, loader
from tests.models import QUIET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")


class Block(nn.Module):
    """A layer that is gathered for itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.linear(self.norm(x)))


class Deep(Net):
    """Three blocks before the classifier, whose step calls them one by one; a buffer is counted up in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8) for _ in range(3)])
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.body(x) * self.scale
        return logits

    def loss(self, batch: Any) -> Tensor:
        if self.training:
            self.steps += 1
        return F.cross_entropy(self(batch[0]), batch[1])


class Both(Deep):
    """Calls itself, and a layer of its own beside it."""

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self(batch[0]) + 0.1 * self.body(batch[0]), batch[1])


class Adam(Deep):
    """With a state for each parameter."""

    @ld.configure_optimizers
    def sgd(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.02)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class Tied(Deep):
    """A layer of a block is used outside of it too."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8, bias=False)
        self.first.weight = self.blocks[0].linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.first(x))


class Sharp(Adam):
    """Looks at the gradients a little uphill (SAM), by a closure."""

    @ld.optimizer_step
    def sam(self, optimizer: torch.optim.Optimizer, closure: Callable[[], Tensor]) -> None:
        pairs = [(p, 0.05 * p.grad.sign()) for group in optimizer.param_groups for p in group["params"]]
        with torch.no_grad():
            for p, up in pairs:
                p.add_(up)
        closure()
        with torch.no_grad():
            for p, up in pairs:
                p.sub_(up)
        optimizer.step()


class Encoder(nn.Module):
    """Called by another method than `forward`."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def encode(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


class Encoding(Net):
    """Its modules have no forward, so that they are no units."""

    def __init__(self) -> None:
        super().__init__()
        self.encoders = nn.ModuleList([Encoder(), Encoder()])

    def loss(self, batch: Any) -> Tensor:
        x = batch[0]
        for encoder in self.encoders:
            x = encoder.encode(x)
        return F.cross_entropy(self.body(x), batch[1])


class Poor(Deep):
    """The loss of the third batch of rank 1 is not a number."""

    @ld.training_step
    def step(self, batch: Any, batch_idx: int, run: ld.Run) -> Any:
        bad = run.rank == run.world_size - 1 and batch_idx == 2
        return self.loss(batch) * (float("nan") if bad else 1.0)


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (Net, {}),
    "blocks": (Deep, {}),
    "both": (Both, {}),
    "adam": (Adam, {}),
    "weights": (Weighted, {}),
    "accumulation": (Deep, {"accumulate_grad_batches": 4}),
    "weights and accumulation": (Weighted, {"accumulate_grad_batches": {0: 2, 1: 3}}),
    "scheduler and clipping": (Scheduled, {"gradient_clip_val": 0.3}),
    "values": (Adam, {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"}),
    "thawing": (Thawing, {}),
    "tied": (Tied, {"checkpoint": True}),
    "closure": (Sharp, {}),
    "another method": (Encoding, {}),
    "compiled": (Deep, {"compile": True}),
    "skipped": (Poor, {"on_nan": "skip"}),
    "bf16": (Deep, {"precision": "bf16-mixed"}),
    "bf16-true": (Deep, {"precision": "bf16-true"}),
    "float64": (Deep, {"precision": "64-true"}),
    "gradients": (Deep, {"log_gradients": True, "log_every_n_steps": 1}),
}


def fit(kind: type[nn.Module], **settings: Any) -> tuple[Any, ld.Run]:
    """A model after two epochs, and the run."""
    model = kind()
    settings = {"max_epochs": 2, "seed": 5, "checkpoint": False} | settings
    return model, ld.fit(model, (loader(8, shuffle=True), loader(5, 33)), **QUIET, **settings)


def weights(model: nn.Module) -> dict[str, Any]:
    """Each tensor of the model, whole, as lists."""
    return {name: whole(value).double().tolist() for name, value in model.state_dict().items()}


def both() -> dict[str, Any]:
    """Of each case, by both strategies: weights, metrics, records of the training, updates."""
    torch.distributed.init_process_group("gloo")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's own compiler
    found: dict[str, Any] = {}
    for name, (kind, settings) in CASES.items():
        found[name] = []
        for strategy in ("ddp", "fsdp"):
            model, run = fit(kind, strategy=strategy, **settings)
            records = [{k: v for k, v in record.items() if k != "time"} for record in run.history]
            found[name].append((weights(model), run.metrics, records, run.global_step, run.progress.skipped_updates))
    return found


@pytest.fixture(scope="module")
def compared() -> Any:
    """`both`, on two processes."""
    return together(both, patience=120)


@pytest.mark.parametrize("name", CASES)
def test_a_cut_model_is_trained_as_a_whole_one(compared: Any, name: str) -> None:
    """The same weights, buffers and metrics on both processes as with DDP; equal but for the order of sums."""
    zero, one = (found[name] for found in compared)
    assert zero[1][0] == one[1][0]
    (expected, metrics, history, *counts), (found, others, records, *numbers) = zero
    half = name.startswith("bf16")
    assert counts == numbers
    assert [list(record) for record in history] == [list(record) for record in records]
    for key, value in metrics.items():
        assert others[key] == pytest.approx(value, rel=3e-2 if half else 1e-5), key
    for before, after in zip(history, records, strict=True):
        for key in before.keys() - {"stage"}:
            assert after[key] == pytest.approx(before[key], rel=3e-2 if half else 1e-4), key
    for key, value in expected.items():
        tolerance = {"rtol": 5e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), **tolerance)


def test_the_case_with_bad_losses_left_some_out(compared: Any) -> None:
    """One update of each epoch, on both processes and with both strategies."""
    assert [result[-1] for found in compared for result in found["skipped"]] == [2, 2, 2, 2]


class Row(Net):
    """The gradient of one row alone overflows in the third batch; that row is a part of rank 1."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 3)  # type: ignore[assignment]

    @ld.training_step
    def step(self, batch: Any, batch_idx: int) -> Any:
        logits = self.body(batch[0])
        if batch_idx == 2:
            logits.register_hook(lambda grad: grad * torch.tensor([1.0, 1.0, float("inf")]))
        return F.cross_entropy(logits, batch[1])


def scaled() -> Any:
    """By both strategies, with a real scaler (which works on the CPU too): weights, updates, updates left out."""
    scaling.wanted = lambda precision: True
    torch.distributed.init_process_group("gloo")
    found = []
    for strategy in ("ddp", "fsdp"):
        torch.manual_seed(1)
        model = Row()
        run = ld.fit(model, loader(8), max_epochs=1, strategy=strategy, checkpoint=False, **QUIET)
        found.append([weights(model), run.global_step, run.progress.skipped_updates])
    return found


def test_what_overflows_in_one_part_is_left_out_by_all() -> None:
    """fp16's scaler agrees among the processes, as it does with gradients that all have."""
    zero, one = together(scaled)
    assert zero == one
    assert zero[0] == zero[1]
    assert zero[1][1:] == [5, 1]


# ---- what each process holds -----------------------------------------------------------------------------------------


def held() -> dict[str, Any]:
    """How many numbers of each kind this process holds after training, of how many; what the model is called."""
    model = Adam()
    optimizers: list[Any] = []

    class Watch:
        @ld.on_train_batch_end
        def end(self, run: ld.Run) -> None:
            optimizers[:] = [run.optims[""].optimizer]

    ld.fit(model, loader(8), max_epochs=1, strategy="fsdp", callbacks=Watch(), checkpoint=False, **QUIET)
    states = [value for state in optimizers[0].state.values() for value in state.values() if value.dim()]
    parameters = list(model.parameters())
    return {
        "cut": all(is_sharded(p) for p in (*parameters, *states)),
        "parameters": [sum(local(p).numel() for p in parameters), sum(p.numel() for p in parameters)],
        "states": [sum(local(p).numel() for p in states), sum(p.numel() for p in states)],
        "units": [type(block).__mro__[1].__name__ for block in (*model.blocks, model, model.body)],
        "name": type(model).__name__,
        "own": [name for name in vars(model) if "lightdeco" in name],
    }


def test_each_process_holds_its_part() -> None:
    """Parameters and the optimizer's state; blocks are units; nothing of the run is left in the model."""
    zero, one = together(held)
    for found in (zero, one):
        assert found["cut"]
        assert found["units"] == ["FSDPModule"] * 4 + ["Module"]
        assert (found["name"], found["own"]) == ("Adam", [])
    for what in ("parameters", "states"):
        whole_of_it = zero[what][1]
        assert zero[what][0] + one[what][0] == whole_of_it
        assert 0.3 < zero[what][0] / whole_of_it < 0.7
    assert zero["states"][1] == 2 * zero["parameters"][1]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def digest(folder: Path) -> dict[str, str]:
    """The hash of each file of a checkpoint that holds nothing of the time."""
    hashed = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*.safetensors")}
    assert hashed
    return hashed


def run_to(strategy: Any, root: Path, steps: int, **settings: Any) -> Any:
    """Train `Adam` to so many updates, saving every second one; the whole weights and the path of the last one."""

    def work() -> Any:
        model = Adam()
        run = ld.fit(
            model,
            (loader(8, shuffle=True), loader(5, 33)),
            max_epochs=3,
            max_steps=steps,
            seed=7,
            strategy=strategy,
            name="run",
            root_dir=root,
            resume="auto",
            checkpoint=ld.ModelCheckpoint(monitor="val/loss", save_top_k=2, every_n_steps=2),
            **QUIET,
            **settings,
        )
        values = weights(model) if strategy == "fsdp" or run.is_main else None
        return values, str(run.last_checkpoint), run.metrics, run.history

    return work


def without_time(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The records of a run, less what differs each time."""
    return [{key: value for key, value in record.items() if key != "time"} for record in history]


@pytest.mark.parametrize("stop", [2, 7, 13])  # 6 updates an epoch: within the first, the second and the third
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, stop: int) -> None:
    """Stopped at a step and resumed, it ends with the very files of one that was not."""
    (expected, path, metrics, history), _ = together(run_to("fsdp", tmp_path / "one", 15))
    together(run_to("fsdp", tmp_path / "two", stop))
    (found, again, others, records), (_, *_) = together(run_to("fsdp", tmp_path / "two", 15))
    assert found == expected
    assert digest(Path(path)) == digest(Path(again))
    assert others == metrics
    assert without_time(records) == without_time(history)


def test_a_checkpoint_is_dealt_out_and_needs_no_processes_to_be_read(tmp_path: Path) -> None:
    """A file for each process, whole tensors, an index as Hugging Face has it; `ld.load_weights` and tools read it."""
    (expected, path, *_), _ = together(run_to("fsdp", tmp_path, 5))
    folder = Path(path)
    names = {p.name for p in folder.iterdir()}
    parts = {f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)}
    others = {"model.safetensors.index.json", "optimizer.safetensors", "state.safetensors", "state.json"}
    assert names == parts | others | {"manifest.json"}
    tensors = [load_file(folder / f"model-0000{i}-of-00002.safetensors") for i in (1, 2)]
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert {name: f"model-0000{i + 1}-of-00002.safetensors" for i in (0, 1) for name in tensors[i]} == index[
        "weight_map"
    ]
    sizes = [sum(t.numel() for t in each.values()) for each in tensors]
    assert 0.5 < sizes[0] / sizes[1] < 2
    model = Adam()
    ld.load_weights(model, folder)
    assert weights(model) == expected
    assert verify(folder)
    text, valid = describe(folder)
    assert valid
    assert "model-00002-of-00002.safetensors" in text
    assert ld.validate(Adam(), loader(5, 33), weights=folder, **QUIET)["val/loss"] > 0
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ld.CheckpointError, match=r"model-00002-of-00002\.safetensors: is missing"):
        ld.load_weights(model, folder)


@pytest.mark.filterwarnings("ignore:the run had:lightdeco.LightdecoWarning")
@pytest.mark.parametrize(("before", "after"), [(("fsdp", 2), ("ddp", 2)), (("ddp", 2), ("fsdp", 2))])
def test_a_run_goes_on_with_another_strategy(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    """Cut or not: the same weights as of a run that never changed, to float tolerance."""
    (expected, *_), *_ = together(run_to("ddp", tmp_path / "one", 12), 2)
    together(run_to(before[0], tmp_path / "two", 5), before[1])
    (found, *_), *_ = together(run_to(after[0], tmp_path / "two", 12), after[1])
    for key, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, size: int) -> None:
    """Three processes, or one with the whole model: at the checkpoint each begins with the same weights and state."""
    (before, *_), _ = together(run_to("fsdp", tmp_path, 6))
    strategy = "fsdp" if size > 1 else "ddp"
    ended = together(lambda: warned(run_to(strategy, tmp_path, 6)), size)
    assert [each[0] for each in ended if each[0] is not None] == [before] * (size if size > 1 else 1)
    together(lambda: warned(run_to(strategy, tmp_path, 9)), size)


def warned(work: Any) -> Any:
    """What `work` returns; it warns that the number of processes is another."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ld.LightdecoWarning)
        return work()


# ---- evaluation ------------------------------------------------------------------------------------------------------


class Counting(Deep):
    """Counts what it evaluates, in torchmetrics objects and in events."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy, self.mean = MulticlassAccuracy(3, average="micro"), MeanMetric()
        self.seen: list[int] = []

    @ld.validation_step
    @ld.test_step
    def check(self, batch: Any) -> dict[str, Any]:
        x, y = batch
        logits = self(x)
        self.accuracy(logits, y)
        self.mean.update(x[:, 0])
        ld.log("extra", x.mean())
        return {"loss": F.cross_entropy(logits, y), "accuracy": self.accuracy, "mean": self.mean}

    @ld.on_validation_batch_end
    def note(self, batch: Any) -> None:
        self.seen.append(len(batch[0]))

    @ld.predict_step
    def infer(self, batch: Any) -> Tensor:
        return self(batch[0])


def evaluate(count: int) -> Any:
    """Work for a rank: the metrics of `count` samples by all three verbs, before and after a training."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        model = Counting()
        options: dict[str, Any] = {"strategy": "fsdp", **QUIET}
        before = ld.validate(model, loader(4, count), **options)
        seen = list(model.seen)
        predicted = torch.cat(list(ld.predict(model, loader(4, count), strategy="fsdp", progress_bar=False)))
        ld.fit(model, (loader(8), loader(4, count)), max_epochs=1, checkpoint=False, **options)
        after = ld.test(model, loader(4, count), **options)
        return before, seen, predicted.tolist(), after, ld.validate(model, loader(4, count), **options)

    return work


@pytest.mark.parametrize(("size", "count"), [(2, 4), (2, 21), (3, 21)])
def test_each_sample_is_counted_once(size: int, count: int) -> None:
    """With any number of batches on the processes, none too: metrics, events and predictions as on one process."""
    ended = together(evaluate(count), size)
    model = Counting()
    expected = ld.validate(model, loader(4, count), **QUIET)
    for before, _, predicted, after, again in ended:
        assert before == pytest.approx(expected, rel=1e-6)
        torch.testing.assert_close(
            torch.tensor(predicted), torch.cat(list(ld.predict(model, loader(4, count), progress_bar=False)))
        )
        assert {k.partition("/")[2]: v for k, v in after.items()} == pytest.approx(
            {k.partition("/")[2]: v for k, v in again.items()}, rel=1e-6
        )
    assert sorted(n for each in ended for n in each[1]) == sorted(len(x) for x, _ in loader(4, count))


# ---- the meta device -------------------------------------------------------------------------------------------------


class Built(Net):
    """Builds its layers on the meta device."""

    def __init__(self) -> None:
        super().__init__()
        del self.body

    @ld.configure_model
    def build(self) -> None:
        with torch.device("meta"):
            self.blocks = nn.ModuleList([Block(8) for _ in range(2)])
            self.idle = nn.BatchNorm1d(8, affine=False)  # buffers alone
            self.body = nn.Sequential(*self.blocks, nn.Linear(8, 3))


def built() -> Any:
    """The weights that `Built` begins with, and those after an epoch."""
    torch.distributed.init_process_group("gloo")
    found = []
    for steps in (1, 6):
        model = Built()
        ld.fit(model, loader(8), max_steps=steps, seed=2, strategy="fsdp", checkpoint=False, **QUIET)
        found.append(weights(model))
    return found


def test_layers_on_the_meta_device_begin_with_the_same_weights_everywhere(tmp_path: Path) -> None:
    """On two processes in parts, and on one: the same values, by `reset_parameters` and the seed of the run."""
    zero, one = together(built)
    assert zero == one
    for steps, found in zip((1, 6), zero, strict=True):
        model = Built()
        ld.fit(model, loader(16), max_steps=steps, seed=2, checkpoint=False, **QUIET)
        assert model.idle.running_var.tolist() == [1.0] * 8
        for name, value in model.state_dict().items():
            there = torch.tensor(found[name], dtype=value.dtype)
            torch.testing.assert_close(there, value, rtol=1e-4, atol=1e-5)
    model = Built()
    run = ld.fit(model, loader(16), max_steps=2, seed=2, devices=2, strategy="fsdp", **QUIET)
    assert run.last_checkpoint is not None
    assert not any(p.is_meta for p in model.parameters())
    assert ld.validate(model, loader(16), **QUIET)["val/loss"] > 0


def test_a_layer_on_meta_that_cannot_fill_itself_is_named() -> None:
    """On one process too."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    class WithOdd(Net):
        @ld.configure_model
        def build(self) -> None:
            with torch.device("meta"):
                self.odd = Odd()

    with pytest.raises(ld.MarkError, match=r"odd \(Odd\) was built on the meta device and has no reset_parameters"):
        ld.fit(WithOdd(), loader(8), max_steps=1, **QUIET)


# ---- the plugin, and what goes with it -------------------------------------------------------------------------------


def plugged(name: str) -> Any:
    """Work for a rank: a training with a plugin; weights, units, dtypes seen in a block, whether gradients are here."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        seen: list[str] = []

        class Watched(Deep):
            @ld.on_fit_start
            def listen(self) -> None:
                self.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(str(output.dtype)))

        model = Watched()
        ld.fit(model, loader(8), max_epochs=1, seed=5, strategy=PLUGINS[name](), checkpoint=False, **QUIET)
        units = [key for key, module in model.named_modules() if type(module).__mro__[1].__name__ == "FSDPModule"]
        return weights(model), units, sorted(set(seen))

    return work


def plugin(**options: Any) -> Any:
    """accelerate's plugin of the second FSDP."""
    return FullyShardedDataParallelPlugin(fsdp_version=2, **options)


HALF: Any = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
PLUGINS: dict[str, Any] = {
    "default": plugin,
    "kept": lambda: plugin(reshard_after_forward=False),
    "by class": lambda: plugin(auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Linear"]),
    "by size": lambda: plugin(auto_wrap_policy="size_based_wrap", min_num_params=100),
    "offloaded": lambda: plugin(cpu_offload=True),
    "half": lambda: plugin(mixed_precision_policy=HALF),
}
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
UNITS = {
    "by class": [f"{block}.linear" for block in BLOCKS] + ["body.0", "body.2"],
    "by size": ["body", "body.0"],
}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_of_accelerate_is_honoured(name: str) -> None:
    """Units, offload, what is kept after forward and precision; the weights are those of a whole model."""
    (found, units, dtypes), other = together(plugged(name))
    assert other[0] == found
    assert sorted(units) == sorted(["", *UNITS.get(name, BLOCKS)])
    assert dtypes == ["torch.bfloat16" if name == "half" else "torch.float32"]
    model = Deep()
    ld.fit(model, loader(16), max_epochs=1, seed=5, checkpoint=False, **QUIET)
    tolerance = {"rtol": 5e-2, "atol": 2e-2} if name == "half" else {"rtol": 1e-4, "atol": 1e-6}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(found[key]), value, **tolerance)


class Scalar(Net):
    """With a parameter that has no rows."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(()))


class Mixed(Net):
    """With a layer of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.double = nn.Linear(2, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (Two, {}, ld.LaunchError, "Two.second .* is one of several training steps"),
        (Manual, {}, ld.LaunchError, "Manual.step .* is one of a manual training step"),
        (Net, {"oom": "micro"}, ld.SettingsError, "does not go with oom='micro'"),
        (Net, {"strategy": plugin(ignored_modules="body")}, ld.LaunchError, r"Plugin\(ignored_modules=…\) is not"),
        (Net, {"strategy": plugin(activation_checkpointing=True)}, ld.LaunchError, r"torch\.utils\.checkpoint"),
        (Net, {"strategy": plugin(param_init_fn=print)}, ld.LaunchError, "reset_parameters is called"),
        (Net, {"devices": 1}, ld.LaunchError, "this run has one: give devices=2"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_starts(
    kind: type[nn.Module], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    """With the reason, and what to do."""
    with pytest.raises(error, match=message):
        ld.fit(kind(), loader(8), max_epochs=1, **{"devices": 2, "strategy": "fsdp", **settings}, **QUIET)


def test_the_first_fsdp_is_refused() -> None:
    """torch has replaced it."""
    old = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ld.LaunchError, match="give fsdp_version=2"):
        ld.fit(Net(), loader(8), max_epochs=1, devices=2, strategy=old, **QUIET)


def test_what_the_launcher_is_configured_for_is_not_another_strategy(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate launch --use_fsdp`: an error without strategy="fsdp", its variables with it."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ld.LaunchError, match=r"configured for fsdp, .* give strategy='fsdp'"):
        ld.fit(Net(), loader(8), max_epochs=1, **QUIET)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP")
    monkeypatch.setenv("FSDP_MIN_NUM_PARAMS", "100")

    def work() -> Any:
        model = Deep()
        ld.fit(model, loader(8), max_steps=1, strategy="fsdp", checkpoint=False, **QUIET)
        return [name for name, module in model.named_modules() if type(module).__mro__[1].__name__ == "FSDPModule"]

    assert together(work) == [["", "body", "body.0"]] * 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [("fsdp_plugin", plugin(), "strategy=plugin"), ("parallelism_config", object(), "give strategy='ddp' or 'fsdp'")],
)
def test_configure_accelerator_cannot_choose_another_strategy(name: str, value: Any, message: str) -> None:
    """accelerate would run it behind the settings, or, on a CPU, not run it."""

    class Configured(Net):
        @ld.configure_accelerator
        def arguments(self) -> dict[str, Any]:
            return {name: value}

    with pytest.raises(ld.MarkError, match=f"returned '{name}'; .*{message}"):
        ld.fit(Configured(), loader(8), max_epochs=1, **QUIET)


def refused() -> Any:
    """What is found out when the model is there."""
    torch.distributed.init_process_group("gloo")
    found = []
    for kind in (Scalar, Closing, Mixed):
        with pytest.raises(ld.LaunchError) as error:
            ld.fit(kind(), loader(8), max_epochs=1, strategy="fsdp", **QUIET)
        found.append(str(error.value))
    model = Net()
    ld.fit(model, loader(8), max_epochs=1, strategy="fsdp", checkpoint=False, **QUIET)
    with pytest.raises(ld.LaunchError) as error:
        ld.validate(model, loader(8), **QUIET)
    return [*found, str(error.value)]


def test_models_and_optimizers_that_cannot_be_cut_are_named() -> None:
    """On every process."""
    zero, one = together(refused)
    assert zero == one
    scalar, closing, mixed, again = zero
    assert "one dtype for all trained parameters of Mixed: 'body.0.weight' is torch.float32" in mixed
    assert "the parameter 'temperature' of Scalar, which has no dimension" in scalar
    assert "cannot run LBFGS" in closing
    assert "Net lies in parts on several processes" in again


def looked_at() -> Any:
    """A run with all that looks at a model: summary with an example, gradients, early stopping, learning rates."""
    torch.distributed.init_process_group("gloo")
    model = Deep()
    model.example_input = torch.zeros(2, 8)
    stopping = ld.EarlyStopping("val/loss", patience=1, min_delta=10.0)
    callbacks = [stopping, ld.LearningRateMonitor(), ld.ThroughputMonitor()]
    run = ld.fit(
        model,
        (loader(8), loader(5, 33)),
        max_epochs=9,
        strategy="fsdp",
        callbacks=callbacks,
        logger=True,
        progress_bar=False,
        log_gradients=True,
        profiler="simple",
        log_every_n_steps=2,
    )
    reference = Deep()
    ld.load_weights(reference, run.best_checkpoint)
    return [run.stop_reason, run.epoch, str(run.best_checkpoint), weights(reference), weights(model)]


def test_callbacks_and_summary_see_a_cut_model(own_directory: Path) -> None:
    """They work, on all processes alike."""
    zero, one = together(looked_at)
    assert zero == one
    assert zero[0].startswith("early stopping: val/loss")
    assert zero[1] == 2


# ---- faults ----------------------------------------------------------------------------------------------------------


def interrupted(root: Path, who: int, act: Callable[[], None], where: str, count: int, strategy: Any = "fsdp") -> Any:
    """`run_to` the end, in which rank `who` does something at the `count`-th call of a function of the sinks."""
    plain = getattr(files.Sink, where)
    calls = [0]

    def call(self: Any, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] == count and os.environ["RANK"] == str(who):
            act()
        return plain(self, *given)

    def work() -> Any:
        setattr(files.Sink, where, call)
        return run_to(strategy, root, 8)()

    return work


@pytest.mark.parametrize(("who", "count"), [(0, 1), (0, 14), (1, 3), (1, 4)])
def test_a_run_killed_while_it_saves_goes_on(tmp_path: Path, who: int, count: int) -> None:
    """All processes die while one writes its part: the run ends with the weights of one that was not killed."""
    (expected, path, *_), _ = together(run_to("fsdp", tmp_path / "one", 8))
    ended = ranks.start(interrupted(tmp_path / "two", who, ranks.die_together, "finish", count))
    assert [each.status for each in ended] == [-signal.SIGKILL] * 2
    (found, again, *_), _ = together(run_to("fsdp", tmp_path / "two", 8))
    assert found == expected
    assert digest(Path(path)) == digest(Path(again))
    assert not [p for p in Path(again).parent.iterdir() if p.name.startswith(".")]


def full() -> None:
    """As the system says it."""
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("who", [0, 1])
def test_a_part_that_cannot_be_written_is_tried_again(tmp_path: Path, who: int) -> None:
    """One warning, on rank 0, then the next checkpoint is there; nothing half written stays."""

    def work() -> Any:
        run = interrupted(tmp_path, who, full, "write", 3)
        if os.environ["RANK"] != "0":
            return run()
        with pytest.warns(ld.LightdecoWarning, match="could not be saved, training goes on.*No space left"):
            return run()

    (expected, *_), _ = together(run_to("fsdp", tmp_path.with_name("other"), 8))
    (found, path, *_), other = together(work)
    assert found == other[0] == expected
    assert verify(Path(path))
    assert not [p for p in Path(path).parent.iterdir() if p.name.startswith(".")]


def test_sigterm_to_one_process_saves_and_ends_both(tmp_path: Path) -> None:
    """At the same step, with status 143; the run goes on bit for bit."""
    (expected, *_), _ = together(run_to("fsdp", tmp_path / "one", 15))

    def work() -> Any:
        class Told:
            @ld.on_train_batch_end
            def end(self, run: ld.Run) -> None:
                if run.rank == 1 and run.global_step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)

        return run_to("fsdp", tmp_path / "two", 15, callbacks=Told())()

    assert [each.status for each in ranks.start(work)] == [143, 143]
    (found, *_), _ = together(run_to("fsdp", tmp_path / "two", 15))
    assert found == expected


class Failing(Deep):
    """Rank 1 raises in its fourth step."""

    @ld.training_step
    def step(self, batch: Any, batch_idx: int, run: ld.Run) -> Any:
        if run.rank == 1 and batch_idx == 3:
            raise ValueError("a fault of the user's")
        return self.loss(batch)


def test_what_one_process_raises_reaches_the_caller(own_directory: Path) -> None:
    """From processes that were started, in a few seconds, and the model is as it was."""
    model = Failing()
    before = weights(model)
    with pytest.raises(ValueError, match="a fault of the user's"):
        ld.fit(model, loader(8), max_epochs=1, devices=2, strategy="fsdp", **QUIET)
    assert weights(model) == before


class Halting(Deep):
    """Raises in the third backward, as long as it is `bad`."""

    bad = True

    @ld.training_step
    def step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        if batch_idx == 2 and self.bad:
            self.seen.register_hook(self.halt)
        return loss

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.blocks[0](x)
        logits: Tensor = self.body(self.blocks[1](self.seen)) * self.scale
        return logits

    def halt(self, grad: Tensor) -> None:
        raise ValueError("half-way")


def halted() -> Any:
    """A run that ends half-way in a backward, and one after it with the same model."""
    torch.distributed.init_process_group("gloo")
    model = Halting()
    with pytest.raises(ValueError, match="half-way"):
        ld.fit(model, loader(8), max_epochs=1, strategy="fsdp", checkpoint=False, **QUIET)
    model.bad = False
    run = ld.fit(model, loader(8), max_epochs=1, strategy="fsdp", checkpoint=False, **QUIET)
    return run.global_step, weights(model)


def test_a_model_can_be_trained_again_after_an_error() -> None:
    """In the same processes."""
    zero, one = together(halted)
    assert zero == one
    assert zero[0] == 6


def test_started_processes_bring_the_weights_back(own_directory: Path) -> None:
    """The caller's model is whole and trained; validation and prediction start processes as well."""
    model, other = Adam(), Adam()
    data = (loader(8, shuffle=True), loader(5, 33))
    run = ld.fit(model, data, max_epochs=2, seed=3, devices=2, strategy="fsdp", **QUIET)
    one = ld.fit(other, (loader(16, shuffle=True), loader(5, 33)), max_epochs=2, seed=3, checkpoint=False, **QUIET)
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert run.metrics == pytest.approx(one.metrics, rel=1e-4)
    options: dict[str, Any] = {"devices": 2, "strategy": "fsdp", **QUIET}
    assert ld.validate(model, loader(5, 33), **options) == pytest.approx(
        ld.validate(model, loader(5, 33), weights=run.last_checkpoint, **QUIET), rel=1e-5
    )


def test_explain_says_that_the_model_is_cut() -> None:
    """One line more."""
    assert "cut every parameter into parts" in str(
        ld.explain(Net(), loader(8), max_epochs=1, strategy="fsdp", devices=2)
    )
