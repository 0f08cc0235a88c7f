"""A decoding step of few launches on a GPU: the logits of GPT.hidden and GPT.logits.

Layers that read the same input are one product (generation.product), with their adapters. Norms add to the stream as
they are computed, and attention for a token takes three launches (kernels.decode_attention). A block is ten launches
instead of seventy, all of fixed shapes, as a CUDA graph needs.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.fused.kernel_block import KernelBlock, attention_layers, heads_of, mixture_of, norm_of
from lit_qlora.fused.qkv_transforms import Shaping, norms_follow_rotation, norms_heads
from lit_qlora.fused.stacked import why_not_stacked
from lit_qlora.fused.support import stacks_of, unhandled, unhandled_embeddings
from lit_qlora.generation.decode_mlp import make_mlp, make_room, why_not_chosen
from lit_qlora.generation.product import Product, RowAdapters, cache_weights, spare_bytes, updates_of
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.kernels import decode_attention as kernels
from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.launch import INTERPRETED, why_no_kernels
from lit_qlora.kernels.norm import add_norm, apply_norm
from lit_qlora.kernels.qk_norm_rope import Rotation, norm_rotate
from lit_qlora.lora.adapter_switch import SwitchedLinear
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.attention import query_scale, softcap
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, times
from lit_qlora.model.rope import rope_table

Rope = tuple[Tensor, Tensor]
"""Cosines and sines of the next token of each text, (B, R / 2)."""
Ropes = dict[bool, Rope]
"""The key says whether a block has a sliding window."""


class FastBlock(KernelBlock):
    """A block of the model."""

    def __init__(
        self, block: Any, config: ModelConfig, number: int, like: Tensor, adapters: RowAdapters | None
    ) -> None:
        super().__init__(block, config, number, like)
        self.heads, self.chunked = heads_of(block.attn, config, self.windowed), config.chunked_window
        self.reuses, self.lender = config.reuses(number), config.lender(number)
        self.own_heads = replace(self.heads, key=0) if self.reuses else self.heads
        self.shaping = Shaping(block.attn, config, self.own_heads, self.scaled, like)
        self.qkv, self.projection = (Product(each, like.dtype, adapters) for each in attention_layers(block.attn))
        self.mlp = make_mlp(block, config, like, adapters)
        self.own = None if block.per_layer is None else OwnInput(block.per_layer, like, adapters)
        self.products = [self.qkv, self.projection, *self.mlp.products, *(self.own.products if self.own else ())]

    def __call__(
        self, x: Tensor, y: Tensor | None, cache: SlotCache, ropes: Ropes, scale: Tensor | None, own: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """(B, E) pair whose sum is the stream -> the same behind this block; `own` is (B, per_layer_size)."""
        keys, values = (memory[: cache.rows] for memory in cache.blocks[self.lender])
        lengths, heads = cache.lengths[: cache.rows], self.heads
        normed = torch.empty_like(x)
        x, _ = add_norm(x, y, self.norm_1, normed)
        rope = ropes[self.windowed] if self.rotates else None
        qkv, rope = self._shaped(self.qkv(normed), rope, scale if self.scaled else None)
        if self.reuses:
            queries = qkv.unflatten(1, (heads.query, heads.size))
        else:
            queries = kernels.store(qkv, lengths, rope, keys, values, heads.query, self.interleaved)
        attended = kernels.attend(
            queries, keys, values, lengths, cache.limit, heads.scale, heads.window, heads.cap, heads.sinks, self.chunked
        )
        out = apply_norm(self.post_1, self.projection(attended))
        x, _ = add_norm(x, None if self.parallel else out, self.norm_2, normed)
        y = apply_norm(self.post_2, self.mlp(normed, x))
        if self.parallel:
            y.add_(out)
        if self.own is not None and own is not None:
            x, y = self.own(y.add_(x), own)
        return (x, y) if self.scale is None else (y.add_(x).mul_(self.scale), None)

    def _shaped(self, qkv: Tensor, rope: Rope | None, scale: Tensor | None) -> tuple[Tensor, Rope | None]:
        """The block's own queries, keys and values, (B, (H + 2 K) D), and the rotation that is left to do."""
        shaping, heads = self.shaping, self.own_heads
        if shaping.does_nothing or not shaping.has_kernel:
            return (shaping.before(qkv, scale) if shaping.before else qkv), rope
        rotation = None
        if rope is not None and (shaping.after or self.reuses):
            rows = torch.arange(len(qkv), dtype=torch.int32, device=qkv.device)
            rotation, rope = Rotation(rows, *rope, self.interleaved), None
        factors = None if scale is None else scale.flatten()
        parts = norm_rotate(qkv, shaping.head_norm, rotation, factors, (heads.query, heads.key, heads.size))
        return torch.cat(parts, dim=1).flatten(1), rope


