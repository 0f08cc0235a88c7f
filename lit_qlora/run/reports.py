"""The reports of a run: a picture of its losses, a page in Markdown, and a self-contained page in HTML."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lit_qlora.files.atomic import replacing, write_text
from lit_qlora.report import Record, duration, metrics, short

Row = Sequence[object]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A validation sample and the model's answer."""

    prompt: str
    wanted: str
    said: str | None
    """The model's answer; None if it was not asked, and `score` is then the loss of the wanted answer."""
    score: float
    """chrF of the answer, or the loss."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a finished run."""

    title: str
    summary: Mapping[str, Any]
    records: Sequence[Record]
    lengths: Sequence[int]
    """Tokens of each training sample before truncation."""
    limit: int
    """Most tokens of a sample."""
    data: Sequence[str]
    """Lines about the data."""
    config: str
    """The settings, as YAML."""
    hashes: Mapping[str, str]
    """Base, data and adapter -> sha256."""
    following: str
    """The next commands, a line each."""
    best: Sequence[Answer] = field(default=())
    """The best answers, best first."""
    worst: Sequence[Answer] = field(default=())
    """The worst answers, worst first."""
    said: Sequence[Record] = field(default=())
    """Answers to eval.prompts, with their steps."""

    @property
    def facts(self) -> list[tuple[str, Any]]:
        """The summary without its tables."""
        return [(key.replace("_", " "), value) for key, value in self.summary.items() if not isinstance(value, dict)]


# Pictures


def losses_figure(records: Sequence[Record], width: float = 8) -> Any:
    """Plot the loss of each step, its running average and the validation losses, and the learning rate below."""
    from matplotlib.figure import Figure

    train, val = [r for r in records if "loss" in r], [r for r in records if "val_loss" in r]
    figure = Figure(figsize=(width, 5.5), layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[4, 1])
    steps, losses = [r["step"] for r in train], [r["loss"] for r in train]
    average: list[float] = []
    for loss in losses:
        average.append(0.9 * average[-1] + 0.1 * loss if average else loss)
    top.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training loss of a step")
    top.plot(steps, average, color="tab:blue", label="running average (EMA)")
    if val:
        top.plot([r["step"] for r in val], [r["val_loss"] for r in val], "o-", color="tab:orange", label="validation")
    compared = any("logp_chosen" in record for record in train)
    top.set_ylabel("loss of a comparison" if compared else "loss per labelled token (nats)")
    top.set_ylim(bottom=0)
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    bottom.plot(steps, [r["lr"] for r in train], color="tab:gray")
    bottom.set_ylabel("learning rate")
    bottom.set_ylim(bottom=0)
    bottom.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    bottom.set_xlabel("optimizer step")
    bottom.grid(alpha=0.3)
    return figure


def rewards_figure(records: Sequence[Record], width: float = 8) -> Any | None:
    """Plot the rewards of chosen and rejected answers, of each step and in validations; None without any."""
    from matplotlib.figure import Figure

    sides = {"chosen": "tab:blue", "rejected": "tab:red"}
    if not any(f"reward_{side}" in record for record in records for side in sides):
        return None
    figure = Figure(figsize=(width, 4), layout="constrained")
    axes = figure.subplots()
    for side, color in sides.items():
        for name, style, label in ((f"reward_{side}", "-", side), (f"val_reward_{side}", "o-", f"{side}, validation")):
            found = [(record["step"], record[name]) for record in records if name in record]
            alpha = 0.35 if style == "-" else 1.0
            axes.plot(*zip(*found, strict=True), style, color=color, alpha=alpha, label=label) if found else None
    axes.axhline(0, color="tab:gray", linewidth=1)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("reward")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def lengths_figure(lengths: Sequence[int], limit: int, width: float = 8) -> Any:
    """Plot a histogram of the samples' lengths in tokens, with their limit."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 4 if width == 8 else 2.8), layout="constrained")
    axes = figure.subplots()
    axes.locator_params(axis="x", integer=True)
    axes.hist(lengths, bins=min(60, max(1, max(lengths) - min(lengths))), color="tab:blue")
    if max(lengths) > limit:
        axes.axvline(limit, color="tab:red", label=f"limit, {limit} tokens")
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
    """Return a figure as SVG to embed in a page, in the page's font.

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
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', f'role="img" aria-label="{escape(says)}"', svg, count=1)
    return re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)


# Pages


