"""Log-probabilities of given continuations, on which multiple choice, perplexity and comparisons of models rest.

Requests are sorted, so that requests with a common prefix are neighbours, and laid end to end in rows. Each leaves out
the prefix that the one before it has already, such as a context with four choices or examples before many questions.
So the model reads every common prefix once, in one forward pass and without a cache, and there is hardly any padding.
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
"""Ids of a context, at least one, and of the continuation to score."""
BatchSize = int | Literal["auto"]

TOKENS_AT_ONCE = {"cuda": 2**14, "cpu": 2**10}
"""Tokens of a forward pass with batch size auto: on a GPU enough that dequantising 4-bit weights is a small part of it,
on a CPU as many as fit its caches."""
SHORTEST_ROW = 256
"""Tokens of a row of inputs with little in common; more for wide models."""


@dataclass(frozen=True)
class _Input:
    """Ids that the model reads for some requests."""

    ids: Ids
    requests: list[int]


@dataclass
class _Row:
    """Inputs in one row, sorted by their ids, and the number of their tokens together."""

    inputs: list[_Input]
    size: int


class Scorer:
    """A model that scores continuations.

    An input longer than the context loses its beginning.

    Args:
        batch_size: inputs of a forward pass; "auto" fills TOKENS_AT_ONCE, and takes fewer if memory runs out. It
            changes memory and speed, not the result.
        max_length: most tokens of an input; by default the whole context.

    Attributes:
        hidden: function that reads tokens, like GPT.hidden; lit_qlora.fused.reader is faster on a GPU.
        truncated: number of requests so far that lost their beginning.
    """

    def __init__(self, model: GPT, batch_size: BatchSize = "auto", max_length: int | None = None) -> None:
        config = model.config
        self.model, self.batch_size = model, batch_size
        self.hidden: Callable[..., Tensor] = model.hidden
        self.max_length = min(max_length or config.block_size, config.block_size)
        self.device = model.embed.weight.device
        self.tokens_at_once = TOKENS_AT_ONCE["cuda" if self.device.type == "cuda" else "cpu"]
        # Attention within a row of this length is a small part of the work.
        self.row_length = max(SHORTEST_ROW, config.n_embd // 8)
        self.truncated = 0
        self._shares = config.shares_beginnings

    def score(
        self, requests: Sequence[Request], progress: Callable[[int], object] = lambda done: None
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of each continuation, and whether greedy decoding would give it.

        Args:
            progress: called after each forward pass with the number of requests it answered.

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
        """Return the ids that the model reads: all but the last one, at most max_length."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"A continuation has {len(continuation)} tokens, and the model's context holds {self.max_length}. "
                "Leave this task out for this model."
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
        """Count the tokens that the second need not read again."""
        if not self._shares:
            return 0
        return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))

    def _joins(self, row: _Row, alike: int, new: int, length: int) -> bool:
        """Tell whether a row takes one more input: `new` tokens behind `alike` tokens that are there.

        It does if it is below `length` and would not be much above it. It also does if reading the `alike` tokens again
        would cost more than comparing the new tokens with the row. Reading takes 24 E^2 operations a token in the
        linear layers of a block. Comparing takes 4 E for each pair, both ways, at a quarter of the speed.
        """
        if self.batch_size != "auto" and len(row.inputs) == self.batch_size:
            return False
        size = row.size + new
        short = row.size < length and size <= 1.25 * length
        worth = short or 3 * self.model.config.n_embd * alike > 4 * row.size * new
        return worth and (self.batch_size != "auto" or size <= self.tokens_at_once)

    def _take(self, waiting: list[_Row]) -> tuple[list[_Row], list[_Row]]:
        """Split off the rows of the next forward pass."""
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
        """Return (number, result) of every request in these rows."""
        width = batch[0].size
        picked: list[int] = []
        targets: list[int] = []
        spans: list[tuple[int, int]] = []
        columns = torch.zeros(4, len(batch), width, dtype=torch.long)
        columns[2] = torch.arange(1, width + 1)  # padding sees itself
        columns[3] = -1  # and belongs to no input
        for number, row in enumerate(batch):
            parts, paths = self._lay_out(row)
            columns[:, number, : row.size] = torch.tensor(parts)
            for one, path in zip(row.inputs, paths, strict=True):
                for index in one.requests:
                    continuation = requests[index][1]
                    picked += [number * width + column for column in path[-len(continuation) :]]  # columns before it
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
        """Lay out the inputs of a row, and find the columns of each input's tokens.

        Returns:
            For each column its token, position, first later column that does not see it, and number of its first input
            (see GPT.hidden). For each input its columns.
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
        """Return each target's float32 log-probability, and if it is the likeliest; hidden (N, E), targets (N,)."""
        targets = targets.to(self.device)
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        log_probs, greedy = [], []
        for some, wanted in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            logits = self.model.logits(some).float()
            log_probs.append(logits.gather(-1, wanted[:, None])[:, 0] - logits.logsumexp(dim=-1))
            greedy.append(logits.argmax(dim=-1) == wanted)
        return torch.cat(log_probs).cpu(), torch.cat(greedy).cpu()


def windows(ids: Sequence[int], first: int, length: int, stride: int | None = None) -> Iterator[Request]:
    """Cut a text into requests for Scorer.score that predict every token once.

    Args:
        first: id before the text.
        length: most tokens of an input.
        stride: tokens predicted per request, after at least length - stride + 1 earlier tokens, if there are as many;
            by default `length`, after one token.
    """
    whole = [first, *ids]
    step = stride or length
    for start in range(0, len(ids), step):
        end = min(start + step, len(ids))
        begin = max(0, end - length)  # the last window is filled up with earlier tokens
        yield whole[begin : start + 1], whole[start + 1 : end + 1]