class OwnInput:
    """The addition of a block's embedding of a token to the stream; see lit_qlora.model.per_layer."""

    def __init__(self, part: Any, like: Tensor, adapters: RowAdapters | None) -> None:
        self.combine, self.norm = part.combine, norm_of(part.norm, like)
        self.products = [Product([layer], like.dtype, adapters) for layer in (part.gate, part.widen)]

    def __call__(self, x: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """The stream (B, E) -> itself, and what is to be added to it."""
        gate, widen = self.products
        return x, apply_norm(self.norm, widen(self.combine(gate(x), own)))


class FastStep:
    """The next logits of each row of a cache, for the newest token of each.

    Args:
        model: why_not(model) is ''. Its adapters are taken as they are when this is made.
        spare: bytes that quantised weights may take in 16 bits, where that is faster; None for a part of what is free.
        adapters: see Product.
    """

    def __init__(
        self, model: GPT, cache: SlotCache, spare: int | None = None, adapters: RowAdapters | None = None
    ) -> None:
        config, weight = model.config, model.embed.weight.detach()
        self.model, self.config, self.cache, self.embed = model, config, cache, weight
        self.blocks = [FastBlock(block, config, i, weight[0], adapters) for i, block in enumerate(model.blocks)]
        self.embed_norm = norm_of(model.embed_norm, weight[0])
        self.norm = norm_of(model.norm, weight[0], config.logit_multiplier)
        self.head = Product([model.head], weight.dtype, adapters)
        self.narrow = None if model.per_layer is None else Product([model.per_layer.narrow], weight.dtype, adapters)
        make_room((block.mlp for block in self.blocks), cache.rows)
        products = (product for block in self.blocks for product in block.products)
        outside = (self.head,) if self.narrow is None else (self.narrow, self.head)
        cache_weights((*products, *outside), cache.rows, spare_bytes(weight.device) if spare is None else spare)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(B,) int64 -> (B, V), in the dtype of the weights; the cache is extended."""
        config, cache = self.config, self.cache
        positions = cache.lengths[: cache.rows, None]
        x = apply_norm(self.embed_norm, times(F.embedding(tokens, self.embed), config.embedding_multiplier))
        if self.model.positions is not None:
            x = x + F.embedding(positions[:, 0], self.model.positions.weight)
        ropes = {
            windowed: _rope(config, positions, windowed)
            for windowed in {block.windowed for block in self.blocks if block.rotates}
        }
        scale = query_scale(config, positions, rotates=False)
        scale = None if scale is None else scale[:, 0]  # (B, 1, 1)
        own: Sequence[Tensor | None] = [None] * len(self.blocks)
        if self.model.per_layer is not None and self.narrow is not None:
            own = self.model.per_layer.joined(tokens, self.narrow(x)).unbind(1)
        y: Tensor | None = None
        for block, part in zip(self.blocks, own, strict=True):
            x, y = block(x, y, cache, ropes, scale, part)
        cache.advance(1)
        normed = torch.empty_like(x)
        add_norm(x, y, self.norm, normed)
        return softcap(self.head(normed), config.logit_softcap)


def why_not(model: GPT, by_row: bool = False) -> str:
    """Why FastStep cannot take this model, or ''.

    Args:
        by_row: each row may use another adapter, see Product.
    """
    weight = model.embed.weight
    if model.gathers is not None:
        return "its weights lie over several processes"
    if not (weight.is_cuda or INTERPRETED):
        return "Triton needs a GPU"
    if reason := why_no_kernels(weight.device, weight.dtype):
        return reason
    if weight.dtype not in small_batch_linear.DTYPES:
        return f"weights are {str(weight.dtype).removeprefix('torch.')}"
    if reason := unhandled(model.config, decodes=True) or unhandled_embeddings(model):
        return reason
    if norms_follow_rotation(model.config) and not norms_heads(model.config):
        return "norms behind the rotation"
    mixtures = list(filter(None, map(mixture_of, model.blocks)))
    gates: list[list[nn.Module]] = [[moe.shared_gate] for moe in mixtures if moe.shared_gate is not None]
    reasons = (
        *(_undecodable(layers, weight.dtype, by_row) for layers in (*stacks_of(model), *gates)),
        *(why_not_chosen(moe, weight.dtype, by_row) for moe in mixtures),
    )
    return next(filter(None, reasons), "")


def _undecodable(layers: Sequence[nn.Module], dtype: torch.dtype, by_row: bool) -> str:
    """Why layers that read the same input cannot be a Product, or ''."""
    if reason := why_not_stacked(layers, dtype):
        return reason
    if by_row:
        switched = [layer for layer in layers if isinstance(layer, SwitchedLinear)]
        learns = len(switched) < sum(isinstance(layer, LoRALinear | SwitchedLinear) for layer in layers)
        return "adapters that learn" if learns else "DoRA" if any(layer.scales_rows for layer in switched) else ""
    if reason := next(filter(None, (getattr(layer, "beyond_low_rank", "") for layer in layers)), ""):
        return reason
    ranks = {len(update[0]) for update in updates_of(layers) if update is not None}
    return "adapters of different ranks" if len(ranks) > 1 else ""


def _rope(config: ModelConfig, positions: Tensor, windowed: bool) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(config, positions, windowed)
    return cos[:, 0, 0].contiguous(), sin[:, 0, 0].contiguous()
