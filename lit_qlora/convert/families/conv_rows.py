"""Families whose blocks are short convolutions but for some, which are attention."""

from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import row


def conv_layers(theirs: Theirs) -> tuple[int, ...]:
    """LFM2's blocks without attention, from layer_types or, in its first files, from the others."""
    blocks = range(theirs["num_hidden_layers"])
    full = theirs.get("full_attn_idxs")
    types = theirs.get("layer_types") or ["full_attention" if full is None or i in full else "conv" for i in blocks]
    if unknown := sorted(set(types) - {"full_attention", "conv"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i in blocks if types[i] == "conv")


def inner_size(theirs: Theirs) -> int:
    """Inside of LFM2's MLPs: two thirds of what config.json says, rounded up."""
    size = theirs.get("block_ff_dim") or theirs["intermediate_size"]
    if not theirs["block_auto_adjust_ff_dim"]:
        return int(size)
    size = int(2 * size / 3)
    if theirs["block_ffn_dim_multiplier"] is None:
        return size
    step = theirs["block_multiple_of"]
    return int(-(-int(theirs["block_ffn_dim_multiplier"] * size) // step) * step)


def tied(theirs: Theirs) -> bool:
    """LFM2's first files have another name for tie_word_embeddings."""
    return bool(theirs.get("tie_embedding", theirs["tie_word_embeddings"]))


CONV: dict[str, Reader] = {
    "norm_eps": "norm_eps",
    "tied_head": tied,
    "conv_layers": conv_layers,
    "conv_size": "conv_L_cache",
    "conv_bias": "conv_bias",
}
CONV_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 8,
    "max_position_embeddings": 128_000,
    "norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "rope_theta": 1e6,
    "conv_bias": False,
    "conv_L_cache": 3,
}
ROWS: dict[str, Family] = {
    "lfm2": row(
        weights.LFM2,
        {**CONV, "ffn_size": inner_size},
        fixed={"qk_norm": "head"},
        defaults={
            **CONV_DEFAULTS,
            "intermediate_size": 12_288,
            "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
        },
    ),
    "lfm2_moe": row(
        weights.LFM2_MOE,
        {
            **CONV,
            "n_expert": "num_experts",
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
            "dense_layers": lambda theirs: tuple(range(min(theirs["num_dense_layers"], theirs["num_hidden_layers"]))),
            "router_correction": "use_expert_bias",
            "router_normalized": "norm_topk_prob",
            "router_scale": "routed_scaling_factor",
        },
        fixed={"qk_norm": "head", "router": "sigmoid"},
        defaults={
            **CONV_DEFAULTS,
            "intermediate_size": 7168,
            "moe_intermediate_size": 1792,
            "num_experts_per_tok": 4,
            "num_experts": 32,
            "num_dense_layers": 2,
            "use_expert_bias": True,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.0,
        },
    ),
}
