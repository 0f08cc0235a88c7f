"""Families with layer norms: GPT-2 and its relatives, and Cohere."""

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import (
    ATTENTION_BIAS,
    LAYER_EPS,
    PARTIAL,
    WINDOW,
    every,
    plain,
    row,
    windows,
    without_window,
)


def falcon_parallel(theirs: Theirs) -> bool:
    """Falcon: the newer architecture is parallel whatever parallel_attn says."""
    if theirs["new_decoder_architecture"] and not theirs["parallel_attn"]:
        raise UnsupportedError("new_decoder_architecture without parallel_attn")
    return bool(theirs["parallel_attn"])


def falcon_shared_norm(theirs: Theirs) -> bool:
    """Falcon: 40b and 180b have two norms in their parallel blocks."""
    norms = theirs.get("num_ln_in_parallel_attn") or (2 if theirs["new_decoder_architecture"] else 1)
    if norms == 2 and not theirs["new_decoder_architecture"]:
        raise UnsupportedError("num_ln_in_parallel_attn 2 without new_decoder_architecture")
    return falcon_parallel(theirs) and norms == 1


def falcon_kv_heads(theirs: Theirs) -> int:
    """Falcon: num_kv_heads counts only in the newer architecture."""
    if theirs["new_decoder_architecture"]:
        return int(theirs.get("num_kv_heads") or theirs["num_attention_heads"])
    return 1 if theirs["multi_query"] else int(theirs["num_attention_heads"])


def neo_full_layers(theirs: Theirs) -> tuple[int, ...]:
    """GPT-Neo: kinds of blocks, each with the number of times that it follows on itself."""
    kinds = [kind for kinds, times in theirs["attention_types"] for _ in range(times) for kind in kinds]
    if unknown := sorted(set(kinds) - {"global", "local"}):
        raise UnsupportedError(f"attention_types {unknown}")
    return tuple(i for i, kind in enumerate(kinds) if kind == "global")


