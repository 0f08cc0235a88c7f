"""The products of a group with its frozen weights in FP8, and with its adapters in 16 bit.

Forward Y = X W^T + Z B^T, backward [dX | dZ] = [dY W | dY B]. Both passes use the same rounded weights, so the gradient
belongs to the function that was computed. W has a scale for each row. It stands outside the sum over k in the forward
pass, and is multiplied into dY before dY is rounded in the backward pass. The layout differs: the matrix units want the
summed dimension contiguous, first the rows of W, then its columns. So a workspace is not reused between the passes.
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
    def workspace_bytes(self) -> int:
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
            for rows, columns, rows_b in self.stack.slices:
                y[:, rows].addmm_(x[:, self.k :][:, columns], b[rows_b].T)
        return y

    def product_back(self, dy: Tensor, workspace: Tensor, b: Tensor | None) -> Tensor:
        """[dX | dZ] (T, K + R) of dY (T, N), rows not contiguous."""
        columns = workspace.view(FP8)[: self.width * self.stack.n].view(self.width, self.stack.n)
        quantize_weights(self.weight, self.scale, columns[: self.k].T, self.stack, self.table)
        # The last columns, for dZ, are garbage here: no weight lies there in the workspace.
        d_out = scaled_product(quantize_rows(dy, self.stack.n, self.scale), (columns, self.ones), dy.dtype)
        if b is not None:
            times_b(dy, b, self.stack, d_out[:, self.k :])
        return d_out[:, : self.k + self.stack.rank]
