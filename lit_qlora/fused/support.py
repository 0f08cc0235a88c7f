"""Tells which models the kernels can take, for training and for decoding, and why they refuse the others."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from lit_qlora.fused.experts import FUNCTIONS
from lit_qlora.fused.kernel_block import (
    ACTIVATIONS,
    dense_mlp_of,
    mixer_of,
    mixing_layers,
    mixture_of,
    mlp_layers,
    takes_torch,
)
from lit_qlora.fused.qkv_transforms import norms_heads
from lit_qlora.fused.stacked import base_of, why_not_stacked
from lit_qlora.fused.uneven import padding
from lit_qlora.kernels import launch
from lit_qlora.kernels.attention import LARGE
from lit_qlora.kernels.lora_products import LEAST_STRIPE
from lit_qlora.kernels.stack import BLOCK
from lit_qlora.lora.embeddings import TrainedHead
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import KINDS
from lit_qlora.quantize import QuantizedLinear, Storage, ragged

LAYERS = [name for names in KINDS for name in names]
"""Of an expert."""
UNDECODED = ("kv_latent_size", "delta_layers", "conv_layers", "attention_gate")
"""Fields of ModelConfig that the kernels of decoding do not compute with, unless they have their default values."""
HALF = (torch.bfloat16, torch.float16)
"""Dtypes of weights with which the fast path computes on a GPU."""
GROWING = ("dynamic", "longrope")
"""Kinds of RoPE whose angles depend on the length of the text."""


def why_not(model: GPT, dtype: torch.dtype | None = None) -> str:
    """Why this model takes the plain path of training, or '' if the fast path can take it.

    Args:
        dtype: of its frozen weights on the fast path; None for that of today.
    """
    device, dtype = model.embed.weight.device, dtype or model.embed.weight.dtype
    if reason := launch.why_no_kernels(device, dtype):
        return reason
    if device.type == "cuda" and dtype not in HALF:
        return f"weights are {str(dtype).removeprefix('torch.')}, not bfloat16 or float16"
    if reason := unhandled(model.config) or unhandled_variant(model):
        return reason
    loose = set(_of_any_size(model))
    stacks = (*stacks_of(model), *([layer] for layer in _of_experts(model)), *([layer] for layer in loose))
    of_experts = (layers for block in model.blocks for layers in stacks_of_experts(block))
    if any(len({getattr(base_of(layer), "scheme", "none") for layer in layers}) > 1 for layers in of_experts):
        return "experts of different storage"
    reasons = ((_no_product if layers[0] in loose else _untrainable)(layers, model) for layers in stacks)
    return next(filter(None, reasons), "")


def stacks_of(model: GPT) -> Iterator[list[nn.Module]]:
    """Yield the layers that every token goes through in a model of the fast path, one list for each shared input."""
    for block in model.blocks:
        yield from _stacks_of_block(block)
    if model.per_layer is not None:
        yield [model.per_layer.narrow]
    yield [model.head]


def _stacks_of_block(block: Any) -> Iterator[list[nn.Module]]:
    yield from mixing_layers(mixer_of(block))
    if (mlp := dense_mlp_of(block)) is not None:
        yield from mlp_layers(mlp)
    if block.per_layer is not None:
        yield from ([layer] for layer in _of_own_input(block))


def _of_own_input(block: Any) -> tuple[nn.Module, nn.Module]:
    """The layers that add a block's embeddings to its stream."""
    return block.per_layer.gate, block.per_layer.widen


def _of_experts(model: GPT) -> Iterator[nn.Module]:
    """The layers of one expert of each block that has some: the others are like it."""
    for mixture in filter(None, map(mixture_of, model.blocks)):
        yield from (getattr(mixture.experts[0], name) for name in LAYERS)


def _of_any_size(model: GPT) -> Iterator[nn.Module]:
    """The layers outside of kernels that take 16 outputs at a time: those between which torch computes, and gates."""
    if model.per_layer is not None:
        yield model.per_layer.narrow
    for block in model.blocks:
        if block.per_layer is not None:
            yield from _of_own_input(block)
        if (mixture := mixture_of(block)) is not None and mixture.shared_gate is not None:
            yield mixture.shared_gate
        if takes_torch(block, model.config):
            yield from (layer for layers in mixing_layers(mixer_of(block)) for layer in layers)


