"""Launching: a run's directory, what is put back after a verb, and who is rank zero."""

import importlib.util
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

import lightdeco as ld
from lightdeco.directory import make_directory
from lightdeco.launch import Process
from lightdeco.settings import Settings

QUIET: Any = {"logger": False, "progress_bar": False, "summary": False, "max_epochs": 1}
BATCHES = [torch.ones(4, 2)] * 2


class Net(nn.Linear):
    """A model whose training step calls `act`."""

    def __init__(self, act: Any = lambda: None) -> None:
        super().__init__(2, 1)
        self.act = act

    @ld.training_step
    @ld.validation_step
    def step(self, batch: Tensor) -> Tensor:
        self.act()
        return self(batch).pow(2).mean()

    @ld.predict_step
    def guess(self, batch: Tensor) -> Tensor:
        self.act()
        return self(batch)

    @ld.configure_optimizers
    def optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(model: Net, **settings: Any) -> ld.Run:
    return ld.fit(model, BATCHES, **QUIET | settings)


# ---- the directory ---------------------------------------------------------------------------------------------------


def test_runs_without_a_name_are_numbered_by_class(tmp_path: Path) -> None:
    """`<root_dir>/<Class>/version_<n>`, one more than the highest, whatever else lies there."""
    for i in range(2):
        assert fit(Net(), root_dir=tmp_path).dir == tmp_path / "Net" / f"version_{i}"
    (tmp_path / "Net" / "version_12").mkdir()
    (tmp_path / "Net" / "version_x").mkdir()
    (tmp_path / "Net" / "notes.txt").touch()
    assert fit(Net(), root_dir=str(tmp_path)).dir == tmp_path / "Net" / "version_13"
    assert fit(Net()).dir == Path("runs/Net/version_0")


def test_many_runs_at_once_get_a_directory_each(tmp_path: Path) -> None:
    """`mkdir` decides: 64 from 16 threads, none twice and no number left out."""
    settings = Settings(root_dir=tmp_path, max_epochs=1)
    with ThreadPoolExecutor(16) as pool:
        made = list(pool.map(lambda _: make_directory(settings, "Net"), range(64)))
    assert sorted(int(path.name.removeprefix("version_")) for path in made) == list(range(64))
    assert all((path / "metrics.jsonl").is_file() for path in made)


def test_one_of_many_gets_a_name(tmp_path: Path) -> None:
    """The others are refused."""
    settings = Settings(root_dir=tmp_path, name="mine", max_epochs=1)

    def make(_: int) -> Path | None:
        try:
            return make_directory(settings, "Net")
        except ld.SettingsError:
            return None

    with ThreadPoolExecutor(16) as pool:
        assert [path for path in pool.map(make, range(32)) if path is not None] == [tmp_path / "mine"]


def test_a_name_that_exists_is_refused_unless_overwritten(tmp_path: Path) -> None:
    """Before the first batch, with what to do; `overwrite` begins with an empty directory."""
    path = fit(Net(), root_dir=tmp_path, name="mine").dir
    assert path == tmp_path / "mine"
    (path / "old").touch()
    with pytest.raises(ld.SettingsError, match=r"name='mine': .*mine exists; give another name, or overwrite=True"):
        fit(Net(pytest.fail), root_dir=tmp_path, name="mine")
    assert (path / "old").exists()
    assert fit(Net(), root_dir=tmp_path, name="mine", overwrite=True).dir == path
    assert not (path / "old").exists()


