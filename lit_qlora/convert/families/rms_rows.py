"""Families with RMS norms and one MLP in a block: Llama and what came after it."""

import math
from typing import Any

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import (
    ATTENTION_BIAS,
    LATENT,
    PARTIAL,
    WINDOW,
    every,
    exaone_unrotated,
    gated,
    if_used,
    plain,
    qwen_window,
    row,
    windows,
)


def fixed_scale(theirs: Theirs) -> float:
    """Gemma's score scale."""
    return float(theirs["query_pre_attn_scalar"] ** -0.5)


def root_of_width(theirs: Theirs) -> float:
    """Gemma's embedding multiplier."""
    return float(theirs["hidden_size"] ** 0.5)


def smollm3_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """SmolLM3: no_rope_layers has a 1 for each block that does rotate."""
    interval = theirs["no_rope_layer_interval"]
    rotates = theirs.get("no_rope_layers") or [(i + 1) % interval for i in range(theirs["num_hidden_layers"])]
    return tuple(i for i, yes in enumerate(rotates) if not yes)


def hunyuan_theta(theirs: Theirs) -> float:
    """Hunyuan's NTK alpha stretches the base once and for all."""
    size = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    return float(theirs["rope_theta"] * (theirs.get("alpha") or 1) ** (size / (size - 2)))


def local_theta(theirs: Theirs) -> float:
    """OLMo 3: the same base, never scaled, in blocks with a window."""
    return float(theirs.get("rope_local_base_freq") or theirs["rope_theta"])


GRANITE: dict[str, Reader] = {
    **ATTENTION_BIAS,
    "embedding_multiplier": "embedding_multiplier",
    "residual_multiplier": "residual_multiplier",
    "attention_scale": "attention_multiplier",
    "logit_multiplier": lambda theirs: 1 / theirs["logits_scaling"],
}
GRANITE_DEFAULTS = {
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1.0,
    "attention_multiplier": 1.0,
    "logits_scaling": 1.0,
}


def granite_thetas(windowed: bool) -> Reader:
    """Granite with windows: the base of the blocks with one, or of the others; 0 turns rotation off."""

    def read(theirs: Theirs) -> float | None:
        full: Any = windows(first_of_four)["full_attention_layers"]
        bases = theirs.get("layer_rope_theta") or [theirs["rope_theta"]] * theirs["num_hidden_layers"]
        of_kind = {base for i, base in enumerate(bases) if base and (i not in full(theirs)) == windowed}
        if len(of_kind) > 1:
            raise UnsupportedError(f"layer_rope_theta {sorted(of_kind)} in blocks of one kind")
        return float(of_kind.pop()) if of_kind else None

    return read


def granite_local_theta(theirs: Theirs) -> float | None:
    """Granite with windows: the base of the blocks with one where it is another. Its scaling holds for both."""
    local: Any = granite_thetas(windowed=True)
    full: Any = granite_thetas(windowed=False)
    base: float | None = local(theirs)
    if base == full(theirs):
        return None
    rope = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UnsupportedError(f"RoPE scaling {kind!r} beside several bases in layer_rope_theta")
    return base


def granite_swa_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """Granite with windows: the blocks whose base is 0."""
    return tuple(i for i, base in enumerate(theirs.get("layer_rope_theta") or ()) if not base)


def hyperclovax_scale(theirs: Theirs) -> float:
    """HyperCLOVA X: the score scale, that of other models where config.json has none."""
    size = theirs.get("head_dim") or theirs["hidden_size"] // theirs["num_attention_heads"]
    scale = theirs.get("attention_multiplier")
    return float(size**-0.5 if scale is None else scale)


def first_of_four(theirs: Theirs, i: int) -> bool:
    """CWM and Granite with windows: every fourth block from the first on sees everything."""
    return i % 4 == 0


