"""A checkpoint is there whole or not at all: kills, full disks, read-only folders, leftovers, links, replacements."""

import os
import random
import stat
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from lightdeco import CheckpointError
from lightdeco.checkpoint import State, load, newest_valid, prune, save, storage
from lightdeco.checkpoint.manifest import check_files, read_manifest


def state(number: int) -> State:
    """A state in which every part says its number."""
    whole = torch.full((1000,), float(number))
    return State(
        model={"w": whole, "v": whole[:3]},
        optimizers={"a": {"state": {0: {"m": whole * 2}}, "param_groups": []}},
        random={"torch": whole.to(torch.uint8)},
        progress={"global_step": number},
    )


def number_of(path: Path) -> int:
    """The number of a checkpoint all of whose parts agree."""
    found = load(path)
    parts = {float(value) for tensor in found.model.values() for value in tensor}
    parts |= {float(value) / 2 for value in found.optimizers["a"]["state"][0]["m"]}
    parts |= {float(value) for value in found.random["torch"]} | {found.progress["global_step"]}
    (number,) = parts
    return int(number)


def run(script: str, *arguments: object) -> str:
    """What a script prints that runs in a process of its own."""
    command = [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# A child is forked for each place at which it dies: before its n-th call of the system that changes anything, or after
# its n-th written byte. Syncing is counted and left out, since a kill loses no page of the kernel.
KILLS = """
    import os, shutil, signal, sys
    from pathlib import Path
    import torch
    from lightdeco import checkpoint
    from tests.test_storage import number_of, state

    torch.set_num_threads(1)
    CALLS = ("mkdir", "write", "fsync", "rename", "unlink", "rmdir")
    root, real_write, real_fsync = Path(sys.argv[1]), os.write, os.fsync


    def die():
        os.kill(os.getpid(), signal.SIGKILL)


    def at_call(limit):
        count = 0

        def counted(call):
            def wrapped(*arguments, **named):
                nonlocal count
                count += 1
                if count == limit:
                    die()
                return call(*arguments, **named)

            return wrapped

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name) if name != "fsync" else lambda fd: None))


    def at_byte(limit):
        written = 0

        def write(fd, data):
            nonlocal written
            if written + len(data) > limit:
                real_write(fd, data[: limit - written])
                die()
            written += len(data)
            return real_write(fd, data)

        os.write, os.fsync = write, lambda fd: None


    def work(folder, done):
        checkpoint.save(folder, "step=2", state(2))
        real_write(done, b"2")
        checkpoint.save(folder, "step=1", state(3))
        real_write(done, b"3")
        checkpoint.prune(folder, {"step=1"})
        real_write(done, b"p")
        checkpoint.save(folder, "step=1", state(4))
        real_write(done, b"4")


    def killed(patch):
        folder = root / "checkpoints"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(root / "first", folder)
        ours, theirs = os.pipe()
        child = os.fork()
        if not child:
            patch()
            work(folder, theirs)
            os._exit(0)
        os.close(theirs)
        status = os.waitpid(child, 0)[1]
        finished = os.read(ours, 9)
        os.close(ours)
        path, passed = checkpoint.newest_valid(folder)
        assert not passed, passed
        wanted = {b"": (1, 2), b"2": (2, 3), b"23": (3,), b"23p": (3, 4), b"23p4": (4,)}[finished]
        assert number_of(path) in wanted, (finished, path)
        if b"p" in finished:
            assert {entry.name for entry in folder.iterdir()} == {"step=1"}, list(folder.iterdir())
        assert not [entry for entry in folder.iterdir() if entry.name.startswith(".")], list(folder.iterdir())
        assert status in (0, signal.SIGKILL), status
        return status != 0


    os.fsync = lambda fd: None
    checkpoint.save(root / "first", "step=1", state(1))
    os.fsync = real_fsync
"""


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_killed_at_any_call(tmp_path: Path) -> None:
    """SIGKILL between any two changes in saving, replacing and pruning leaves the newest finished checkpoint."""
    end = """
    limit = 1
    while killed(lambda: at_call(limit)):
        limit += 1
    print(limit)
    """
    assert int(run(KILLS + end, tmp_path)) > 60


@pytest.mark.skipif(os.name == "nt", reason="forks")
def test_killed_at_any_byte(tmp_path: Path) -> None:
    """SIGKILL in the middle of any file leaves the newest finished checkpoint; nothing partial is chosen."""
    size = 3 * sum(file.stat().st_size for file in save(tmp_path, "size", state(1)).iterdir())
    offsets = [0, 1, size // 3, *random.Random(5).sample(range(size - 100), 12)]
    end = f"""
    print([killed(lambda: at_byte(limit)) for limit in {offsets}])
    """
    assert run(KILLS + end, tmp_path).strip() == str([True] * len(offsets))


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_disk_full(tmp_path: Path) -> None:
    """A file that cannot grow is a CheckpointError with the system's reason; the rest is as it was, nothing is left."""
    save(tmp_path, "step=1", state(1))
    script = """
    import resource, sys
    from pathlib import Path
    from lightdeco import CheckpointError
    from lightdeco.checkpoint import save
    from tests.test_storage import state

    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    for name in ("step=1", "step=2"):
        try:
            save(Path(sys.argv[1]), name, state(2))
        except CheckpointError as error:
            print(error)
    """
    printed = run(script, tmp_path).splitlines()
    assert len(printed) == 2
    assert all("could not be written: File too large (EFBIG, errno 27)" in line for line in printed)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step=1"]
    assert number_of(tmp_path / "step=1") == 1


@pytest.mark.skipif(os.name == "nt", reason="users of POSIX")
def test_read_only_folder(tmp_path: Path) -> None:
    """A folder that may not be written is a CheckpointError; reading and finding work in it."""
    tmp_path.chmod(0o755)
    folder = tmp_path / "checkpoints"
    save(folder, "step=1", state(1))
    folder.chmod(0o555)
    script = """
    import os, sys
    from pathlib import Path
    from lightdeco import CheckpointError
    from lightdeco.checkpoint import newest_valid, prune, save
    from tests.test_storage import number_of, state

    os.chdir(sys.argv[1])
    if os.getuid() == 0:
        os.setuid(65534)
    folder = Path("checkpoints")
    for job in (lambda: save(folder, "step=2", state(2)), lambda: prune(folder, {"step=1"})):
        try:
            job()
        except CheckpointError as error:
            print(error)
    print(number_of(newest_valid(folder)[0]))
    """
    printed = run(script, tmp_path).splitlines()
    assert "could not be written: Permission denied (EACCES, errno 13)" in printed[0]
    assert printed[1:] == ["1"]
    folder.chmod(0o755)


def test_folder_is_made_again(tmp_path: Path) -> None:
    """A folder that is not there, or was deleted, is made; deleted in the middle of a save it is a CheckpointError."""
    folder = tmp_path / "a" / "b"
    assert number_of(save(folder, "step=1", state(1))) == 1

    def lost(temporary: Path) -> dict[str, storage.Record]:
        os.rename(folder, tmp_path / "elsewhere")
        return {}

    with pytest.raises(CheckpointError, match=r"could not be written: No such file or directory \(ENOENT"):
        storage.write(folder, "step=2", lost, {})
    assert number_of(save(folder, "step=3", state(3))) == 3


def test_failure_at_each_call_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever call of the system fails, replacing leaves a valid checkpoint of that name and no other file."""
    for call in ("mkdir", "write", "fsync", "rename"):
        for turn in range(1, 3):
            save(tmp_path, "step=1", state(1))
            calls = 0
            with monkeypatch.context() as patch:
                real = getattr(os, call)

                def failing(*arguments: object, real: object = real, turn: int = turn, **named: object) -> object:
                    nonlocal calls
                    calls += 1
                    if calls == turn:
                        raise OSError(28, "No space left on device")
                    return real(*arguments, **named)  # type: ignore[operator]

                patch.setattr(os, call, failing)
                if (call, turn) == ("mkdir", 2):  # there is one
                    continue
                with pytest.raises(CheckpointError, match=r"No space left on device \(ENOSPC, errno 28\)"):
                    save(tmp_path, "step=1", state(2))
            assert [entry.name for entry in tmp_path.iterdir()] == ["step=1"], (call, turn)
            assert number_of(tmp_path / "step=1") == 1


def test_ctrl_c_in_the_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KeyboardInterrupt passes as it is and leaves nothing behind."""
    save(tmp_path, "step=1", state(1))
    monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, "step=1", state(2))
    assert [entry.name for entry in tmp_path.iterdir()] == ["step=1"]


def test_what_is_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that keeps something else than was written is found before the checkpoint counts."""
    real = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: real(fd, bytes(data).replace(b"\0\0\x80\x3f", b"\0\0\x80\x3e")))
        with pytest.raises(CheckpointError, match="damaged"):
            save(tmp_path, "step=1", state(1))
    assert list(tmp_path.iterdir()) == []


def leftover(folder: Path, kind: str, host: str | None = None, pid: int | None = None, name: str = "step=1") -> Path:
    """A hidden directory as a process that died may leave it."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    path = folder / f".{name}.{kind}-{host or storage._host()}-{pid or dead.pid}-0123abcd"
    path.mkdir(parents=True)
    (path / "model.safetensors").write_bytes(b"part")
    return path


def test_leftovers_of_the_dead_are_removed(tmp_path: Path) -> None:
    """Hidden directories of dead processes go at the next save or scan; so do those of this process's number."""
    for job in (lambda: save(tmp_path, "step=1", state(1)), lambda: newest_valid(tmp_path)):
        for kind in ("new", "gone"):
            leftover(tmp_path, kind)
            leftover(tmp_path, kind, pid=os.getpid())
        job()
        assert [entry.name for entry in tmp_path.iterdir()] == ["step=1"]


def test_what_is_not_ours_stays(tmp_path: Path) -> None:
    """Directories of living processes, of other machines and of anybody else stay; those of yesterday's machines go."""
    kept = [leftover(tmp_path, "new", pid=os.getppid()), leftover(tmp_path, "new", host="0123abcd")]
    old = leftover(tmp_path, "new", host="abcd0123")
    os.utime(old, (time.time() - 90_000,) * 2)
    others = [tmp_path / name for name in (".git", ".step=1.new", ".step=1.new-x-1-0123abcd", ".tmp-1")]
    for other in others:
        other.mkdir()
    save(tmp_path, "step=1", state(1))
    assert all(path.exists() for path in [*kept, *others])
    assert not old.exists()


def test_set_aside_is_put_back(tmp_path: Path) -> None:
    """Killed between the two renames of a replacement, the old one gets its name back, or is used where it lies."""
    path = save(tmp_path, "step=1", state(1))
    for host, names in ((None, {"step=1"}), ("0123abcd", {".step=1"})):
        aside = leftover(tmp_path, "old", host)
        (aside / "model.safetensors").unlink()
        aside.rmdir()
        path.rename(aside)
        found, passed = newest_valid(tmp_path)
        assert found is not None
        assert passed == []
        assert number_of(found) == 1
        assert {entry.name.partition(".old")[0] for entry in tmp_path.iterdir()} == names
    assert number_of(save(tmp_path, "step=1", state(2))) == 2


def test_umask_is_honoured(tmp_path: Path) -> None:
    """Files and directories have ordinary modes: what the umask leaves."""
    before = os.umask(0o027)
    try:
        path = save(tmp_path / "new", "step=1", state(1))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o640}
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (path, path.parent)} == {0o750}


