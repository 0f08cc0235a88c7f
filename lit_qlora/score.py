"""Log-probabilities of given continuations: what multiple choice, perplexity and comparisons of models are made of.

Requests are sorted by length and batched. Those that the model reads alike, such as choices that differ in their last
token only, share a row; those that continue the same context read it once and go on from its keys and values.
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
"""Tokens of a forward pass with batch size auto. On a GPU enough that decoding 4-bit weights is a small part of it, and
as many tokens of keys and values fit; on a CPU as many as its caches bear."""
WORTH_SHARING = 0.2
"""Share of a context's requests' tokens that reading it once must save; it costs a second, smaller forward pass."""


@dataclass(frozen=True)
class _Row:
    """One input of the model, and the requests that it answers."""

    ids: Ids
    requests: list[int]


@dataclass(frozen=True)
class _Batch:
    """Rows that are read together.

    Attributes:
        groups: rows that begin with the same `shared` tokens; each row is a group of its own where nothing is shared.
    """

    groups: list[list[_Row]]
    shared: list[int]


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
        self.tokens_at_once = TOKENS_AT_ONCE["cuda" if self.device.type == "cuda" else "cpu"]
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
            batch, rest = self._take(waiting, requests)
            try:
                answered = self._answer(batch, requests)
            except torch.OutOfMemoryError:
                rows = sum(map(len, batch.groups))
                if self.batch_size != "auto" or rows == 1:
                    raise
                # One group that is still too large is read row by row.
                waiting = [[row] for row in waiting[0]] + waiting[1:] if len(batch.groups) == 1 else waiting
                self.tokens_at_once //= 2
                continue
            for index, result in answered:
                results[index] = result
            progress(len(answered))
            waiting = rest
        return results

    def _groups(self, requests: Sequence[Request]) -> list[list[_Row]]:
        """Rows, those that should share their context together, the longest first: memory peaks at once."""
        by_context: dict[Ids, dict[Ids, _Row]] = {}
        for index, (context, continuation) in enumerate(requests):
            ids, cut = self._input(context, continuation)
            key = ids if cut else tuple(context)  # what is cut begins at places of its own
            by_context.setdefault(key, {}).setdefault(ids, _Row(ids, [])).requests.append(index)
        groups: list[list[_Row]] = []
        for context, found in by_context.items():
            rows = sorted(found.values(), key=lambda row: -len(row.ids))
            saved = (len(rows) - 1) * (len(context) - 1)
            share = self._can_share and saved > WORTH_SHARING * sum(len(row.ids) for row in rows)
            together = self._most_rows(len(rows[0].ids)) if share else 1
            groups += [rows[i : i + together] for i in range(0, len(rows), together)]
        # Groups that share a context are kept apart from rows that do not: they take different paths.
        return sorted(groups, key=lambda group: (len(group) == 1, -len(group[0].ids)))

    def _take(self, waiting: list[list[_Row]], requests: Sequence[Request]) -> tuple[_Batch, list[list[_Row]]]:
        """The first groups, as many as a forward pass takes, and the others."""
        most, alone = self._most_rows(len(waiting[0][0].ids)), len(waiting[0]) == 1
        groups: list[list[_Row]] = []
        rows = 0
        for group in waiting:
            if groups and (rows + len(group) > most or (len(group) == 1) != alone):
                break
            groups.append(group)
            rows += len(group)
        shared = [0 if alone else len(requests[group[0].requests[0]][0]) - 1 for group in groups]
        return _Batch(groups, shared), waiting[len(groups) :]

    def _most_rows(self, length: int) -> int:
        """Rows of a forward pass whose longest has so many tokens."""
        return max(1, self.tokens_at_once // max(1, length)) if self.batch_size == "auto" else self.batch_size

    def _input(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[Ids, bool]:
        """What the model reads: all but the last token, at most max_length, and whether its beginning was cut."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"A continuation of {len(continuation)} tokens is to be scored, "
                f"and the model's context holds {self.max_length}. Leave this task out for this model."
            )
        ids = (*context, *continuation)
        cut = len(ids) > self.max_length + 1
        self.truncated += cut
        return ids[-(self.max_length + 1) :][:-1], cut

    @torch.no_grad()
    def _answer(self, batch: _Batch, requests: Sequence[Request]) -> list[tuple[int, tuple[float, bool]]]:
        """(number, result) of every request of the batch."""
        hidden = self._hidden(batch)
        rows = [(row, shared) for group, shared in zip(batch.groups, batch.shared, strict=True) for row in group]
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

    def _hidden(self, batch: _Batch) -> Tensor:
        """(rows, T, E) behind what each group shares, the shorter rows padded on the right."""
        ends = [row.ids[n:] for group, n in zip(batch.groups, batch.shared, strict=True) for row in group]
        if not any(batch.shared):
            return self.model.hidden(self._padded(ends))
        config, weight = self.model.config, self.model.embed.weight
        starts = [group[0].ids[:shared] for group, shared in zip(batch.groups, batch.shared, strict=True)]
        widest = max(batch.shared)
        padding = [widest - len(ids) for ids in starts]
        left_pad = torch.tensor(padding, device=self.device) if any(padding) else None
        length = widest + max(map(len, ends))
        cache = KVCache(config, len(starts), length, weight.dtype, self.device, left_pad)
        tokens = [(*[0] * pad, *ids) for pad, ids in zip(padding, starts, strict=True)]
        self.model.hidden(torch.tensor(tokens, device=self.device), cache)
        members = [i for i, group in enumerate(batch.groups) for _ in group]
        cache.select(torch.tensor(members, device=self.device))
        return self.model.hidden(self._padded(ends), cache)

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
