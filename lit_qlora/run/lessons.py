"""Lessons of a run about its training samples: their losses at its validations, and a section of its report."""

from collections.abc import Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora.data import RunData, validation_batches
from lit_qlora.data.batches import SampleBatch, by_length
from lit_qlora.data.exclude import hash_of
from lit_qlora.data.samples import Samples
from lit_qlora.evaluate import sample_losses
from lit_qlora.evaluate.measures import Losses, Measure, Show
from lit_qlora.evaluate.review import Review, Reviewed, review
from lit_qlora.evaluate.sample_losses import SampleLosses
from lit_qlora.evaluate.validation_inputs import question
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record
from lit_qlora.run.page import Row, folded, table
from lit_qlora.settings import FinetuneConfig
from lit_qlora.signals import StopRequest

if TYPE_CHECKING:
    from lightning.fabric import Fabric

FILE_NAME = "training_losses.json"
SHOWN = 10  # samples, or groups of them, of each kind


def watched(data: RunData, count: int) -> list[int]:
    """Choose the numbers of so many training samples, evenly among all."""
    total = len(data.train)
    return [number * total // min(count, total) for number in range(min(count, total))]


def batches_of(config: FinetuneConfig, data: RunData) -> list[SampleBatch]:
    """Lay out the watched samples."""
    assert isinstance(data.train, Samples)
    return validation_batches(data.train.take(watched(data, config.eval.train_samples)), config.train.micro_batch_size)


def seen_measure(
    fabric: "Fabric", model: GPT, config: FinetuneConfig, data: RunData, stop: StopRequest, show: Show
) -> Measure:
    """Measure the watched training samples as validation samples are, and keep the losses of each in OUT."""
    assert config.out_dir is not None
    batches = batches_of(config, data)
    keep = partial(sample_losses.keep, config.out_dir, batches, name=FILE_NAME)
    losses = Losses(fabric, model, batches, stop, keep, show, config.distill)

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
    assert isinstance(data.train, Samples)
    kept = SampleLosses.read(config.out_dir, FILE_NAME)
    if kept is None or len(kept.losses) < 2:
        return []
    samples = data.train.take(watched(data, config.eval.train_samples))
    rows = [row for batch in batches_of(config, data) for row in zip(batch.tokens, batch.labels, strict=True)]
    losses = [kept.losses[step] for step in sorted(kept.losses)]
    found = []
    for at, (number, row) in enumerate(zip(by_length(samples), rows, strict=True)):
        asked = question(data, *row) if kept.labelled[at] else None
        before, early, after = (step[at] / max(1, kept.labelled[at]) for step in (losses[0], losses[1], losses[-1]))
        found.append(
            Reviewed(
                hash=hash_of(samples[number]),
                prompt=asked.prompt if asked else "",
                answer=asked.wanted if asked else data.tokenizer.decode(row[0].tolist()),
                before=before,
                after=after,
                early=early if len(losses) > 2 else None,
            )
        )
    return found


def section(samples: Sequence[Reviewed], found: Review | None = None) -> str:
    """Write the section of the report; '' without samples.

    Args:
        found: the review of the samples, if it was made before.
    """
    if not samples:
        return ""
    found = found or review(samples)
    note = (
        f"{len(samples):,} training samples. Losses are nats per labelled token: before training, "
        "at the first validation after it began, at the end. --data.exclude leaves samples out by their hashes."
    )
    parts = [f'<p class="note">{escape(note)}</p>']
    header = ["before", "early", "after", "sample", "prompt", "answer"]
    for title, groups in kinds(found).items():
        rows = [_row(samples[number]) for group in groups[:SHOWN] for number in group]
        parts.append(folded(f"{title}: {len(groups):,}", table(rows, header, "words texts") if rows else ""))
    return "\n".join(parts)


def kinds(found: Review) -> Mapping[str, list[list[int]]]:
    """Group what a review found under titles, the most telling first."""
    alike = sorted(found.alike, key=lambda pair: -pair[2])
    return {
        "Never learnt, worst first": [[number] for number in found.unlearnt],
        "Same prompt, several answers": found.contradicting,
        "Forgotten again": [[number] for number in found.forgotten],
        "Learnt at once": [[number] for number in found.at_once],
        "Copies": found.repeated,
        "Nearly the same prompt": [[one, other] for one, other, _ in alike],
        "Known by heart, longest answer first": [[number] for number in found.by_heart],
        "Known to the base": [[number] for number in found.known],
    }


def _row(sample: Reviewed) -> Row:
    early = "" if sample.early is None else f"{sample.early:.2f}"
    return [f"{sample.before:.2f}", early, f"{sample.after:.2f}", sample.hash, sample.prompt, sample.answer]
