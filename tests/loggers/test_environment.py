"""What a run was made with, without secrets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightdeco.loggers.environment import command, environment, git_commit


def _git(directory: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=directory, check=True, capture_output=True, text=True, timeout=20
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with one commit on the branch work/one."""
    folder = tmp_path / "repository"
    folder.mkdir()
    _git(folder, "init", "-q", "-b", "work/one")
    _git(folder, "commit", "-q", "--allow-empty", "-m", "first")
    return folder


def test_the_commit_is_what_git_says(repository: Path, tmp_path: Path) -> None:
    """On a branch, packed, detached, in a work tree, from a directory below: the commit is that of git."""
    commit = _git(repository, "rev-parse", "HEAD")
    below = repository / "a" / "b"
    below.mkdir(parents=True)
    assert git_commit(repository) == git_commit(below) == commit
    _git(repository, "pack-refs", "--all")
    assert git_commit(repository) == commit
    _git(repository, "worktree", "add", "-q", "-b", "two", str(tmp_path / "tree"))
    assert git_commit(tmp_path / "tree") == commit
    _git(repository, "commit", "-q", "--allow-empty", "-m", "second")
    second = _git(repository, "rev-parse", "HEAD")
    assert (git_commit(repository), git_commit(tmp_path / "tree")) == (second, commit)
    _git(repository, "checkout", "-q", "--detach", commit)
    assert git_commit(repository) == commit


def test_without_a_commit_it_is_none(tmp_path: Path) -> None:
    """Outside a repository, before the first commit and in a damaged one there is none, and no error."""
    assert git_commit(tmp_path / "nothing") is None
    _git(tmp_path, "init", "-q")
    assert git_commit(tmp_path) is None
    (tmp_path / ".git" / "HEAD").write_bytes(b"\xff\xfe")
    assert git_commit(tmp_path) is None


def test_secrets_of_the_command_are_masked() -> None:
    """Values of secret options, credentials in URLs and tokens are replaced, in one word and in two."""
    secret = ["--api-key", "abc", "--token=def", "--password=first second", "http://me:word@host/x"]
    given = ["train.py", *secret, "--lr", "0.1", "a b"]
    text = command(given)
    for word in ("abc", "def", "first", "second", "me:word"):
        assert word not in text
    assert text.startswith("train.py --api-key")
    assert text.endswith("--lr 0.1 'a b'")


def test_it_is_plain_and_holds_no_variables(tmp_path: Path) -> None:
    """In a process of its own: plain values, versions as they are, nothing of the environment's variables."""
    script = tmp_path / "script.py"
    script.write_text(
        "import json; from lightdeco.loggers.environment import environment; print(json.dumps(environment()))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), "--password", "hidden", "--lr", "1"],
        env={"PYTHONPATH": ":".join(sys.path), "MY_VARIABLE": "told", "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert found["torch"] == torch.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["command"].endswith("script.py --password *** --lr 1")
    assert found["git_commit"] is None
    assert "told" not in done.stdout
    assert "hidden" not in done.stdout
    assert set(found) == set(environment())
