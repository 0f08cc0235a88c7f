"""Linear layers of the plain model's modules as products of the fast path, differentiated by autograd."""

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.fused.group import Group
from lit_qlora.fused.passes import Pass
from lit_qlora.kernels.dropout import NONE
from lit_qlora.kernels.lora_products import Pending

MOST_STACKS = 8
"""Of a block; each has a number of its own for dropout."""


class TorchStack:
    """Linear layers with one input, which a module calls one by one: the first call computes the product of all.

    Attributes:
        parts: of each layer what takes its place in the module.
        workspace: for dequantised weights; None where they are carried over.
    """

    def __init__(self, layers: Sequence[nn.Module], group: Group, number: int) -> None:
        self.group, self.number = group, number
        self.parts = {layer: Part(self, i) for i, layer in enumerate(layers)}
        self.workspace: Tensor | None = None
        self.dropout = NONE
        self.waiting: dict[int, Tensor] = {}

    def begin(self, run: Pass) -> None:
        """Begin a forward pass."""
        self.workspace, self.dropout = run.workspaces[0], self.group.dropout(run.seed, self.number)
        self.waiting.clear()  # of a pass that failed

    def whole(self, x: Tensor) -> Tensor:
        """The outputs (T, N) of all layers, for their input x (T, K)."""
        y: Tensor = _Product.apply(x, self)
        return y

    def product(self, x: Tensor, part: int) -> Tensor:
        """The output (..., N) of a layer for the stack's input x (..., K)."""
        if not self.waiting:
            y = self.whole(x.flatten(0, -2).contiguous())
            self.waiting = dict(enumerate(y.view(*x.shape[:-1], -1).split(self.group.stack.rows, dim=-1)))
        return self.waiting.pop(part)


class Part(nn.Module):
    """A layer of a stack, in its place in a module."""

    def __init__(self, stack: TorchStack, number: int) -> None:
        super().__init__()
        self.stack, self.number = stack, number

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return self.stack.product(x, self.number)


class _Product(torch.autograd.Function):
    """The product of a stack; its backward pass adds the gradients of the adapters to those of the group."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, stack: TorchStack) -> Tensor:
        """(T, K) -> (T, N)."""
        group, dropout = stack.group, stack.dropout
        both, z = x, None
        if group.a is not None:
            both = group.empty_input(len(x))
            z = group.project(x, both, dropout, copy=True)
        ctx.stack, ctx.dropout = stack, dropout
        y = group.product(both, group.matrix(stack.workspace), z)
        ctx.save_for_backward(x, z, None if group.gains is None else y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """The gradient of x."""
        group, dropout, pending = ctx.stack.group, ctx.dropout, Pending()
        x, z, y = ctx.saved_tensors
        dy = gradients[0].contiguous()
        group.add_grad_lengths(dy, y)
        group.add_grad_b(dy, z, pending)
        d_out, dz = group.back(dy, ctx.stack.workspace)
        group.add_grad_a(x, dz, pending, dropout)
        pending.flush()
        return group.d_input(d_out, dz, dropout), None


def with_layers(module: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Return a copy of a module that shares everything with it but the layers that are replaced."""
    if module in replaced:
        return replaced[module]
    made = copy(module)
    made._modules = {
        name: None if child is None else with_layers(child, replaced) for name, child in module._modules.items()
    }
    return made
