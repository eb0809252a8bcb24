"""XLA (a TPU, or its client for CPUs): randomness, one program per batch, checkpoints, the CPU beside it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lightdeco as ld
from lightdeco import seeds, xla
from tests.models import QUIET, Net, batches, equal, weights
from tests.test_examples import load

pytestmark = pytest.mark.xla


@pytest.fixture(autouse=True)
def device() -> None:
    """The device is taken before any other test of this process runs a backward."""
    xla.begin()


BATCHES = batches(60)


def fit(model: nn.Module, data: Any = BATCHES, **settings: Any) -> ld.Run:
    return ld.fit(model, data, **(QUIET | {"max_epochs": 1, "seed": 3} | settings))


def counted(name: str) -> int:
    """How often torch_xla did something in this process: "CompileTime", "ExecuteTime", "TransferFromDeviceTime"."""
    from torch_xla.debug import metrics

    data = metrics.metric_data(name)
    return 0 if data is None else int(data[0])


class Counting(Net):
    """Counts what XLA does up to the end of each batch."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.counts: list[tuple[int, int, int]] = []

    @ld.training_step
    def step(self, batch: Any) -> Any:
        """A loss and a metric."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        return {"loss": loss, "twice": 2 * loss}

    @ld.on_train_batch_end
    def count(self) -> None:
        """After the batch was launched."""
        names = ("CompileTime", "ExecuteTime", "TransferFromDeviceTime")
        self.counts.append(tuple(counted(name) for name in names))  # type: ignore[arg-type]


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tpu", "xla"])
def test_training_on_xla_is_that_on_the_cpu(name: str) -> None:
    """Same weights and metrics but for rounding; the model stays on the device."""
    there, here = Net(dropout=0.0), Net(dropout=0.0)
    run = fit(there, (BATCHES, BATCHES[:2]), accelerator=name)
    expected = fit(here, (BATCHES, BATCHES[:2]), accelerator="cpu")
    assert run.device.type == next(there.parameters()).device.type == "xla"
    assert expected.device.type == next(here.parameters()).device.type == "cpu"
    for a, b in zip(weights(there), weights(here), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-4, atol=1e-5)
    assert run.metrics == pytest.approx(expected.metrics, rel=1e-4)


def test_auto_is_the_cpu_without_a_tpu() -> None:
    """That torch_xla is installed does not decide; accelerate alone would take it."""
    assert fit(Net(), accelerator="auto").device.type == "cpu"


def test_a_batch_is_one_program_and_reads_nothing_back() -> None:
    """After the first batches nothing is compiled, each batch runs once, and nothing waits for a loss or a metric."""
    model = Counting()
    fit(model, log_every_n_steps=50)
    compiled, executed, read = zip(*model.counts[5:45], strict=True)
    assert len(set(compiled)) == 1
    assert len(set(read)) == 1
    assert abs(executed[-1] - executed[0] - len(executed) + 1) <= 2  # what was launched may not have run yet


def test_records_compile_nothing_new(tmp_path: Path) -> None:
    """However many values a record reads, they are read by the same program."""
    model = Counting()
    run = fit(model, max_epochs=4, log_every_n_steps=7, root_dir=tmp_path)
    compiled = [count[0] for count in model.counts]
    assert compiled[60] == compiled[-1]  # records of other numbers of batches, and those of the epochs
    assert len([record for record in run.history if "train/loss" in record]) == 240 // 7


def test_mixed_bf16_keeps_the_weights() -> None:
    """Layers compute in bf16 by autocast, weights and optimizer state are float32."""
    seen: list[torch.dtype] = []

    class Watched(Net):
        def forward(self, x: Tensor) -> Tensor:
            """Note the type of the output."""
            out = super().forward(x)
            seen.append(out.dtype)
            return out

        @ld.on_fit_end
        def look(self, run: ld.Run) -> None:
            """Note the types of the state."""
            optimizer = run.optims[""].optimizer
            seen.extend(state["exp_avg"].dtype for state in optimizer.state.values())

    model = Watched()
    fit(model, batches(2), precision="bf16-mixed")
    assert set(seen[:2]) == {torch.bfloat16}
    assert set(seen[2:]) == {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("inference_mode", [True, False])
def test_evaluations(inference_mode: bool) -> None:
    """Two validations of the same weights agree; predict gives what the model gives."""
    model = Net(dropout=0.0)
    given: Any = QUIET | {"inference_mode": inference_mode}
    first = ld.validate(model, batches(3), **given)
    assert ld.validate(model, batches(3), **given) == first
    assert ld.test(model, batches(3), **given)["test/loss"] == first["val/loss"]
    (output,) = ld.predict(model, batches(1), **given)
    assert output.device.type == "xla"
    model.cpu()
    torch.testing.assert_close(output.cpu(), model(batches(1)[0][0]), rtol=1e-4, atol=1e-5)


ONE_OF_TWO = """
import warnings
import lightdeco as ld
from tests.models import QUIET, Net, batches
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always", ld.LightdecoWarning)
    run = ld.fit(Net(), batches(3), max_epochs=1, **QUIET)
