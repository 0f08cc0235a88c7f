"""Families with mixtures of experts that route as DeepSeek does, from V2 on."""

from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import (
    ATTENTION_BIAS,
    LATENT,
    PARTIAL,
    every,
    exaone_unrotated,
    qwen_window,
    row,
    windows,
)


def deepseek_groups(theirs: Theirs) -> int:
    """DeepSeek-V2: groups count only for one way to choose."""
    if theirs["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UnsupportedError(f"topk_method {theirs['topk_method']!r}")
    return int(theirs["n_group"]) if theirs["topk_method"] == "group_limited_greedy" else 1


def deepseek_groups_kept(theirs: Theirs) -> int:
    """DeepSeek-V2: of how many groups experts are taken."""
    return int(theirs["topk_group"]) if deepseek_groups(theirs) > 1 else 1


def dense_blocks(theirs: Theirs) -> tuple[int, ...]:
    """The blocks without experts, by mlp_layer_types or, where config.json has none, the first so many."""
    blocks = range(theirs["num_hidden_layers"])
    types = theirs.get("mlp_layer_types")
    if types is None:
        return tuple(blocks[: theirs["first_k_dense_replace"]])
    if unknown := sorted(set(types) - {"dense", "sparse"}):
        raise UnsupportedError(f"mlp_layer_types {unknown}")
    return tuple(i for i in blocks if types[i] == "dense")


def afmoe_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """Trinity rotates in blocks with a window alone."""
    full: Any = windows(every("global_attn_every_n_layers", 4))["full_attention_layers"]
    layers: tuple[int, ...] = full({**theirs, "sliding_window": 1})
    return layers


ROUTED: dict[str, Reader] = {
    "n_expert": "n_routed_experts",
    "n_expert_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * (theirs["n_shared_experts"] or 0),
    "dense_layers": dense_blocks,
    "router_scale": "routed_scaling_factor",
}
NORMALIZED: dict[str, Reader] = {"router_normalized": "norm_topk_prob"}
GROUPS: dict[str, Reader] = {"router_groups": "n_group", "router_groups_kept": "topk_group"}
DEEPSEEK: dict[str, Reader] = {**LATENT, **ROUTED}
DEEPSEEK_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
SIGMOID = {"router": "sigmoid", "router_correction": True}
ROUTED_DEFAULTS = {"n_group": 1, "topk_group": 1, "norm_topk_prob": True, "routed_scaling_factor": 1.0}
ROWS: dict[str, Family] = {
    "deepseek_v2": row(
        weights.DEEPSEEK,
        {**DEEPSEEK, "router_groups": deepseek_groups, "router_groups_kept": deepseek_groups_kept},
        fixed={"rope_interleaved": True},
        defaults={
            **DEEPSEEK_DEFAULTS,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 1407,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.0,
            "topk_method": "greedy",
        },
        refuse={"norm_topk_prob": False, "scoring_func": "softmax", "moe_layer_freq": 1, "mlp_bias": False},
    ),
    "deepseek_v3": row(
        weights.DEEPSEEK,
        {
            **DEEPSEEK,
            **NORMALIZED,
            **GROUPS,
            "rope_interleaved": "rope_interleave",
        },
        fixed=SIGMOID,
        defaults={
            **DEEPSEEK_DEFAULTS,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "moe_intermediate_size": 2048,
            "num_experts_per_tok": 8,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "routed_scaling_factor": 2.5,
        },
        refuse={"scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_layer_freq": 1},
        further_layers=True,
    ),
    "mistral4": row(
        weights.MISTRAL4,
        {
            **DEEPSEEK,
            **NORMALIZED,
            "rope_interleaved": "rope_interleave",
            "rope_fraction": lambda theirs: None,  # of the whole head: what qk_rope_head_dim says
            "query_scale_beta": "llama_4_scaling_beta",
        },
        defaults={
            **ROUTED_DEFAULTS,
            "max_position_embeddings": 1_048_576,
            "first_k_dense_replace": 0,
            "kv_lora_rank": 256,
            "q_lora_rank": 1024,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "moe_intermediate_size": 2048,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "rope_interleave": True,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 10_000.0,
                "factor": 128.0,
                "original_max_position_embeddings": 8192,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        refuse={"n_group": 1, "topk_group": 1},
    ),
    "glm4_moe": row(
        weights.GLM4_MOE,
        {
            **PARTIAL,
            **ROUTED,
            **NORMALIZED,
            **GROUPS,
            "qkv_bias": "attention_bias",
            "qk_norm": lambda theirs: "head" if theirs["use_qk_norm"] else "none",
        },
        fixed=SIGMOID,
        defaults={
            **ROUTED_DEFAULTS,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1408,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "use_qk_norm": False,
        },
        further_layers=True,
    ),
    "glm4_moe_lite": row(
        weights.DEEPSEEK,
        {**DEEPSEEK, **NORMALIZED, **GROUPS, "rope_interleaved": "rope_interleave"},
        fixed=SIGMOID,
        defaults={
            **ROUTED_DEFAULTS,
            "max_position_embeddings": 202_752,
            "rms_norm_eps": 1e-5,
            "kv_lora_rank": 512,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 192,
            "qk_rope_head_dim": 64,
            "v_head_dim": 256,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1536,
            "n_routed_experts": 64,
            "n_shared_experts": 1,
            "num_experts_per_tok": 4,
            "routed_scaling_factor": 1.8,
            "rope_interleave": True,
        },
        refuse={"topk_method": "noaux_tc"},
        further_layers=True,
    ),
    "dots1": row(
        weights.GLM4_MOE,
        {**ATTENTION_BIAS, **ROUTED, **NORMALIZED, **GROUPS, **windows(qwen_window)},
        fixed={**SIGMOID, "qk_norm": "head"},
        defaults={
            **ROUTED_DEFAULTS,
            "norm_topk_prob": False,
            "num_key_value_heads": 32,
            "max_window_layers": 62,
            "sliding_window": 4096,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 1408,
            "n_shared_experts": None,
        },
    ),
    "solar_open": row(
        weights.LLAMA_MOE,
        {
            **PARTIAL,
            **ROUTED,
            **NORMALIZED,
            **GROUPS,
            "qkv_bias": "attention_bias",
            "ffn_size": "moe_intermediate_size",
        },
        fixed=SIGMOID,
        defaults={
            **ROUTED_DEFAULTS,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "first_k_dense_replace": 0,
            "moe_intermediate_size": 1280,
            "n_routed_experts": 128,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
        },
        refuse={"first_k_dense_replace": 0, "use_qk_norm": False},
    ),
    "exaone_moe": row(
        weights.EXAONE_MOE,
        {
            **ROUTED,
            **NORMALIZED,
            **GROUPS,
            **windows(every("sliding_window_pattern", 4)),
            "no_rope_layers": exaone_unrotated,
            "n_expert": "num_experts",
            "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * theirs["num_shared_experts"],
        },
        fixed={**SIGMOID, "qk_norm": "head"},
        defaults={
            **ROUTED_DEFAULTS,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "num_key_value_heads": 32,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1024,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "routed_scaling_factor": 2.5,
        },
        kept=("mtp",),
    ),
    "hy_v3": row(
        weights.HY_V3,
        {
            **ATTENTION_BIAS,
            **ROUTED,
            "n_expert": "num_experts",
            "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * theirs["num_shared_experts"],
            "router_scale": "router_scaling_factor",
        },
        fixed={**SIGMOID, "qk_norm": "head", "router_normalized": True},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rope_theta": 11_158_840.0,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 1536,
            "num_experts": 192,
            "num_experts_per_tok": 8,
            "num_shared_experts": 1,
            "router_scaling_factor": 2.826,
        },
        refuse={"mlp_bias": False},
        further_layers=True,
    ),
    "afmoe": row(
        weights.AFMOE,
        {
            **ROUTED,
            **windows(every("global_attn_every_n_layers", 4)),
            "no_rope_layers": afmoe_unrotated,
            "embedding_multiplier": lambda theirs: theirs["hidden_size"] ** 0.5 if theirs["mup_enabled"] else 1.0,
            "n_expert": "num_experts",
            "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * theirs["num_shared_experts"],
            "dense_layers": lambda theirs: tuple(range(theirs["num_dense_layers"])),
            "router_scale": "route_scale",
        },
        fixed={
            **SIGMOID,
            "norm_position": "both",
            "qk_norm": "head",
            "attention_gate": True,
            "router_normalized": True,
        },
        defaults={
            "max_position_embeddings": 16_384,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "sliding_window": 1024,
            "global_attn_every_n_layers": 4,
            "mup_enabled": False,
            "moe_intermediate_size": 1408,
            "num_experts": 64,
            "num_experts_per_tok": 6,
            "num_shared_experts": 2,
            "num_dense_layers": 1,
            "route_scale": 1.0,
        },
        refuse={"attention_bias": False, "score_func": "sigmoid", "route_norm": True, "n_group": 1, "topk_group": 1},
    ),
}
