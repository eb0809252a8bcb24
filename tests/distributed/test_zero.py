"""`strategy="deepspeed"` on two processes of the CPU: ZeRO's three stages against DDP."""

import contextlib
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils import DeepSpeedPlugin
from safetensors.torch import save_file
from torch import nn

import lightdeco as ld
from lightdeco.checkpoint import verify
from lightdeco.dtensor import local
from tests.distributed import ranks
from tests.distributed.ranks import together
from tests.distributed.test_fit import Closing, Manual, Net, Scheduled, Thawing, Two, Weighted, loader
from tests.distributed.test_sharded import (
    Adam,
    Counting,
    Deep,
    Failing,
    Halting,
    Mixed,
    Tied,
    digest,
    fit,
    interrupted,
    run_to,
    warned,
    weights,
    without_time,
)
from tests.models import QUIET

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="starts processes")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # DeepSpeed's own, of torch's deprecations
    pytest.importorskip("deepspeed")

STAGES = (1, 2, 3)


class Groups(Deep):
    """Two groups with learning rates of their own, a frozen layer in one of them, and a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks[1].requires_grad_(False)

    @ld.configure_optimizers
    def sgd(self) -> Any:
        groups = [{"params": self.blocks.parameters(), "lr": 0.01}, {"params": [*self.body.parameters(), self.scale]}]
        optimizer = torch.optim.AdamW(groups, lr=0.02)
        return ld.Optim(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.7), interval="step")


class Own(Deep):
    """The step uses a parameter of the model itself, which is no small one."""

    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.eye(8))

    @ld.training_step
    def step(self, batch: Any) -> Any:
        x, y = batch
        return self.loss((x @ self.mixing, y))


class Parts(Deep):
    """Cuts each batch into two, each with an update."""

    @ld.split_batch
    def halves(self, batch: Any) -> Any:
        x, y = batch
        return [(x[:4], y[:4]), (x[4:], y[4:])]


class Listening(Deep):
    """Hears every event around an update, and logs what it sees."""

    @ld.on_before_backward
    def before(self, loss: Any) -> None:
        ld.log("loss_seen", loss.detach())

    @ld.on_before_optimizer_step
    def step_comes(self, optimizer: torch.optim.Optimizer) -> None:
        ld.log("lr", optimizer.param_groups[0]["lr"])

    @ld.on_before_zero_grad
    def zero(self) -> None:
        """Nothing."""


CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "plain": (Net, {}),
    "blocks": (Deep, {}),
    "adam": (Adam, {}),
    "weights": (Weighted, {}),
    "accumulation": (Deep, {"accumulate_grad_batches": 4}),
    "weights and accumulation": (Weighted, {"accumulate_grad_batches": {0: 2, 1: 3}}),
    "scheduler and clipping": (Scheduled, {"gradient_clip_val": 0.3}),
    "clipped and weighted": (Weighted, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}),
    "bf16": (Deep, {"precision": "bf16-mixed"}),
    "compiled": (Deep, {"compile": True}),
    "tied": (Tied, {"checkpoint": True}),
    "groups": (Groups, {}),
    "own": (Own, {}),
    "parts": (Parts, {}),
    "events": (Listening, {}),
}


def plugin(stage: int) -> DeepSpeedPlugin:
    """A plugin with which small parameters lie in parts too."""
    zero = {"stage": stage} | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    return DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero}, zero3_init_flag=False)


def both() -> dict[str, Any]:
    """Of each case, by DDP and by each stage: weights, metrics, records of the training, updates."""
    torch.distributed.init_process_group("gloo")
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")  # torch's own compiler
    found: dict[str, Any] = {}
    for name, (kind, settings) in CASES.items():
        found[name] = []
        for stage in (0, *STAGES):
            options = {key: value for key, value in settings.items() if stage < 3 or key != "compile"}
            model, run = fit(kind, strategy=plugin(stage) if stage else "ddp", **options)
            records = [{k: v for k, v in record.items() if k != "time"} for record in run.history]
            found[name].append((weights(model), run.metrics, records, run.global_step))
    return found


@pytest.fixture(scope="module")
def compared() -> Any:
    """`both`, on two processes."""
    return together(both, patience=240)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", CASES)
def test_trains_as_ddp(compared: Any, name: str, stage: int) -> None:
    """The same weights, buffers and metrics on both processes as with DDP; equal but for the order of sums."""
    zero, one = (found[name] for found in compared)
    assert zero[stage][0] == one[stage][0]
    (expected, metrics, history, count), (found, others, records, number) = zero[0], zero[stage]
    half = name.startswith("bf16")
    assert count == number
    assert [list(record) for record in history] == [list(record) for record in records]
    for key, value in metrics.items():
        assert others[key] == pytest.approx(value, rel=3e-2 if half else 1e-5), key
    for before, after in zip(history, records, strict=True):
        for key in before.keys() - {"stage"}:
            assert after[key] == pytest.approx(before[key], rel=3e-2 if half else 1e-4), key
    for key, value in expected.items():
        tolerance = {"rtol": 5e-2, "atol": 2e-2} if half else {"rtol": 1e-4, "atol": 1e-6}
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), **tolerance)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("stop", [2, 7, 13])  # 6 updates an epoch: within the first, the second and the third
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, stage: int, stop: int) -> None:
    """Stopped at a step and resumed, it ends with the very files of one that was not."""
    (expected, path, metrics, history), _ = together(run_to(plugin(stage), tmp_path / "one", 15))
    together(run_to(plugin(stage), tmp_path / "two", stop))
    (found, again, others, records), (_, *_) = together(run_to(plugin(stage), tmp_path / "two", 15))
    assert found == expected
    assert digest(Path(path)) == digest(Path(again))
    assert others == metrics
    assert without_time(records) == without_time(history)


@pytest.mark.filterwarnings("ignore:the run had:lightdeco.LightdecoWarning")
@pytest.mark.parametrize(
    ("before", "after"), [("ddp", 1), ("ddp", 2), ("ddp", 3), (1, "ddp"), (2, "fsdp"), (3, "ddp"), ("fsdp", 3), (3, 1)]
)
def test_a_run_goes_on_with_another_strategy(tmp_path: Path, before: Any, after: Any) -> None:
    """A checkpoint is the same whoever wrote it: the weights of a run that never changed, to float tolerance."""
    (expected, *_), *_ = together(run_to("ddp", tmp_path / "one", 12))
    together(run_to(plugin(before) if isinstance(before, int) else before, tmp_path / "two", 5))
    (found, *_), *_ = together(run_to(plugin(after) if isinstance(after, int) else after, tmp_path / "two", 12))
    for key, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(value), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("stage", "size"), [(2, 3), (3, 3), (3, 1)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path, stage: int, size: int) -> None:
    """At the checkpoint each begins with the same weights and state."""
    (before, *_), _ = together(run_to(plugin(stage), tmp_path, 6))
    strategy = plugin(stage) if size > 1 else "ddp"
    ended = together(lambda: warned(run_to(strategy, tmp_path, 6)), size)
    assert ended[0][0] == before
    together(lambda: warned(run_to(strategy, tmp_path, 9)), size)


def test_a_checkpoint_is_dealt_out_and_needs_no_processes_to_be_read(tmp_path: Path) -> None:
    """A file for each process, whole tensors: the files that FSDP writes; one process reads them."""
    (expected, path, *_), _ = together(run_to(plugin(3), tmp_path, 5))
    folder = Path(path)
    parts = {f"{kind}-0000{i}-of-00002.safetensors" for kind in ("model", "optimizer") for i in (1, 2)}
    others = {"model.safetensors.index.json", "optimizer.safetensors", "state.safetensors", "state.json"}
    assert {p.name for p in folder.iterdir()} == parts | others | {"manifest.json"}
    assert verify(folder)
    model = Adam()
    ld.load_weights(model, folder)
    assert weights(model) == expected


# ---- evaluation ------------------------------------------------------------------------------------------------------


def evaluate(stage: int, count: int) -> Any:
    """Work for a rank: the metrics of `count` samples in a training and after it, and predictions."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        model = Counting()
        options: dict[str, Any] = {"strategy": plugin(stage), **QUIET}
        run = ld.fit(model, (loader(8), loader(4, count)), max_epochs=1, checkpoint=False, **options)
        seen = list(model.seen)
        after = ld.validate(model, loader(4, count), **options)
        predicted = torch.cat(list(ld.predict(model, loader(4, count), strategy=plugin(stage), progress_bar=False)))
        return {name: run.metrics[name] for name in after}, seen, after, predicted.tolist(), weights(model)

    return work


