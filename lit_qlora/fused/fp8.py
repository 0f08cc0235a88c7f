"""The products of a group's frozen weights in FP8, and those of its adapters beside them in 16 bit.

Forward Y = X W^T + Z B^T, backward [dX | dZ] = [dY W | dY B]. The rounded weights are the same numbers both times, so
the gradient is that of the function that was computed: W's scales, one for each row, stand outside the sum over k in
the forward pass and go into dY before it is rounded in the backward pass. Only where the bytes lie differs, because the
matrix units want what is summed over side by side: rows of W, then its columns. So nothing stays in a workspace
between the passes, and weights that are recomputed with are written again.
"""

import torch
from torch import Tensor

from lit_qlora.fused.large_rank import times_b
from lit_qlora.kernels.fp8 import FP8, MULTIPLE, Weight, quantize_rows, quantize_weights, scaled_product, weight_scales
from lit_qlora.kernels.launch import cdiv
from lit_qlora.kernels.stack import Stack


class Fp8:
    """The frozen weights of a group.

    Attributes:
        weight: W (N, K) as it is stored.
        scale: of its rows, (N,) float32.
    """

    def __init__(self, weight: Weight, stack: Stack, k: int, table: Tensor) -> None:
        self.weight, self.stack, self.k, self.table = weight, stack, k, table
        self.scale = weight_scales(weight, stack)
        self.width = k + cdiv(stack.rank, MULTIPLE) * MULTIPLE  # columns of the backward product: there is room for dZ
        self.ones = torch.ones(self.width, device=self.scale.device)

    @property
    def room(self) -> int:
        """Bytes that the weights take in a workspace."""
        return self.stack.n * self.width * FP8.itemsize

    def matrix(self, workspace: Tensor) -> Tensor:
        """W / scale, (N, K), in the workspace."""
        out = workspace.view(FP8)[: self.stack.n * self.k].view(self.stack.n, self.k)
        return quantize_weights(self.weight, self.scale, out, self.stack, self.table)

    def product(self, x: Tensor, matrix: Tensor, b: Tensor | None, bias: Tensor | None) -> Tensor:
        """Y (T, N) of [X | Z] (T, K + R) and what `matrix` returned."""
        y = scaled_product(quantize_rows(x, self.k), (matrix, self.scale), x.dtype, bias)
        if b is not None:
            for rows, columns, rows_b in self.stack.places:
                y[:, rows].addmm_(x[:, self.k :][:, columns], b[rows_b].T)
        return y

    def product_back(self, dy: Tensor, workspace: Tensor, b: Tensor | None) -> Tensor:
        """[dX | dZ] (T, K + R) of dY (T, N), rows not contiguous."""
        columns = workspace.view(FP8)[: self.width * self.stack.n].view(self.width, self.stack.n)
        quantize_weights(self.weight, self.scale, columns[: self.k].T, self.stack, self.table)
        # The last columns are those of dZ, and nothing yet: what lies there in the workspace is no weight.
        d_out = scaled_product(quantize_rows(dy, self.stack.n, self.scale), (columns, self.ones), dy.dtype)
        if b is not None:
            times_b(dy, b, self.stack, d_out[:, self.k :])
        return d_out[:, : self.k + self.stack.rank]