def test_only_a_run_of_lightdeco_is_overwritten(tmp_path: Path) -> None:
    """Neither a directory with other files nor a file, nor what a symbolic link points to."""
    run = fit(Net(), root_dir=tmp_path, name="run").dir
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("…")
    (tmp_path / "file").write_text("…")
    (tmp_path / "link").symlink_to(run, target_is_directory=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before = sorted(tmp_path.rglob("*"))
    for name in ("thesis", "file", "link", "dangling"):
        with pytest.raises(ld.SettingsError, match=f"{name} is no run of lightdeco, so it is not overwritten"):
            fit(Net(pytest.fail), root_dir=tmp_path, name=name, overwrite=True)
    assert sorted(tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    assert fit(Net(), root_dir=tmp_path, name="empty", overwrite=True).dir.name == "empty"


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".", "", "a\0b", "x" * 300])
def test_a_name_stays_inside_of_root_dir(tmp_path: Path, name: str) -> None:
    """Paths, empty names and names that no file system takes are refused, and nothing is made."""
    root = tmp_path / "root"
    with pytest.raises(ld.SettingsError, match="name"):
        fit(Net(pytest.fail), root_dir=root, name=name)
    assert [p for p in tmp_path.rglob("*") if p != root] == []


def test_a_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    """A file in its place, say; the error names the setting."""
    (tmp_path / "file").touch()
    for name in (None, "mine"):
        with pytest.raises(ld.SettingsError, match=r"root_dir='.*file' cannot be written"):
            fit(Net(pytest.fail), root_dir=tmp_path / "file", name=name)


# ---- what is put back ------------------------------------------------------------------------------------------------


def states() -> list[bytes]:
    """The random state of torch, NumPy and `random`."""
    return [
        torch.get_rng_state().numpy().tobytes(),
        repr(numpy.random.get_state()).encode(),
        repr(random.getstate()).encode(),
    ]


def flags() -> tuple[Any, ...]:
    return (
        torch.backends.cudnn.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
    )


def disturb() -> None:
    """Draw from every generator."""
    torch.rand(3), numpy.random.rand(3), random.random()


def fail() -> None:
    disturb()
    raise KeyError("a failing step")


