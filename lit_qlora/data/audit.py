"""Describe the data of a run, and give the reasons not to start it."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_qlora.data.cache import Encoded
from lit_qlora.data.encode import Counts
from lit_qlora.data.samples import Sample, Samples
from lit_qlora.data.unread import Unread
from lit_qlora.errors import DataError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.report import is_terminal
from lit_qlora.settings import DataConfig, Finding

MOST = 0.5  # share of the samples from which a loss of them stops a run
BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Audit:
    """The findings about the data of a run."""

    sources: list[str]
    """A line for each source: its format and the sign that it was recognised by."""
    train: int
    val: int
    counts: Counts
    """Of the training sources and the source to validate on, together."""
    lengths: npt.NDArray[np.int64]
    """Tokens of each training sample before anything was cut."""
    max_length: int
    tokens: int
    """Tokens of the training samples."""
    labelled: int
    """Labelled tokens of the training samples."""
    duplicates: int
    """Training samples that say what an earlier one says."""
    overlap: int
    """Validation samples that are also trained on."""
    shown: list[Sample]
    """The first, the middle and the last training sample."""
    unread: dict[str, list[str]]
    """Source -> what it holds and nobody reads."""
    red: list[str]
    """Reasons not to start, without the findings that data.allow names."""
    warnings: list[str]
    """Findings that a user must not overlook."""
    further: tuple[str, ...] = ()
    """Notes on judged answers."""

    def notes(self) -> list[str]:
        """Return the notes that a user should read before the run."""
        counts = self.counts
        told = {
            "{} records could not be read, or not be written in the style, and were left out": counts.skipped,
            "{} samples are too long for their prompt's style, or for the limits, and were left out": counts.dropped,
            "{} prompts were cut": counts.cut_prompts,
            "{} turns of conversations were left out": counts.cut_turns,
            f"{{}} answers were cut ({_percent(counts.cut_answers, counts.examples)})": counts.cut_answers,
            "{} samples have no labelled token and were left out": counts.masked,
            "{} samples more than conversations, because the chat template rewrites what was said before; so each "
            "answer is labelled behind the prompt that asks for it (see --data.split_rewritten)": counts.split,
            "{} answers are not labelled, as the chat template writes them differently once the conversation goes on; "
            "--data.split_rewritten true makes samples of their own of them": counts.untaught,
            "{} answers have no thought, but the chat template asks for one: an empty thought is trained before them": (
                counts.unthought
            ),
            "{} answers weigh less than others": counts.light,
            "{} answers begin otherwise than the chat template asks for them": counts.begun,
            "{} answers are trained behind another text than they will be asked with, as the chat template writes "
            "differently what comes before an answer once it is there": counts.rewritten,
            "{} answers are trained without their thoughts, which the chat template leaves out": counts.thoughts,
            "{} rejected answers equal the chosen one and were left out": counts.equal,
            "{} records have nothing left to compare and were left out": counts.unpaired,
            "{} prompts are empty": counts.empty_prompts,
            "{} answers are empty": counts.empty_answers,
            f"{{}} of {counts.turns} answers do not end": counts.turns - counts.ended,
            "{} samples say what an earlier one says": self.duplicates,
            "{} validation samples are also trained on": self.overlap,
            "{} samples hold NUL or other control characters": counts.control_characters,
            "{} samples name a control token, which is encoded as text": counts.control_tokens,
        }
        notes = [text.format(f"{count:,}") for text, count in told.items() if count]
        notes += self.further
        notes += [f"{source}: not read: {', '.join(names)}" for source, names in self.unread.items() if names]
        return notes if self.val else [*notes, "there is no sample to validate on"]

    def describe(self) -> str:
        """One line: counts, lengths, labelled tokens."""
        lengths = np.sort(self.lengths)
        at = [int(lengths[int(share * (len(lengths) - 1))]) for share in (0.5, 0.99, 1)]
        return (
            f"{self.train:,} train / {self.val:,} val   median {at[0]} tokens, p99 {at[1]}, longest {at[2]}   "
            f"{self.labelled:,} of {self.tokens:,} tokens labelled"
        )

    def histogram(self, rows: int = 12, width: int = 50) -> str:
        """The lengths as text, a line for each bin."""
        counts, edges = np.histogram(self.lengths, bins=min(rows, max(1, int(np.ptp(self.lengths)))))
        most = max(1, int(counts.max()))
        return "\n".join(
            f"{int(edge):>7,} {'█' * round(width * int(count) / most):<{width}} {int(count):,}"
            for edge, count in zip(edges, counts, strict=False)
        )

    def spark(self) -> str:
        """The lengths as one word."""
        counts, edges = np.histogram(self.lengths, bins=min(16, max(1, int(np.ptp(self.lengths)))))
        most = max(1, int(counts.max()))
        bars = "".join(BARS[-(-int(count) * (len(BARS) - 1) // most)] for count in counts)
        return f"{int(edges[0])} {bars} {int(edges[-1])}"


def audit(
    samples: Samples,
    train: Sequence[Encoded],
    val: Encoded | None,
    chosen: Sequence[Sequence[int]],
    held_out: Sequence[Sequence[int]],
    data: DataConfig,
    max_length: int,
    times: Sequence[float] = (),
) -> Audit:
    """Look at everything that a run would learn from.

    Args:
        samples: all to train on.
        chosen, held_out: for each training source, the samples to train on, and those to validate on.
        times: how often an epoch visits each sample of each training source; by default once.

    Raises:
        DataError: if nothing is left.
    """
    counts = sum((source.facts.counts for source in [*train, *([val] if val else [])]), Counts())
    if not len(samples):
        raise DataError(
            f"{', '.join(data.path)}: no token would be labelled; of {counts.examples} samples {counts.dropped} are "
            f"too long for {max_length} tokens, {counts.masked} have no labelled token."
        )

    def gathered(name: str, which: Sequence[Sequence[int]]) -> npt.NDArray[Any]:
        return np.concatenate([getattr(source, name)[list(some)] for source, some in zip(train, which, strict=True)])

    digests = gathered("digests", chosen)
    val_digests = val.digests if val else gathered("digests", held_out)
    lengths = gathered("lengths", chosen)
    times = times or [1.0] * len(train)
    visits = [len(some) * factor for some, factor in zip(chosen, times, strict=True)]
    return Audit(
        sources=[
            *(
                _source(source) + _weight(factor, visited, sum(visits))
                for source, factor, visited in zip(train, times, visits, strict=True)
            ),
            *([_source(val)] if val else []),
        ],
        train=len(digests),
        val=len(val_digests),
        counts=counts,
        lengths=lengths,
        max_length=max_length,
        tokens=int(samples.lengths.sum()),
        labelled=int(samples.labelled.sum()),
        duplicates=len(digests) - len(np.unique(digests)),
        overlap=int(np.isin(val_digests, digests).sum()),
        shown=[samples[i] for i in sorted({0, len(samples) // 2, len(samples) - 1})],
        unread={
            source.facts.source: Unread.of(source.facts.unread).names(allowed="unread" in data.allow)
            for source in [*train, *([val] if val else [])]
        },
        red=[*_red(counts, data, max_length), *_red_of_sources([*train, *([val] if val else [])], data)],
        warnings=_warnings(counts, data, max_length, int(np.median(lengths))),
    )


def _warnings(counts: Counts, data: DataConfig, max_length: int, median: int) -> list[str]:
    """Return the findings that make a run learn something else than was meant."""
    if counts.cut_prompts <= MOST * counts.examples:
        return []
    lost = "end" if data.overlong == "truncate_right" else "beginning"
    return [
        f"{counts.cut_prompts:,} of {counts.examples:,} prompts were cut at their {lost}: a sample may have "
        f"{max_length} tokens, and the median one has {median:,}. Raise --data.max_length, or look at what is left."
    ]


def _red(counts: Counts, data: DataConfig, max_length: int) -> list[str]:
    """Return the findings that would make the run useless."""
    longer = f"do not fit into {max_length} tokens, counting their prompts. Raise data.max_length"
    findings: dict[Finding, tuple[int, int, str]] = {
        "cut_answers": (counts.cut_answers, counts.examples, f"answers {longer}"),
        "dropped": (counts.dropped, counts.examples, f"samples {longer}"),
        "masked": (counts.masked, counts.examples, "samples have no labelled token"),
        "no_eos": (
            counts.turns - counts.ended,
            counts.turns,
            "answers do not end with an end-of-text token, so the model would not learn to stop",
        ),
        "begun": (
            counts.begun,
            counts.turns,
            "answers begin otherwise than the chat template asks for them, so the model would not be asked as it was "
            "trained to answer. Give another --data.prompt",
        ),
    }
    return [
        f"{count:,} of {whole:,} {text}, or go on with --data.allow {name}."
        for name, (count, whole, text) in findings.items()
        if count > MOST * whole and name not in data.allow
    ]


def _red_of_sources(sources: Sequence[Encoded], data: DataConfig) -> list[str]:
    """Return the findings that make a single source useless, or would silently change its content."""
    red = []
    for source in sources:
        facts, counts = source.facts, source.facts.counts
        if "unread" not in data.allow:
            red += [
                f"{reason}, or go on without it with --data.allow unread." for reason in Unread.of(facts.unread).red()
            ]
        rendered = facts.format == "text" and counts.control_tokens == counts.examples > 0
        if rendered and "control_tokens" not in data.allow:
            red.append(
                f"{facts.source}: every text holds control tokens, as if a chat template had written it. They would be "
                "encoded as letters. Give the messages themselves, or input_ids and labels, or go on with "
                "--data.allow control_tokens."
            )
    return red


def _source(source: Encoded) -> str:
    facts = source.facts
    samples, records = len(source.samples), facts.counts.examples + facts.counts.skipped
    kept = f"{samples:,} of {records:,} kept" if samples <= records else f"{samples:,} pieces of {records:,}"
    return f"{facts.source}   format {facts.format} ({facts.saw})   {kept}{'   from the cache' * source.cached}"


def _weight(times: float, visits: float, whole: float) -> str:
    """Say how often an epoch visits a sample of a source, and the source's share of it, unless that is once and all."""
    return "" if visits == whole and times == 1 else f"   x {times:g}, {visits / max(1, whole):.0%} of an epoch"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2g} %"