def write_report(path: Path, outcome: Outcome) -> None:
    """Write report.md: the summary, the metrics, the best and worst answers, and the next commands."""
    lines = [f"# {outcome.title}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in outcome.facts]
    header, rows = _validations(outcome.records)
    if rows:
        lines += ["", f"| {' | '.join(map(str, header))} |", f"|{'---:|' * len(header)}"]
        lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    lines += ["", "![losses](loss.png)", ""]
    for title, answers in (("Best", outcome.best), ("Worst", outcome.worst)):
        for answer in answers:
            said = "" if answer.said is None else f"\n* answer: {one_line(answer.said)}"
            lines += [f"**{title}, {_score(answer)}:** {one_line(answer.prompt)}", ""]
            lines += [f"* wanted: {one_line(answer.wanted)}{said}", ""]
    lines += ["## Next", "", "```", outcome.following, "```", ""]
    write_text(path, "\n".join(lines), errors="backslashreplace")


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


def write_page(path: Path, outcome: Outcome) -> None:
    """Write report.html: everything about the run in one file that loads no other."""
    summary = outcome.summary
    names = metrics(outcome.records)
    tiles = [
        *((name, f"{short(values[0][1])} → {short(values[-1][1])}") for name, values in list(names.items())[:3]),
        ("time", duration(summary["seconds"])),
        ("tokens per second", f"{summary['tokens_per_second']:,.0f}"),
        ("peak memory", f"{summary['peak_gib']:.2f} GiB"),
        ("trained", f"{summary['trainable_parameters']:,} of {summary['frozen_parameters']:,}"),
    ]
    header, rows = _validations(outcome.records)
    kind = "chrF of the answer" if outcome.best and outcome.best[0].said is not None else "loss of the wanted answer"
    rewards = rewards_figure(outcome.records, 6)
    sections = [
        ("Loss", inline(losses_figure(outcome.records, 6), "loss", "Loss and learning rate of each step")),
        ("Rewards", inline(rewards, "rewards", "Rewards of chosen and rejected answers") if rewards else ""),
        ("Validations", table(rows, header) if rows else ""),
        (f"Best and worst answers, by {kind}", _answers(outcome)),
        ("Answers to the prompts", _said(outcome.said)),
        (
            "Data",
            _paragraphs(outcome.data)
            + inline(lengths_figure(outcome.lengths, outcome.limit, 6), "lengths", "Lengths of the training samples"),
        ),
        ("Next", f"<pre>{escape(outcome.following)}</pre>"),
        ("The run", table([(key, _cell(value)) for key, value in outcome.facts], kind="words")),
        ("Settings", f"<details><summary>config.yaml</summary><pre>{escape(outcome.config)}</pre></details>"),
        ("Versions", table(list(summary["versions"].items()), kind="words")),
        ("Hashes (sha256)", table(list(outcome.hashes.items()), kind="words")),
    ]
    body = "".join(f"<h2>{escape(title)}</h2>\n{content}\n" for title, content in sections if content)
    shown = "".join(f'<div class="tile"><span class="sub">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in tiles)
    write_text(
        path,
        f'<!DOCTYPE html>\n<html lang="en">\n<head><meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(outcome.title)}</title>\n<style>{STYLE}</style></head>\n<body>\n"
        f'<h1>{escape(outcome.title)}</h1>\n<div class="sub">{escape(_subtitle(summary))}</div>\n'
        f'<div class="tiles">{shown}</div>\n{body}</body>\n</html>\n',
        errors="backslashreplace",
    )


def _subtitle(summary: Mapping[str, Any]) -> str:
    where = "CPU" if summary["gpu"] == "none" else summary["gpu"]
    return f"{summary['adapter']} · {summary['precision']} · {where} · {summary['steps']:,} steps"


def _validations(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Make the table of the validations; a missing metric is an empty cell."""
    found = [record for record in records if "loss" not in record]
    names = list(metrics(records))
    return ["step", *names], [
        [f"{record['step']:,}", *(short(record[name]) if name in record else "" for name in names)] for record in found
    ]


def _answers(outcome: Outcome) -> str:
    blocks = []
    for kind, answers in (("good", outcome.best), ("bad", outcome.worst)):
        for answer in answers:
            said = "" if answer.said is None else f"<p><span>answer</span>{escape(answer.said)}</p>"
            blocks.append(
                f'<div class="answer {kind}"><p class="note">{_score(answer)}</p>'
                f"<p>{escape(answer.prompt)}</p>{said}<p><span>wanted</span>{escape(answer.wanted)}</p></div>"
            )
    return "\n".join(blocks)


def _said(said: Sequence[Record]) -> str:
    blocks = []
    for prompt in dict.fromkeys(record["prompt"] for record in said):
        lines = "".join(
            f"<p><span>step {record['step']}</span> {escape(record['answer'])}</p>"
            for record in said
            if record["prompt"] == prompt
        )
        blocks.append(f'<div class="answer"><p>{escape(prompt)}</p>{lines}</div>')
    return "\n".join(blocks)


def table(rows: Sequence[Row], header: Row = (), kind: str = "") -> str:
    """Write a table in HTML; the kind "words" wraps its lines."""

    def line(cells: Row, tag: str) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    head = line(header, "th") if header else ""
    return f'<div class="wide"><table class="{kind}">{head}{"".join(line(row, "td") for row in rows)}</table></div>'


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f'<p class="data">{escape(line)}</p>' for line in lines)


def _score(answer: Answer) -> str:
    return f"loss {answer.score:.3f}" if answer.said is None else f"chrF {answer.score:.2f}"


def one_line(text: str, most: int = 200) -> str:
    """Put `text` on one line, without its middle if it is long."""
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
