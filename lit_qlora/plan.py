"""What a run will need, worked out before a weight is loaded."""

from dataclasses import dataclass

import torch

from lit_qlora.activations import FastSizes, choose
from lit_qlora.config import ModelConfig
from lit_qlora.lora import LoRALinear, add_lora, count_trainable
from lit_qlora.model import GPT, LOGITS_AT_ONCE
from lit_qlora.quantize import bits_per_weight, is_quantized
from lit_qlora.settings import LoRAConfig, Recompute, Scheme, TrainConfig

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
    recompute: tuple[Recompute, ...]
    """What each block computes again."""
    slow_because: str
    """Why the fast path is not taken; '' if it is."""

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
    train: TrainConfig,
    room: float | None,
) -> Plan:
    """The plan for micro-batches of `tokens` tokens, padding included.

    Args:
        room: bytes of the GPU, or None for a run that cannot take the fast path anyway.

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
    reason = _slow_because(gpt, dtype, train, room)
    policies: list[Recompute]
    if reason or room is None:
        policies = [plain_recompute(train.recompute)] * model.n_layer
        learning = 16 * trainable
        activations = _activations(gpt, lora, dtype.itemsize, tokens, policies[0] == "full")
    else:
        learning = 18 * trainable  # and a 16-bit copy
        adapted = sum(isinstance(module, LoRALinear) for module in gpt.blocks[0].modules())
        sizes = FastSizes(model, lora.r, adapted, quantize != "none")
        free = 0.97 * room - bits / 8 - learning
        if train.recompute == "auto":
            policies = choose(sizes, model.n_layer, tokens, free)
        else:
            policies = [train.recompute] * model.n_layer
        activations = sum(sizes.kept(policy, tokens) for policy in policies) + sizes.working(set(policies), tokens)
    return Plan(
        frozen=frozen,
        trainable=trainable,
        weights=bits / 8,
        learning=learning,
        activations=activations,
        recompute=tuple(policies),
        slow_because=reason,
    )


def plain_recompute(setting: str) -> Recompute:
    """What the plain path does for a setting: all or nothing."""
    return "none" if setting in ("auto", "none") else "full"


def _slow_because(gpt: GPT, dtype: torch.dtype, train: TrainConfig, room: float | None) -> str:
    if not train.fast:
        return "train.fast is false"
    if room is None:
        return "the fast one needs one CUDA device"
    if dtype != torch.bfloat16:
        return "the fast one needs bf16-true"
    from lit_qlora.fused import why_not  # imports Triton

    return why_not(gpt)


def _activations(gpt: GPT, lora: LoRAConfig, itemsize: int, tokens: int, recompute: bool) -> float:
    """What the plain path keeps: inputs of norms and of adapted layers (with dropout's mask), attention, MLP products.

    Frozen layers keep nothing, quantised or not: no gradient of their weights is wanted.
    """
    config = gpt.config
    block = 2.0 * config.n_embd + 2 * (config.n_head + config.n_kv_head) * config.head_size
    products = 3 if "glu" in config.ffn else 1
    if config.n_expert:  # as if tokens spread evenly over the experts; a block without any counts as one with
        block += products * (config.n_expert_per_token * config.expert_size + config.shared_expert_size)
    else:
        block += products * config.ffn_size
    inputs = sum(
        module.in_features * (config.n_expert_per_token / config.n_expert if ".experts." in path else 1)
        for path, module in gpt.blocks[-1].named_modules()
        if isinstance(module, LoRALinear)
    )
    block += inputs
    layer = tokens * (block * itemsize + (inputs if lora.dropout else 0))
    kept = config.n_layer * tokens * config.n_embd * itemsize + layer if recompute else config.n_layer * layer
    logits = min(tokens * config.vocab_size, LOGITS_AT_ONCE) * (2 * 4 + itemsize)
    widest = max(config.ffn_size, config.n_head * config.head_size) * config.n_embd * itemsize
    return kept + logits + widest
