"""The whole model, in the order a token meets it. This file is the meaning; faster paths must agree with it."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_qlora.config import ModelConfig

IGNORE = -100
"""Label of a position that carries no loss; torch's own default."""


class GPT(nn.Module):
    """Tokens in, next-token logits out. See ModelConfig for the shape letters."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # recompute each block in the backward pass instead of keeping its activations
        self.embed = nn.Embedding(config.vocab_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied_head:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """Logits of the token that follows each token.

        Args:
            tokens: (B, T) int64.
            cache: what came before `tokens`; it is extended by them.

        Returns:
            (B, T, V) in the dtype of the weights.
        """
        logits: Tensor = self.head(self.hidden(tokens, cache))
        return logits

    def loss(self, tokens: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy summed over the labelled tokens.

        Args:
            tokens: (B, T) int64.
            labels: (B, T) int64, the token that should follow each token, IGNORE where no loss is wanted.

        Returns:
            float32 scalar; zero if every label is IGNORE.
        """
        return linear_cross_entropy(self.hidden(tokens), self.head, labels)

    def hidden(self, tokens: Tensor, cache: "KVCache | None" = None) -> Tensor:
        """(B, T) int64 -> (B, T, E), what the head reads."""
        B, T = tokens.shape
        past = cache.size if cache else 0
        positions = torch.arange(past, past + T, device=tokens.device).expand(B, T)
        if cache and cache.left_pad is not None:
            positions = (positions - cache.left_pad[:, None]).clamp(min=0)
        rope = rope_table(self.config, positions)
        mask = attention_mask(self.config, T, cache, tokens.device)
        x = self.embed(tokens)
        for i, block in enumerate(self.blocks):
            layer = cache.layer(i, T) if cache else None
            if self.recompute and self.training:
                x = checkpoint(block, x, rope, mask, layer, use_reentrant=False)
            else:
                x = block(x, rope, mask, layer)
        if cache:
            cache.size += T
        normed: Tensor = self.norm(x)
        return normed


class Block(nn.Module):
    """Attention and MLP, each with a norm before it and a residual connection around it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.parallel = config.parallel_residual
        self.norm_1 = make_norm(config)
        self.attn = Attention(config)
        self.norm_2 = make_norm(config)
        self.mlp = SwiGLU(config) if config.ffn == "swiglu" else GELU(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        if self.parallel:
            return x + self.attn(self.norm_1(x), rope, mask, cache) + self.mlp(self.norm_2(x))
        x = x + self.attn(self.norm_1(x), rope, mask, cache)
        return x + self.mlp(self.norm_2(x))


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Vaswani et al. 2017; Ainslie et al. 2023."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_size = config.head_size
        q_size, kv_size = config.n_head * config.head_size, config.n_kv_head * config.head_size
        self.query = nn.Linear(config.n_embd, q_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.value = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias)
        self.projection = nn.Linear(q_size, config.n_embd, bias=config.projection_bias)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor | None, cache: "LayerCache | None"
    ) -> Tensor:
        """(B, T, E) -> (B, T, E). `mask`: None for plain causal, else (B or 1, 1, T, past + T), True where allowed."""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, H, T, D)
        k = self.key(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, K, T, D)
        v = self.value(x).view(B, T, -1, self.head_size).transpose(1, 2)  # (B, K, T, D)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache:
            k, v = cache.extend(k, v)
        grouped = q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        out: Tensor = self.projection(y.transpose(1, 2).reshape(B, T, -1))
        return out


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)). Shazeer 2020."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, config.ffn_size, bias=config.mlp_bias)
        self.up = nn.Linear(config.n_embd, config.ffn_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class GELU(nn.Module):
    """down(gelu(up(x))), with the exact GELU or its tanh approximation."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.approximate = "tanh" if config.ffn == "gelu_tanh" else "none"
        self.up = nn.Linear(config.n_embd, config.ffn_size, bias=config.mlp_bias)
        self.down = nn.Linear(config.ffn_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., E) -> (..., E)."""
        out: Tensor = self.down(F.gelu(self.up(x), approximate=self.approximate))
        return out


class KVCache:
    """Keys and values of the tokens seen so far, so that generating one more token costs one token.

    Args:
        length: most tokens that will be seen, prompt included.
        left_pad: (B,) number of padding tokens before each prompt, for prompts of unequal length.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        left_pad: Tensor | None = None,
    ) -> None:
        shape = (config.n_layer, batch, config.n_kv_head, length, config.head_size)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.left_pad = left_pad
        self.size = 0

    def layer(self, i: int, new: int) -> "LayerCache":
        """The part of block `i`, with room for `new` more tokens."""
        if self.size + new > self.keys.size(3):
            raise ValueError(f"The cache holds {self.keys.size(3)} tokens; {self.size} + {new} do not fit.")
        return LayerCache(self.keys[i], self.values[i], self.size)


