"""From samples to batches. The order is a pure function of (seed, epoch), so that resuming needs a counter only."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lit_qlora.data.comparisons import Comparison, Comparisons, PairBatch, collate_comparisons
from lit_qlora.data.packing import longest_first, pack
from lit_qlora.data.samples import Sample, Samples
from lit_qlora.model.gpt import IGNORE

T = TypeVar("T")
PAD = 0  # any id will do: padding follows the text, so nothing before it sees it, and its labels are IGNORE
PACKED_MULTIPLE = 64  # of the length of packed rows, which products of matrices like
SORTED_AT_ONCE = 50  # batches whose samples are sorted together by group_by_length; transformers' own figure


class Batch(NamedTuple):
    """Rows of samples, padded on the right. The fields are the arguments of GPT.loss."""

    tokens: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64; labels[b, t] is the token that should follow tokens[b, t], or IGNORE."""
    weights: Tensor | None = None
    """(B, T) float32, what the loss of each label is multiplied by; None is 1 everywhere."""
    positions: Tensor | None = None
    """(B, T) int64, the position of each token in its sample, 0 for padding. None if not packed."""
    segments: Tensor | None = None
    """(B, T) int32, the number of each token's sample in its row, -1 for padding. None if not packed."""


class TaughtBatch(NamedTuple):
    """A Batch, and what a teacher holds likely; see model.lesson."""

    tokens: Tensor
    labels: Tensor
    weights: Tensor | None
    positions: Tensor | None
    segments: Tensor | None
    ids: Tensor
    """(B, T, K) int32, its likeliest tokens behind each token; any where there is no label."""
    log_probs: Tensor
    """(B, T, K + 1) float32, of these tokens, and of all others together."""

    @property
    def plain(self) -> Batch:
        """The batch without the teacher."""
        return Batch(*self[:5])


SampleBatch = Batch | TaughtBatch
AnyBatch = SampleBatch | PairBatch
Content = Samples | Comparisons
"""Samples, each with a loss of its own, or comparisons of several."""


class Step(NamedTuple):
    """The data of one optimizer step."""

    batches: list[AnyBatch]
    """The micro-batches of this rank, one more or less than another's; none if the step has fewer rows than ranks."""
    weight: float
    """Sum of the weights of all labels of the whole step, over all ranks; the loss is divided by it."""
    labelled: int
    """Labelled tokens of the whole step, over all ranks."""
    tokens: int
    """Tokens of the whole step that are not padding, over all ranks."""
    samples: int
    epoch: float
    """Passes over the data when the step is done."""
    numbers: tuple[int, ...] = ()
    """The numbers of these samples."""
    filled: tuple[int, ...] = ()
    """Positions of each row of these micro-batches, in their order, that are not padding; none where all are filled."""


@dataclass(frozen=True, kw_only=True)
class Batching:
    """Settings that make steps of samples.

    Only batch_size, weighting, the order, and what alters samples change the gradient of a step.
    """

    batch_size: int
    """Samples of an optimizer step, over all devices."""
    micro_batch_size: int
    """Rows of a forward pass on one device; a row is a sample, or several if they are packed."""
    seed: int
    shuffle: bool = True
    drop_last: bool = False
    """Leave out the last step of an epoch where it would be smaller."""
    group_by_length: bool = False
    """Make steps of samples of similar length."""
    weighting: Literal["tokens", "samples"] = "tokens"
    """The loss of a step is the mean over its labelled tokens, or the mean over its samples of such means; weights of
    answers weigh either."""
    row_length: int | None = None
    """Lay samples end to end in rows of at most so many tokens; None gives each a row of its own."""
    multiple: int = 1
    """Rows that are not packed are padded to a multiple of this."""
    length_quantile: float = 1.0
    """Samples of a step lose their beginnings beyond this quantile of the step's lengths."""
    token_dropout: float = 0.0
    """Probability that a token becomes `mask_id` and loses its label."""
    mask_id: int = 0
    shares: tuple[tuple[int, float], ...] = ()
    """(samples, times) of each source, in their order: how often an epoch sees it, 1 by default, 0.5 for another half
    of it in each epoch."""

    @property
    def alters(self) -> bool:
        """True if samples are trained on in another form than they were encoded in."""
        return self.length_quantile < 1 or self.token_dropout > 0


