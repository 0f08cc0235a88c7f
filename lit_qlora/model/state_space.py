"""A linear attention whose state forgets: Dao & Gu 2024, "Transformers are SSMs" (Mamba-2).

Each head has a state of keys x values instead of keys and values of all tokens. A token has a key k (B in the paper),
a value v (x), a query q (C) and a step d. It changes the state S to exp(-r d) S + k d v, and its query reads S. The
rate r is the head's own. Training takes CHUNK tokens at a time, with matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_qlora.model.attention import Place
from lit_qlora.model.cache import DeltaCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.delta_net import CHUNK, decay, in_chunks, masks
from lit_qlora.model.short_conv import after_tokens, causal_convolution


class StateSpace(nn.Module):
    """The rule, with a short convolution before it, and a gate and a norm behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        keys = config.delta_key_heads * config.delta_key_size
        values = config.delta_value_heads * config.delta_value_size
        self.query, self.key = (nn.Linear(config.n_embd, keys, bias=False) for _ in range(2))
        self.value, self.output_gate = (nn.Linear(config.n_embd, values, bias=False) for _ in range(2))
        self.decay = nn.Linear(config.n_embd, config.delta_value_heads, bias=False)
        self.conv = nn.Parameter(torch.empty(values + 2 * keys, 1, config.delta_conv_size))
        self.conv_bias = nn.Parameter(torch.zeros(values + 2 * keys)) if config.conv_bias else None
        self.decay_rate = nn.Parameter(torch.zeros(config.delta_value_heads))  # its logarithm
        self.decay_bias = nn.Parameter(torch.zeros(config.delta_value_heads))
        self.skip = nn.Parameter(torch.ones(config.delta_value_heads))
        self.norm = NormOfGroups(config.delta_key_heads, values, config.norm_eps)
        self.projection = nn.Linear(values, config.n_embd, bias=False)
        nn.init.normal_(self.conv, std=config.delta_conv_size**-0.5)

    def forward(self, x: Tensor, place: Place, cache: DeltaCache | None) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        c, documents = self.config, place.documents
        v, k, q = self._convolved(x, documents, cache)
        k, q = (t.unflatten(-1, (c.delta_key_heads, -1)).float() for t in (k, q))
        k, q = (t.repeat_interleave(c.delta_value_heads // c.delta_key_heads, dim=2) for t in (k, q))
        v = v.unflatten(-1, (c.delta_value_heads, -1)).float()
        step = F.softplus(self.decay(x).float() + self.decay_bias.float())  # (B, T, H)
        inputs = (q, k, v * step[..., None], -self.decay_rate.float().exp() * step)
        with torch.autocast(x.device.type, enabled=False):  # errors of a state stay in it
            if cache:
                rule = state_step if x.size(1) == 1 else state_rule
                y, state = rule(*inputs, documents, cache.state)
                cache.state.copy_(state)
            else:
                # The matrices of the chunks are larger than all that they are made of.
                y, _ = checkpoint(state_rule, *inputs, documents, use_reentrant=False, preserve_rng_state=False)
        y = (y + self.skip.float()[:, None] * v).to(x.dtype).flatten(2)
        out: Tensor = self.projection(self.norm(y.float() * F.silu(self.output_gate(x).float())).to(x.dtype))
        return out

    def _convolved(self, x: Tensor, documents: Tensor | None, cache: DeltaCache | None) -> tuple[Tensor, ...]:
        """(B, T, E) -> values (B, T, heads * size), keys and queries (B, T, key heads * size)."""
        parts = (self.value(x), self.key(x), self.query(x))
        features = after_tokens(torch.cat(parts, dim=-1), self.config.delta_conv_size, documents, cache)
        convolved = causal_convolution(features, self.conv, documents)
        convolved = F.silu(convolved if self.conv_bias is None else convolved + self.conv_bias)
        return convolved.split([part.size(-1) for part in parts], dim=-1)


class NormOfGroups(nn.Module):
    """An RMS norm of each of several groups of features."""

    def __init__(self, groups: int, size: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        each = x.unflatten(-1, (self.groups, -1))
        return self.weight * F.rms_norm(each, each.shape[-1:], eps=self.eps).flatten(-2)


def state_step(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, documents: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """state_rule for one token of the document of the state."""
    q, k, v = (t[:, 0, :, None] for t in (q, k, v))  # (B, H, 1, D)
    state = state * kept[:, 0, :, None, None].exp() + k.mT @ v
    return (q @ state).transpose(1, 2), state


def state_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    documents: Tensor | None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Read the state behind each token of its document, in chunks; see delta_net.delta_rule.

    Args:
        q, k: (B, T, H, D).
        v: (B, T, H, Dv).
        kept: (B, T, H), the logarithm of the share of the state that stays.
        documents: (B, T), documents being laid end to end; None where all are of one.
        state: (B, H, D, Dv), that of document 0 so far; None is zero.

    Returns:
        (B, T, H, Dv), and the state behind the last token.
    """
    length = q.size(1)
    q, k, v, kept = (in_chunks(t, chunk) for t in (q, k, v, kept))
    seen, first = (mask.to(q.dtype) for mask in masks(documents, -length % chunk, chunk, q.device))
    total, between = decay(kept, seen)
    inside = ((q @ k.mT) * between) @ v
    q = q * (total.exp() * first)[..., None]
    written = (k * between[..., -1, :, None]).mT @ v
    stays = (total[..., -1].exp() * first[..., -1])[..., None, None]
    state = torch.zeros_like(written[:, :, 0]) if state is None else state
    states = []
    for share, added in zip(stays.unbind(2), written.unbind(2), strict=True):  # see delta_net.delta_rule
        states.append(state)
        state = share * state + added
    out = inside + q @ torch.stack(states, dim=2)
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2), state
