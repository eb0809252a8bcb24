"""The documentation is true: each Python block runs and prints what is said, each link leads somewhere."""

import ast
import contextlib
import importlib.util
import io
import re
import subprocess
import sys
import textwrap
import types
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

import pytest

import lightdeco as ld
from lightdeco import loop
from lightdeco.roles import ROLES

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
def test_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Each ```python block runs, after those before it; a ```text output block is the output (… leaves out).

    A ```python needs=module block is left out, with its output, where the module is not installed.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    printed, skipped = "", False
    for block in blocks(page.read_text(encoding="utf-8")):
        kind, _, need = block.info.partition(" needs=")
        if kind == "python":
            skipped = bool(need) and importlib.util.find_spec(need) is None
        if kind == "python" and not skipped:
            # Leading newlines make the line numbers of a traceback those of the page.
            code = compile("\n" * (block.line - 1) + block.text, str(page), "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed = output.getvalue()
        elif block.info == "text output" and not skipped:
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


def test_settings_page_lists_every_setting() -> None:
    """`docs/settings.md` has a row for each field of `Settings` with its type and default, in order, and no other."""
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| `([^`]+)` \| [^|]+ \|$", page, re.MULTILINE)
    defaults = [(field.name, field.default) for field in fields(ld.Settings)]
    assert [(name, ast.literal_eval(default)) for name, _, default in rows] == defaults
    nullable = {name for name, kinds, _ in rows if "None" in kinds.split(", ")}
    assert nullable == {field.name for field in fields(ld.Settings) if "None" in str(field.type)}


def test_marks_page_is_the_table_of_roles() -> None:
    """`docs/marks.md` has a row for each role and event with exactly the arguments and owners that the code offers."""
    page = (ROOT / "docs" / "marks.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", page, re.MULTILINE)
    wanted = [
        (r.name, ", ".join(f"`{name}`" for name in r.offers) or "none", ", ".join(r.owners)) for r in ROLES.values()
    ]
    assert rows == wanted


def test_loop_page_shows_the_order_of_the_loop() -> None:
    """The order of events in `docs/loop.md` is that of the docstring of `loop.py`, which a test compares with a run."""
    page = (ROOT / "docs" / "loop.md").read_text(encoding="utf-8")
    order = next(block.text for block in blocks(page) if block.info == "text")
    assert loop.__doc__ is not None
    assert textwrap.indent(order, "    ") in loop.__doc__


def test_errors_page_quotes_messages_of_the_code() -> None:
    """Each message in `docs/errors.md` is in the source, piece by piece (… stands for what is put in)."""
    page = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    # Joined as Python joins literals that follow each other.
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "lightdeco").rglob("*.py")))
    code = re.sub(r"""["']\n\s*f?["']""", "", code)
    messages = re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)
    pieces = [piece.strip() for message in messages if " " in message for piece in message.split("…")]
    assert len(messages) > 30
    assert [piece for piece in pieces if piece not in code] == []


def test_index_lists_every_page() -> None:
    """`docs/README.md` links to each page beside it, and the README links to it."""
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert set(re.findall(r"\]\((\w+\.md)\)", index)) == pages
    assert "](docs/README.md)" in README


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
