"""Rotary positions: queries and keys are turned by angles that grow with their position. Su et al. 2021."""

import math

import torch
from torch import Tensor

from lit_qlora.model.config import ModelConfig


def rope_table(
    config: ModelConfig, positions: Tensor, local: bool = False, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The cosines and sines, each (B, 1, T, R/2) float32; R is the rotated part of head_size. Su et al. 2021, eq. 34.

    Every forward pass computes the table, at no cost next to one layer. A table that is not stored cannot be stale,
    on the wrong device, or left uninitialized on the meta device.

    Args:
        positions: (B, T) int64.
        local: for a block with a sliding window, where config.rope_local_theta may give a base of its own.
        segments: see GPT.hidden.
    """
    size = config.rotated if local or not config.full_head_size else config.full_head_size
    exponent = torch.arange(0, size, 2, device=positions.device).float() / size
    if local and config.rope_local_theta is not None:
        angle = positions[:, None, :, None].float() / config.rope_local_theta**exponent
        return angle.cos(), angle.sin()
    length = document_length(positions, segments)[:, None, :, None]
    angle = positions[:, None, :, None].float() * scaled_frequency(config, exponent, length)
    return config.rope_attention_factor * angle.cos(), config.rope_attention_factor * angle.sin()


def rotates_locally(config: ModelConfig) -> bool:
    """Tell whether the table of blocks with a sliding window differs from that of the others."""
    return config.rope_local_theta is not None or config.full_head_size > 0


def document_length(positions: Tensor, segments: Tensor | None) -> Tensor:
    """The number of tokens that the document of each token has so far: (B, 1), or with segments (B, T).

    A document that outgrows the original context can turn otherwise; its neighbours in row and batch do not matter.
    """
    if segments is None:
        return positions.amax(dim=1, keepdim=True) + 1
    document = segments.long() + 1  # padding is -1
    last = positions.new_zeros(len(positions), positions.size(1) + 1)
    return last.scatter_reduce(1, document, positions, "amax").gather(1, document) + 1


def scaled_frequency(config: ModelConfig, exponent: Tensor, length: Tensor) -> Tensor:
    """The angle by which each feature turns from one token to the next, scaled as rope_scaling says.

    linear (Chen et al. 2023): every wavelength is multiplied by the factor.
    dynamic (NTK-aware, Peng et al. 2023): texts longer than the original context get a larger base.
    llama3: wavelengths longer than the original context / low_freq_factor are multiplied by the factor. Wavelengths
    shorter than that context / high_freq_factor stay as they are. There is a linear passage in between.
    yarn (Peng et al. 2023): the same, with the passage linear in the index of the feature.
    proportional (Gemma 4): wavelengths are those of the whole head, and the slowest features do not turn at all.
    longrope (Ding et al. 2024): each wavelength has a factor of its own, and another one in texts longer than the
    original context.

    Args:
        exponent: (R/2,) from 0 to 1.
        length: (B, 1, T or 1, 1), tokens of the text that each token stands in.

    Returns:
        Radians per token, (R/2,) or (B, 1, T or 1, R/2).
    """
    frequency = 1.0 / config.rope_theta**exponent
    original, factor = config.rope_original_block_size, config.rope_factor
    if config.rope_scaling == "none":
        return frequency
    if config.rope_scaling == "linear":
        return frequency / factor
    if config.rope_scaling == "dynamic":
        growth = factor * length.clamp(min=original) / original - (factor - 1)
        return 1.0 / (config.rope_theta * growth ** (config.rotated / (config.rotated - 2))) ** exponent
    if config.rope_scaling == "proportional":
        turning = torch.arange(len(exponent), device=exponent.device) < int(config.rope_fraction * len(exponent))
        return torch.where(turning, frequency / factor, 0)
    if config.rope_scaling == "longrope":
        long, short = exponent.new_tensor(config.rope_long_factors), exponent.new_tensor(config.rope_short_factors)
        return frequency / torch.where(length > original, long, short)
    kept = llama3_share(config, frequency) if config.rope_scaling == "llama3" else yarn_share(config, exponent)
    return kept * frequency + (1 - kept) * frequency / factor


def llama3_share(config: ModelConfig, frequency: Tensor) -> Tensor:
    """The share of each feature that llama3 leaves unscaled: (R/2,) from 0 to 1."""
    turns = config.rope_original_block_size * frequency / (2 * math.pi)  # full turns within the original context
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    return ((turns - low) / (high - low)).clamp(0, 1)


def yarn_share(config: ModelConfig, exponent: Tensor) -> Tensor:
    """The share of each feature that yarn leaves unscaled: (R/2,) from 0 to 1. Peng et al. 2023, sec. 3.2."""

    def feature(turns: float) -> float:
        """The (fractional) index of the feature that makes so many full turns within the original context."""
        wavelength = config.rope_original_block_size / (2 * math.pi * turns)
        return config.rotated * math.log(wavelength) / (2 * math.log(config.rope_theta))

    first, last = feature(config.rope_beta_fast), feature(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, config.rotated - 1)
    index = exponent * config.rotated / 2
    return 1 - ((index - first) / max(last - first, 0.001)).clamp(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate the first R of D features of x (..., T, D).

    Args:
        interleaved: feature 2 i turns with 2 i + 1, instead of i with i + R/2 (the order of Hugging Face's Llama).
    """
    half = cos.size(-1)
    turned, rest = x[..., : 2 * half].float(), x[..., 2 * half :]
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :half], turned[..., half:])
    a, b = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if interleaved:
        return torch.cat((torch.stack((a, b), dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((a, b, rest), dim=-1)
