"""Linear layers that read the same input, as one product; shared by training and decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.kernels.experts_dequantize import Matrices, dequantize
from lit_qlora.kernels.stack import EightBit, FourBit, Stack, Unquantized, end_to_end
from lit_qlora.quantize import QuantizedLinear, stack_matrices, stack_weights, stacks


class StackedLinear:
    """The frozen part of a stack of layers, and where their adapters lie in it.

    Args:
        layers: with or without an adapter; why_not_stacked(layers, dtype) is ''.
        ranks: of each layer's adapter, 0 for none; smaller ones are padded to the largest.
        dtype: of the products.

    Attributes:
        bases: the layers without their adapters.
        k, n: input and output features.
        rank: columns of Z, see Stack.
        table: stack.table, on the device.
        weight: the quantised weights; the layers keep views of them. None where they are not quantised, unless these
            lie in other memory, see kernels.stack.Unquantized.
        bias: (N,) or None.
    """

    def __init__(self, layers: Sequence[nn.Module], ranks: Sequence[int], dtype: torch.dtype) -> None:
        bases: list[Any] = [base_of(layer) for layer in layers]
        adapters = iter(range(len(layers)))
        slots = tuple(next(adapters) if rank else -1 for rank in ranks)
        self.bases, self.dtype = bases, dtype
        self.stack = Stack(tuple(base.out_features for base in bases), slots, max(ranks))
        self.k, self.n, self.rank = bases[0].in_features, self.stack.n, self.stack.rank
        self.device = next(tensor.device for tensor in (*bases[0].parameters(), *bases[0].buffers()))
        self.table = self.stack.table(self.device)
        self.bias = self._bias()
        self.weight: FourBit | EightBit | Unquantized | None = None
        if isinstance(bases[0], QuantizedLinear):
            self.weight = stack_weights(bases)
            assert self.weight is not None, "why_not_stacked has refused what cannot be stacked"

    @property
    def stored(self) -> list[Tensor]:
        """The tensors of the frozen weights, if they are quantised or lie in memory of others."""
        return [] if self.weight is None else self.weight.large

    def _bias(self) -> Tensor | None:
        """The biases end to end, zero for a layer without one."""
        if all(base.bias is None for base in self.bases):
            return None
        parts = (torch.zeros(base.out_features) if base.bias is None else base.bias.detach() for base in self.bases)
        return end_to_end([part.to(self.device, self.dtype) for part in parts])


class StackedExperts:
    """The frozen part of the layers of a block's experts that read inputs of one kind, and where their adapters lie.

    Args:
        experts: of each expert its layers, whose shapes and schemes are those of the first one's.
        ranks: of the adapter of each layer of an expert, 0 for none in all experts; smaller ones are padded.
        dtype: of the products.
        tied: the layers of an expert share one A.

    Attributes:
        stack: all layers, expert by expert; n: output features of all of them.
        k: input features.
        shape: of the weights: experts, output features of one, input features.
        rank: columns of Z that all adapters together would have, see Stack.
        weight: the quantised weights; dense: the others, (n_expert, N, K); the layers keep views of both.
        bias: (n_expert, N) or None.
    """

    def __init__(
        self, experts: Sequence[Sequence[nn.Module]], ranks: Sequence[int], dtype: torch.dtype, tied: bool = False
    ) -> None:
        bases: list[Any] = [base_of(layer) for expert in experts for layer in expert]
        adapters, count = iter(range(len(bases))), len(experts)
        slots = tuple(next(adapters) if rank else -1 for rank in [*ranks] * count)
        if tied:
            slots = tuple(slot // len(ranks) for slot in slots)
        self.stack, self.dtype = Stack(tuple(base.out_features for base in bases), slots, max(ranks)), dtype
        self.k, self.n, self.rank = bases[0].in_features, self.stack.n, self.stack.rank
        self.shape = (count, self.n // count, self.k)
        self.device = next(tensor.device for tensor in (*bases[0].parameters(), *bases[0].buffers()))
        biases = [base.bias for base in bases]
        self.bias = None
        if biases[0] is not None:
            self.bias = end_to_end([bias.detach().to(dtype) for bias in biases]).view(count, -1)
        self.weight: Matrices | None = None
        self.dense: Tensor | None = None
        if isinstance(bases[0], QuantizedLinear) and bases[0].scheme != "none":
            self.weight = stack_matrices(bases)
        else:
            self.dense = _joined(bases).view(self.shape)
            assert self.dense.dtype == dtype, "weights that lie elsewhere are not converted"

    @property
    def stored(self) -> list[Tensor]:
        """The tensors of the frozen weights."""
        if self.weight is not None:
            return self.weight.stored.large
        return [] if self.dense is None else [self.dense]

    @property
    def elements(self) -> int:
        """Of the weights."""
        return self.n * self.k

    def dequantize(self, out: Tensor) -> None:
        """Write quantised weights into `out`, of their shape."""
        assert self.weight is not None
        dequantize(self.weight, out)


def _joined(layers: Sequence[Any]) -> Tensor:
    """Weights of linear layers end to end; the layers keep views, so that nothing is there twice."""
    if isinstance(layers[0], QuantizedLinear):
        return end_to_end([layer.packed for layer in layers])
    whole = end_to_end([layer.weight.detach() for layer in layers])
    for layer, part in zip(layers, whole.split([layer.out_features for layer in layers]), strict=True):
        layer.weight.data = part
    return whole


def base_of(layer: nn.Module) -> Any:
    """A linear layer without its adapter."""
    return getattr(layer, "base", layer)


def why_not_stacked(layers: Sequence[nn.Module], dtype: torch.dtype) -> str:
    """Why layers that read the same input cannot be one product in `dtype`, or ''."""
    bases = [base_of(layer) for layer in layers]
    if all(isinstance(base, QuantizedLinear) for base in bases):
        if stacks(bases):
            return ""
        return f"quantised layers of {bases[0].in_features} x {[base.out_features for base in bases]} do not stack"
    same = all(isinstance(base, nn.Linear) and base.weight.dtype == dtype for base in bases)
    return "" if same else "layers of different kinds"
