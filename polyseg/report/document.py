"""Turn plain records into one self-contained HTML file.

Records may be untrusted. All text is escaped, invisible control characters are shown as U+FFFD,
pictures are embedded as data URLs, and the page's Content-Security-Policy forbids connections, and
styles and scripts other than polyseg's. Equal records give equal pages, byte for byte.
"""

import base64
import hashlib
import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib import resources
from typing import Literal, NamedTuple, TypeAlias

from polyseg import INTENDED_USE

_PLAIN = r"[+−-]?\d[\d.,]*(e[+−-]?\d+)?"
_NUMBER = re.compile(
    rf"(< |± )?{_PLAIN}(( ±| to) {_PLAIN})?( \({_PLAIN}\)| \[{_PLAIN}, {_PLAIN}\]| –)?\**"
    r"|[\d–]+/[\d–]+/[\d–]+|(– ?)*|± –"
)
_LONGEST_LINE = 40
"""Largest length of a name that a table does not break into lines."""
_MEDIA = {"png": "image/png", "svg": "image/svg+xml"}


@dataclass(frozen=True)
class Text:
    """A text."""

    words: str
    tag: Literal["p", "h3", "pre"] = "p"
    """HTML element: a paragraph, a heading within a section, or preformatted text."""


@dataclass(frozen=True)
class Picture:
    """A figure with its caption."""

    data: bytes
    """A PNG or SVG file."""
    kind: Literal["png", "svg"]
    caption: str
    alternative: str
    """Description for readers who cannot see it."""
    wide: bool = False
    """Whether it takes the full width."""


@dataclass(frozen=True)
class Gallery:
    """Pictures in rows, side by side."""

    pictures: Sequence[Picture]


@dataclass(frozen=True)
class Table:
    """Rows of cells; the first names its row, and columns of numbers are aligned to the right."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Rows as long as the head; text after a line break is shown smaller, in a second line."""
    sortable: bool = False


@dataclass(frozen=True)
class Folded:
    """Blocks that are shown on demand."""

    title: str
    blocks: "Sequence[Block]"


Block: TypeAlias = Text | Gallery | Table | Folded


@dataclass(frozen=True)
class PageSection:
    """A part of the page with an entry in the table of contents."""

    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    title: str
    facts: Sequence[tuple[str, str]]
    """Names and values below the title."""
    warnings: Sequence[str]
    """Remarks such as files that could not be read."""
    sections: Sequence[PageSection]


def render(page: Page) -> str:
    """Return a page as the text of an HTML file.

    >>> text = render(Page("<b>", [("runs", "a & b")], [], [PageSection("One", [Text("1 < 2")])]))
    >>> "<h1>&lt;b&gt;</h1>" in text, "a &amp; b" in text, "<p>1 &lt; 2</p>" in text
    (True, True, True)
    """
    numbers = _Numbers(itertools.count(1), itertools.count(1))
    sections = "\n".join(
        f'<section id="part-{k}">\n<h2>{_text(section.title)}</h2>\n'
        + "\n".join(_block(block, numbers) for block in section.blocks)
        + "\n</section>"
        for k, section in enumerate(page.sections, start=1)
    )
    return f"""<!DOCTYPE html>
<html lang="en">
{_head(page.title)}
<body>
<header>
<h1>{_text(page.title)}</h1>
{_facts(page.facts)}
</header>
{_warnings(page.warnings)}{_contents(page.sections)}
<main>
{sections}
</main>
<footer><p>{INTENDED_USE}</p></footer>
<script>{_asset("script.js")}</script>
</body>
</html>
"""


class _Numbers(NamedTuple):
    """Counters of figures and tables."""

    figure: Iterator[int]
    table: Iterator[int]


def _head(title: str) -> str:
    style, script = _asset("style.css"), _asset("script.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; "
        f"script-src {_hash(script)}; base-uri 'none'; form-action 'none'"
    )
    return f"""<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{_text(title)}</title>
<style>{style}</style>
</head>"""