class LayerCache:
    """One block's view of a KVCache."""

    def __init__(self, keys: Tensor, values: Tensor, size: int) -> None:
        self.keys, self.values, self.size = keys, values, size

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store the new (B, K, T, D) and return all, each (B, K, size + T, D)."""
        end = self.size + k.size(2)
        self.keys[:, :, self.size : end] = k
        self.values[:, :, self.size : end] = v
        return self.keys[:, :, :end], self.values[:, :, :end]


def make_norm(config: ModelConfig) -> nn.Module:
    """The norm that this model uses everywhere."""
    norm = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return norm(config.n_embd, eps=config.norm_eps)


def attention_mask(config: ModelConfig, new: int, cache: KVCache | None, device: torch.device) -> Tensor | None:
    """Who may look at whom: (B or 1, 1, T, past + T), True where allowed; None stands for plain causal."""
    past = cache.size if cache else 0
    left_pad = cache.left_pad if cache else None
    windowed = config.sliding_window is not None and past + new > config.sliding_window
    if past == 0 and left_pad is None and not windowed:
        return None
    row = torch.arange(past, past + new, device=device)[:, None]
    column = torch.arange(past + new, device=device)[None, :]
    mask = column <= row
    if windowed:
        mask &= column > row - config.sliding_window  # type: ignore[operator]
    mask = mask[None, None]
    if left_pad is not None:
        # A padding token may look at itself, so that its softmax is over something; nobody else looks at it.
        mask = mask & ((column >= left_pad[:, None, None, None]) | (column == row))
    return mask


def rope_table(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """The cosines and sines, each (B, 1, T, R/2) float32; R is the rotated part of head_size. Su et al. 2021, eq. 34.

    Computed in every forward pass: it costs nothing next to one layer, and a table that is
    not stored cannot be stale, on the wrong device, or left uninitialized on the meta device.
    """
    exponent = torch.arange(0, config.rotated, 2, device=positions.device).float() / config.rotated
    frequency = scale_frequency(config, 1.0 / config.rope_theta**exponent)
    angle = positions[:, None, :, None].float() * frequency
    return angle.cos(), angle.sin()


def scale_frequency(config: ModelConfig, frequency: Tensor) -> Tensor:
    """Stretch the rotations of a model whose context was extended after pre-training.

    linear: Chen et al. 2023, every wavelength by the factor. llama3: Llama 3.1's rule; wavelengths longer than the
    original context / low_freq_factor by the factor, shorter than context / high_freq_factor not at all, and a
    linear passage in between.
    """
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / config.rope_factor
    turns = config.rope_original_block_size * frequency / (2 * math.pi)  # full turns within the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return kept * frequency + (1 - kept) * frequency / config.rope_factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first R of D features of x (..., T, D), pairing feature i with i + R/2 (Hugging Face order)."""
    half = cos.size(-1)
    a, b, rest = x[..., :half].float(), x[..., half : 2 * half].float(), x[..., 2 * half :]
    return torch.cat(((a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype), rest), dim=-1)


LOGITS_AT_ONCE = 2**26
"""Logits that exist at a time while computing a loss: 0.25 GiB in float32."""


def linear_cross_entropy(hidden: Tensor, head: nn.Module, labels: Tensor, at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """Cross-entropy of head(hidden) against labels, summed, without ever holding all the logits.

    Where B * T * V exceeds `at_once`, the logits of a slice of tokens exist at a time and are
    computed again in the backward pass.

    Args:
        hidden: (B, T, E), any float dtype; the softmax is float32.
        head: any module (..., E) -> (..., V).
        labels: (B, T) int64, IGNORE where no loss is wanted.

    Returns:
        float32 scalar; zero if every label is IGNORE.
    """
    hidden, labels = hidden.flatten(0, 1), labels.flatten()
    vocab_size: int = head.out_features  # type: ignore[assignment]
    rows = max(1, at_once // vocab_size)

    def slice_loss(hidden: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), labels, ignore_index=IGNORE, reduction="sum")

    if len(labels) <= rows:
        return slice_loss(hidden, labels)
    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), rows):
        part: Any = checkpoint(
            slice_loss, hidden[start : start + rows], labels[start : start + rows], use_reentrant=False
        )
        total = total + part
    return total
