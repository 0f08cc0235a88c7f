"""Activations of an MLP by kernels, or by torch's operations and autograd where no kernel computes them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout, drop
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.mlp import mlp_backward, mlp_forward
from lit_qlora.kernels.stack import Stack

AT_ONCE = 2**22
"""Elements that torch's operations take at a time: they save several tensors of their size."""


def activate(branches: Tensor, out: Tensor, activation: Activation | nn.Module) -> None:
    """Write the activation of branches, (T, 2 F) or (T, F), into the first F columns of `out`."""
    if isinstance(activation, Activation):
        mlp_forward(branches, out, activation)
        return
    for rows in _slices(branches):
        out[rows, : branches.size(1)] = activation(branches[rows])


def activate_backward(
    branches: Tensor,
    dh: Tensor,
    activation: Activation | nn.Module,
    stack: Stack,
    pending: Pending,
    dropout: Dropout | None = None,
) -> None:
    """Overwrite branches with their gradients, given that of the activation's output, (T, F).

    Args:
        dropout: of that output; with one, the output with elements dropped is written over its gradient.
    """
    if isinstance(activation, Activation):
        writes_h = dropout is not None
        dropout = dropout or NONE
        mlp_backward(branches, dh, activation, None, None, None, None, stack, 1.0, pending, dropout, writes_h)
        return
    for rows in _slices(branches):
        with torch.enable_grad():
            leaf = branches[rows].detach().requires_grad_()
            h = activation(leaf)
            (gradient,) = torch.autograd.grad(h, leaf, dh[rows])
        branches[rows] = gradient
        if dropout is not None:
            dh[rows] = h.detach()
    if dropout is not None and dropout.p:
        dh.copy_(drop(dh, dropout))


def _slices(x: Tensor) -> Iterator[slice]:
    step = max(1, AT_ONCE // x.size(1))
    return (slice(first, first + step) for first in range(0, len(x), step))
