"""The reports of a run: a page in Markdown, and a self-contained page in HTML."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lit_qlora.files.atomic import write_text
from lit_qlora.report import Record, duration, metrics, short
from lit_qlora.run.figures import inline, lengths_figure, losses_figure, rewards_figure
from lit_qlora.run.page import document, sections, table


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
    parts = [
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
    shown = "".join(f'<div class="tile"><span class="sub">{escape(k)}</span><b>{escape(v)}</b></div>' for k, v in tiles)
    body = f'<div class="sub">{escape(_subtitle(summary))}</div>\n<div class="tiles">{shown}</div>\n{sections(parts)}'
    write_text(path, document(outcome.title, body), errors="backslashreplace")


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
