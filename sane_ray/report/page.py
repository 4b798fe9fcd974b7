"""A report as one HTML file that needs nothing else: pictures are inside it, there are no scripts and no links out.

A report is sections of blocks: text, lists, tables, pictures, code, and folded blocks. All text is escaped.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Protocol

from sane_ray.errors import InputError

SVG_LIMIT = 400_000
"""A larger drawing (in bytes) is put in as its PNG: it has very many marks."""

STYLE = """
:root { color-scheme: light dark; --ink: #222; --soft: #666; --line: #ddd; --paper: #fff; --tint: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --soft: #a5a5a5; --line: #3c4043; --paper: #17191b; --tint: #222629; }
}
body { margin: 0 auto; padding: 2rem 1.2rem 4rem; max-width: 62rem; color: var(--ink); background: var(--paper);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-bottom: .2rem; border-bottom: 1px solid var(--line); }
p, ul { margin: .5rem 0; overflow-wrap: anywhere; }
.lead { color: var(--soft); }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .28rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--soft); font-weight: 600; white-space: nowrap; }
td.number, th.number { text-align: right; white-space: nowrap; }
figure { margin: 1.2rem 0; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: 6px; padding: .4rem;
  box-sizing: border-box; border: 1px solid var(--line); }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .35rem; }
pre { background: var(--tint); padding: .8rem; border-radius: 6px; overflow-x: auto; font-size: .85rem; }
details { margin: .8rem 0; } summary { cursor: pointer; color: var(--soft); }
"""

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""The browser itself refuses whatever is not in the file."""


class Block(Protocol):
    """One thing in a section."""

    def html(self) -> str:
        """The block as HTML, escaped."""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str

    def html(self) -> str:
        """The block as HTML, escaped."""
        return f"<p>{escape(self.text)}</p>"


@dataclass(frozen=True)
class Items:
    """A list of sentences; nothing where there is none."""

    items: Sequence[str]

    def html(self) -> str:
        """The block as HTML, escaped."""
        return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in self.items)}</ul>" if self.items else ""


@dataclass(frozen=True)
class Code:
    """Commands or other text that keeps its lines."""

    text: str

    def html(self) -> str:
        """The block as HTML, escaped."""
        return f"<pre><code>{escape(self.text)}</code></pre>"


@dataclass(frozen=True)
class Bold:
    """A cell of a table that is to be seen first."""

    value: Any


@dataclass(frozen=True)
class Table:
    """Rows under named columns; a number, or text that begins with one, stands on the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""

    def html(self) -> str:
        """The block as HTML, escaped."""
        numeric = [all(_is_number(row[index]) for row in self.rows) for index in range(len(self.columns))]
        classes = [' class="number"' if number else "" for number in numeric]
        head = "".join(f"<th{kind}>{escape(name)}</th>" for name, kind in zip(self.columns, classes, strict=True))
        rows = (
            "".join(f"<td{kind}>{_cell(value)}</td>" for value, kind in zip(row, classes, strict=True))
            for row in self.rows
        )
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        caption = f"<caption>{escape(self.caption)}</caption>" if self.caption else ""
        table = f"<table>{caption}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        return f'<div class="wide">{table}</div>'


@dataclass(frozen=True)
class Picture:
    """A PNG or SVG file, put into the page; of a pair of the same name the SVG, unless it is very large."""

    path: Path
    caption: str = ""

    def html(self) -> str:
        """The block as HTML, escaped."""
        source, label = _data_uri(self.path), escape(self.caption, quote=True)
        return f'<figure><img alt="{label}" src="{source}"><figcaption>{label}</figcaption></figure>'


@dataclass(frozen=True)
class Folded:
    """Blocks that open with a click."""

    summary: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """The block as HTML, escaped."""
        inside = "".join(block.html() for block in self.blocks)
        return f"<details><summary>{escape(self.summary)}</summary>{inside}</details>"


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    def html(self) -> str:
        """The section as HTML, escaped."""
        return f"<section><h2>{escape(self.title)}</h2>{''.join(block.html() for block in self.blocks)}</section>"


def write_report(path: Path, title: str, sections: Sequence[Section], lead: str = "") -> Path:
    """Writes one self-contained HTML file.

    Args:
        path: file to write; its folder is made if missing. It is replaced in one step.
        title: heading of the page.
        sections: what stands below it; those without blocks are left out.
        lead: a sentence or two under the title.

    Returns:
        `path`.

    Raises:
        InputError: a picture is missing or neither PNG nor SVG.
    """
    body = "\n".join(section.html() for section in sections if section.blocks)
    head = f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
    head += '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{escape(title)}</title><style>{STYLE}</style>"
    top = f"<h1>{escape(title)}</h1>" + (f'<p class="lead">{escape(lead)}</p>' if lead else "")
    page = f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{top}\n{body}\n</body></html>\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(page, encoding="utf-8")
    part.replace(path)
    return path


def number(value: Any, digits: int = 3) -> str:
    """A number for a reader: whole ones as they are, others with `digits` decimals, ``–`` where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        small = 0 < abs(value) < 10**-digits
        return f"{value:.2g}" if small or abs(value) >= 1e5 else f"{value:.{digits}f}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cell(value: Any) -> str:
    if isinstance(value, Bold):
        return f"<strong>{_cell(value.value)}</strong>"
    return escape(number(value))


def _is_number(value: Any) -> bool:
    """Whether a cell is one, or is text that shows one: ``0.91 [0.88, 0.93]``."""
    if isinstance(value, Bold):
        return _is_number(value.value)
    shown = number(value)
    return shown in ("", "–") or shown.lstrip("-−")[:1].isdigit()


def _data_uri(path: Path) -> str:
    vector, raster = path.with_suffix(".svg"), path.with_suffix(".png")
    if path.suffix not in (".svg", ".png") or not (vector.is_file() or raster.is_file()):
        raise InputError(f"{path}: no such picture, or neither PNG nor SVG; draw it before the report is written")
    use_vector = vector.is_file() and (not raster.is_file() or vector.stat().st_size <= SVG_LIMIT)
    file, kind = (vector, "image/svg+xml") if use_vector else (raster, "image/png")
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode('ascii')}"
