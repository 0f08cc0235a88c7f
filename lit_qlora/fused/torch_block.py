"""A block whose attention, or what takes its place, is differentiated by autograd.

Delta nets, state spaces and short convolutions are fused.mixers; other attention is the plain model's module. Norms,
MLP and experts, which take most of the time, run on kernels as in other blocks. The module's linear layers are stacks
of the fast path too, and its lookup of values is fused.attention's. With `recompute` none and mlp autograd's graph of
the module is saved. Else the backward pass makes it from the block's input.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.fused.attention import Heads, Layout, attention, attention_backward
from lit_qlora.fused.block import Block, SavedBlock
from lit_qlora.fused.group import Group
from lit_qlora.fused.kernel_block import mixer_of, mixing_layers
from lit_qlora.fused.mixers import mixer_of_kernels
from lit_qlora.fused.passes import Backward, Pass
from lit_qlora.fused.torch_stack import MOST_STACKS, TorchStack, with_layers
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.norm import add_norm, apply_norm, norm_backward
from lit_qlora.model.attention import Place, attend
from lit_qlora.model.config import ModelConfig
from lit_qlora.settings import Recompute


class TorchBlock(Block):
    """See the module.

    Attributes:
        stacks: the linear layers of the module; those with the same input are one stack.
        module: the plain model's attention, or what takes its place, with these stacks.
        mix: computes (T, E) -> (T, E) by the module, or in its place.
    """

    def __init__(
        self, block: Any, config: ModelConfig, dtype: torch.dtype, number: int, like: Tensor, fp8: bool
    ) -> None:
        super().__init__(block, config, dtype, number, like, fp8)
        first = MOST_STACKS * (config.n_layer + 1 + number)  # behind the numbers of all other layers
        self.stacks = [
            TorchStack(layers, Group(layers, dtype, fp8), first + i)
            for i, layers in enumerate(mixing_layers(mixer_of(block)))
        ]
        self.groups = (*(stack.group for stack in self.stacks), *self.groups)
        replaced = {layer: part for stack in self.stacks for layer, part in stack.parts.items()}
        self.module = with_layers(mixer_of(block), replaced)
        self.module.training = False  # fast_attend drops for it
        self.mix = mixer_of_kernels(mixer_of(block), [stack.whole for stack in self.stacks]) or self._by_module

    def _attend(self, stream: list[Tensor], run: Pass, policy: Recompute) -> tuple[SavedBlock, Tensor, Tensor]:
        """See Block."""
        x, y = stream[0], stream[1] if len(stream) > 1 else None
        stream.clear()
        normed = torch.empty_like(x)
        x, statistics = add_norm(x, y, self.norm_1, normed)
        del y
        below = run.offload.latest if self.fetches_below else None
        saved = SavedBlock(self._save_input(x, run, policy), below, statistics)
        if policy in ("none", "mlp"):
            saved.attention = self._graph(normed, run)
            return saved, x, saved.attention[1].detach()
        return saved, x, self._attended(normed, run)

    def _attend_again(self, saved: SavedBlock, back: Backward) -> Tensor:
        """See Block."""
        saved.x = back.forward.offload.get(saved.x)
        saved.attention = self._graph(apply_norm(self.norm_1, saved.x), back.forward)
        raw: Tensor = saved.attention[1].detach()
        return raw

    def _attend_backward(
        self, d_out: Tensor, d_stream: Tensor | None, saved: SavedBlock, back: Backward
    ) -> Tensor | None:
        """See Block."""
        if saved.attention is None:
            self._attend_again(saved, back)
        d_raw, _ = self._d_raw_1(d_out, saved, back)
        (normed, raw), saved.attention = saved.attention, None
        for stack in self.stacks:
            stack.workspace = back.workspaces[0]
        (d_normed,) = torch.autograd.grad(raw, normed, d_raw)
        back.forward.offload.fetch(saved.below)
        del normed, raw, d_raw
        if d_stream is None:
            return None
        assert saved.statistics_1 is not None
        x = back.forward.offload.get(saved.x)
        return norm_backward(d_normed, x, self.norm_1, saved.statistics_1, residual=d_stream)

    def _graph(self, normed: Tensor, run: Pass) -> tuple[Tensor, Tensor]:
        """The attention's input (T, E) and output, with autograd's graph between them."""
        with torch.enable_grad():
            return normed.requires_grad_(), self._attended(normed, run)

    def _attended(self, normed: Tensor, run: Pass) -> Tensor:
        """(T, E) -> (T, E)."""
        for stack in self.stacks:
            stack.begin(run)
        return self.mix(normed, run)

    def _by_module(self, normed: Tensor, run: Pass) -> Tensor:
        """(T, E) -> (T, E)."""
        shape = (run.layout.rows, run.layout.own_length)
        out: Tensor = self.module(normed.unflatten(0, shape), self._place(run), None)
        return out.flatten(0, 1)

    def _place(self, run: Pass) -> Place:
        """The tokens' positions as the module needs them."""
        layout = run.layout
        shape = (layout.rows, 1, layout.own_length, -1)
        cos, sin = (table[run.positions].view(shape) for table in run.ropes[self.windowed])
        scale = self._query_scale(run)
        scale = None if scale is None else scale.view(shape)
        mask, lookup = (
            (None, fast_attend(layout, self.window, self._drops(0, run)))
            if layout.masks is None
            else (layout.masks[self.window], attend)
        )
        return Place((cos, sin) if self.rotates else None, scale, mask, None, [], lookup)


class _Attend(torch.autograd.Function):
    """fused.attention of queries (T, H, D), keys and values (T, K, D); returns (T, H D)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: Heads, layout: Layout) -> Tensor:
        """See fused.attention."""
        out, ctx.extra = attention(q, k, v, heads, layout)
        ctx.heads, ctx.layout = heads, layout
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """The gradients of queries, keys and values."""
        q, k, v, out = ctx.saved_tensors
        parts = attention_backward(gradients[0].contiguous(), q, k, v, out, ctx.extra, ctx.heads, ctx.layout)
        return *parts, None, None


def fast_attend(layout: Layout, window: int | None, drops: Dropout = NONE) -> Callable[..., Tensor]:
    """Make a function that computes what model.attention.attend does for documents, which take the place of a mask.

    Args:
        drops: the dropout of its weights.
    """

    def lookup(
        q: Tensor, k: Tensor, v: Tensor, mask: None, scale: float | None, cap: float | None = None,
        sinks: Tensor | None = None, dropout: float = 0.0,
    ) -> Tensor:  # fmt: skip
        assert mask is None
        assert not dropout
        sinks = None if sinks is None else sinks.detach()
        heads = Heads(q.size(1), k.size(1), q.size(3), scale, window, cap, sinks, drops)
        narrow = v.size(3)
        v = F.pad(v, (0, heads.size - narrow))  # the kernels know one size of heads
        by_token = (x.transpose(1, 2).contiguous().view(-1, x.size(1), x.size(3)) for x in (q, k, v))
        out = _Attend.apply(*by_token, heads, layout)
        rows: Tensor = out.view(len(q), -1, heads.query, heads.size)
        return rows[..., :narrow].transpose(1, 2)

    return lookup
