"""The parts of a run on comparisons alone: its reference, and a warning."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
from lightning.fabric import Fabric

from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.data import RunData
from lit_qlora.data import reference as references
from lit_qlora.data.batches import lay, micro_batches, rows_of
from lit_qlora.data.comparisons import Comparisons, Floats, PairBatch
from lit_qlora.data.sources import sha256
from lit_qlora.evaluate.preferences import log_probabilities
from lit_qlora.model.gpt import GPT
from lit_qlora.report import Record, short, tell
from lit_qlora.settings import PreferenceRunConfig


def off_the_fast_path(config: PreferenceRunConfig) -> PreferenceRunConfig:
    """The settings, on the plain path if head or embeddings learn.

    The fast path has the gradient of the head, which may be tied to the embeddings, for the sum of losses alone.

    Args:
        config: with the adapter's own settings, see lora.adapter.settle.
    """
    lora = config.lora
    learns = "head" in lora.targets or lora.train_embeddings or bool(lora.train_tokens)
    if not learns or not config.train.fast:
        return config
    tell("  note    head or embeddings learn, so this run on preferences takes the plain path")
    return replace(config, train=replace(config.train, fast=False))


def with_reference(fabric: Fabric, model: GPT, data: RunData, config: PreferenceRunConfig) -> RunData:
    """The data with the log-probabilities of all answers before training, if the loss reads them.

    Call it on the path of the run, before a checkpoint is restored. The model is then the one that the run starts
    from, the base or lora.start. So the reference has the rounding of what is compared with it.
    """
    if not config.preference.published.reference:
        return data
    assert isinstance(data.train, Comparisons)
    assert data.val is not None
    train = _referred(fabric, model, data.train, data, config, "training")
    return replace(data, train=train, val=_referred(fabric, model, data.val, data, config, "validation"))


def _referred(
    fabric: Fabric, model: GPT, comparisons: Comparisons, data: RunData, config: PreferenceRunConfig, name: str
) -> Comparisons:
    if not len(comparisons):
        return comparisons
    where, count = config.data.cache_dir, len(comparisons.samples)
    key, found = "", None
    if fabric.is_global_zero:
        key = references.key_of(comparisons, facts_of(config, model))
        found = references.find(where, key, count)
    found = fabric.broadcast(found)
    cached = found is not None
    if found is None:
        found = compute(fabric, model, comparisons, data)
        if fabric.is_global_zero:
            references.keep(where, key, found)
    if fabric.is_global_zero:
        tell(f"  before  log-probabilities of {count:,} {name} answers{'   from the cache' * cached}")
    return comparisons.with_reference(found)


def facts_of(config: PreferenceRunConfig, model: GPT) -> dict[str, Any]:
    """All that the log-probabilities before training depend on, but the answers."""
    lora: dict[str, Any] = {}
    if config.lora.start is not None or config.lora.init != "default":
        lora = {name: str(value) for name, value in asdict(config.lora).items()}
        files = sorted(config.lora.start.glob("adapter_*")) if config.lora.start else []
        lora |= {file.name: sha256(file) for file in files}
    return {
        "base": content_hash(config.checkpoint_dir),
        "quantize": [config.quantize, config.quantize_head, *config.quantization.layers],
        "precision": config.precision,
        "path": [model.fast is not None, config.train.fp8],
        "lora": lora,
    }


def compute(fabric: Fabric, model: GPT, comparisons: Comparisons, data: RunData) -> Floats:
    """The log-probability of each answer, (S,)."""
    rows = rows_of(range(len(comparisons)), comparisons.lengths.tolist(), data.batching)
    micro = micro_batches(rows, data.batching.micro_batch_size, 1)
    batches: list[PairBatch] = [
        lay([[comparisons[i] for i in row] for row in group], data.batching)  # type: ignore[misc]
        for group in micro
    ]
    found = np.zeros(len(comparisons.samples), np.float32)
    for row, values in zip(rows, log_probabilities(fabric, model, batches), strict=True):
        answers = np.concatenate([np.arange(comparisons.bounds[i], comparisons.bounds[i + 1]) for i in row])
        found[answers] = values[: len(answers)]
    return found


def falling(records: Sequence[Record]) -> str:
    """A warning if chosen answers have become less likely since the first validation; '' if not."""
    found = [record["val_logp_chosen"] for record in records if "val_logp_chosen" in record]
    if len(found) < 2 or found[-1] >= found[0]:
        return ""
    return (
        f"chosen answers have become less likely: log-probability {short(found[0])} -> {short(found[-1])}. "
        "The rejected ones lost more, but what took their place is neither. A larger --preference.sft_weight, such as "
        "1, a larger beta or a lower learning rate keep chosen answers likely."
    )
