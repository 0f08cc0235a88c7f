"""The layout of the layers of a group and their adapters when they are stacked, and the parts of quantised stacks.

Layers that read the same input (query, key and value; gate and up) become one matrix product. Their weights are stacked
along the rows, and their adapters are numbered. Layer p has adapter number a = slot[p]. It owns columns a r to a r + r
of the stacked Z = s X A^T, (T, R), and rows of the stacked B; layers without an adapter have none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

BLOCK = 64  # 4-bit weights that share a scale
PER_STEP = 1 / 127  # of a row's largest magnitude; multiplied with, because dividing rounds differently on CPU and GPU


@dataclass(frozen=True)
class Stack:
    """The layout of a group of layers with one input.

    Attributes:
        rows: output features of each layer.
        slots: number of each layer's adapter, -1 for one without; layers that share an A have the same.
        r: rank of each adapter.
    """

    rows: tuple[int, ...]
    slots: tuple[int, ...]
    r: int

    @property
    def n(self) -> int:
        """Output features of all layers."""
        return sum(self.rows)

    @property
    def rank(self) -> int:
        """Columns of Z: r for each A."""
        return self.r * len({slot for slot in self.slots if slot >= 0})

    @property
    def adapted_rows(self) -> int:
        """Rows of the stacked B."""
        return sum(rows for rows, slot in zip(self.rows, self.slots, strict=True) if slot >= 0)

    @property
    def slices(self) -> list[tuple[slice, slice, slice]]:
        """Of each layer with an adapter, its rows, its columns of Z, and its rows of the stacked B."""
        found, first, first_b = [], 0, 0
        for rows, slot in zip(self.rows, self.slots, strict=True):
            if slot >= 0:
                columns = slice(slot * self.r, (slot + 1) * self.r)
                found.append((slice(first, first + rows), columns, slice(first_b, first_b + rows)))
                first_b += rows
            first += rows
        return found

    def table(self, device: torch.device | str) -> Tensor:
        """First row, slot and first row in B of each layer, which kernels look up: (layers, 3) int32."""
        table, first, first_b = [], 0, 0
        for rows, slot in zip(self.rows, self.slots, strict=True):
            table.append((first, slot, first_b if slot >= 0 else 0))
            first, first_b = first + rows, first_b + (rows if slot >= 0 else 0)
        return torch.tensor(table, dtype=torch.int32, device=device)


@dataclass
class FourBit:
    """The stacked 4-bit weights of a group.

    Attributes:
        packed: (N * K / 2,) uint8, the first of two weights in the high nibble.
        absmax: (N * K / 64,) float32 scales, or uint8 codes of them with double quantisation.
        code: (16,) float32, the values of a nibble.
        nested: with double quantisation (codes of absmax (256,), its scales (N * K / 64 / 256,), offset of each
            layer (layers,)), all float32; else None.
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    nested: tuple[Tensor, Tensor, Tensor] | None

    @property
    def large(self) -> list[Tensor]:
        """The tensors that grow with the weights."""
        return [self.packed, self.absmax, *(self.nested[1:2] if self.nested else ())]

    @cached_property
    def words(self) -> Tensor:
        """The packed weights as int32, eight weights each."""
        return self.packed.view(torch.int32)


@dataclass
class EightBit:
    """The stacked int8 weights of a group: packed (N, K) int8, absmax (N,) float32."""

    packed: Tensor
    absmax: Tensor

    @property
    def large(self) -> list[Tensor]:
        """The tensors that grow with the weights."""
        return [self.packed, self.absmax]


@dataclass
class Unquantized:
    """The stacked weights of a group that are not quantised, in memory that this group does not own: values (N, K)."""

    values: Tensor

    @property
    def large(self) -> list[Tensor]:
        """The tensors that grow with the weights."""
        return [self.values]


def end_to_end(parts: Sequence[Tensor]) -> Tensor:
    """The tensors joined along their first dimension: where they lie so already, a view of them, else a new one."""
    first, end = parts[0], parts[0].storage_offset()
    for part in parts:
        if part.untyped_storage().data_ptr() != first.untyped_storage().data_ptr() or part.storage_offset() != end:
            return torch.cat(list(parts))
        if part.stride() != first.stride() or part.shape[1:] != first.shape[1:]:
            return torch.cat(list(parts))
        end += len(part) * part.stride(0)
    return first.as_strided((sum(len(part) for part in parts), *first.shape[1:]), first.stride())
