"""The reports of a sweep: its table, its curves, and its settings in parallel coordinates."""

import json
import math
from collections.abc import Sequence
from colorsys import hls_to_rgb
from html import escape
from pathlib import Path
from typing import Any

from lit_qlora.files.atomic import replacing, write_text
from lit_qlora.report import metrics, smaller_is_better
from lit_qlora.run.figures import inline, scale_losses
from lit_qlora.run.page import document, sections, table
from lit_qlora.sweep.more_data import Forecast, forecast
from lit_qlora.sweep.results import Results, Row, commands
from lit_qlora.sweep.trials import flag_value

NOTE = (
    "Best first. ± is half of a 95 % interval. 'against best' compares val_loss with that of the first row, sample by "
    "sample over the same validation samples; * marks what noise does not explain. Each comparison stands by itself: "
    "of twenty that are noise, one gets its *."
)
SHOWN = 20  # curves with a name


def write_results(results: Results, out_dir: Path) -> None:
    """Write sweep.json, sweep.md, sweep.html and the pictures."""
    write_text(out_dir / "sweep.json", json.dumps(results.facts(), indent=1, allow_nan=True) + "\n")
    curves, lines, found = curves_figure(results), parallel_figure(results), forecast(results)
    sizes = sizes_figure(found) if found else None
    for name, figure in (("curves", curves), ("settings", lines), ("more_data", sizes)):
        if figure is not None:
            with replacing(out_dir / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=120)
    answer = found.describe() if found else ""
    write_text(out_dir / "sweep.md", markdown(results, curves is not None, lines is not None, answer))
    write_text(out_dir / "sweep.html", page(results, curves, lines, answer, sizes))


