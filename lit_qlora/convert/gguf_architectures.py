"""The models that llama.cpp computes as we do, with its names for them: a row for each family.

Source of what its graphs compute and read from a file: https://github.com/ggml-org/llama.cpp, src/models
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig

UNDERSTOOD = {
    *("name", "family", "wrapper", "n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "ffn_size", "vocab_size"),
    *("block_size", "norm_eps", "rope_theta", "tied_head", "sliding_window"),
    *("rope_scaling", "rope_factor", "rope_original_block_size", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_beta_fast", "rope_beta_slow", "rope_short_factors", "rope_long_factors"),
}
"""Fields of ModelConfig that can have any value in every row; see check_supported about scaling and windows."""
LONGROPE = ("llama", "phi3")
"""The graphs that read a factor for each wavelength."""
CONTEXT_STEP = 256
"""llama.cpp rounds its context up to a multiple of it."""
EXPERTS = {"n_expert", "n_expert_per_token", "expert_size"}


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """llama.cpp's graph for a family of ours."""

    name: str
    """llama.cpp's name of the graph."""
    reads: frozenset[str] = frozenset()
    """Further fields that a file can say any value of."""
    means: Mapping[str, Any] | Callable[[ModelConfig], Mapping[str, Any]] = lambda config: {}
    """The value that its graph gives to other fields; the default of ModelConfig where it is not named."""
    neighbours: bool = False
    """Its RoPE turns feature 2 i with 2 i + 1, instead of i with i + half."""
    period: int | None = None
    """It has a sliding window in all but the last of so many blocks; None: in none."""
    own_head: bool = False
    """A head that is the embedding has to be in the file a second time."""

    def full_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """The blocks without a window in a model of so many."""
        return tuple(i for i in range(config.n_layer) if self.period and (i + 1) % self.period == 0)

    def meant(self, config: ModelConfig) -> dict[str, Any]:
        """The values that its graph gives to the fields that no file says."""
        values = dict(self.means(config) if callable(self.means) else self.means)
        if self.period and config.sliding_window is not None:
            values["full_attention_layers"] = self.full_layers(config)
        return values


def gemma(config: ModelConfig) -> dict[str, Any]:
    """Gemma: norms that add one, and an embedding that is multiplied by the root of its size."""
    return {"norm": "rms_plus_one", "ffn": "geglu_tanh", "embedding_multiplier": config.n_embd**0.5}


def gemma_2_or_3(config: ModelConfig) -> dict[str, Any]:
    """Gemma 2 and 3: norms on both sides; scores are scaled by head_size, in the largest models by n_embd / n_head."""
    size = config.n_embd / config.n_head if config.n_layer in (46, 62) else config.head_size
    return {**gemma(config), "norm_position": "both", "attention_scale": size**-0.5}


def gelu(config: ModelConfig) -> str:
    """GELU, exact or not: llama.cpp has the approximation with tanh alone, which is off by 0.0005 at most."""
    return "gelu" if config.ffn == "gelu" else "gelu_tanh"


def every_fourth(config: ModelConfig) -> tuple[int, ...]:
    """The blocks that rotate nothing in SmolLM3 and Cohere 2."""
    return tuple(i for i in range(config.n_layer) if i % 4 == 3)


