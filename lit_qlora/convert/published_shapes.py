"""Shapes of well-known models as the Hugging Face hub has them, to plan runs without a download."""

from typing import Any

from lit_qlora.convert.families import read_config
from lit_qlora.model.config import ModelConfig


def config_json(
    kind: str, layers: int, width: int, heads: int, kv_heads: int, inside: int, vocabulary: int, **more: Any
) -> dict[str, Any]:
    """A config.json in the keys that most families use."""
    sizes = {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": inside,
        "vocab_size": vocabulary,
    }
    return {"model_type": kind, **sizes, **more}


def _llama(*sizes: int, context: int, **more: Any) -> dict[str, Any]:
    return config_json("llama", *sizes, max_position_embeddings=context, **more)


def _mistral(*sizes: int, context: int, **more: Any) -> dict[str, Any]:
    return config_json("mistral", *sizes, max_position_embeddings=context, **({"sliding_window": None} | more))


def _qwen2(*sizes: int, tied: bool = False) -> dict[str, Any]:
    more = {"tie_word_embeddings": tied, "use_sliding_window": False}
    return config_json("qwen2", *sizes, max_position_embeddings=32_768, **more)


def _qwen3(*sizes: int, tied: bool = False) -> dict[str, Any]:
    return config_json("qwen3", *sizes, head_dim=128, tie_word_embeddings=tied, max_position_embeddings=40_960)


def _gemma2(*sizes: int, head: int) -> dict[str, Any]:
    return config_json("gemma2", *(*sizes, 256_000), head_dim=head, max_position_embeddings=8192)


def _gemma3(*sizes: int, head: int) -> dict[str, Any]:
    more = {"head_dim": head, "sliding_window": 1024, "max_position_embeddings": 131_072}
    return config_json("gemma3_text", *(*sizes, 262_208), **more)


