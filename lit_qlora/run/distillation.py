"""The teacher of a run: its checks, its memory, and what it holds likely, computed once and kept with the data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from lit_qlora.checkpoint import quantized_cache
from lit_qlora.checkpoint.checkpoint import check_weights, content_hash, open_weights
from lit_qlora.checkpoint.identity import config_hash
from lit_qlora.checkpoint.score import read as read_head
from lit_qlora.data import RunData
from lit_qlora.data.batches import collate, validation_batches
from lit_qlora.data.samples import Likely, Sample, Samples
from lit_qlora.data.taught import Entry, TaughtSamples, key_of, parts_of, untaught
from lit_qlora.device import pick_device, weights_dtype
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.evaluate.score import TOKENS_AT_ONCE
from lit_qlora.generation.sequences import evaluating
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE
from lit_qlora.prompts.fingerprint import fingerprint
from lit_qlora.quantize import Storage
from lit_qlora.report import tell
from lit_qlora.run.plan import GIB, stored_bytes
from lit_qlora.settings import FinetuneConfig


@dataclass(frozen=True)
class Teacher:
    """A teacher, and the part of its probabilities that is kept.

    Attributes:
        top_k: likeliest tokens that are kept of each labelled one.
        vocab: tokens for which the model and its teacher both have logits.
    """

    config: FinetuneConfig
    model: ModelConfig
    top_k: int
    vocab: int

    @property
    def storage(self) -> Storage:
        """The storage of its weights."""
        return Storage(weights_dtype(self.config.precision), self.config.distill.quantize)

    @property
    def bytes(self) -> float:
        """Bytes that it needs on the device at its peak, before the base is loaded; an estimate."""
        tokens, wide = TOKENS_AT_ONCE[pick_device().type], self.model.ffn_size + 4 * self.model.n_embd
        logits = min(LOGITS_AT_ONCE, tokens * self.model.vocab_size)  # three times in float32
        return stored_bytes(GPT.skeleton(self.model), self.storage) + 4.0 * tokens * wide + 12.0 * logits

    def kept(self, samples: Samples) -> float:
        """Bytes of what is kept of these samples."""
        return float(samples.labelled.sum()) * 4 * (2 * self.top_k + 1)

    def facts(self) -> dict[str, Any]:
        """All that decides what it holds likely, but the samples."""
        assert self.config.teacher_dir is not None
        return {
            "teacher": content_hash(self.config.teacher_dir),
            "model_config": config_hash(self.model),
            "quantize": self.config.distill.quantize,
            "precision": self.config.precision,
            "top_k": self.top_k,
            "temperature": self.config.distill.temperature,
            "vocab": self.vocab,
        }


def find_teacher(config: FinetuneConfig, longest: int) -> Teacher | None:
    """The teacher that the settings name, if they do.

    Args:
        longest: tokens of the longest sample.

    Raises:
        CheckpointError: if it is no checkpoint, or is damaged.
        UsageError: if it reads other tokens than the base, or fewer of them.
    """
    directory = config.teacher_dir
    if directory is None:
        return None
    if not directory.is_dir():
        raise CheckpointError(f"distill.teacher {directory} is no folder. Give a checkpoint, or base.")
    model, base = ModelConfig.load(directory), ModelConfig.load(config.checkpoint_dir)
    if read_head(directory) is not None:
        raise UsageError(
            f"distill.teacher {directory} has a head that reads labels, and gives no lesson in writing.\n"
            "Take the base that it was merged from."
        )
    weights = open_weights(directory)
    check_weights(weights.specs, model, str(weights.location))
    if fingerprint(directory) != fingerprint(config.checkpoint_dir):
        raise UsageError(
            f"distill.teacher {directory} has another tokenizer than {config.checkpoint_dir}, so its probabilities "
            "are of other tokens.\nTake a teacher of the same family, or compare tokenizer files and special tokens."
        )
    if model.block_size < longest:
        raise UsageError(
            f"distill.teacher {model.name} reads {model.block_size} tokens, and a sample has {longest}.\n"
            f"Take --data.max_length {model.block_size}."
        )
    vocab = min(model.vocab_size, base.vocab_size)
    return Teacher(config, model, min(config.distill.top_k, vocab), vocab)


def untaught_data(data: RunData, teacher: Teacher) -> RunData:
    """The data as if the teacher had said nothing yet, for a plan and for a dry run."""
    assert isinstance(data.train, Samples)
    assert data.held_out is not None
    train, held_out = (untaught(some, teacher.top_k) for some in (data.train, data.held_out))
    return _with(data, train, held_out)


def with_teacher(fabric: Fabric, data: RunData, teacher: Teacher) -> RunData:
    """The data with what the teacher holds likely, from the cache or computed now; the teacher is then gone again."""
    assert isinstance(data.train, Samples)
    assert data.held_out is not None
    config = teacher.config

    @cache
    def load() -> GPT:
        assert config.teacher_dir is not None
        tell(f"  teacher {teacher.model.name} reads the data")
        model = quantized_cache.load(config.teacher_dir, teacher.storage, fabric.device, config.quantize_cache)
        return model.requires_grad_(False)

    try:
        train, held_out = (_taught(fabric, some, teacher, load) for some in (data.train, data.held_out))
    finally:
        load.cache_clear()
    if fabric.device.type == "cuda":
        torch.cuda.empty_cache()
    return _with(data, train, held_out)


def _with(data: RunData, train: TaughtSamples, held_out: TaughtSamples) -> RunData:
    rows = max((len(batch.tokens) for batch in data.val_batches), default=1)
    return replace(data, train=train, held_out=held_out, val_batches=validation_batches(held_out, rows))


def _taught(fabric: Fabric, samples: Samples, teacher: Teacher, load: Any) -> TaughtSamples:
    """The samples with what the teacher holds likely; processes on a machine divide the work."""
    facts = teacher.facts()
    entry = Entry(teacher.config.data.cache_dir, key_of(samples, facts), teacher.top_k)
    parts = parts_of(samples)
    counts = [int(samples.labelled[part.start : part.stop].sum()) for part in parts]
    found = [entry.find(number, count) for number, count in enumerate(counts)]
    for turn in ("mine", "left"):  # of other machines, whose folder is another one
        for number, part in enumerate(parts):
            mine = turn == "left" or number % fabric.world_size == fabric.global_rank
            found[number] = found[number] or entry.find(number, counts[number])
            if mine and found[number] is None:
                found[number] = entry.keep(
                    number, compute(fabric, load(), samples[part.start : part.stop], teacher), facts
                )
        fabric.barrier()
    return TaughtSamples(samples, [part for part in found if part is not None])


def compute(fabric: Fabric, model: GPT, samples: Sequence[Sample], teacher: Teacher) -> Likely:
    """The likeliest tokens of the teacher at the labelled tokens of these samples, in their order."""
    order = sorted(range(len(samples)), key=lambda i: len(samples[i].tokens))
    at_once = TOKENS_AT_ONCE["cuda" if fabric.device.type == "cuda" else "cpu"]
    found: dict[int, tuple[Tensor, Tensor]] = {}
    with evaluating(model), torch.no_grad(), fabric.autocast():
        while order:
            rows = max(1, at_once // len(samples[order[-1]].tokens))  # the longest first
            some, order = order[-rows:], order[:-rows]
            ids, log_probs = _read(model, [samples[i] for i in some], teacher)
            lengths = [samples[i].labelled for i in some]
            found |= dict(zip(some, zip(ids.split(lengths), log_probs.split(lengths), strict=True), strict=True))
    sides = zip(*(found[i] for i in range(len(samples))), strict=True)
    return Likely(*(torch.cat(side).numpy() for side in sides))


def _read(model: GPT, samples: Sequence[Sample], teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Ids (L, K) and log-probabilities (L, K + 1) at the labelled tokens of these samples, on the host."""
    batch, device = collate([[sample] for sample in samples]), model.embed.weight.device
    hidden = model.hidden(batch.tokens.to(device))[(batch.labels >= 0).to(device)]
    most = max(1, LOGITS_AT_ONCE // model.config.vocab_size)
    parts = [likely(model.logits(some)[:, : teacher.vocab], teacher) for some in hidden.split(most)]
    ids, log_probs = (torch.cat(side) for side in zip(*parts, strict=True))
    return ids, log_probs


def likely(logits: Tensor, teacher: Teacher) -> tuple[Tensor, Tensor]:
    """Of logits (L, V) the likeliest tokens, and their log-probabilities with that of all others behind them."""
    log_probs = (logits.float() / teacher.config.distill.temperature).log_softmax(-1)
    best, ids = log_probs.topk(teacher.top_k)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return ids.int().cpu(), torch.cat((best, rest), 1).cpu()


def describe(teacher: Teacher, data: RunData) -> str:
    """A line of the banner about the teacher."""
    assert isinstance(data.train, Samples)
    assert data.held_out is not None
    how, size = teacher.config.distill, teacher.kept(data.train) + teacher.kept(data.held_out)
    storage = "" if how.quantize == "none" else f" in {how.quantize}"
    return (
        f"  teacher {teacher.model.name}{storage}, about {teacher.bytes / GIB:.2f} GiB before the base is loaded   "
        f"{teacher.top_k} tokens kept of each labelled one, {size / GIB:.2f} GiB in the cache   "
        f"weight {how.weight:g}, temperature {how.temperature:g}\n"
    )