BIASES = {"qkv_bias": True, "projection_bias": True, "mlp_bias": True}
COHERE = {"norm": "layer_no_bias", "parallel_residual": True, "shared_norm": True, "rope_interleaved": True}
LLAMA = Architecture(
    name="llama",
    neighbours=True,
    reads=frozenset({"qkv_bias", "projection_bias", "mlp_bias"}),
)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": replace(LLAMA, reads=frozenset(EXPERTS), means={"router_normalized": True}),
    "qwen2": Architecture(name="qwen2", means={"qkv_bias": True}),
    "qwen3": Architecture(name="qwen3", means={"qk_norm": "head"}),
    "qwen3_moe": Architecture(
        name="qwen3moe", reads=frozenset(EXPERTS), means={"qk_norm": "head", "router_normalized": True}
    ),
    "phi3": Architecture(name="phi3", reads=frozenset({"rope_fraction"})),
    "gemma": Architecture(name="gemma", means=gemma),
    "gemma2": Architecture(
        name="gemma2", reads=frozenset({"attention_softcap", "logit_softcap"}), means=gemma_2_or_3, period=2
    ),
    "gemma3_text": Architecture(
        name="gemma3",
        reads=frozenset({"logit_softcap", "rope_local_theta"}),
        means=lambda config: {**gemma_2_or_3(config), "qk_norm": "head"},
        period=6,
    ),
    "olmo": Architecture(
        name="olmo", reads=frozenset({"clip_qkv"}), means={"norm": "layer_no_weight"}, neighbours=True
    ),
    "olmo2": Architecture(name="olmo2", means={"norm_position": "after", "qk_norm": "full"}, own_head=True),
    "olmo3": Architecture(
        name="olmo2",
        reads=frozenset({"rope_local_theta"}),
        means={"norm_position": "after", "qk_norm": "full"},
        period=4,
        own_head=True,
    ),
    "smollm3": Architecture(
        name="smollm3", means=lambda config: {"no_rope_layers": every_fourth(config)}, neighbours=True
    ),
    "granite": Architecture(
        name="granite",
        reads=frozenset({"attention_scale", "embedding_multiplier", "residual_multiplier", "logit_multiplier"}),
        neighbours=True,
    ),
    "glm4": Architecture(
        name="glm4",
        reads=frozenset({"rope_fraction", "qkv_bias"}),
        means={"rope_interleaved": True, "norm_position": "both"},
        neighbours=True,
    ),
    "ernie4_5": Architecture(name="ernie4_5", means={"rope_interleaved": True}, neighbours=True),
    "seed_oss": Architecture(name="seed_oss", means={"qkv_bias": True}),
    "exaone4": Architecture(name="exaone4", means={"norm_position": "after", "qk_norm": "head"}),
    "hunyuan_v1_dense": Architecture(name="hunyuan-dense", means={"qk_norm": "head", "qk_norm_after_rope": True}),
    "starcoder2": Architecture(name="starcoder2", means={"norm": "layer", "ffn": "gelu_tanh", **BIASES}),
    "stablelm": Architecture(
        name="stablelm",
        reads=frozenset({"rope_fraction", "qkv_bias"}),
        means=lambda config: {
            "norm": "layer",
            "parallel_residual": config.shared_norm,
            "shared_norm": config.shared_norm,
        },
        own_head=True,
    ),
    "phi": Architecture(
        name="phi2",
        reads=frozenset({"rope_fraction"}),
        means={"norm": "layer", "ffn": "gelu_tanh", "head_bias": True, "parallel_residual": True, "shared_norm": True}
        | BIASES,
    ),
    "gpt_neox": Architecture(
        name="gptneox",
        reads=frozenset({"rope_fraction", "parallel_residual"}),
        means=lambda config: {"norm": "layer", "ffn": gelu(config), **BIASES},
        own_head=True,
    ),
    "falcon": Architecture(
        name="falcon",
        means=lambda config: {
            "norm": "layer",
            "ffn": gelu(config),
            "parallel_residual": True,
            "shared_norm": config.shared_norm,
        },
    ),
    "gpt2": Architecture(name="gpt2", means={"norm": "layer", "ffn": "gelu_tanh", "positions": "learned", **BIASES}),
    "cohere": Architecture(name="command-r", reads=frozenset({"logit_multiplier"}), means=COHERE, neighbours=True),
    "cohere2": Architecture(
        name="cohere2",
        reads=frozenset({"logit_multiplier"}),
        means=lambda config: {**COHERE, "no_rope_layers": every_fourth(config)},
        neighbours=True,
        period=4,
    ),
}
"""Our family -> how llama.cpp computes it."""
OTHERWISE = {
    "gpt_oss": "llama.cpp rounds the ends of its YaRN scaling, and these models do not",
    "deepseek_v2": "llama.cpp wants the latent attention's weights multiplied into each other, which is not written",
    "deepseek_v3": "llama.cpp wants the latent attention's weights multiplied into each other, which is not written",
}
"""Our family -> why there is no row for it, though llama.cpp has a graph."""


def check_supported(config: ModelConfig) -> Architecture:
    """The row of a model.

    Raises:
        CheckpointError: if llama.cpp would compute it otherwise, naming the settings.
    """
    found = ARCHITECTURES.get(config.family)
    if found is None:
        why = f": {OTHERWISE[config.family]}" if config.family in OTHERWISE else ""
        raise CheckpointError(
            f"GGUF is written for the families {', '.join(ARCHITECTURES)}; {config.name} is a {config.family}{why}."
        )
    meant = found.meant(config)
    if config.rope_scaling in ("yarn", "longrope"):
        meant |= {"rope_attention_factor": config.rope_attention_factor, "rope_truncate": config.rope_truncate}
    other = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in fields(config)
        if field.name not in UNDERSTOOD | found.reads
        and not _same(config, field.name, meant.get(field.name, field.default))
    ]
    scalings = ["none", "linear", "llama3"]
    scalings += ["yarn"] if not found.period and config.rope_truncate else []
    whole_steps = config.rope_original_block_size % CONTEXT_STEP == 0  # else its context is longer, its factors others
    scalings += ["longrope"] if found.name in LONGROPE and whole_steps else []
    if config.rope_scaling not in scalings:
        other.append(f"rope_scaling {config.rope_scaling!r}")
    if config.family == "qwen2" and config.sliding_window is not None:
        other.append("sliding_window")
    if "attention_softcap" in found.reads and config.attention_softcap is None:
        other.append("no attention_softcap")
    if other:
        raise CheckpointError(f"{config.name} cannot be written as GGUF: it has {', '.join(other)}.")
    return found


def _same(config: ModelConfig, name: str, meant: Any) -> bool:
    """Tell if the field `name` of `config` is `meant`; floats may differ by float32's rounding."""
    value = getattr(config, name)
    if name == "attention_scale":
        value, meant = (x if x is not None else config.head_size**-0.5 for x in (value, meant))
    if isinstance(value, float) and isinstance(meant, float):
        return abs(value - meant) <= 1e-6 * abs(meant)
    return bool(value == meant)
