"""Pages: `report` for one run, `compare` for several, and how a browser shows them."""

import importlib.util
import json
import math
import os
import re
import shutil
import socket
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

import lightdeco as ld
from lightdeco import checkpoint
from lightdeco.errors import LightdecoError
from lightdeco.loggers.metrics_file import MetricsFile
from lightdeco.reporting import compare, report

from .models import QUIET, Net, batches

pytest.importorskip("plotly")

EVIL = "<script>document.title='evil'</script><img src=x onerror=alert(1)>"


def _history(best: float = 0.5) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    for step in range(1, 61):
        records.append(
            {"stage": "train", "epoch": step // 20, "step": step, "time": 1e9 + step, "train/loss": 2 / step}
        )
        if step % 20 == 0:
            loss = best + abs(step - 40) / 10
            records.append(
                {"stage": "val", "epoch": step // 20 - 1, "step": step, "time": 1e9 + step, "val/loss": loss}
            )
    return records


def _directory(path: Path, history: list[dict[str, Any]], **state: Any) -> Path:
    """A run's directory with records, and with a checkpoint where parts of its state are given."""
    path.mkdir(parents=True)
    file = MetricsFile(path / "metrics.jsonl")
    for record in history:
        file.write(record)
    file.close()
    if state:
        checkpoint.save(path / "checkpoints", "step=00000060", checkpoint.State(**state))
    return path


class _Page(HTMLParser):
    """The tags of a page, its visible text, and the JSON of its figures."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.figures = "", []
        self._within: tuple[str, dict[str, str | None]] = ("", {})
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._within = self.tags[-1]

    def handle_endtag(self, tag: str) -> None:
        self._within = ("", {})

    def handle_data(self, data: str) -> None:
        if self._within[1].get("id") == "figures":
            self.figures = json.loads(data)
        elif self._within[0] not in ("script", "style"):
            self.text += f"{data}\n"


def test_a_run_gets_a_page_in_its_directory(tmp_path: Path) -> None:
    """The page of a run tells its curves, end, hyperparameters, settings, model, checkpoints and versions."""
    hparams = {"width": 16, "api_key": "s3cr3t-value"}
    run = ld.fit(Net(), (batches(), batches(2)), max_epochs=2, hparams=hparams, root_dir=tmp_path, seed=1, **QUIET)
    path = report(run)
    assert path == run.dir / "report.html"
    page = _Page(path)
    assert [figure["title"] for figure in page.figures][:2] == ["loss", "acc"]
    for part in ("finished: max_epochs reached", "width", "16", "max_epochs", "body", "Sequential", "torch", "8 steps"):
        assert part in page.text
    assert "step=00000008" in page.text
    assert "s3cr3t-value" not in path.read_text(encoding="utf-8")
    assert "***" in page.text


def test_a_directory_gives_the_same_curves_as_the_run(tmp_path: Path) -> None:
    """What is read from the files of a run draws the same curves, and no file of the run is changed."""
    run = ld.fit(Net(), (batches(), batches(2)), max_epochs=2, root_dir=tmp_path / "runs", seed=1, **QUIET)
    before = {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")}
    from_run = _Page(report(run, tmp_path / "run.html"))
    from_directory = _Page(report(str(run.dir), tmp_path / "directory.html"))
    assert from_directory.figures == from_run.figures
    assert "finished: max_epochs reached" in from_directory.text
    assert "body.0.weight" in from_directory.text
    assert {path: path.stat().st_mtime_ns for path in run.dir.rglob("*")} == before


def test_a_killed_run_gets_a_page(tmp_path: Path) -> None:
    """A torn last line, a lock of a dead process and a ruined checkpoint are told, and do not hinder the page."""
    path = _directory(tmp_path / "run", _history(), progress={"global_step": 60, "epoch": 3})
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "train", "st')
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    (path / "run.lock").write_text(f"process {ended.stdout.strip()} on {socket.gethostname()}\n")
    (path / "checkpoints" / "step=00000099").mkdir()
    page = _Page(report(path))
    assert "killed: process" in page.text
    assert "step=00000099" in page.text.partition("Could not be read")[2]
    assert page.figures[0]["title"] == "loss"


def test_a_run_that_goes_on_is_said_to(tmp_path: Path) -> None:
    """The lock of a living process means that the run goes on."""
    path = _directory(tmp_path / "run", _history())
    (path / "run.lock").write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert "still running" in _Page(report(path)).text


def test_texts_are_escaped_wherever_they_come_from(tmp_path: Path) -> None:
    """A name with markup in it is shown as it is: no element of the page is made of it."""
    history = [record | {f"train/{EVIL}": 1.0} for record in _history()]
    settings = {"max_epochs": 3, "name": EVIL}
    state = {"hparams": {EVIL: EVIL}, "settings": settings, "model": {EVIL: torch.zeros(2)}}
    path = _directory(tmp_path / "run", history, **state)
    (path / "profile.txt").write_text(f"total {EVIL}")
    for page in (_Page(report(path)), _Page(compare({EVIL: path, "b": path}, tmp_path / "c.html").path or path)):
        assert sum(tag == "script" for tag, _ in page.tags) == 3  # the figures, the library, the script of the page
        assert not [attrs for tag, attrs in page.tags if tag == "img" or any(name.startswith("on") for name in attrs)]
        assert EVIL in page.text


def test_a_page_names_no_address(tmp_path: Path) -> None:
    """Outside of the library's own source a page refers to nothing, and its policy forbids to fetch."""
    path = report(_directory(tmp_path / "run", _history()))
    page = _Page(path)
    assert [attrs for _, attrs in page.tags if "src" in attrs] == []
    assert [attrs["href"] for _, attrs in page.tags if "href" in attrs] == ["data:,"]
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_values_that_are_not_finite_are_gaps_and_counted(tmp_path: Path) -> None:
    """NaN and infinities are null in the figures, and the legend says how many there are and since when."""
    history = [{"stage": "val", "epoch": 0, "step": s, "val/loss": math.nan if s > 2 else 1 / s} for s in range(1, 5)]
    page = _Page(report(_directory(tmp_path / "run", history)))
    assert page.figures[0]["traces"][0]["y"] == [1.0, 0.5, None, None]
    assert "best 0.5 at step 2, epoch 1; 2 not finite, from step 3" in page.text


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    """A directory without records is refused, with the directory that was perhaps meant."""
    _directory(tmp_path / "Net" / "version_0", _history())
    with pytest.raises(LightdecoError, match=r"no directory of a run.*did you mean '.*version_0'"):
        report(tmp_path / "Net")
    with pytest.raises(LightdecoError, match="allowed: a Run, or the path"):
        report(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def test_a_run_without_a_directory_needs_a_path(tmp_path: Path) -> None:
    """A run that writes nothing has no place for its page but the one that is given."""
    run = ld.fit(Net(), batches(), fast_dev_run=True, **QUIET)
    with pytest.raises(LightdecoError, match="give the report a path"):
        report(run)
    assert report(run, tmp_path / "deep" / "page.html").is_file()


def test_without_plotly_the_pip_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing plotly is an error that says what to install."""
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(LightdecoError, match=r"pip install lightdeco\[report\]"):
        report(_directory(tmp_path / "run", _history()))


def test_compare_finds_what_differs_and_what_is_best(tmp_path: Path) -> None:
    """The table holds what differs, final and best values; the best of them are named."""
    settings = {"max_epochs": 3, "log_every_n_steps": 50}
    progress = {"global_step": 60, "epoch": 3}
    for name, lr, best in (("a", 0.1, 0.5), ("b", 0.2, 0.25)):
        more = {"gradient_clip_val": 1.0} if name == "b" else {}
        hparams = {"lr": lr, "width": 8}
        _directory(tmp_path / name, _history(best), hparams=hparams, settings=settings | more, progress=progress)
    compared = compare([tmp_path / "a", tmp_path / "b"])
    assert compared.path is None
    first, second = compared.table
    assert list(first) == list(second)
    assert {"hparams/width", "settings/max_epochs"}.isdisjoint(first)
    assert (first["hparams/lr"], second["hparams/lr"]) == (0.1, 0.2)
    assert (first["settings/gradient_clip_val"], second["settings/gradient_clip_val"]) == (None, 1.0)
    assert (first["best/val/loss"], first["final/val/loss"], second["best/val/loss"]) == (0.5, 2.5, 0.25)
    assert compared.best["best/val/loss"] == ["b"]
    assert re.search(r"best/val/loss +0\.5 +0\.25 \*", str(compared))


def test_compare_lays_the_curves_over_each_other(tmp_path: Path) -> None:
    """The page has one plot for each metric with a curve of each run, one colour for a run, and marks the best."""
    paths = [_directory(tmp_path / name, _history(best)) for name, best in (("a", 0.5), ("b", 0.25))]
    compared = compare(paths, tmp_path / "compared.html")
    assert compared.path == tmp_path / "compared.html"
    page = _Page(tmp_path / "compared.html")
    assert [figure["title"] for figure in page.figures] == ["val/loss", "train/loss"]
    keys = [[(key["label"], key["colour"]) for key in figure["keys"]] for figure in page.figures]
    assert keys[0] == keys[1]
    assert [name for name, _ in keys[0]] == ["a", "b"]
    assert "0.25 ★" in page.text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """Names are the ends of the paths, as long as needed; the same run twice gets a number."""
    paths = [_directory(tmp_path / name / "version_0", _history()) for name in ("a", "b")]
    assert [row["run"] for row in compare([*paths, paths[0]]).table] == [
        "a/version_0",
        "b/version_0",
        "a/version_0 (2)",
    ]


@pytest.mark.parametrize("wrong", [[], "runs/a", 3], ids=["none", "a text", "a number"])
def test_compare_refuses_what_is_no_list_of_runs(wrong: Any) -> None:
    """Nothing to compare is refused with what is allowed."""
    with pytest.raises(LightdecoError, match="compare got"):
        compare(wrong)


# ---- in a browser ----------------------------------------------------------------------------------------------------


def _browser() -> str:
    names = ("chromium", "chromium-browser", "google-chrome", "chrome-headless-shell")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: none of {', '.join(names)} is on the PATH")
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib, which reads the screenshot, is not installed")
    return found


def _screenshot(page: Path, width: int, height: int) -> tuple[Any, str]:
    """The pixels (height, width, 3) in 0..1 of a page, and what its console said."""
    target = page.with_suffix(".png")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    options += ["--no-first-run", "--disable-background-networking", "--disable-component-update"]
    options += ["--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--virtual-time-budget=5000"]
    options += [f"--user-data-dir={page.parent / 'profile'}", f"--window-size={width},{height}"]
    command = [_browser(), *options, f"--screenshot={target}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert target.is_file(), done.stderr[-2000:]
    from matplotlib.image import imread

    return imread(target)[:, :, :3], "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def test_the_console_is_heard(tmp_path: Path) -> None:
    """What the policy of a page forbids is seen by the test below: a foreign script and an image from the network."""
    path = report(_directory(tmp_path / "run", _history()))
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("</main>", '<script>1</script><img src="http://192.0.2.1/a.png"></main>'))
    _, console = _screenshot(path, 390, 844)
    assert len(re.findall("violates the following Content Security Policy", console)) == 2


@pytest.mark.parametrize("size", [(1200, 800), (390, 844)], ids=["desk", "phone"])
def test_a_browser_draws_the_curves(tmp_path: Path, size: tuple[int, int]) -> None:
    """Headless Chromium shows curves in their colours, and its console tells of no error and no forbidden request."""
    history = [record | {f"train/{EVIL}": 1.0} for record in _history()]
    pixels, console = _screenshot(report(_directory(tmp_path / "run", history)), *size)
    assert console == ""
    for colour in ((0x3B, 0x82, 0xD6), (0xE5, 0x60, 0x4D)):  # the first two of the palette: training and validation
        near = (abs(pixels - [part / 255 for part in colour]) < 0.06).all(axis=2)
        columns = near.any(axis=0).nonzero()[0]
        assert near.sum() > 150
        assert columns[-1] - columns[0] > 0.25 * min(size[0], 560)  # a curve across the plot, not a key in the legend
