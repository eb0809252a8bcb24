"""A CUDA device: precision, the gradient scaler, compile, transfers, checkpoints, statistics, memory."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import lightdeco as ld
from lightdeco.data.moving import mover
from tests.models import QUIET, Net, batches, equal, weights

pytestmark = pytest.mark.gpu

CUDA: Any = QUIET | {"accelerator": "gpu", "devices": 1, "seed": 3}


def fit(model: nn.Module, data: Any = None, **settings: Any) -> ld.Run:
    return ld.fit(model, data or (batches(8), batches(2)), **(CUDA | {"max_epochs": 1} | settings))


class Noted(Net):
    """Notes the type of the logits, and can be told to give a loss that overflows in half precision."""

    def __init__(self, dropout: float = 0.5, overflow_at: int = -1) -> None:
        super().__init__(dropout=dropout)
        self.dtypes: set[torch.dtype] = set()
        self.overflow_at = overflow_at

    @ld.training_step
    def step(self, batch: Any, batch_idx: int) -> Tensor:
        """A loss; at one batch its gradients are too large for any scale."""
        logits = self(batch[0])
        self.dtypes.add(logits.dtype)
        loss = F.cross_entropy(logits.float(), batch[1])
        return loss * 1e38 if batch_idx == self.overflow_at else loss


# ---- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpu", "cuda", "auto"])
def test_training_on_cuda_is_that_on_the_cpu(name: str) -> None:
    """Same weights and metrics but for rounding; the model stays on the device."""
    there, here = Net(dropout=0.0), Net(dropout=0.0)
    run = fit(there, accelerator=name)
    expected = fit(here, accelerator="cpu")
    assert run.device.type == next(there.parameters()).device.type == "cuda"
    for a, b in zip(weights(there), weights(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-5)
    assert run.metrics == pytest.approx(expected.metrics, rel=1e-3)


@pytest.mark.filterwarnings("ignore:torch.get_autocast_gpu_dtype:DeprecationWarning")  # torchao calls it
def test_fp8() -> None:
    """A layer in the middle is converted and learns; evaluation and another run work; the model is plain again."""
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9")

    class Wide(Noted):
        def __init__(self) -> None:
            super().__init__(dropout=0.0)
            self.body = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
            self.kinds = set[str]()

        def forward(self, x: Tensor) -> Tensor:
            self.kinds |= {type(layer).__name__ for layer in self.body}
            return self.body(x)

    model, data = Wide(), (batches(8, size=16), batches(2, size=16))
    run = fit(model, data, precision="fp8", max_epochs=5)
    losses = [record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record]
    assert losses[-1] < losses[0]
    assert "Float8Linear" in model.kinds
    assert type(model.body[2]) is nn.Linear
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}


@pytest.mark.parametrize(("precision", "dtype"), [("16-mixed", torch.float16), ("bf16-mixed", torch.bfloat16)])
def test_mixed_precision(precision: str, dtype: torch.dtype) -> None:
    """Layers compute in 16 bits, weights and optimizer state are float32, and the loss falls."""
    if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported():
        pytest.skip("this GPU has no bf16")
    model = Noted(dropout=0.0)
    run = fit(model, max_epochs=20, precision=precision)
    assert model.dtypes == {dtype}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    first = next(record["train/loss_epoch"] for record in run.history if "train/loss_epoch" in record)
    assert run.metrics["train/loss"] < 0.9 * first
    assert run.progress.global_step + run.progress.skipped_updates == 160


def test_an_overflow_skips_the_update_and_is_counted() -> None:
    """With fp16 a skipped update moves neither scheduler nor global_step; training goes on."""

    class Scheduled(Noted):
        @ld.configure_optimizers
        def adam(self) -> Any:
            """A schedule that halves the learning rate at each update."""
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            return ld.Optim(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5), interval="step")

        @ld.on_train_end
        def look(self, run: ld.Run) -> None:
            """The learning rate in the end."""
            self.lr = run.optims[""].optimizer.param_groups[0]["lr"]

    model = Scheduled(overflow_at=5)
    run = fit(model, precision="16-mixed", on_nan="ignore")
    assert run.progress.skipped_updates >= 1
    assert run.global_step == 8 - run.progress.skipped_updates
    assert model.lr == pytest.approx(0.5**run.global_step)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("steps", [3, 8, 11])
def test_an_interrupted_run_goes_on_bit_for_bit(precision: str, steps: int, tmp_path: Path) -> None:
    """Dropout on the device, Adam, and the scale of fp16 are as if there had been no interruption."""
    settings: Any = {"max_epochs": 3, "precision": precision, "root_dir": tmp_path, "log_every_n_steps": 2}
    settings["deterministic"] = True
    whole, parts = Net(), Net()
    expected = fit(whole, name="whole", **settings)
    fit(parts, name="parts", max_steps=steps, **settings)
    found = fit(parts := Net(), name="parts", resume="auto", **settings)
    assert equal(weights(whole), weights(parts))
    assert found.metrics == expected.metrics
    assert found.progress.skipped_updates == expected.progress.skipped_updates


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_are_as_one(strategy: str, precision: str, offload: bool, tmp_path: Path) -> None:
    """Half the batch on each of two GPUs, whole or in parts, the parts on the CPU too: the weights of one GPU."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    if offload and strategy == "ddp":
        pytest.skip("only parts are offloaded")
    plugin: Any = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_offload=True) if offload else strategy
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator))
    one, two = Net(dropout=0.0), Net(dropout=0.0)
    two.load_state_dict(one.state_dict())
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 0.5, "root_dir": tmp_path}
    fit(one, DataLoader(samples, batch_size=16), **options)
    run = fit(two, DataLoader(samples, batch_size=8), devices=2, strategy=plugin, checkpoint=True, **options)
    for before, after in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(after, before, rtol=2e-2, atol=1e-3)
    assert ld.checkpoint.verify(run.last_checkpoint) is not None


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_on_two_gpus_is_as_one(stage: int, precision: str, offload: bool, tmp_path: Path) -> None:
    """The weights of one GPU; at stage 3 they come back to the CPU, where they were."""
    pytest.importorskip("deepspeed")
    from accelerate.utils import DeepSpeedPlugin

    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    plugin = DeepSpeedPlugin(hf_ds_config={"zero_optimization": zero}, zero3_init_flag=False)
    generator = torch.Generator().manual_seed(0)
    samples = TensorDataset(torch.randn(64, 4, generator=generator), torch.randint(3, (64,), generator=generator))
    one, two = Net(dropout=0.0), Net(dropout=0.0)
    two.load_state_dict(one.state_dict())
    options: dict[str, Any] = {"precision": precision, "gradient_clip_val": 0.5, "root_dir": tmp_path}
    fit(one, DataLoader(samples, batch_size=16), **options)
    run = fit(two, DataLoader(samples, batch_size=8), devices=2, strategy=plugin, checkpoint=True, **options)
    for before, after in zip(weights(one), weights(two), strict=True):
        torch.testing.assert_close(after.cpu(), before.cpu(), rtol=2e-2, atol=1e-3)
    assert ld.checkpoint.verify(run.last_checkpoint) is not None


