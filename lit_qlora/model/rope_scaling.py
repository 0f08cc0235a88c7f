"""A longer context for a model that has rotary positions, by turning queries and keys more slowly."""

import math
from dataclasses import replace
from typing import Any

from torch import nn

from lit_qlora.errors import UsageError
from lit_qlora.model.config import ModelConfig


def scaled(config: ModelConfig, kind: str, factor: float) -> ModelConfig:
    """The configuration of a model whose context is `factor` times as long.

    The settings of a kind are the ones that its paper and transformers take where a config.json gives none; see
    rope.scaled_frequency.

    Args:
        kind: of ModelConfig.rope_scaling; "none" changes nothing.

    Raises:
        UsageError: for a model whose positions cannot be scaled, or are already.
    """
    if kind == "none":
        return config
    if reason := _why_not(config):
        raise UsageError(f"lora.rope_scaling: {config.name} {reason}. Leave it out.")
    original, attention = config.block_size, 0.1 * math.log(factor) + 1 if kind == "yarn" else 1.0
    return replace(
        config,
        rope_scaling=kind,  # type: ignore[arg-type] # checked on creation
        rope_factor=factor,
        rope_attention_factor=attention,
        rope_original_block_size=config.rope_original_block_size if kind == "linear" else original,
        block_size=int(original * factor),
    )


def scale(model: nn.Module, kind: str, factor: float) -> None:
    """Give `model`, a GPT, that configuration, in place.

    Raises:
        UsageError: see scaled.
    """
    if kind == "none":
        return
    config: Any = model.config
    config = scaled(config, kind, factor)
    for module in model.modules():
        if isinstance(getattr(module, "config", None), ModelConfig):
            module.config = config


def _why_not(config: ModelConfig) -> str:
    """Say why the positions of a model cannot be scaled, or return ''."""
    if config.positions != "rope":
        return "has learned positions"
    if config.rope_scaling != "none":
        return f"has scaled positions already ({config.rope_scaling}, factor {config.rope_factor:g})"
    if config.rope_local_theta is not None or config.full_head_size:
        return "turns blocks with a window and without one otherwise"
    return "scales its queries or its latents by position" if config.query_scale_beta or config.kv_latent_size else ""
