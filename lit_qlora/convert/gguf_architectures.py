"""The models that llama.cpp computes as we do, with its names for them: a row for each family.

Source of what its graphs compute and read from a file: https://github.com/ggml-org/llama.cpp, src/models
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from lit_qlora.commands import spell
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig

UNDERSTOOD = {
    *("name", "family", "wrapper", "n_layer", "n_embd", "n_head", "n_kv_head", "head_size", "ffn_size", "vocab_size"),
    *("block_size", "norm_eps", "rope_theta", "tied_head", "sliding_window"),
    *("rope_scaling", "rope_factor", "rope_original_block_size", "rope_low_freq_factor", "rope_high_freq_factor"),
    *("rope_beta_fast", "rope_beta_slow", "rope_short_factors", "rope_long_factors"),
}
"""Fields of ModelConfig that can have any value in every row; see check_supported about scaling and windows."""
LONGROPE = ("llama", "phi3", "minicpm3")
"""The graphs that read a factor for each wavelength."""
CONTEXT_STEP = 256
"""llama.cpp rounds its context up to a multiple of it."""
EXPERTS = {"n_expert", "n_expert_per_token", "expert_size"}
ROUTED = EXPERTS | {"router", "router_normalized", "router_scale"}


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
    names_windows: bool = False
    """A file says which blocks have the sliding window."""
    own_head: bool = False
    """A head that is the embedding has to be in the file a second time."""
    head_sizes: frozenset[Literal["equal", "whole"]] = frozenset()
    """As many heads of keys as of queries (equal); heads that make up the width of the model (whole)."""
    rounds_yarn: bool = False
    """It rounds the ends of YaRN's ramp where the model does not, so its logits are only nearly the same."""
    dense_first: bool = False
    """Of a model of experts: its first blocks may have a plain MLP."""
    shared_multiple: bool = False
    """The size of its shared expert is a multiple of that of an expert."""
    latent_absorbed: bool = True
    """Of latent attention: it computes with latent keys and values, so what widens them is a matrix for each head."""
    value_heads_tiled: bool = False
    """Of a gated delta net: the first value head of each key head comes first, then the second of each."""

    def full_layers(self, config: ModelConfig) -> tuple[int, ...]:
        """The blocks without a window in a model of so many."""
        return tuple(i for i in range(config.n_layer) if self.period and (i + 1) % self.period == 0)

    def meant(self, config: ModelConfig) -> dict[str, Any]:
        """The values that its graph gives to the fields that no file says."""
        values = dict(self.means(config) if callable(self.means) else self.means)
        if self.period and config.sliding_window is not None:
            values["full_attention_layers"] = self.full_layers(config)
        if self.dense_first:
            values["dense_layers"] = tuple(range(len(config.dense_layers)))
        if self.shared_multiple and config.n_expert:
            values["shared_expert_size"] = config.shared_expert_size // config.expert_size * config.expert_size
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


def latent_scale(config: ModelConfig) -> float:
    """The scale of scores that a graph for latent attention takes; with yarn any, by way of a key of its own."""
    with_yarn = config.rope_scaling == "yarn" and config.attention_scale is not None
    return float(config.attention_scale) if with_yarn else config.head_size**-0.5  # type: ignore[arg-type]


def interval(config: ModelConfig) -> int:
    """Every how many blocks one of a model with gated delta nets has attention."""
    return next((i + 1 for i in range(config.n_layer) if i not in config.delta_layers), config.n_layer + 1)


def delta(config: ModelConfig) -> dict[str, Any]:
    """Qwen3-Next and Qwen3.5: attention in every so many blocks, with a gate; one size of all heads of a delta net."""
    step = interval(config)
    return {
        "norm": "rms_plus_one",
        "qk_norm": "head",
        "attention_gate": True,
        "delta_layers": tuple(i for i in range(config.n_layer) if (i + 1) % step),
        "delta_value_size": config.delta_key_size,
    }


