"""What a run was made with: versions, the commit and the command, without secrets."""

import importlib.metadata
import platform
import shlex
import sys
from pathlib import Path

import torch

from .masking import MASK, mask, mask_text

_PACKAGES = ("lightdeco", "accelerate", "numpy")


def environment() -> dict[str, object]:
    """Versions of Python, torch, lightdeco, accelerate and NumPy, the platform, the command and the git commit.

    Secrets in the command are masked. There is no source code in it, no environment variable, no name of a user or
    machine. The commit is that of the repository that holds the script (or the present directory), or None; it is read
    from `.git`, so no program is started. Whether files were changed since is not known.

    >>> sorted(environment())
    ['accelerate', 'command', 'git_commit', 'lightdeco', 'numpy', 'platform', 'python', 'torch']
    """
    found: dict[str, object] = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _PACKAGES:
        found[package] = _version(package)
    found["platform"] = f"{platform.system()}-{platform.release()}-{platform.machine()}"
    found["command"] = command(sys.argv)
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    found["git_commit"] = git_commit(script.parent if script.is_file() else Path.cwd())
    return found


def command(arguments: list[str]) -> str:
    """A command line as text, with the values of secret options replaced.

    >>> command(["train.py", "--token", "abc", "--password=a b", "--lr", "0.1"])
    'train.py --token *** --password=*** --lr 0.1'
    """
    masked = mask({"command": list(arguments)})["command"]
    assert isinstance(masked, list)
    return mask_text(" ".join(word if word.endswith(MASK) else shlex.quote(word) for word in map(str, masked)))


def git_commit(directory: Path) -> str | None:
    """The commit that is checked out in the git repository that holds a directory, or None.

    >>> git_commit(Path("/")) is None
    True
    """
    try:
        place = directory.resolve()
        git = next((parent / ".git" for parent in (place, *place.parents) if (parent / ".git").exists()), None)
        return None if git is None else _head(git)
    except (OSError, ValueError):  # not to be read: then it is not known
        return None


def _head(git: Path) -> str | None:
    if git.is_file():  # a work tree or a submodule: a line that names the real place
        git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref: "):
        return head or None
    name, shared = head.removeprefix("ref: "), git / "commondir"
    common = git / shared.read_text(encoding="utf-8").strip() if shared.is_file() else git
    for place in (git, common):
        if (place / name).is_file():
            return (place / name).read_text(encoding="utf-8").strip() or None
    packed = common / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    return next((line.split(" ")[0] for line in lines if line.endswith(f" {name}")), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        return None
