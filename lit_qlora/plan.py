"""What a run will need, worked out before a weight is loaded."""

from dataclasses import dataclass

import torch

from lit_qlora.config import ModelConfig
from lit_qlora.lora import LoRALinear, add_lora, count_trainable
from lit_qlora.model import GPT, LOGITS_AT_ONCE
from lit_qlora.quantize import bits_per_weight, is_quantized
from lit_qlora.settings import LoRAConfig, Scheme

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of a run. Bytes are those of one device."""

    frozen: int
    """Parameters of the base, as the checkpoint has them."""
    trainable: int
    """Parameters of the adapter."""
    weights: float
    """Bytes of the base as it is stored on the device."""
    learning: float
    """Bytes of the adapter, its gradients and AdamW's two moments, all float32."""
    activations: float
    """Bytes that a micro-batch of the longest samples keeps for the backward pass; an estimate."""

    @property
    def total(self) -> float:
        """Bytes at the peak."""
        return self.weights + self.learning + self.activations


def make_plan(
    model: ModelConfig,
    lora: LoRAConfig,
    quantize: Scheme,
    quantize_head: bool,
    dtype: torch.dtype,
    tokens: int,
    recompute: bool,
) -> Plan:
    """The plan for micro-batches of `tokens` tokens, padding included.

    Raises:
        UsageError: if the LoRA settings do not fit the model.
    """
    with torch.device("meta"):
        gpt = GPT(model)
        frozen = sum(p.numel() for p in gpt.parameters())
        bits = 0.0
        for path, parameter in gpt.named_parameters():
            layer = path.removesuffix(".weight")
            packed = layer != path and isinstance(gpt.get_submodule(layer), torch.nn.Linear)
            scheme = quantize if packed and is_quantized(layer, quantize, quantize_head) else "none"
            bits += parameter.numel() * bits_per_weight(scheme, dtype)
        add_lora(gpt, lora)
    trainable = count_trainable(gpt)
    return Plan(
        frozen=frozen,
        trainable=trainable,
        weights=bits / 8,
        learning=16 * trainable,
        activations=_activations(gpt, lora, dtype.itemsize, tokens, recompute),
    )


def _activations(gpt: GPT, lora: LoRAConfig, itemsize: int, tokens: int, recompute: bool) -> float:
    """What the plain path keeps: inputs of norms and of adapted layers (with dropout's mask), attention, MLP products.

    Frozen layers keep nothing, quantised or not: no gradient of their weights is wanted.
    """
    config = gpt.config
    block = 2.0 * config.n_embd + 2 * (config.n_head + config.n_kv_head) * config.head_size
    block += (3 if config.ffn == "swiglu" else 1) * config.ffn_size
    inputs = sum(module.in_features for module in gpt.blocks[0].modules() if isinstance(module, LoRALinear))
    block += inputs
    layer = tokens * (block * itemsize + (inputs if lora.dropout else 0))
    kept = config.n_layer * tokens * config.n_embd * itemsize + layer if recompute else config.n_layer * layer
    logits = min(tokens * config.vocab_size, LOGITS_AT_ONCE) * (2 * 4 + itemsize)
    widest = max(config.ffn_size, config.n_head * config.head_size) * config.n_embd * itemsize
    return kept + logits + widest
