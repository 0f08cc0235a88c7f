"""Memory of the plain path: the bytes that a micro-batch saves for its backward pass."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from lit_qlora.fused.memory import within_chunks
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE
from lit_qlora.settings import LoRAConfig

MOST_FLASH = 256
"""Features of a head that torch's flash attention takes at most, the only one for queries that share keys."""
READ_ALIKE = {"key": "query", "value": "query", "query_gate": "query", "up": "gate"}
"""Layer -> the one beside it that reads the same input."""


@dataclass(frozen=True)
class Adapted:
    """Sizes of the adapters of a block."""

    inputs: float
    """Features that a token gives to adapted layers."""
    shared: float
    """Of these, features that are saved once although several layers read them, or that are saved without adapters."""
    scaled: float
    """Features that DoRA scales."""
    parameters: int


@dataclass(frozen=True)
class Rows:
    """The rows of a micro-batch."""

    tokens: int
    """Tokens of all rows, padding included."""
    length: int
    """Tokens of a row."""
    packed: bool
    """Whether a row has several documents."""


def adapted_sizes(gpt: GPT, dora: bool) -> list[Adapted]:
    """Measure the adapters of each block."""
    config = gpt.config
    found: list[Adapted] = []
    for i, block in enumerate(gpt.blocks):
        inputs = shared = scaled = 0.0
        parameters = 0
        for path, module in _adapters(block):
            share = config.n_expert_per_token / config.n_expert if ".experts." in path else 1
            parent, _, name = path.rpartition(".")
            inputs += module.in_features * share
            if isinstance(getattr(block.get_submodule(parent), READ_ALIKE.get(name, ""), None), LoRALinear):
                shared += module.in_features * share
            elif name == "projection" and i not in config.state_layers and not config.attention_gate:
                shared += module.in_features  # the output of attention
            scaled += module.out_features * share if dora else 0
            parameters += module.lora_a.numel() + module.lora_b.numel()
        found.append(Adapted(inputs, shared, scaled, parameters))
    return found


