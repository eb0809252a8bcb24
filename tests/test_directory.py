"""The run's directory: made, found again, kept apart from others; what `resume=` and `weights=` may say."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import lightdeco as ld
from lightdeco import ModelCheckpoint
from tests.models import QUIET, Net, batches, equal, weights

DATA = (batches(6), batches(2))


def fit(epochs: int = 2, **settings: Any) -> ld.Run:
    """Train in `runs/run`, or where the settings say."""
    given = QUIET | {"name": "run", "max_epochs": epochs, "seed": 1, "num_sanity_val_steps": 0} | settings
    return ld.fit(Net(), DATA, **given)


def newest(run: ld.Run) -> Path:
    """The last checkpoint of a run."""
    assert run.last_checkpoint is not None
    return run.last_checkpoint


# ---- made ------------------------------------------------------------------------------------------------------------


def test_runs_without_a_name_are_counted() -> None:
    """By class; what else lies there does not disturb."""
    Path("runs/Net").mkdir(parents=True)
    Path("runs/Net/version_x").mkdir()
    Path("runs/Net/notes.txt").write_text("mine")
    assert [fit(1, name=None).dir for _ in range(2)] == [Path("runs/Net/version_0"), Path("runs/Net/version_1")]
    Path("runs/Net/version_7").mkdir()
    assert fit(1, name=None).dir == Path("runs/Net/version_8")


@pytest.mark.parametrize("name", ["läuft-日本", "-x", "a b", "x" * 128])
def test_a_name_is_a_directory(name: str) -> None:
    """Of any letters; what is resumed by it is found."""
    assert fit(1, name=name).dir == Path("runs") / name
    assert fit(2, name=name, resume="last").global_step == 12


@pytest.mark.parametrize(
    "name", ["../x", "/abs", "a/b", "a\\b", "a\0b", "CON", "nul.txt", "x" * 129, ".", "..", "", " ", "a ", "run.", ".x"]
)
def test_a_name_that_leads_elsewhere_is_refused(name: str) -> None:
    """Before anything is made."""
    with pytest.raises(ld.SettingsError, match="name is"):
        fit(1, name=name)
    assert os.listdir() == []


def test_a_name_is_never_taken_twice() -> None:
    """Not without being told to; what is no run is not deleted in any case."""
    first = fit(1)
    with pytest.raises(ld.SettingsError, match=r"runs/run exists; give another name, or overwrite=True"):
        fit(1)
    with pytest.raises(ld.SettingsError, match="would delete the run that resume='auto' goes on with"):
        fit(2, resume="auto", overwrite=True)
    (first.dir / "mine.txt").write_text("")
    assert not (fit(2, overwrite=True).dir / "mine.txt").exists()
    Path("runs/work").mkdir()
    Path("runs/work/thesis.tex").write_text("years")
    os.symlink(Path("runs/run").resolve(), "runs/link")
    for name in ("work", "link"):
        with pytest.raises(ld.SettingsError, match="is no run of lightdeco, so it is not overwritten"):
            fit(1, name=name, overwrite=True)
    assert Path("runs/work/thesis.tex").read_text() == "years"


@pytest.mark.parametrize("root", ["file", "/proc/none"])
def test_a_directory_that_cannot_be_written_is_refused_before_the_first_step(root: str) -> None:
    """With the system's reason."""
    if root.startswith("/proc") and sys.platform != "linux":
        pytest.skip("needs /proc")
    Path("file").write_text("")

    class Counts:
        steps = 0

        @ld.on_train_batch_start
        def count(self) -> None:
            """Count steps."""
            self.steps += 1

    counts = Counts()
    with pytest.raises(ld.SettingsError, match=r"root_dir=.* cannot be written: .*; give a directory that can"):
        fit(1, root_dir=root, callbacks=[counts])
    assert counts.steps == 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_directory_is_refused() -> None:
    """The same, by its mode."""
    Path("locked").mkdir(mode=0o500)
    with pytest.raises(ld.SettingsError, match="cannot be written"):
        fit(1, root_dir="locked")


