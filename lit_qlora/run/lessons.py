"""Lessons of a run about its training samples: their losses at its validations, and a section of its report."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from lit_qlora.data import RunData, Sample, collate, validation_batches
from lit_qlora.data.batches import SampleBatch, by_length, pair_rows
from lit_qlora.data.comparisons import Comparisons, shared_tokens
from lit_qlora.data.exclude import hash_of
from lit_qlora.evaluate.measures import Measure
from lit_qlora.evaluate.review import KNOWN, Review, Reviewed, review
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.evaluate.validation_inputs import question
from lit_qlora.report import Record
from lit_qlora.run.page import Row, folded, table
from lit_qlora.settings import FinetuneConfig, PreferenceRunConfig

FILE_NAME = "training_losses.json"
SHOWN = 10  # samples, or groups of them, of each kind
TOKENS = "nats per labelled token"
"""The unit of losses of samples that a model learns to write."""


def watched(data: RunData, count: int) -> list[int]:
    """Choose the numbers of so many training samples, evenly among all."""
    total = len(data.train)
    return [number * total // min(count, total) for number in range(min(count, total))]


def watch_list(config: FinetuneConfig, data: RunData) -> list[SampleBatch] | Comparisons:
    """Lay out the watched samples, or take the watched comparisons."""
    some = data.train.take(watched(data, config.eval.train_samples))
    return some if isinstance(some, Comparisons) else validation_batches(some, config.train.micro_batch_size)


def seen_measure(losses: Measure) -> Measure:
    """Measure the watched training samples as validation samples are.

    Args:
        losses: measures them, and keeps the loss of each in FILE_NAME; see losses.losses_of.
    """

    def measure(step: int) -> Record:
        record = losses(step)
        return {"seen_loss": record["val_loss"]} if record else {}

    return measure


def early_losses(out_dir: Path) -> dict[str, float]:
    """Read the loss a token of each watched sample at the second validation, by sample_losses.digest."""
    kept = SampleLosses.read(out_dir, FILE_NAME)
    steps = sorted(kept.losses)[1:2] if kept else []
    if kept is None or not steps:
        return {}
    sums = kept.losses[steps[0]]
    rows = zip(kept.samples, sums, kept.labelled, strict=True)
    return {name: loss / max(1, count) for name, loss, count in rows}


def reviewed(config: FinetuneConfig, data: RunData) -> list[Reviewed]:
    """Read what the run has kept of its watched samples; nothing if it has validated once or never."""
    assert config.out_dir is not None
    kept = SampleLosses.read(config.out_dir, FILE_NAME)
    if kept is None or len(kept.losses) < 2:
        return []
    losses = [kept.losses[step] for step in sorted(kept.losses)]
    found = []
    for at, one in enumerate(contents(config, data)):
        before, early, after = (step[at] / max(1, kept.labelled[at]) for step in (losses[0], losses[1], losses[-1]))
        found.append(replace(one, before=before, after=after, early=early if len(losses) > 2 else None))
    return found


def contents(config: FinetuneConfig, data: RunData) -> Iterator[Reviewed]:
    """Yield the watched samples in the order in which their losses are kept, without losses."""
    some = data.train.take(watched(data, config.eval.train_samples))
    if isinstance(some, Comparisons):
        yield from (_of_comparison(data, some[n].answers) for row in pair_rows(some, data.batching) for n in row)
        return
    for number in by_length(some):
        one = some[number]
        if data.scoring:
            prompt, answer = data.tokenizer.decode(one.tokens[:-1].tolist()), data.scoring.name(int(one.tokens[-1]))
        else:
            prompt, answer = told(data, one)
        yield Reviewed(hash=hash_of(one), prompt=prompt, answer=answer, before=0.0, after=0.0)


def told(data: RunData, sample: Sample) -> tuple[str, str]:
    """Return a sample's prompt and answer; a whole text, or a sample without a label, is an answer to no prompt."""
    (tokens,), (labels,) = collate([[sample]])[:2]
    asked = question(data, tokens, labels) if (labels >= 0).any() else None
    return (asked.prompt, asked.wanted) if asked else ("", data.tokenizer.decode(tokens.tolist()))


def _of_comparison(data: RunData, answers: Sequence[Sample]) -> Reviewed:
    if data.scoring:  # the head reads each answer's last token, behind which a label stands
        shared = shared_tokens(answers)
        answers = [Sample.of(answer.tokens[:-1].tolist(), shared) for answer in answers]
        parts = (answers[0].tokens[:shared], *(answer.tokens[shared:] for answer in answers))
        prompt, *texts = (data.tokenizer.decode(ids.tolist()).strip() for ids in parts)
    else:
        pairs = [told(data, answer) for answer in answers]
        prompt, texts = pairs[0][0], [text for _, text in pairs]
    first, *others = texts
    return Reviewed(hash=hash_of(*answers), prompt=prompt, answer=first, rejected=tuple(others), before=0.0, after=0.0)


def unit_of(config: FinetuneConfig) -> str:
    """Name the unit of the losses of single samples; TOKENS where a model learns to write."""
    if isinstance(config, PreferenceRunConfig):
        return f"the loss {config.preference.loss} of a comparison"
    return {"none": TOKENS, "classify": "nats a text", "regress": "squared errors"}[config.head]


def look(samples: Sequence[Reviewed], unit: str = TOKENS) -> Review:
    """Look for samples that deserve a look; what a base knew or was taught by heart is of samples to write alone."""
    return review(samples, KNOWN if unit == TOKENS else 0.0)


def section(samples: Sequence[Reviewed], found: Review | None = None, unit: str = TOKENS) -> str:
    """Write the section of the report; '' without samples.

    Args:
        found: the review of the samples, if it was made before.
    """
    if not samples:
        return ""
    found = found or look(samples, unit)
    note = (
        f"{len(samples):,} training samples. Losses are {unit}: before training, "
        "at the first validation after it began, at the end. --data.exclude leaves samples out by their hashes."
    )
    parts = [f'<p class="note">{escape(note)}</p>']
    header = ["before", "early", "after", "sample", "prompt", "answer"]
    for title, groups in kinds(found, unit).items():
        rows = [_row(samples[number]) for group in groups[:SHOWN] for number in group]
        parts.append(folded(f"{title}: {len(groups):,}", table(rows, header, "words texts") if rows else ""))
    return "\n".join(parts)


def kinds(found: Review, unit: str = TOKENS) -> Mapping[str, list[list[int]]]:
    """Group what a review found under titles, the most telling first."""
    alike = sorted(found.alike, key=lambda pair: -pair[2])
    every = {
        "Never learnt, worst first": [[number] for number in found.unlearnt],
        "Same prompt, several answers": found.contradicting,
        "Forgotten again": [[number] for number in found.forgotten],
        "Learnt at once": [[number] for number in found.at_once],
        "Copies": found.repeated,
        "Nearly the same prompt": [[one, other] for one, other, _ in alike],
    }
    if unit != TOKENS:
        return every
    return every | {
        "Known by heart, longest answer first": [[number] for number in found.by_heart],
        "Known to the base": [[number] for number in found.known],
    }


def _row(sample: Reviewed) -> Row:
    early = "" if sample.early is None else f"{sample.early:.2f}"
    answer = " | not: ".join([sample.answer, *sample.rejected])
    return [f"{sample.before:.2f}", early, f"{sample.after:.2f}", sample.hash, sample.prompt, answer]