GEMMA: dict[str, Reader] = {"embedding_multiplier": root_of_width, **ATTENTION_BIAS}
GEMMA_DEFAULTS = {
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
GEMMA3: dict[str, Reader] = {
    **GEMMA,
    "ffn": gated("hidden_activation"),
    "attention_scale": fixed_scale,
    "logit_softcap": "final_logit_softcapping",
}
GEMMA2: dict[str, Reader] = {**GEMMA3, "attention_softcap": "attn_logit_softcapping"}
SANDWICH = {"norm": "rms_plus_one", "norm_position": "both"}
ONE_WAY = {"use_bidirectional_attention": False}
QWEN_DEFAULTS = {"max_position_embeddings": 32_768, "max_window_layers": 28, "sliding_window": 4096}


def backwards(theirs: Theirs) -> str:
    """Nanochat's features turn the other way: linear scaling with a factor of -1. None of theirs has another."""
    tables = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if (kind := tables.get("rope_type", "default")) != "default":
        raise UnsupportedError(f"RoPE scaling {kind!r}")
    return "linear"


ROWS: dict[str, Family] = {
    "llama": row(weights.LLAMA, {**ATTENTION_BIAS, "mlp_bias": "mlp_bias"}),
    "mistral": row(
        weights.LLAMA,
        WINDOW,
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "ministral": row(
        weights.LLAMA,
        windows(lambda theirs, i: theirs.get("sliding_window") is None),
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "ministral3": row(
        weights.LLAMA,
        {**WINDOW, "query_scale_beta": "llama_4_scaling_beta"},
        defaults={
            "max_position_embeddings": 262_144,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e6,
                "factor": 16.0,
                "original_max_position_embeddings": 16_384,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "qwen2": row(weights.LLAMA, if_used(windows(qwen_window)), fixed={"qkv_bias": True}, defaults=QWEN_DEFAULTS),
    "qwen3": row(
        weights.QWEN3,
        {**ATTENTION_BIAS, **if_used(windows(qwen_window))},
        fixed={"qk_norm": "head"},
        defaults={**QWEN_DEFAULTS, "head_dim": 128, "num_key_value_heads": 32},
    ),
    "phi3": row(
        weights.PHI3,
        {**PARTIAL, **WINDOW},
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
        },
    ),
    "gemma": row(
        weights.LLAMA,
        {**GEMMA, "ffn": gated("hidden_act", {"gelu": "gelu_pytorch_tanh"})},  # "gelu" is a slip of the first files
        fixed={"norm": "rms_plus_one"},
        defaults={**GEMMA_DEFAULTS, "num_key_value_heads": 16},
        refuse=ONE_WAY,
    ),
    "gemma2": row(
        weights.GEMMA2,
        {**GEMMA2, **windows(every(None, 2))},
        fixed=SANDWICH,
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        refuse=ONE_WAY,
    ),
    "gemma3_text": row(
        weights.GEMMA3,
        {**GEMMA3, **windows(every("sliding_window_pattern", 6)), "rope_local_theta": "rope_local_base_freq"},
        fixed={**SANDWICH, "qk_norm": "head"},
        defaults={
            **GEMMA_DEFAULTS,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "rope_theta": 1e6,
            "rope_local_base_freq": 10_000.0,
        },
        refuse={**ONE_WAY, "attn_logit_softcapping": None},
    ),
    "olmo2": row(
        weights.OLMO2,
        ATTENTION_BIAS,
        fixed={"norm_position": "after", "qk_norm": "full"},
        defaults={"rms_norm_eps": 1e-5},
    ),
    "olmo3": row(
        weights.OLMO2,
        {**ATTENTION_BIAS, **windows(every(None, 4)), "rope_local_theta": local_theta},
        fixed={"norm_position": "after", "qk_norm": "full"},
        defaults={"rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "sliding_window": 4096},
    ),
    "smollm3": row(
        weights.LLAMA,
        {
            **ATTENTION_BIAS,
            "mlp_bias": "mlp_bias",
            "no_rope_layers": smollm3_unrotated,
            **if_used(windows(lambda theirs, i: i not in smollm3_unrotated(theirs))),
        },
        defaults={
            "max_position_embeddings": 32_768,
            "rope_theta": 2e6,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "no_rope_layer_interval": 4,
        },
    ),
    "granite": row(weights.LLAMA, {**GRANITE, "mlp_bias": "mlp_bias"}, defaults=GRANITE_DEFAULTS),
    "ernie4_5": row(
        weights.LLAMA,
        {"qkv_bias": "use_bias", "projection_bias": "use_bias", "mlp_bias": "use_bias"},
        fixed={"rope_interleaved": True},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500_000.0,
            "tie_word_embeddings": True,
            "use_bias": False,
            "head_dim": 128,
            "num_key_value_heads": 2,
        },
    ),
    "glm": row(
        weights.GLM,
        {**PARTIAL, "qkv_bias": "attention_bias"},
        fixed={"rope_interleaved": True},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
        },
    ),
    "glm4": row(
        weights.GLM4,
        {**PARTIAL, "qkv_bias": "attention_bias"},
        fixed={"rope_interleaved": True, "norm_position": "both"},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1.5625e-7,
            "partial_rotary_factor": 0.5,
            "attention_bias": True,
            "head_dim": 128,
            "num_key_value_heads": 2,
        },
    ),
    "seed_oss": row(
        weights.LLAMA,
        {"qkv_bias": "attention_bias", "projection_bias": "attention_out_bias", "mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 524_288,
            "attention_bias": True,
            "attention_out_bias": False,
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
    ),
    "exaone4": row(
        weights.OLMO2,
        {**windows(every("sliding_window_pattern", 4)), "no_rope_layers": exaone_unrotated},
        fixed={"norm_position": "after", "qk_norm": "head"},
        defaults={"rms_norm_eps": 1e-5, "sliding_window": 4096, "num_key_value_heads": 32},
    ),
    "hunyuan_v1_dense": row(
        weights.HUNYUAN,
        {**ATTENTION_BIAS, "rope_theta": hunyuan_theta},
        fixed={"qk_norm": "head", "qk_norm_after_rope": True},
        defaults={"rms_norm_eps": 1e-5},
    ),
    "internlm3": row(
        weights.LLAMA,
        {**ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 2,
        },
        refuse={"bias": False, "qkv_bias": False},
    ),
    "iquestcoder": row(
        weights.LLAMA,
        {**ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
        },
        refuse={"clip_qkv": None, "use_sliding_window": False},
    ),
    "helium": row(
        weights.LLAMA,
        {"qkv_bias": "attention_bias", "mlp_bias": "mlp_bias"},
        fixed={"rope_interleaved": True},
        defaults={
            "max_position_embeddings": 4096,
            "rms_norm_eps": 1e-8,
            "rope_theta": 100_000.0,
            "head_dim": 128,
            "num_key_value_heads": 20,
        },
    ),
    "cwm": row(
        weights.LLAMA,
        {"mlp_bias": "mlp_bias", **windows(first_of_four)},
        defaults={
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-5,
            "head_dim": 128,
            "num_key_value_heads": 8,
            "sliding_window": 8192,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e6,
                "factor": 16.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "arcee": row(
        weights.UNGATED,
        {**ATTENTION_BIAS, "mlp_bias": "mlp_bias", "ffn": plain()},
        defaults={"hidden_act": "relu2", "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "apertus": row(
        weights.APERTUS,
        {**ATTENTION_BIAS, "ffn": plain()},
        fixed={"qk_norm": "head"},
        defaults={
            "hidden_act": "xielu",
            "max_position_embeddings": 65_536,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 12e6,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
        refuse={"post_norm": False, "qk_norm": True, "mlp_bias": False},
        constants=weights.APERTUS_CONSTANTS,
    ),
    "hyperclovax": row(
        weights.HYPERCLOVAX,
        {
            **GRANITE,
            "mlp_bias": "mlp_bias",
            "attention_scale": hyperclovax_scale,
            "logit_multiplier": "logits_scaling",
            "norm_position": lambda theirs: "both" if theirs["use_post_norm"] else "before",
        },
        defaults={**GRANITE_DEFAULTS, "attention_multiplier": None, "use_post_norm": True},
    ),
    "vaultgemma": row(
        weights.VAULTGEMMA,
        {**GEMMA2, **windows(every(None, 2))},
        fixed={"norm": "rms_plus_one"},
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "granite_swa": row(
        weights.GRANITE_SWA,
        {
            **GRANITE,
            **windows(first_of_four),
            "mlp_bias": "mlp_bias",
            "rope_theta": granite_thetas(windowed=False),
            "rope_local_theta": granite_local_theta,
            "no_rope_layers": granite_swa_unrotated,
        },
        fixed={"attention_sinks": True},
        defaults={
            **GRANITE_DEFAULTS,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "num_key_value_heads": 4,
            "sliding_window": 128,
        },
    ),
    "minicpm3": row(
        weights.DEEPSEEK,
        {
            **LATENT,
            "embedding_multiplier": "scale_emb",
            "residual_multiplier": lambda theirs: theirs["scale_depth"] / math.sqrt(theirs["num_hidden_layers"]),
            "logit_multiplier": lambda theirs: theirs["dim_model_base"] / theirs["hidden_size"],
        },
        defaults={
            "max_position_embeddings": 32_768,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": True,
            "kv_lora_rank": 256,
            "q_lora_rank": 768,
            "qk_nope_head_dim": 64,
            "qk_rope_head_dim": 32,
            "v_head_dim": 64,
            "scale_emb": 12,
            "scale_depth": 1.4,
            "dim_model_base": 256,
        },
        refuse={"mlp_bias": False},
    ),
    "nanochat": row(
        weights.NANOCHAT,
        {
            **ATTENTION_BIAS,
            "ffn": plain(),
            "logit_softcap": "final_logit_softcapping",
            "rope_scaling": backwards,
        },
        fixed={
            "norm": "rms_no_weight",
            "embedding_norm": True,
            "qk_norm": "head",
            "qk_norm_after_rope": True,
            "rope_factor": -1.0,
        },
        defaults={"hidden_act": "relu2", "final_logit_softcapping": 15.0},
    ),
    "youtu": row(
        weights.DEEPSEEK,
        {**LATENT, "rope_interleaved": "rope_interleave"},
        defaults={
            "max_position_embeddings": 131_072,
            "tie_word_embeddings": True,
            "kv_lora_rank": 512,
            "q_lora_rank": 1536,
            "qk_nope_head_dim": 128,
            "qk_rope_head_dim": 64,
            "v_head_dim": 128,
            "rope_interleave": True,
        },
    ),
}
