"""A stack of layers as training uses it: products forward and backward, and the gradients of the adapters."""

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn

from lit_qlora.fused import large_rank
from lit_qlora.fused.dora import Gains
from lit_qlora.fused.fp8 import Fp8
from lit_qlora.fused.large_rank import Sum
from lit_qlora.fused.stacked import StackedLinear
from lit_qlora.fused.uneven import PaddedB
from lit_qlora.kernels import lora_products
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.beside import BesideWeights
from lit_qlora.kernels.dequantize import dequantize
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import cdiv
from lit_qlora.kernels.lora_products import LEAST_STRIPE, MOST_RANK, Pending, copy_scaled
from lit_qlora.kernels.norm import Norm, add_norm, norm_backward
from lit_qlora.kernels.normed_input import normed_input_backward
from lit_qlora.kernels.stack import EightBit, FourBit, Stack
from lit_qlora.lora.layer import LoRALinear


class Layers(Protocol):
    """Layers that share an input, with an index in the stack of all adapters; see Group for the names."""

    adapted: list[nn.Module]
    adapters: list[LoRALinear]
    padded: list[PaddedB]
    stack: Stack
    k: int
    rank: int
    p: float
    scale: float
    a: Tensor | None
    b: Tensor | None
    grad_a: Tensor
    grad_b: Tensor
    carried: Tensor | None

    @property
    def size_a(self) -> int:
        """Elements of the stacked A."""
        ...

    @property
    def size_b(self) -> int:
        """Elements of the stacked B."""
        ...

    @property
    def quantized(self) -> bool:
        """Its weights are dequantised for a product."""
        ...

    @property
    def stored(self) -> list[Tensor]:
        """The frozen weights, if they are quantised or not its own."""
        ...

    @property
    def workspace_size(self) -> int:
        """Elements that its weights need of a workspace."""
        ...

    @property
    def extra_bytes(self) -> int:
        """Bytes of weights that are cached or carried over."""
        ...

    def cache(self) -> None:
        """Cache quantised weights from now on."""
        ...

    def release(self) -> None:
        """Release what is cached or carried over."""
        ...


