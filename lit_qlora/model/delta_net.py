"""A linear attention whose state forgets, and corrects what it says of a key: Yang et al. 2024, "Gated delta networks".

Each head has a state of keys x values instead of keys and values of all tokens. So a token costs the same however long
the text is. A token has a key k, a value v, a share of forgetting a and a share of correcting b. It changes the state S
to a S + k (b (v - k a S)), and its query reads S. Training takes CHUNK tokens at a time, with matrix products.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lit_qlora.model.attention import Place
from lit_qlora.model.cache import DeltaCache
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.short_conv import after_tokens, causal_convolution

CHUNK = 64
"""Tokens that are computed together; the products inside grow with its square."""
EPS = 1e-6  # of the norm of queries and keys


class DeltaNet(nn.Module):
    """The gated delta rule, with a short convolution before it, and a norm and a gate behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        keys = config.delta_key_heads * config.delta_key_size
        values = config.delta_value_heads * config.delta_value_size
        self.query, self.key = (nn.Linear(config.n_embd, keys, bias=False) for _ in range(2))
        self.value, self.output_gate = (nn.Linear(config.n_embd, values, bias=False) for _ in range(2))
        self.beta, self.decay = (nn.Linear(config.n_embd, config.delta_value_heads, bias=False) for _ in range(2))
        self.conv = nn.Parameter(torch.empty(2 * keys + values, 1, config.delta_conv_size))
        self.decay_rate = nn.Parameter(torch.zeros(config.delta_value_heads))  # its logarithm
        self.decay_bias = nn.Parameter(torch.zeros(config.delta_value_heads))
        self.norm = nn.RMSNorm(config.delta_value_size, eps=config.norm_eps)
        self.projection = nn.Linear(values, config.n_embd, bias=False)
        nn.init.normal_(self.conv, std=config.delta_conv_size**-0.5)

    def forward(self, x: Tensor, place: Place, cache: DeltaCache | None) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        c, documents = self.config, place.documents
        q, k, v = self._convolved(x, documents, cache)
        q, k = (normed(t.unflatten(-1, (c.delta_key_heads, -1))) for t in (q, k))
        q, k = (t.repeat_interleave(c.delta_value_heads // c.delta_key_heads, dim=2) for t in (q, k))
        v = v.unflatten(-1, (c.delta_value_heads, -1)).float()
        # The logarithm of the share of the state that stays: (B, T, H).
        kept = -self.decay_rate.float().exp() * F.softplus(self.decay(x).float() + self.decay_bias.float())
        inputs = (q * c.delta_key_size**-0.5, k, v, kept, self.beta(x).sigmoid().float())
        with torch.autocast(x.device.type, enabled=False):  # errors of a state stay in it
            if cache:
                rule = delta_step if x.size(1) == 1 else delta_rule
                y, state = rule(*inputs, documents, cache.state)
                cache.state.copy_(state)
            else:
                # The matrices of the chunks are larger than all that they are made of.
                y, _ = checkpoint(delta_rule, *inputs, documents, use_reentrant=False, preserve_rng_state=False)
        y = self.norm(y.to(x.dtype)) * F.silu(self.output_gate(x).view(y.shape).float())
        out: Tensor = self.projection(y.to(x.dtype).flatten(2))
        return out

    def _convolved(self, x: Tensor, documents: Tensor | None, cache: DeltaCache | None) -> tuple[Tensor, ...]:
        """(B, T, E) -> queries and keys (B, T, key heads * size), values (B, T, value heads * size)."""
        parts = (self.query(x), self.key(x), self.value(x))
        features = after_tokens(torch.cat(parts, dim=-1), self.config.delta_conv_size, documents, cache)
        convolved = F.silu(causal_convolution(features, self.conv, documents))
        return convolved.split([part.size(-1) for part in parts], dim=-1)


def normed(x: Tensor) -> Tensor:
    """Bring the features (..., D) of each head to length one, in float32."""
    x = x.float()
    return x * (x.square().sum(-1, keepdim=True) + EPS).rsqrt()


def delta_step(
    q: Tensor, k: Tensor, v: Tensor, kept: Tensor, beta: Tensor, documents: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """delta_rule for one token of the document of the state."""
    state = state * kept[:, 0, :, None, None].exp()
    q, k, v = (t[:, 0, :, None] for t in (q, k, v))  # (B, H, 1, D)
    state = state + k.mT @ (beta[:, 0, :, None, None] * (v - k @ state))
    return (q @ state).transpose(1, 2), state


def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    beta: Tensor,
    documents: Tensor | None,
    state: Tensor | None = None,
    chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:
    """Read the state behind each token of its document, in chunks.

    Documents meet in the products of a chunk with factors that are zero, so none changes a bit of another.

    Args:
        q, k: (B, T, H, D).
        v: (B, T, H, Dv).
        kept: (B, T, H), the logarithm of the share of the state that stays.
        beta: (B, T, H), the share of the error that is corrected.
        documents: (B, T), documents being laid end to end; None where all are of one.
        state: (B, H, D, Dv), that of document 0 so far; None is zero.

    Returns:
        (B, T, H, Dv), and the state behind the last token.
    """
    length = q.size(1)
    q, k, v, kept, beta = (in_chunks(t, chunk) for t in (q, k, v, kept, beta))
    seen, first = (mask.to(q.dtype) for mask in masks(documents, -length % chunk, chunk, q.device))
    total, between = decay(kept, seen)
    # What each token would write if all before it were known: one triangular system a chunk.
    corrected = k * beta[..., None]
    system = (corrected @ k.mT) * between
    new, old = (
        torch.linalg.solve_triangular(system, t, upper=False, unitriangular=True)
        for t in (v * beta[..., None], corrected * (total.exp() * first)[..., None])
    )
    inside = (q @ k.mT) * between
    q = q * (total.exp() * first)[..., None]
    k = k * between[..., -1, :, None]
    stays = (total[..., -1].exp() * first[..., -1])[..., None, None]
    state = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1)) if state is None else state
    states, writes = [], []
    # Unbound, since the gradient of an indexed chunk would be as large as that of all of them.
    for share, own, known, keys in zip(*(t.unbind(2) for t in (stays, new, old, k.mT)), strict=True):
        states.append(state)
        writes.append(own - known @ state)
        state = share * state + keys @ writes[-1]
    out = q @ torch.stack(states, dim=2) + inside @ torch.stack(writes, dim=2)
    return out.flatten(2, 3)[:, :, :length].transpose(1, 2), state


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, T, H, ...) -> (B, H, N, chunk, ...), with zeros behind the last token."""
    padding = (0, 0) * (x.ndim - 2) + (0, -x.size(1) % chunk)
    return F.pad(x, padding).transpose(1, 2).unflatten(2, (-1, chunk))


def decay(kept: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Tell what is kept within chunks.

    Args:
        kept: (B, H, N, C), see delta_rule.
        seen: (C, C) or (B, 1, N, C, C), see masks.

    Returns:
        Logarithms of what is kept from the beginning of the chunk or document up to each token, (B, H, N, C), and the
        share that is kept from each token to each later one, (B, H, N, C, C).
    """
    total = (kept[..., None, :] @ seen.mT)[..., 0, :]
    return total, (total[..., :, None] - total[..., None, :]).masked_fill(seen == 0, -torch.inf).exp()


def masks(documents: Tensor | None, pad: int, chunk: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tell which tokens of a chunk are of one document and in order, and which are of that of the chunk before.

    Args:
        documents: (B, T), see delta_rule; the last is prolonged by `pad`.

    Returns:
        (B, 1, N, C, C) and (B, 1, N, C) bool; (C, C) and (C,) where all are of one document.
    """
    earlier = torch.ones(chunk, chunk, dtype=torch.bool, device=device).tril()
    if documents is None:
        return earlier, earlier[-1]
    numbers = torch.cat((documents, documents[:, -1:].expand(-1, pad)), dim=1).unflatten(1, (-1, chunk))[:, None]
    before = F.pad(numbers[:, :, :-1, -1], (1, 0))
    return earlier & (numbers[..., :, None] == numbers[..., None, :]), numbers == before[..., None]
