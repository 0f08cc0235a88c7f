"""Families with other mixtures of experts."""

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import (
    ATTENTION_BIAS,
    WINDOW,
    every,
    if_used,
    row,
    windows,
    without_window,
)
from lit_qlora.convert.families.rms_rows import GRANITE, GRANITE_DEFAULTS, hunyuan_theta
from lit_qlora.convert.families.routed_rows import NORMALIZED, SIGMOID, dense_blocks


def qwen_dense_layers(theirs: Theirs) -> tuple[int, ...]:
    """Qwen's blocks without experts."""
    named, step = theirs.get("mlp_only_layers") or (), theirs["decoder_sparse_step"]
    return tuple(i for i in range(theirs["num_hidden_layers"]) if i in named or (i + 1) % step)


def count_experts(theirs: Theirs) -> int:
    """The number of experts, by a key that versions of transformers name otherwise."""
    return int(theirs.get("num_local_experts") or theirs["num_experts"])


def minimax_fraction(theirs: Theirs) -> float | None:
    """MiniMax M2: the rotated part of a head, as a number of features in the first files."""
    size: int | None = theirs.get("rotary_dim")
    return size / theirs["head_dim"] if size else theirs.get("partial_rotary_factor")


def same_everywhere(key: str) -> Reader:
    """Hunyuan: a number, or a list of one for each block."""

    def read(theirs: Theirs) -> int:
        values = theirs[key] if isinstance(theirs[key], list) else [theirs[key]]
        if len(set(values)) != 1:
            raise UnsupportedError(f"{key} {values}")
        return int(values[0])

    return read


def ernie_dense_layers(theirs: Theirs) -> tuple[int, ...]:
    """ERNIE 4.5: experts are in every n-th block from one to another."""
    blocks = range(theirs["num_hidden_layers"])
    last = theirs["moe_layer_end_index"] if theirs["moe_layer_end_index"] != -1 else len(blocks) - 1
    inside = range(theirs["moe_layer_start_index"], last + 1)
    return tuple(i for i in blocks if i not in inside or (i + 1) % theirs["moe_layer_interval"])


def cohere_full(theirs: Theirs, i: int) -> bool:
    """Cohere 2 MoE: the pattern of windows begins anew behind the first blocks, which are dense."""
    first = theirs["first_k_dense_replace"]
    if i < first:
        return bool((i + 1) % theirs["prefix_dense_sliding_window_pattern"] == 0)
    return bool((i - first + 1) % theirs["sliding_window_pattern"] == 0)


def cohere_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """Cohere 2 MoE rotates where there is a window, and in dense blocks if all of them are without one."""
    rotated = dense_blocks(theirs) if theirs["prefix_dense_sliding_window_pattern"] == 1 else ()
    return tuple(i for i in without_window(theirs, cohere_full) if i not in rotated)


def cohere_shared(theirs: Theirs) -> int:
    """Cohere 2 MoE: all shared experts are one; their mean with the others is not what this model has."""
    if theirs["num_shared_experts"] and theirs["shared_expert_combination_strategy"] != "sum":
        raise UnsupportedError(f"shared_expert_combination_strategy {theirs['shared_expert_combination_strategy']!r}")
    return int(theirs["num_shared_experts"] * theirs["intermediate_size"])


def phimoe_attention_factor(theirs: Theirs) -> float | None:
    """Phi-3.5-MoE: the factor of cosines and sines, one for short texts and one for long ones.

    Beyond the original context its own code takes long_factor, as this model does; transformers 5.23 does not.
    """
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    short, long = rope.get("short_mscale"), rope.get("long_mscale")
    if short != long:
        raise UnsupportedError(f"short_mscale {short} and long_mscale {long}")
    return None if short is None else float(short)


