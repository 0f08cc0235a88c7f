"""A step of decoding whose shapes and memory never change, so that a GPU can replay it as one CUDA graph.

For one text a 7B model launches more than two thousand small kernels a token. Launching them takes several times as
long as running them; a graph is one launch. Where possible the step also has few kernels, which read weights as they
are stored, see lit_qlora.generation.decode_step; else it is the plain model's.
"""

from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from lit_qlora.generation.decode_step import FastStep, why_not
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.model.gpt import GPT

SMALLEST = 256
"""Columns of the cache that a step reads at first. They are doubled when they are full, so that few graphs are
captured, and short texts do not pay for long ones."""
WARM_UPS = 3  # steps before a capture, in which libraries choose their kernels and take their memory


MOST_GRAPHS = 64
"""Graphs that are held at a time."""


class Graphs:
    """CUDA graphs of a computation, one for each of its shapes; they share their memory.

    The computation is no attribute: its owner has the graphs, and a circle would hold cached weights for long.

    Args:
        changing: memory that it changes otherwise than by writing what it would write again.
    """

    def __init__(self, changing: Sequence[Tensor]) -> None:
        self.changing = changing
        self._graphs: dict[Hashable, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    def __call__(self, shapes: Hashable, compute: Callable[[], Tensor]) -> Tensor:
        """Compute, by the graph for these shapes; the result is valid until the next call.

        Args:
            compute: reads and writes memory that never moves.
        """
        if shapes not in self._graphs:
            if len(self._graphs) == MOST_GRAPHS:
                self._graphs.clear()
            self._graphs[shapes] = self._capture(compute)
        graph, out = self._graphs[shapes]
        graph.replay()
        return out

    def _capture(self, compute: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        before = [memory.clone() for memory in self.changing]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                compute()
                self._put_back(before)
        torch.cuda.current_stream().wait_stream(side)
        graph, others = torch.cuda.CUDAGraph(), next(iter(self._graphs.values()), None)
        with torch.cuda.graph(graph, pool=others[0].pool() if others else None):
            out = compute()
        self._put_back(before)  # a capture computes nothing; this only makes sure
        return graph, out

    def _put_back(self, before: Sequence[Tensor]) -> None:
        for memory, earlier in zip(self.changing, before, strict=True):
            memory.copy_(earlier)


class FixedStep:
    """The next logits of each row of `cache`, one token a row at a time.

    Args:
        cache: of the texts so far; each step extends it.
        longest: tokens of the longest text in it.
        vocab_size: ids from here on have no logits.
    """

    def __init__(self, model: GPT, cache: SlotCache, longest: int, vocab_size: int | None) -> None:
        self.model, self.cache, self.longest, self.vocab_size = model, cache, longest, vocab_size
        self.tokens = torch.zeros(cache.rows, 1, dtype=torch.long, device=cache.lengths.device)
        self.fast = _fast_step(model, cache) if self.tokens.is_cuda else None
        # A graph cannot look at an expert's counts on the CPU, nor bring longrope's factors from there.
        can = (self.fast or not model.config.n_expert) and model.config.rope_scaling != "longrope"
        self.graphs = Graphs(cache.changing) if self.tokens.is_cuda and can else None

    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) of the tokens that follow `tokens` (B,); the next call overwrites them."""
        self.longest += 1
        self.tokens.copy_(tokens[:, None])
        self.cache.limit = columns(self.longest, self.cache.length)
        return self.graphs(self.cache.limit, self._compute) if self.graphs else self._compute()

    @torch.no_grad()
    def _compute(self) -> Tensor:
        if self.fast:
            logits = self.fast(self.tokens[:, 0])
        else:
            logits = self.model.logits(self.model.hidden(self.tokens, self.cache)[:, -1])
        return logits[:, : self.vocab_size].float()


def columns(length: int, most: int) -> int:
    """The columns that a step reads when the longest text has `length` tokens: SMALLEST, doubled until they suffice."""
    limit = SMALLEST
    while limit < length:
        limit *= 2
    return min(limit, most)


def _fast_step(model: GPT, cache: SlotCache) -> FastStep | None:
    return None if why_not(model) else FastStep(model, cache)