@pytest.mark.skipif(os.name == "nt", reason="modes of POSIX")
def test_the_umask_decides_who_may_read() -> None:
    """A group that shares a directory can read its checkpoints."""
    before = os.umask(0o002)
    try:
        run = fit(1)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in run.dir.rglob("*") if path.is_file()}
    folders = {stat.S_IMODE(path.stat().st_mode) for path in [run.dir, *run.dir.rglob("*")] if path.is_dir()}
    assert (modes, folders) == ({0o664}, {0o775})


def test_a_run_that_is_refused_early_leaves_no_directory() -> None:
    """The name is free for the next try."""
    with pytest.raises(ld.DataError):
        ld.fit(Net(), [], name="run", max_epochs=1, limit_train_batches=0.5, **QUIET)
    assert fit(1).global_step == 6


# ---- found again -----------------------------------------------------------------------------------------------------


def test_resume_takes_words_and_paths() -> None:
    """Each way to say it goes on in the same directory."""
    run = fit(1)
    ways: list[Any] = [
        "auto",
        "last",
        "best",
        lambda: newest(run),
        lambda: str(newest(run)),
        run.dir / "checkpoints",
        "runs/run/checkpoints/",
        run.dir,
        run.dir.resolve(),
    ]
    for epochs, way in enumerate(ways, start=2):
        run = fit(epochs, resume=way() if callable(way) else way)
        assert (run.dir.resolve(), run.epoch) == (Path("runs/run").resolve(), epochs)
    assert fit(20, name=None, resume="runs/run").dir == Path("runs/run")
    assert [path.name for path in Path("runs").iterdir()] == ["run"]


def test_a_path_resumed_under_another_name_begins_a_run_of_its_own() -> None:
    """The first one stays as it is; a finished one is saved in the new place too."""
    first = fit(1)
    before = {path: path.stat().st_mtime_ns for path in first.dir.rglob("*")}
    other = fit(2, name="other", resume=first.dir)
    assert (other.dir, other.global_step) == (Path("runs/other"), 12)
    copied = fit(1, name="copy", resume=first.dir)
    assert newest(copied).is_relative_to("runs/copy")
    assert {path: path.stat().st_mtime_ns for path in first.dir.rglob("*")} == before


def test_the_newest_version_is_resumed() -> None:
    """Without a name."""
    for _ in range(2):
        fit(1, name=None)
    assert fit(2, name=None, resume="auto").dir == Path("runs/Net/version_1")


@pytest.mark.parametrize("word", ["last", "best"])
def test_there_must_be_something_to_resume(word: str) -> None:
    """ "auto" alone begins anew."""
    with pytest.raises(ld.CheckpointError, match=f"'{word}': there is no checkpoint in runs/run; look at name and"):
        fit(1, resume=word)
    assert not Path("runs").exists()
    assert fit(1, resume="auto").global_step == 6


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("lst", r"did you mean 'last'\?"),
        ("Last", r"did you mean 'last'\?"),
        ("atuo", r"did you mean 'auto'\?"),
        ("runs/nope", "allowed: 'auto', 'last', 'best', the path"),
        ("runs/run/metrics.jsonl", "is no checkpoint"),
    ],
)
def test_a_wrong_path_is_refused(given: str, words: str) -> None:
    """Never a start from the beginning."""
    fit(1)
    with pytest.raises(ld.CheckpointError, match=words):
        fit(2, resume=given)


@pytest.mark.parametrize("given", ["", True, 3])
def test_resume_is_a_word_or_a_path(given: Any) -> None:
    """Refused as a setting."""
    with pytest.raises(ld.SettingsError, match="resume is"):
        fit(1, resume=given)


def test_best_needs_a_monitor() -> None:
    """A run that ranked nothing has no best."""
    fit(1, checkpoint=ModelCheckpoint())
    with pytest.raises(ld.CheckpointError, match=r"'best': .* knows of none; a best one is kept by ModelCheckpoint"):
        fit(2, resume="best")


# ---- weights= --------------------------------------------------------------------------------------------------------


def test_weights_of_a_run_are_used() -> None:
    """By every evaluation; they are in the model afterwards."""
    run = fit(2)
    expected = {"last": run.metrics["val/loss"], "best": run.best_score}
    for word, loss in expected.items():
        assert ld.validate(Net(), DATA[1], weights=word, name="run", **QUIET)["val/loss"] == loss  # type: ignore[arg-type]
    model, other = Net(), Net()
    ld.load_weights(other, newest(run))
    for given in (newest(run), run.dir, str(run.dir / "checkpoints")):
        ld.test(model, DATA[1], weights=given, **QUIET)
        assert equal(weights(model), weights(other))
    assert len(list(ld.predict(Net(), DATA[1], weights="best", name="run", **QUIET))) == 2


