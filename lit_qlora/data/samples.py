"""Samples: token ids, and which of them are labelled, in flat arrays that can stay on disk."""

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int32]
Flags = npt.NDArray[np.bool_]
Counts = npt.NDArray[np.int64]
Weights = npt.NDArray[np.float32]


class Likely(NamedTuple):
    """The likeliest tokens of a teacher at labelled tokens, in their order; see model.lesson."""

    ids: Ids
    """(L, K) its likeliest tokens."""
    log_probs: Weights
    """(L, K + 1) of them, and of all other tokens together."""


class Sample(NamedTuple):
    """One document: prompt and answer, or a conversation, or a piece of text."""

    tokens: Ids
    """(T,) token ids."""
    trained: Flags
    """(T,) which tokens are labelled; never the first, which nothing predicts."""
    weights: Weights | None = None
    """(T,) what the loss of each token is multiplied by, above 0 where it is labelled; None is 1 for all of them."""
    likely: Likely | None = None
    """The same of a teacher at its labelled tokens; None without one."""

    @property
    def positions(self) -> int:
        """Positions that it takes in a row: the last token is a label only."""
        return len(self.tokens) - 1

    @property
    def labelled(self) -> int:
        """Number of labelled tokens."""
        return int(np.count_nonzero(self.trained))

    @staticmethod
    def of(tokens: Sequence[int], prompt_length: int) -> "Sample":
        """A sample whose first `prompt_length` tokens, at least one, are given and whose others are labelled."""
        return Sample(np.asarray(tokens, np.int32), np.arange(len(tokens)) >= max(1, prompt_length))


class Samples(Sequence[Sample]):
    """Many samples in flat arrays, which may be memory-mapped: a million samples cost no more memory than one.

    Attributes:
        tokens: (N,) ids of all samples.
        trained: (N,) which of them are labelled.
        starts, ends: (S,) int64; sample i is tokens[starts[i] : ends[i]].
        labelled: (S,) number of labelled tokens of each sample.
        weights: (N,) as those of a sample, or None.
    """

    def __init__(
        self,
        tokens: Ids,
        trained: Flags,
        starts: Counts,
        ends: Counts,
        labelled: Counts,
        weights: Weights | None = None,
    ) -> None:
        self.tokens, self.trained, self.weights = tokens, trained, weights
        self.starts, self.ends, self.labelled = starts, ends, labelled

    @staticmethod
    def of(samples: Iterable[Sample]) -> "Samples":
        """The same samples, copied into arrays."""
        samples = list(samples)
        bounds = np.cumsum([0, *(len(sample.tokens) for sample in samples)], dtype=np.int64)
        tokens = np.concatenate([np.zeros(0, np.int32), *(np.asarray(s.tokens, np.int32) for s in samples)])
        trained = np.concatenate([np.zeros(0, np.bool_), *(sample.trained for sample in samples)])
        labelled = np.array([sample.labelled for sample in samples], np.int64)
        weights = None
        if any(sample.weights is not None for sample in samples):
            weights = np.concatenate([_weights(sample) for sample in samples])
        return Samples(tokens, trained, bounds[:-1], bounds[1:], labelled, weights)

    @staticmethod
    def joined(parts: Sequence["Samples"]) -> "Samples":
        """The samples of all parts, one part after the other; copied if there are several."""
        if len(parts) == 1:
            return parts[0]
        offsets = np.cumsum([0, *(len(part.tokens) for part in parts)])
        return Samples(
            np.concatenate([part.tokens for part in parts]),
            np.concatenate([part.trained for part in parts]),
            np.concatenate([part.starts + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.ends + offset for part, offset in zip(parts, offsets, strict=False)]),
            np.concatenate([part.labelled for part in parts]),
            np.concatenate(list(map(_weights, parts))) if any(part.weights is not None for part in parts) else None,
        )

    def take(self, indices: Sequence[int]) -> "Samples":
        """These samples, in this order; the arrays are shared."""
        at = np.asarray(indices, np.int64)
        return Samples(self.tokens, self.trained, self.starts[at], self.ends[at], self.labelled[at], self.weights)

    @property
    def lengths(self) -> Counts:
        """(S,) tokens of each sample."""
        return self.ends - self.starts

    @cached_property
    def weight_sums(self) -> npt.NDArray[np.float64]:
        """(S,) sum of the weights of the labelled tokens of each sample."""
        if self.weights is None:
            return self.labelled.astype(np.float64)
        sums = np.concatenate([np.zeros(1), np.cumsum(self.weights, dtype=np.float64)])
        return sums[self.ends] - sums[self.starts]

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self._one(i) for i in range(*index.indices(len(self)))]
        return self._one(index)

    def _one(self, index: int) -> Sample:
        start, end = self.starts[index], self.ends[index]
        weights = None if self.weights is None else self.weights[start:end]
        return Sample(self.tokens[start:end], self.trained[start:end], weights)


def _weights(some: Sample | Samples) -> Weights:
    """The weights of the tokens, 0 for those without a label."""
    return some.trained.astype(np.float32) if some.weights is None else some.weights