@pytest.mark.parametrize(("stage", "size", "count"), [(2, 2, 21), (3, 2, 4), (3, 2, 21), (3, 3, 21)])
def test_each_sample_is_counted_once(stage: int, size: int, count: int) -> None:
    """With any number of batches on the processes, none too: the metrics within a training are those after it."""
    ended = together(evaluate(stage, count), size)
    for within, _, after, predicted, values in ended:
        assert values == ended[0][-1]
        assert within == pytest.approx(after, rel=1e-6)
        model = Counting()
        model.load_state_dict({name: torch.tensor(value) for name, value in values.items()})
        assert ld.validate(model, loader(4, count), **QUIET) == pytest.approx(after, rel=1e-5)
        expected = torch.cat(list(ld.predict(model, loader(4, count), progress_bar=False)))
        torch.testing.assert_close(torch.tensor(predicted), expected)
    sanity = 2 * len(ended)
    seen = [n for each in ended for n in each[1]]
    assert len(seen) >= len(loader(4, count)) <= len(seen) <= len(loader(4, count)) + sanity


# ---- what each process holds, and what is left -----------------------------------------------------------------------


def held(stage: int) -> Any:
    """Work for a rank: how many numbers of each kind it holds in a training, and what is left after it."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        model = Adam()
        before = {name: set(vars(module)) for name, module in model.named_modules()}
        objects = {name: id(p) for name, p in model.named_parameters()}
        sizes: dict[str, int] = {}
        optimizers: list[Any] = []

        class Watch:
            @ld.on_train_batch_end
            def end(self, run: ld.Run) -> None:
                optimizers[:] = [run.optims[""].optimizer]
                states = [v for state in optimizers[0].state.values() for v in state.values() if v.dim()]
                sizes["states"] = sum(v.numel() for v in states)
                sizes["parameters"] = sum(p.numel() for p in model.parameters())

        ld.fit(model, loader(8), max_epochs=1, strategy=plugin(stage), callbacks=Watch(), checkpoint=False, **QUIET)
        whole = sum(p.numel() for p in model.parameters())
        groups = [[id(p) for p in group["params"]] for group in optimizers[0].param_groups]
        return {
            "sizes": sizes,
            "whole": whole,
            "left": [n for n, module in model.named_modules() if set(vars(module)) != before[n]],
            "attributes": [name for p in model.parameters() for name in vars(p)],
            "same": objects == {name: id(p) for name, p in model.named_parameters()},
            "optimizer": groups == [list(objects.values())] and not optimizers[0].state,
            "kinds": sorted({type(module._parameters).__name__ for module in model.modules()}),
            "trains": model(torch.ones(1, 8)).sum().backward() is None,
        }

    return work


@pytest.mark.parametrize("stage", STAGES)
def test_each_process_holds_its_part_and_a_plain_model_is_left(stage: int) -> None:
    """The optimizer's state lies in parts, at stage 3 the parameters; afterwards everything is as torch has it."""
    for found in together(held(stage)):
        assert found["sizes"]["states"] == pytest.approx(found["whole"], rel=0.1)  # half of two for each number
        assert found["sizes"]["parameters"] == (0 if stage == 3 else found["whole"])
        assert found["whole"] == sum(p.numel() for p in Adam().parameters())
        assert (found["left"], found["attributes"], found["kinds"]) == ([], [], ["dict"])
        assert found["same"]
        assert found["optimizer"]
        assert found["trains"]


