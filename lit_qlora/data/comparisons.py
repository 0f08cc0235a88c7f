"""Comparisons: the answers to one prompt, laid out so that a row holds the prompt once and each answer behind it."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lit_qlora.data.samples import Counts, Sample, Samples
from lit_qlora.model.gpt import IGNORE

CHOSEN, REJECTED, ELSEWHERE = 1, -1, 2
"""Sides of an answer: good, bad, and the answer to another prompt, on which KTO measures how far the model drifted."""
Sides = npt.NDArray[np.int8]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Layout:
    """The form in which comparisons are laid out."""

    share: bool = True
    """Answers share what their sequences have in common of the prompt."""
    tail: float = 1.0
    """Weight of the tokens of an answer beyond the length of the shorter one; see preference.ld_alpha."""
    prompts: bool = False
    """The prompts of chosen answers are labelled too; see preference.sft_prompts."""


class Comparison(NamedTuple):
    """The answers to one prompt."""

    answers: list[Sample]
    """Whole sequences, each with the prompt, the chosen one first."""
    sides: list[int]
    shared: int
    """Tokens at the beginning that stand once."""
    margin: float
    reference: Floats
    """(A,) log-probability of each answer before training."""
    layout: Layout

    @property
    def positions(self) -> int:
        """Positions that it takes in a row: the last token of each answer is a label only."""
        return self.shared + sum(len(answer.tokens) - 1 - self.shared for answer in self.answers)


class Comparisons(Sequence[Comparison]):
    """Comparisons in flat arrays, which are batched as samples are.

    Args:
        samples: the answers, those of a comparison one after the other.
        bounds: (C + 1,) int64, the first answer of each comparison and the end of the last.
        sides: (S,) of each answer.
        margins: (C,) how much better the chosen answers are.
        reference: (S,) log-probability of each answer before training; None is 0.
    """

    def __init__(
        self,
        samples: Samples,
        bounds: Counts,
        sides: Sides,
        margins: Floats,
        layout: Layout,
        reference: Floats | None = None,
    ) -> None:
        self.samples, self.bounds, self.sides, self.margins = samples, bounds, sides, margins
        self.layout = layout
        self.reference = np.zeros(len(samples), np.float32) if reference is None else reference

    def with_reference(self, reference: Floats) -> "Comparisons":
        """The same comparisons with the log-probabilities of all answers before training."""
        return Comparisons(self.samples, self.bounds, self.sides, self.margins, self.layout, reference)

    def take(self, numbers: Sequence[int]) -> "Comparisons":
        """The comparisons of these numbers."""
        answers = [i for n in numbers for i in range(int(self.bounds[n]), int(self.bounds[n + 1]))]
        ends = np.cumsum(np.diff(self.bounds)[list(numbers)])
        return Comparisons(
            self.samples.take(answers),
            np.concatenate([np.zeros(1, np.int64), ends]).astype(np.int64),
            self.sides[answers],
            self.margins[list(numbers)],
            self.layout,
            self.reference[answers],
        )

    @cached_property
    def shared(self) -> Counts:
        """(C,) tokens that the answers of each comparison share."""
        if not self.layout.share:
            return np.zeros(len(self), np.int64)
        return np.array([shared_tokens(self.samples[a:b]) for a, b in self._ranges()], np.int64)

    @cached_property
    def lengths(self) -> Counts:
        """(C,) one more than the positions of each comparison, as of samples."""
        ends = np.concatenate([np.zeros(1, np.int64), np.cumsum(self.samples.lengths - 1)])
        answers = np.diff(self.bounds)
        return (ends[self.bounds[1:]] - ends[self.bounds[:-1]] - (answers - 1) * self.shared + 1).astype(np.int64)

    @property
    def labelled(self) -> Counts:
        """(C,) tokens whose loss is part of the mean loss of chosen answers."""
        chosen = self.bounds[:-1]
        counts: Counts = self.samples.lengths[chosen] - 1 if self.layout.prompts else self.samples.labelled[chosen]
        return counts

    @property
    def weight_sums(self) -> npt.NDArray[np.float64]:
        """(C,) ones: the loss of a step is the mean over its comparisons."""
        return np.ones(len(self))

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: int) -> Comparison:  # type: ignore[override]
        here = slice(int(self.bounds[index]), int(self.bounds[index + 1]))
        return Comparison(
            self.samples[here],
            self.sides[here].tolist(),
            int(self.shared[index]),
            float(self.margins[index]),
            self.reference[here],
            self.layout,
        )

    def _ranges(self) -> list[tuple[int, int]]:
        return list(zip(self.bounds[:-1].tolist(), self.bounds[1:].tolist(), strict=True))


def shared_tokens(answers: Sequence[Sample]) -> int:
    """Count the tokens that sequences begin with alike, short of the last token of the shortest prompt.

    That token stands once for each answer, because each answer's first token is predicted by it.
    """
    first = answers[0].tokens
    same = min(max(0, int(np.argmax(answer.trained)) - 1) for answer in answers)
    for other in answers[1:]:
        same = min(same, len(other.tokens))
        differ = np.flatnonzero(first[:same] != other.tokens[:same])
        same = int(differ[0]) if len(differ) else same
    return same


class PairBatch(NamedTuple):
    """Rows of comparisons, padded on the right; every field has a row for each of B.

    A is the most answers of a row, P the most pairs; what is missing of them has side and share 0.
    """

    tokens: Tensor
    """(B, T) int64."""
    labels: Tensor
    """(B, T) int64, see Batch."""
    positions: Tensor
    """(B, T) int64, the position of each token in its sequence, 0 for padding."""
    segments: Tensor
    """(B, T) int32, the number of the answer in its row, -1 for padding; what is shared belongs to the first."""
    seen_until: Tensor | None
    """(B, T) int64, see GPT.hidden; None where nothing is shared."""
    owners: Tensor
    """(B, T) int64, the number in its row of the answer that a label is of, -1 where it is of a prompt or none."""
    weights: Tensor | None
    """(B, T) float32, the factor of each label in the log-probability of its answer; None is 1 everywhere."""
    sides: Tensor
    """(B, A) int64."""
    counts: Tensor
    """(B, A) float32, tokens of each answer."""
    reference: Tensor
    """(B, A) float32."""
    chosen: Tensor
    """(B, P) int64, the number of each pair's chosen answer."""
    rejected: Tensor
    """(B, P) int64."""
    shares: Tensor
    """(B, P) float32, the weight of each pair: those of a comparison are 1 together."""
    margins: Tensor
    """(B, P) float32."""


