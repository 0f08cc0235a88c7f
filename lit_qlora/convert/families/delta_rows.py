"""Families whose blocks are gated delta nets but for every fourth, which is attention with an output gate."""

from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.expert_rows import qwen_dense_layers
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import ATTENTION_BIAS, PARTIAL, row


def delta_layers(theirs: Theirs) -> tuple[int, ...]:
    """Qwen3-Next's blocks without attention, from layer_types or, where config.json has none, from an interval."""
    blocks, step = range(theirs["num_hidden_layers"]), theirs["full_attention_interval"]
    types = theirs.get("layer_types") or ["linear_attention" if (i + 1) % step else "full_attention" for i in blocks]
    if unknown := sorted(set(types) - {"full_attention", "linear_attention"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i in blocks if types[i] == "linear_attention")


DELTA: dict[str, Reader] = {
    **ATTENTION_BIAS,
    **PARTIAL,
    "delta_layers": delta_layers,
    "delta_key_heads": "linear_num_key_heads",
    "delta_value_heads": "linear_num_value_heads",
    "delta_key_size": "linear_key_head_dim",
    "delta_value_size": "linear_value_head_dim",
    "delta_conv_size": "linear_conv_kernel_dim",
}
DELTA_FIXED: dict[str, Any] = {"norm": "rms_plus_one", "qk_norm": "head", "attention_gate": True}
DELTA_DEFAULTS: dict[str, Any] = {
    "max_position_embeddings": 32_768,
    "full_attention_interval": 4,
    "partial_rotary_factor": 0.25,
    "head_dim": 256,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
}
DELTA_REFUSE: dict[str, Any] = {
    "hidden_act": "silu",  # of the convolution too
    "attn_output_gate": True,
    "output_gate_type": "swish",
    "mamba_ssm_dtype": "float32",
}
EXPERTS: dict[str, Reader] = {
    "n_expert": lambda theirs: theirs.get("num_local_experts") or theirs["num_experts"],
    "n_expert_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_expert_size": "shared_expert_intermediate_size",
}
EXPERTS_FIXED = {**DELTA_FIXED, "shared_expert_gate": True}
EXPERTS_DEFAULTS = {
    **DELTA_DEFAULTS,
    "num_key_value_heads": 2,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}
ROWS: dict[str, Family] = {
    "qwen3_next": row(
        weights.QWEN3_NEXT,
        {**DELTA, **EXPERTS, "dense_layers": qwen_dense_layers, "router_normalized": "norm_topk_prob"},
        fixed=EXPERTS_FIXED,
        defaults={
            **EXPERTS_DEFAULTS,
            "intermediate_size": 5632,
            "decoder_sparse_step": 1,
            "num_experts_per_tok": 10,
            "num_experts": 512,
            "norm_topk_prob": True,
        },
        refuse=DELTA_REFUSE,
        kept=("mtp",),
    ),
    "qwen3_5_text": row(
        weights.QWEN3_5,
        DELTA,
        fixed=DELTA_FIXED,
        defaults={**DELTA_DEFAULTS, "num_key_value_heads": 4},
        refuse=DELTA_REFUSE,
        kept=("mtp",),
    ),
    "qwen3_5_moe_text": row(
        weights.QWEN3_5_MOE,
        {**DELTA, **EXPERTS, "ffn_size": "moe_intermediate_size"},  # no block is dense
        fixed={**EXPERTS_FIXED, "router_normalized": True},
        defaults={**EXPERTS_DEFAULTS, "num_experts_per_tok": 8, "num_experts": 256},
        refuse={**DELTA_REFUSE, "mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True},
        kept=("mtp",),
    ),
}
