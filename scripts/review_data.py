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
from lit_qlora.settings import FinetuneConfig, PreferenceRunConfig, Settings, check, is_of_preferences
from lit_qlora.settings.limits import Count
from lit_qlora.settings.preference import NO_OWN_LOSS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from lightning.fabric import Fabric

    from lit_qlora.data import RunData
    from lit_qlora.data.samples import Samples
    from lit_qlora.evaluate.review import Review, Reviewed
    from lit_qlora.model.gpt import GPT

SHOWN = 10  # samples of each kind
BATCH = 16
"""Samples per forward pass by default."""


@dataclass(frozen=True, kw_only=True)
class ReviewConfig(Settings):
    """Measure each training sample of a run with the base and with the adapter; two forward passes of each.

    It says which answers the adapter knows by heart: the likeliest answer is the sample's, word for word. Validation
    samples, which it has not seen, are counted beside them. It writes OUT/data_review.md, a section of OUT/report.html,
    and OUT/exclude.txt, a list of samples for --data.exclude. Look at it before you use it.

    Of a run on preferences, or with a head, it reviews the samples whose losses the run has kept: --eval.train_samples.
    """

    run: Path
    """Folder of a run, OUT of finetune/lora.py."""
    checkpoint_dir: Path | None = None
    """Base of the adapter. By default its path during training."""
    batch_size: Count | None = None
    """Samples per forward pass. Changes memory and speed, not the result. By default 16."""
    max_samples: Count | None = None
    """Review the first N training samples only. By default all."""


def main(config: ReviewConfig) -> None:
    """Measure, look for samples that deserve a look, and write both files."""
    from lit_qlora.files.atomic import write_text
    from lit_qlora.run.lessons import TOKENS, look, section, unit_of
    from lit_qlora.run.page import add_section
    from lit_qlora.run.reports import LESSONS

    check((config.run / "config.yaml").is_file(), f"{config.run} is no folder of a run: it has no config.yaml.")
    run, data = read_run(config)
    unit = unit_of(run)
    samples, unseen = measure(config, run, data) if unit == TOKENS else (kept(config, run, data), [])
    found = look(samples, unit)
    dropped = found.to_drop(samples)
    lines = [f"{samples[number].hash}  {reason}: {brief(samples[number])}" for number, reason in dropped.items()]
    head = ["# Samples to leave out of training: --data.exclude takes this file. Remove the lines of those to keep."]
    write_text(config.run / "exclude.txt", "\n".join([*head, *lines, ""]))
    write_text(config.run / "data_review.md", "\n".join(page(samples, unseen, found, unit)))
    print("\n".join(summary(samples, unseen, found, unit)))
    if (config.run / "report.html").is_file():
        add_section(config.run / "report.html", LESSONS, section(samples, found, unit))
    print(f"{config.run}/data_review.md   {config.run}/exclude.txt names {len(dropped):,} samples for --data.exclude")


def read_run(config: ReviewConfig) -> "tuple[FinetuneConfig, RunData]":
    """Read the settings of the run and its data.

    Raises:
        DataError: if the data has changed.
    """
    from lit_qlora.data.of_run import read_of_run
    from lit_qlora.errors import DataError
    from lit_qlora.lora.adapter import check_base, read_adapter

    path, given = adapter_folder(config.run), ["--config", str(config.run / "config.yaml")]
    base = config.checkpoint_dir or base_of(path)
    kind = PreferenceRunConfig if is_of_preferences(given) else FinetuneConfig
    run = cli.parse(kind, [*given, f"--checkpoint_dir={base}", f"--out_dir={config.run}"])
    adapter = read_adapter(path, heads=True)
    check_base(adapter, base)
    data = read_of_run(run)
    if data.files != (adapter.manifest or {}).get("data"):
        raise DataError(f"The data of {config.run} has changed since the run.")
    return run, data


