"""Operations of some families on queries, keys and values besides rotation: norms, clipping, a scale by position.

RMS norms of single heads and the scale are in kernels.qk_norm_rope. The rest is plain torch, with its backward pass by
autograd. The product with the stacked weights is saved, and the shaping is repeated in the backward pass.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.fused.attention import Heads
from lit_qlora.kernels.qk_norm_rope import HeadNorm
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.norm import RMSPlusOne

Shape = Callable[[Tensor, Tensor | None], Tensor]


class Shaping:
    """The shaping of one block, before and after the rotation; both map (T, (H + 2 K) D) to the same.

    Args:
        scaled: the block multiplies its queries by a factor of their position.
        like: a tensor on the device.
        keeps: the product is read once more, so nothing may be done in place.

    Attributes:
        before, after: None where they would do nothing; the second argument is the scale of the queries, (T, 1, 1).
        has_kernel: kernels.qk_norm_rope computes all of it, with the rotation.
        head_norm: the norms of that kernel; None for none.
    """

    def __init__(
        self, attn: Any, config: ModelConfig, heads: Heads, scaled: bool, like: Tensor, keeps: bool = False
    ) -> None:
        self.heads, self.clip, self.keeps = heads, config.clip_qkv, keeps
        self.query_norm, self.key_norm = (_of_each_head(norm) for norm in (attn.query_norm, attn.key_norm))
        self.full = config.qk_norm == "full"
        normed, late = not isinstance(attn.query_norm, nn.Identity), norms_follow_rotation(config)
        early = (normed and not late) or config.clip_qkv is not None or scaled
        self.before: Shape | None = self._before if early else None
        self.after: Shape | None = self._after if normed and late else None
        self.normed_before = normed and not late
        self.has_kernel = norms_heads(config) if normed else (scaled or keeps) and config.clip_qkv is None
        ones = torch.ones(heads.size, device=like.device)
        self.head_norm = _head_norm(attn, config, late, ones) if self.has_kernel and normed else None

    @property
    def does_nothing(self) -> bool:
        """True if queries and keys are only rotated, which is done in place."""
        return self.before is None and self.after is None and not self.keeps

    def _before(self, qkv: Tensor, scale: Tensor | None) -> Tensor:
        if self.clip is not None:
            qkv = qkv.clamp(-self.clip, self.clip)
        q, k, v = self.heads.split(qkv)
        if self.normed_before:
            q, k = self._norms(q, k)
        if scale is not None:
            q = q * scale.to(q.dtype)
        return torch.cat((q, k, v), dim=1).flatten(1)

    def _after(self, qkv: Tensor, scale: Tensor | None) -> Tensor:
        q, k, v = self.heads.split(qkv)
        return torch.cat((*self._norms(q, k), v), dim=1).flatten(1)

    def _norms(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if self.full:
            return self.query_norm(q.flatten(1)).view_as(q), self.key_norm(k.flatten(1)).view_as(k)
        return self.query_norm(q), self.key_norm(k)


def norms_follow_rotation(config: ModelConfig) -> bool:
    """Tell whether queries and keys are normed after they are rotated, which matters to norms with a weight."""
    same = _has_no_weight(config) and config.rope_attention_factor == 1  # a rotation leaves the size as it is
    return config.qk_norm_after_rope and config.qk_norm not in ("none", "full") and not same


def norms_heads(config: ModelConfig) -> bool:
    """Tell whether kernels.qk_norm_rope norms queries and keys, in blocks that do so."""
    by_rms = config.norm in ("rms", "rms_plus_one") and config.qk_norm == "head"
    return config.clip_qkv is None and (by_rms or _has_no_weight(config))


def in_one_kernel(config: ModelConfig) -> bool:
    """Tell whether kernels.qk_norm_rope computes the operations on queries and keys; rotation alone does not count."""
    scaled = config.qk_norm == "none" and (config.query_scale_beta != 0 or config.unrotated_scale_beta != 0)
    return norms_heads(config) or (config.clip_qkv is None and scaled)


def _has_no_weight(config: ModelConfig) -> bool:
    """Tell whether queries and keys have RMS norms of heads without a weight."""
    return config.qk_norm == "rotated" or (config.qk_norm == "head" and config.norm == "rms_no_weight")


def _head_norm(attn: Any, config: ModelConfig, late: bool, ones: Tensor) -> HeadNorm:
    norms = [norm for norm in (attn.query_norm, attn.key_norm) if norm is not None]  # or its queries alone are its own
    weights = torch.stack([_factors(norm, ones) for norm in norms]).detach()
    values, of_keys = config.value_norm and attn.key is not None, attn.key is not None and attn.value is None
    return HeadNorm(weights, attn.query_norm.eps, late, values, of_keys)


def _factors(norm: Any, ones: Tensor) -> Tensor:
    """Return the factors of an RMS norm of heads, (D,) float32; `ones` if it has no weight."""
    weight = ones if norm.weight is None else norm.weight.float()
    return 1 + weight if isinstance(norm, RMSPlusOne) else weight


def pull_back(shape: Shape, qkv: Tensor, scale: Tensor | None, d_out: Tensor) -> Tensor:
    """The gradient of qkv, given that of shape(qkv, scale)."""
    with torch.enable_grad():
        leaf = qkv.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(shape(leaf, scale), leaf, d_out)
    return gradient


def _of_each_head(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A norm of queries or keys as a function of (T, heads, D); norms of single heads are done all at once."""
    if not isinstance(norm, nn.ModuleList):
        return norm
    norms: list[Any] = list(norm)
    weights = torch.stack([one.weight.detach() for one in norms])  # (heads, D)
    return lambda x: F.layer_norm(x, x.shape[-1:], eps=norms[0].eps) * weights
