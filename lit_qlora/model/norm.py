"""Norms: features brought to one size."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.model.config import ModelConfig


def make_norm(config: ModelConfig, size: int) -> nn.Module:
    """The kind of norm that this model uses, over `size` features."""
    if config.norm == "rms":
        return nn.RMSNorm(size, eps=config.norm_eps)
    if config.norm == "rms_no_weight":
        return nn.RMSNorm(size, eps=config.norm_eps, elementwise_affine=False)
    if config.norm == "rms_plus_one":
        return RMSPlusOne(size, config.norm_eps)
    if config.norm == "layer_plus_one":
        return LayerPlusOne(size, config.norm_eps)
    affine = config.norm != "layer_no_weight"
    return nn.LayerNorm(size, config.norm_eps, elementwise_affine=affine, bias=config.norm == "layer")


class RMSPlusOne(nn.Module):
    """RMSNorm whose weight is what the factor exceeds one by, computed in float32 (Gemma)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight.float(), self.eps).to(x.dtype)


class LayerPlusOne(nn.LayerNorm):
    """LayerNorm whose weight is what the factor exceeds one by (Nemotron)."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., size) -> (..., size)."""
        return F.layer_norm(x, self.normalized_shape, self.weight + 1, self.bias, self.eps)
