"""Linear layers that read the same input, stacked into one product together with their adapters."""

from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.kernels.dequantize import dequantize
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.stack import EightBit, FourBit, Stack
from lit_qlora.lora import LoRALinear
from lit_qlora.quantize import QuantizedLinear, stack_weights


class Group:
    """A stack of layers: [W | B] in memory or dequantised into a workspace, A and B in the dtype of the products.

    Attributes:
        k, n: input and output features.
        a: (R, K), stacked A times alpha / r; b: (adapted rows, r), stacked B. Both are filled by Fused.refresh.
        grad_a, grad_b: their float32 gradients, of A itself.
        bias: (N,) or None.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    grad_a: Tensor
    grad_b: Tensor

    def __init__(self, layers: list[nn.Module], dtype: torch.dtype) -> None:
        bases: list[Any] = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
        self.adapters = [layer for layer in layers if isinstance(layer, LoRALinear)]
        rows = tuple(base.out_features for base in bases)
        counter = iter(range(len(layers)))
        slots = tuple(next(counter) if isinstance(layer, LoRALinear) else -1 for layer in layers)
        self.stack = Stack(rows, slots, self.adapters[0].lora_a.size(0) if self.adapters else 0)
        self.k, self.n, self.rank = bases[0].in_features, self.stack.n, self.stack.rank
        self.p = self.adapters[0].dropout.p if self.adapters else 0.0
        self.scale = self.adapters[0].scale if self.adapters else 1.0
        device = next(tensor.device for tensor in (*bases[0].parameters(), *bases[0].buffers()))
        self.table = self.stack.table(device)
        self.dtype, self.device = dtype, device
        biases = [base.bias for base in bases]
        self.bias = None if biases[0] is None else torch.cat([bias.detach().to(dtype) for bias in biases])
        self.weight: FourBit | EightBit | None = None
        self.dense: Tensor | None = None
        if isinstance(bases[0], QuantizedLinear):
            self.weight = stack_weights(bases)
            assert self.weight is not None, "can_fuse has refused layers that cannot be stacked"
        else:
            self.dense = torch.zeros(self.n, self.k + self.rank, dtype=dtype, device=device)
            for base, part in zip(bases, self.dense.split(rows), strict=True):
                part[:, : self.k] = base.weight.detach()
                base.weight.data = part[:, : self.k]  # the layer keeps a view, so that nothing is held twice

    @property
    def width(self) -> int:
        """Columns of [W | B] and of [X | Z]."""
        return self.k + self.rank

    def matrix(self, workspace: Tensor | None) -> Tensor:
        """[W | B], (N, K + R); a quantised one is written into `workspace`, which must not be in use."""
        if self.dense is not None:
            return self.dense
        assert workspace is not None
        out = workspace[: self.n * self.width].view(self.n, self.width)
        return dequantize(self.weight, self.b, out, self.stack, self.table)

    def refresh(self) -> None:
        """Write a changed B beside a weight that stays in memory."""
        if self.dense is not None and self.rank:
            dequantize(None, self.b, self.dense, self.stack, self.table, b_only=True)

    def empty_input(self, tokens: int) -> Tensor:
        """Room for [X | Z], (T, K + R)."""
        return torch.empty(tokens, self.width, dtype=self.dtype, device=self.device)

    def product(self, x: Tensor, matrix: Tensor) -> Tensor:
        """Y = [X | Z] [W | B]^T + bias, (T, N)."""
        return torch.mm(x, matrix.T) if self.bias is None else torch.addmm(self.bias, x, matrix.T)

    def dropout(self, seed: int) -> Dropout:
        """Of the adapters' input in this forward pass; layers that share an input share what is dropped."""
        return Dropout(self.p, seed) if self.p and seed else NONE
