"""Activations of an MLP by kernels, or by torch's operations and autograd where no kernel computes them."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from lit_qlora.kernels.activation import Activation
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
    branches: Tensor, dh: Tensor, activation: Activation | nn.Module, stack: Stack, pending: Pending
) -> None:
    """Overwrite branches with their gradients, given that of the activation's output, (T, F)."""
    if isinstance(activation, Activation):
        mlp_backward(branches, dh, activation, None, None, None, None, stack, 1.0, pending)
        return
    for rows in _slices(branches):
        with torch.enable_grad():
            leaf = branches[rows].detach().requires_grad_()
            (gradient,) = torch.autograd.grad(activation(leaf), leaf, dh[rows])
        branches[rows] = gradient


def _slices(x: Tensor) -> Iterator[slice]:
    step = max(1, AT_ONCE // x.size(1))
    return (slice(first, first + step) for first in range(0, len(x), step))