def _adapters(block: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    return ((path, module) for path, module in block.named_modules() if isinstance(module, LoRALinear))


def activations(
    gpt: GPT, lora: LoRAConfig, adapted: list[Adapted], itemsize: int, rows: Rows, recompute: bool
) -> float:
    """Estimate the bytes of activations at the peak of the plain path.

    Args:
        adapted: of each block, see adapted_sizes.
        itemsize: bytes of an element of the stream.
    """
    config, tokens = gpt.config, rows.tokens
    each = saved(gpt, lora, adapted, itemsize, rows)
    kept = config.n_layer * tokens * config.n_embd * itemsize + max(each) if recompute else sum(each)
    logits = min(tokens * config.vocab_size, LOGITS_AT_ONCE) * (3 * 4 + itemsize)  # log-softmax and two gradients
    largest = max(config.ffn_size, config.shared_kv_ffn_size, config.n_head * config.head_size) * config.n_embd
    widest = largest * (itemsize + (12 if lora.dora else 0))  # W, B A and their sum in float32
    scores = 2 * 4.0 * max(_scored(config, i, rows) for i in range(config.n_layer))  # two gradients
    return kept + logits + max(widest, 4.0 * tokens * within_chunks(config), tokens * scores)


def saved(gpt: GPT, lora: LoRAConfig, adapted: list[Adapted], itemsize: int, rows: Rows) -> list[float]:
    """Count the bytes that each block saves for its backward pass; see activations.

    It saves inputs of norms and adapted layers (with dropout's mask), attention and MLP products, and the adapters as
    they are multiplied, in 16 bit. Frozen layers save nothing, quantised or not: their weights need no gradient.
    """
    config = gpt.config
    dropped = 2 * config.n_embd * (itemsize + 1) if gpt.dropout else 0  # what a block adds, and masks
    each = []
    for i, of in enumerate(adapted):
        taken = of.inputs * (itemsize + 1) if lora.dropout else (of.inputs - of.shared) * itemsize
        for_token = _normed(config, i, itemsize) + (_fed(config, i) + of.scaled) * itemsize + _routed(config, i)
        for_token += _mixed(config, i, itemsize, rows) + taken + dropped
        each.append(rows.tokens * for_token + (of.parameters * itemsize if itemsize < 4 else 0))
    return each


def _normed(config: ModelConfig, block: int, itemsize: int) -> float:
    """Count the bytes that norms save for a token; those whose weight is beside one compute in float32."""
    before = 1 if config.parallel_residual else 2  # both of a parallel block read the stream
    around = {"before": before, "after": 2, "both": before + 2}[config.norm_position]
    beside = 2 if config.experts_beside and config.has_experts(block) else 0
    features = config.n_embd * (around + beside + (config.per_layer_size > 0)) + 3 * config.per_layer_size
    values = 0
    if block not in config.state_layers and not config.kv_latent_size:
        windowed = config.windowed(block)
        keys, size = 0 if config.reuses(block) else config.kv_heads_of(windowed), config.head_size_of(windowed)
        features += (config.n_head + keys) * size if config.qk_norm != "none" else 0
        values = keys * size if config.value_norm else 0
    return float(features * (4 if config.norm == "rms_plus_one" else itemsize) + values * itemsize)


def _fed(config: ModelConfig, block: int) -> float:
    """Count the elements that an MLP or a mixture of experts saves for a token, if tokens spread evenly over experts.

    An expert's output is saved too, or its input, for the gradient of its share; so is what is added to the stream,
    because torch asks index_add's gradient for its shape.
    """
    products = 3 if "glu" in config.ffn else 1
    if config.has_experts(block):
        beside = config.ffn_size if config.experts_beside else config.shared_expert_size
        chosen = config.n_expert_per_token
        return products * (chosen * config.expert_size + beside) + 2 * chosen * config.n_embd
    return float(products * ((config.shared_kv_ffn_size if config.reuses(block) else 0) or config.ffn_size))


def _routed(config: ModelConfig, block: int) -> float:
    """Count the bytes that a router saves for a token: shares, choices, and the stream where it norms that."""
    if not config.has_experts(block):
        return 0.0
    return 4.0 * (config.n_expert + (config.n_embd if config.router_norm else 0)) + 40 * config.n_expert_per_token


def _mixed(config: ModelConfig, block: int, itemsize: int, rows: Rows) -> float:
    """Estimate the bytes that attention, or a gated delta net, saves for a token.

    Attention with masks has keys and values for each query's head, and a mask in the dtype of the stream; with a cap or
    sinks it has all scores.
    """
    if config.is_conv(block):
        return 7.0 * config.n_embd * itemsize
    if block not in config.state_layers:
        windowed, heads = config.windowed(block), config.n_head
        size, keys = config.head_size_of(windowed), config.kv_heads_of(windowed)
        masked, scored = _masked(config, block, rows), _scored(config, block, rows)
        if _by_torch(config, block, rows):
            return 4.0 * (3 * heads * size + scored) + heads * size * itemsize
        gated = heads if config.attention_gate else 0
        copied = heads if masked or scored else 0 if config.reuses(block) else keys
        weight = 4 * (2 if config.attention_softcap else 1) + itemsize % 4  # float32, and 16 bit for the product
        mask = rows.length if masked and not scored else 0
        return (2.0 * (heads + gated + copied) * size + mask) * itemsize + scored * weight
    heads, keys = config.delta_value_heads, 2 * config.delta_key_heads * config.delta_key_size
    values = heads * config.delta_value_size
    return float((keys + 3 * values) * itemsize + 4 * (keys + 2 * heads * config.delta_key_size + 4 * values))


def _masked(config: ModelConfig, block: int, rows: Rows) -> bool:
    """Tell whether attention gets a mask."""
    window = config.sliding_window if config.windowed(block) else None
    return rows.packed or (window is not None and rows.length > window)


def _by_torch(config: ModelConfig, block: int, rows: Rows) -> bool:
    """Tell whether torch computes attention by products in float32: of large heads that share keys, without a mask."""
    windowed = config.windowed(block)
    shares, size = config.n_head != config.kv_heads_of(windowed), config.head_size_of(windowed)
    return shares and size > MOST_FLASH and not (_masked(config, block, rows) or _capped(config))


def _capped(config: ModelConfig) -> bool:
    return config.attention_softcap is not None or config.attention_sinks


def _scored(config: ModelConfig, block: int, rows: Rows) -> float:
    """Count the scores that attention keeps for a token, where no kernel of torch's computes it in parts."""
    attends = block not in config.state_layers
    return (
        float(config.n_head * rows.length) if attends and (_capped(config) or _by_torch(config, block, rows)) else 0.0
    )
