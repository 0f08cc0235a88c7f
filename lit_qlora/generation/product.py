"""Products of the newest tokens with a stack of layers, by the number of texts.

The time of a product is that of reading its weight. For one text, and for a few, they are read as they are stored
(kernels.small_batch_linear). In 16 bits they are four times as much. But the matrix units take them as they are, while
decoding a 4-bit weight costs its program the same time for 2 texts as for 16. So for several texts weights are cached
in 16 bits, as far as there is memory; and for more than the kernel takes, the others are dequantised once a step for
all texts.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.device import gpu_bytes
from lit_qlora.fused.stacked import StackedLinear
from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.dequantize import dequantize
from lit_qlora.kernels.small_batch_linear import MOST_ROWS
from lit_qlora.kernels.stack import EightBit, FourBit, Stack, end_to_end
from lit_qlora.lora.adapter_switch import SwitchedLinear
from lit_qlora.lora.layer import LoRALinear

SHARE = 0.5
"""Of the free memory, the part that cached weights may take; prompts of the next texts need some, too."""


class RowAdapters:
    """The adapters that the rows of a batch use, in memory that never moves.

    Attributes:
        active: the names that some row uses, sorted.
        shares: by name (rows, 1), 1 in the rows that use the adapter and 0 in the others.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.nobody = torch.zeros(rows, 1, dtype=dtype, device=device)
        self.names: tuple[str | None, ...] = ()
        self.active: tuple[str, ...] = ()
        self.shares: dict[str, Tensor] = {}

    def select(self, names: Sequence[str | None]) -> None:
        """Let row i use the adapter names[i], or none; rows behind the last one use none."""
        if tuple(names) == self.names:
            return
        self.names = tuple(names)
        self.active = tuple(sorted({name for name in names if name is not None}))
        for name in self.active:
            share = self.shares.setdefault(name, self.nobody.clone()).zero_()
            share[: len(names), 0] = torch.tensor([float(other == name) for other in names], dtype=share.dtype)


class Update(NamedTuple):
    """An adapter of a stack: A of its layers end to end, (R, K), times the factor; rows, columns of Z and B of each."""

    a: Tensor
    parts: list[tuple[slice, slice, Tensor]]


class Product(StackedLinear):
    """A stack of layers that decodes, with their adapters as they are when this is made.

    Args:
        adapters: those of SwitchedLinear that a row uses count, whatever their selection is; None for one adapter for
            all rows, as the layers have it.

    Attributes:
        cached: quantised weights in 16 bits, (N, K); see cache_weights.
        workspace: where they are dequantised, (at least N K,), if they are not cached.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, adapters: RowAdapters | None = None) -> None:
        updates = updates_of(layers) if adapters is None else [None] * len(layers)
        super().__init__(layers, [0 if update is None else len(update[0]) for update in updates], dtype)
        assert self.weight is None or isinstance(self.weight, FourBit | EightBit)
        self.matrix = self._end_to_end() if self.weight is None else self.weight
        found = [update for update in updates if update is not None]
        self.a = torch.cat([(scale * a).to(dtype) for a, _, scale in found]) if found else None
        self.b = torch.cat([b.to(dtype) for _, b, _ in found]) if found else None
        self.stack_of_a = Stack((self.rank,), (-1,), 0)
        self.stack_of_w = Stack(self.stack.rows, (-1,) * len(self.stack.rows), 0)
        self.adapters, self.by_name = adapters, {} if adapters is None else _updates_by_name(layers, dtype)
        self.cached: Tensor | None = None
        self.workspace: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, K) -> (B, N)."""
        few = len(x) == 1 or (len(x) <= MOST_ROWS and self.cached is None)
        y = self._as_stored(x) if few else self._in_16_bits(x)
        for name in self.adapters.active if self.adapters else ():
            if name in self.by_name:
                assert self.adapters is not None
                a, parts = self.by_name[name]
                _add(y, F.linear(x, a) * self.adapters.shares[name][: len(x)], parts)
        return y

    @property
    def nbytes(self) -> int:
        """Of the weights as products of several texts want them, where they are not stored so."""
        return 0 if self.weight is None else self.n * self.k * self.dtype.itemsize

    def cache(self) -> None:
        """Keep quantised weights dequantised."""
        self.cached = self._dequantized(torch.empty(self.n, self.k, dtype=self.dtype, device=self.device))

    def _as_stored(self, x: Tensor) -> Tensor:
        z = None if self.a is None else small_batch_linear.product(x, self.a, self.stack_of_a, None)
        return small_batch_linear.product(x, self.matrix, self.stack, self.table, self.bias, z, self.b)

    def _in_16_bits(self, x: Tensor) -> Tensor:
        y = F.linear(x, self._dense(), self.bias)
        if self.a is not None and self.b is not None:
            _add(y, F.linear(x, self.a), [(rows, own, self.b[rows_b]) for rows, own, rows_b in self.stack.slices])
        return y

    def _dense(self) -> Tensor:
        """The weights, (N, K)."""
        if isinstance(self.matrix, Tensor):
            return self.matrix
        if self.cached is not None:
            return self.cached
        assert self.workspace is not None
        return self._dequantized(self.workspace[: self.n * self.k].view(self.n, self.k))

    def _dequantized(self, out: Tensor) -> Tensor:
        assert self.weight is not None
        return dequantize(self.weight, None, out, self.stack_of_w, self.table)

    def _end_to_end(self) -> Tensor:
        """The weights; the layers get views of them, so that none is in memory twice."""
        whole = end_to_end([base.weight.detach() for base in self.bases])
        if len(self.bases) > 1:
            for base, part in zip(self.bases, whole.split(self.stack.rows), strict=True):
                base.weight.data = part
        return whole


