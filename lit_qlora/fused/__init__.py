"""The fast training path: GPT.loss as one autograd function, equal to model.py and several times as fast.

fuse(model) takes over GPT.loss where the model, its dtype and the device allow it, and leaves everything else as it is:
adapters stay the parameters they were, so optimizers, checkpoints and merging do not notice.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.config import ModelConfig
from lit_qlora.fused.attention import Heads, Layout
from lit_qlora.fused.block import FusedBlock, Kept, Pass
from lit_qlora.fused.offload import Offload
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.norm import add_norm, norm_backward
from lit_qlora.kernels.thin import Pending
from lit_qlora.lora import LoRALinear
from lit_qlora.model import GPT
from lit_qlora.quantize import QuantizedLinear
from lit_qlora.rope import rope_table
from lit_qlora.settings import Recompute

HANDLED = {
    *(
        "name",
        "family",
        "n_layer",
        "n_embd",
        "n_head",
        "n_kv_head",
        "head_size",
        "ffn_size",
        "vocab_size",
        "block_size",
    ),
    *("norm_eps", "qkv_bias", "projection_bias", "mlp_bias", "attention_scale", "tied_head", "sliding_window"),
    *("rope_theta", "rope_fraction", "rope_scaling", "rope_factor", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_original_block_size", "rope_beta_fast", "rope_beta_slow", "rope_truncate", "rope_attention_factor"),
}
"""Fields of ModelConfig that the fast path computes with; every other one must have its default value."""
HEAD_TOKENS = 2048  # tokens whose logits exist at a time
MOST_RANK = 64  # the thin products keep a whole row of Z in registers


def why_not(model: GPT, tokens: int | None = None) -> str:
    """Why this model takes the plain path, or '' if the fast one can take it.

    Args:
        tokens: of the longest row, which a sliding window must not be shorter than.
    """
    config = model.config
    first = next(iter(model.blocks))
    weight = model.embed.weight
    if not AVAILABLE:
        return "Triton is not installed"
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        return f"weights are {str(weight.dtype).removeprefix('torch.')}, not bfloat16"
    for field in dataclasses.fields(ModelConfig):
        if field.name not in HANDLED and getattr(config, field.name) != field.default:
            return f"{field.name} {getattr(config, field.name)!r}"
    if config.rope_scaling in ("dynamic", "longrope"):
        return f"rope_scaling {config.rope_scaling!r}"
    if config.sliding_window is not None and (tokens or config.block_size) > config.sliding_window:
        return f"a sliding window of {config.sliding_window} tokens"
    ranks = {module.lora_a.size(0) for module in first.modules() if isinstance(module, LoRALinear)}
    if max(ranks, default=0) > MOST_RANK:
        return f"adapters of rank {max(ranks)}"
    if type(model.head) is not nn.Linear:
        return "an adapted or quantised output head"
    for module in first.modules():
        base = module.base if isinstance(module, LoRALinear) else module
        if isinstance(base, QuantizedLinear) and (
            base.in_features % 64 or (base.absmax.numel() % 256 and "dq" in base.scheme)
        ):
            return f"a quantised layer of {base.in_features} x {base.out_features} does not stack"
        if isinstance(base, nn.Linear | QuantizedLinear) and base.out_features % 16:
            return f"a layer with {base.out_features} outputs"
    return ""


class Fused:
    """The fast path of one model.

    Attributes:
        recompute: what each block computes again in the backward pass; see lit_qlora.fused.block.
    """

    def __init__(self, model: GPT) -> None:
        config = model.config
        self.model = model
        self.dtype, self.device = model.embed.weight.dtype, model.embed.weight.device
        heads = Heads(config.n_head, config.n_kv_head, config.head_size, config.attention_scale)
        self.blocks = [FusedBlock(block, heads, config.norm_eps, self.dtype, i) for i, block in enumerate(model.blocks)]
        norm: Any = model.norm
        self.norm: Tensor = norm.weight.detach()
        self.groups = [group for block in self.blocks for group in block.groups]
        self.offload, self.pending = Offload(), Pending()
        self.workspaces: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        every = torch.arange(config.block_size, device=self.device)[None]
        cos, sin = rope_table(config, every)
        self.cos, self.sin = cos[0, 0].contiguous(), sin[0, 0].contiguous()
        self.anchor = torch.zeros((), device=self.device, requires_grad=True)
        self._lay_out_adapters()
        self.set_recompute(["none"] * len(self.blocks))

    def _lay_out_adapters(self) -> None:
        """Move the adapters into one float32 tensor, stacked as the groups want them, with a 16-bit copy beside it."""
        adapted = [group for group in self.groups if group.rank]
        sizes_a = [group.rank * group.k for group in adapted]
        sizes_b = [group.stack.adapted_rows * group.stack.r for group in adapted]
        self.master = torch.empty(sum(sizes_a) + sum(sizes_b), device=self.device)
        self.gradient = torch.zeros_like(self.master)
        self.low = torch.empty_like(self.master, dtype=self.dtype)
        self.size_a, self.scale = sum(sizes_a), adapted[0].scale if adapted else 1.0
        self.parameters: list[tuple[nn.Parameter, Tensor]] = []
        first_a, first_b = 0, self.size_a
        for group, size_a, size_b in zip(adapted, sizes_a, sizes_b, strict=True):
            at_a, at_b = slice(first_a, first_a + size_a), slice(first_b, first_b + size_b)
            group.a, group.b = self.low[at_a].view(group.rank, group.k), self.low[at_b].view(-1, group.stack.r)
            group.grad_a, group.grad_b = self.gradient[at_a].view_as(group.a), self.gradient[at_b].view_as(group.b)
            row_a, row_b = 0, 0
            for adapter in group.adapters:
                end_a, end_b = row_a + group.stack.r, row_b + adapter.lora_b.size(0)
                homes = (
                    self.master[at_a].view_as(group.a)[row_a:end_a],
                    self.master[at_b].view_as(group.b)[row_b:end_b],
                )
                gradients = (group.grad_a[row_a:end_a], group.grad_b[row_b:end_b])
                for parameter, home, gradient in zip((adapter.lora_a, adapter.lora_b), homes, gradients, strict=True):
                    home.copy_(parameter.data)
                    parameter.data = home
                    self.parameters.append((parameter, gradient))
                row_a, row_b = end_a, end_b
            first_a, first_b = first_a + size_a, first_b + size_b

    def set_recompute(self, policies: Sequence[Recompute]) -> None:
        """What each block computes again in its backward pass."""
        for block, policy in zip(self.blocks, policies, strict=True):
            block.recompute = policy
        if self.groups[0].weight is None:
            return
        full = "full" in policies

        def room(groups: Sequence[Any]) -> Tensor:
            return torch.empty(max(g.n * g.width for g in groups), dtype=self.dtype, device=self.device)

        block = self.blocks[0]
        self.workspaces = (None, None, None)  # freed before the new ones are taken
        self.workspaces = (
            room(block.groups),
            room([block.qkv]) if full else None,
            room([block.projection]) if full else None,
        )

    @property
    def recompute(self) -> list[Recompute]:
        """What each block computes again."""
        return [block.recompute for block in self.blocks]

    def loss(
        self,
        tokens: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        positions: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Tensor:
        """As GPT.loss."""
        rows, length = tokens.shape
        if positions is None:
            positions = torch.arange(length, device=tokens.device).expand(rows, length)
        learns = torch.is_grad_enabled() and bool(self.parameters)
        # Dropout's seed comes from torch's generator on the host, so that a restored one repeats it.
        drops = self.model.training and any(group.p for group in self.groups)
        seed = int(torch.randint(1, 2**31 - 1, ())) if drops else 0
        run = Pass(
            layout=_layout(rows, length, positions, segments),
            positions=positions.flatten().int(),
            cos=self.cos,
            sin=self.sin,
            workspaces=self.workspaces,
            offload=self.offload,
            seed=seed,
            keep=learns,
        )
        self.refresh()
        if not learns:
            return self._forward(tokens, labels, weights, run)[0]
        self._attach_gradients()
        total: Tensor = _Loss.apply(self.anchor, self, tokens, labels, weights, run)
        return total

    @torch.no_grad()
    def refresh(self) -> None:
        """Bring the 16-bit copies of the adapters up to date; A carries alpha / r."""
        torch.mul(self.master[: self.size_a], self.scale, out=self.low[: self.size_a])
        self.low[self.size_a :].copy_(self.master[self.size_a :])
        for group in self.groups:
            group.refresh()

    def _attach_gradients(self) -> None:
        """Let each adapter's .grad be its place in the one gradient, from zero where the optimizer has let go of it."""
        first, home = self.parameters[0]
        if first.grad is home:
            return
        self.gradient.zero_()
        for parameter, gradient in self.parameters:
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    @torch.no_grad()
    def _forward(
        self, tokens: Tensor, labels: Tensor, weights: Tensor | None, run: Pass
    ) -> tuple[Tensor, Tensor | None, list[Kept | None]]:
        """The loss, its gradient at the last stream if there will be a backward pass, and what the blocks kept."""
        self.offload.reset()
        x: Tensor = F.embedding(tokens.flatten(), self.model.embed.weight)
        y: Tensor | None = None
        kept: list[Kept | None] = []
        for block in self.blocks:
            x, y, one = block.forward(x, y, run)
            kept.append(one)
        loss, d_out = self._head(x, y, labels.flatten(), weights, run.keep)
        return loss, d_out, kept

    def _head(
        self, x: Tensor, y: Tensor | None, labels: Tensor, weights: Tensor | None, keep: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Norm, head and loss, a slice of tokens at a time; the slices' logits become their own gradients."""
        normed = torch.empty_like(x)
        x, rstd = add_norm(x, y, self.norm, normed, self.model.config.norm_eps)
        head = self.model.head.weight.detach()
        count = x.size(0)
        flat = torch.ones(count, device=x.device) if weights is None else weights.flatten()
        loss = torch.empty(count, device=x.device)
        room = torch.empty(min(HEAD_TOKENS, count), head.size(0), dtype=x.dtype, device=x.device)
        for first in range(0, count, HEAD_TOKENS):
            here = slice(first, min(first + HEAD_TOKENS, count))
            logits = room[: here.stop - first]
            torch.mm(normed[here], head.T, out=logits)
            cross_entropy_(logits, labels[here], flat[here], loss[here])
            if keep:
                torch.mm(logits, head, out=normed[here])
        return loss.sum(), norm_backward(normed, x, self.norm, rstd) if keep else None

    @torch.no_grad()
    def backward(self, d_out: Tensor, kept: list[Kept | None], run: Pass) -> None:
        """Add the adapters' gradients, given that of the last stream."""
        d: Tensor | None = d_out
        for i in reversed(range(len(self.blocks))):
            one = kept.pop()
            assert one is not None
            assert d is not None
            d = self.blocks[i].backward(d, one, run, self.pending, wants_dx=i > 0)
        self.pending.flush()


class _Loss(torch.autograd.Function):
    """The whole model as one function; the adapters' gradients go straight to where their .grad lies."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, fused: Fused, tokens: Tensor, labels: Tensor, weights: Tensor | None, run: Pass
    ) -> Tensor:
        loss, ctx.d_out, ctx.kept = fused._forward(tokens, labels, weights, run)
        ctx.fused, ctx.run = fused, run
        return loss

    @staticmethod
    def backward(ctx: Any, *d_loss: Tensor) -> tuple[None, ...]:
        d_out, kept, ctx.d_out, ctx.kept = ctx.d_out, ctx.kept, None, None
        ctx.fused.backward(d_out.mul_(d_loss[0]), kept, ctx.run)
        return None, None, None, None, None, None


def _layout(rows: int, length: int, positions: Tensor, segments: Tensor | None) -> Layout:
    if segments is None:
        return Layout(rows, length)
    first = torch.ones_like(segments, dtype=torch.bool)  # a row begins a document, padding included
    first[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = first.flatten().nonzero()[:, 0]
    ends = torch.cat((starts, starts.new_tensor([rows * length]))).int()
    return Layout(rows, length, ends, int((ends[1:] - ends[:-1]).max()))


def fuse(model: GPT) -> Fused:
    """Let the fast path take over model.loss; call it after the adapters are added and before the optimizer is made.

    why_not(model) must be ''.
    """
    fused = Fused(model)
    model.fast = fused.loss
    return fused
