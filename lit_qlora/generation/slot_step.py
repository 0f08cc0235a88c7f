"""A step of decoding for texts that come and go, each with an adapter of its own, as a CUDA graph on a GPU.

A graph has fixed shapes, so the number of rows is rounded up to a power of two. Rows that no text uses begin anew in
each step.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_qlora.generation.decode_step import FastStep
from lit_qlora.generation.graphed_step import Graphs, columns
from lit_qlora.generation.product import RowAdapters
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.kernels.launch import power_of_2
from lit_qlora.model.gpt import GPT


class SlotStep:
    """The next logits of the texts in the first slots of `cache`.

    Args:
        model: decode_step.why_not(model, by_row=True) is ''.
        cache: `rows` and `limit` are set by each step, which extends its texts.
        vocab_size: ids from here on have no logits.
    """

    def __init__(self, model: GPT, cache: SlotCache, vocab_size: int | None) -> None:
        device = cache.lengths.device
        self.cache, self.slots, self.vocab_size = cache, cache.rows, vocab_size
        self.tokens = torch.zeros(self.slots, dtype=torch.long, device=device)
        self.adapters = RowAdapters(self.slots, model.embed.weight.dtype, device)
        self.fast = FastStep(model, cache, adapters=self.adapters)
        can = device.type == "cuda" and model.config.rope_scaling != "longrope"
        self.graphs = Graphs(cache.changing) if can else None

    def __call__(self, tokens: Sequence[int], adapters: Sequence[str | None], longest: int) -> Tensor:
        """Logits (B, V) of what follows the newest token of each text; the next call overwrites them.

        Args:
            adapters: the name of each text's adapter, None for the base.
            longest: tokens of the longest text, the newest one included.
        """
        count, cache = len(tokens), self.cache
        cache.rows = min(power_of_2(count, 1), self.slots)
        cache.limit = columns(longest, cache.length)
        cache.lengths[count:] = 0
        self.tokens[:count] = torch.tensor(tokens)
        self.adapters.select(adapters)
        shapes = (cache.rows, cache.limit, self.adapters.active)
        logits = self.graphs(shapes, self._compute) if self.graphs else self._compute()
        return logits[:count]

    @torch.no_grad()
    def _compute(self) -> Tensor:
        return self.fast(self.tokens[: self.cache.rows])[:, : self.vocab_size].float()