def padded_width(longest: int, batching: Batching) -> int:
    """Positions of each row of a micro-batch whose longest row needs `longest`."""
    if batching.row_length is not None:
        return min(batching.row_length, -(-longest // PACKED_MULTIPLE) * PACKED_MULTIPLE)
    return -(-longest // batching.multiple) * batching.multiple


def lay(
    rows: Sequence[Sequence[Sample | Comparison]], batching: Batching | None = None, width: int | None = None
) -> AnyBatch:
    """Make a micro-batch of rows of samples, or of rows of comparisons; see collate."""
    longest = max(sum(one.positions for one in row) for row in rows)
    width = width or (padded_width(longest, batching) if batching else longest)
    if isinstance(rows[0][0], Comparison):
        return collate_comparisons(rows, width)  # type: ignore[arg-type]
    return collate(rows, batching, width)  # type: ignore[arg-type]


def collate(
    rows: Sequence[Sequence[Sample]], batching: Batching | None = None, width: int | None = None
) -> SampleBatch:
    """Shift, mask and pad. Labels are shifted nowhere else; padding is masked by position, never by id.

    The last token of a sample is a label only, so a sample of T tokens takes T - 1 positions of its row.

    Args:
        width: positions of a row; by default as many as the longest row needs.
    """
    packed = batching is not None and batching.row_length is not None
    longest = max(sum(sample.positions for sample in row) for row in rows)
    width = width or (padded_width(longest, batching) if batching else longest)
    tokens = np.full((len(rows), width), PAD, np.int64)
    labels = np.full((len(rows), width), IGNORE, np.int64)
    weights = np.zeros((len(rows), width), np.float32)
    positions = np.zeros((len(rows), width), np.int64)
    segments = np.full((len(rows), width), -1, np.int32)
    by_sample = batching is not None and batching.weighting == "samples"
    weighed = by_sample or (batching is not None and any(one.weights is not None for row in rows for one in row))
    for b, row in enumerate(rows):
        start = 0
        for number, sample in enumerate(row):
            ids, trained = sample.tokens, sample.trained
            here = slice(start, start + len(ids) - 1)
            tokens[b, here] = ids[:-1]
            labels[b, here] = np.where(trained[1:], ids[1:], IGNORE)
            share = 1 / max(1, sample.labelled) if by_sample else 1.0
            weights[b, here] = share if sample.weights is None else share * sample.weights[1:]
            positions[b, here] = np.arange(len(ids) - 1)
            segments[b, here] = number
            start = here.stop
    batch = Batch(
        torch.from_numpy(tokens),
        torch.from_numpy(labels),
        torch.from_numpy(weights) if weighed else None,
        torch.from_numpy(positions) if packed else None,
        torch.from_numpy(segments) if packed else None,
    )
    return batch if rows[0][0].likely is None else _taught(batch, [sample for row in rows for sample in row])


def _taught(batch: Batch, samples: Sequence[Sample]) -> TaughtBatch:
    """Lay what a teacher holds likely behind the labelled tokens of these samples, which stand in their order."""
    likely = [sample.likely for sample in samples if sample.likely is not None]
    at = (batch.labels != IGNORE).flatten().nonzero()[:, 0]
    ids, log_probs = (torch.from_numpy(np.concatenate(side)) for side in zip(*likely, strict=True))
    shape, count = batch.labels.shape, batch.labels.numel()
    each = (part.new_zeros(count, part.size(1)).index_copy_(0, at, part) for part in (ids, log_probs))
    return TaughtBatch(*batch, *(part.view(*shape, -1) for part in each))


def order(count: int, seed: int, epoch: int) -> list[int]:
    """The numbers below `count`, in a random order."""
    permutation: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + epoch)).tolist()
    return permutation


def epoch_length(count: int, batching: Batching) -> int:
    """Count the samples that one epoch sees, a repeated one each time; `count` samples exist."""
    return sum(round(size * times) for size, times in batching.shares) if batching.shares else count


def times_seen(count: int, batching: Batching) -> list[float]:
    """Return the times that an epoch sees each of `count` samples."""
    return [times for size, times in batching.shares or ((count, 1.0),) for _ in range(size)]


def epoch_order(lengths: Sequence[int], batching: Batching, epoch: int) -> list[int]:
    """Return the samples of one epoch in their order; a pure function of the arguments.

    Args:
        lengths: tokens of each sample.
    """
    seed = batching.seed
    chosen: list[int] = []
    start = 0
    for size, times in batching.shares or ((len(lengths), 1.0),):
        whole, part = divmod(round(size * times), max(1, size))
        some = order(size, seed + start, epoch)[:part] if batching.shuffle else range(part)
        chosen += [*(start + i for _ in range(whole) for i in range(size)), *(start + i for i in some)]
        start += size
    if batching.shuffle:
        chosen = [chosen[i] for i in order(len(chosen), seed, epoch)]
    if not batching.group_by_length:
        return chosen
    batch, together = batching.batch_size, batching.batch_size * SORTED_AT_ONCE
    groups = [chosen[i : i + together] for i in range(0, len(chosen), together)]
    chosen = [sample for group in groups for sample in sorted(group, key=lambda i: -lengths[i])]
    full = len(chosen) // batch
    batches = [chosen[i * batch : (i + 1) * batch] for i in order(full, seed, epoch)]
    # The longest comes first, so that a run that does not fit into memory fails at once.
    longest = max(range(full), key=lambda number: max(lengths[i] for i in batches[number]), default=0)
    batches.insert(0, batches.pop(longest)) if batches else None
    return [sample for members in batches for sample in members] + chosen[full * batch :]


def steps_of_an_epoch(count: int, batching: Batching) -> int:
    """Optimizer steps of one pass over `count` samples."""
    length = epoch_length(count, batching)
    whole, rest = divmod(length, batching.batch_size)
    return max(1, whole) if batching.drop_last else whole + bool(rest)


def mean_tokens(samples: Content, batching: Batching) -> float:
    """Tokens of an optimizer step on average, without padding."""
    count = len(samples)
    each = np.average(samples.lengths, weights=times_seen(count, batching))
    return float(each) * min(batching.batch_size, epoch_length(count, batching) / steps_of_an_epoch(count, batching))


def count_steps(count: int, batching: Batching, epochs: float, max_steps: int | None = None) -> int:
    """Count the optimizer steps of a run: max_steps, else all of its epochs. Each epoch may end with a smaller step."""
    if max_steps is not None:
        return max_steps
    whole, part = divmod(epochs, 1)
    rest = math.ceil(round(part * epoch_length(count, batching)) / batching.batch_size)
    per_epoch = steps_of_an_epoch(count, batching)
    total = int(whole) * per_epoch + min(rest, per_epoch)
    return max(1, total)


def steps(
    samples: Content, batching: Batching, total: int, rank: int = 0, world_size: int = 1, start: int = 0
) -> Iterator[Step]:
    """The optimizer steps from number `start` up to `total`, each with the micro-batches of `rank`.

    The samples of a step depend on neither ranks nor packing; both only decide which row they are in.
    """
    lengths = samples.lengths.tolist()
    length, per_epoch = epoch_length(len(samples), batching), steps_of_an_epoch(len(samples), batching)
    in_order: tuple[int, list[int]] = (-1, [])
    for number in range(start, total):
        epoch, at = divmod(number, per_epoch)
        if in_order[0] != epoch:
            in_order = (epoch, epoch_order(lengths, batching, epoch))
        end = min((at + 1) * batching.batch_size, length)
        chosen = in_order[1][at * batching.batch_size : end]
        taken, ids, long = samples, chosen, lengths
        if batching.alters:
            assert isinstance(samples, Samples)
            taken, ids = alter([samples[i] for i in chosen], batching, number), list(range(len(chosen)))
            long = taken.lengths.tolist()
        rows = [[taken[i] for i in row] for row in rows_of(ids, long, batching, world_size)]
        micro = micro_batches(rows, batching.micro_batch_size, world_size)
        mine = dealt(micro, rank, world_size)
        yield Step(
            batches=[lay(group, batching) for group in mine],
            weight=step_weight(taken, ids, batching) or 1.0,  # no label may be left
            labelled=int(taken.labelled[ids].sum()),
            tokens=sum(long[i] for i in ids),
            samples=len(chosen),
            epoch=epoch + (1.0 if at + 1 == per_epoch else end / length),
            numbers=tuple(chosen),
            filled=tuple(sum(one.positions for one in row) for group in mine for row in group),
        )


def alter(samples: Sequence[Sample], batching: Batching, step: int) -> Samples:
    """The samples of a step as it is trained on: cut at the beginning, and with tokens replaced.

    It is a pure function of its arguments, so a resumed run repeats it, and ranks and micro-batches change nothing.
    These are padding_quantile (with its padding on the left) and token_mask_probability of H2O LLM Studio, but that
    replaced tokens are still attended to.
    """
    most = cut_length([len(sample.tokens) for sample in samples], batching.length_quantile)
    some = Samples.of(without_beginning(sample, most) for sample in samples)
    if not batching.token_dropout:
        return some
    seed = hashlib.blake2b(f"{batching.seed}/{step}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(seed))
    kept = torch.rand(len(some.tokens), generator=generator).numpy() >= batching.token_dropout
    trained = some.trained & kept
    weights = None if some.weights is None else some.weights * trained
    tokens = np.where(kept, some.tokens, np.int32(batching.mask_id))
    labelled = np.add.reduceat(trained, some.starts, dtype=np.int64)
    return Samples(tokens, trained, some.starts, some.ends, labelled, weights)


def cut_length(lengths: Sequence[int], quantile: float) -> int:
    """The quantile of the lengths, between two of them in proportion, rounded up; at least 2."""
    return max(2, math.ceil(round(float(np.quantile(lengths, quantile)), 6)))


def without_beginning(sample: Sample, most: int) -> Sample:
    """The last `most` tokens of a sample; nothing predicts the first of them."""
    if len(sample.tokens) <= most:
        return sample
    trained = sample.trained[-most:] & (np.arange(most) > 0)
    weights = None if sample.weights is None else sample.weights[-most:] * trained
    return Sample(sample.tokens[-most:], trained, weights)


def step_weight(samples: Content, chosen: Sequence[int], batching: Batching) -> float:
    """Sum of the weights of all labels of a step; see Step."""
    sums = samples.weight_sums[chosen]
    return float(
        sums.sum() if batching.weighting == "tokens" else (sums / np.maximum(1, samples.labelled[chosen])).sum()
    )


def micro_batches(rows: Sequence[T], most: int, world_size: int) -> list[Sequence[T]]:
    """The rows of a step in parts of at most `most`, as few and as equal as go round evenly among the ranks."""
    count = world_size * math.ceil(len(rows) / (most * world_size))
    size, larger = divmod(len(rows), count)
    starts = [i * size + min(i, larger) for i in range(min(count, len(rows)) + 1)]
    return [rows[start:end] for start, end in pairwise(starts)]


def dealt(parts: Sequence[T], rank: int, world_size: int) -> list[T]:
    """The parts of a step that a rank gets. The longest come first, so they are dealt back and forth."""
    return [part for i, part in enumerate(parts) if i % (2 * world_size) in (rank, 2 * world_size - 1 - rank)]


def longest_step(samples: Content, batching: Batching, world_size: int = 1) -> Step:
    """A step of one micro-batch that is as large as any of a rank: if it fits into memory, all do."""
    lengths, times = samples.lengths.tolist(), times_seen(len(samples), batching)
    again = (i for i in np.argsort(-samples.lengths, kind="stable").tolist() for _ in range(math.ceil(times[i])))
    chosen = list(islice(again, batching.batch_size))
    rows = rows_of(chosen, lengths, batching, world_size)
    longest = lengths[chosen[0]] - 1
    if batching.length_quantile < 1:  # of the longest samples in a step that is as small as any
        smallest = len(chosen) if batching.drop_last else epoch_length(len(samples), batching) % batching.batch_size
        longest = cut_length([lengths[i] for i in chosen[: smallest or None]], batching.length_quantile) - 1
    if batching.row_length is not None:  # the rows of another step may be fuller
        total = sum(lengths[i] - 1 for i in chosen)
        alone = len(rows_of(chosen, lengths, batching))
        longest = batching.row_length if alone > world_size else min(total, total // world_size + longest)
    most = min(batching.micro_batch_size, math.ceil(len(rows) / world_size))
    some: list[list[Any]] = [[samples[i] for i in row] for row in rows[:most]]
    if batching.alters:
        some = [[without_beginning(sample, longest + 1) for sample in row] for row in some]
    batch = lay(some, batching, padded_width(longest, batching))
    labelled = int(samples.labelled[chosen].sum())
    return Step(
        [batch],
        step_weight(samples, chosen, batching),
        labelled,
        sum(lengths[i] for i in chosen),
        len(chosen),
        0.0,
        tuple(chosen),
    )


def rows_of(chosen: Sequence[int], lengths: Sequence[int], batching: Batching, world_size: int = 1) -> list[list[int]]:
    """The rows that `chosen` samples are laid into, the longest samples first, so that little is padding."""
    if batching.row_length is None:
        return [[chosen[i]] for i in longest_first([lengths[i] for i in chosen])]
    return [[chosen[i] for i in row] for row in pack([lengths[i] - 1 for i in chosen], batching.row_length, world_size)]


def by_length(samples: Samples) -> list[int]:
    """Return the numbers of the samples in the order of validation_batches."""
    numbers: list[int] = np.argsort(samples.lengths, kind="stable").tolist()
    return numbers


def validation_batches(samples: Samples, micro_batch_size: int) -> list[SampleBatch]:
    """All samples once, sorted by length so that little is padding."""
    ordered = [[samples[i]] for i in by_length(samples)]
    return [collate(ordered[i : i + micro_batch_size]) for i in range(0, len(ordered), micro_batch_size)]


def pair_rows(comparisons: Comparisons, batching: Batching) -> list[list[int]]:
    """Return the numbers of the comparisons in the order of validation_pairs, row by row."""
    return rows_of(range(len(comparisons)), comparisons.lengths.tolist(), batching)


def validation_pairs(comparisons: Comparisons, batching: Batching) -> list[PairBatch]:
    """All comparisons once, in rows like the training rows."""
    if not len(comparisons):
        return []
    rows = pair_rows(comparisons, batching)
    micro = micro_batches(rows, batching.micro_batch_size, 1)
    return [lay([[comparisons[i] for i in row] for row in group], batching) for group in micro]  # type: ignore[misc]
