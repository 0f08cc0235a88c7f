"""Draw the way from a file to a merged model, in the words of the modules.

python docs/draw_way.py writes docs/way.svg.
"""

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path
from textwrap import wrap

ROOT = Path(__file__).parents[1]
STAGES = {
    "file": ("data/sources", "data/formats"),
    "ids": ("prompts/style", "prompts/tokenizer", "data/encode", "data/audit"),
    "rows": ("data/batches",),
    "blocks": ("model/gpt", "lora/layer", "quantize", "fused"),
    "loss": ("run/plan", "train/loop", "train/optim", "run/saver"),
    "adapter": ("lora/adapter",),
    "merge": ("lora/merge", "lora/verify"),
}
"""What the data become -> the modules that make it, in the order of their work."""
WIDTH, LEFT, TEXT, LINE, GAP = 860, 110, 270, 19, 30
STYLE = """
text { font: 14px system-ui, sans-serif; fill: #1b1f24; }
.stage { font-weight: 700; font-size: 16px; }
.module { font-family: ui-monospace, monospace; font-size: 13px; fill: #0550ae; }
rect { fill: #f6f8fa; stroke: #d8dee4; }
path { stroke: #57606a; stroke-width: 2; fill: none; }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3; }
  .module { fill: #79c0ff; }
  rect { fill: #161b22; stroke: #30363d; }
  path { stroke: #9198a1; }
}
"""


def drawing() -> str:
    """The picture as SVG."""
    parts, top = list[str](), 10
    for number, (stage, modules) in enumerate(STAGES.items()):
        if number:
            parts.append(f'<path d="M60 {top} v{GAP - 4} m-5 -6 l5 6 l5 -6"/>')
            top += GAP
        lines = [line for module in modules for line in described(module)]
        height = LINE * len(lines) + 14
        parts.append(f'<rect x="1" y="{top}" width="{WIDTH - 2}" height="{height}" rx="8"/>')
        parts.append(f'<text class="stage" x="20" y="{top + LINE + 3}">{stage}</text>')
        for row, (module, text) in enumerate(lines, start=1):
            y = top + LINE * row + 2
            parts.append(f'<text class="module" x="{LEFT}" y="{y}">{module}</text>')
            parts.append(f'<text x="{TEXT}" y="{y}">{escape(text)}</text>')
        top += height
    body = "\n".join(parts)
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top + 10}" role="img"'
    return f'<svg {head} aria-label="{escape(" -> ".join(STAGES))}">\n<style>{STYLE}</style>\n{body}\n</svg>\n'


def described(module: str) -> Iterator[tuple[str, str]]:
    """The lines of a module: its name, and the first line of its docstring."""
    path = ROOT / "lit_qlora" / module
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    said = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    for number, line in enumerate(wrap(said, 76)):
        yield (module if not number else ""), line


if __name__ == "__main__":
    (ROOT / "docs/way.svg").write_text(drawing(), encoding="utf-8")
