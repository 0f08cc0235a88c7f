"""LoRA's products by cuBLAS, for ranks above those of kernels.lora_products: more memory traffic, the same result."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from lit_qlora.fused.torch_activation import activate, activate_backward
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout, drop
from lit_qlora.kernels.lora_products import Pending, copy_rows, scale_rows
from lit_qlora.kernels.norm import Norm, apply_norm
from lit_qlora.kernels.stack import Stack


@dataclass
class Sum:
    """A gradient, in float32, that products are added to.

    Attributes:
        total: (M, N).
        fresh: nothing was added yet, so whatever is there does not count: the first product is written over it. Large
            gradients would otherwise be set to zero, read and written once more.
        factors: of the columns, (N,) float32, where X is behind an RMS norm: its weight times the scale of the adapter.
            They are computed once.
    """

    total: Tensor
    fresh: bool = False
    factors: Tensor | None = None

    def settle(self) -> None:
        """Make `total` zero if nothing was added."""
        if self.fresh:
            self.total.zero_()
        self.fresh = False


def project(
    x: Tensor,
    a: Tensor,
    out: Tensor,
    activation: Activation | nn.Module | None,
    copy: bool,
    dropout: Dropout,
    writes_z: bool = True,
) -> Tensor:
    """As lora_products.project; without `writes_z` Z is not written behind X."""
    k = a.size(1)
    if activation:
        activate(x, out, activation)
    elif copy:
        copy_rows(x, out[:, :k])
    z = torch.mm(drop(out[:, :k], dropout), a.T)
    if writes_z:
        out[:, k:] = z
    return z


def product(
    x: Tensor, z: Tensor, matrix: Tensor, bias: Tensor | None, k: int, stack: Stack, out: Tensor | None
) -> Tensor:
    """Y = [X | Z] [W | B]^T + bias, (T, N), in `out` if there is one, with few of the zeros beside B of several layers.

    The layers up to the first with an adapter are a product of their own. Its Z lies where that of the others comes
    then, see `beside`.

    Args:
        x: (T, K + columns of `beside`), X with room behind it.
    """
    out = x.new_empty(len(x), stack.n) if out is None else out
    (rows, columns, _), *_ = stack.slices
    first, rest = slice(0, rows.stop), slice(rows.stop, stack.n)
    for part, own in ((first, z[:, columns]), (rest, z[:, columns.stop :])):
        width = k + own.size(1)
        x[:, k:width] = own
        inputs, weights = x[:, :width], matrix[part, :width].T
        if bias is None:
            torch.mm(inputs, weights, out=out[:, part])
        else:
            torch.addmm(bias[part], inputs, weights, out=out[:, part])
    return out


def beside(stack: Stack) -> Stack:
    """The stack with the columns that `product` reads: the first layer with an adapter shares them with the others."""
    return replace(stack, slots=tuple(slot if slot < 1 else slot - 1 for slot in stack.slots))


def product_back(dy: Tensor, matrix: Tensor, k: int, stack: Stack) -> Tensor:
    """[dX | dZ] = dY [W | B], (T, K + R), without the zeros beside B of several layers."""
    out = dy.new_empty(len(dy), k + stack.rank)
    torch.mm(dy, matrix[:, :k], out=out[:, :k])
    for (rows, columns, _), (_, place, _) in zip(stack.slices, beside(stack).slices, strict=True):
        torch.mm(dy[:, rows], matrix[rows, k:][:, place], out=out[:, k:][:, columns])
    return out


def times_b(dy: Tensor, b: Tensor, stack: Stack, out: Tensor) -> Tensor:
    """DZ = dY B in `out`, (T, R); each layer of the stack with its own rows of the stacked B."""
    for rows, columns, rows_b in stack.slices:
        torch.mm(dy[:, rows], b[rows_b], out=out[:, columns])
    return out


def rank_update(d_out: Tensor, a: Tensor, k: int, dropout: Dropout) -> Tensor:
    """As lora_products.rank_update."""
    out = d_out.new_empty(len(d_out), k)
    copy_rows(d_out[:, :k], out)
    return add_update(out, d_out[:, k:], a, dropout)


def rank_update_(d_out: Tensor, a: Tensor, k: int, dropout: Dropout) -> Tensor:
    """The same in place: a view of the first K columns, which needs no copy of them."""
    return add_update(d_out[:, :k], d_out[:, k:], a, dropout)


def add_update(dx: Tensor, dz: Tensor, a: Tensor, dropout: Dropout) -> Tensor:
    """The sum dX + dropout'(dZ A) in place of dX, (T, K)."""
    return dx.add_(drop(torch.mm(dz, a), dropout)) if dropout.p else dx.addmm_(dz, a)


def grad_a(
    x: Tensor,
    dz: Tensor,
    gradient: Sum,
    scale: float,
    dropout: Dropout = NONE,
    norm: Norm | None = None,
    statistics: Tensor | None = None,
) -> None:
    """As lora_products.grad_a, at once."""
    total, fresh, gradient.fresh = gradient.total, gradient.fresh, False
    if norm is None or norm.kind != "rms":
        x = x if norm is None else apply_norm(norm, x)
        _add_product(total, dz.T, drop(x, dropout), fresh, scale)
        return
    assert statistics is not None
    assert norm.weight is not None
    if gradient.factors is None:
        gradient.factors = norm.weight.float() * scale
    # Times the factor of what is kept, x may be too much for float16.
    rows = scale_rows(dz, statistics[0] * dropout.scale if dropout.p else statistics[0])
    x = drop(x, dropout, scales=False)
    if fresh:
        _add_product(total, rows.T, x, fresh)
        total.mul_(gradient.factors)
    else:
        total.addcmul_(in_float32(rows.T, x), gradient.factors)


def grad_b(dy: Tensor, z: Tensor, gradient: Sum, stack: Stack) -> None:
    """As lora_products.grad_b, at once."""
    fresh, gradient.fresh = gradient.fresh, False
    for rows, columns, rows_b in stack.slices:
        _add_product(gradient.total[rows_b], dy[:, rows].T, z[:, columns], fresh)


def _add_product(total: Tensor, x: Tensor, y: Tensor, fresh: bool, scale: float = 1.0) -> None:
    """Add scale * x y to `total`, float32, or write it there if that is `fresh`."""
    if not fresh:
        total.add_(in_float32(x, y), alpha=scale)
    elif x.is_cuda and x.dtype != torch.float32:
        torch.addmm(total, x, y, out_dtype=torch.float32, beta=0, alpha=scale, out=total)
    else:
        total.addmm_(x, y, beta=0, alpha=scale)


def through_mlp(
    branches: Tensor,
    dh: Tensor,
    activation: Activation | nn.Module,
    a: Tensor | None,
    grad_of_a: Sum | None,
    z: Tensor | None,
    grad_of_b: Sum | None,
    stack: Stack,
    scale: float,
    pending: Pending,
    dropout: Dropout,
) -> None:
    """As kernels.mlp.mlp_backward."""
    if a is None or grad_of_a is None:
        activate_backward(branches, dh, activation, stack, pending)
    else:
        dz, dh = dh[:, a.size(1) :], rank_update_(dh, a, a.size(1), dropout)
        activate_backward(branches, dh, activation, stack, pending, dropout)
        grad_a(dh, dz, grad_of_a, scale)  # elements of h, which lies there now, are dropped already
    if z is not None and grad_of_b is not None:
        grad_b(branches, z, grad_of_b, stack)


def in_float32(x: Tensor, y: Tensor) -> Tensor:
    """The product of two matrices in float32, not rounded to their dtype."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y)
