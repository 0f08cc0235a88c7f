"""Which models the fast path can take, and why it cannot take the others."""

import torch
from torch import nn

from lit_qlora.fused.mlp import ACTIVATIONS
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import QuantizedLinear

ALONE = ("projection", "down", "head")  # layers that are stacked with no other
UNHANDLED = ("n_expert", "kv_latent_size", "attention_sinks", "attention_softcap")
"""Fields of ModelConfig that the fast path does not compute with, unless they have their default values."""
GROWING = ("dynamic", "longrope")
"""Kinds of RoPE whose angles depend on the length of the text."""


def why_not(model: GPT) -> str:
    """Why this model takes the plain path, or '' if the fast one can take it."""
    config, weight = model.config, model.embed.weight
    if not AVAILABLE:
        return "Triton is not installed"
    if weight.is_cuda and weight.dtype != torch.bfloat16:
        return f"weights are {str(weight.dtype).removeprefix('torch.')}, not bfloat16"
    if reason := unhandled(config) or unhandled_variant(model):
        return reason
    for path, module in (*model.blocks[0].named_modules(), ("head", model.head)):
        base = module.base if isinstance(module, LoRALinear) else module
        if isinstance(base, QuantizedLinear):
            ragged = base.scheme.endswith("-dq") and base.absmax.numel() % 256 and path.split(".")[-1] not in ALONE
            if base.in_features % 64 or ragged:
                return f"a quantised layer of {base.in_features} x {base.out_features} does not stack"
        learns_or_stacks = path != "head" or isinstance(module, LoRALinear)
        if isinstance(base, nn.Linear | QuantizedLinear) and base.out_features % 16 and learns_or_stacks:
            return f"a layer with {base.out_features} outputs"
    return ""


def unhandled_variant(model: GPT) -> str:
    """What of the adapters and embeddings the fast path does not compute, or ''."""
    adapters = [module for module in model.modules() if isinstance(module, LoRALinear)]
    if any(adapter.magnitude is not None for adapter in adapters):
        return "DoRA"
    if len({(adapter.lora_a.size(0), adapter.scale) for adapter in adapters}) > 1:
        return "adapters of different ranks or scales"
    if type(model.embed) is not nn.Embedding:
        return "embeddings that learn"
    return "noise on the embeddings" if model.embed._forward_hooks else ""


def unhandled(config: ModelConfig) -> str:
    """What a model has that the fast path does not compute, or ''."""
    for name in UNHANDLED:
        if value := getattr(config, name):
            return f"{name} {value!r}"
    return "" if config.ffn in ACTIVATIONS else f"ffn {config.ffn!r}"