def chunked(config: ModelConfig) -> dict[str, Any]:
    """Llama 4: its sizes of chunks and scales are built in, and norms of queries but for 128 experts."""
    unrotated = every_fourth(config)
    return {
        "sliding_window": 8192,
        "chunked_window": True,
        "full_attention_layers": unrotated,
        "no_rope_layers": unrotated,
        "unrotated_scale_beta": 0.1,
        "rope_interleaved": True,
        "qk_norm": "none" if config.n_expert == 128 else "rotated",
        "qk_norm_after_rope": True,
        "dense_layers": tuple(i for i in range(config.n_layer) if (i + 1) % mixed_interval(config)),
        "router": "sigmoid",
        "router_before": True,
        "shared_expert_size": config.expert_size,
    }


def mixed_interval(config: ModelConfig) -> int:
    """Every how many blocks one of Llama 4 has experts."""
    return next((i + 1 for i in range(config.n_layer) if config.has_experts(i)), 1)


def gemma4(config: ModelConfig) -> dict[str, Any]:
    """Gemma 4: norms on both sides and of values, without a scale of scores; one size of both embeddings."""
    return {
        "ffn": "geglu_tanh",
        "embedding_multiplier": config.n_embd**0.5,
        "norm_position": "both",
        "qk_norm": "head",
        "value_norm": True,
        "attention_scale": 1.0,
        "block_scale": True,
        "per_layer_vocab": config.vocab_size if config.per_layer_size else config.per_layer_vocab,
        "experts_beside": config.n_expert > 0,
        "router_norm": config.n_expert > 0,
        "router_normalized": config.n_expert > 0,
    }


def minicpm3(config: ModelConfig) -> dict[str, Any]:
    """MiniCPM3: the multipliers of its one published model are built in."""
    return {
        "embedding_multiplier": 12.0,
        "residual_multiplier": 1.4 / config.n_layer**0.5,
        "logit_multiplier": 256 / config.n_embd,
    }


