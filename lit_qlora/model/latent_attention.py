"""Attention whose keys and values come from one small vector a token. DeepSeek-AI 2024, "DeepSeek-V2", sec. 2.1."""

import torch
from torch import Tensor, nn

from lit_qlora.model.attention import Place
from lit_qlora.model.cache import LayerCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.rope import rotate

EPS = 1e-6  # of the norms inside, whatever the norms of the blocks have


class LatentAttention(nn.Module):
    """Causal self-attention over a latent of kv_latent_size features, from which every head makes its key and value.

    A head's key is its own part of head_size - latent_rope_size features, and a rotated part that all heads share.
    The cache holds the keys and values, not the latents: the same function, simpler, and larger.

    Attributes:
        dropout: see GPT.set_dropout.
    """

    dropout = 0.0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, own = config.n_head, config.head_size - config.latent_rope_size
        self.query = (
            Narrowed(config.n_embd, config.q_latent_size, heads * config.head_size, bias=config.qkv_bias)
            if config.q_latent_size
            else nn.Linear(config.n_embd, heads * config.head_size, bias=False)
        )
        self.latent = nn.Linear(config.n_embd, config.kv_latent_size + config.latent_rope_size, bias=config.qkv_bias)
        self.latent_norm = nn.RMSNorm(config.kv_latent_size, eps=EPS)
        self.key = nn.Linear(config.kv_latent_size, heads * own, bias=False)
        self.value = nn.Linear(config.kv_latent_size, heads * config.value_size, bias=False)
        self.projection = nn.Linear(heads * config.value_size, config.n_embd, bias=config.projection_bias)

    def forward(self, x: Tensor, place: Place, cache: LayerCache | None) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        config = self.config
        B, T, _ = x.shape
        latent, shared = self.latent(x).split((config.kv_latent_size, config.latent_rope_size), dim=-1)
        latent = self.latent_norm(latent)
        q, k, v = (
            t.view(B, T, config.n_head, -1).transpose(1, 2)
            for t in (self.query(x), self.key(latent), self.value(latent))
        )
        q, q_turned = q.split((k.size(-1), config.latent_rope_size), dim=-1)
        k_turned = shared[:, None]  # (B, 1, T, latent_rope_size)
        if place.rope:
            q_turned, k_turned = (rotate(t, *place.rope, config.rope_interleaved) for t in (q_turned, k_turned))
        q = torch.cat((q, q_turned), dim=-1)
        k = torch.cat((k, k_turned.expand(*k.shape[:3], -1)), dim=-1)
        if place.query_scale is not None:
            q = q * place.query_scale.to(q.dtype)
        if cache:
            k, v = cache.extend(k, v)
        dropout = self.dropout if self.training else 0.0
        y = place.attend(q, k, v, place.mask, config.attention_scale, dropout=dropout)
        out: Tensor = self.projection(y.transpose(1, 2).reshape(B, T, -1))
        return out


class Narrowed(nn.Module):
    """up(norm(down(x))): a wide linear layer through a few features."""

    def __init__(self, size_in: int, size: int, size_out: int, bias: bool) -> None:
        super().__init__()
        self.down = nn.Linear(size_in, size, bias=bias)
        self.norm = nn.RMSNorm(size, eps=EPS)
        self.up = nn.Linear(size, size_out, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., size_in) -> (..., size_out)."""
        out: Tensor = self.up(self.norm(self.down(x)))
        return out
