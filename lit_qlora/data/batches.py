"""From samples to batches. The order is a pure function of (seed, epoch), so that resuming needs a counter only."""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_qlora.data.samples import Sample
from lit_qlora.model import IGNORE

PAD = 0  # any id will do: padding follows the text, so nothing before it sees it, and its labels are IGNORE


class Batch(NamedTuple):
    """Samples side by side, padded on the right."""

    tokens: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64; labels[b, t] is the token that should follow tokens[b, t], or IGNORE."""


class Step(NamedTuple):
    """What one optimizer step reads."""

    batches: list[Batch]
    """The micro-batches of this rank; every rank has the same number of them."""
    labelled: int
    """Labelled tokens of the whole step, over all ranks."""
    tokens: int
    """Tokens of the whole step that are not padding, over all ranks."""
    samples: int
    epoch: float
    """Passes over the data when the step is done."""


def collate(samples: Sequence[Sample]) -> Batch:
    """Shift, mask and pad. The only place where labels are shifted; padding is masked by position, never by id."""
    width = max(len(sample.tokens) for sample in samples) - 1
    tokens = torch.full((len(samples), width), PAD)
    labels = torch.full((len(samples), width), IGNORE)
    for row, (ids, prompt_length) in enumerate(samples):
        tokens[row, : len(ids) - 1] = torch.tensor(ids[:-1])
        labels[row, prompt_length - 1 : len(ids) - 1] = torch.tensor(ids[prompt_length:])
    return Batch(tokens, labels)


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of the samples in one epoch."""
    permutation: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return permutation


def count_steps(count: int, batch_size: int, epochs: float, max_steps: int | None = None) -> int:
    """Optimizer steps of a run; an epoch that does not divide evenly ends with a smaller step."""
    whole, part = divmod(epochs, 1)
    total = int(whole) * math.ceil(count / batch_size) + math.ceil(round(part * count) / batch_size)
    return max(1, total if max_steps is None else min(total, max_steps))


def steps(
    samples: Sequence[Sample],
    batch_size: int,
    micro_batch_size: int,
    total: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[Step]:
    """The first `total` optimizer steps, each with the micro-batches of `rank`."""
    per_epoch = math.ceil(len(samples) / batch_size)
    for number in range(total):
        epoch, place = divmod(number, per_epoch)
        if place == 0:
            shuffled = order(len(samples), seed, epoch)
        chosen = [samples[i] for i in shuffled[place * batch_size : (place + 1) * batch_size]]
        micro = [chosen[i : i + micro_batch_size] for i in range(0, len(chosen), micro_batch_size)]
        mine = [collate(group) for group in micro[rank::world_size]]
        for _ in range(math.ceil(len(micro) / world_size) - len(mine)):
            mine.append(_unlabelled(chosen[:1]))  # ranks meet in every backward pass, so none may be missing
        yield Step(
            batches=mine,
            labelled=sum(sample.labelled for sample in chosen),
            tokens=sum(len(sample.tokens) for sample in chosen),
            samples=len(chosen),
            epoch=epoch + min(1.0, (place + 1) * batch_size / len(samples)),
        )


def validation_batches(samples: Sequence[Sample], micro_batch_size: int) -> list[Batch]:
    """All samples once, sorted by length so that little is padding."""
    ordered = sorted(samples, key=lambda sample: len(sample.tokens))
    return [collate(ordered[i : i + micro_batch_size]) for i in range(0, len(ordered), micro_batch_size)]


def _unlabelled(samples: Sequence[Sample]) -> Batch:
    batch = collate(samples)
    return Batch(batch.tokens, torch.full_like(batch.labels, IGNORE))