# ---- faults ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "who", "count"), [(2, 0, 1), (3, 0, 14), (3, 1, 3)])
def test_a_run_killed_while_it_saves_goes_on(tmp_path: Path, stage: int, who: int, count: int) -> None:
    """All processes die while one writes its part: the run ends with the weights of one that was not killed."""
    (expected, path, *_), _ = together(run_to(plugin(stage), tmp_path / "one", 8))
    killed = interrupted(tmp_path / "two", who, ranks.die_together, "finish", count, plugin(stage))
    assert [each.status for each in ranks.start(killed)] == [-signal.SIGKILL] * 2
    (found, again, *_), _ = together(run_to(plugin(stage), tmp_path / "two", 8))
    assert found == expected
    assert digest(Path(path)) == digest(Path(again))


@pytest.mark.parametrize("stage", [2, 3])
def test_sigterm_to_one_process_saves_and_ends_both(tmp_path: Path, stage: int) -> None:
    """At the same step, with status 143; the run goes on bit for bit."""
    (expected, *_), _ = together(run_to(plugin(stage), tmp_path / "one", 15))

    def work() -> Any:
        class Told:
            @ld.on_train_batch_end
            def end(self, run: ld.Run) -> None:
                if run.rank == 1 and run.global_step == 5:
                    os.kill(os.getpid(), signal.SIGTERM)

        return run_to(plugin(stage), tmp_path / "two", 15, callbacks=Told())()

    assert [each.status for each in ranks.start(work)] == [143, 143]
    (found, *_), _ = together(run_to(plugin(stage), tmp_path / "two", 15))
    assert found == expected