def test_compile() -> None:
    """The compiled forward trains to the same weights but for rounding."""
    compiled, eager = Net(dropout=0.0), Net(dropout=0.0)
    fit(compiled, compile=True)
    fit(eager)
    for a, b in zip(weights(compiled), weights(eager), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


# ---- transfers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pinned", [True, False])
def test_batches_arrive_whole(workers: int, pinned: bool) -> None:
    """Large batches are copied beside long steps that still read those before: each arrives as it was."""
    data = torch.arange(40.0)[:, None, None].expand(40, 512, 512).contiguous()
    loader = DataLoader(TensorDataset(data), batch_size=4, num_workers=workers, pin_memory=pinned)

    class Summing(nn.Linear):
        def __init__(self) -> None:
            super().__init__(1, 1)
            self.sums: list[Tensor] = []

        @ld.training_step
        def step(self, batch: Any) -> Tensor:
            """Keep the device busy, then read the batch."""
            (x,) = batch
            busy = torch.ones(2048, 2048, device=x.device)
            for _ in range(20):
                busy = busy @ busy / 2048
            self.sums.append((x * busy[0, 0]).mean((1, 2)))
            return self(x[:, 0, :1]).mean()

        @ld.configure_optimizers
        def sgd(self) -> Any:
            """Anything."""
            return torch.optim.SGD(self.parameters(), lr=0.0)

    model = Summing()
    fit(model, loader, max_epochs=3)
    torch.testing.assert_close(torch.cat(model.sums).cpu(), torch.arange(40.0).repeat(3))


def test_a_copy_does_not_wait_for_the_steps_before() -> None:
    """It runs on a stream of its own, from pinned memory without waiting; the present stream waits for it."""
    device = torch.device("cuda", torch.cuda.current_device())
    move = mover(device, None)
    source = torch.ones(64, 1024, 1024).pin_memory()
    move([source], device, 0)  # the memory is there from now on
    torch.cuda.synchronize()
    begin, copied, done = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    begin.record()
    torch.cuda._sleep(2_000_000_000)  # cycles, about a second, on the stream of the steps
    done.record()
    (moved,) = move([source], device, 0)
    stream = move.__self__._stream  # type: ignore[attr-defined]
    copied.record(stream)
    copied.synchronize()
    assert not done.query()  # the copy has ended, the step before has not
    assert bool((moved == 1).all())
    assert begin.elapsed_time(copied) < begin.elapsed_time(done)


def test_the_events_of_a_transfer_keep_their_order() -> None:
    """With hooks, the batch before has been trained when the next one is moved."""
    order: list[str] = []

    class Watched(Net):
        @ld.on_before_batch_transfer
        def before(self, batch: Any) -> None:
            """On the CPU."""
            order.append(f"before {batch[0].device.type}")

        @ld.on_after_batch_transfer
        def after(self, batch: Any) -> Any:
            """On the device; may change the batch."""
            order.append(f"after {batch[0].device.type}")
            return [batch[0] + 1, batch[1]]

        @ld.on_train_batch_end
        def end(self) -> None:
            """Trained."""
            order.append("end")

    fit(Watched(), batches(3))
    assert order == ["before cpu", "after cuda", "end"] * 3


# ---- checkpoints, statistics, memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("first", "second"), [("gpu", "cpu"), ("cpu", "gpu")])
def test_a_checkpoint_belongs_to_no_device(first: str, second: str, tmp_path: Path) -> None:
    """A run goes on on the other device, with its optimizer's state there."""
    settings: Any = {"root_dir": tmp_path, "name": "run"}
    fit(Net(), max_steps=5, accelerator=first, **settings)
    devices: set[str] = set()

    class Watched(Net):
        @ld.on_train_end
        def look(self, run: ld.Run) -> None:
            """Where the state is."""
            state = run.optims[""].optimizer.state
            devices.update(values["exp_avg"].device.type for values in state.values())

    run = fit(Watched(), max_epochs=2, resume="auto", accelerator=second, **settings)
    assert run.global_step == 16
    assert devices == {run.device.type} == {{"gpu": "cuda", "cpu": "cpu"}[second]}


def test_the_random_state_of_the_device_is_put_back() -> None:
    """Around a verb."""
    torch.cuda.manual_seed(5)
    before = torch.cuda.get_rng_state()
    fit(Net())
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_device_stats(tmp_path: Path) -> None:
    """Memory of the run's GPU is recorded, and is more than nothing."""
    run = fit(Net(), callbacks=[ld.DeviceStats(every=2)], log_every_n_steps=2, root_dir=tmp_path)
    assert run.metrics["device/gpu_memory_gib"] > 0


def test_running_out_of_memory_reaches_the_caller_and_frees_it() -> None:
    """As torch's own error; the next fit in this process works."""

    class Greedy(Net):
        @ld.training_step
        def step(self, batch: Any) -> Tensor:
            """Ask for more than any GPU has."""
            return self(batch[0]).mean() + torch.empty(2**50, device=batch[0].device).sum()

    with pytest.raises(torch.cuda.OutOfMemoryError):
        fit(Greedy())
    gc.collect()
    assert fit(Net()).global_step == 8


def test_memory_is_flat() -> None:
    """What a second fit needs is what the first one needed."""
    peaks = []
    for _ in range(3):
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        fit(Net(), max_epochs=2)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[2] <= peaks[1]
