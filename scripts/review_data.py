"""Say what a run taught about its training data, and write a list of samples to leave out next time.

python scripts/review_data.py out/lora/Llama-2-7b-hf
python finetune/lora.py --data.exclude out/lora/Llama-2-7b-hf/exclude.txt ...
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_qlora import cli
from lit_qlora.inference import adapter_folder, base_of
from lit_qlora.settings import FinetuneConfig, Settings, check
from lit_qlora.settings.limits import Count

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.fabric import Fabric

    from lit_qlora.data import RunData
    from lit_qlora.data.samples import Samples
    from lit_qlora.evaluate.review import Review, Reviewed
    from lit_qlora.model.gpt import GPT

SHOWN = 10  # samples of each kind


@dataclass(frozen=True, kw_only=True)
class ReviewConfig(Settings):
    """Measure each training sample of a run with the base and with the adapter; two forward passes of each.

    It says which answers the adapter knows by heart: the likeliest answer is the sample's, word for word. Validation
    samples, which it has not seen, are counted beside them. It writes OUT/data_review.md, a section of OUT/report.html,
    and OUT/exclude.txt, a list of samples for --data.exclude. Look at it before you use it.
    """

    run: Path
    """Folder of a run, OUT of finetune/lora.py."""
    checkpoint_dir: Path | None = None
    """Base of the adapter. By default its path during training."""
    batch_size: Count = 16
    """Samples per forward pass. Changes memory and speed, not the result."""
    max_samples: Count | None = None
    """Review the first N training samples only. By default all."""


def main(config: ReviewConfig) -> None:
    """Measure, look for samples that deserve a look, and write both files."""
    from lit_qlora.evaluate.review import review
    from lit_qlora.files.atomic import write_text
    from lit_qlora.run.lessons import section
    from lit_qlora.run.page import add_section
    from lit_qlora.run.reports import LESSONS

    check((config.run / "config.yaml").is_file(), f"{config.run} is no folder of a run: it has no config.yaml.")
    samples, unseen = measure(config)
    found = review(samples)
    dropped = found.to_drop(samples)
    lines = [f"{samples[number].hash}  {reason}: {brief(samples[number])}" for number, reason in dropped.items()]
    head = ["# Samples to leave out of training: --data.exclude takes this file. Remove the lines of those to keep."]
    write_text(config.run / "exclude.txt", "\n".join([*head, *lines, ""]))
    write_text(config.run / "data_review.md", "\n".join(page(samples, unseen, found)))
    print("\n".join(summary(samples, unseen, found)))
    if (config.run / "report.html").is_file():
        add_section(config.run / "report.html", LESSONS, section(samples, found))
    print(f"{config.run}/data_review.md   {config.run}/exclude.txt names {len(dropped):,} samples for --data.exclude")


def measure(config: ReviewConfig) -> "tuple[list[Reviewed], list[Reviewed]]":
    """Compute the loss of each training sample, and of each validation sample, with the base alone and the adapter.

    Raises:
        DataError: if the data of the run has changed.
    """
    from lightning.fabric import Fabric

    from lit_qlora.checkpoint.checkpoint import load_stored
    from lit_qlora.data import read_data
    from lit_qlora.device import fabric_precision, pick_device, resolve_precision
    from lit_qlora.errors import DataError
    from lit_qlora.lora.adapter import attach_adapter, check_base, read_adapter
    from lit_qlora.quantize import Storage
    from lit_qlora.run.lessons import early_losses

    path = adapter_folder(config.run)
    adapter, base = read_adapter(path), config.checkpoint_dir or base_of(path)
    check_base(adapter, base)
    run = cli.parse(FinetuneConfig, ["--config", str(config.run / "config.yaml"), f"--checkpoint_dir={base}"])
    data = read_data(run)
    if data.files != (adapter.manifest or {}).get("data"):
        raise DataError(f"The data of {config.run} has changed since the run.")
    train = data.train.take(range(len(data.train))[: config.max_samples])
    fabric = Fabric(devices=1, precision=fabric_precision(resolve_precision(run.precision, pick_device())))
    model = load_stored(base, Storage.of_training(adapter.manifest or {}), fabric.device)
    attach_adapter(model, adapter, base)
    both = [train, data.held_out] if data.held_out is not None and len(data.held_out) else [train]
    early = early_losses(config.run)
    found = [measure_samples(fabric, model, data, samples, config.batch_size, early) for samples in both]
    return found[0], found[1] if len(found) > 1 else []


def measure_samples(
    fabric: "Fabric", model: "GPT", data: "RunData", samples: "Samples", batch_size: int, early: "Mapping[str, float]"
) -> "list[Reviewed]":
    """Compute the loss of some samples with the base alone and with the adapter.

    Args:
        early: see lessons.early_losses.
    """
    from lit_qlora.data import validation_batches
    from lit_qlora.data.batches import by_length
    from lit_qlora.data.exclude import hash_of
    from lit_qlora.evaluate.measures import score_rows
    from lit_qlora.evaluate.review import Reviewed
    from lit_qlora.evaluate.sample_losses import digest
    from lit_qlora.evaluate.validation_inputs import question
    from lit_qlora.lora.layer import without_adapters
    from lit_qlora.signals import StopRequest

    batches = validation_batches(samples, batch_size)
    after = score_rows(fabric, model, batches, StopRequest())
    with without_adapters(model):
        before = score_rows(fabric, model, batches, StopRequest())
    assert before is not None
    assert after is not None
    rows = [row for batch in batches for row in zip(batch.tokens, batch.labels, strict=True)]
    found: dict[int, Reviewed] = {}
    for number, row, was, now in zip(by_length(samples), rows, before.tolist(), after.tolist(), strict=True):
        asked = question(data, *row) if (row[1] >= 0).any() else None
        found[number] = Reviewed(
            hash=hash_of(samples[number]),
            prompt=asked.prompt if asked else "",
            answer=asked.wanted if asked else data.tokenizer.decode(row[0].tolist()),
            before=was[0] / max(1, was[2]),
            after=now[0] / max(1, now[2]),
            early=early.get(digest(*row)),
            said_before=was[1] == was[2] > 0,
            said_after=now[1] == now[2] > 0,
        )
    return [found[number] for number in sorted(found)]


def brief(sample: "Reviewed") -> str:
    """Write prompt and answer in a line."""
    from lit_qlora.run.reports import one_line

    return f"{one_line(sample.prompt, 100)} -> {one_line(sample.answer, 60)}"


def summary(samples: "list[Reviewed]", unseen: "list[Reviewed]", found: "Review") -> list[str]:
    """Say in lines how many samples of each kind there are.

    Args:
        unseen: the validation samples.
    """
    from statistics import fmean

    from lit_qlora.evaluate.review import share

    def by_heart(some: "list[Reviewed]") -> str:
        middle, low, high = share(some)
        return f"{middle:.1%} ({low:.1%} to {high:.1%})"

    beside = f"; of {len(unseen):,} validation answers {by_heart(unseen)}" if unseen else ""
    before, after = (fmean(getattr(sample, when) for sample in samples) for when in ("before", "after"))
    return [
        f"{len(samples):,} training samples, mean loss {before:.4f} before, {after:.4f} after (nats a token)",
        f"  known      {len(found.known):,} that the base answers already",
        f"  unlearnt   {len(found.unlearnt):,} whose loss hardly fell and is above the median",
        f"  at once    {len(found.at_once):,} learnt by the first validation (runs with --eval.train_samples know)",
        f"  forgotten  {len(found.forgotten):,} whose loss rose again after it",
        f"  repeated   {sum(len(group) - 1 for group in found.repeated):,} copies",
        f"  contradict {len(found.contradicting):,} prompts with several answers",
        f"  alike      {len(found.alike):,} pairs of nearly the same prompt",
        f"  by heart   {len(found.by_heart):,} answers word for word that the base does not give, {by_heart(samples)}"
        + beside,
    ]


def page(samples: "list[Reviewed]", unseen: "list[Reviewed]", found: "Review") -> list[str]:
    """Write the page: the counts, and some samples of each kind."""
    from lit_qlora.run.lessons import kinds

    def row(number: int) -> str:
        sample = samples[number]
        return f"* {sample.before:.2f} → {sample.after:.2f}, `{sample.hash}`: {brief(sample)}"

    lines = ["# What the data taught", "", "Losses are nats per labelled token, before → after training.", "", "```"]
    lines += [*summary(samples, unseen, found), "```"]
    for title, groups in kinds(found).items():
        if groups:
            lines += ["", f"## {title}: {len(groups):,}", ""]
            for group in groups[:SHOWN]:
                lines += [*(row(number) for number in group), *([""] if len(group) > 1 else [])]
    return [*lines, ""]


def words() -> list[str]:
    """Return the command line; a first word that is no flag is the run."""
    given = sys.argv[1:]
    return given if not given or given[0].startswith("-") else ["--run", *given]


if __name__ == "__main__":
    cli.run(main, ReviewConfig, words())