ONE_SIZE: dict[str, Reader] = {"n_expert_per_token": "num_experts_per_tok", "expert_size": "intermediate_size"}
GRANITE_MOE: dict[str, Reader] = {**GRANITE, **ONE_SIZE, "n_expert": "num_local_experts"}
GRANITE_MOE_DEFAULTS = {**GRANITE_DEFAULTS, "num_local_experts": 8, "num_experts_per_tok": 2}
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
    "qwen2_moe": row(
        weights.QWEN2_MOE,
        {
            **NORMALIZED,
            **if_used(windows(lambda theirs, i: i % 2 == 1 or i >= theirs["max_window_layers"])),
            "qkv_bias": "qkv_bias",
            "n_expert": count_experts,
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
            "shared_expert_size": "shared_expert_intermediate_size",
            "dense_layers": qwen_dense_layers,
        },
        fixed={"shared_expert_gate": True},
        defaults={
            "max_position_embeddings": 32_768,
            "max_window_layers": 28,
            "sliding_window": 4096,
            "qkv_bias": True,
            "num_key_value_heads": 16,
            "decoder_sparse_step": 1,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "norm_topk_prob": False,
        },
    ),
    "qwen3_moe": row(
        weights.QWEN3_MOE,
        {
            **ATTENTION_BIAS,
            **if_used(WINDOW),
            "n_expert": count_experts,
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
    "olmoe": row(
        weights.QWEN3_MOE,
        {
            **ATTENTION_BIAS,
            **ONE_SIZE,
            **NORMALIZED,
            "n_expert": count_experts,
        },
        fixed={"qk_norm": "full"},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        refuse={"clip_qkv": None},
    ),
    "flex_olmo": row(
        weights.FLEX_OLMO,
        {
            **ATTENTION_BIAS,
            **ONE_SIZE,
            **NORMALIZED,
            "n_expert": count_experts,
        },
        fixed={"qk_norm": "full", "norm_position": "after"},
        defaults={
            "max_position_embeddings": 4096,
            "rope_theta": 500_000.0,
            "num_experts": 7,
            "num_experts_per_tok": 5,
            "norm_topk_prob": False,
        },
    ),
    "minimax_m2": row(
        weights.MINIMAX_M2,
        {**ONE_SIZE, "rope_fraction": minimax_fraction, "n_expert": "num_local_experts"},
        fixed={**SIGMOID, "router_normalized": True, "qk_norm": "full"},
        defaults={
            "max_position_embeddings": 196_608,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "rope_theta": 5e6,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
        },
        refuse={"scoring_func": "sigmoid", "use_qk_norm": True, "qk_norm_type": "per_layer", "use_routing_bias": True}
        | {"shared_intermediate_size": 0},
    ),
    "hunyuan_v1_moe": row(
        weights.HUNYUAN_MOE,
        {
            **ATTENTION_BIAS,
            "rope_theta": hunyuan_theta,
            "n_expert": same_everywhere("num_experts"),
            "n_expert_per_token": same_everywhere("moe_topk"),
            "expert_size": "intermediate_size",
            "shared_expert_size": "intermediate_size",
        },
        fixed={"qk_norm": "head", "qk_norm_after_rope": True, "router_normalized": True},
        defaults={"rms_norm_eps": 1e-5, "num_experts": 1, "moe_topk": 1},
        refuse={"use_cla": False, "use_qk_norm": True},
    ),
    "granitemoe": row(
        weights.GRANITE_MOE,
        GRANITE_MOE,
        fixed={"router": "softmax_chosen"},
        defaults=GRANITE_MOE_DEFAULTS,
    ),
    "granitemoeshared": row(
        weights.GRANITE_MOE_SHARED,
        {**GRANITE_MOE, "shared_expert_size": "shared_intermediate_size"},
        fixed={"router": "softmax_chosen"},
        defaults={**GRANITE_MOE_DEFAULTS, "shared_intermediate_size": 0},
    ),
    "ernie4_5_moe": row(
        weights.ERNIE4_5_MOE,
        {
            "qkv_bias": "use_bias",
            "projection_bias": "use_bias",
            "mlp_bias": "use_bias",
            "n_expert": "moe_num_experts",
            "n_expert_per_token": "moe_k",
            "expert_size": "moe_intermediate_size",
            "shared_expert_size": lambda theirs: theirs["moe_intermediate_size"] * theirs["moe_num_shared_experts"],
            "dense_layers": ernie_dense_layers,
        },
        fixed={"rope_interleaved": True, "router_normalized": True, "router_correction": True},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "use_bias": False,
            "num_key_value_heads": 4,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": -1,
            "moe_layer_interval": 1,
        },
        refuse={"moe_norm_min": 1e-12, "use_bias": False},
        kept=("mtp_block", "mtp_emb_norm", "mtp_hidden_norm", "mtp_linear_proj"),
    ),
    "mellum": row(
        weights.QWEN3_MOE,
        {
            **ATTENTION_BIAS,
            **NORMALIZED,
            **windows(lambda theirs, i: True),
            "rope_local_theta": "rope_local_base_freq",
            "n_expert": count_experts,
            "n_expert_per_token": "num_experts_per_tok",
            "expert_size": "moe_intermediate_size",
            "dense_layers": dense_blocks,
        },
        fixed={"qk_norm": "head"},
        defaults={
            "max_position_embeddings": 131_072,
            "head_dim": 128,
            "num_key_value_heads": 4,
            "sliding_window": 1024,
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 10_000.0,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 896,
            "norm_topk_prob": True,
            "first_k_dense_replace": 0,
        },
        kept=("mtp",),
    ),
    "cohere2_moe": row(
        weights.LLAMA_MOE,
        {
            **ATTENTION_BIAS,
            **ONE_SIZE,
            **NORMALIZED,
            **windows(cohere_full),
            "norm": lambda theirs: "layer_no_bias" if theirs.get("rms_norm_eps") is None else "rms",
            "norm_eps": lambda theirs: theirs.get("rms_norm_eps") or theirs["layer_norm_eps"],
            "no_rope_layers": cohere_unrotated,
            "logit_multiplier": "logit_scale",
            "n_expert": "num_experts",
            "shared_expert_size": cohere_shared,
            "dense_layers": dense_blocks,
            "ffn_size": lambda theirs: theirs.get("prefix_dense_intermediate_size") or theirs["intermediate_size"],
            "router": lambda theirs: {"softmax": "softmax_chosen"}.get(
                theirs["expert_selection_fn"], theirs["expert_selection_fn"]
            ),
        },
        fixed={"parallel_residual": True, "shared_norm": True, "rope_interleaved": True},
        defaults={
            "max_position_embeddings": 8192,
            "head_dim": 128,
            "rms_norm_eps": None,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "first_k_dense_replace": 0,
            "prefix_dense_sliding_window_pattern": 1,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 0,
            "shared_expert_combination_strategy": "average",
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
        },
    ),
    "phimoe": row(
        weights.PHIMOE,
        {
            **ATTENTION_BIAS,
            **WINDOW,
            **ONE_SIZE,
            "head_bias": "lm_head_bias",
            "n_expert": "num_local_experts",
            "router_tolerance": lambda theirs: 2 * theirs["router_jitter_noise"],
            "rope_attention_factor": phimoe_attention_factor,
        },
        fixed={"norm": "layer", "router": "softmax_near"},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "lm_head_bias": False,
        },
        refuse={"num_experts_per_tok": 2},
    ),
}
