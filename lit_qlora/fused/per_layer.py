"""Small embeddings of each token for each block, see lit_qlora.model.per_layer, between products of the fast path.

Torch computes what lies between these products, which are small beside a block's. Nothing of it is saved: the backward
pass makes autograd's graph again, from the embeddings or from the stream behind a block's MLP.
"""

from typing import Any

import torch
from torch import Tensor

from lit_qlora.fused.group import Group
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.fused.sliced import seeded, slices
from lit_qlora.fused.torch_stack import MOST_STACKS, TorchStack, with_layers
from lit_qlora.model.config import ModelConfig


class OwnEmbeddings:
    """The embeddings for all blocks, of a slice of tokens at a time."""

    def __init__(self, part: Any, config: ModelConfig, dtype: torch.dtype) -> None:
        self.group = Group([part.narrow], dtype)
        self.stack = TorchStack([part.narrow], self.group, MOST_STACKS * (2 * config.n_layer + 1))
        self.module = with_layers(part, self.stack.parts)

    def forward(self, tokens: Tensor, x: Tensor, run: Pass) -> Tensor:
        """Tokens (T,) and what the first block reads of them (T, E) -> (T, n_layer, per_layer_size)."""
        out: Tensor | None = None
        for i, part in enumerate(slices(len(x))):
            self.stack.begin(seeded(run, i))
            own = self.module(tokens[part], x[part])
            out = own.new_empty(len(x), *own.shape[1:]) if out is None else out
            out[part] = own
        assert out is not None
        return out

    def backward(self, tokens: Tensor, x: Tensor, d_own: Tensor, run: Pass) -> Tensor:
        """The gradient of x, given that of forward's output, and in place those of the adapter."""
        d_x = torch.empty_like(x)
        for i, part in enumerate(slices(len(x))):
            self.stack.begin(seeded(run, i))
            with torch.enable_grad():
                leaf = x[part].detach().requires_grad_()
                own = self.module(tokens[part], leaf)
            (d_x[part],) = torch.autograd.grad(own, leaf, d_own[part])
        return d_x


class OwnInput:
    """The addition of a block's own embeddings to its stream, behind its MLP."""

    def __init__(self, part: Any, config: ModelConfig, dtype: torch.dtype, number: int, fp8: bool) -> None:
        self.number, layers = number, (part.gate, part.widen)
        first = MOST_STACKS * (config.n_layer + 2 + number) - len(layers)  # the last of the block's numbers
        self.stacks = [TorchStack([layer], Group([layer], dtype, fp8), first + i) for i, layer in enumerate(layers)]
        self.groups = tuple(stack.group for stack in self.stacks)
        self.module = with_layers(part, {layer: new for stack in self.stacks for layer, new in stack.parts.items()})

    def forward(self, x: Tensor, run: Pass) -> Tensor:
        """The stream (T, E) -> (T, E)."""
        return self._added(x, run.own_of(self.number), run)

    def backward(self, x: Tensor, d_out: Tensor, back: Backward) -> Tensor:
        """The gradient of x; that of the block's embeddings takes their place, and the adapters' are added."""
        own = back.forward.own_of(self.number)
        with torch.enable_grad():
            stream, beside = x.detach().requires_grad_(), own.detach().requires_grad_()
            out = self._added(stream, beside, back.forward)
        for stack in self.stacks:
            stack.workspace = back.workspaces[0]
        d_x, d_own = torch.autograd.grad(out, (stream, beside), d_out)
        own.copy_(d_own)
        return d_x

    def _added(self, x: Tensor, own: Tensor, run: Pass) -> Tensor:
        for stack in self.stacks:
            stack.begin(run)
        out: Tensor = self.module(x, own)
        return out