def kept(config: ReviewConfig, run: FinetuneConfig, data: "RunData") -> "list[Reviewed]":
    """Read the losses that a run on preferences, or with a head, has kept of some of its training samples.

    Raises:
        UsageError: if it kept none, or a setting of a measurement is given.
    """
    from lit_qlora.run.lessons import reviewed

    if isinstance(run, PreferenceRunConfig):
        check(run.preference.published.paired, f"{config.run} cannot be reviewed sample by sample. {NO_OWN_LOSS}")
    for name in ("max_samples", "batch_size"):
        said = f"{name} has no effect on {config.run}, whose losses were kept by the run. Leave it out."
        check(getattr(config, name) is None, said)
    found = reviewed(run, data)
    check(
        bool(found),
        f"{config.run} learnt {'from comparisons' if data.val else 'labels'}, and kept no losses of single samples.\n"
        "Train with --eval.train_samples N to review N of them.",
    )
    return found


def measure(config: ReviewConfig, run: FinetuneConfig, data: "RunData") -> "tuple[list[Reviewed], list[Reviewed]]":
    """Compute the loss of each training sample, and of each validation sample, with the base alone and the adapter."""
    from lightning.fabric import Fabric

    from lit_qlora.checkpoint.checkpoint import load_stored
    from lit_qlora.device import fabric_precision, pick_device, resolve_precision
    from lit_qlora.lora.adapter import attach_adapter, read_adapter
    from lit_qlora.quantize import Storage
    from lit_qlora.run.lessons import early_losses

    adapter, base = read_adapter(adapter_folder(config.run)), run.checkpoint_dir
    train = data.train.take(range(len(data.train))[: config.max_samples])
    fabric = Fabric(devices=1, precision=fabric_precision(resolve_precision(run.precision, pick_device())))
    model = load_stored(base, Storage.of_training(adapter.manifest or {}), fabric.device)
    attach_adapter(model, adapter, base)
    both = [train, data.held_out] if data.held_out is not None and len(data.held_out) else [train]
    early = early_losses(config.run)
    found = [measure_samples(fabric, model, data, samples, config.batch_size or BATCH, early) for samples in both]
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

    others = "".join(f" | not: {one_line(answer, 60)}" for answer in sample.rejected)
    return f"{one_line(sample.prompt, 100)} -> {one_line(sample.answer, 60)}{others}"


def summary(samples: "list[Reviewed]", unseen: "list[Reviewed]", found: "Review", unit: str) -> list[str]:
    """Say in lines how many samples of each kind there are.

    Args:
        unseen: the validation samples.
        unit: of the losses.
    """
    from statistics import fmean

    from lit_qlora.evaluate.review import share
    from lit_qlora.run.lessons import TOKENS

    def by_heart(some: "list[Reviewed]") -> str:
        middle, low, high = share(some)
        return f"{middle:.1%} ({low:.1%} to {high:.1%})"

    beside = f"; of {len(unseen):,} validation answers {by_heart(unseen)}" if unseen else ""
    before, after = (fmean(getattr(sample, when) for sample in samples) for when in ("before", "after"))
    lines = [
        f"{len(samples):,} training samples, mean loss {before:.4f} before, {after:.4f} after ({unit})",
        f"  unlearnt   {len(found.unlearnt):,} whose loss hardly fell and is above the median",
        f"  at once    {len(found.at_once):,} learnt by the first validation (runs with --eval.train_samples know)",
        f"  forgotten  {len(found.forgotten):,} whose loss rose again after it",
        f"  repeated   {sum(len(group) - 1 for group in found.repeated):,} copies",
        f"  contradict {len(found.contradicting):,} prompts with several answers",
        f"  alike      {len(found.alike):,} pairs of nearly the same prompt",
    ]
    if unit != TOKENS:
        return lines
    lines.insert(1, f"  known      {len(found.known):,} that the base answers already")
    heart = f"{len(found.by_heart):,} answers word for word that the base does not give, {by_heart(samples)}{beside}"
    return [*lines, f"  by heart   {heart}"]


def page(samples: "list[Reviewed]", unseen: "list[Reviewed]", found: "Review", unit: str) -> list[str]:
    """Write the page: the counts, and some samples of each kind."""
    from lit_qlora.run.lessons import kinds

    def row(number: int) -> str:
        sample = samples[number]
        return f"* {sample.before:.2f} → {sample.after:.2f}, `{sample.hash}`: {brief(sample)}"

    lines = ["# What the data taught", "", f"Losses are {unit}, before → after training.", "", "```"]
    lines += [*summary(samples, unseen, found, unit), "```"]
    for title, groups in kinds(found, unit).items():
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
