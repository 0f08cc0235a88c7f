"""Families with mixtures of experts."""

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError, mscale
from lit_qlora.convert.families.readers import ATTENTION_BIAS, WINDOW, every, if_used, row, windows


def qwen_dense_layers(theirs: Theirs) -> tuple[int, ...]:
    """Qwen's blocks without experts."""
    named, step = theirs.get("mlp_only_layers") or (), theirs["decoder_sparse_step"]
    return tuple(i for i in range(theirs["num_hidden_layers"]) if i in named or (i + 1) % step)


def deepseek_scale(theirs: Theirs) -> float:
    """DeepSeek: yarn's sharpening of the scores, which others have in their cosines."""
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    scale = deepseek_head_size(theirs) ** -0.5
    if rope.get("rope_type", rope.get("type", "default")) == "default" or not rope.get("mscale_all_dim"):
        return float(scale)
    return float(scale * mscale(rope["factor"], rope["mscale_all_dim"]) ** 2)


def deepseek_head_size(theirs: Theirs) -> int:
    """DeepSeek: a head's own features and the rotated ones."""
    return int(theirs["qk_nope_head_dim"] + theirs["qk_rope_head_dim"])


def deepseek_groups(theirs: Theirs) -> int:
    """DeepSeek-V2: groups count only for one way to choose."""
    if theirs["topk_method"] not in ("greedy", "group_limited_greedy"):
        raise UnsupportedError(f"topk_method {theirs['topk_method']!r}")
    return int(theirs["n_group"]) if theirs["topk_method"] == "group_limited_greedy" else 1


def deepseek_groups_kept(theirs: Theirs) -> int:
    """DeepSeek-V2: of how many groups experts are taken."""
    return int(theirs["topk_group"]) if deepseek_groups(theirs) > 1 else 1


DEEPSEEK: dict[str, Reader] = {
    **ATTENTION_BIAS,
    "n_kv_head": "num_attention_heads",
    "head_size": deepseek_head_size,
    "attention_scale": deepseek_scale,
    "kv_latent_size": "kv_lora_rank",
    "q_latent_size": "q_lora_rank",
    "latent_rope_size": "qk_rope_head_dim",
    "latent_value_size": "v_head_dim",
    "n_expert": "n_routed_experts",
    "n_expert_per_token": "num_experts_per_tok",
    "expert_size": "moe_intermediate_size",
    "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * (theirs["n_shared_experts"] or 0),
    "dense_layers": lambda theirs: tuple(range(min(theirs["first_k_dense_replace"], theirs["num_hidden_layers"]))),
    "router_scale": "routed_scaling_factor",
}
DEEPSEEK_DEFAULTS = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}
ROWS: dict[str, Family] = {
    "mixtral": row(
        weights.MIXTRAL,
        {
            **WINDOW,
            "n_expert": "num_local_experts",
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "intermediate_size",
        },
        fixed={"router_normalized": True},
        defaults={
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": row(
        weights.QWEN3_MOE,
        {
            **ATTENTION_BIAS,
            **if_used(WINDOW),
            "n_expert": lambda theirs: theirs.get("num_local_experts") or theirs["num_experts"],  # one in each version
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
            "dense_layers": qwen_dense_layers,
            "router_normalized": "norm_topk_prob",
        },
        fixed={"qk_norm": "head"},
        defaults={
            "max_position_embeddings": 32_768,
            "sliding_window": 4096,
            "num_key_value_heads": 4,
            "intermediate_size": 6144,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "norm_topk_prob": False,
        },
    ),
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
            "rope_interleaved": "rope_interleave",
            "router_normalized": "norm_topk_prob",
            "router_groups": "n_group",
            "router_groups_kept": "topk_group",
        },
        fixed={"router": "sigmoid", "router_correction": True},
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
    "gpt_oss": row(
        weights.GPT_OSS,
        {
            **ATTENTION_BIAS,
            **windows(every(None, 2)),
            "n_expert": "num_local_experts",
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "intermediate_size",
            "ffn": lambda theirs: "swiglu_clamped",
        },
        fixed={"attention_sinks": True, "mlp_bias": True, "router": "softmax_chosen", "router_bias": True},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 150_000.0,
            "head_dim": 64,
            "num_key_value_heads": 8,
            "sliding_window": 128,
            "attention_bias": True,
            "num_local_experts": 128,
            "num_experts_per_tok": 4,
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 4096,
            },
        },
        refuse={"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "hidden_act": "silu"},
        unpacks=("mxfp4",),
    ),
}
