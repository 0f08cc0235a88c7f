"""A cache whose rows have lengths of their own, in memory that never moves.

Requests come and go in it, and the shapes of a step never change.
"""

import torch
from torch import Tensor

from lit_qlora.model.cache import BlockCache, KVCache
from lit_qlora.model.config import ModelConfig


class SlotCache(KVCache):
    """Keys and values of `slots` texts, each of any length up to `length`.

    A forward pass is over the first `rows` slots. Prompts are read into a KVCache of their own, which is then put into
    a slot.

    Attributes:
        lengths: (slots,) int64, the tokens of each text so far.
        limit: columns that are read; not below any length after the next tokens. Fewer are faster.
    """

    def __init__(
        self, config: ModelConfig, slots: int, length: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(config, slots, length, dtype, device)
        self.lengths = torch.zeros(slots, dtype=torch.long, device=device)
        self.rows, self.limit = slots, length

    def columns(self, new: int) -> Tensor:
        """See KVCache."""
        return self.lengths[: self.rows, None] + torch.arange(new, device=self.lengths.device)

    def positions(self, new: int) -> Tensor:
        """See KVCache."""
        return self.columns(new)

    def width(self, new: int) -> int:
        """See KVCache."""
        return self.limit

    def layer(self, i: int, new: int) -> BlockCache | None:
        """See KVCache. The caller makes sure that there is room, as lengths are on the device."""
        return self._view(i, self.rows, self.columns(new), self.limit)

    def advance(self, new: int) -> None:
        """See KVCache."""
        self.lengths[: self.rows] += new

    def select(self, rows: Tensor) -> None:
        """Not for slots, which never move by themselves; see move."""
        raise NotImplementedError

    def put(self, slot: int, cache: KVCache, row: int) -> None:
        """Copy a row of another cache into a slot, without its padding."""
        start = 0 if cache.left_pad is None else int(cache.left_pad[row])
        length = cache.size - start
        for i, (mine, theirs) in enumerate(zip(self.blocks, cache.blocks, strict=True)):
            for memory, other in zip(mine, theirs, strict=True):
                if i in self.config.state_layers:
                    memory[slot] = other[row]
                else:
                    memory[slot, :, :length] = other[row, :, start : cache.size]
        self.lengths[slot] = length

    @property
    def changing(self) -> list[Tensor]:
        """Tensors that a step changes otherwise than by writing behind what is there."""
        return [self.lengths, *(memory for i in self.config.state_layers for memory in self.blocks[i])]

    def move(self, source: int, target: int) -> None:
        """Copy a slot over another."""
        for block in self.blocks:
            for memory in block:
                memory[target] = memory[source]
        self.lengths[target] = self.lengths[source]
