"""Rows over several processes: each computes a part of their tokens, and in attention a part of the heads.

Layers look at single tokens, but for attention. Before it an all-to-all brings each process the queries, keys and
values of all tokens for its part of the heads; behind it another one brings the output of all heads for its tokens.
Jacobs et al. 2023, "DeepSpeed Ulysses". An all-to-all of equal parts is its own inverse, so the backward pass makes the
same ones in reverse.

Where heads of keys and values do not go round evenly, as where they are fewer than the processes, each is repeated; the
gradients of its copies are summed.

The processes of a row have to make the same exchanges in the same order. So they take the same micro-batches, and what
one of them computes alone is of whole rows: GPT.rows is None meanwhile.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed

from lit_qlora.model.attention import Lookup, Place, attend
from lit_qlora.model.config import ModelConfig


def why_whole(model: ModelConfig, processes: int) -> str:
    """Why rows of this model cannot lie over so many processes, or ''."""
    if model.state_layers:
        return "it has blocks with a state, which whole rows go through one token after the other"
    return f"so many devices cannot divide its {model.n_head} heads" if model.n_head % processes else ""


class RowParts:
    """The part of each row that this process computes.

    Args:
        processes: N consecutive ones share a row.

    Attributes:
        number: of the part, from 0 to N - 1.
        members: the processes that share a row with this one.
        groups: of N processes; each takes other rows.
        group: number of the group of this process.
        sent: bytes that this process sent to others.
    """

    def __init__(self, processes: int) -> None:
        world, rank = distributed.get_world_size(), distributed.get_rank()
        assert world % processes == 0
        self.processes, self.groups = processes, world // processes
        self.group, self.number = divmod(rank, processes)
        # Each process has to take part in making each group.
        members = [range(first, first + processes) for first in range(0, world, processes)]
        self.members = [distributed.new_group(list(ranks)) for ranks in members][self.group]
        self.sent = 0

    def length(self, tokens: int) -> int:
        """Tokens of a part of a row; the last part is filled up with padding."""
        return -(-tokens // self.processes)

    def part(self, row: Tensor, fill: float = 0, dim: int = 1) -> Tensor:
        """Cut a tensor with a column for each token of a row to this process's columns.

        Args:
            fill: what padding has.
            dim: of the columns.
        """
        length = self.length(row.size(dim))
        first = min(self.number * length, row.size(dim))
        here = row.narrow(dim, first, min(length, row.size(dim) - first))
        behind = [0, 0] * (row.ndim - 1 - dim)
        return F.pad(here, (*behind, 0, length - here.size(dim)), value=fill)

    def place(self, place: Place, length: int) -> Place:
        """The positions of this process's part of rows of so many tokens, from those of whole rows.

        The mask stays that of whole rows, which attention sees.
        """
        rope, scale = place.rope, place.query_scale
        return place._replace(
            rope=None if rope is None else (self.part(rope[0], dim=2), self.part(rope[1], dim=2)),
            query_scale=None if scale is None else self.part(scale, dim=2),
            attend=self._attend(length),
        )

    def _attend(self, length: int) -> Lookup:
        """Make what does model.attention.attend for the parts of rows of so many tokens."""

        def lookup(
            q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None = None, cap: float | None = None,
            sinks: Tensor | None = None, dropout: float = 0.0,
        ) -> Tensor:  # fmt: skip
            narrow = v.size(3)
            v = F.pad(v, (0, q.size(3) - narrow))  # as wide as queries, to travel with them
            whole = self.to_heads(*(x.transpose(1, 2) for x in (q, k, v)))
            q, k, v = (x[:, :length].transpose(1, 2) for x in whole)
            own = None if sinks is None else sinks.chunk(self.processes)[self.number]
            y = attend(q, k, v[..., :narrow], mask, scale, cap, own, dropout)
            y = F.pad(y, (0, 0, 0, self.length(length) * self.processes - length))
            (out,) = self.to_tokens(y.transpose(1, 2))
            return out.transpose(1, 2)

        return lookup

    def to_heads(self, *parts: Tensor) -> Sequence[Tensor]:
        """Own tokens of all heads -> all tokens of own heads: (B, t, heads, D) each -> (B, N t, heads / N, D).

        Heads that N does not divide are repeated. They may differ in number, not in size.
        """
        n = self.processes
        whole_heads = (self._repeated(x).unflatten(2, (n, -1)) for x in parts)
        by_process = [x.permute(2, 0, 1, 3, 4) for x in whole_heads]
        sizes = [x.size(3) for x in by_process]
        got = _Exchange.apply(torch.cat(by_process, dim=3), self)
        whole: Sequence[Tensor] = got.transpose(0, 1).flatten(1, 2).split(sizes, dim=2)
        return whole

    def to_tokens(self, *parts: Tensor) -> Sequence[Tensor]:
        """All tokens of own heads -> own tokens of all heads: (B, N t, heads, D) each -> (B, t, N heads, D)."""
        sizes = [x.size(2) for x in parts]
        got = _Exchange.apply(torch.cat(parts, dim=2).unflatten(1, (self.processes, -1)).transpose(0, 1), self)
        return [x.flatten(2, 3) for x in got.permute(1, 2, 0, 3, 4).split(sizes, dim=3)]

    def _repeated(self, x: Tensor) -> Tensor:
        copies = self.copies(x.size(2))
        return x if copies == 1 else x.repeat_interleave(copies, dim=2)

    def copies(self, heads: int) -> int:
        """Copies of each of so many heads that travel."""
        return math.lcm(heads, self.processes) // heads

    def exchange(self, x: Tensor) -> Tensor:
        """(N, ...): give each process of the row its part of the first dimension; take this process's of all."""
        x = x.contiguous()
        got = torch.empty_like(x)
        distributed.all_to_all_single(got, x, group=self.members)
        self.sent += x.nbytes // self.processes * (self.processes - 1)
        return got


class _Exchange(torch.autograd.Function):
    """See RowParts.exchange."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: RowParts) -> Tensor:
        """(N, ...) -> (N, ...)."""
        ctx.rows = rows
        return rows.exchange(x)

    @staticmethod
    def backward(ctx: Any, *d_out: Tensor) -> tuple[Tensor, None]:
        """Its own inverse."""
        return ctx.rows.exchange(d_out[0]), None