GPT2: dict[str, Reader] = {
    "n_layer": "n_layer",
    "n_embd": "n_embd",
    "n_head": "n_head",
    "ffn_size": lambda theirs: theirs.get("n_inner") or 4 * theirs["n_embd"],
    "vocab_size": "vocab_size",
    "block_size": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "ffn": plain("activation_function"),
    "tied_head": "tie_word_embeddings",
}
GPT2_FIXED = {
    "norm": "layer",
    "qkv_bias": True,
    "projection_bias": True,
    "mlp_bias": True,
    "positions": "learned",
}
GPT2_DEFAULTS = {
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": True,
}
ROWS: dict[str, Family] = {
    "gpt2": Family(
        weights=weights.GPT2,
        fields=GPT2,
        fixed=GPT2_FIXED,
        defaults=GPT2_DEFAULTS,
        refuse={"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    ),
    "gpt_neox": row(
        weights.NEOX,
        {
            **LAYER_EPS,
            **ATTENTION_BIAS,
            "ffn": plain(),
            "rope_fraction": "rotary_pct",
            "rope_theta": "rotary_emb_base",
            "parallel_residual": "use_parallel_residual",
        },
        fixed={"norm": "layer", "mlp_bias": True},
        defaults={
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10_000,
            "attention_bias": True,
            "use_parallel_residual": True,
        },
    ),
    "falcon": row(
        weights.FALCON,
        {
            "n_kv_head": falcon_kv_heads,
            "ffn": plain("activation"),
            "ffn_size": lambda theirs: theirs.get("ffn_hidden_size") or 4 * theirs["hidden_size"],
            "norm_eps": "layer_norm_epsilon",
            "qkv_bias": "bias",
            "projection_bias": "bias",
            "mlp_bias": "bias",
            "parallel_residual": falcon_parallel,
            "shared_norm": falcon_shared_norm,
        },
        fixed={"norm": "layer"},
        defaults={
            "activation": "gelu",
            "layer_norm_epsilon": 1e-5,
            "tie_word_embeddings": True,
            "new_decoder_architecture": False,
            "multi_query": True,
            "parallel_attn": True,
            "bias": False,
        },
        refuse={"alibi": False},
    ),
    "phi": row(
        weights.PHI,
        {
            **LAYER_EPS,
            **PARTIAL,
            "ffn": plain(),
            "qk_norm": lambda theirs: "head" if theirs["qk_layernorm"] else "none",
        },
        fixed={
            "norm": "layer",
            "qkv_bias": True,
            "projection_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "parallel_residual": True,
            "shared_norm": True,
        },
        defaults={
            "hidden_act": "gelu_new",
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "qk_layernorm": False,
        },
    ),
    "stablelm": row(
        weights.STABLELM,
        {
            **LAYER_EPS,
            **PARTIAL,
            "qkv_bias": "use_qkv_bias",
            "qk_norm": lambda theirs: "each_head" if theirs["qk_layernorm"] else "none",
            "parallel_residual": "use_parallel_residual",
            "shared_norm": "use_parallel_residual",
        },
        fixed={"norm": "layer"},
        defaults={
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
            "use_qkv_bias": False,
            "qk_layernorm": False,
            "use_parallel_residual": False,
            "num_key_value_heads": 32,
        },
    ),
    "starcoder2": row(
        weights.STARCODER2,
        {
            **WINDOW,
            "ffn": plain(),
            "norm_eps": "norm_epsilon",
            "qkv_bias": "use_bias",
            "projection_bias": "use_bias",
            "mlp_bias": "use_bias",
        },
        fixed={"norm": "layer"},
        defaults={
            "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "use_bias": True,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "olmo": row(
        weights.LLAMA,
        {**ATTENTION_BIAS, "clip_qkv": "clip_qkv"},
        fixed={"norm": "layer_no_weight", "norm_eps": 1e-5},
    ),
    "cohere": row(
        weights.COHERE,
        {
            **LAYER_EPS,
            **ATTENTION_BIAS,
            "logit_multiplier": "logit_scale",
            "qk_norm": lambda theirs: "each_head" if theirs["use_qk_norm"] else "none",
        },
        fixed={"norm": "layer_no_bias", "parallel_residual": True, "shared_norm": True, "rope_interleaved": True},
        defaults={
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "rope_theta": 500_000.0,
            "use_qk_norm": False,
        },
    ),
    "cohere2": row(
        weights.LLAMA,
        {
            **LAYER_EPS,
            **ATTENTION_BIAS,
            "logit_multiplier": "logit_scale",
            **windows(every("sliding_window_pattern", 4)),
            "no_rope_layers": without_window,
        },
        fixed={"norm": "layer_no_bias", "parallel_residual": True, "shared_norm": True, "rope_interleaved": True},
        defaults={
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
        },
    ),
    "gptj": Family(
        weights=weights.GPTJ,
        fields={
            "n_layer": "n_layer",
            "n_embd": "n_embd",
            "n_head": "n_head",
            "ffn_size": lambda theirs: theirs.get("n_inner") or 4 * theirs["n_embd"],
            "vocab_size": "vocab_size",
            "block_size": "n_positions",
            "norm_eps": "layer_norm_epsilon",
            "ffn": plain("activation_function"),
            "rope_fraction": lambda theirs: theirs["rotary_dim"] / (theirs["n_embd"] // theirs["n_head"]),
            "tied_head": "tie_word_embeddings",
        },
        fixed={
            "norm": "layer",
            "mlp_bias": True,
            "head_bias": True,
            "parallel_residual": True,
            "shared_norm": True,
            "rope_interleaved": True,
        },
        defaults={
            "n_positions": 2048,
            "rotary_dim": 64,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": False,
        },
    ),
    "gpt_neo": Family(
        weights=weights.GPT_NEO,
        fields={
            "n_layer": "num_layers",
            "n_embd": "hidden_size",
            "n_head": "num_heads",
            "ffn_size": lambda theirs: theirs.get("intermediate_size") or 4 * theirs["hidden_size"],
            "vocab_size": "vocab_size",
            "block_size": "max_position_embeddings",
            "norm_eps": "layer_norm_epsilon",
            "ffn": plain("activation_function"),
            "sliding_window": "window_size",
            "full_attention_layers": neo_full_layers,
            "tied_head": "tie_word_embeddings",
        },
        fixed={
            "norm": "layer",
            "projection_bias": True,
            "mlp_bias": True,
            "positions": "learned",
            "attention_scale": 1.0,
        },
        defaults={
            "max_position_embeddings": 2048,
            "window_size": 256,
            "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
            "tie_word_embeddings": True,
            "attention_types": [[["global", "local"], 12]],
        },
    ),
    "gpt_bigcode": Family(
        weights=weights.GPT_BIGCODE,
        fields={**GPT2, "n_kv_head": lambda theirs: 1},
        fixed=GPT2_FIXED,
        defaults={**GPT2_DEFAULTS, "activation_function": "gelu_pytorch_tanh"},
        refuse={"multi_query": True, "scale_attn_weights": True, "add_cross_attention": False},
    ),
    "jais2": row(
        weights.UNGATED,
        {**ATTENTION_BIAS, **LAYER_EPS, "mlp_bias": "mlp_bias", "ffn": plain()},
        fixed={"norm": "layer"},
        defaults={
            "hidden_act": "relu2",
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "attention_bias": True,
            "mlp_bias": True,
            "num_key_value_heads": 26,
        },
    ),
    "nemotron": row(
        weights.UNGATED,
        {**ATTENTION_BIAS, **PARTIAL, "norm_eps": "norm_eps", "mlp_bias": "mlp_bias", "ffn": plain()},
        fixed={"norm": "layer_plus_one"},
        defaults={
            "hidden_act": "relu2",
            "max_position_embeddings": 4096,
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
        },
    ),
}