def markdown(results: Results, has_curves: bool, has_lines: bool, answer: str = "") -> str:
    """Write the page in Markdown.

    Args:
        answer: to the question of more data, if it was asked.
    """
    head = results.header()
    rows = [[cell.replace("|", "\\|") for cell in results.cells(row)] for row in results.rows]
    lines = [f"# {results.title}", "", NOTE, "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    lines += ["", "![curves](curves.png)"] if has_curves else []
    lines += ["", "![settings](settings.png)"] if has_lines else []
    lines += ["", "## Would more data help?", "", answer, "", "![losses](more_data.png)"] if answer else []
    lines += ["", "## Commands", ""]
    for row in results.rows:
        for result in row.results:
            lines += [f"* {result.trial.name}", *(f"  * {what}: `{line}`" for what, line in commands(result).items())]
    return "\n".join([*lines, ""])


def page(results: Results, curves: Any, lines: Any, answer: str = "", sizes: Any = None) -> str:
    """Write the page in HTML, which loads no other file."""
    more = f"<p>{escape(answer)}</p>" + inline(sizes, "more_data", "Loss by training samples") if sizes else ""
    orders = [
        [result.trial.name, what.replace("_", " "), line]
        for row in results.rows
        for result in row.results
        for what, line in commands(result).items()
    ]
    parts = [
        (
            "Trials",
            f'<p class="note">{escape(NOTE)}</p>' + table(list(map(results.cells, results.rows)), results.header()),
        ),
        ("Would more data help?", more),
        ("Curves", inline(curves, "curves", f"{results.metric} of each trial") if curves else ""),
        ("Settings", inline(lines, "settings", f"Settings and {results.metric} of each trial") if lines else ""),
        ("Commands", table(orders, ("trial", "to", "command"), "words texts")),
    ]
    return document(results.title, sections(parts), "body { max-width: 80rem; }")


def colours(count: int) -> list[Any]:
    """One colour a row, from blue for the best to red for the worst; all can be seen on white and on black."""
    return [hls_to_rgb(0.6 * (1 - number / max(1, count - 1)), 0.47, 0.6) for number in range(count)]


def label(results: Results, row: Row) -> str:
    """Name a row in a legend."""
    number = row.name.removeprefix("trial-")
    own = row.first.trial.variant or " ".join(
        f"{name.rpartition('.')[2]} {flag_value(results.setting(row, name))}" for name in results.settings
    )
    return f"{number}: {own}"[:48]


def curves_figure(results: Results, width: float = 6.5) -> Any:
    """Plot the metric of each trial over its steps; None if no trial has it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5), layout="constrained")
    axes = figure.subplots()
    drawn, shown = 0, list[float]()
    for row, colour in zip(results.rows, colours(len(results.rows)), strict=True):
        for result in row.results:
            points = metrics(result.records).get(results.metric, [])
            points = [(step, value) for step, value in points if math.isfinite(value)]
            named = label(results, row) if result is row.first and drawn < SHOWN else None
            if points:
                style = "-" if result.status == "done" else ":"
                axes.plot(*zip(*points, strict=True), style, marker=".", color=colour, label=named, linewidth=1.8)
                drawn += named is not None
                shown += [value for _, value in points]
    if not drawn:
        return None
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(results.metric)
    if smaller_is_better(results.metric):
        scale_losses(axes, shown)
    axes.grid(alpha=0.3, which="both")
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=2)
    return figure


def sizes_figure(found: Forecast, width: float = 9) -> Any:
    """Plot the losses of parts of the data, and the law through them up to twice the data."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    first, last = found.sizes[0], 2 * found.sizes[-1]
    between = [first * (last / first) ** (number / 60) for number in range(61)]
    middle, low, high = zip(*map(found.band, between), strict=True)
    axes.fill_between(between, low, high, alpha=0.2, linewidth=0, label="95 % interval")
    axes.plot(between, middle, linewidth=1.4, label="c + a n^-b")
    axes.plot(found.sizes, found.losses, "o", color="black", label="measured")
    axes.axvline(found.sizes[-1], color="grey", linewidth=0.8, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set_xticks([*found.sizes, last], [f"{size:,}" for size in (*found.sizes, last)])
    axes.set_xlabel("training samples")
    axes.set_ylabel("val_loss")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def parallel_figure(results: Results, width: float = 6.5) -> Any:
    """Plot settings and metric of each row as a line across parallel axes; None with fewer than two rows or axes."""
    from matplotlib.figure import Figure

    rows = [row for row in results.rows if results.metric in row.values]
    rows = [row for row in rows if math.isfinite(row.values[results.metric].value)]
    if len(rows) < 2 or not results.settings:
        return None
    scales = [places([results.setting(row, name) for row in rows]) for name in results.settings]
    scales.append(places([row.values[results.metric].value for row in rows], numbers=True))
    figure = Figure(figsize=(width, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, colour in reversed(list(enumerate(colours(len(rows))))):
        heights = [heights[number] for heights, _ in scales]
        axes.plot(range(len(scales)), heights, color=colour, linewidth=1.8, alpha=0.85, solid_joinstyle="round")
    for number, (_, ticks) in enumerate(scales):
        axes.axvline(number, color="black", linewidth=0.8)
        for height, text in ticks:
            axes.annotate(
                text[:24], (number, height), (4, 0), "data", "offset points", va="center", fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
            )  # fmt: skip
    better = "lower is better" if smaller_is_better(results.metric) else "higher is better"
    axes.set_xticks(range(len(scales)), [*results.settings, f"{results.metric}\n{better}"])
    axes.set_xlim(-0.1, len(scales) - 0.6)
    axes.set_yticks([])
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)
    return figure


def places(values: Sequence[Any], numbers: bool = False) -> tuple[list[float], list[tuple[float, str]]]:
    """Lay the values of an axis out between 0 and 1.

    Args:
        numbers: the axis is that of a metric, with a mark at its ends and its middle.

    Returns:
        The height of each value, and heights and texts of the marks.
    """
    if numbers:
        low, high = min(values), max(values)
        span = (high - low) or 1.0
        marks = [low, (low + high) / 2, high] if high > low else [low]
        return [(value - low) / span for value in values], [((mark - low) / span, f"{mark:.4g}") for mark in marks]
    order = sorted({flag_value(value): value for value in values}.values(), key=as_number)
    texts = [flag_value(value) for value in order]
    heights = {text: number / max(1, len(texts) - 1) for number, text in enumerate(texts)}
    return [heights[flag_value(value)] for value in values], [(height, text) for text, height in heights.items()]


def as_number(value: Any) -> tuple[int, float, str]:
    """Sort numbers by size, and behind them anything else by its text."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return 0, float(value), ""
    return 1, 0.0, flag_value(value)
