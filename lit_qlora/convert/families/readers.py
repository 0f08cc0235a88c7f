"""Readers that rows share: keys that most families have, and settings with a rule behind them."""

from collections.abc import Callable, Mapping
from typing import Any

from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError, mscale
from lit_qlora.convert.families.rules import Rule

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
    "xielu": "xielu",
}
GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_tanh": "geglu_tanh"}


def gated(key: str = "hidden_act", renamed: Mapping[str, str] | None = None) -> Reader:
    """Our ffn for an activation in an MLP with a gate; `renamed` where a family means another one than it says."""

    def read(theirs: Theirs) -> str:
        name = (renamed or {}).get(theirs[key], theirs[key])
        if ACTIVATIONS.get(name) not in GATED:
            raise UnsupportedError(f"{key} {name!r}")
        return GATED[ACTIVATIONS[name]]

    return read


def plain(key: str = "hidden_act") -> Reader:
    """Our ffn for an activation in an MLP without a gate."""

    def read(theirs: Theirs) -> str:
        if ACTIVATIONS.get(theirs[key], "silu") == "silu":
            raise UnsupportedError(f"{key} {theirs[key]!r}")
        return ACTIVATIONS[theirs[key]]

    return read


def full_layers(theirs: Theirs, full: Callable[[Theirs, int], bool]) -> tuple[int, ...]:
    """The blocks that see everything, by layer_types or, where config.json has none, by a rule."""
    blocks = range(theirs["num_hidden_layers"])
    types = theirs.get("layer_types") or ["full_attention" if full(theirs, i) else "sliding_attention" for i in blocks]
    if unknown := sorted(set(types) - {"full_attention", "sliding_attention"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i in blocks if types[i] == "full_attention")


def windows(full: Callable[[Theirs, int], bool]) -> dict[str, Reader]:
    """Our sliding_window and full_attention_layers, see full_layers."""

    def window(theirs: Theirs) -> int | None:
        everywhere = len(full_layers(theirs, full)) == theirs["num_hidden_layers"]
        size: int | None = theirs.get("sliding_window")
        return None if everywhere else size

    def kept_full(theirs: Theirs) -> tuple[int, ...]:
        return full_layers(theirs, full) if window(theirs) is not None else ()

    return {"sliding_window": window, "full_attention_layers": kept_full}


def every(key: str | None, otherwise: int) -> Callable[[Theirs, int], bool]:
    """Every n-th block sees everything, where `key` says n."""
    return lambda theirs, i: (i + 1) % ((key and theirs.get(key)) or otherwise) == 0


def if_used(readers: Mapping[str, Reader]) -> dict[str, Reader]:
    """The readers of windows that count only with use_sliding_window."""

    def when_used(reader: Reader) -> Reader:
        def read(theirs: Theirs) -> Any:
            if not theirs.get("use_sliding_window"):
                return None
            return theirs.get(reader) if isinstance(reader, str) else reader(theirs)

        return read

    return {ours: when_used(reader) for ours, reader in readers.items()}


def qwen_window(theirs: Theirs, i: int) -> bool:
    """Qwen: the first max_window_layers blocks see everything."""
    return bool(i < theirs["max_window_layers"])


def without_window(theirs: Theirs, full: Callable[[Theirs, int], bool] | None = None) -> tuple[int, ...]:
    """The blocks without a window, which Cohere 2 and EXAONE 4 do not rotate; all of them if config.json has none.

    Args:
        full: see windows; by default every sliding_window_pattern-th block sees everything.
    """
    if theirs.get("sliding_window") is None:
        return tuple(range(theirs["num_hidden_layers"]))
    return full_layers(theirs, full or every("sliding_window_pattern", 4))


def exaone_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """EXAONE 4 without windows rotates everywhere."""
    return () if theirs.get("sliding_window") is None else without_window(theirs)


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


COMMON: dict[str, Reader] = {
    "n_layer": "num_hidden_layers",
    "n_embd": "hidden_size",
    "n_head": "num_attention_heads",
    "n_kv_head": "num_key_value_heads",
    "head_size": "head_dim",
    "ffn_size": "intermediate_size",
    "vocab_size": "vocab_size",
    "block_size": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "rope_theta": "rope_theta",
    "tied_head": "tie_word_embeddings",
    "ffn": gated(),
}
PARTIAL: dict[str, Reader] = {"rope_fraction": "partial_rotary_factor"}
ATTENTION_BIAS: dict[str, Reader] = {"qkv_bias": "attention_bias", "projection_bias": "attention_bias"}
LATENT: dict[str, Reader] = {
    **ATTENTION_BIAS,
    "n_kv_head": "num_attention_heads",
    "head_size": deepseek_head_size,
    "attention_scale": deepseek_scale,
    "kv_latent_size": "kv_lora_rank",
    "q_latent_size": "q_lora_rank",
    "latent_rope_size": "qk_rope_head_dim",
    "latent_value_size": "v_head_dim",
}
LAYER_EPS: dict[str, Reader] = {"norm_eps": "layer_norm_eps"}
WINDOW: dict[str, Reader] = {"sliding_window": "sliding_window"}
LLAMA_DEFAULTS: dict[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "attention_bias": False,
    "mlp_bias": False,
}


def row(
    names: Mapping[str, Rule],
    fields: Mapping[str, Reader] | None = None,
    *,
    fixed: Mapping[str, Any] | None = None,
    defaults: Mapping[str, Any] | None = None,
    refuse: Mapping[str, Any] | None = None,
    **more: Any,
) -> Family:
    """A family that spells as Llama does but for what is said."""
    return Family(
        weights=names,
        fields={**COMMON, **(fields or {})},
        fixed=fixed or {},
        defaults={**LLAMA_DEFAULTS, **(defaults or {})},
        refuse=refuse or {},
        **more,
    )