def cache_weights(products: Iterable[Product], rows: int, spare: int) -> None:
    """Cache weights for so many texts, the first ones first, and give the others a workspace if they need one.

    Args:
        spare: most bytes of cached weights.
    """
    if rows == 1:
        return
    left = [product for product in products if product.nbytes]
    while left and left[0].nbytes <= spare:
        spare -= left[0].nbytes
        left.pop(0).cache()
    if left and rows > MOST_ROWS:
        most = max(left, key=lambda product: product.nbytes)
        workspace = torch.empty(most.n * most.k, dtype=most.dtype, device=most.device)
        for product in left:
            product.workspace = workspace


def spare_bytes(device: torch.device) -> int:
    """Bytes that cached weights may take on a device; none on a CPU."""
    room = gpu_bytes() if device.type == "cuda" else None
    return 0 if room is None else int(SHARE * max(0, room - torch.cuda.memory_allocated(device)))


def updates_of(layers: Sequence[nn.Module]) -> list[tuple[Tensor, Tensor, float] | None]:
    """A, B and the factor of their product for each layer that has an adapter, else None."""
    return [layer.low_rank() if isinstance(layer, LoRALinear | SwitchedLinear) else None for layer in layers]


def _updates_by_name(layers: Sequence[nn.Module], dtype: torch.dtype) -> dict[str, Update]:
    """The updates of a stack by each adapter of SwitchedLinear."""
    found: dict[str, tuple[list[Tensor], list[tuple[slice, slice, Tensor]]]] = {}
    first = 0
    for layer in layers:
        features: Any = layer.out_features
        for name, (a, b, scale, _) in layer.updates.items() if isinstance(layer, SwitchedLinear) else ():
            own, parts = found.setdefault(name, ([], []))
            column = sum(map(len, own))
            own.append((scale * a).to(dtype))
            parts.append((slice(first, first + features), slice(column, column + len(a)), b.to(dtype)))
        first += features
    return {name: Update(torch.cat(own), parts) for name, (own, parts) in found.items()}


def _add(y: Tensor, z: Tensor, parts: Iterable[tuple[slice, slice, Tensor]]) -> None:
    """Add Z B^T to the columns of Y, for each layer its own columns of Y and Z and its B."""
    for rows, own, b in parts:
        y[:, rows].addmm_(z[:, own], b.T)