def halted(stage: int) -> Any:
    """Work for a rank: a run that ends half-way in a backward, and one after it with the same model."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        model = Halting()
        with pytest.raises(ValueError, match="half-way"):
            ld.fit(model, loader(8), max_epochs=1, strategy=plugin(stage), checkpoint=False, **QUIET)
        lost = [bool(p.isnan().all()) for p in model.parameters()]
        model.bad = False
        ld.load_weights(model, Path(os.environ["START"]))
        run = ld.fit(model, loader(8), max_epochs=1, strategy=plugin(stage), checkpoint=False, **QUIET)
        return run.global_step, weights(model), any(lost)

    return work


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_can_be_trained_again_after_an_error(
    tmp_path: Path, stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same processes; at stage 3 its weights are lost, and say so: NaN."""
    path = tmp_path / "start.safetensors"
    save_file(Halting().state_dict(), path)
    monkeypatch.setenv("START", str(path))
    zero, one = together(halted(stage))
    assert zero == one
    assert zero[0] == 6
    assert zero[2] is (stage == 3)
    assert not any(torch.tensor(value).isnan().any() for value in zero[1].values())


class Burst(Deep):
    """The gradients of the third batch of rank 1 overflow, its loss does not; or the loss is not a number."""

    loss_too = False

    @ld.training_step
    def step(self, batch: Any, batch_idx: int, run: ld.Run) -> Any:
        loss = self.loss(batch)
        if run.rank == 1 and batch_idx == 2:
            if self.loss_too:
                return loss * float("nan")
            self.scale.register_hook(lambda grad: grad * float("inf"))
        return loss


def burst(stage: int, loss_too: bool) -> Any:
    """Work for a rank: the error."""

    def work() -> Any:
        model = Burst()
        model.loss_too = loss_too
        with pytest.raises(ld.StepError) as error:
            ld.fit(model, loader(8), max_epochs=1, strategy=plugin(stage), checkpoint=False, **QUIET)
        return str(error.value)

    return work


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("loss_too", [False, True])
def test_gradients_that_are_not_finite_are_an_error(stage: int, loss_too: bool) -> None:
    """DeepSpeed leaves such an update out in silence; the first cause is named, on both processes."""
    for text in together(burst(stage, loss_too)):
        if loss_too:
            assert "the training loss on rank 1 was not finite (NaN or infinite) at batch 2 of epoch 0" in text
        else:
            assert "the gradients were not finite (NaN or infinite) after global_step 2" in text


def test_started_processes_bring_the_weights_back(own_directory: Path) -> None:
    """The caller's model is whole and trained."""
    model, other = Adam(), Adam()
    data = (loader(8, shuffle=True), loader(5, 33))
    run = ld.fit(model, data, max_epochs=2, seed=3, devices=2, strategy="deepspeed", **QUIET)
    one = ld.fit(other, (loader(16, shuffle=True), loader(5, 33)), max_epochs=2, seed=3, checkpoint=False, **QUIET)
    for (name, value), expected in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-5, msg=name)
    assert run.metrics == pytest.approx(one.metrics, rel=1e-4)
    with pytest.raises(ValueError, match="a fault of the user's"):
        ld.fit(Failing(), loader(8), max_epochs=1, devices=2, strategy="deepspeed", **QUIET)


# ---- what goes with it -----------------------------------------------------------------------------------------------


