"""The pictures of a run: its losses, its rewards and the lengths of its samples, as PNG or inside a page."""

import io
import math
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from lit_qlora.files.atomic import replacing
from lit_qlora.report import Average, Record

BLUE, ORANGE, RED, GRAY = "#3b82c4", "#e8833a", "#d64550", "#8b949e"
"""Colours that can be told apart on white and on black."""
WIDEST = 1e12
"""Factor from which on losses are no losses, and a logarithmic axis would overflow."""


def losses_figure(records: Sequence[Record], width: float = 8) -> Any:
    """Plot the loss of each step, its running average and the validation losses, and the learning rate below.

    Validations share the axis of training. It is logarithmic if the losses span more than a factor of ten.
    """
    from matplotlib.figure import Figure

    train, val = [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(width, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    average = list(map(Average(), losses))
    top.plot(steps, losses, color=BLUE, alpha=0.3, linewidth=1, label="training loss of a step")
    top.plot(steps, average, color=BLUE, label="running average (EMA)")
    if val:
        top.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", color=ORANGE, ms=4, label="validation")
        _mark_best(top, val)
    top.set_ylabel(_loss_of(records))
    scale_losses(top, [*average, *(r["val_loss"] for r in val)])
    top.grid(alpha=0.3, which="both")
    top.legend(frameon=False)
    bottom.plot(steps, [r["lr"] for r in train], color=GRAY)
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    return figure


def _mark_best(axes: Any, val: Sequence[Record]) -> None:
    """Put a star on the validation with the smallest loss; there is none if no loss is a number."""
    found = [record for record in val if math.isfinite(record["val_loss"])]
    if not found:
        return
    best = min(found, key=lambda record: record["val_loss"])
    label = f"best validation, {best['val_loss']:.4g} at step {best['step']:,}"
    axes.plot([best["step"]], [best["val_loss"]], "*", color=ORANGE, ms=15, mec="black", mew=0.6, label=label, zorder=4)


def scale_losses(axes: Any, losses: Sequence[float]) -> None:
    """Give losses a logarithmic axis if they span more than a factor of ten, else one that begins at 0."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    found = [loss for loss in losses if math.isfinite(loss)] or [0.0]
    low, high = min(found), max(found)
    if low <= 0 or not 10 < high / low < WIDEST:
        axes.set_ylim(bottom=0 if low >= 0 else None)
        return
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=20))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _loss_of(records: Sequence[Record]) -> str:
    """The name of the loss, by the metrics beside it."""
    names = {name for record in records for name in record}
    if "reward_margin" in names:
        return "loss of a comparison"
    return "loss of a text" if names & {"val_f1", "val_mse"} else "loss per labelled token (nats)"


def rewards_figure(records: Sequence[Record], width: float = 8) -> Any | None:
    """Plot the rewards of chosen and rejected answers, of each step and in validations; None without any."""
    from matplotlib.figure import Figure

    sides = {"chosen": BLUE, "rejected": RED}
    if not any(f"reward_{side}" in record for record in records for side in sides):
        return None
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for side, color in sides.items():
        for name, style, label in ((f"reward_{side}", "-", side), (f"val_reward_{side}", "o-", f"{side}, validation")):
            found = [(record["step"], record[name]) for record in records if name in record]
            alpha = 0.35 if style == "-" else 1.0
            axes.plot(*zip(*found, strict=True), style, color=color, alpha=alpha, label=label) if found else None
    axes.axhline(0, color=GRAY, linewidth=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def teacher_figure(records: Sequence[Record], width: float = 8) -> Any | None:
    """Plot the divergence from the teacher, of each step and in validations; None without a teacher."""
    from matplotlib.figure import Figure

    if not any("teacher_kl" in record for record in records):
        return None
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for name, style, color, label in (
        ("teacher_kl", "-", BLUE, "of a training step"),
        ("val_teacher_kl", "o-", ORANGE, "validation"),
    ):
        found = [(record["step"], record[name]) for record in records if name in record]
        axes.plot(*zip(*found, strict=True), style, color=color, label=label) if found else None
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("KL(teacher || model), nats")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def lengths_figure(lengths: Sequence[int], limit: int, width: float = 8) -> Any:
    """Plot a histogram of the samples' lengths in tokens, with their limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4 if width == 8 else 2.8), layout="constrained")
    axes = figure.subplots()
    axes.locator_params(axis="x", integer=True)
    axes.hist(lengths, bins=min(60, max(1, max(lengths) - min(lengths))), color=BLUE)
    if max(lengths) > limit:
        axes.axvline(limit, color=RED, label=f"limit, {limit} tokens")
        axes.legend(frameon=False)
    axes.set_xlabel("tokens of a sample, prompt and answer")
    axes.set_ylabel("samples")
    axes.grid(alpha=0.3)
    return figure


def plot_losses(records: Sequence[Record], path: Path) -> None:
    """Write loss.png, see losses_figure."""
    _save(losses_figure(records), path)


def plot_lengths(lengths: Sequence[int], limit: int, path: Path) -> None:
    """Write the histogram of lengths, see lengths_figure."""
    _save(lengths_figure(lengths, limit), path)


def _save(figure: Any, path: Path) -> None:
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def inline(figure: Any, name: str, says: str) -> str:
    """Return a figure as SVG to embed in a page, in its font and its colours of text and background.

    Args:
        name: prefix of its ids, which would clash with those of other figures.
        says: description for readers who cannot see it.
    """
    from matplotlib import rc_context

    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])  # two figures have the same ids
    for colour, here in (("#000000", "currentColor"), ("#ffffff", "var(--page)")):  # the page may be dark
        svg = re.sub(rf"(fill|stroke): {colour}", rf"\g<1>: {here}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(says)}"', svg, count=1)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
