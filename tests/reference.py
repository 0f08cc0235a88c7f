"""Small random models of transformers, one case for everything that a family uses."""

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

SMALL = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
WIDE_HEADS = {**GROUPED, "head_dim": 32}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
# Four blocks of which the windowed ones see eight tokens.
WINDOWS = {"num_hidden_layers": 4, "sliding_window": 8}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}

LATENT = {
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "moe_intermediate_size": 48,
    "n_routed_experts": 4,
    "n_shared_experts": 2,
    "num_experts_per_tok": 2,
    "num_key_value_heads": 4,
}


def longrope(size: int) -> dict[str, Any]:
    """Factors for `size` pairs of features."""
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1 + i / 10 for i in range(size)],
        "long_factor": [2 + i / 2 for i in range(size)],
    }


# Each case switches on something that its family uses.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-gqa": ("llama", GROUPED),
    "llama-mqa-head_dim": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-linear-rope": ("llama", {"rope_parameters": LINEAR}),
    "llama-dynamic-rope": ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3_ROPE}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-yarn-settings": (
        "llama",
        {"rope_parameters": {**YARN, "beta_fast": 4.0, "beta_slow": 0.5, "truncate": False, "attention_factor": 1.3}},
    ),
    "llama-yarn-mscale": ("llama", {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.2}}),
    "llama-longrope": (
        "llama",
        {"rope_parameters": {**longrope(8), "original_max_position_embeddings": 14, "factor": 4.0}},
    ),
    "mistral": ("mistral", {**GROUPED, "sliding_window": None}),
    "mistral-window": ("mistral", {**WIDE_HEADS, "sliding_window": 8}),
    "ministral": ("ministral", {**WIDE_HEADS, **WINDOWS, "layer_types": ["sliding_attention", "full_attention"] * 2}),
    "ministral3": (
        "ministral3",
        {**WIDE_HEADS, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.5}},
    ),
    "ministral3-window": (
        "ministral3",
        {
            **WIDE_HEADS,
            "sliding_window": 8,
            "max_position_embeddings": 16,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "llama_4_scaling_beta": 0.1,
                "original_max_position_embeddings": 6,
            },
        },
    ),
    "mixtral": ("mixtral", {**GROUPED, **EXPERTS, "sliding_window": 8}),
    "qwen2": ("qwen2", GROUPED),
    "qwen2-tied": ("qwen2", {**GROUPED, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**GROUPED, **WINDOWS, "use_sliding_window": True, "max_window_layers": 2}),
    "qwen2-yarn": ("qwen2", {**GROUPED, "rope_parameters": YARN}),
    "qwen3": ("qwen3", WIDE_HEADS),
    "qwen3-window-bias": (
        "qwen3",
        {**WIDE_HEADS, **WINDOWS, "use_sliding_window": True, "max_window_layers": 1, "attention_bias": True},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {**WIDE_HEADS, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "norm_topk_prob": True},
    ),
    "qwen3_moe-dense-layers": (
        "qwen3_moe",
        {
            **WIDE_HEADS,
            **WINDOWS,
            "use_sliding_window": True,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "norm_topk_prob": False,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [3],
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential-tanh": ("gpt_neox", {"use_parallel_residual": False, "hidden_act": "gelu_fast"}),
    "gpt_neox-no-bias": ("gpt_neox", {"attention_bias": False}),
    "gpt_neox-linear-rope": ("gpt_neox", {"rope_parameters": {**LINEAR, "partial_rotary_factor": 0.5}}),
    "stablelm": ("stablelm", {"num_key_value_heads": 4}),
    "stablelm-bias": ("stablelm", {**GROUPED, "use_qkv_bias": True, "tie_word_embeddings": True}),
    "stablelm-parallel-qk-norm": ("stablelm", {**GROUPED, "use_parallel_residual": True, "qk_layernorm": True}),
    "falcon-7b": ("falcon", {"ffn_hidden_size": 112}),
    "falcon-40b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-11b": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    "falcon-sequential-bias": (
        "falcon",
        {"parallel_attn": False, "multi_query": False, "bias": True, "tie_word_embeddings": False},
    ),
    "phi": ("phi", {}),
    "phi-qk-norm": ("phi", {**GROUPED, "qk_layernorm": True, "partial_rotary_factor": 0.25}),
    "phi3": ("phi3", {**GROUPED, "sliding_window": 8}),
    "phi3-longrope": (
        "phi3",
        {
            **GROUPED,
            "rope_parameters": {**longrope(6), "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 14,
            "tie_word_embeddings": True,
        },
    ),
    "gemma": ("gemma", {**WIDE_HEADS}),
    "gemma2": ("gemma2", {**WIDE_HEADS, **WINDOWS, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0}),
    "gemma3_text": (
        "gemma3_text",
        {
            **WIDE_HEADS,
            **WINDOWS,
            "query_pre_attn_scalar": 24,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "rope_parameters": {
                "full_attention": {**LINEAR, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            },
        },
    ),
    "olmo": ("olmo", {**GROUPED, "clip_qkv": 2.0, "attention_bias": True}),
    "olmo2": ("olmo2", {**GROUPED, "attention_bias": True}),
    "olmo3": (
        "olmo3",
        {
            **GROUPED,
            **WINDOWS,
            "rope_parameters": {
                "full_attention": {**YARN, "rope_theta": 5e5},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
            },
        },
    ),
    "smollm3": ("smollm3", {**GROUPED, "num_hidden_layers": 4}),
    "smollm3-window": (
        "smollm3",
        {**GROUPED, **WINDOWS, "use_sliding_window": True, "no_rope_layer_interval": 2, "attention_bias": True},
    ),
    "granite": (
        "granite",
        {
            **GROUPED,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    "ernie4_5": ("ernie4_5", WIDE_HEADS),
    "ernie4_5-bias": ("ernie4_5", {**WIDE_HEADS, "use_bias": True, "tie_word_embeddings": False}),
    "glm": ("glm", WIDE_HEADS),
    "glm4": ("glm4", WIDE_HEADS),
    "glm4-no-bias": ("glm4", {**WIDE_HEADS, "attention_bias": False, "partial_rotary_factor": 0.25}),
    "starcoder2": ("starcoder2", {**GROUPED, "sliding_window": 8}),
    "gpt2": ("gpt2", {"n_inner": 112}),
    "seed_oss": ("seed_oss", {**WIDE_HEADS, "attention_out_bias": True, "mlp_bias": True}),
    "exaone4": ("exaone4", {**GROUPED, **WINDOWS, "sliding_window_pattern": 4}),
    "exaone4-no-window": (
        "exaone4",
        {**GROUPED, "sliding_window": None, "layer_types": ["full_attention"] * 2, "rope_parameters": LLAMA3_ROPE},
    ),
    "cohere": ("cohere", {**GROUPED, "logit_scale": 0.3}),
    "cohere-qk-norm": ("cohere", {**GROUPED, "use_qk_norm": True, "attention_bias": True}),
    "cohere2": ("cohere2", {**GROUPED, **WINDOWS, "logit_scale": 0.25}),
    "hunyuan": (
        "hunyuan_v1_dense",
        {**WIDE_HEADS, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0}},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        {
            **LATENT,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
            "q_lora_rank": None,
            "first_k_dense_replace": 1,
            "attention_bias": True,
        },
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        {
            **LATENT,
            "q_lora_rank": 48,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 3.0,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **LATENT,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
            "q_lora_rank": 48,
            "first_k_dense_replace": 1,
            "n_group": 2,
            "topk_group": 1,
        },
    ),
    "deepseek_v3-halves": (
        "deepseek_v3",
        {
            **LATENT,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "rope_interleave": False,
        },
    ),
    "gpt_oss-packed-size": ("gpt_oss", {**GROUPED, "head_dim": 16, **EXPERTS, "intermediate_size": 96}),
    "gpt_oss": (
        "gpt_oss",
        {**WIDE_HEADS, **WINDOWS, **EXPERTS, "rope_parameters": {**YARN, "rope_theta": 15e4, "truncate": False}},
    ),
}
ROUTED = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "n_shared_experts": 2,
    "routed_scaling_factor": 1.7,
}
SIZED_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4_moe": (
        "glm4_moe",
        {
            **WIDE_HEADS,
            **ROUTED,
            "use_qk_norm": True,
            "attention_bias": True,
        },
    ),
    "glm4_moe-air": ("glm4_moe", {**WIDE_HEADS, **ROUTED, "norm_topk_prob": False, "first_k_dense_replace": 0}),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, "q_lora_rank": 48, "n_group": 2}),
    "dots1": (
        "dots1",
        {**GROUPED, **ROUTED, **WINDOWS, "max_window_layers": 2, "first_k_dense_replace": 1, "norm_topk_prob": True},
    ),
    "solar_open": ("solar_open", {**WIDE_HEADS, **ROUTED, "attention_bias": True}),
    "olmoe": ("olmoe", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    "flex_olmo": ("flex_olmo", {**GROUPED, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}),
    "minimax_m2": ("minimax_m2", {**WIDE_HEADS, **EXPERTS, "rotary_dim": 16}),
    "exaone_moe": (
        "exaone_moe",
        {**GROUPED, **WINDOWS, **SIZED_EXPERTS, "num_shared_experts": 2, "n_group": 2, "topk_group": 1},
    ),
    "hy_v3": ("hy_v3", {**WIDE_HEADS, **SIZED_EXPERTS, "num_shared_experts": 2, "attention_bias": True}),
    "hunyuan_moe": (
        "hunyuan_v1_moe",
        {
            **WIDE_HEADS,
            "num_experts": 4,
            "moe_topk": 2,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 50.0, "factor": 1.0},
        },
    ),
    "granitemoe": (
        "granitemoe",
        {**GROUPED, **EXPERTS, "embedding_multiplier": 3.0, "residual_multiplier": 0.22, "logits_scaling": 4.0},
    ),
    "granitemoeshared": (
        "granitemoeshared",
        {**GROUPED, **EXPERTS, "shared_intermediate_size": 48, "attention_multiplier": 0.1},
    ),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **GROUPED,
            "num_local_experts": 0,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "shared_intermediate_size": 112,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 4.0,
        },
    ),
    "granitemoehybrid-spaces": (
        "granitemoehybrid",
        {
            **GROUPED,
            "num_local_experts": 0,
            "num_hidden_layers": 3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "shared_intermediate_size": 112,
            "residual_multiplier": 0.22,
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 12,
            "mamba_chunk_size": 16,
        },
    ),
    "granitemoehybrid-experts": (
        "granitemoehybrid",
        {
            **GROUPED,
            **EXPERTS,
            "layer_types": ["linear_attention", "full_attention"],
            "position_embedding_type": "rope",
            "intermediate_size": 48,
            "shared_intermediate_size": 80,
            "mamba_n_heads": 8,
            "mamba_d_state": 12,
            "mamba_conv_bias": False,
        },
    ),
    "bamba": (
        "bamba",
        {
            **GROUPED,
            "num_hidden_layers": 3,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_n_groups": 2,
            "mamba_d_state": 12,
        },
    ),
    "granitemoehybrid-nope": (
        "granitemoehybrid",
        {**GROUPED, "num_local_experts": 0, "layer_types": ["full_attention"] * 2, "shared_intermediate_size": 112},
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {**GROUPED, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 48, "tie_word_embeddings": False},
    ),
    "ernie4_5_moe-interval": (
        "ernie4_5_moe",
        {
            **GROUPED,
            "num_hidden_layers": 4,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_intermediate_size": 48,
            "moe_num_shared_experts": 0,
            "moe_layer_interval": 2,
            "moe_layer_end_index": 2,
        },
    ),
    "mellum": (
        "mellum",
        {
            **WIDE_HEADS,
            **WINDOWS,
            **EXPERTS,
            "moe_intermediate_size": 48,
            "layer_types": ["full_attention", "sliding_attention"] * 2,
            "mlp_layer_types": ["dense", *["sparse"] * 3],
        },
    ),
    "cohere2_moe": (
        "cohere2_moe",
        {**WIDE_HEADS, **WINDOWS, "num_experts": 4, "num_experts_per_tok": 2, "logit_scale": 0.25},
    ),
    "cohere2_moe-sigmoid": (
        "cohere2_moe",
        {
            **WIDE_HEADS,
            "num_hidden_layers": 5,
            "sliding_window": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_selection_fn": "sigmoid",
            "num_shared_experts": 1,
            "shared_expert_combination_strategy": "sum",
            "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 80,
            "rms_norm_eps": 1e-5,
        },
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {**GROUPED, **SIZED_EXPERTS, "shared_expert_intermediate_size": 80, "norm_topk_prob": True},
    ),
    "qwen2_moe-windows": (
        "qwen2_moe",
        {
            **GROUPED,
            **WINDOWS,
            **SIZED_EXPERTS,
            "shared_expert_intermediate_size": 80,
            "use_sliding_window": True,
            "max_window_layers": 1,
            "mlp_only_layers": [0],
            "decoder_sparse_step": 2,
            "qkv_bias": False,
        },
    ),
    "afmoe": (
        "afmoe",
        {**WIDE_HEADS, **WINDOWS, **SIZED_EXPERTS, "num_shared_experts": 2, "route_scale": 1.7, "mup_enabled": True},
    ),
    "phimoe": (
        "phimoe",
        {**GROUPED, "num_local_experts": 3, "router_jitter_noise": 0.3, "attention_bias": True, "lm_head_bias": True},
    ),
    "phimoe-longrope": (
        "phimoe",
        {
            **GROUPED,
            "num_local_experts": 2,
            "rope_parameters": {
                **longrope(8),
                "short_mscale": 1.3,
                "long_mscale": 1.3,
                "original_max_position_embeddings": 40,
            },
        },
    ),
    "internlm3": ("internlm3", {**WIDE_HEADS, "rope_parameters": DYNAMIC, "max_position_embeddings": 12}),
    "iquestcoder": ("iquestcoder", WIDE_HEADS),
    "helium": ("helium", {**GROUPED, "head_dim": 16, "attention_bias": True}),
    "cwm": ("cwm", {**WIDE_HEADS, **WINDOWS, "rope_parameters": LLAMA3_ROPE}),
    "arcee": ("arcee", {**GROUPED, "mlp_bias": True}),
    "apertus": ("apertus", {**GROUPED, "rope_parameters": LLAMA3_ROPE}),
    "hyperclovax": (
        "hyperclovax",
        {
            **GROUPED,
            "head_dim": 16,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "logits_scaling": 0.3,
        },
    ),
    "hyperclovax-before": ("hyperclovax", {**GROUPED, "head_dim": 16, "use_post_norm": False}),
    "vaultgemma": (
        "vaultgemma",
        {**WIDE_HEADS, **WINDOWS, "query_pre_attn_scalar": 24, "attn_logit_softcapping": 5.0},
    ),
    "granite_swa": (
        "granite_swa",
        {**GROUPED, **WINDOWS, "layer_rope_theta": [1e6, 1e3, 1e3, 0], "logits_scaling": 4.0},
    ),
    "minicpm3": (
        "minicpm3",
        {
            **{key: value for key, value in LATENT.items() if "expert" not in key and key != "moe_intermediate_size"},
            "q_lora_rank": 48,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "lfm2_moe": (
        "lfm2_moe",
        {
            **GROUPED,
            **SIZED_EXPERTS,
            "num_hidden_layers": 3,
            "num_dense_layers": 1,
            "layer_types": ["conv", "full_attention", "conv"],
            "routed_scaling_factor": 1.7,
            "conv_L_cache": 4,
        },
    ),
    "lfm2-bias": (
        "lfm2",
        {
            **GROUPED,
            "layer_types": ["full_attention", "conv"],
            "conv_bias": True,
            "block_auto_adjust_ff_dim": False,
            "tie_word_embeddings": False,
        },
    ),
    "nanochat": ("nanochat", {**GROUPED, "attention_bias": True, "final_logit_softcapping": 5.0}),
    "youtu": (
        "youtu",
        {
            **{key: value for key, value in LATENT.items() if "expert" not in key and key != "moe_intermediate_size"},
            "q_lora_rank": 48,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9},
        },
    ),
    "gptj": ("gptj", {"rotary_dim": 8, "n_inner": 112}),
    "gpt_neo": ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gpt_bigcode": ("gpt_bigcode", {"n_inner": 112}),
    "jais2": ("jais2", WIDE_HEADS),
    "nemotron": ("nemotron", {**WIDE_HEADS, "attention_bias": True}),
}
"""Cases of families that spell otherwise what the ones above have; only their quickest tests run in make test."""
LAYER_TYPES = ["linear_attention", "full_attention"]
DELTA = {
    **WIDE_HEADS,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 12,
    "linear_value_head_dim": 20,
}
DELTA_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}
CASES |= {
    "lfm2": ("lfm2", {**GROUPED, "layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "qwen3_5": ("qwen3_5_text", {**DELTA, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "qwen3_next": ("qwen3_next", {**DELTA, **DELTA_EXPERTS, "layer_types": LAYER_TYPES}),
}
GEMMA4 = {
    **WIDE_HEADS,
    **WINDOWS,
    "global_head_dim": 48,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "hidden_size_per_layer_input": 0,
    "rope_parameters": {
        "full_attention": {
            "rope_type": "proportional",
            "partial_rotary_factor": 0.25,
            "rope_theta": 1e3,
            "factor": 2.0,
        },
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e2},
    },
}
GEMMA4_E = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 12,
    "vocab_size_per_layer_input": 96,
}
GEMMA4_EXPERTS = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48}
UNIFIED = {key: value for key, value in GEMMA4.items() if key != "hidden_size_per_layer_input"}
CASES |= {
    "gemma4_moe": ("gemma4_text", {**GEMMA4, **GEMMA4_EXPERTS}),
    "gemma4": (
        "gemma4_text",
        {
            **GEMMA4,
            "num_hidden_layers": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "attention_k_eq_v": True,
            "num_global_key_value_heads": 1,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma4-E": ("gemma4_text", {**GEMMA4, **GEMMA4_E, "attention_bias": True, "hidden_activation": "silu"}),
}
LLAMA4 = {
    **WIDE_HEADS,
    **EXPERTS,
    "intermediate_size_mlp": 80,
    "no_rope_layer_interval": 2,
    "attention_chunk_size": 8,
    "floor_scale": 3,
}
CASES["llama4"] = (
    "llama4_text",
    {
        **LLAMA4,
        "interleave_moe_layer_step": 2,
        # As published: no passage between the features that are scaled and those that are not.
        "rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 1.0},
    },
)
FURTHER |= {
    "llama4-all-experts": (
        "llama4_text",
        {
            **LLAMA4,
            "num_experts_per_tok": 1,
            "use_qk_norm": False,
            "attention_bias": True,
            "layer_types": ["full_attention", "chunked_attention"],
        },
    ),
    "qwen3_5-layer_types": (
        "qwen3_5_text",
        {
            **DELTA,
            "layer_types": ["full_attention", "linear_attention"],
            "linear_conv_kernel_dim": 3,
            "linear_num_key_heads": 4,
            "attention_bias": True,
        },
    ),
    "qwen3_5_moe": ("qwen3_5_moe_text", {**DELTA, **DELTA_EXPERTS, "layer_types": LAYER_TYPES}),
    "qwen3_next-dense-layers": (
        "qwen3_next",
        {**DELTA, **DELTA_EXPERTS, "layer_types": LAYER_TYPES, "mlp_only_layers": [0], "norm_topk_prob": False},
    ),
    "gemma4_unified": ("gemma4_unified_text", UNIFIED),
}
CASES |= FURTHER
EVERY_CASE = [case if case not in FURTHER else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
"""The cases, for a test that `make test` runs for the first ones alone."""
GROWING = ("dynamic", "longrope")
"""Kinds of RoPE that turn otherwise once a text is long, and leave what is in the cache as it was."""


def hugging_face_model(directory: Path, case: str, shards: str = "5GB") -> Any:
    """A random transformers model of `case`, saved to `directory`."""
    torch.manual_seed(0)
    family, changes = CASES[case]
    config = transformers.AutoConfig.for_model(family, **SMALL | changes)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    for name, buffer in model.named_buffers():
        if name.endswith(("e_score_correction_bias", "expert_bias", "layer_scalar")):
            torch.nn.init.normal_(buffer, mean=float(name.endswith("layer_scalar")), std=0.2)
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size=shards)
    return model
