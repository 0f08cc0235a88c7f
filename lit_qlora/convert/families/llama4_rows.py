"""Llama 4: attention within chunks but for some blocks, which rotate nothing, and experts that read weighted tokens."""

from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import ATTENTION_BIAS, row


def unrotated_layers(theirs: Theirs) -> tuple[int, ...]:
    """The blocks that rotate nothing: where no_rope_layers is 0 or, if it is empty, every fourth."""
    blocks, step = range(theirs["num_hidden_layers"]), theirs["no_rope_layer_interval"]
    rotates = theirs.get("no_rope_layers") or [(i + 1) % step != 0 for i in blocks]
    return tuple(i for i in blocks if not rotates[i])


def full_layers(theirs: Theirs) -> tuple[int, ...]:
    """The blocks that see more than their chunk, by layer_types or, if that is absent, the unrotated ones."""
    blocks, types = range(theirs["num_hidden_layers"]), theirs.get("layer_types")
    if types is None:
        return unrotated_layers(theirs)
    if unknown := sorted(set(types) - {"full_attention", "chunked_attention"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i in blocks if types[i] == "full_attention")


def dense_layers(theirs: Theirs) -> tuple[int, ...]:
    """The blocks without experts, by moe_layers or, if that is absent, all but every n-th."""
    blocks, step = range(theirs["num_hidden_layers"]), theirs["interleave_moe_layer_step"]
    mixed = theirs.get("moe_layers")
    return tuple(i for i in blocks if i not in (blocks[step - 1 :: step] if mixed is None else mixed))


SIZES: dict[str, Any] = {
    "num_hidden_layers": 48,
    "hidden_size": 5120,
    "num_attention_heads": 40,
    "intermediate_size": 8192,
    "vocab_size": 202_048,
}
"""What transformers assumes where a text_config leaves it out."""
ROWS: dict[str, Family] = {
    "llama4_text": row(
        weights.LLAMA4,
        {
            **ATTENTION_BIAS,
            "sliding_window": "attention_chunk_size",
            "full_attention_layers": full_layers,
            "no_rope_layers": unrotated_layers,
            "unrotated_scale_beta": lambda theirs: theirs["attn_scale"] if theirs["attn_temperature_tuning"] else 0.0,
            "unrotated_scale_size": "floor_scale",
            "qk_norm": lambda theirs: "rotated" if theirs["use_qk_norm"] else "none",
            "ffn_size": "intermediate_size_mlp",
            "n_expert": "num_local_experts",
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "intermediate_size",
            "shared_expert_size": "intermediate_size",
            "dense_layers": dense_layers,
        },
        fixed={
            "chunked_window": True,
            "rope_interleaved": True,
            "qk_norm_after_rope": True,
            "router": "sigmoid",
            "router_before": True,
        },
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "intermediate_size_mlp": 16_384,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 1,
            "no_rope_layer_interval": 4,
            "attention_chunk_size": 8192,
            "attn_temperature_tuning": True,
            "attn_scale": 0.1,
            "floor_scale": 8192,
            "use_qk_norm": True,
        },
    ),
}
