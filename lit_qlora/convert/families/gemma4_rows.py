"""Gemma 4: blocks without a window have heads of another size, and the last ones may use earlier keys and values."""

from collections.abc import Mapping
from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import ATTENTION_BIAS, gated, row
from lit_qlora.convert.families.rms_rows import GEMMA_DEFAULTS, root_of_width

SIZES = {"head_dim", "num_key_value_heads"}
"""Settings that can differ in blocks without a window."""


def full_layers(theirs: Theirs) -> tuple[int, ...]:
    """The blocks without a window: every sixth if layer_types is absent, and the last in any case."""
    count = theirs["num_hidden_layers"]
    pattern = ["sliding_attention"] * 5 + ["full_attention"]
    types = theirs.get("layer_types") or [pattern[i % 6] for i in range(count)]
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i in range(count) if types[i] == "full_attention" or i == count - 1)


def in_full_layers(theirs: Theirs) -> Mapping[str, Any]:
    """Settings of the blocks without a window: published beside the others, written again as per_layer_config."""
    table = theirs.get("per_layer_config")
    if table is None:
        heads = theirs.get("num_global_key_value_heads") if theirs["attention_k_eq_v"] else None
        return {"head_dim": theirs["global_head_dim"]} | ({"num_key_value_heads": heads} if heads else {})
    own = {int(block): settings for block, settings in table.items()}
    first: Mapping[str, Any] = next(iter(own.values()), {})
    layers = set(full_layers(theirs)) if first else set()
    if set(own) != layers or any(other != first for other in own.values()) or set(first) - SIZES:
        raise UnsupportedError(f"per_layer_config {table!r}")
    return first


def full_head_size(theirs: Theirs) -> int:
    """Features of a head in the blocks without a window, which RoPE turns in proportion."""
    table = (theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}).get("full_attention") or {}
    if table.get("rope_type") != "proportional":
        raise UnsupportedError(f"RoPE scaling {table.get('rope_type')!r} in layers without a sliding window")
    return int(in_full_layers(theirs).get("head_dim") or theirs["head_dim"])


def wide_size(theirs: Theirs) -> int:
    """Inside of the MLPs of blocks that use earlier keys and values."""
    return int(2 * theirs["intermediate_size"] if theirs["use_double_wide_mlp"] else 0)


def of_experts(key: str) -> Reader:
    """A setting of the mixtures of experts, 0 in a model without."""
    return lambda theirs: theirs.get(key) if theirs["enable_moe_block"] else 0


FIELDS: dict[str, Reader] = {
    **ATTENTION_BIAS,
    "embedding_multiplier": root_of_width,
    "ffn": gated("hidden_activation"),
    "logit_softcap": "final_logit_softcapping",
    "sliding_window": "sliding_window",
    "full_attention_layers": full_layers,
    "full_head_size": full_head_size,
    "full_kv_heads": lambda theirs: in_full_layers(theirs).get("num_key_value_heads"),
    "key_is_value": "attention_k_eq_v",
    "shared_kv_layers": "num_kv_shared_layers",
    "shared_kv_ffn_size": wide_size,
    "rope_fraction": "partial_rotary_factor",
    "rope_local_theta": "rope_local_base_freq",
}
FIXED: dict[str, Any] = {
    "norm_position": "both",
    "qk_norm": "head",
    "value_norm": True,
    "attention_scale": 1.0,
    "block_scale": True,
}
DEFAULTS: dict[str, Any] = {
    **GEMMA_DEFAULTS,
    "num_key_value_heads": 4,
    "global_head_dim": 512,
    "attention_k_eq_v": False,
    "num_kv_shared_layers": 0,
    "use_double_wide_mlp": False,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    },
}
REFUSE = {"use_bidirectional_attention": "vision"}  # of images alone, which are never here
ROWS: dict[str, Family] = {
    "gemma4_text": row(
        weights.GEMMA4_TEXT,
        {
            **FIELDS,
            "per_layer_size": "hidden_size_per_layer_input",
            "per_layer_vocab": "vocab_size_per_layer_input",
            "n_expert": of_experts("num_experts"),
            "n_expert_per_token": of_experts("top_k_experts"),
            "expert_size": of_experts("moe_intermediate_size"),
            "experts_beside": "enable_moe_block",
            "router_norm": "enable_moe_block",
            "router_normalized": "enable_moe_block",
        },
        fixed=FIXED,
        defaults={
            **DEFAULTS,
            "max_position_embeddings": 131_072,
            "sliding_window": 512,
            "hidden_size_per_layer_input": 256,
            "vocab_size_per_layer_input": 262_144,
            "enable_moe_block": False,
        },
        refuse=REFUSE,
    ),
    "gemma4_unified_text": row(
        weights.GEMMA4,
        FIELDS,
        fixed=FIXED,
        defaults={**DEFAULTS, "max_position_embeddings": 262_144, "sliding_window": 1024},
        refuse=REFUSE,
    ),
}
