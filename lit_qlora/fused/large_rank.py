"""LoRA's products by cuBLAS, for ranks above those of kernels.lora_products: more memory traffic, the same result."""

import torch
from torch import Tensor, nn

from lit_qlora.fused.torch_activation import activate, activate_backward
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import Dropout, drop
from lit_qlora.kernels.lora_products import Pending, copy_rows
from lit_qlora.kernels.norm import Norm, apply_norm
from lit_qlora.kernels.stack import Stack


def project(
    x: Tensor, a: Tensor, out: Tensor, activation: Activation | nn.Module | None, copy: bool, dropout: Dropout
) -> Tensor:
    """As lora_products.project."""
    k = a.size(1)
    if activation:
        activate(x, out, activation)
    elif copy:
        copy_rows(x, out[:, :k])
    z = torch.mm(drop(out[:, :k], dropout), a.T)
    out[:, k:] = z
    return z


def times_b(dy: Tensor, b: Tensor, stack: Stack, out: Tensor) -> Tensor:
    """DZ = dY B in `out`, (T, R); each layer of the stack with its own rows of the stacked B."""
    for rows, columns, rows_b in stack.slices:
        torch.mm(dy[:, rows], b[rows_b], out=out[:, columns])
    return out


def rank_update(d_out: Tensor, a: Tensor, k: int, dropout: Dropout) -> Tensor:
    """As lora_products.rank_update."""
    if not dropout.p:
        return torch.addmm(d_out[:, :k], d_out[:, k:], a)
    return d_out[:, :k] + drop(torch.mm(d_out[:, k:], a), dropout)


def grad_a(x: Tensor, dz: Tensor, gradient: Tensor, scale: float, norm: Norm | None, dropout: Dropout) -> None:
    """As lora_products.grad_a, at once."""
    x = x if norm is None else apply_norm(norm, x)
    gradient.add_(in_float32(dz.T, drop(x, dropout)), alpha=scale)


def grad_b(dy: Tensor, z: Tensor, gradient: Tensor, stack: Stack) -> None:
    """As lora_products.grad_b, at once."""
    first = 0
    for part, slot in zip(dy.split(stack.rows, dim=1), stack.slots, strict=True):
        if slot >= 0:
            own = z[:, slot * stack.r : (slot + 1) * stack.r]
            gradient[first : first + part.size(1)].add_(in_float32(part.T, own))
            first += part.size(1)


def through_mlp(
    branches: Tensor,
    dh: Tensor,
    activation: Activation | nn.Module,
    a: Tensor | None,
    grad_of_a: Tensor | None,
    z: Tensor | None,
    grad_of_b: Tensor | None,
    stack: Stack,
    scale: float,
    pending: Pending,
    dropout: Dropout,
) -> None:
    """As kernels.mlp.mlp_backward."""
    if a is not None and grad_of_a is not None:
        k = a.size(1)
        h = branches.new_empty(len(branches), k)
        activate(branches, h, activation)
        grad_a(h, dh[:, k:], grad_of_a, scale, None, dropout)
        del h
        dh = rank_update(dh, a, k, dropout)
    activate_backward(branches, dh, activation, stack, pending)
    if z is not None and grad_of_b is not None:
        grad_b(branches, z, grad_of_b, stack)


def in_float32(x: Tensor, y: Tensor) -> Tensor:
    """The product of two matrices in float32, not rounded to their dtype."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, y, out_dtype=torch.float32)
    return torch.mm(x, y)