@pytest.mark.parametrize("given", ["auto", "", True, 3])
def test_weights_that_may_be_missing_are_refused(given: Any) -> None:
    """An evaluation of untrained weights is never what was meant."""
    with pytest.raises(ld.SettingsError, match=r"weights is .*; allowed: 'best', 'last'"):
        ld.validate(Net(), DATA[1], weights=given, name="nothing", **QUIET)


@pytest.mark.parametrize("verb", ["validate", "test", "predict"])
def test_missing_weights_are_an_error(verb: str) -> None:
    """Also of `predict`, at the latest when the first output is asked for."""
    with pytest.raises(ld.CheckpointError, match="there is no checkpoint in runs/Net"):
        list(getattr(ld, verb)(Net(), DATA[1], weights="best", **QUIET))
    with pytest.raises(ld.CheckpointError, match=r"'bset' is no checkpoint.*did you mean 'best'\?"):
        list(getattr(ld, verb)(Net(), DATA[1], weights="bset", **QUIET))


# ---- moved, linked, deleted ------------------------------------------------------------------------------------------


def test_a_directory_that_was_moved_goes_on() -> None:
    """Nothing in a checkpoint is a path."""
    fit(1)
    shutil.move("runs", "archive")
    run = fit(2, root_dir="archive", resume="auto")
    assert (run.dir, run.global_step) == (Path("archive/run"), 12)
    assert newest(run).is_relative_to("archive/run")


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_links() -> None:
    """A folder of checkpoints may be a link, as to a larger disk; a link in the place of a checkpoint is not used."""
    Path("large").mkdir()

    class Links:
        @ld.on_fit_start
        def link(self, run: ld.Run) -> None:
            """Make it before the first save."""
            if not (run.dir / "checkpoints").exists():
                (run.dir / "checkpoints").symlink_to(Path("large").resolve())

    fit(1, callbacks=[Links()])
    run = fit(2, callbacks=[Links()], resume="auto")
    assert run.global_step == 12
    assert (Path("large") / newest(run).name).is_dir()
    Path("elsewhere").mkdir()
    Path("elsewhere/mine.txt").write_text("mine")
    (Path("large") / "step=00000018").symlink_to(Path("elsewhere").resolve())
    # Passed over with its reason, and neither written into nor deleted.
    with (
        pytest.warns(ld.LightdecoWarning, match="step=00000018"),
        pytest.raises(ld.CheckpointError, match="is no directory and is not replaced; move it away"),
    ):
        fit(3, callbacks=[Links()], resume="auto")
    assert [path.name for path in Path("elsewhere").iterdir()] == ["mine.txt"]


def test_a_directory_deleted_during_training_is_made_anew() -> None:
    """The end is saved; the records that were deleted are gone, which a resume says."""

    class Deletes:
        @ld.on_train_batch_end
        def delete(self, run: ld.Run) -> None:
            """Somebody cleans up."""
            if run.global_step == 3:
                shutil.rmtree(run.dir)

    run = fit(1, callbacks=[Deletes()], checkpoint=ModelCheckpoint(every_n_steps=2))
    assert [path.name for path in (run.dir / "checkpoints").iterdir()] == ["step=00000006"]
    with pytest.warns(ld.LightdecoWarning, match=r"metrics\.jsonl holds no record: .* global_step 6"):
        assert fit(2, resume="auto").global_step == 12


# ---- for people ------------------------------------------------------------------------------------------------------


def test_a_directory_can_be_looked_into() -> None:
    """`python -m lightdeco.checkpoint RUN_DIR` shows each checkpoint and fails for a damaged one."""
    from lightdeco.checkpoint.describe import describe

    run = fit(2)
    text, valid = describe(run.dir)
    assert valid
    assert all(f"{path.name}: valid" in text for path in (run.dir / "checkpoints").iterdir())
    (newest(run) / "state.json").write_text("{}")
    command = [sys.executable, "-m", "lightdeco.checkpoint", str(run.dir)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 1
    assert "state.json: has 2 bytes" in ended.stdout