class Group(StackedLinear):
    """A stack of layers that train: [W | B] in memory or dequantised into a workspace, A and B in the products' dtype.

    Attributes:
        adapted: the layers with a place in the stack of adapters; among experts some may have no adapter.
        adapters: those with one; all have the same dropout.
        padded: their B, where ranks or scales differ; else none.
        a: (R, K), stacked A times alpha / r; b: (adapted rows, r), stacked B. Both are filled by Copies.refresh.
        grad_a, grad_b: their float32 gradients, of A itself.
        dense: [W | B] that is not quantised, or is a cached weight; W alone where nothing is stacked or adapted.
        fp8: the weights in FP8, where their products are.
        beside: where B lies beside W; large adapters share columns there, see large_rank.product.
        gains: the factors of DoRA; None without. What is cached lacks them, and nothing is carried over.
        carried: [W | B] carried over until the next call of `matrix`, which writes the B of then into it.
    """

    carried: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    grad_a: Tensor
    grad_b: Tensor

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype, fp8: bool = False) -> None:
        ranks = [layer.lora_a.size(0) if isinstance(layer, LoRALinear) else 0 for layer in layers]
        super().__init__(layers, ranks, dtype)
        self.shares_columns = self.stack.r > MOST_RANK and self.rank > self.stack.r and not fp8
        self.beside = large_rank.beside(self.stack) if self.shares_columns else self.stack
        self.table_beside = self.beside.table(self.device)
        self.beside_carried = BesideWeights()
        self.adapters = [layer for layer in layers if isinstance(layer, LoRALinear)]
        self.adapted: list[nn.Module] = [*self.adapters]
        self.padded: list[PaddedB] = []
        self.p = self.adapters[0].dropout.p if self.adapters else 0.0
        self.scale = self.adapters[0].scale if self.adapters else 1.0
        dora = any(adapter.magnitude is not None for adapter in self.adapters)
        self.gains = Gains(self.adapters, self.stack, self.device) if dora else None
        self.dense = None if self.weight is not None else self._beside_b()
        self.fp8: Fp8 | None = None
        if fp8:
            stored = self.weight if self.dense is None else self.dense[:, : self.k]
            assert isinstance(stored, FourBit | EightBit | Tensor)
            self.fp8 = Fp8(stored, self.stack, self.k, self.table)

    def _beside_b(self) -> Tensor:
        """The weights end to end with room for B beside them; the layers get views, so none is in memory twice."""
        if len(self.bases) == 1 and not self.rank:
            whole: Tensor = self.bases[0].weight.detach()
            return whole
        whole = torch.zeros(self.n, self.width, dtype=self.dtype, device=self.device)
        for base, part in zip(self.bases, whole.split(self.stack.rows), strict=True):
            part[:, : self.k] = base.weight.detach()
            base.weight.data = part[:, : self.k]
        return whole

    @property
    def size_a(self) -> int:
        """Elements of the stacked A."""
        return self.rank * self.k

    @property
    def size_b(self) -> int:
        """Elements of the stacked B."""
        return self.stack.adapted_rows * self.stack.r

    @property
    def quantized(self) -> bool:
        """See Layers."""
        return self.weight is not None

    @property
    def width(self) -> int:
        """Columns of [W | B] and of [X | Z]."""
        return self.k + self.beside.rank

    @property
    def workspace_size(self) -> int:
        """Elements that `matrix` needs of a workspace."""
        if self.fp8 is not None:
            return cdiv(self.fp8.workspace_bytes, self.dtype.itemsize)
        return self.n * self.width if self.dense is None or self.gains is not None else 0

    def matrix(self, workspace: Tensor | None) -> Tensor:
        """[W | B], (N, K + R), as product takes it, its rows times DoRA's factors.

        A quantised one, or one in FP8 or with DoRA, is written into `workspace`, which must not be in use. Without a
        workspace a quantised one is carried over: the next call returns it.
        """
        if self.gains is not None:
            assert self.a is not None
            assert self.b is not None
            assert workspace is not None
            plain = self._unscaled(workspace)
            self.gains.refresh(plain[:, : self.k], self.a, self.b)
            return torch.mul(plain, self.gains.factors, out=workspace[: plain.numel()].view(plain.shape))
        return self._unscaled(workspace)

    @property
    def gains_of_layers(self) -> list[Tensor | None]:
        """DoRA's factors of the rows of each layer with an adapter, (rows, 1); None without DoRA."""
        if self.gains is None:
            return [None] * len(self.adapted)
        return [self.gains.factors[rows] for rows, *_ in self.stack.slices]

    def measure(self) -> None:
        """Compute what DoRA reads of the weights alone."""
        if self.gains is not None:
            space = torch.empty(self.workspace_size, dtype=self.dtype, device=self.device)
            self.gains.measure(self._unscaled(space)[:, : self.k])

    def _unscaled(self, workspace: Tensor | None) -> Tensor:
        """The matrix without DoRA's factors."""
        if self.fp8 is not None:
            assert workspace is not None
            return self.fp8.matrix(workspace)
        if self.dense is not None:
            return self.dense
        if self.carried is not None:
            out, self.carried = self.carried, None
            if self.b is not None:
                self.beside_carried.write([(out, self.b, self.beside)])
            return out
        space = (
            torch.empty(self.workspace_size, dtype=self.dtype, device=self.device) if workspace is None else workspace
        )
        out = space[: self.n * self.width].view(self.n, self.width)
        assert self.weight is not None
        dequantize(self.weight, self.b, out, self.beside, self.table_beside)
        self.carried = out if workspace is None else None
        return out

    def cache(self) -> None:
        """Cache [W | B] of a quantised weight, instead of writing it into a workspace each time."""
        if self.dense is None:
            self.dense = self._unscaled(torch.empty(self.workspace_size, dtype=self.dtype, device=self.device))

    @property
    def extra_bytes(self) -> int:
        """Bytes of what is cached or carried over."""
        cached = None if self.weight is None else self.dense
        return sum(tensor.nbytes for tensor in (cached, self.carried) if tensor is not None)

    def release(self) -> None:
        """Free what is cached or carried over."""
        self.carried = None
        if self.weight is not None:
            self.dense = None

    @property
    def in_memory(self) -> list[tuple[Tensor, Tensor, Stack]]:
        """[W | B] that is in memory, its B and its stack, as BesideWeights takes them; or nothing."""
        if self.dense is None or self.b is None or self.fp8 is not None:
            return []
        return [(self.dense, self.b, self.beside)]

    def empty_input(self, tokens: int) -> Tensor:
        """Room for [X | Z], (T, K + R)."""
        return torch.empty(tokens, self.width, dtype=self.dtype, device=self.device)

    def normed(self, norm: Norm, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The stream x + y, the statistics of its rows, and norm(x + y) as input with room for Z."""
        normed = self.empty_input(x.size(0))
        return *add_norm(x, y, norm, normed), normed

    def product(self, x: Tensor, matrix: Tensor, z: Tensor | None = None, out: Tensor | None = None) -> Tensor:
        """Y = [X | Z] [W | B]^T + bias, (T, N), in `out` if there is one.

        Args:
            z: Z, which does not lie behind X where adapters share columns.
        """
        if self.fp8 is not None:
            return self.fp8.product(x, matrix, self.b, self.bias)
        if self.shares_columns:
            assert z is not None
            return large_rank.product(x, z, matrix, self.bias, self.k, self.stack, out)
        if self.bias is None:
            return torch.mm(x, matrix.T, out=out)
        return torch.addmm(self.bias, x, matrix.T, out=out)

    def product_back(self, dy: Tensor, workspace: Tensor | None, matrix: Tensor | None = None) -> Tensor:
        """[dX | dZ] = dY [W | B], (T, K + R); `matrix` is [W | B] if it still lies in a workspace."""
        if self.fp8 is not None:
            assert workspace is not None
            return self.fp8.product_back(dy, workspace, self.b)
        matrix = self.matrix(workspace) if matrix is None else matrix
        if self.shares_columns:
            return large_rank.product_back(dy, matrix, self.k, self.stack)
        return torch.mm(dy, matrix)

    def back(self, dy: Tensor, workspace: Tensor | None, matrix: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[dX | dZ] and dZ, for d_input.

        With large adapters it is dX alone, (T, K), which d_input need not copy.
        """
        apart = self.stack.r > MOST_RANK and self.b is not None and self.fp8 is None and self.gains is None
        if not apart:
            d_out = self.product_back(dy, workspace, matrix)
            return d_out, d_out[:, self.k :]
        matrix = self.matrix(workspace) if matrix is None else matrix
        return torch.mm(dy, matrix[:, : self.k]), self.d_z(dy)

    def d_z(self, dy: Tensor) -> Tensor:
        """DZ = dY B alone, (T, R), where no gradient of X is wanted."""
        assert self.b is not None
        dy = dy if self.gains is None else (dy * self.gains.factors.T).to(dy.dtype)
        return large_rank.times_b(dy, self.b, self.stack, dy.new_empty(len(dy), self.rank))

    def dropout(self, seed: Tensor | None, number: int) -> Dropout:
        """The dropout of the adapters' input in this pass; layers that share an input share it. Inputs are numbered."""
        return NONE if seed is None or not self.p else Dropout(self.p, seed, number)

    @property
    def by_cublas(self) -> bool:
        """True if cuBLAS computes LoRA's products: their kernels take no larger ranks, and 16 outputs at a time."""
        return self.stack.r > MOST_RANK or any(rows % LEAST_STRIPE for rows in self.stack.rows)

    @cached_property
    def sum_a(self) -> Sum:
        """The gradient of A as cuBLAS adds to it."""
        return Sum(self.grad_a)

    @cached_property
    def sum_b(self) -> Sum:
        """The gradient of B as cuBLAS adds to it."""
        return Sum(self.grad_b)

    @property
    def sums(self) -> tuple[Sum, ...]:
        """Its gradients, if their first products may be written over whatever is there."""
        return (self.sum_a, self.sum_b) if self.rank and self.by_cublas and not self.padded else ()

    def project(
        self,
        x: Tensor,
        out: Tensor,
        dropout: Dropout,
        activation: Activation | nn.Module | None = None,
        copy: bool = False,
    ) -> Tensor | None:
        """Z of x, also behind X in `out`; see lora_products.project. None without an adapter."""
        if self.a is None:
            return None
        if self.by_cublas or isinstance(activation, nn.Module):
            return large_rank.project(x, self.a, out, activation, copy, dropout, not self.shares_columns)
        return lora_products.project(x, self.a, out, activation, copy, dropout)

    def add_grad_a(
        self,
        x: Tensor,
        d_out: Tensor,
        pending: Pending,
        dropout: Dropout,
        norm: Norm | None = None,
        statistics: Tensor | None = None,
        into: Tensor | None = None,
    ) -> None:
        """Add to the gradient of A, or `into` another, given [dX | dZ] or dZ alone; X is norm(x).

        Nothing without an adapter.
        """
        if self.a is None:
            return
        gradient, dz = self.sum_a if into is None else Sum(into), d_out[:, -self.rank :]
        if self.by_cublas:
            large_rank.grad_a(x, dz, gradient, self.scale, dropout, norm, statistics)
        else:
            total, norm = gradient.total, norm or Norm("none")
            lora_products.grad_a(x, dz, total, self.scale, pending, norm, statistics, dropout)

    def add_grad_b(self, dy: Tensor, z: Tensor | None, pending: Pending, into: Tensor | None = None) -> None:
        """Add to the gradient of B, or `into` another, given dY and Z. Nothing without an adapter."""
        if z is None:
            return
        gradient = self.sum_b if into is None else Sum(into)
        if self.by_cublas:
            large_rank.grad_b(dy, z, gradient, self.stack)
        else:
            lora_products.grad_b(dy, z, gradient.total, self.stack, self.table, pending)

    def add_grad_lengths(self, dy: Tensor, y: Tensor | None) -> None:
        """Add to the gradients of the lengths that DoRA learns, given dY and Y. Nothing without DoRA."""
        if self.gains is not None:
            assert y is not None
            self.gains.add_gradient(dy, y, self.bias)

    def d_input(self, d_out: Tensor, dz: Tensor, dropout: Dropout) -> Tensor:
        """The gradient of the group's input, (T, K), from what `back` gives, which is used up."""
        if self.a is None:
            return d_out
        if d_out.size(1) == self.k:
            return large_rank.add_update(d_out, dz, self.a, dropout)
        return (large_rank if self.by_cublas else lora_products).rank_update(d_out, self.a, self.k, dropout)

    def normed_backward(
        self,
        d_out: Tensor,
        x: Tensor,
        norm: Norm,
        statistics: Tensor,
        z: Tensor | None,
        residual: Tensor | None,
        dropout: Dropout,
        pending: Pending,
        into: Tensor | None = None,
    ) -> Tensor:
        """The gradient of x from [dX | dZ], where X is norm(x), plus `residual`; adds to that of A, or `into` another.

        [dX | dZ] is used up.
        """
        if self.a is not None and norm.kind == "rms" and not self.by_cublas:
            assert z is not None
            of_a = self.grad_a if into is None else into
            return normed_input_backward(
                d_out, x, z, self.a, of_a, self.scale, pending, norm, statistics, residual, dropout
            )
        self.add_grad_a(x, d_out, pending, dropout, norm, statistics, into)
        d_normed = d_out if self.a is None else large_rank.rank_update_(d_out, self.a, self.k, dropout)
        return norm_backward(d_normed, x, norm, statistics, residual)


class Copies:
    """The 16-bit copies of the adapters of some groups, made together.

    Args:
        master_a, master_b: all A and all B of the groups end to end, float32.
        low_a, low_b: buffers for their copies.
    """

    def __init__(
        self, groups: Sequence[Layers], master_a: Tensor, master_b: Tensor, low_a: Tensor, low_b: Tensor
    ) -> None:
        self.groups, self.both_b = [group for group in groups if isinstance(group, Group)], (master_b, low_b)
        self.beside_weights = BesideWeights()
        self.padded = [padded for group in groups for padded in group.padded]
        adapted = [group for group in groups if group.rank]
        sizes_a, sizes_b = ([getattr(group, name) for group in adapted] for name in ("size_a", "size_b"))
        each_a, each_b = low_a.split(sizes_a), low_b.split(sizes_b)
        scales = [group.scale for group in adapted]
        self.scaled: Sequence[tuple[Tensor, float, Tensor]] = [(master_a, scales[0], low_a)] if adapted else []
        if len(set(scales)) > 1:
            self.scaled = list(zip(master_a.split(sizes_a), scales, each_a, strict=True))
        for group, a, b in zip(adapted, each_a, each_b, strict=True):
            group.a, group.b = a.view(group.rank, group.k), b.view(-1, group.stack.r)

    @torch.no_grad()
    def refresh(self, beside: bool = True) -> None:
        """Copy A times alpha / r and B, and with `beside` also the B beside weights that are in memory."""
        for a, scale, low_a in self.scaled:
            copy_scaled(a, scale, low_a)
        for padded in self.padded:
            padded.copy()
        b, low_b = self.both_b
        low_b.copy_(b)
        if beside:
            self.refresh_beside()

    def refresh_beside(self) -> None:
        """Write B beside weights that are in memory, in one launch, and have DoRA's factors computed anew."""
        self.beside_weights.write([matrix for group in self.groups for matrix in group.in_memory])
        for group in self.groups:
            if group.gains is not None:
                group.gains.stale = True
