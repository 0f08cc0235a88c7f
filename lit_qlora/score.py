"""Log-probabilities of given continuations: what multiple choice, perplexity and comparisons of models are made of.

Requests are sorted by length and batched. Those that the model reads alike, such as choices that differ in their last
token only, share a row; those that begin alike, such as choices of several tokens or questions after the same examples,
read their common beginning once and go on from its keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lit_qlora.errors import DataError
from lit_qlora.model import GPT, LOGITS_AT_ONCE, KVCache

Ids = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, at least one, and of the continuation to be scored."""
BatchSize = int | Literal["auto"]

TOKENS_AT_ONCE = {"cuda": 2**14, "cpu": 2**10}
"""Tokens of a forward pass with batch size auto. On a GPU enough that decoding 4-bit weights is a small part of it, on
a CPU as many as its caches bear."""
KEPT_AT_ONCE = {"cuda": 2, "cpu": 8}
"""Tokens whose keys and values are kept, as a multiple of those; half a megabyte each for 7B in 16 bit."""
WORTH_SHARING = 0.2
"""Share of a row's tokens that joining those that begin alike must save: two forward passes cost more than one."""
SHORTEST_SHARED = 16
"""Tokens of a beginning that are worth a forward pass of their own."""


@dataclass(frozen=True)
class _Row:
    """One input of the model, and the requests that it answers.

    Attributes:
        free: its first tokens, behind which nothing is predicted.
    """

    ids: Ids
    free: int
    requests: list[int]


@dataclass(frozen=True)
class _Group:
    """Rows whose first `shared` tokens are the same and are read once."""

    rows: list[_Row]
    shared: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in self.rows)