def show(sample: Sample, tokenizer: Tokenizer, most: int = 400, dim: bool | None = None) -> str:
    """A sample as the model sees it, on one line, tokens without labels dimmed, or in brackets where nothing can be.

    Args:
        most: characters of each part that are shown.
        dim: whether dimming works; by default where stdout is a terminal and NO_COLOR is not set.
    """
    dim = is_terminal(sys.stdout) and not os.environ.get("NO_COLOR") if dim is None else dim
    edges = np.flatnonzero(np.diff(sample.trained)) + 1
    words = []
    for start, end in zip([0, *edges], [*edges, len(sample.tokens)], strict=True):
        text = tokenizer.decode(sample.tokens[start:end].tolist())
        text = (text if len(text) < most else f"{text[: most // 2]} ... {text[-most // 2 :]}").replace("\n", "\\n")
        labelled = bool(sample.trained[start])
        words.append(f"{text}<end>" if labelled else f"\x1b[2m{text}\x1b[0m" if dim else f"[{text}]")
    return " -> ".join(words)


def boundary(sample: Sample, tokenizer: Tokenizer, around: int = 4) -> str:
    r"""The last tokens of the first prompt and the first of its answer, one by one: 'Response | : | \n || It | is'."""
    at = int(np.argmax(sample.trained))

    def spell(ids: npt.NDArray[np.int32]) -> str:
        return " | ".join(repr(tokenizer.decode([int(i)]))[1:-1] or f"<{int(i)}>" for i in ids)

    return f"{spell(sample.tokens[max(0, at - around) : at])} || {spell(sample.tokens[at : at + around])}"
