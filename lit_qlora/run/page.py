"""Pages in HTML that load no other file: their style, their frame and their tables."""

from collections.abc import Sequence
from html import escape

Row = Sequence[object]

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 auto; padding: 1rem;
       max-width: 56rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 1rem 0 0; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; border-bottom: 1px solid #d8dee4; padding-bottom: .2rem; }
.sub, .note, dt { color: #57606a; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; margin: 1rem 0; }
.tile { background: #f6f8fa; border-radius: 6px; padding: .6rem .8rem; }
.tile b { display: block; font-size: 1.15rem; font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25rem .5rem; border-bottom: 1px solid #eaeef2; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { font-weight: 600; }
.data { white-space: pre-wrap; margin: .3rem 0; font-size: .9rem; overflow-wrap: anywhere; }
.words td { white-space: normal; overflow-wrap: anywhere; text-align: left; }
svg { width: 100%; max-width: 44rem; height: auto; display: block; margin: 0 auto; }
pre { background: #f6f8fa; border-radius: 6px; padding: .7rem .9rem; overflow-x: auto; font-size: .85rem; }
.answer { border-left: 3px solid #bf8700; padding: .1rem 0 .1rem .8rem; margin: .9rem 0; overflow-wrap: anywhere; }
.answer.good { border-color: #1a7f37; }
.answer p { margin: .2rem 0; white-space: pre-wrap; }
.answer span { color: #57606a; display: inline-block; min-width: 4.2rem; }
summary { cursor: pointer; }
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


def table(rows: Sequence[Row], header: Row = (), kind: str = "") -> str:
    """Write a table in HTML; the kind "words" wraps its lines."""

    def line(cells: Row, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    head = line(header, "th") if header else ""
    return f'<div class="wide"><table class="{kind}">{head}{"".join(line(row, "td") for row in rows)}</table></div>'