def offloaded(stage: int) -> Any:
    """Work for a rank: the weights with the optimizer's state (at stage 3 the parameters too) on the CPU."""

    def work() -> Any:
        torch.distributed.init_process_group("gloo")
        config = plugin(stage).deepspeed_config
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            config["zero_optimization"]["offload_param"] = {"device": "cpu"}
        strategy = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
        return [weights(fit(Adam, strategy=each, gradient_clip_val=0.5)[0]) for each in (strategy, "ddp")]

    return work


@pytest.mark.parametrize("stage", [2, 3])
def test_offload_changes_no_weight(stage: int) -> None:
    """The plugin's configuration is DeepSpeed's."""
    (found, expected), other = together(offloaded(stage))
    assert other[0] == found
    for name, value in expected.items():
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(value), rtol=1e-4, atol=1e-6)


class Own2(Net):
    """Overrides a role that the engine has."""

    @ld.backward
    def back(self, loss: Any) -> None:
        loss.backward()


@pytest.mark.parametrize(
    ("kind", "settings", "error", "message"),
    [
        (Two, {}, ld.LaunchError, "Two.second .* is one of several training steps"),
        (Manual, {}, ld.LaunchError, "Manual.step .* is one of a manual training step"),
        (Own2, {}, ld.LaunchError, "Own2.back .* marked @backward, cannot go with strategy='deepspeed'"),
        (Net, {"oom": "micro"}, ld.SettingsError, "does not go with oom='micro'"),
        (Net, {"precision": "bf16-true"}, ld.SettingsError, "does not go with precision='bf16-true': use 'bf16-mixed'"),
        (Net, {"on_nan": "skip"}, ld.SettingsError, "does not go with on_nan='skip'"),
        (Net, {"gradient_clip_algorithm": "value"}, ld.SettingsError, "clips by the norm alone"),
        (Net, {"log_gradients": True}, ld.SettingsError, "does not go with log_gradients=True"),
        (Net, {"devices": 1}, ld.LaunchError, "this run has one: give devices=2"),
        (Net, {"compile": True, "strategy": 3}, ld.SettingsError, "at stage 3 does not go with compile=True"),
    ],
)
def test_what_does_not_go_with_it_is_refused_before_anything_starts(
    kind: type[nn.Module], settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    """With the reason, and what to do."""
    settings = {"devices": 2, "strategy": "deepspeed", **settings}
    if isinstance(settings["strategy"], int):
        settings["strategy"] = plugin(settings["strategy"])
    with pytest.raises(error, match=message):
        ld.fit(kind(), loader(8), max_epochs=1, **settings, **QUIET)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, "the stage of ZeRO is 0; allowed: 1, 2, 3"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "has 'optimizer'; return the optimizer"),
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, r"give fit\(…, gradient_clip_val=…\)"),
        ({"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}, "precision='bf16-mixed'"),
    ],
)
def test_a_configuration_that_says_what_fit_decides_is_refused(config: dict[str, Any], message: str) -> None:
    """Never two answers to one question; before anything starts."""
    strategy = DeepSpeedPlugin(hf_ds_config=config, zero3_init_flag=False)
    with pytest.raises(ld.LaunchError, match=message):
        ld.fit(Net(), loader(8), max_epochs=1, devices=2, strategy=strategy, **QUIET)


class Elsewhere(Net):
    """A parameter that no optimizer has."""

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.SGD([*self.parameters()][:-1], lr=0.1)


class Rows(Net):
    """An optimizer that looks at rows and columns."""

    @ld.configure_optimizers
    def sgd(self) -> Any:
        return torch.optim.Adafactor(self.parameters(), lr=0.1)


def refused() -> Any:
    """What is found out when model and optimizer are there."""
    torch.distributed.init_process_group("gloo")
    found = []
    for kind in (Elsewhere, Rows, Closing, Thawing, Mixed):
        with pytest.raises(ld.LightdecoError) as error:
            ld.fit(kind(), loader(8), max_epochs=3, strategy="deepspeed", checkpoint=False, **QUIET)
        found.append(str(error.value))
    return found


def test_optimizers_that_cannot_be_cut_are_named() -> None:
    """On every process, and a model whose layers thaw within the run."""
    zero, one = together(refused)
    assert zero == one
    elsewhere, rows, closing, thawing, mixed = zero
    assert "'double.weight' is torch.float64" in mixed
    assert "'body.2.bias' requires grad, and the optimizer does not have it" in elsewhere
    assert "cannot run Adafactor: it gets slices of one long vector" in rows
    assert "cannot run LBFGS" in closing
    assert "requires_grad of 'body.0." in thawing