class Scorer:
    """A model that scores continuations.

    What is longer than the context loses its beginning.

    Args:
        batch_size: rows of a forward pass; "auto" takes as many as make TOKENS_AT_ONCE, and fewer if memory is short.
            Changes memory and speed, not the result.
        max_length: most tokens that the model reads at once; by default its whole context.

    Attributes:
        truncated: how many requests have lost their beginning so far.
    """

    def __init__(self, model: GPT, batch_size: BatchSize = "auto", max_length: int | None = None) -> None:
        self.model, self.batch_size = model, batch_size
        self.max_length = min(max_length or model.config.block_size, model.config.block_size)
        self.device = model.embed.weight.device
        kind = "cuda" if self.device.type == "cuda" else "cpu"
        self.tokens_at_once, self.kept = TOKENS_AT_ONCE[kind], KEPT_AT_ONCE[kind]
        self.truncated = 0
        # These rotate by the length that there is when a token is read, so reading in two steps is another function.
        self._can_share = model.config.rope_scaling not in ("dynamic", "longrope")

    def score(
        self, requests: Sequence[Request], progress: Callable[[int], object] = lambda done: None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation after its context, and whether each of its tokens is the likeliest.

        Args:
            progress: told after each forward pass how many requests it has answered.

        Raises:
            DataError: if a continuation alone is longer than the model's context.
        """
        results = [(0.0, True)] * len(requests)
        waiting = self._groups(requests)
        while waiting:
            batch, rest = self._take(waiting)
            try:
                answered = self._answer(batch, requests)
            except torch.OutOfMemoryError:
                if self.batch_size != "auto" or sum(len(group.rows) for group in batch) == 1:
                    raise
                if len(batch) == 1:
                    waiting = [_Group([row]) for row in batch[0].rows] + rest
                self.tokens_at_once //= 2
                continue
            for index, result in answered:
                results[index] = result
            progress(len(answered))
            waiting = rest
        return results

    def _groups(self, requests: Sequence[Request]) -> list[_Group]:
        """All rows, those that begin alike together where that pays, the longest first: memory peaks at once."""
        answers: dict[Ids, list[int]] = {}
        for index, (context, continuation) in enumerate(requests):
            answers.setdefault(self._input(context, continuation), []).append(index)
        rows = [
            _Row(ids, len(ids) - max(len(requests[index][1]) for index in indices), indices)
            for ids, indices in answers.items()
        ]
        if not self._can_share:
            groups = [_Group([row]) for row in rows]
        else:
            groups = []
            for row in sorted(rows, key=lambda row: row.ids):  # those that begin alike stand side by side
                joined = self._joined(groups[-1], row) if groups else None
                if joined:
                    groups[-1] = joined
                else:
                    groups.append(_Group([row], row.free))
            groups = [group if len(group.rows) > 1 else _Group(group.rows) for group in groups]
        # Groups that share a beginning are kept apart from rows that do not: they take different paths.
        return sorted(groups, key=lambda group: (group.shared == 0, -group.longest))

    def _joined(self, group: _Group, row: _Row) -> _Group | None:
        """The group with one more row, whose beginning may be shorter then; None where that would not pay."""
        last, count = group.rows[-1].ids, len(group.rows)
        pairs = enumerate(zip(last, row.ids, strict=False))
        alike = next((i for i, (a, b) in pairs if a != b), min(len(last), len(row.ids)))
        joined = _Group([*group.rows, row], min(alike, row.free, group.shared))
        saved = count * joined.shared - (count - 1) * group.shared
        pays = joined.shared >= SHORTEST_SHARED and saved > WORTH_SHARING * len(row.ids)
        return joined if pays and self._fits([joined]) else None

    def _take(self, waiting: list[_Group]) -> tuple[list[_Group], list[_Group]]:
        """The first groups, as many as a forward pass takes, and the others."""
        batch: list[_Group] = []
        for group in waiting:
            if batch and ((group.shared == 0) != (batch[0].shared == 0) or not self._fits([*batch, group])):
                break
            batch.append(group)
        return batch, waiting[len(batch) :]

    def _fits(self, batch: Sequence[_Group]) -> bool:
        """Whether these rows can be read together."""
        rows = sum(len(group.rows) for group in batch)
        if self.batch_size != "auto":
            return rows <= self.batch_size
        longest = max(group.longest for group in batch)
        read = max(group.longest - group.shared for group in batch)
        kept = rows * longest if any(group.shared for group in batch) else 0
        return rows * read <= self.tokens_at_once and kept <= self.kept * self.tokens_at_once

    def _input(self, context: Sequence[int], continuation: Sequence[int]) -> Ids:
        """What the model reads: all but the last token, at most max_length."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"A continuation of {len(continuation)} tokens is to be scored, "
                f"and the model's context holds {self.max_length}. Leave this task out for this model."
            )
        ids = (*context, *continuation)
        self.truncated += len(ids) > self.max_length + 1
        return ids[-(self.max_length + 1) :][:-1]

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Group], requests: Sequence[Request]) -> list[tuple[int, tuple[float, bool]]]:
        """(number, result) of every request of the batch."""
        hidden = self._hidden(batch)
        rows = [(row, group.shared) for group in batch for row in group.rows]
        picked: list[Tensor] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        for place, (row, shared) in enumerate(rows):
            end = len(row.ids) - shared
            for index in row.requests:
                continuation = requests[index][1]
                picked.append(hidden[place, end - len(continuation) : end])  # the positions that predict it
                targets += continuation
                spans.append((index, len(continuation)))
        log_probs, greedy = self._look_up(torch.cat(picked), torch.tensor(targets, dtype=torch.long))
        parts = zip(spans, log_probs.split([n for _, n in spans]), greedy.split([n for _, n in spans]), strict=True)
        return [(index, (float(lp.double().sum()), bool(hits.all()))) for (index, _), lp, hits in parts]

    def _hidden(self, batch: Sequence[_Group]) -> Tensor:
        """(rows, T, E) behind what each group shares, the shorter rows padded on the right."""
        ends = self._padded([row.ids[group.shared :] for group in batch for row in group.rows])
        widest = max(group.shared for group in batch)
        if not widest:
            return self.model.hidden(ends)
        config, weight = self.model.config, self.model.embed.weight
        padding = [widest - group.shared for group in batch]
        left_pad = torch.tensor(padding, device=self.device) if any(padding) else None
        cache = KVCache(config, len(batch), widest + ends.size(1), weight.dtype, self.device, left_pad)
        starts = [(*[0] * pad, *group.rows[0].ids[: group.shared]) for pad, group in zip(padding, batch, strict=True)]
        self.model.hidden(torch.tensor(starts, device=self.device), cache)
        members = [i for i, group in enumerate(batch) for _ in group.rows]
        cache.select(torch.tensor(members, device=self.device))
        return self.model.hidden(ends, cache)

    def _padded(self, rows: Sequence[Ids]) -> Tensor:
        """(rows, T), padded on the right, where nothing before the padding sees it."""
        longest = max(1, *map(len, rows))
        return torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in rows], device=self.device)

    def _look_up(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For (N, E) and (N,): the float32 log-probability of each target, and whether it is the likeliest token."""
        targets = targets.to(self.device)
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        log_probs, greedy = [], []
        for some, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            scores = self.model.logits(some).float().log_softmax(dim=-1)
            log_probs.append(scores.gather(-1, wanted[:, None])[:, 0])
            greedy.append(scores.argmax(dim=-1) == wanted)
        return torch.cat(log_probs).cpu(), torch.cat(greedy).cpu()


def windows(ids: Sequence[int], first: int, length: int, stride: int | None = None) -> Iterator[Request]:
    """A text in pieces, in which every token is predicted once, for Scorer.score.

    Args:
        first: id that stands before the text.
        length: most tokens that are read at once.
        stride: tokens that are predicted at a time, after at least length - stride + 1 that came before where there are
            as many; by default `length`, with one token before it.
    """
    whole = [first, *ids]
    step = stride or length
    for start in range(0, len(ids), step):
        end = min(start + step, len(ids))
        begin = max(0, end - length)  # the last window is filled up with what came before
        yield whole[begin : start + 1], whole[start + 1 : end + 1]