print(run.device, run.global_step, [str(w.message) for w in caught if w.category is ld.LightdecoWarning])
"""


@pytest.mark.slow
def test_of_two_devices_one_is_used_and_a_warning_says_so(tmp_path: Path) -> None:
    """In a process of its own, since the number of devices is the process's."""
    environment = os.environ | {"CPU_NUM_DEVICES": "2", "PYTHONPATH": str(Path(__file__).parents[2])}
    if environment.get("PJRT_DEVICE") != "CPU":
        pytest.skip("needs XLA's client for CPUs, whose number of devices can be set: PJRT_DEVICE=CPU")
    command = [sys.executable, "-c", ONE_OF_TWO]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("xla:0 3 ['there are 2 XLA devices here and this run uses one;")


BACKWARD_FIRST = """
import sys
import lightdeco as ld
from tests.models import QUIET, Net, batches
if "device" in sys.argv:
    import torch_xla
    torch_xla.device()
for kind in ("cpu", "tpu"):
    run = ld.fit(Net(), batches(3), max_epochs=1, **QUIET | {"accelerator": kind})
print(run.device)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first", ["", "device"])
def test_a_backward_before_the_device_is_there(first: str, tmp_path: Path) -> None:
    """torch's autograd counts devices at its first backward: said in words, with what to do; which helps."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", BACKWARD_FIRST, first]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100)
    if first:
        assert done.stdout == "xla:0\n", done.stderr
    else:
        assert "LaunchError: a backward ran in this process before" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("digits", "--model", "mlp"), ("digits", "--model", "cnn"), ("gan",)])
def test_examples(arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they are; their command lines have no switch for the device."""
    pytest.importorskip("sklearn")
    module: Any = load(arguments[0])
    for verb in ("fit", "test"):
        monkeypatch.setattr(module.ld, verb, partial(getattr(ld, verb), accelerator="tpu"))
    first, second = module.main(["--epochs", "4" if "cnn" not in arguments else "1", *arguments[1:]])
    run = first if arguments[0] == "digits" else second
    assert run.device.type == "xla"
    if "mlp" in arguments:
        assert second > 0.85


# ---- parameters ------------------------------------------------------------------------------------------------------


class Tied(Net):
    """Tied weights, and an optimizer that is made before the model moves."""

    def __init__(self) -> None:
        super().__init__(features=3)
        self.a = nn.Linear(3, 3, bias=False)
        self.b = nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.sgd = torch.optim.SGD(self.parameters(), lr=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Through both."""
        return self.b(self.a(super().forward(x)))

    @ld.configure_optimizers
    def adam(self) -> torch.optim.Optimizer:
        """The one that was made before."""
        return self.sgd


def test_parameters_stay_the_same_objects() -> None:
    """Ties hold, and an optimizer that was made before trains the model."""
    model = Tied()
    before, values = list(model.parameters()), weights(model)
    fit(model, batches(3, features=3))
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert model.a.weight is model.b.weight
    assert not any(torch.equal(a.cpu(), b) for a, b in zip(weights(model), values, strict=True))
    fit(model, batches(3, features=3))  # from a model that is there already


# ---- randomness and checkpoints --------------------------------------------------------------------------------------


def test_the_random_state_of_the_device_is_put_back() -> None:
    """Around a verb; and a run with the same seed repeats its dropout."""
    xla.begin()
    xla.set_rng_state(12)
    before = xla.rng_state()
    one, two, other = Net(), Net(), Net()
    fit(one)
    assert xla.rng_state() == before
    torch.rand(3, device="xla")
    fit(two)
    fit(other, seed=4)
    assert equal(weights(one), weights(two))
    assert not equal(weights(one), weights(other))


def test_seeding_and_repeating() -> None:
    """`seeds.reseeder` seeds both generators, `seeds.repeater` puts both back."""
    xla.begin()
    device = torch.device("xla:0")
    draws = []
    for number in (5, 6, 5):
        seeds.reseeder(device)(number)
        draws.append((torch.rand(1).item(), torch.rand(1, device=device).item()))
    assert draws[0] == draws[2]
    assert draws[0][0] != draws[1][0]
    assert draws[0][1] != draws[1][1]
    again = seeds.repeater(device)
    first = torch.rand(1).item(), torch.rand(1, device=device).item()
    again()
    assert (torch.rand(1).item(), torch.rand(1, device=device).item()) == first


class Full(Net):
    """Everything that has a state: BatchNorm, dropout, Adam, a schedule."""

    def __init__(self) -> None:
        super().__init__()
        self.body.insert(1, nn.BatchNorm1d(16))

    @ld.configure_optimizers
    def adam(self) -> Any:
        """With a schedule by step."""
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return ld.Optim(optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7), interval="step")