@pytest.mark.parametrize("act", [disturb, fail])
@pytest.mark.parametrize("verb", [ld.fit, ld.validate, ld.predict])
def test_random_state_and_flags_are_as_before(act: Any, verb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After every verb, also one that failed; inside of it the settings hold."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    inside: list[Any] = []
    settings: Any = {"deterministic": "warn", "detect_anomaly": True, "benchmark": True, "progress_bar": False}
    settings |= QUIET if verb is ld.fit else {}

    def note() -> None:
        inside.append(flags()[:4])
        act()

    net = Net(note)
    before, flagged = states(), flags()
    try:
        result = verb(net, BATCHES, **settings)
        list(result) if verb is ld.predict else None
    except KeyError:
        assert act is fail
    assert inside[0] == (True, True, True, True)
    assert states() == before
    assert flags() == flagged


def test_predict_hands_out_its_outputs_with_the_callers_state() -> None:
    """Between two outputs the caller's random numbers are the caller's own."""
    net = Net(disturb)
    torch.manual_seed(3)
    expected = [torch.rand(1).item() for _ in BATCHES]
    torch.manual_seed(3)
    drawn = [torch.rand(1).item() for _ in ld.predict(net, BATCHES, progress_bar=False)]
    assert drawn == expected
    generator = ld.predict(net, BATCHES, progress_bar=False)
    before = states()
    next(iter(generator))
    generator.close()  # type: ignore[attr-defined]
    assert states() == before
    assert net.training


def accelerate_states() -> list[dict[str, Any]]:
    from accelerate.state import AcceleratorState, GradientState, PartialState

    return [cls._shared_state for cls in (PartialState, AcceleratorState, GradientState)]


@pytest.mark.parametrize("act", [disturb, fail])
def test_the_state_of_accelerate_is_the_callers_own_again(act: Any) -> None:
    """An Accelerator of the caller keeps its precision, next to runs with another one, also after a failure."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        mine = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
        before = [(id(state), dict(state)) for state in accelerate_states()]
        for precision in ("32-true", "bf16-mixed"):
            try:
                fit(Net(act), precision=precision, accelerator="cpu")
            except KeyError:
                assert act is fail
        assert [(id(state), dict(state)) for state in accelerate_states()] == before
        assert (mine.mixed_precision, mine.gradient_accumulation_steps) == ("bf16", 3)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_without_a_callers_accelerator_none_is_left_behind() -> None:
    """Two fits with different precision in one process; afterwards accelerate is as fresh as before."""
    before = [dict(state) for state in accelerate_states()]
    for precision in ("bf16-mixed", "32-true"):
        fit(Net(), precision=precision, accelerator="cpu")
    assert [dict(state) for state in accelerate_states()] == before


def test_a_process_may_be_entered_again_and_keeps_its_own_state() -> None:
    """Left and entered, as `predict` does; nested; and left by an exception."""
    from accelerate.state import PartialState

    process, outer = Process(Settings(max_epochs=1)), PartialState._shared_state
    with process.entered():
        inner = PartialState._shared_state
        assert inner is not outer
        with process.entered():
            assert PartialState._shared_state is inner
        assert PartialState._shared_state is inner
    with pytest.raises(KeyError), process.entered():
        {}["left by an exception"]
    assert PartialState._shared_state is outer


def test_a_verb_inside_of_a_verb_leaves_the_outer_run_as_it_is() -> None:
    """The weights are those without the inner run, although both seed and draw."""

    def trained(act: Any) -> Tensor:
        torch.manual_seed(0)
        net = Net(act)
        run = fit(net, seed=1)
        assert run.global_step == 2
        return net.weight.detach()

    assert torch.equal(trained(lambda: None), trained(lambda: fit(Net(), seed=5, precision="bf16-mixed") and None))


# ---- accelerator, ranks ----------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_is_refused() -> None:
    """With what was found."""
    if torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(ld.LightdecoError, match=r"accelerator='mps', .*found: .*cpu"):
        fit(Net(), accelerator="mps")


def test_what_configure_accelerator_returns_is_checked_and_used() -> None:
    """A dict of arguments, which win over the settings; anything else is refused with the place."""

    class Configured(Net):
        returns: Any = None

        @ld.configure_accelerator
        def arguments(self) -> Any:
            return self.returns

        @ld.on_train_start
        def look(self, run: ld.Run) -> None:
            assert run.accelerator is not None
            seen.append(run.accelerator.mixed_precision)

    seen: list[str] = []
    Configured.returns = {"mixed_precision": "bf16", "cpu": True}
    fit(Configured())
    assert seen == ["bf16"]
    for wrong in (None, 3, {1: 2}):
        Configured.returns = wrong
        with pytest.raises(
            ld.MarkError, match=r"Configured\.arguments \(.*\) returned \w+; return a dict of arguments"
        ):
            fit(Configured())


def test_rank_zero_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Called on rank 0 and in a process on its own; elsewhere nothing happens. Name and documentation stay."""

    @ld.rank_zero_only
    def double(x: int, *, plus: int = 0) -> int:
        """Twice."""
        return 2 * x + plus

    for name in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert double(2, plus=1) == 5
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert double(2) is None
    monkeypatch.setenv("RANK", "0")
    assert double(2) == 4
    monkeypatch.setenv("RANK", "1")
    assert double(2) is None
    assert (double.__name__, double.__doc__) == ("double", "Twice.")


# ---- the kind of device ----------------------------------------------------------------------------------------------


def test_without_torch_xla_a_tpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything runs, with what to install, or with the variable that rules it out; "auto" goes on without."""
    monkeypatch.setenv("USE_TORCH_XLA", "0")
    with pytest.raises(ld.LaunchError, match="USE_TORCH_XLA=0 rules XLA out"):
        fit(Net(), accelerator="tpu")
    monkeypatch.delenv("USE_TORCH_XLA")
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch_xla" else real(name))
    with pytest.raises(ld.LaunchError, match=r"accelerator='xla' needs torch_xla.*pip install 'torch_xla\[tpu\]'"):
        fit(Net(), accelerator="xla")
    assert fit(Net(), accelerator="auto").device.type != "xla"
    assert not list(Path("runs").glob("*/version_1"))
