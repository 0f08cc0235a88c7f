"""Memory of the tokens seen so far, so that generating one more token costs one token."""

from typing import NamedTuple

import torch
from torch import Tensor

from lit_qlora.model.config import ModelConfig


class KVCache:
    """Keys and values of the tokens seen so far.

    Args:
        length: most tokens that will be seen, prompt included.
        left_pad: (B,) number of padding tokens before each prompt, for prompts of unequal length.

    Attributes:
        blocks: keys and values (B, K, length, D) of each block; of a gated delta net or state space the last inputs of
            its convolution (B, W - 1, C) and its state (B, H, D, Dv), which is float32; of a short convolution the
            former alone. Nothing of a block that uses those of another.
    """

    left_pad: Tensor | None

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        left_pad: Tensor | None = None,
    ) -> None:
        self.config, self.length, self.dtype, self.device = config, length, dtype, torch.device(device)
        self.blocks = [self._empty(batch, i) for i in range(config.n_layer)]
        self.batch, self.left_pad = batch, left_pad
        self.size = 0

    def _empty(self, batch: int, block: int) -> tuple[Tensor, ...]:
        """The memory of a block that has seen nothing."""
        c = self.config
        if c.is_delta(block):
            heads, keys, values = c.delta_value_heads, c.delta_key_size, c.delta_value_size
            inputs = (batch, c.delta_conv_size - 1, 2 * c.delta_key_heads * keys + heads * values)
            return self._zeros(*inputs), self._zeros(batch, heads, keys, values, dtype=torch.float32)
        if c.is_conv(block):
            return (self._zeros(batch, c.conv_size - 1, c.n_embd),)
        if c.reuses(block):
            return ()
        windowed = c.windowed(block)
        size, heads = c.head_size_of(windowed), c.kv_heads_of(windowed)
        sizes = (size, c.latent_value_size or size)
        return tuple(self._zeros(batch, heads, self.length, each) for each in sizes)

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)

    def columns(self, new: int) -> Tensor:
        """(B or 1, new), the column of each of the next tokens."""
        return torch.arange(self.size, self.size + new, device=self.device)[None]

    def positions(self, new: int) -> Tensor:
        """(B, new), the index of each of the next tokens in its text."""
        columns = self.columns(new).expand(self.batch, new)
        return columns if self.left_pad is None else (columns - self.left_pad[:, None]).clamp(min=0)

    def width(self, new: int) -> int:
        """Number of columns that the next tokens look at."""
        return self.size + new

    def layer(self, i: int, new: int) -> "BlockCache | None":
        """The part of block `i`, with room for `new` more tokens."""
        if self.size + new > self.length:
            raise ValueError(f"The cache holds {self.length} tokens; {self.size} + {new} do not fit.")
        return self._view(i, self.batch, slice(self.size, self.size + new), self.width(new))

    def _view(self, i: int, rows: int, columns: slice | Tensor, width: int) -> "BlockCache | None":
        """Block `i` of the first `rows` texts; None for one that has nothing of its own."""
        if not self.blocks[i]:
            return None
        first, *rest = (memory[:rows] for memory in self.blocks[i])
        if self.config.is_conv(i):
            return ConvCache(first)
        (second,) = rest
        return DeltaCache(first, second) if self.config.is_delta(i) else LayerCache(first, second, columns, width)

    def advance(self, new: int) -> None:
        """The next tokens have been stored in every layer."""
        self.size += new

    def select(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64: in this order, any of them several times, and not with the others."""
        self.blocks = [tuple(memory[rows] for memory in block) for block in self.blocks]
        self.batch = len(rows)
        if self.left_pad is not None:
            self.left_pad = self.left_pad[rows]


class LayerCache:
    """One block's view of a KVCache.

    Args:
        columns: those of the new tokens; a tensor (B, T) where each row has its own.
        width: columns that are looked at.
    """

    def __init__(self, keys: Tensor, values: Tensor, columns: slice | Tensor, width: int) -> None:
        self.keys, self.values, self.columns, self.width = keys, values, columns, width

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, K, T, D) and return all, each (B, K, width, D)."""
        if isinstance(self.columns, slice):
            self.keys[:, :, self.columns] = k
            self.values[:, :, self.columns] = v
        else:
            row = torch.arange(len(k), device=k.device)[:, None]
            self.keys[row, :, self.columns] = k.transpose(1, 2)
            self.values[row, :, self.columns] = v.transpose(1, 2)
        return self.keys[:, :, : self.width], self.values[:, :, : self.width]


class ConvCache(NamedTuple):
    """A view of what a short convolution remembers, see KVCache.blocks; it is changed in place."""

    inputs: Tensor


class DeltaCache(NamedTuple):
    """A view of what a gated delta net or a state space remembers, see KVCache.blocks; both are changed in place."""

    inputs: Tensor
    state: Tensor


BlockCache = LayerCache | DeltaCache | ConvCache
"""A block's view of a KVCache."""
