"""Attention: each token takes values from the tokens before it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.model.cache import KVCache, LayerCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.norm import make_norm
from lit_qlora.model.rope import rope_table, rotate

Lookup = Callable[..., Tensor]
"""As the function `attend`."""


class Place(NamedTuple):
    """RoPE, query scale and mask: the positions of the tokens as the attention of a block needs them."""

    rope: tuple[Tensor, Tensor] | None
    """See rope_table; None where nothing is rotated."""
    query_scale: Tensor | None
    """(B, 1, T, 1), the factor of the queries."""
    mask: Tensor | None
    """See attention_mask."""
    documents: Tensor | None
    """(B, T), the document of each token for a block with a state, padding -1; None where all are of one."""
    kept: list[tuple[Tensor, Tensor]]
    """Keys and values of the last block of this kind that has its own, for those that have none."""
    attend: Lookup
    """The function `attend`, or what does the same faster, or over several processes."""


class Attention(nn.Module):
    """Causal self-attention with grouped queries. Vaswani et al. 2017; Ainslie et al. 2023.

    Attributes:
        dropout: see GPT.set_dropout.
    """

    dropout = 0.0

    def __init__(self, config: ModelConfig, block: int = 0) -> None:
        super().__init__()
        self.config = config
        windowed, own = config.windowed(block), not config.reuses(block)
        self.size = config.head_size_of(windowed)
        q_size, kv_size = config.n_head * self.size, config.kv_heads_of(windowed) * self.size
        apart = own and not (config.key_is_value and not windowed)
        self.query = nn.Linear(config.n_embd, q_size, bias=config.qkv_bias)
        self.key = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias) if own else None
        self.value = nn.Linear(config.n_embd, kv_size, bias=config.qkv_bias) if apart else None
        self.query_gate = nn.Linear(config.n_embd, q_size, bias=config.qkv_bias) if config.attention_gate else None
        normed = config.qk_norm != "rotated" or config.rotates(block)
        self.query_norm = make_qk_norm(config, config.n_head, self.size) if normed else nn.Identity()
        key_norm = make_qk_norm(config, config.kv_heads_of(windowed), self.size) if normed else nn.Identity()
        self.key_norm: Any = key_norm if own else None
        self.sinks = nn.Parameter(torch.zeros(config.n_head)) if config.attention_sinks else None
        self.projection = nn.Linear(q_size, config.n_embd, bias=config.projection_bias)

    def forward(self, x: Tensor, place: Place, cache: LayerCache | None) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        config = self.config
        q = self._turned(self._clipped(self.query(x)), self.query_norm, place)
        if place.query_scale is not None:
            q = q * place.query_scale.to(q.dtype)
        k, v = place.kept[0] if self.key is None else self._keys_and_values(x, place, cache)
        dropout = self.dropout if self.training else 0.0
        y = place.attend(q, k, v, place.mask, config.attention_scale, config.attention_softcap, self.sinks, dropout)
        y = y.transpose(1, 2).flatten(2)
        if self.query_gate is not None:
            y = y * torch.sigmoid(self.query_gate(x))
        out: Tensor = self.projection(y)
        return out

    def _keys_and_values(self, x: Tensor, place: Place, cache: LayerCache | None) -> tuple[Tensor, Tensor]:
        """(B, T, E) -> (B, K, past + T, D) each."""
        assert self.key is not None
        projected = self._clipped(self.key(x))
        k = self._turned(projected, self.key_norm, place)
        v = self._heads(projected if self.value is None else self._clipped(self.value(x)))
        if self.config.value_norm:
            v = F.rms_norm(v, v.shape[-1:], eps=self.config.norm_eps)
        if cache:
            k, v = cache.extend(k, v)
        if self.config.shared_kv_layers:
            place.kept[:] = [(k, v)]
        return k, v

    def _clipped(self, projected: Tensor) -> Tensor:
        limit = self.config.clip_qkv
        return projected if limit is None else projected.clamp(-limit, limit)

    def _turned(self, projected: Tensor, norm: Callable[[Tensor], Tensor], place: Place) -> Tensor:
        """Queries or keys (B, T, heads * D) -> (B, heads, T, D), normed and rotated."""
        config = self.config
        by_head = config.qk_norm != "full"
        t = self._heads(projected if by_head else norm(projected))
        if by_head and not config.qk_norm_after_rope:
            t = norm(t)
        if place.rope:
            t = rotate(t, *place.rope, config.rope_interleaved)
        return norm(t) if by_head and config.qk_norm_after_rope else t

    def _heads(self, features: Tensor) -> Tensor:
        """(B, T, heads * D) -> (B, heads, T, D)."""
        return features.unflatten(-1, (-1, self.size)).transpose(1, 2)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The values that each query looks up.

    Args:
        q: (B, H, T, D).
        k, v: (B, K, past + T, D), where each serves H / K queries.
        mask: None for plain causal, else (B or 1, 1, T, past + T), True where allowed.
        scale: None for 1 / sqrt(D).
        cap: scores x become cap * tanh(x / cap).
        sinks: (H,), one more score in each head's softmax, with nothing to look up.
        dropout: probability of zeroing a weight of the lookup.

    Returns:
        (B, H, T, D).
    """
    grouped, by_torch = q.size(1) != k.size(1), cap is None and sinks is None
    if grouped and by_torch and q.size(2) == 1:
        # While decoding, the queries that share a key can stand as if they were tokens, and nothing is copied.
        y = F.scaled_dot_product_attention(
            q.reshape(len(q), k.size(1), -1, q.size(3)), k, v, attn_mask=mask, scale=scale
        )
        return y.reshape(q.shape)
    # With a mask and grouped queries torch 2.13 has only a path on GPUs that makes these copies and keeps all scores.
    if grouped and not (by_torch and (mask is None or not q.is_cuda)):
        k, v = (t.repeat_interleave(q.size(1) // k.size(1), dim=1) for t in (k, v))
        grouped = False
    if by_torch:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=grouped, dropout_p=dropout
        )
    if mask is None:
        mask = torch.ones(q.size(2), k.size(2), dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.mT).float() * (q.size(-1) ** -0.5 if scale is None else scale)  # (B, H, T, past + T)
    scores = softcap(scores, cap).masked_fill(~mask, -torch.inf)
    if sinks is not None:
        sink = sinks.float()[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat((scores, sink), dim=-1)
    return drop(scores.softmax(dim=-1)[..., : k.size(2)].to(v.dtype), dropout) @ v


class Places:
    """The Place of each block; blocks of one kind share theirs."""

    def __init__(
        self,
        config: ModelConfig,
        positions: Tensor,
        cache: KVCache | None,
        segments: Tensor | None,
        seen_until: Tensor | None = None,
    ) -> None:
        self.kinds = [(config.windowed(i), config.rotates(i)) for i in range(config.n_layer)]
        new, device = positions.size(1), positions.device
        documents = documents_of(new, cache, segments) if config.state_layers else None
        width = cache.width(new) if cache else new

        def mask(window: int | Tensor | None) -> Tensor | None:
            if seen_until is not None:
                return tree_mask(window, positions, seen_until)
            return attention_mask(window, new, cache, device, segments)

        self.places = {
            (windowed, rotates): Place(
                rope_table(config, positions, windowed, segments) if rotates else None,
                query_scale(config, positions, rotates),
                mask(window_of(config, positions, width) if windowed else None),
                documents,
                [],
                attend,
            )
            for windowed, rotates in set(self.kinds)
        }

    def change(self, change: Callable[[Place], Place]) -> None:
        """Replace each Place."""
        self.places = {kind: change(place) for kind, place in self.places.items()}

    def of(self, block: int) -> Place:
        """The positions as block number `block` needs them."""
        return self.places[self.kinds[block]]


def query_scale(config: ModelConfig, positions: Tensor, rotates: bool = True) -> Tensor | None:
    """(B, T) int64 -> (B, 1, T, 1) float32: how much louder queries become in long texts; None where they do not."""
    if config.query_scale_beta:
        beta, stretches = config.query_scale_beta, positions // config.rope_original_block_size
    elif config.unrotated_scale_beta and not rotates:
        beta, stretches = config.unrotated_scale_beta, (positions + 1) // config.unrotated_scale_size
    else:
        return None
    return (1 + beta * torch.log1p(stretches.float()))[:, None, :, None]


def window_of(config: ModelConfig, positions: Tensor, width: int) -> int | Tensor | None:
    """The window of attention_mask: where it begins anew with each chunk, one for each of `positions` (B, T).

    Args:
        width: columns that are looked at; if they are one chunk, its length is the window.
    """
    size = config.sliding_window
    return positions % size + 1 if size is not None and config.chunked_window and width > size else size


def attention_mask(
    window: int | Tensor | None, new: int, cache: KVCache | None, device: torch.device, segments: Tensor | None = None
) -> Tensor | None:
    """The mask of attention, (B or 1, 1, T, past + T): True where a token may see another; None is plain causal.

    Args:
        window: how many tokens a token sees, itself included; (B, T) where each has its own; None for all before it.
        new: T, the tokens that ask; `cache` holds the past ones.
        segments: see GPT.hidden.
    """
    width = cache.width(new) if cache else new
    left_pad = cache.left_pad if cache else None
    if isinstance(window, int) and width <= window:
        window = None
    if width == new and left_pad is None and window is None and segments is None:
        return None
    own = (cache.columns(new) if cache else torch.arange(new, device=device)[None])[:, None, :, None]
    column = torch.arange(width, device=device)
    mask = column <= own
    if window is not None:
        mask = mask & (column > own - _by_query(window))
    if left_pad is not None:
        # A padding token may look at itself, so that its softmax is over something; nobody else looks at it.
        mask = mask & ((column >= left_pad[:, None, None, None]) | (column == own))
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def documents_of(new: int, cache: KVCache | None, segments: Tensor | None) -> Tensor | None:
    """See Place.documents. What is in a cache is of document 0.

    Args:
        new: T, the tokens that ask.
        segments: see GPT.hidden.
    """
    if cache is None or cache.left_pad is None:
        return segments
    return -(cache.columns(new) < cache.left_pad[:, None]).long()


def _by_query(window: int | Tensor) -> int | Tensor:
    """A window beside masks (B, 1, T, columns)."""
    return window[:, None, :, None] if isinstance(window, Tensor) else window


def tree_mask(window: int | Tensor | None, positions: Tensor, seen_until: Tensor) -> Tensor:
    """As attention_mask, (B, 1, T, T), for documents that share their beginnings; see GPT.hidden.

    Args:
        positions, seen_until: (B, T).
    """
    column = torch.arange(positions.size(1), device=positions.device)
    mask = (column <= column[:, None]) & (column[:, None] < seen_until[:, None, None])
    if window is not None:
        mask &= positions[:, None, None] > positions[:, None, :, None] - _by_query(window)
    return mask


class NormOfEachHead(nn.ModuleList):
    """A layer norm without bias for each head, with a weight of its own."""

    def __init__(self, heads: int, size: int, eps: float) -> None:
        super().__init__(nn.LayerNorm(size, eps, bias=False) for _ in range(heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, heads, T, D) -> (B, heads, T, D)."""
        return torch.stack([norm(head) for norm, head in zip(self, x.unbind(1), strict=True)], dim=1)


def make_qk_norm(config: ModelConfig, heads: int, size: int) -> nn.Module:
    """Make the norm of queries or keys of so many heads, and features of each."""
    if config.qk_norm == "none":
        return nn.Identity()
    if config.qk_norm == "rotated":
        return nn.RMSNorm(size, eps=config.norm_eps, elementwise_affine=False)
    if config.qk_norm == "each_head":
        return NormOfEachHead(heads, size, config.norm_eps)
    return make_norm(config, size * (heads if config.qk_norm == "full" else 1))


def drop(x: Tensor, p: float) -> Tensor:
    """Zero elements of x with probability p, and divide the others by 1 - p; x itself if p is 0."""
    return F.dropout(x, p) if p else x


def softcap(x: Tensor, cap: float | None) -> Tensor:
    """Keep x between -cap and cap, as cap * tanh(x / cap); x itself without a cap. Gemma team 2024."""
    return x if cap is None else cap * torch.tanh(x / cap)
