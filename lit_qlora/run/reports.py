"""The reports of a run: a page in Markdown, and a self-contained page in HTML."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from lit_qlora.files.atomic import write_text
from lit_qlora.report import Record, before_and_after, duration, metrics, short, smaller_is_better
from lit_qlora.run.figures import inline, lengths_figure, losses_figure, rewards_figure, teacher_figure
from lit_qlora.run.page import Html, Row, document, folded, sections, table

CHANGES = {"better": "good", "worse": "bad"}
"""Word for the change of a metric -> its class in a page."""
LESSONS = "What the data taught"
MODULES = "What the adapter learnt, and where"
LONG_FRAME = 60
"""Characters of a prompt style around a question from which on they are folded."""
Frame = tuple[str, str]
"""Words of a prompt style before and behind a question."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A validation sample and the model's answer."""

    prompt: str
    wanted: str
    said: str | None
    """The model's answer; None if it was not asked, and `score` is then the loss of the wanted answer."""
    score: float
    """chrF of the answer, or the loss."""
    before: str | None = None
    """The answer before training, if the model was asked then."""


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
    lessons: str = ""
    """The section of the page about training samples; see lit_qlora.run.lessons."""
    modules: str = ""
    """The section about adapted layers; see lit_qlora.run.modules."""
    frames: Sequence[Frame] = field(default=())
    """Words that the prompt style puts around the questions."""

    @property
    def facts(self) -> list[tuple[str, Any]]:
        """The summary without its tables."""
        return [(key.replace("_", " "), value) for key, value in self.summary.items() if not isinstance(value, dict)]


def write_report(path: Path, outcome: Outcome) -> None:
    """Write report.md: the summary, the metrics, the best and worst answers, and the next commands."""
    lines = [f"# {outcome.title}", "", "| | |", "|---|---|"]
    lines += [f"| {key} | {_cell(value)} |" for key, value in outcome.facts]
    if rows := before_and_after(outcome.records):
        lines += ["", "## Before and after", "", *markdown_table(("metric", "before", "after", "best"), rows)]
    header, validations = _validations(outcome.records)
    if validations:
        lines += ["", "## Validations", "", *markdown_table(header, validations)]
    lines += ["", "![losses](loss.png)", ""]
    for title, answers in (("Best", outcome.best), ("Worst", outcome.worst)):
        for answer in answers:
            lines += [f"**{title}, {_score(answer)}:** {one_line(unframed(answer.prompt, outcome.frames)[1])}", ""]
            said = {"wanted": answer.wanted, "before": answer.before, "after": answer.said}
            lines += [*(f"* {name}: {one_line(text)}" for name, text in said.items() if text is not None), ""]
    lines += ["## Next", "", "```", outcome.following, "```", ""]
    write_text(path, "\n".join(lines), errors="backslashreplace")


def write_page(path: Path, outcome: Outcome) -> None:
    """Write report.html: everything about the run in one file that loads no other."""
    summary = outcome.summary
    header, rows = _validations(outcome.records)
    rewards, taught = rewards_figure(outcome.records, 6), teacher_figure(outcome.records, 6)
    parts = [
        ("Loss", inline(losses_figure(outcome.records, 6), "loss", "Loss and learning rate of each step")),
        ("Rewards", inline(rewards, "rewards", "Rewards of chosen and rejected answers") if rewards else ""),
        ("Teacher", inline(taught, "teacher", "Divergence from the teacher") if taught else ""),
        (
            "Before and after",
            table(list(_changes(outcome.records)), ("metric", "before", "after", "best")) if rows else "",
        ),
        ("Validations", folded(f"all {len(rows)}", table(rows, header)) if rows else ""),
        _answers(outcome),
        ("Answers to the prompts", _said(outcome.said)),
        (LESSONS, outcome.lessons),
        (
            "Data",
            _paragraphs(outcome.data)
            + inline(lengths_figure(outcome.lengths, outcome.limit, 6), "lengths", "Lengths of the training samples"),
        ),
        (MODULES, outcome.modules),
        ("Next", f"<pre>{escape(outcome.following)}</pre>"),
        ("The run", table([(key, _cell(value)) for key, value in outcome.facts], kind="words")),
        ("Settings", folded("config.yaml", f"<pre>{escape(outcome.config)}</pre>")),
        ("Versions", table(list(summary["versions"].items()), kind="words")),
        ("Hashes (sha256)", table(list(outcome.hashes.items()), kind="words")),
    ]
    body = f'<div class="sub">{escape(_subtitle(summary))}</div>\n{_tiles(outcome)}\n{sections(parts)}'
    write_text(path, document(outcome.title, body), errors="backslashreplace")