def decoded_scales(model: GPT, storage: Storage) -> int:
    """Bytes that doubly quantised scales take more on the fast path; see quantize.stack_weights."""
    more, paths = 0, _paths(model)
    for layers in stacks_of(model):
        scales = [base_of(layer).out_features * base_of(layer).in_features // BLOCK for layer in layers]
        nested = storage.scheme(paths[layers[0]]).endswith("-dq")
        more += 3 * sum(scales) if nested and ragged(scales) else 0  # float32 instead of a byte
    return more


def mixed_stack(model: GPT, storage: Storage) -> str:
    """Why layers that read the same input would not be one product in this storage, or ''."""
    paths = _paths(model) if storage.layers else {}
    of_experts = (layers for block in model.blocks for layers in stacks_of_experts(block))
    for layers in (*stacks_of(model), *of_experts) if paths else ():
        if len(schemes := {storage.scheme(paths[layer]) for layer in layers}) > 1:
            return f"{paths[layers[0]]} is stacked with layers in other storage: {', '.join(sorted(schemes))}"
    return ""


def _paths(model: GPT) -> dict[nn.Module, str]:
    return {module: path for path, module in model.named_modules()}


def dequantized_bytes(model: GPT, storage: Storage) -> list[tuple[int, int]]:
    """Count the bytes of each block's quantised weights in 16 bit: with the adapters' B beside them, and of experts.

    Those of experts have no B beside them.
    """
    paths, found = _paths(model) if storage.layers else {}, []

    def of(stacks: Sequence[Sequence[nn.Module]], beside: bool) -> int:
        quantized = (s for s in stacks if s and storage.quantizes(paths.get(s[0], "")))
        return sum(2 * _columns(s, beside) * sum(base_of(layer).out_features for layer in s) for s in quantized)

    for block in model.blocks:
        gate = getattr(mixture_of(block), "shared_gate", None)
        gates: list[list[nn.Module]] = [] if gate is None else [[gate]]
        dense = [*_stacks_of_block(block), *gates]
        found.append((of(dense, beside=True), of(stacks_of_experts(block), beside=False)))
    return found


def _columns(layers: Sequence[nn.Module], beside: bool) -> int:
    """Columns of a stack's [W | B], or of W alone."""
    ranks = [layer.lora_a.size(0) for layer in layers if isinstance(layer, LoRALinear)] if beside else []
    return int(base_of(layers[0]).in_features) + len(ranks) * max(ranks, default=0)


def copied_bytes(model: GPT) -> int:
    """Bytes that learning takes more on the fast path, for padded adapters and trained rows of the head."""
    of_experts = (layers for block in model.blocks for layers in stacks_of_experts(block))
    stacks = [
        [layer for layer in layers if isinstance(layer, LoRALinear)] for layers in (*stacks_of(model), *of_experts)
    ]
    # Padding has a parameter and a gradient in float32 and a copy in 16 bit; rows have two sums in float32 and a copy.
    rows = model.head.trained.numel() if isinstance(model.head, TrainedHead) else 0
    return 10 * (sum(map(padding, stacks)) + int(rows))


def unhandled(config: ModelConfig, decodes: bool = False) -> str:
    """The part of a model that the kernels of training, or with `decodes` those of decoding, do not compute, or ''."""
    for name in UNDECODED if decodes else ():
        if value := getattr(config, name):
            return f"{name} {value!r}"
    if (config.value_norm or config.key_is_value) and not (config.value_norm and norms_heads(config)):
        return "values that are normed or keys, without norms of heads"
    if config.shared_kv_layers and not norms_heads(config):
        return "keys and values of other blocks, without norms of heads"
    if config.per_layer_size and (config.norm_position == "before" or config.parallel_residual):
        return "embeddings for each block, without a norm behind its MLP"
    if config.router_before and config.mlp_bias:
        return "biases of experts that read weighted tokens"
    dense = not config.n_expert or bool(config.dense_layers) or config.experts_beside or config.shared_expert_size > 0
    by_torch = config.ffn == "xielu" and not decodes
    handled = (not dense or config.ffn in ACTIVATIONS or by_torch) and (not config.n_expert or config.ffn in FUNCTIONS)
    return "" if handled else f"ffn {config.ffn!r}"


def unhandled_embeddings(model: GPT) -> str:
    """The part of the embeddings that the kernels of decoding do not compute, or ''."""
    return "" if type(model.embed) is nn.Embedding else "embeddings that learn"


def unhandled_variant(model: GPT) -> str:
    """The part of the adapters and embeddings that the fast path does not compute, or ''."""
    if model.dropout and max(map(model.config.head_size_of, (True, False))) > LARGE:
        return f"train.hidden_dropout with heads of more than {LARGE} features"
    lengths = [module.magnitude for module in model.modules() if isinstance(module, LoRALinear)]
    if learnt := [length.detach() for length in lengths if length is not None]:
        if model.config.n_expert:
            return "DoRA in a model with experts"
        if isinstance(model.head, LoRALinear):
            return "DoRA in the head"
        least = torch.finfo(model.embed.weight.dtype).tiny
        if not learnt[0].is_meta and min(float(length.abs().min()) for length in learnt) <= least:
            return "DoRA on weights with a row of zeros"  # the gradient of m is that of its row's output, divided by m
    return "embeddings that learn before a norm" if model.config.embedding_norm and unhandled_embeddings(model) else ""


def stacks_of_experts(block: Any) -> list[list[nn.Module]]:
    """The layers of all experts of a block with inputs of one kind; none without experts."""
    mixture = mixture_of(block)
    experts = () if mixture is None else mixture.experts
    return [[getattr(expert, name) for expert in experts for name in names] for names in KINDS]


def _untrainable(layers: Sequence[nn.Module], model: GPT) -> str:
    """Why the kernels of training cannot take layers that read the same input, or ''."""
    if reason := _no_product(layers, model):
        return reason
    for layer in layers:
        learns_or_stacks = layer is not model.head or isinstance(layer, LoRALinear)
        if base_of(layer).out_features % LEAST_STRIPE and learns_or_stacks:
            return f"a layer with {base_of(layer).out_features} outputs"
    return ""


def _no_product(layers: Sequence[nn.Module], model: GPT) -> str:
    """Why layers that read the same input cannot be one product with their adapters, or ''."""
    if reason := why_not_stacked(layers, model.embed.weight.dtype):
        return reason
    for layer in layers:
        base = base_of(layer)
        if isinstance(base, QuantizedLinear) and base.scheme != "none" and base.in_features % 64:
            return f"a quantised layer of {base.in_features} x {base.out_features}"
    return ""