def _gemma4(*sizes: int, kind: str = "gemma4_text", **more: Any) -> dict[str, Any]:
    more = {"head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0} | more
    return config_json(kind, *(*sizes, 262_144), **more)


def _large_gemma4(*sizes: int, **more: Any) -> dict[str, Any]:
    more = {"attention_k_eq_v": True, "hidden_size_per_layer_input": 0, "sliding_window": 1024} | more
    return _gemma4(*sizes, max_position_embeddings=262_144, **more)


GEMMA_4_E2B: dict[str, Any] = {
    "num_kv_shared_layers": 20,
    "use_double_wide_mlp": True,
    "layer_types": [*["sliding_attention"] * 4, "full_attention"] * 7,
    "max_position_embeddings": 131_072,
}
GEMMA_4_26B: dict[str, Any] = {
    "num_global_key_value_heads": 2,
    "enable_moe_block": True,
    "num_experts": 128,
    "top_k_experts": 8,
    "moe_intermediate_size": 704,
}
QWEN3_30B = {
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "max_position_embeddings": 40_960,
}
SHAPES: dict[str, dict[str, Any]] = {
    "TinyLlama/TinyLlama-1.1B-Chat-v1.0": _llama(22, 2048, 32, 4, 5632, 32_000, context=2048),
    "meta-llama/Llama-3.2-1B": _llama(16, 2048, 32, 8, 8192, 128_256, context=131_072, tie_word_embeddings=True),
    "meta-llama/Llama-3.2-3B": _llama(28, 3072, 24, 8, 8192, 128_256, context=131_072, tie_word_embeddings=True),
    "meta-llama/Llama-2-7b-hf": _llama(32, 4096, 32, 32, 11_008, 32_000, context=4096),
    "meta-llama/Llama-3.1-8B": _llama(32, 4096, 32, 8, 14_336, 128_256, context=131_072),
    "meta-llama/Llama-2-13b-hf": _llama(40, 5120, 40, 40, 13_824, 32_000, context=4096),
    "huggyllama/llama-30b": _llama(60, 6656, 52, 52, 17_920, 32_000, context=2048),
    "huggyllama/llama-65b": _llama(80, 8192, 64, 64, 22_016, 32_000, context=2048),
    "meta-llama/Llama-2-70b-hf": _llama(80, 8192, 64, 8, 28_672, 32_000, context=4096),
    "meta-llama/Llama-3.1-70B": _llama(80, 8192, 64, 8, 28_672, 128_256, context=131_072),
    "mistralai/Mistral-7B-v0.1": _mistral(32, 4096, 32, 8, 14_336, 32_000, context=32_768, sliding_window=4096),
    "mistralai/Mistral-Nemo-Base-2407": _mistral(40, 5120, 32, 8, 14_336, 131_072, context=131_072, head_dim=128),
    "mistralai/Mistral-Small-24B-Base-2501": _mistral(40, 5120, 32, 8, 32_768, 131_072, context=32_768, head_dim=128),
    "mistralai/Mixtral-8x7B-v0.1": config_json(
        "mixtral",
        *(32, 4096, 32, 8, 14_336, 32_000),
        num_local_experts=8,
        num_experts_per_tok=2,
        sliding_window=None,
        max_position_embeddings=32_768,
    ),
    "Qwen/Qwen2.5-0.5B": _qwen2(24, 896, 14, 2, 4864, 151_936, tied=True),
    "Qwen/Qwen2.5-1.5B": _qwen2(28, 1536, 12, 2, 8960, 151_936, tied=True),
    "Qwen/Qwen2.5-3B": _qwen2(36, 2048, 16, 2, 11_008, 151_936, tied=True),
    "Qwen/Qwen2.5-7B": _qwen2(28, 3584, 28, 4, 18_944, 152_064),
    "Qwen/Qwen2.5-14B": _qwen2(48, 5120, 40, 8, 13_824, 152_064),
    "Qwen/Qwen2.5-32B": _qwen2(64, 5120, 40, 8, 27_648, 152_064),
    "Qwen/Qwen2.5-72B": _qwen2(80, 8192, 64, 8, 29_568, 152_064),
    "Qwen/Qwen3-0.6B": _qwen3(28, 1024, 16, 8, 3072, 151_936, tied=True),
    "Qwen/Qwen3-1.7B": _qwen3(28, 2048, 16, 8, 6144, 151_936, tied=True),
    "Qwen/Qwen3-4B": _qwen3(36, 2560, 32, 8, 9728, 151_936, tied=True),
    "Qwen/Qwen3-8B": _qwen3(36, 4096, 32, 8, 12_288, 151_936),
    "Qwen/Qwen3-14B": _qwen3(40, 5120, 40, 8, 17_408, 151_936),
    "Qwen/Qwen3-32B": _qwen3(64, 5120, 64, 8, 25_600, 151_936),
    "Qwen/Qwen3-30B-A3B": config_json("qwen3_moe", 48, 2048, 32, 4, 6144, 151_936, **QWEN3_30B),
    "google/gemma-2-2b": _gemma2(26, 2304, 8, 4, 9216, head=256),
    "google/gemma-2-9b": _gemma2(42, 3584, 16, 8, 14_336, head=256),
    "google/gemma-2-27b": _gemma2(46, 4608, 32, 16, 36_864, head=128),
    "google/gemma-3-4b-pt": _gemma3(34, 2560, 8, 4, 10_240, head=256),
    "google/gemma-3-12b-pt": _gemma3(48, 3840, 16, 8, 15_360, head=256),
    "google/gemma-3-27b-pt": _gemma3(62, 5376, 32, 16, 21_504, head=128),
    "google/gemma-4-E2B-it": _gemma4(35, 1536, 8, 1, 6144, **GEMMA_4_E2B),
    "google/gemma-4-E4B-it": _gemma4(42, 2560, 8, 2, 10_240, num_kv_shared_layers=18, max_position_embeddings=131_072),
    "google/gemma-4-12B-it": _large_gemma4(
        48, 3840, 16, 8, 15_360, kind="gemma4_unified_text", num_global_key_value_heads=1
    ),
    "google/gemma-4-26B-A4B-it": _large_gemma4(30, 2816, 16, 8, 2112, **GEMMA_4_26B),
    "google/gemma-4-31B-it": _large_gemma4(60, 5376, 32, 16, 21_504, num_global_key_value_heads=4),
    "microsoft/Phi-3-mini-4k-instruct": config_json(
        "phi3", 32, 3072, 32, 32, 8192, 32_064, max_position_embeddings=4096, sliding_window=2047
    ),
    "microsoft/phi-4": config_json("phi3", 40, 5120, 40, 10, 17_920, 100_352, max_position_embeddings=16_384),
    "HuggingFaceTB/SmolLM2-1.7B": _llama(24, 2048, 32, 32, 8192, 49_152, context=8192, tie_word_embeddings=True),
    "allenai/OLMo-2-1124-7B": config_json("olmo2", 32, 4096, 32, 32, 11_008, 100_352, max_position_embeddings=4096),
    "openai/gpt-oss-20b": config_json(
        "gpt_oss", 24, 2880, 64, 8, 2880, 201_088, head_dim=64, num_local_experts=32, max_position_embeddings=131_072
    ),
}
"""Name -> config.json without keys that change neither memory nor parameters; no model can be made of it."""


def read_shape(name: str) -> ModelConfig:
    """The configuration of a well-known model, as far as its memory depends on it."""
    return read_config(SHAPES[name], name)
