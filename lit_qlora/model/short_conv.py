"""A short convolution between two gates, in the place of attention (Liquid AI's LFM2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_qlora.model.attention import Place
from lit_qlora.model.cache import ConvCache, DeltaCache
from lit_qlora.model.config import ModelConfig


class ShortConv(nn.Module):
    """Of each token three vectors: one lets the second into the convolution, one lets what comes out of it through."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.size = config.conv_size
        self.into = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.conv_bias)
        self.conv = nn.Parameter(torch.empty(config.n_embd, 1, config.conv_size))
        self.bias = nn.Parameter(torch.zeros(config.n_embd)) if config.conv_bias else None
        self.projection = nn.Linear(config.n_embd, config.n_embd, bias=config.conv_bias)
        nn.init.normal_(self.conv, std=config.conv_size**-0.5)

    def forward(self, x: Tensor, place: Place, cache: ConvCache | None) -> Tensor:
        """(B, T, E) -> (B, T, E)."""
        entrance, exit_, values = self.into(x).chunk(3, dim=-1)
        features = after_tokens(entrance * values, self.size, place.documents, cache)
        convolved = causal_convolution(features, self.conv, place.documents)
        out: Tensor = self.projection(exit_ * (convolved if self.bias is None else convolved + self.bias))
        return out


def after_tokens(x: Tensor, size: int, documents: Tensor | None, cache: ConvCache | DeltaCache | None) -> Tensor:
    """Put the size - 1 tokens that came before x (B, T, C) in front of it; they become the last ones of x."""
    if documents is not None:
        x = x.masked_fill((documents < 0)[..., None], 0)
    before = cache.inputs if cache else x.new_zeros(len(x), size - 1, x.size(2))
    whole = torch.cat((before, x), dim=1)
    if cache:
        cache.inputs.copy_(whole[:, x.size(1) :])
    return whole


def causal_convolution(x: Tensor, weight: Tensor, documents: Tensor | None) -> Tensor:
    """A weighted sum of each feature over the last W tokens of the same document.

    Args:
        x: (B, W - 1 + T, C), where the first W - 1 are of document 0.
        weight: (C, 1, W), that of the token itself last.
        documents: (B, T), or None where all are of one.

    Returns:
        (B, T, C).
    """
    size, new = weight.size(-1), x.size(1) - weight.size(-1) + 1
    if documents is None:
        return F.conv1d(x.mT, weight, groups=x.size(-1)).mT
    numbers = F.pad(documents, (size - 1, 0))
    total = x[:, size - 1 :] * weight[:, 0, -1]
    for i in range(size - 1):
        same = (numbers[:, i : i + new] == documents)[..., None]
        total = total + torch.where(same, x[:, i : i + new], 0) * weight[:, 0, i]
    return total
