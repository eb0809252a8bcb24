"""HTML: pages that need nothing but themselves, tables, tiles and panels. Every text is escaped here."""

import base64
import hashlib
import html
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path

from lightdeco.errors import LightdecoError

from .assets import SCRIPT, STYLE
from .figures import Figure

_LONGEST = 2000  # characters of one cell


def write(path: Path, text: str) -> Path:
    """Write a page and return its path.

    Raises:
        LightdecoError: the system refused.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise LightdecoError(f"the page cannot be written to {str(path)!r}: {error}; give another path") from error
    return path


def page(title: str, body: str, figures: Sequence[Figure]) -> str:
    """A whole page. Its policy lets the browser run the two scripts of lightdeco and fetch nothing.

    Raises:
        LightdecoError: plotly is not installed.
    """
    library = plotly() if figures else ""
    script = SCRIPT if figures else ""
    hashes = " ".join(f"'sha256-{_digest(text)}'" for text in (library, script) if text)
    policy = (
        f"default-src 'none'; script-src {hashes or repr('none')}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    # "<" as an escape: no text of a user can end the block of JSON.
    data = json.dumps(figures, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    scripts = (
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>{library}</script>\n<script>{script}</script>\n"
        if figures
        else ""
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="lightdeco">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n"
        f'<p class="soft" style="margin-top:32px">written {_now()} by lightdeco; times are UTC</p>\n</main>\n'
        f"{scripts}</body>\n</html>\n"
    )


def plotly() -> str:
    """The source of plotly.js, about 5 MB.

    Raises:
        LightdecoError: plotly is not installed.
    """
    try:
        offline = importlib.import_module("plotly.offline")  # it has no type information
    except ImportError as error:
        raise LightdecoError("a report needs plotly; install it with `pip install lightdeco[report]`") from error
    # As it lies in the page: a browser reads every end of line as "\n", and the policy knows the script by its hash.
    return str(offline.get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")


def escape(value: object) -> str:
    """A value as text that HTML shows as it is, shortened where it is very long."""
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    return html.escape(text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…")


def section(title: str, *parts: str) -> str:
    """A heading and what belongs below it; nothing where all parts are empty."""
    content = "\n".join(part for part in parts if part)
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>" if content else ""


def tiles(values: Mapping[str, tuple[object, str]]) -> str:
    """Cards with a name, a large value and a remark each."""
    cards = (
        f'<div class="card tile"><span class="soft">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="soft">{escape(remark)}</span></div>'
        for name, (value, remark) in values.items()
    )
    return f'<div class="tiles">{"".join(cards)}</div>' if values else ""


def pairs(values: Mapping[str, object], title: str = "") -> str:
    """A card with a table of names and values."""
    rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in values.items())
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f'<div class="card">{head}<div class="wide"><table>{rows}</table></div></div>' if values else ""


def table(rows: Sequence[Mapping[str, object]], right: Iterable[str] = (), note: str = "") -> str:
    """A card with a table; columns that are empty in every row are left out, those in `right` hold numbers."""
    columns = [name for name in (rows[0] if rows else ()) if any(row[name] not in ("", None) for row in rows)]
    if not columns:
        return ""
    numbers = dict.fromkeys(right, ' class="n"')
    head = "".join(f"<th{numbers.get(name, '')}>{escape(name)}</th>" for name in columns)
    lines = (
        "".join(f"<td{numbers.get(n, '')}>{escape('' if row[n] is None else row[n])}</td>" for n in columns)
        for row in rows
    )
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    below = f'<p class="soft" style="margin-top:8px">{escape(note)}</p>' if note else ""
    return f'<div class="card"><div class="wide"><table class="rows"><tr>{head}</tr>{body}</table></div>{below}</div>'


def folded(summary: str, content: str) -> str:
    """Content that is shown on demand."""
    return f'<details class="card"><summary>{escape(summary)}</summary>{content}</details>'


def panels(figures: Sequence[Figure], with_keys: bool = True) -> str:
    """A card for each figure: title, plot, and the keys of its curves."""
    cards = []
    for i, figure in enumerate(figures):
        keys = "".join(_key(key, f'data-figure="{i}" data-key="{k}"') for k, key in enumerate(figure["keys"]))
        below = f'<div class="keys">{keys}</div>' if with_keys else _notes(figure)
        label = f'role="img" aria-label="{escape(figure["title"])}"'
        cards.append(
            f'<div class="card"><h3>{escape(figure["title"])}</h3><div class="plot" {label}></div>{below}</div>'
        )
    bar = '<div class="bar"><label><input type="checkbox" id="log"> logarithmic values</label></div>'
    return f'{bar}<div class="panels">{"".join(cards)}</div>' if cards else ""


def run_keys(colours: Mapping[str, str]) -> str:
    """The legend that all panels of a comparison share."""
    keys = (
        _key({"label": name, "colour": colour, "dash": False, "note": ""}, f'data-run="{escape(name)}"')
        for name, colour in colours.items()
    )
    return f'<div class="keys" id="runs">{"".join(keys)}</div>'


def _key(key: Mapping[str, object], data: str) -> str:
    dash = ' class="dash"' if key["dash"] else ""
    note = f" ({escape(key['note'])})" if key["note"] else ""
    colour = escape(key["colour"])
    return (
        f'<button type="button" aria-pressed="true" {data}><i{dash} style="border-color:{colour}"></i>'
        f"{escape(key['label'])}{note}</button>"
    )


def _notes(figure: Figure) -> str:
    notes = [f"{key['label']}: {key['note']}" for key in figure["keys"] if key["note"]]
    return f'<p class="soft">{escape("; ".join(notes))}</p>' if notes else ""


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S")
