"""A decoding step of few launches, for a handful of texts on a GPU: what GPT.hidden and GPT.logits give, and no more.

Layers that read the same input are one product with the weights as they are stored (kernels.skinny), adapters
included; norms are added to the stream as they are computed, and a token goes through attention in three launches
(kernels.cache). A block is ten launches instead of seventy, all of fixed shapes, so that a CUDA graph can hold them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.fused.attention import Heads
from lit_qlora.fused.group import norm_of
from lit_qlora.fused.mlp import ACTIVATIONS
from lit_qlora.fused.qkv_transforms import Shaping
from lit_qlora.fused.support import unhandled
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.kernels import decode_attention as kernels
from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.launch import AVAILABLE, INTERPRETED
from lit_qlora.kernels.mlp import mlp_forward
from lit_qlora.kernels.norm import add_norm, apply_norm
from lit_qlora.kernels.stack import EightBit, FourBit, Stack, end_to_end
from lit_qlora.model.attention import query_scale, softcap
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, times
from lit_qlora.model.rope import rope_table
from lit_qlora.quantize import QuantizedLinear, stack_weights

Ropes = dict[bool, tuple[Tensor, Tensor]]
"""Cosines and sines of the next token of each text, (B, R / 2), by whether a block has a sliding window."""


class Product:
    """Linear layers that read the same input, with what their adapters add.

    Raises:
        NotImplementedError: if they cannot be stacked.
    """

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        bases: list[Any] = [getattr(layer, "base", layer) for layer in layers]
        low_ranks = [layer.low_rank() if layer is not base else None for layer, base in zip(layers, bases, strict=True)]  # type: ignore[operator]
        found = [low_rank for low_rank in low_ranks if low_rank is not None]
        ranks = {len(a) for a, _, _ in found}
        if len(ranks) > 1:
            raise NotImplementedError("adapters of different ranks")
        numbers = iter(range(len(found)))
        slots = tuple(-1 if low_rank is None else next(numbers) for low_rank in low_ranks)
        self.stack = Stack(tuple(base.out_features for base in bases), slots, max(ranks, default=0))
        self.weight = _stacked(bases, dtype)
        biases = [base.bias for base in bases]
        self.bias = None if biases[0] is None else end_to_end([bias.detach().to(dtype) for bias in biases])
        self.a = torch.cat([(scale * a).to(dtype) for a, _, scale in found]) if found else None
        self.b = torch.cat([b.to(dtype) for _, b, _ in found]) if found else None
        self.stack_of_a = Stack((self.stack.rank,), (-1,), 0)
        self.table = self.stack.table(_device(bases[0])) if found or len(bases) > 1 else None

    def __call__(self, x: Tensor) -> Tensor:
        """(B, K) -> (B, N)."""
        z = None if self.a is None else small_batch_linear.product(x, self.a, self.stack_of_a, None)
        return small_batch_linear.product(x, self.weight, self.stack, self.table, self.bias, z, self.b)


class FastBlock:
    """A block of the model."""

    def __init__(self, block: Any, config: ModelConfig, number: int, like: Tensor) -> None:
        attn, mlp = block.attn, block.mlp
        self.activation = ACTIVATIONS[config.ffn]
        self.qkv = Product([attn.query, attn.key, attn.value], like.dtype)
        self.projection = Product([attn.projection], like.dtype)
        self.gate_up = Product([mlp.gate, mlp.up] if self.activation.gated else [mlp.up], like.dtype)
        self.down = Product([mlp.down], like.dtype)
        self.parallel, share = config.parallel_residual, config.residual_multiplier
        self.norm_1 = norm_of(block.norm_1, like)
        self.norm_2 = self.norm_1 if config.shared_norm else norm_of(block.norm_2, like)
        self.post_1, self.post_2 = (norm_of(norm, like, share) for norm in (block.post_norm_1, block.post_norm_2))
        self.windowed, self.rotates = config.windowed(number), config.rotates(number)
        window = config.sliding_window if self.windowed else None
        self.heads = Heads(config.n_head, config.n_kv_head, config.head_size, config.attention_scale, window)
        self.shaping = Shaping(attn, config, self.heads)
        if self.shaping.after:
            raise NotImplementedError("norms behind the rotation")
        self.number, self.interleaved = number, config.rope_interleaved

    def __call__(
        self, x: Tensor, y: Tensor | None, cache: SlotCache, ropes: Ropes, scale: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """(B, E) pair whose sum is the stream -> the same behind this block."""
        keys, values = cache.keys[self.number, : cache.rows], cache.values[self.number, : cache.rows]
        lengths, heads = cache.lengths[: cache.rows], self.heads
        normed = torch.empty_like(x)
        x, _ = add_norm(x, y, self.norm_1, normed)
        qkv = self.qkv(normed)
        if self.shaping.before:
            qkv = self.shaping.before(qkv, scale)
        rope = ropes[self.windowed] if self.rotates else None
        queries = kernels.store(qkv, lengths, rope, keys, values, heads.query, self.interleaved)
        attended = kernels.attend(queries, keys, values, lengths, cache.limit, heads.scale, heads.window)
        out = apply_norm(self.post_1, self.projection(attended))
        x, _ = add_norm(x, None if self.parallel else out, self.norm_2, normed)
        branches = self.gate_up(normed)
        h = branches.new_empty(len(x), branches.size(1) // self.activation.branches)
        mlp_forward(branches, h, self.activation)
        y = apply_norm(self.post_2, self.down(h))
        return x, y.add_(out) if self.parallel else y


class FastStep:
    """The next logits of each row of a cache, for the newest token of each.

    Adapters are taken as they are when this is made.

    Raises:
        NotImplementedError: for a model, a storage or an adapter that this does not compute with.
    """

    def __init__(self, model: GPT, cache: SlotCache) -> None:
        config, weight = model.config, model.embed.weight.detach()
        if not AVAILABLE or not (weight.is_cuda or INTERPRETED) or weight.dtype not in small_batch_linear.DTYPES:
            raise NotImplementedError("no Triton, no GPU, or another dtype")
        if cache.rows > small_batch_linear.MOST_ROWS:
            raise NotImplementedError("many rows")
        if unhandled(config) or type(model.embed) is not nn.Embedding or model.embed._forward_hooks:
            raise NotImplementedError("a model of another kind")
        self.model, self.config, self.cache, self.embed = model, config, cache, weight
        self.blocks = [FastBlock(block, config, i, weight[0]) for i, block in enumerate(model.blocks)]
        self.norm = norm_of(model.norm, weight[0], config.logit_multiplier)
        self.head = Product([model.head], weight.dtype)

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """(B,) int64 -> (B, V), in the dtype of the weights; the cache is extended."""
        config, cache = self.config, self.cache
        places = cache.lengths[: cache.rows, None]
        x = times(F.embedding(tokens, self.embed), config.embedding_multiplier)
        if self.model.positions is not None:
            x = x + F.embedding(places[:, 0], self.model.positions.weight)
        ropes = {
            windowed: _rope(config, places, windowed)
            for windowed in {block.windowed for block in self.blocks if block.rotates}
        }
        scale = query_scale(config, places)[:, 0] if config.query_scale_beta else None  # (B, 1, 1)
        y: Tensor | None = None
        for block in self.blocks:
            x, y = block(x, y, cache, ropes, scale)
        cache.advance(1)
        normed = torch.empty_like(x)
        add_norm(x, y, self.norm, normed)
        return softcap(self.head(normed), config.logit_softcap)


def _stacked(bases: Sequence[Any], dtype: torch.dtype) -> FourBit | EightBit | Tensor:
    """The weights end to end; the layers keep views of them, so that nothing is held twice."""
    kinds = {type(base) for base in bases}
    if kinds == {QuantizedLinear}:
        weight = stack_weights(bases)
        if weight is None or (isinstance(weight, FourBit) and bases[0].in_features % 64):
            raise NotImplementedError("quantised layers that do not stack")
        return weight
    if kinds != {nn.Linear} or any(base.weight.dtype != dtype for base in bases):
        raise NotImplementedError("layers of different kinds")
    whole = end_to_end([base.weight.detach() for base in bases])
    if len(bases) > 1:
        for base, part in zip(bases, whole.split([base.out_features for base in bases]), strict=True):
            base.weight.data = part
    return whole


def _rope(config: ModelConfig, places: Tensor, windowed: bool) -> tuple[Tensor, Tensor]:
    cos, sin = rope_table(config, places, windowed)
    return cos[:, 0, 0].contiguous(), sin[:, 0, 0].contiguous()


def _device(layer: nn.Module) -> torch.device:
    return next(tensor.device for tensor in (*layer.parameters(), *layer.buffers()))
