"""B brought up to date beside weights that lie in memory, for all matrices [W | B] in one launch.

The zeros beside B are there since a matrix was made, so each layer's own rows and columns alone are written. A table on
the device tells where they lie, relative to the first matrix.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lit_qlora.kernels.launch import power_of_2, tl, triton
from lit_qlora.kernels.stack import Stack

TILE = 4096  # elements of B that a program copies


class Where(NamedTuple):
    """The places of a matrix [W | B] and of its B, in elements from the first matrix and from its B."""

    matrix: int
    stride: int
    width: int
    b: int
    stack: Stack


class BesideWeights:
    """Writes B beside weights again and again; the table is made anew only where others lie there, or elsewhere."""

    def __init__(self) -> None:
        self.places: list[Where] = []

    def write(self, matrices: Sequence[tuple[Tensor, Tensor, Stack]]) -> None:
        """Write each B into the last R columns of its matrix, which are zero outside of the layers' own B.

        Args:
            matrices: each [W | B], (N, K + R), with contiguous rows; its stacked B, (adapted rows, r), contiguous; and
                its stack. All have one dtype.
        """
        if not matrices:
            return
        (out, b, _), *_ = matrices
        to, source, size = out.data_ptr(), b.data_ptr(), out.element_size()
        places = [
            Where((own.data_ptr() - to) // size, own.stride(0), own.size(1), (own_b.data_ptr() - source) // size, stack)
            for own, own_b, stack in matrices
        ]
        if places != self.places:
            self._make_table(places, out.device)
        _write[(len(self.table),)](b, out, self.table, UNIT=self.unit, ROWS=self.rows, COLUMNS=self.columns)

    def _make_table(self, places: list[Where], device: torch.device) -> None:
        self.places = []  # an interruption leaves no table that counts
        self.columns = power_of_2(max(place.stack.r for place in places))
        self.rows = max(1, TILE // self.columns)
        entries = [entry for place in places for entry in _entries(place, self.rows)]
        self.unit = math.gcd(8, *(size for _, *sizes in entries for size in sizes))  # 8 of 16 bit are read at a time
        table = [(rows, *(size // self.unit for size in sizes)) for rows, *sizes in entries]
        self.table = torch.tensor(table, dtype=torch.int64, device=device)
        self.places = places


def _entries(place: Where, most: int) -> Iterator[tuple[int, ...]]:
    """Of each `most` rows of a layer: the rows from here on, where they lie, their stride, where in B, and r."""
    stack = place.stack
    for rows, columns, rows_b in stack.slices:
        to = place.matrix + place.width - stack.rank + columns.start
        for row in range(rows.start, rows.stop, most):
            source = place.b + (rows_b.start + row - rows.start) * stack.r
            yield rows.stop - row, to + row * place.stride, place.stride, source, stack.r


if triton is not None:

    @triton.jit
    def _write(B, OUT, TABLE, UNIT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
        """A program copies rows of an entry, whose sizes are in units, so that Triton knows how they are aligned."""
        entry = TABLE + tl.program_id(0) * 5
        rows, to, stride = tl.load(entry), tl.load(entry + 1) * UNIT, tl.load(entry + 2) * UNIT
        source, r = tl.load(entry + 3) * UNIT, tl.load(entry + 4) * UNIT
        row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
        own = (row < rows) & (column < r)
        b = tl.load(B + source + row * r + column, own)
        tl.store(OUT + to + row * stride + column, b, own)