def collate_comparisons(rows: Sequence[Sequence[Comparison]], width: int) -> PairBatch:
    """Lay out, shift, mask and pad, in rows of `width` positions."""
    most = max(sum(len(one.answers) for one in row) for row in rows)
    laid = [_Row(width, most).filled(row) for row in rows]
    columns: dict[str, Any] = {name: torch.from_numpy(np.stack([getattr(r, name) for r in laid])) for name in _COLUMNS}
    every = [one for row in rows for one in row]
    if not any(one.shared for one in every):
        columns["seen_until"] = None
    if every[0].layout.tail == 1:
        columns["weights"] = None
    pairs = max(1, *(len(row.pairs) for row in laid))
    padded = np.zeros((len(rows), pairs, 4), np.float32)
    for row, one in zip(padded, laid, strict=True):
        row[: len(one.pairs)] = np.array(one.pairs, np.float32).reshape(-1, 4)
    chosen, rejected, shares, margins = (t.contiguous() for t in torch.from_numpy(padded).unbind(-1))
    return PairBatch(**columns, chosen=chosen.long(), rejected=rejected.long(), shares=shares, margins=margins)


_COLUMNS = (
    *("tokens", "labels", "positions", "segments", "seen_until", "owners", "weights"),
    *("sides", "counts", "reference"),
)


class _Row:
    """A row while it is filled."""

    def __init__(self, width: int, most: int) -> None:
        self.tokens = np.zeros(width, np.int64)
        self.labels = np.full(width, IGNORE, np.int64)
        self.positions = np.zeros(width, np.int64)
        self.segments = np.full(width, -1, np.int32)
        self.seen_until = np.full(width, width, np.int64)
        self.owners = np.full(width, -1, np.int64)
        self.weights = np.ones(width, np.float32)
        self.sides = np.zeros(most, np.int64)
        self.counts = np.zeros(most, np.float32)
        self.reference = np.zeros(most, np.float32)
        self.pairs: list[tuple[float, float, float, float]] = []
        self.end = self.answers = 0

    def filled(self, row: Sequence[Comparison]) -> "_Row":
        """Lay out all comparisons of the row."""
        for one in row:
            self._add(one)
        return self

    def _add(self, one: Comparison) -> None:
        begin, first = self.end, self.answers
        shortest = min(answer.labelled for answer in one.answers)
        for number, (answer, side) in enumerate(zip(one.answers, one.sides, strict=True)):
            here = self._lay(answer, one.shared if number else 0, one.layout.prompts and not number)
            counted = np.flatnonzero(self.owners[here] == self.answers)
            self.weights[here.start + counted[shortest:]] = one.layout.tail
            self.sides[self.answers], self.counts[self.answers] = side, answer.labelled
            self.reference[self.answers] = one.reference[number]
            self.answers += 1
        self.seen_until[begin : begin + one.shared] = self.end
        rejected = [i for i, side in enumerate(one.sides) if side == REJECTED and i]
        self.pairs += [(first, first + i, 1 / len(rejected), one.margin) for i in rejected]

    def _lay(self, answer: Sample, skip: int, prompts: bool) -> slice:
        """Add a sequence without its first tokens."""
        ids, trained = answer.tokens, answer.trained
        here = slice(self.end, self.end + len(ids) - 1 - skip)
        self.tokens[here] = ids[skip:-1]
        self.labels[here] = ids[skip + 1 :] if prompts else np.where(trained[skip + 1 :], ids[skip + 1 :], IGNORE)
        self.positions[here] = np.arange(skip, len(ids) - 1)
        self.segments[here] = self.answers
        self.owners[here] = np.where(trained[skip + 1 :], self.answers, -1)
        self.seen_until[here] = self.end = here.stop
        return here
