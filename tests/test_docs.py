"""The documentation is true: each Python block runs and prints what is said, each link leads somewhere."""

import ast
import contextlib
import io
import re
import subprocess
import sys
import types
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import lightdeco as ld

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


class Block(NamedTuple):
    """One fenced block: its language and further words, its text, and the line on which the text starts."""

    info: str
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    """The fenced blocks of a page, in order."""
    found = re.finditer(r"^```(\S[^\n]*)?\n(.*?)^```$", markdown, re.MULTILINE | re.DOTALL)
    return [Block(m[1] or "", m[2], markdown.count("\n", 0, m.start(2)) + 1) for m in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ```python block runs, after those before it; a ```text output block is the output (… leaves out)."""
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    printed = ""
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.info == "python":
            # Leading newlines make the line numbers of a traceback those of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed = output.getvalue()
        elif block.info == "text output":
            wanted = ".*".join(map(re.escape, block.text.strip().split("…")))
            assert re.search(wanted, printed), f"{page.name}:{block.line}: the block before printed {printed!r}"


def test_readme_has_two_commands() -> None:
    """The README gives exactly two commands, each in a block of its own: the main job and the tests."""
    commands = [block.text.strip() for block in blocks(README) if block.info == "bash"]
    assert commands == [
        'pip install -e ".[examples]" && python examples/digits.py',
        'pip install -r requirements.txt -e ".[dev]" && bash scripts/test',
    ]


def test_ci_runs_the_test_command() -> None:
    """`.ci/run` finds the README's test command the way it looks for it: on exactly one line."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    wanted = re.search(r"^command=\$\((grep [^)]*)\)$", script, re.MULTILINE)
    assert wanted
    found = subprocess.run(["bash", "-c", wanted[1]], cwd=ROOT, capture_output=True, text=True, check=True, timeout=20)
    assert found.stdout.splitlines() == ['pip install -r requirements.txt -e ".[dev]" && bash scripts/test']


def test_side_by_side_is_the_examples_code() -> None:
    """The README's two columns are, line for line, in the examples that a test proves bit-equal."""
    start, end = README.index("<table>"), README.index("</table>")
    by_hand, with_lightdeco = (b.text for b in blocks(README[start:end]) if b.info == "python")
    shared = next(b.text for b in blocks(README[:start]) if b.info == "python")
    plain = (ROOT / "examples" / "plain_pytorch.py").read_text(encoding="utf-8")
    digits = (ROOT / "examples" / "digits.py").read_text(encoding="utf-8")
    assert by_hand in plain
    assert with_lightdeco in digits
    definitions = shared[shared.index("SEED = ") :]
    assert definitions in plain
    assert definitions in digits


def test_readme_lists_every_setting() -> None:
    """The README's table lists each field of `Settings` with its default, in order, and nothing else."""
    rows = re.findall(r"^\| `(\w+)` \| `([^`]+)` \|", README, re.MULTILINE)
    defaults = [(field.name, field.default) for field in fields(ld.Settings)]
    assert [(name, ast.literal_eval(default)) for name, default in rows] == defaults


def test_readme_is_honest_about_names() -> None:
    """What the README uses exists; what it lists as not available yet does not, so that the list stays true."""
    available, _, missing = README.partition("Not available yet")
    assert [name for name in re.findall(r"\bld\.(\w+)", available) if not hasattr(ld, name)] == []
    assert [name for name in re.findall(r"\bld\.(\w+)", missing) if hasattr(ld, name)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """Each relative link of a page points at a file of the repository."""
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert missing == []
