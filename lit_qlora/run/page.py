"""Pages in HTML that load no other file: their style, their frame and their tables."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_text

Row = Sequence[object]


@dataclass(frozen=True)
class Html:
    """A cell that is HTML already."""

    html: str


STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1b1f24; --soft: #57606a; --box: #f6f8fa; --line: #d8dee4;
        --good: #1a7f37; --bad: #b35900; }
@media (prefers-color-scheme: dark) {
  :root { --page: #0d1117; --text: #e6edf3; --soft: #9198a1; --box: #161b22; --line: #30363d; --good: #3fb950;
          --bad: #e3932c; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); margin: 0 auto;
       padding: 1rem; max-width: 60rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1rem 0 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
.sub, .note, dt { color: var(--soft); }
.good { color: var(--good); }
.bad { color: var(--bad); }
.tiles { display: grid; grid-auto-flow: column; grid-auto-columns: 1fr; gap: .6rem; margin: 1rem 0; }
.tile { background: var(--box); border-radius: 6px; padding: .6rem .7rem; font-size: .85rem; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap;
         vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
.data { white-space: pre-wrap; margin: .3rem 0; font-size: .9rem; overflow-wrap: anywhere; }
.words { width: 100%; }
.words th { text-align: left; }
.words td { white-space: pre-wrap; overflow-wrap: anywhere; text-align: left; }
.words td:last-child { width: 60%; }
.even { table-layout: fixed; }
.even td:last-child { width: auto; }
.scored th:first-child { width: 3rem; }
svg { width: 100%; max-width: 44rem; height: auto; display: block; margin: 0 auto; }
svg text { fill: currentColor; }
pre { background: var(--box); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
details { margin: .3rem 0; white-space: pre-wrap; }
td details { font-size: .85em; color: var(--soft); }
summary { cursor: pointer; color: var(--soft); }
@media (max-width: 40rem) {
  .tiles { grid-auto-flow: row; grid-template-columns: 1fr 1fr; }
  .texts, .texts tbody, .texts tr, .texts td, .texts td:last-child {
    display: block; width: auto; padding: .1rem 0; border: 0; }
  .texts tr { border-bottom: 1px solid var(--line); padding: .5rem 0; }
  th, td { padding: .25rem .35rem; }
  .texts tr:has(th) { display: none; }
  .texts td::before { content: attr(data-name) " "; color: var(--soft); } }
"""


def document(title: str, body: str, style: str = "") -> str:
    """Put a body into a page.

    Args:
        style: CSS after that of all pages.
    """
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}{style}</style></head>\n<body>\n"
        f"<h1>{escape(title)}</h1>\n{body}</body>\n</html>\n"
    )


def sections(parts: Sequence[tuple[str, str]]) -> str:
    """Put a heading before each part; a part without content is left out."""
    return "".join(f"<h2>{escape(title)}</h2>\n{content}\n" for title, content in parts if content)


def add_section(path: Path, title: str, content: str) -> None:
    """Put a section before the first one of a page on the disk; one with the same title goes."""
    earlier = re.compile(rf"<h2>{re.escape(escape(title))}</h2>.*?(?=<h2>|</body>)", re.DOTALL)
    page = earlier.sub("", read_text(path))
    write_text(path, page.replace("<h2>", f"{sections([(title, content)])}<h2>", 1), errors="backslashreplace")


def table(rows: Sequence[Row], header: Row = (), kind: str = "") -> str:
    """Write a table in HTML.

    Args:
        kind: "words" wraps its lines, "texts" turns each row into a list on a narrow screen, "even" gives all columns
            the same width but, with "scored", the first.
    """
    names = [escape(str(name)) for name in header]
    head = f"<tr>{''.join(f'<th>{name}</th>' for name in names)}</tr>" if names else ""
    lines = "".join(f"<tr>{''.join(_cells(row, names if 'texts' in kind else ()))}</tr>" for row in rows)
    return f'<div class="wide"><table class="{kind}">{head}{lines}</table></div>'


def _cells(row: Row, names: Sequence[str]) -> Iterator[str]:
    for number, cell in enumerate(row):
        name = f' data-name="{names[number]}"' if names else ""
        yield f"<td{name}>{cell.html if isinstance(cell, Html) else escape(str(cell))}</td>"


def folded(summary: str, text: str) -> str:
    """Show the summary, and the text when it is opened."""
    return f"<details><summary>{escape(summary)}</summary>{text}</details>"