@cache
def _asset(name: str) -> str:
    return resources.files("polyseg.report").joinpath(name).read_text(encoding="utf-8")


def _hash(source: str) -> str:
    digest = hashlib.sha256(source.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _text(words: str) -> str:
    """Return text as HTML: escaped, with U+FFFD for controls, surrogates and direction marks."""
    shown = (
        c if c.isprintable() or c in "\n\t" or unicodedata.category(c) == "Zs" else "\ufffd"
        for c in words
    )
    return escape("".join(shown))


def _facts(facts: Sequence[tuple[str, str]]) -> str:
    rows = (f"<div><dt>{_text(name)}</dt><dd>{_text(value)}</dd></div>" for name, value in facts)
    return "<dl>\n" + "\n".join(rows) + "\n</dl>"


def _warnings(sentences: Sequence[str]) -> str:
    items = "\n".join(f"<li>{_text(sentence)}</li>" for sentence in sentences)
    return f'<aside aria-label="Remarks">\n<ul>\n{items}\n</ul>\n</aside>\n' if items else ""


def _contents(sections: Sequence[PageSection]) -> str:
    links = (
        f'<li><a href="#part-{k}">{_text(section.title)}</a></li>'
        for k, section in enumerate(sections, start=1)
    )
    return '<nav aria-label="Contents">\n<ol>\n' + "\n".join(links) + "\n</ol>\n</nav>"


def _block(block: Block, numbers: _Numbers) -> str:
    match block:
        case Text():
            return f"<{block.tag}>{_text(block.words)}</{block.tag}>"
        case Table():
            return _table(block, next(numbers.table))
        case Gallery():
            figures = (_figure(one, next(numbers.figure)) for one in block.pictures)
            return '<div class="gallery">\n' + "\n".join(figures) + "\n</div>"
        case Folded():
            inner = "\n".join(_block(one, numbers) for one in block.blocks)
            return f"<details>\n<summary>{_text(block.title)}</summary>\n{inner}\n</details>"


def _figure(picture: Picture, number: int) -> str:
    data = base64.b64encode(picture.data).decode()
    source = f"data:{_MEDIA[picture.kind]};base64,{data}"
    return (
        f'<figure class="{"wide " if picture.wide else ""}{picture.kind}">'
        f'<img src="{source}" alt="{_text(picture.alternative)}">'
        f"<figcaption><b>Figure {number}.</b> {_text(picture.caption)}</figcaption></figure>"
    )


def _table(table: Table, number: int) -> str:
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.head)
    right = [
        k > 0 and all(_NUMBER.fullmatch(cell.partition("\n")[0]) for cell in column)
        for k, column in enumerate(columns)
    ]
    style = [' class="number"' if one else "" for one in right]
    heads = (
        f'<th scope="col"{kind}>{_text(name)}</th>'
        for name, kind in zip(table.head, style, strict=True)
    )
    name, sortable = f"table-{number}", ' class="sortable"' if table.sortable else ""
    rows = "\n".join(_row(row, style) for row in table.rows)
    return f"""<p class="caption" id="{name}"><b>Table {number}.</b> {_text(table.caption)}</p>
<div class="scroll">
<table aria-labelledby="{name}"{sortable}>
<thead><tr>{"".join(heads)}</tr></thead>
<tbody>
{rows}
</tbody>
</table>
</div>"""


def _row(row: Sequence[str], style: Sequence[str]) -> str:
    kinds = [
        kind or (' class="long"' if len(cell) > _LONGEST_LINE else "")
        for cell, kind in zip(row, style, strict=True)
    ]
    first, *others = (f"{kind}>{_cell(cell)}" for cell, kind in zip(row, kinds, strict=True))
    cells = "".join(f"<td{one}</td>" for one in others)
    return f'<tr><th scope="row"{first}</th>{cells}</tr>'


def _cell(words: str) -> str:
    first, _, second = words.partition("\n")
    return _text(first) + (f"<small>{_text(second)}</small>" if second else "")