def looked_at() -> Any:
    """A run with all that looks at a model: summary with an example, early stopping, learning rates, profiler."""
    torch.distributed.init_process_group("gloo")
    model = Deep()
    model.example_input = torch.zeros(2, 8)
    stopping = ld.EarlyStopping("val/loss", patience=1, min_delta=10.0)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        run = ld.fit(
            model,
            (loader(8), loader(5, 33)),
            max_epochs=9,
            strategy=plugin(3),
            callbacks=[stopping, ld.LearningRateMonitor(), ld.ThroughputMonitor()],
            logger=True,
            progress_bar=False,
            profiler="simple",
            log_every_n_steps=2,
        )
    reference = Deep()
    ld.load_weights(reference, run.best_checkpoint)
    values = weights(reference), weights(model)
    return [run.stop_reason, run.epoch, str(run.best_checkpoint), *values], printed.getvalue()


def test_callbacks_and_summary_see_a_cut_model(own_directory: Path) -> None:
    """They work, on all processes alike; the summary counts what lies elsewhere too."""
    (zero, text), (one, _) = together(looked_at)
    assert zero == one
    assert zero[0].startswith("early stopping: val/loss")
    assert str(sum(p.numel() for p in Deep().parameters())) in text, text


class Built(Net):
    """Builds its layers on the meta device."""

    @ld.configure_model
    def build(self) -> None:
        with torch.device("meta"):
            self.body = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))


def test_layers_on_the_meta_device_are_filled() -> None:
    """With the weights of one process alone."""

    def work() -> Any:
        model = Built()
        ld.fit(model, loader(8), max_epochs=1, seed=2, strategy=plugin(3), checkpoint=False, **QUIET)
        return weights(model)

    zero, one = together(work)
    model = Built()
    ld.fit(model, loader(16), max_epochs=1, seed=2, checkpoint=False, **QUIET)
    assert zero == one
    for name, value in model.state_dict().items():
        torch.testing.assert_close(torch.tensor(zero[name]), value, rtol=1e-4, atol=1e-6)


def test_explain_says_that_the_state_is_cut() -> None:
    """One line more."""
    text = str(ld.explain(Net(), loader(8), max_epochs=1, strategy="deepspeed", devices=2))
    assert "DeepSpeed (ZeRO stage 2)" in text


class Filled(Adam):
    """Puts NaN where stage 3 fills up the last parts, as chance may."""

    @ld.on_train_batch_end
    def fill(self) -> None:
        for p in self.parameters():
            part: Any = vars(p)["ds_tensor"]
            with torch.no_grad():
                part[local(p).numel() :] = float("nan")


def test_what_fills_up_the_last_parts_is_no_weight(tmp_path: Path) -> None:
    """A checkpoint is written, without it."""

    def work() -> Any:
        model = Filled()
        every = ld.ModelCheckpoint(every_n_steps=1)
        run = ld.fit(model, loader(8), max_steps=3, strategy=plugin(3), root_dir=tmp_path, checkpoint=every, **QUIET)
        again = Adam()
        ld.load_weights(again, run.last_checkpoint)
        return weights(again), weights(model)

    for saved, trained in together(work):
        assert saved == trained
        assert not any(torch.tensor(value).isnan().any() for value in saved.values())


class Penalised(Deep):
    """Uses a weight of a layer beside the layer."""

    @ld.training_step
    def step(self, batch: Any) -> Any:
        penalty = sum((p.view(8, -1) ** 2).mean() for p in self.blocks.parameters())
        return self.loss(batch) + penalty


def test_a_parameter_that_is_not_there_is_explained() -> None:
    """What torch says of shapes comes with the reason."""

    def work() -> Any:
        with pytest.raises(RuntimeError) as error:
            ld.fit(Penalised(), loader(8), max_epochs=1, strategy=plugin(3), checkpoint=False, **QUIET)
        return [*getattr(error.value, "__notes__", [str(error.value)])]

    for notes in together(work):
        assert sys.version_info < (3, 11) or "unless the module is being called" in notes[0]
