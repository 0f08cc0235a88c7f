"""DoRA on a stack: row n of [W | B] times g = m / |W + s B A|, so that the products know nothing of it.

Liu et al. 2024. The length m of a row learns; the one that it is divided by is constant to the gradient (sec. 4.3). Of
row n it is the root of |W|^2 + 2 <W, s B A> + |s B A|^2. The first sum is computed once. With P = W (s A)^T, r columns,
and the Gram matrix G = s A (s A)^T, the rest is <2 P + B G, B>.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lit_qlora.fused.large_rank import in_float32
from lit_qlora.kernels.stack import Stack
from lit_qlora.lora.layer import LoRALinear


class Gains:
    """The factors of a stack's rows.

    Attributes:
        factors: (N, 1) float32, those of the last forward pass; 1 for layers without an adapter.
        lengths: of each adapter m and its gradient, (rows,).
        stale: A or B may have changed.
    """

    def __init__(self, adapters: Sequence[LoRALinear], stack: Stack, device: torch.device) -> None:
        self.stack, self.stale = stack, True
        self.factors = torch.ones(stack.n, 1, device=device)
        learnt: list[nn.Parameter] = [layer.magnitude for layer in adapters if layer.magnitude is not None]
        self.lengths = [(length, torch.zeros_like(length.data)) for length in learnt]
        self.squares = torch.zeros(stack.n, device=device)

    def measure(self, weights: Tensor) -> None:
        """Compute the squares of the lengths of the rows of W (N, K), which are fixed."""
        self.squares = torch.linalg.vector_norm(weights, dim=1, dtype=torch.float32).square()

    def refresh(self, weights: Tensor, a: Tensor, b: Tensor) -> None:
        """Compute the factors, given W (N, K), the stacked A (R, K) times alpha / r, and the stacked B."""
        if not self.stale:
            return
        for (rows, columns, rows_b), (length, _) in zip(self.stack.slices, self.lengths, strict=True):
            own, low = a[columns], b[rows_b].float()
            inner = 2 * in_float32(weights[rows], own.T) + low @ in_float32(own, own.T)
            squares = self.squares[rows] + (inner * low).sum(1)
            self.factors[rows, 0] = length.detach() * squares.clamp_min(torch.finfo(torch.float32).tiny).rsqrt()
        self.stale = False

    def add_gradient(self, dy: Tensor, y: Tensor, bias: Tensor | None) -> None:
        """Add to the gradients of m, given the stack's output (T, N) and its gradient.

        Without the bias y is m times what m is multiplied with.
        """
        sums = (dy * y).sum(0, dtype=torch.float32)
        if bias is not None:
            sums -= dy.sum(0, dtype=torch.float32) * bias
        for (rows, *_), (length, gradient) in zip(self.stack.slices, self.lengths, strict=True):
            gradient.add_(torch.where(length == 0, 0, sums[rows] / length.detach()))