@pytest.mark.parametrize("steps", [3, 8, 13])
def test_an_interrupted_run_goes_on_bit_for_bit(steps: int, tmp_path: Path) -> None:
    """Within an epoch and at its end: weights, optimizer and metrics."""
    settings: Any = {"max_epochs": 3, "log_every_n_steps": 2, "root_dir": tmp_path}
    data = batches(8), batches(2)
    whole, parts = Full(), Full()
    expected = fit(whole, data, name="whole", **settings)
    fit(parts, data, name="parts", max_steps=steps, **settings)
    found = fit(parts := Full(), data, name="parts", resume="auto", **settings)
    assert equal(weights(whole), weights(parts))
    assert found.metrics == expected.metrics
    a, b = expected.last_checkpoint, found.last_checkpoint
    assert a is not None
    assert b is not None
    assert (a / "optimizer.safetensors").read_bytes() == (b / "optimizer.safetensors").read_bytes()


def test_a_checkpoint_holds_each_tensor_of_the_device(tmp_path: Path) -> None:
    """Tensors of one shape are not taken for one, though none has an address; a CPU reads the file."""
    from safetensors.torch import load_file

    model = Full()
    run = fit(model, (batches(8), batches(2)), root_dir=tmp_path, checkpoint=ld.ModelCheckpoint(every_n_steps=4))
    assert run.last_checkpoint is not None
    saved = load_file(run.last_checkpoint / "model.safetensors")
    assert all(torch.equal(value.cpu(), saved[name]) for name, value in model.state_dict().items())
    assert not torch.equal(saved["body.1.weight"], saved["body.1.running_var"])
    state = load_file(run.last_checkpoint / "optimizer.safetensors")
    moments = [value for value in state.values() if value.shape == (16,)]
    assert len(moments) == len({tuple(value.tolist()) for value in moments}) == 6
    ld.load_weights(Full(), run.last_checkpoint)


def test_a_run_on_xla_goes_on_on_the_cpu(tmp_path: Path) -> None:
    """A checkpoint belongs to no device."""
    settings: Any = {"root_dir": tmp_path, "name": "run"}
    fit(Full(), batches(8), max_steps=5, **settings)
    run = fit(Full(), batches(8), max_epochs=2, resume="auto", **(settings | {"accelerator": "cpu"}))
    assert (run.device.type, run.global_step) == ("cpu", 16)


def test_numbers_of_any_kind() -> None:
    """Host and device, one element of any shape, integers too large for float32; more than are read at once."""
    values: list[Any] = [1, 2.5, torch.ones(1, 1), torch.tensor(2**40 + 1, device="xla"), torch.tensor(True)]
    assert xla.numbers(values) == [1, 2.5, 1, 2**40 + 1, 1]
    many = [torch.tensor(float(i), device="xla") if i % 3 else i for i in range(200)]
    assert xla.numbers(many) == list(range(200))
    assert xla.numbers([]) == []