BIASES = {"qkv_bias": True, "projection_bias": True, "mlp_bias": True}
COHERE = {"norm": "layer_no_bias", "parallel_residual": True, "shared_norm": True, "rope_interleaved": True}
LLAMA = Architecture(
    name="llama",
    neighbours=True,
    reads=frozenset({"qkv_bias", "projection_bias", "mlp_bias"}),
)
LATENT = Architecture(
    name="deepseek2",
    reads=frozenset(ROUTED | {"kv_latent_size", "q_latent_size", "latent_rope_size", "latent_value_size"}),
    means=lambda config: {
        "rope_interleaved": True,
        "router_correction": config.router_correction,
        "attention_scale": latent_scale(config),
    },
    neighbours=True,
    dense_first=True,
    shared_multiple=True,
)
GLM_MOE = Architecture(
    name="glm4moe",
    reads=frozenset(ROUTED | {"rope_fraction", "qkv_bias"}),
    means=lambda config: {
        "qk_norm": config.qk_norm if config.qk_norm in ("none", "head") else "head",
        "router_correction": True,
    },
    dense_first=True,
    shared_multiple=True,
)
CONVOLUTION = Architecture(name="lfm2", reads=frozenset({"conv_layers", "conv_size"}), means={"qk_norm": "head"})
DELTA_NET = Architecture(
    name="qwen35",
    reads=frozenset({"rope_fraction", "delta_key_heads", "delta_value_heads", "delta_key_size", "delta_conv_size"}),
    means=delta,
    value_heads_tiled=True,
)
DELTA_EXPERTS = replace(
    DELTA_NET,
    name="qwen35moe",
    reads=DELTA_NET.reads | EXPERTS | {"shared_expert_size"},
    means=lambda config: {**delta(config), "shared_expert_gate": True, "router_normalized": True},
)
GEMMA4 = Architecture(
    name="gemma4",
    reads=frozenset(
        EXPERTS
        | {"logit_softcap", "rope_local_theta", "full_attention_layers", "full_head_size", "full_kv_heads"}
        | {"key_is_value", "shared_kv_layers", "shared_kv_ffn_size", "per_layer_size", "rope_fraction"}
    ),
    means=gemma4,
    names_windows=True,
)
LITE = (26, 27)
"""Numbers of blocks by which its graph knows models without a latent of queries, such as DeepSeek-V2-Lite."""
GRANITE = Architecture(
    name="granite",
    reads=frozenset({"attention_scale", "embedding_multiplier", "residual_multiplier", "logit_multiplier"}),
    neighbours=True,
)
GRANITE_MOE = replace(
    GRANITE,
    name="granitemoe",
    reads=GRANITE.reads | EXPERTS,
    means={"router": "softmax_chosen"},
)
HYBRID = replace(
    GRANITE_MOE,
    name="granitehybrid",
    reads=GRANITE_MOE.reads
    | {"shared_expert_size", "state_space", "delta_layers", "delta_key_heads", "delta_value_heads", "delta_key_size"}
    | {"delta_value_size", "delta_conv_size", "rope_fraction"},
    means=lambda config: {
        "conv_bias": True,
        "router": "softmax_chosen" if config.n_expert else "softmax",
        "no_rope_layers": tuple(range(config.n_layer)) if config.no_rope_layers else (),
    },
)
"""Of Granite 4 with state spaces; without, it has another graph."""
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "internlm3": LLAMA,
    "iquestcoder": LLAMA,
    "helium": replace(LLAMA, means={"rope_interleaved": True}),
    "mixtral": replace(LLAMA, reads=frozenset(EXPERTS), means={"router_normalized": True}),
    "qwen2": Architecture(name="qwen2", means={"qkv_bias": True}),
    "qwen3": Architecture(name="qwen3", means={"qk_norm": "head"}),
    "qwen3_moe": Architecture(
        name="qwen3moe", reads=frozenset(EXPERTS), means={"qk_norm": "head", "router_normalized": True}
    ),
    "qwen2_moe": Architecture(
        name="qwen2moe",
        reads=frozenset(EXPERTS | {"shared_expert_size"}),
        means={"qkv_bias": True, "shared_expert_gate": True},
    ),
    "olmoe": Architecture(
        name="olmoe", reads=frozenset(EXPERTS), means={"qk_norm": "full"}, head_sizes=frozenset({"equal", "whole"})
    ),
    "glm4_moe": GLM_MOE,
    "solar_open": GLM_MOE,
    "dots1": Architecture(
        name="dots1",
        reads=frozenset(ROUTED),
        means={"qk_norm": "head", "router_correction": True},
        head_sizes=frozenset({"equal"}),
        dense_first=True,
        shared_multiple=True,
    ),
    "ernie4_5_moe": Architecture(
        name="ernie4_5-moe",
        reads=frozenset(EXPERTS | {"shared_expert_size"}),
        means={"rope_interleaved": True, "router_normalized": True, "router_correction": True},
        neighbours=True,
        dense_first=True,
    ),
    "exaone_moe": Architecture(
        name="exaone-moe",
        reads=frozenset(ROUTED | {"shared_expert_size"}),
        means=lambda config: {
            "qk_norm": "head",
            "router_correction": True,
            "no_rope_layers": tuple(i for i in range(config.n_layer) if (i + 1) % 4 == 0),
        },
        period=4,
        dense_first=True,
    ),
    "hunyuan_v1_moe": Architecture(
        name="hunyuan-moe",
        reads=frozenset(EXPERTS | {"shared_expert_size"}),
        means={"qk_norm": "head", "qk_norm_after_rope": True, "router_normalized": True},
    ),
    "minimax_m2": Architecture(
        name="minimax-m2",
        reads=frozenset(EXPERTS | {"rope_fraction", "router"}),
        means={"qk_norm": "full", "router_normalized": True, "router_correction": True},
    ),
    "gpt_oss": Architecture(
        name="gpt-oss",
        reads=frozenset(EXPERTS),
        means={
            "ffn": "swiglu_clamped",
            "attention_sinks": True,
            "router": "softmax_chosen",
            "router_bias": True,
            **BIASES,
        },
        period=2,
        rounds_yarn=True,
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
    "granite": GRANITE,
    "deepseek_v2": LATENT,
    "deepseek_v3": replace(LATENT, reads=LATENT.reads | {"router_groups", "router_groups_kept"}),
    "glm4_moe_lite": replace(LATENT, reads=LATENT.reads | {"router_groups", "router_groups_kept"}),
    "granitemoehybrid": GRANITE,
    "bamba": HYBRID,
    "granitemoe": GRANITE_MOE,
    "granitemoeshared": replace(GRANITE_MOE, reads=GRANITE_MOE.reads | {"shared_expert_size"}),
    "arcee": Architecture(name="arcee", means={"ffn": "relu2"}, neighbours=True),
    "nemotron": Architecture(
        name="nemotron",
        reads=frozenset({"rope_fraction", "qkv_bias", "projection_bias", "mlp_bias"}),
        means={"norm": "layer_plus_one", "ffn": "relu2"},
        head_sizes=frozenset({"whole"}),
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
    "gpt_bigcode": Architecture(
        name="starcoder", means={"norm": "layer", "ffn": "gelu_tanh", "positions": "learned", **BIASES}
    ),
    "jais2": Architecture(name="jais2", means={"norm": "layer", "ffn": "relu2", **BIASES}),
    "qwen3_5_text": DELTA_NET,
    "qwen3_5_moe_text": DELTA_EXPERTS,
    "qwen3_next": replace(DELTA_EXPERTS, name="qwen3next", value_heads_tiled=False),
    "llama4_text": Architecture(name="llama4", reads=frozenset(EXPERTS), means=chunked, neighbours=True),
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": GEMMA4,
    "lfm2": CONVOLUTION,
    "lfm2_moe": replace(
        CONVOLUTION,
        name="lfm2moe",
        reads=CONVOLUTION.reads | EXPERTS | {"router"},
        means={"qk_norm": "head", "router": "sigmoid", "router_normalized": True, "router_correction": True},
        dense_first=True,
    ),
    "ministral3": Architecture(name="mistral3", reads=frozenset({"query_scale_beta"}), neighbours=True),
    "mistral4": replace(LATENT, name="mistral4", reads=LATENT.reads | {"query_scale_beta"}),
    "youtu": LATENT,
    "minicpm3": Architecture(
        name="minicpm3",
        reads=frozenset({"kv_latent_size", "q_latent_size", "latent_rope_size", "latent_value_size"}),
        means=minicpm3,
        latent_absorbed=False,
    ),
    "glm": Architecture(
        name="chatglm",
        reads=frozenset({"rope_fraction", "qkv_bias"}),
        means={"rope_interleaved": True},
        neighbours=True,
        head_sizes=frozenset({"whole"}),
    ),
    "apertus": Architecture(name="apertus", means={"ffn": "xielu", "qk_norm": "head"}),
    "afmoe": Architecture(
        name="afmoe",
        reads=frozenset(ROUTED),
        means=lambda config: {
            "norm_position": "both",
            "qk_norm": "head",
            "attention_gate": True,
            "embedding_multiplier": config.n_embd**0.5,
            "router_correction": True,
            "no_rope_layers": every_fourth(config),
        },
        period=4,
        dense_first=True,
        shared_multiple=True,
    ),
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
_UNKNOWN = "the gguf package has no names for it"
OTHERWISE = {
    **dict.fromkeys(("cohere2_moe", "cwm", "flex_olmo", "gpt_neo", "granite_swa", "hy_v3"), _UNKNOWN),
    **dict.fromkeys(("hyperclovax", "mellum", "ministral", "vaultgemma"), _UNKNOWN),
    "gptj": "llama.cpp has no graph for it",
    "nanochat": _UNKNOWN,
    "phimoe": "llama.cpp weighs the chosen experts otherwise",
}
"""Our family -> why there is no row for it."""


def write_otherwise() -> str:
    """Advice about a model that has no GGUF."""
    return f"{spell('scripts/convert_lit_checkpoint.py')} writes it for transformers and vLLM."


def graph_of(config: ModelConfig) -> Architecture | None:
    """The row of a model, if it has one."""
    return HYBRID if config.state_space else ARCHITECTURES.get(config.family)


def check_supported(config: ModelConfig) -> Architecture:
    """The row of a model.

    Raises:
        CheckpointError: if llama.cpp would compute it otherwise, naming the settings.
    """
    found = graph_of(config)
    if found is None:
        why = OTHERWISE.get(config.family, "no row describes it")
        raise CheckpointError(
            f"{config.name} cannot be written as GGUF: it is a {config.family}, and {why}.\n{write_otherwise()}"
        )
    meant = found.meant(config)
    if config.rope_scaling in ("yarn", "longrope"):
        meant |= {"rope_attention_factor": config.rope_attention_factor, "rope_truncate": config.rope_truncate}
    other = [
        f"{field.name} {getattr(config, field.name)!r}"
        for field in fields(config)
        if (field.name not in UNDERSTOOD | found.reads or field.name in meant)
        and not _same(config, field.name, meant.get(field.name, field.default))
    ]
    scalings = ["none", "linear", "llama3"]
    rounds = config.rope_truncate or found.rounds_yarn
    scalings += ["yarn"] if (not found.period or found.rounds_yarn) and rounds else []
    whole_steps = config.rope_original_block_size % CONTEXT_STEP == 0  # else its context is longer, its factors others
    scalings += ["longrope"] if found.name in LONGROPE and whole_steps else []
    if found.names_windows:
        scalings = ["proportional"]
        first = config.n_layer - config.shared_kv_layers
        if config.shared_kv_layers and (config.windowed(first - 1) or not config.windowed(first - 2)):
            other.append(f"shared_kv_layers {config.shared_kv_layers} behind blocks of another order")
    if config.rope_scaling not in scalings:
        other.append(f"rope_scaling {config.rope_scaling!r}")
    if config.family == "qwen2" and config.sliding_window is not None:
        other.append("sliding_window")
    if "equal" in found.head_sizes and config.n_kv_head != config.n_head:
        other.append(f"n_kv_head {config.n_kv_head}")
    if "whole" in found.head_sizes and config.n_head * config.head_size != config.n_embd:
        other.append(f"head_size {config.head_size}")
    if found.name == LATENT.name and not config.q_latent_size and config.n_layer not in LITE:
        other.append(f"q_latent_size 0 in {config.n_layer} blocks")
    caps = ("attention_softcap", "logit_softcap") if "attention_softcap" in found.reads else ()
    other += [f"no {name}" for name in caps if getattr(config, name) is None]
    if other:
        raise CheckpointError(
            f"{config.name} cannot be written as GGUF: it has {', '.join(other)}, which llama.cpp computes otherwise.\n"
            f"{write_otherwise()}"
        )
    return found


def _same(config: ModelConfig, name: str, meant: Any) -> bool:
    """Tell if the field `name` of `config` is `meant`; floats may differ by float32's rounding."""
    value = getattr(config, name)
    if name == "attention_scale":
        value, meant = (x if x is not None else config.head_size**-0.5 for x in (value, meant))
    if isinstance(value, float) and isinstance(meant, float):
        return abs(value - meant) <= 1e-6 * abs(meant)
    return bool(value == meant)
