"""Log-probabilities of given continuations: what multiple choice, perplexity and comparisons of models are made of.

Requests are sorted, so that those which begin alike stand side by side, and laid end to end in rows of the model: each
without what the one before it has already, be it a context with four choices or examples before many questions. So
every common beginning is read once, in one forward pass and without a cache, and next to nothing is padding.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_qlora.errors import DataError
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE

Ids = tuple[int, ...]
Request = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, at least one, and of the continuation to be scored."""
BatchSize = int | Literal["auto"]

TOKENS_AT_ONCE = {"cuda": 2**14, "cpu": 2**10}
"""Tokens of a forward pass with batch size auto. On a GPU enough that decoding 4-bit weights is a small part of it, on
a CPU as many as its caches bear."""
SHORTEST_ROW = 256
"""Tokens of a row of inputs that have little in common; more in models that are wide."""


@dataclass(frozen=True)
class _Input:
    """What the model reads for some requests."""

    ids: Ids
    requests: list[int]


@dataclass
class _Row:
    """Inputs that stand in one row of the model, sorted by their ids, and how many tokens they are together."""

    inputs: list[_Input]
    size: int


class Scorer:
    """A model that scores continuations.

    What is longer than the context loses its beginning.

    Args:
        batch_size: inputs of a forward pass; "auto" takes as many as make TOKENS_AT_ONCE, and fewer if memory is short.
            Changes memory and speed, not the result.
        max_length: most tokens that the model reads at once; by default its whole context.

    Attributes:
        hidden: what reads tokens, as GPT.hidden does; lit_qlora.fused.reader gives one that is faster on a GPU.
        truncated: how many requests have lost their beginning so far.
    """

    def __init__(self, model: GPT, batch_size: BatchSize = "auto", max_length: int | None = None) -> None:
        config = model.config
        self.model, self.batch_size = model, batch_size
        self.hidden: Callable[..., Tensor] = model.hidden
        self.max_length = min(max_length or config.block_size, config.block_size)
        self.device = model.embed.weight.device
        self.tokens_at_once = TOKENS_AT_ONCE["cuda" if self.device.type == "cuda" else "cpu"]
        # Every token of a row is compared with every other, which at this length is a small part of the work.
        self.row_length = max(SHORTEST_ROW, config.n_embd // 8)
        self.truncated = 0
        # These rotate the same beginning otherwise in a longer text.
        self._shares = config.rope_scaling not in ("dynamic", "longrope")

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
        inputs: dict[Ids, list[int]] = {}
        for index, (context, continuation) in enumerate(requests):
            if continuation:
                inputs.setdefault(self._input(context, continuation), []).append(index)
        progress(len(requests) - sum(map(len, inputs.values())))
        waiting = self._rows(_Input(ids, indices) for ids, indices in inputs.items())
        while waiting:
            batch, rest = self._take(waiting)
            try:
                answered = self._answer(batch, requests)
            except torch.OutOfMemoryError:
                if self.batch_size != "auto" or sum(len(row.inputs) for row in batch) == 1:
                    raise
                self.tokens_at_once = len(batch) * batch[0].size // 2
                waiting = self._rows(one for row in waiting for one in row.inputs)
                continue
            for index, result in answered:
                results[index] = result
            progress(len(answered))
            waiting = rest
        return results

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

    def _rows(self, inputs: Iterable[_Input]) -> list[_Row]:
        """All inputs in rows, the longest first: memory peaks at once, and rows of a length stand together."""
        ordered = sorted(inputs, key=lambda one: one.ids)
        known = [self._alike(one.ids, other.ids) for one, other in pairwise([_Input((), []), *ordered])]
        total = sum(len(one.ids) - alike for one, alike in zip(ordered, known, strict=True))
        length = math.ceil(total / max(1, round(total / self.row_length)))  # so that the last row is as long as others
        rows: list[_Row] = []
        for one, alike in zip(ordered, known, strict=True):
            new = len(one.ids) - alike
            if rows and self._joins(rows[-1], alike, new, length):
                rows[-1].inputs.append(one)
                rows[-1].size += new
            else:
                rows.append(_Row([one], len(one.ids)))
        return sorted(rows, key=lambda row: -row.size)

    def _alike(self, a: Ids, b: Ids) -> int:
        """How many tokens the second need not read again."""
        if not self._shares:
            return 0
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    def _joins(self, row: _Row, alike: int, new: int, length: int) -> bool:
        """Whether an input of `new` tokens, behind `alike` that are there, is added to a row.

        It is if the row is below `length`, and would not be much above it, or if reading again what is there would cost
        more than comparing the new tokens with the row: 24 E^2 operations a token in the linear layers of a block,
        against 4 E for each pair, both ways, at a quarter of the speed.
        """
        if self.batch_size != "auto" and len(row.inputs) == self.batch_size:
            return False
        size = row.size + new
        short = row.size < length and size <= 1.25 * length
        worth = short or 3 * self.model.config.n_embd * alike > 4 * row.size * new
        return worth and (self.batch_size != "auto" or size <= self.tokens_at_once)

    def _take(self, waiting: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """The first rows, as many as a forward pass takes, and the others."""
        count, inputs = 1, len(waiting[0].inputs)
        for row in waiting[1:]:
            inputs += len(row.inputs)
            full = (count + 1) * waiting[0].size > self.tokens_at_once
            if full if self.batch_size == "auto" else inputs > self.batch_size:
                break
            count += 1
        return waiting[:count], waiting[count:]

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Row], requests: Sequence[Request]) -> list[tuple[int, tuple[float, bool]]]:
        """(number, result) of every request of the batch."""
        width = batch[0].size
        picked: list[int] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        columns = torch.zeros(4, len(batch), width, dtype=torch.long)
        columns[2] = torch.arange(1, width + 1)  # padding sees itself,
        columns[3] = -1  # and belongs to no input
        for number, row in enumerate(batch):
            parts, paths = self._lay_out(row)
            columns[:, number, : row.size] = torch.tensor(parts)
            for one, path in zip(row.inputs, paths, strict=True):
                for index in one.requests:
                    continuation = requests[index][1]
                    picked += [number * width + column for column in path[-len(continuation) :]]  # what predicts it
                    targets += continuation
                    spans.append((index, len(continuation)))
        tokens, positions, seen_until, segments = columns.to(self.device)
        alone = all(len(row.inputs) == 1 for row in batch)
        hidden = self.hidden(
            tokens,
            positions=positions,
            segments=None if self._shares else segments,
            seen_until=seen_until if self._shares and not alone else None,
        )
        states = hidden.flatten(0, 1)[torch.tensor(picked, device=self.device)]
        log_probs, greedy = self._look_up(states, torch.tensor(targets))
        parts_of = zip(spans, log_probs.split([n for _, n in spans]), greedy.split([n for _, n in spans]), strict=True)
        return [(index, (float(lp.double().sum()), bool(hits.all()))) for (index, _), lp, hits in parts_of]

    def _lay_out(self, row: _Row) -> tuple[tuple[list[int], ...], list[list[int]]]:
        """The columns of a row, and for each input those in which its tokens stand.

        Returns:
            For each column its token, the token's position, the column from which on nothing sees it, and the number of
            the first input that it belongs to; see GPT.hidden.
        """
        tokens: list[int] = []
        positions: list[int] = []
        seen_until: list[int] = []
        owners: list[int] = []
        paths: list[list[int]] = []
        path: list[int] = []
        last: Ids = ()
        for number, one in enumerate(row.inputs):
            alike, start = self._alike(last, one.ids), len(tokens)
            new = len(one.ids) - alike
            for column in path[alike:]:
                seen_until[column] = start
            path = [*path[:alike], *range(start, start + new)]
            tokens += one.ids[alike:]
            positions += range(alike, len(one.ids))
            seen_until += [row.size] * new
            owners += [number] * new
            paths.append(path)
            last = one.ids
        return (tokens, positions, seen_until, owners), paths

    def _look_up(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """For (N, E) and (N,): the float32 log-probability of each target, and whether it is the likeliest token."""
        targets = targets.to(self.device)
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        log_probs, greedy = [], []
        for some, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = self.model.logits(some).float()
            log_probs.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1))
            greedy.append(logits.argmax(dim=-1) == wanted)
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