def test_the_folder_of_temporary_files_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is written beside its target, on the same file system: $TMPDIR may be anything."""
    monkeypatch.setenv("TMPDIR", "/does/not/exist")
    opened = []
    real = os.open

    def watched(path: str | Path, *arguments: int) -> int:
        opened.append(Path(path))
        return real(path, *arguments)

    monkeypatch.setattr(os, "open", watched)
    save(tmp_path, "step=1", state(1))
    assert opened
    assert all(path == tmp_path or tmp_path in path.parents for path in opened)


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "/abs", ".hidden", "a\0b", "x" * 151, "a.", "a\n", "a:b"]
)
def test_bad_names_are_refused(name: str, tmp_path: Path) -> None:
    """A name that leads elsewhere, hides, or does not work on every system is refused before anything is written."""
    with pytest.raises(CheckpointError, match="cannot name a checkpoint"):
        save(tmp_path, name, state(1))
    assert list(tmp_path.iterdir()) == []


def test_names_may_be_unicode(tmp_path: Path) -> None:
    """Any letters will do, and what file names from metrics look like."""
    for name in ("größe=猫 🙂", "epoch=3-val_loss=0.25"):
        assert number_of(save(tmp_path, name, state(1))) == 1


def test_what_is_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    """A file or a link that has the name is neither replaced nor followed."""
    (tmp_path / "step=1").write_text("notes")
    target = tmp_path / "elsewhere"
    target.mkdir()
    (tmp_path / "step=2").symlink_to(target)
    for name in ("step=1", "step=2"):
        with pytest.raises(CheckpointError, match="is not replaced"):
            save(tmp_path, name, state(1))
    assert (tmp_path / "step=1").read_text() == "notes"
    assert list(target.iterdir()) == []


def test_serials_order_the_writing(tmp_path: Path) -> None:
    """The newest is the one that was written last, whatever its name, its step and the clock of the files say."""
    for name, number in (("step=9", 9), ("step=5", 5), ("step=7", 7)):
        path = save(tmp_path, name, state(number))
        os.utime(path, (1e9 - number, 1e9 - number))
    assert newest_valid(tmp_path) == (tmp_path / "step=7", [])
    save(tmp_path, "step=9", state(9))
    assert newest_valid(tmp_path) == (tmp_path / "step=9", [])
    assert [read_manifest(tmp_path / f"step={n}").serial for n in (5, 7, 9)] == [2, 3, 4]


def test_prune(tmp_path: Path) -> None:
    """All but the named are removed; what holds no file of a checkpoint stays; the last ones are never removed."""
    for number in range(4):
        save(tmp_path, f"step={number}", state(number))
    (tmp_path / "notes").mkdir()
    (tmp_path / "file").write_text("")
    (tmp_path / "best").symlink_to("step=1")
    with pytest.raises(CheckpointError, match="nothing is pruned"):
        prune(tmp_path, {"step=8"})
    assert prune(tmp_path, {"step=1", "step=8"}) == ["step=0", "step=2", "step=3"]
    assert {entry.name for entry in tmp_path.iterdir()} == {"step=1", "notes", "file", "best"}
    assert number_of(tmp_path / "step=1") == 1


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    """A link to another folder is passed over by name; a link inside the folder is no second checkpoint."""
    outside = save(tmp_path / "outside", "step=5", state(5))
    folder = tmp_path / "checkpoints"
    save(folder, "step=1", state(1))
    (folder / "last").symlink_to("step=1")
    (folder / "step=5").symlink_to(outside)
    found, passed = newest_valid(folder)
    assert found == folder / "step=1"
    assert [path.name for path, _ in passed] == ["step=5"]
    assert "leads out of its folder" in passed[0][1]
    assert number_of(folder / "last") == 1
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        load(folder / "step=5")


def test_links_and_pipes_in_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """Each file is an ordinary one; a pipe is not waited for."""
    for name in ("model.safetensors", "state.json", "manifest.json"):
        path = save(tmp_path, "step=1", state(1))
        outside = tmp_path / "copy"
        outside.write_bytes((path / name).read_bytes())
        for make in (lambda place, target: place.symlink_to(target), lambda place, target: os.mkfifo(place)):
            (path / name).unlink()
            make(path / name, outside)
            with pytest.raises(CheckpointError, match=rf"{name}: is (a link|a symbolic link|not an ordinary)"):
                load(path)
        (path / name).unlink()
        (path / name).write_bytes(outside.read_bytes())
        outside.unlink()


def test_extra_files(tmp_path: Path) -> None:
    """A file that the manifest does not list makes a checkpoint invalid; what file browsers hide does not."""
    path = save(tmp_path, "step=1", state(1))
    (path / ".DS_Store").write_bytes(b"")
    check_files(path)
    (path / "notes.txt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"notes\.txt: is not in manifest\.json; move it"):
        check_files(path)