def _tiles(outcome: Outcome) -> str:
    """A row of cards: the first metrics, and what the run took."""
    summary, tiles = outcome.summary, list[tuple[str, str, str, str]]()
    for name, before, after, _ in before_and_after(outcome.records)[:3]:
        word = _change(outcome.records, name)
        tiles.append((name, after, CHANGES.get(word, "sub"), f"{word}, from {before}" if word else ""))
    tiles += [
        ("time", duration(summary["seconds"]), "sub", f"{summary['tokens_per_second']:,.0f} tokens per second"),
        ("peak memory", f"{summary['peak_gib']:.2f} GiB", "sub", summary["precision"]),
        ("trained", f"{summary['trainable_parameters']:,}", "sub", f"of {summary['frozen_parameters']:,} parameters"),
    ]
    shown = "".join(
        f'<div class="tile"><span class="sub">{escape(name)}</span><b>{escape(value)}</b>'
        f'<span class="{kind}">{escape(more)}</span></div>'
        for name, value, kind, more in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _change(records: Sequence[Record], name: str) -> str:
    """Tell if a metric is better or worse after training than before; '' if it is neither."""
    values = metrics(records)[name]
    before, after = values[0][1], values[-1][1]
    if before == after or math.isnan(before):
        return ""
    return "better" if (after < before) == smaller_is_better(name) and not math.isnan(after) else "worse"


def _changes(records: Sequence[Record]) -> Iterator[Row]:
    """Rows of the table of metrics; the value after training has a colour if it is better or worse."""
    for name, before, after, best in before_and_after(records):
        word = _change(records, name)
        shown = Html(f'<span class="{CHANGES[word]}" title="{word}">{escape(after)}</span>') if word else after
        yield name, before, shown, best


def _subtitle(summary: Mapping[str, Any]) -> str:
    where = "CPU" if summary["gpu"] == "none" else summary["gpu"]
    learns = f"{summary['objective']} · " if "objective" in summary else ""
    return f"{learns}{summary['adapter']} · {summary['precision']} · {where} · {summary['steps']:,} steps"


def _validations(records: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """Make the table of the validations; a missing metric is an empty cell."""
    found = [record for record in records if "loss" not in record]
    names = list(metrics(records))
    return ["step", *names], [
        [f"{record['step']:,}", *(short(record[name]) if name in record else "" for name in names)] for record in found
    ]


def _answers(outcome: Outcome) -> tuple[str, str]:
    """Title and table of the best and the worst answers."""
    answers = [*outcome.best, *outcome.worst]
    if not answers:
        return "", ""
    asked = answers[0].said is not None
    early = any(answer.before is not None for answer in answers)
    perfect = [asked and answer.score > 0.995 for answer in answers]  # the worst may be as good as the best
    kinds = ["good" if number < len(outcome.best) or perfect[number] else "bad" for number in range(len(answers))]
    rows = [
        [
            Html(f'<span class="answer {kind}">{answer.score:.2f}</span>'),
            _question(answer.prompt, outcome.frames),
            *([answer.before or ""] if early else []),
            *([answer.said] if asked else []),
            answer.wanted,
        ]
        for kind, answer in zip(kinds, answers, strict=True)
    ]
    header = ["chrF" if asked else "loss", "prompt", *["before"] * early, *["after"] * asked, "wanted"]
    note = "" if asked else '<p class="note">--eval.generate 20 has a run answer, before training and after it.</p>'
    kind = "chrF of the answer" if asked else "loss of the wanted answer"
    return f"Best and worst answers, by {kind}", note + table(rows, header, "words texts even scored")


def _said(said: Sequence[Record]) -> str:
    steps = sorted({record["step"] for record in said})
    texts = {(record["prompt"], record["step"]): record["answer"] for record in said}
    prompts = list(dict.fromkeys(record["prompt"] for record in said))
    header = ["prompt", *(f"after {step:,} steps" if step else "before" for step in steps)]
    rows = [[prompt, *(texts.get((prompt, step), "") for step in steps)] for prompt in prompts]
    return table(rows, header, "words texts even") if rows else ""


def unframed(prompt: str, frames: Sequence[Frame]) -> tuple[str, str]:
    """Take the words of the prompt style off a prompt.

    Returns:
        These words, and the question between them; '' and the prompt if it has none of the frames.
    """
    for before, behind in sorted(frames, key=lambda frame: -len(frame[0])):
        if prompt.startswith(before) and prompt.endswith(behind) and len(prompt) >= len(before) + len(behind):
            return f"{before}...{behind}", prompt[len(before) : len(prompt) - len(behind)].strip()
    return "", prompt


def _question(prompt: str, frames: Sequence[Frame]) -> Html:
    """Show a question; a long frame around it is folded, a short one stays."""
    frame, question = unframed(prompt, frames)
    if len(frame) < LONG_FRAME:
        return Html(escape(prompt))
    return Html(escape(question) + folded("in its prompt", escape(frame)))


def _paragraphs(lines: Sequence[str]) -> str:
    return "".join(f'<p class="data">{escape(line)}</p>' for line in lines)


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Write the lines of a table in Markdown."""
    lines = [header, [":---", *["---:"] * (len(header) - 1)], *rows]
    return [f"| {' | '.join(map(str, line))} |" for line in lines]


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
