"""The names that each family gives to its weights.

Of several names for one of ours, the first is what files have and the last what transformers has in memory.
"""

from collections.abc import Mapping

from lit_qlora.convert.families.rules import (
    DROP,
    Either,
    Fused,
    OneRow,
    Packed,
    Rule,
    Stacked,
    Transposed,
    When,
    tensors,
)
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import XIELU_EPS, XIELU_SLOPE

_BLOCK = "blocks.{i}"
_QUERY, _KEY, _VALUE = (f"{_BLOCK}.attn.{name}" for name in ("query", "key", "value"))
_GATE, _UP = f"{_BLOCK}.mlp.gate", f"{_BLOCK}.mlp.up"
_EXPERT = f"{_BLOCK}.mlp.experts.{{e}}"
_LAYER = "model.layers.{i}"

LLAMA: dict[str, Rule] = tensors(
    {
        "model.embed_tokens": "embed",
        f"{_LAYER}.input_layernorm": f"{_BLOCK}.norm_1",
        f"{_LAYER}.self_attn.q_proj": _QUERY,
        f"{_LAYER}.self_attn.k_proj": _KEY,
        f"{_LAYER}.self_attn.v_proj": _VALUE,
        f"{_LAYER}.self_attn.o_proj": f"{_BLOCK}.attn.projection",
        f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.norm_2",
        f"{_LAYER}.mlp.gate_proj": _GATE,
        f"{_LAYER}.mlp.up_proj": _UP,
        f"{_LAYER}.mlp.down_proj": f"{_BLOCK}.mlp.down",
        "model.norm": "norm",
        "lm_head": "head",
    }
) | {f"{_LAYER}.self_attn.rotary_emb.inv_freq": DROP, "model.rotary_emb.inv_freq": DROP}


def without(weights: Mapping[str, Rule], *words: str) -> dict[str, Rule]:
    """The rules whose name holds none of the words."""
    return {name: rule for name, rule in weights.items() if not any(word in name for word in words)}


def qk_norm(query: str, key: str) -> dict[str, Rule]:
    """The rules of a norm on queries and one on keys."""
    return tensors(
        {
            f"{_LAYER}.self_attn.{query}": f"{_BLOCK}.attn.query_norm",
            f"{_LAYER}.self_attn.{key}": f"{_BLOCK}.attn.key_norm",
        }
    )


QWEN3 = LLAMA | qk_norm("q_norm", "k_norm")
HUNYUAN = LLAMA | qk_norm("query_layernorm", "key_layernorm")
_EXPERTS = tensors(
    {
        f"{_LAYER}.mlp.gate": f"{_BLOCK}.mlp.router",
        f"{_LAYER}.mlp.experts.{{e}}.gate_proj": f"{_EXPERT}.gate",
        f"{_LAYER}.mlp.experts.{{e}}.up_proj": f"{_EXPERT}.up",
        f"{_LAYER}.mlp.experts.{{e}}.down_proj": f"{_EXPERT}.down",
        f"{_LAYER}.mlp.shared_experts.gate_proj": f"{_BLOCK}.mlp.shared.gate",
        f"{_LAYER}.mlp.shared_experts.up_proj": f"{_BLOCK}.mlp.shared.up",
        f"{_LAYER}.mlp.shared_experts.down_proj": f"{_BLOCK}.mlp.shared.down",
    }
)
QWEN3_MOE = QWEN3 | without(_EXPERTS, "shared")
_CORRECTION = f"{_BLOCK}.mlp.router.correction"
LLAMA_MOE = LLAMA | _EXPERTS | {f"{_LAYER}.mlp.gate.e_score_correction_bias": _CORRECTION}
GLM4_MOE = LLAMA_MOE | QWEN3
EXAONE_MOE = QWEN3 | _EXPERTS | {f"{_LAYER}.mlp.e_score_correction_bias": _CORRECTION}
FLEX_OLMO = QWEN3_MOE | tensors(
    {
        f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.post_norm_1",
        f"{_LAYER}.post_feedforward_layernorm": f"{_BLOCK}.post_norm_2",
    }
)
ERNIE4_5_MOE = LLAMA | _EXPERTS | {f"{_LAYER}.mlp.moe_statics.e_score_correction_bias": OneRow(_CORRECTION)}
_SHARED_MLP = tensors(
    {
        f"{_LAYER}.mlp.shared_mlp.gate_proj": f"{_BLOCK}.mlp.shared.gate",
        f"{_LAYER}.mlp.shared_mlp.up_proj": f"{_BLOCK}.mlp.shared.up",
        f"{_LAYER}.mlp.shared_mlp.down_proj": f"{_BLOCK}.mlp.shared.down",
    }
)
_ONLY_EXPERTS = without(_EXPERTS, "shared", ".gate.")
HUNYUAN_MOE = without(HUNYUAN, ".mlp.") | _ONLY_EXPERTS | _SHARED_MLP | tensors(
    {f"{_LAYER}.mlp.gate.wg": f"{_BLOCK}.mlp.router"}
)  # fmt: skip
HY_V3 = (
    QWEN3
    | _ONLY_EXPERTS
    | _SHARED_MLP
    | tensors({f"{_LAYER}.mlp.router.gate": f"{_BLOCK}.mlp.router"})
    | {f"{_LAYER}.mlp.expert_bias": _CORRECTION}
    | {name: rule for name, rule in _EXPERTS.items() if "shared" in name}  # in memory, as the next
    | tensors({f"{_LAYER}.mlp.gate": f"{_BLOCK}.mlp.router"})
)
AFMOE = without(QWEN3, "post_attention_layernorm") | _ONLY_EXPERTS | tensors(
    {
        f"{_LAYER}.self_attn.gate_proj": f"{_BLOCK}.attn.query_gate",
        f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.post_norm_1",
        f"{_LAYER}.pre_mlp_layernorm": f"{_BLOCK}.norm_2",
        f"{_LAYER}.post_mlp_layernorm": f"{_BLOCK}.post_norm_2",
        f"{_LAYER}.mlp.router.gate": f"{_BLOCK}.mlp.router",
    }
) | {
    f"{_LAYER}.mlp.expert_bias": _CORRECTION,
    **{name: rule for name, rule in _EXPERTS.items() if "shared" in name},
}  # fmt: skip
_STACKED_EXPERTS: dict[str, Rule] = {
    "gate_up": Stacked(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "blocks")),
    "down": Stacked(f"{_EXPERT}.down.weight"),
}
GRANITE_MOE = without(LLAMA, ".mlp.") | {
    f"{_LAYER}.block_sparse_moe.input_linear.weight": _STACKED_EXPERTS["gate_up"],
    f"{_LAYER}.block_sparse_moe.output_linear.weight": _STACKED_EXPERTS["down"],
    f"{_LAYER}.block_sparse_moe.router.layer.weight": f"{_BLOCK}.mlp.router.weight",
    f"{_LAYER}.block_sparse_moe.router.weight": f"{_BLOCK}.mlp.router.weight",  # in transformers' memory
}
GRANITE_MOE_SHARED = GRANITE_MOE | tensors(
    {
        f"{_LAYER}.shared_mlp.input_linear": Fused((f"{_BLOCK}.mlp.shared.gate", f"{_BLOCK}.mlp.shared.up"), "blocks"),
        f"{_LAYER}.shared_mlp.output_linear": f"{_BLOCK}.mlp.shared.down",
    }
)
_SHARED = f"{_BLOCK}.mlp.shared"
GRANITE_HYBRID = GRANITE_MOE | tensors(
    {
        f"{_LAYER}.shared_mlp.input_linear": Either(
            Fused((_GATE, _UP), "blocks"), Fused((f"{_SHARED}.gate", f"{_SHARED}.up"), "blocks")
        ),
        f"{_LAYER}.shared_mlp.output_linear": Either(f"{_BLOCK}.mlp.down", f"{_SHARED}.down"),
    }
)
_MAMBA = f"{_LAYER}.mamba"
_SPACE = tuple(f"{_BLOCK}.delta.{part}.weight" for part in ("output_gate", "value", "key", "query", "decay"))
_STATE_SPACE: dict[str, Rule] = {
    f"{_MAMBA}.in_proj.weight": Fused(_SPACE, "blocks"),
    f"{_MAMBA}.conv1d.weight": f"{_BLOCK}.delta.conv",
    f"{_MAMBA}.conv1d.bias": f"{_BLOCK}.delta.conv_bias",
    f"{_MAMBA}.A_log": f"{_BLOCK}.delta.decay_rate",
    f"{_MAMBA}.dt_bias": f"{_BLOCK}.delta.decay_bias",
    f"{_MAMBA}.D": f"{_BLOCK}.delta.skip",
    f"{_MAMBA}.norm.weight": f"{_BLOCK}.delta.norm.weight",
    f"{_MAMBA}.out_proj.weight": f"{_BLOCK}.delta.projection.weight",
}
GRANITE_HYBRID |= _STATE_SPACE
BAMBA = without(LLAMA, ".mlp.", "post_attention_layernorm", "model.norm") | _STATE_SPACE | tensors(
    {
        f"{_LAYER}.pre_ff_layernorm": f"{_BLOCK}.norm_2",
        f"{_LAYER}.feed_forward.gate_proj": _GATE,
        f"{_LAYER}.feed_forward.up_proj": _UP,
        f"{_LAYER}.feed_forward.down_proj": f"{_BLOCK}.mlp.down",
        "model.final_layernorm": "norm",
    }
)  # fmt: skip
PHIMOE = without(LLAMA, ".mlp.") | tensors(
    {
        f"{_LAYER}.block_sparse_moe.gate": f"{_BLOCK}.mlp.router",
        f"{_LAYER}.block_sparse_moe.experts.{{e}}.w1": f"{_EXPERT}.gate",
        f"{_LAYER}.block_sparse_moe.experts.{{e}}.w2": f"{_EXPERT}.down",
        f"{_LAYER}.block_sparse_moe.experts.{{e}}.w3": f"{_EXPERT}.up",
    }
)
# What transformers 5 calls routers in memory.
MIXTRAL = PHIMOE | tensors({f"{_LAYER}.mlp.gate": f"{_BLOCK}.mlp.router"})
PHIMOE |= tensors({f"{_LAYER}.mlp.router": f"{_BLOCK}.mlp.router"})
MINIMAX_M2 = MIXTRAL | qk_norm("q_norm", "k_norm") | {f"{_LAYER}.block_sparse_moe.e_score_correction_bias": _CORRECTION}
GEMMA2 = without(LLAMA, "post_attention_layernorm") | tensors(
    {
        f"{_LAYER}.post_attention_layernorm": f"{_BLOCK}.post_norm_1",
        f"{_LAYER}.pre_feedforward_layernorm": f"{_BLOCK}.norm_2",
        f"{_LAYER}.post_feedforward_layernorm": f"{_BLOCK}.post_norm_2",
    }
)
GEMMA3 = GEMMA2 | qk_norm("q_norm", "k_norm")
OLMO2 = without(GEMMA3, "input_layernorm", "pre_feedforward_layernorm")
UNGATED = without(LLAMA, "gate_proj")
APERTUS = without(UNGATED, "layernorm") | qk_norm("q_norm", "k_norm") | tensors(
    {
        f"{_LAYER}.attention_layernorm": f"{_BLOCK}.norm_1",
        f"{_LAYER}.feedforward_layernorm": f"{_BLOCK}.norm_2",
    }
) | {
    f"{_LAYER}.mlp.act_fn.alpha_p": f"{_BLOCK}.mlp.activation.positive",
    f"{_LAYER}.mlp.act_fn.alpha_n": f"{_BLOCK}.mlp.activation.negative",
}  # fmt: skip
APERTUS_CONSTANTS = {f"{_LAYER}.mlp.act_fn.beta": XIELU_SLOPE, f"{_LAYER}.mlp.act_fn.eps": XIELU_EPS}
VAULTGEMMA = without(LLAMA, "post_attention_layernorm") | tensors(
    {f"{_LAYER}.pre_feedforward_layernorm": f"{_BLOCK}.norm_2"}
)
GRANITE_SWA = LLAMA | {f"{_LAYER}.self_attn.sinks": f"{_BLOCK}.attn.sinks"}
HYPERCLOVAX = LLAMA | tensors(
    {f"{_LAYER}.post_norm1": f"{_BLOCK}.post_norm_1", f"{_LAYER}.post_norm2": f"{_BLOCK}.post_norm_2"}
)
PHI = without(LLAMA, "o_proj", ".mlp.", "model.norm") | tensors(
    {
        f"{_LAYER}.self_attn.dense": f"{_BLOCK}.attn.projection",
        f"{_LAYER}.mlp.fc1": _UP,
        f"{_LAYER}.mlp.fc2": f"{_BLOCK}.mlp.down",
        "model.final_layernorm": "norm",
    }
) | qk_norm("q_layernorm", "k_layernorm")  # fmt: skip
_FUSED_MLP = tensors({f"{_LAYER}.mlp.gate_up_proj": Fused((_GATE, _UP), "blocks")})
PHI3 = (
    without(LLAMA, "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    | tensors({f"{_LAYER}.self_attn.qkv_proj": Fused((_QUERY, _KEY, _VALUE), "blocks")})
    | _FUSED_MLP
)
GLM = without(LLAMA, "gate_proj", "up_proj") | _FUSED_MLP
GLM4 = GLM | tensors(
    {
        f"{_LAYER}.post_self_attn_layernorm": f"{_BLOCK}.post_norm_1",
        f"{_LAYER}.post_mlp_layernorm": f"{_BLOCK}.post_norm_2",
    }
)
STARCODER2 = without(LLAMA, ".mlp.") | tensors(
    {f"{_LAYER}.mlp.c_fc": _UP, f"{_LAYER}.mlp.c_proj": f"{_BLOCK}.mlp.down"}
)
STABLELM = LLAMA | tensors(
    {
        f"{_LAYER}.self_attn.q_layernorm.norms.{{e}}": f"{_BLOCK}.attn.query_norm.{{e}}",
        f"{_LAYER}.self_attn.k_layernorm.norms.{{e}}": f"{_BLOCK}.attn.key_norm.{{e}}",
    }
)
COHERE = LLAMA | tensors(
    {
        f"{_LAYER}.self_attn.q_norm": Stacked(f"{_BLOCK}.attn.query_norm.{{e}}"),
        f"{_LAYER}.self_attn.k_norm": Stacked(f"{_BLOCK}.attn.key_norm.{{e}}"),
    }
)
_NEOX_LAYER = "gpt_neox.layers.{i}"
NEOX: dict[str, Rule] = {
    f"{_NEOX_LAYER}.attention.rotary_emb.inv_freq": DROP,
    f"{_NEOX_LAYER}.attention.masked_bias": DROP,
    f"{_NEOX_LAYER}.attention.bias": DROP,
} | tensors(
    {
        "gpt_neox.embed_in": "embed",
        f"{_NEOX_LAYER}.input_layernorm": f"{_BLOCK}.norm_1",
        f"{_NEOX_LAYER}.attention.query_key_value": Fused((_QUERY, _KEY, _VALUE)),
        f"{_NEOX_LAYER}.attention.dense": f"{_BLOCK}.attn.projection",
        f"{_NEOX_LAYER}.post_attention_layernorm": f"{_BLOCK}.norm_2",
        f"{_NEOX_LAYER}.mlp.dense_h_to_4h": _UP,
        f"{_NEOX_LAYER}.mlp.dense_4h_to_h": f"{_BLOCK}.mlp.down",
        "gpt_neox.final_layer_norm": "norm",
        "embed_out": "head",
        "lm_head": "head",  # what transformers 5 calls it in memory
    }
)
_GPT2 = tensors(
    {
        "wte": "embed",
        "wpe": "positions",
        "h.{i}.ln_1": f"{_BLOCK}.norm_1",
        "h.{i}.attn.c_attn": Transposed(Fused((_QUERY, _KEY, _VALUE), "blocks")),
        "h.{i}.attn.c_proj": Transposed(f"{_BLOCK}.attn.projection"),
        "h.{i}.ln_2": f"{_BLOCK}.norm_2",
        "h.{i}.mlp.c_fc": Transposed(_UP),
        "h.{i}.mlp.c_proj": Transposed(f"{_BLOCK}.mlp.down"),
        "ln_f": "norm",
    }
) | {"h.{i}.attn.bias": DROP, "h.{i}.attn.masked_bias": DROP}
GPT2 = {
    # The oldest files of the hub leave the prefix out.
    **{name: rule if rule == DROP else When(rule, lambda config: False) for name, rule in _GPT2.items()},
    **{f"transformer.{name}": rule for name, rule in _GPT2.items()},
    **tensors({"lm_head": "head"}),
}


_H = "transformer.h.{i}"


def _gpt(attention: str, projection: str, mlp: tuple[str, str]) -> dict[str, Rule]:
    """GPT-J and GPT-Neo: as GPT-2 but for layers of their own."""
    return tensors(
        {
            "transformer.wte": "embed",
            "transformer.wpe": "positions",
            f"{_H}.ln_1": f"{_BLOCK}.norm_1",
            f"{_H}.{attention}.q_proj": _QUERY,
            f"{_H}.{attention}.k_proj": _KEY,
            f"{_H}.{attention}.v_proj": _VALUE,
            f"{_H}.{attention}.{projection}": f"{_BLOCK}.attn.projection",
            f"{_H}.ln_2": f"{_BLOCK}.norm_2",
            f"{_H}.mlp.{mlp[0]}": _UP,
            f"{_H}.mlp.{mlp[1]}": f"{_BLOCK}.mlp.down",
            "transformer.ln_f": "norm",
            "lm_head": "head",
        }
    ) | {f"{_H}.{attention}.bias": DROP, f"{_H}.{attention}.masked_bias": DROP}


GPTJ = _gpt("attn", "out_proj", ("fc_in", "fc_out"))
GPT_NEO = _gpt("attn.attention", "out_proj", ("c_fc", "c_proj"))
GPT_BIGCODE = without(_gpt("attn", "c_proj", ("c_fc", "c_proj")), "q_proj", "k_proj", "v_proj") | tensors(
    {f"{_H}.attn.c_attn": Fused((_QUERY, _KEY, _VALUE), "blocks")}
)


def _falcon_norms(norm_1: str, norm_2: str, separate: bool) -> dict[str, Rule]:
    """Falcon calls its norms otherwise where a parallel block has two."""

    def holds(config: ModelConfig) -> bool:
        return separate == (config.parallel_residual and not config.shared_norm)

    return {
        f"transformer.h.{{i}}.{theirs}.{kind}": When(f"{_BLOCK}.{ours}.{kind}", holds)
        for theirs, ours in ((norm_1, "norm_1"), (norm_2, "norm_2"))
        for kind in ("weight", "bias")
    }


FALCON = tensors(
    {
        "transformer.word_embeddings": "embed",
        "transformer.h.{i}.self_attention.query_key_value": Fused((_QUERY, _KEY, _VALUE)),
        "transformer.h.{i}.self_attention.dense": f"{_BLOCK}.attn.projection",
        "transformer.h.{i}.mlp.dense_h_to_4h": _UP,
        "transformer.h.{i}.mlp.dense_4h_to_h": f"{_BLOCK}.mlp.down",
        "transformer.ln_f": "norm",
        "lm_head": "head",
    }
) | {
    **_falcon_norms("input_layernorm", "post_attention_layernorm", separate=False),
    **_falcon_norms("ln_attn", "ln_mlp", separate=True),
    "transformer.h.{i}.self_attention.rotary_emb.inv_freq": DROP,
}
DEEPSEEK = without(LLAMA, "k_proj", "v_proj") | _EXPERTS | tensors(
    {
        f"{_LAYER}.self_attn.q_a_proj": f"{_QUERY}.down",
        f"{_LAYER}.self_attn.q_a_layernorm": f"{_QUERY}.norm",
        f"{_LAYER}.self_attn.q_b_proj": f"{_QUERY}.up",
        f"{_LAYER}.self_attn.kv_a_proj_with_mqa": f"{_BLOCK}.attn.latent",
        f"{_LAYER}.self_attn.kv_a_layernorm": f"{_BLOCK}.attn.latent_norm",
        f"{_LAYER}.self_attn.kv_b_proj": Fused((_KEY, _VALUE)),
    }
) | {f"{_LAYER}.mlp.gate.e_score_correction_bias": _CORRECTION}  # fmt: skip
MISTRAL4 = without(DEEPSEEK, "experts.{e}", "e_score") | {
    f"{_LAYER}.mlp.experts.gate_up_proj": _STACKED_EXPERTS["gate_up"],
    f"{_LAYER}.mlp.experts.down_proj": _STACKED_EXPERTS["down"],
}
_GPT_OSS_EXPERTS = f"{_LAYER}.mlp.experts"
GPT_OSS = without(LLAMA, ".mlp.") | {
    f"{_LAYER}.self_attn.sinks": f"{_BLOCK}.attn.sinks",
    **tensors({f"{_LAYER}.mlp.router": f"{_BLOCK}.mlp.router"}),
    f"{_GPT_OSS_EXPERTS}.gate_up_proj": Stacked(
        Transposed(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "alternating"))
    ),
    f"{_GPT_OSS_EXPERTS}.gate_up_proj_bias": Stacked(
        Fused((f"{_EXPERT}.gate.bias", f"{_EXPERT}.up.bias"), "alternating")
    ),
    f"{_GPT_OSS_EXPERTS}.down_proj": Stacked(Transposed(f"{_EXPERT}.down.weight")),
    f"{_GPT_OSS_EXPERTS}.down_proj_bias": Stacked(f"{_EXPERT}.down.bias"),
    f"{_GPT_OSS_EXPERTS}.gate_up_proj_blocks": Packed(
        Stacked(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "alternating"))
    ),
    f"{_GPT_OSS_EXPERTS}.down_proj_blocks": Packed(Stacked(f"{_EXPERT}.down.weight")),
    f"{_GPT_OSS_EXPERTS}.gate_up_proj_scales": DROP,  # read together with the blocks
    f"{_GPT_OSS_EXPERTS}.down_proj_scales": DROP,
}
_FEED = f"{_LAYER}.feed_forward"
LLAMA4 = (
    without(LLAMA, ".mlp.")
    | tensors(
        {
            f"{_FEED}.gate_proj": _GATE,
            f"{_FEED}.up_proj": _UP,
            f"{_FEED}.down_proj": f"{_BLOCK}.mlp.down",
            f"{_FEED}.router": f"{_BLOCK}.mlp.router",
            f"{_FEED}.shared_expert.gate_proj": f"{_BLOCK}.mlp.shared.gate",
            f"{_FEED}.shared_expert.up_proj": f"{_BLOCK}.mlp.shared.up",
            f"{_FEED}.shared_expert.down_proj": f"{_BLOCK}.mlp.shared.down",
        }
    )
    | {
        f"{_FEED}.experts.gate_up_proj": Stacked(
            Transposed(Fused((f"{_EXPERT}.gate.weight", f"{_EXPERT}.up.weight"), "blocks"))
        ),
        f"{_FEED}.experts.down_proj": Stacked(Transposed(f"{_EXPERT}.down.weight")),
    }
)
_DELTA, _LINEAR = f"{_BLOCK}.delta", f"{_LAYER}.linear_attn"
_NET = {
    f"{_LINEAR}.conv1d.weight": f"{_DELTA}.conv",
    f"{_LINEAR}.A_log": f"{_DELTA}.decay_rate",
    f"{_LINEAR}.dt_bias": f"{_DELTA}.decay_bias",
    f"{_LINEAR}.norm.weight": f"{_DELTA}.norm.weight",
    f"{_LINEAR}.out_proj.weight": f"{_DELTA}.projection.weight",
}
_GATED = QWEN3 | tensors({f"{_LAYER}.self_attn.q_proj": Fused((_QUERY, f"{_BLOCK}.attn.query_gate"), "query_heads")})
_DELTA_QKV = tuple(f"{_DELTA}.{part}.weight" for part in ("query", "key", "value"))
_DELTA_GATE, _BETA, _DECAY = (f"{_DELTA}.{part}.weight" for part in ("output_gate", "beta", "decay"))
QWEN3_5 = (
    _GATED
    | _NET
    | {
        f"{_LINEAR}.in_proj_qkv.weight": Fused(_DELTA_QKV, "blocks"),
        f"{_LINEAR}.in_proj_z.weight": _DELTA_GATE,
        f"{_LINEAR}.in_proj_b.weight": _BETA,
        f"{_LINEAR}.in_proj_a.weight": _DECAY,
    }
)
_SHARED_EXPERT = tensors(
    {
        f"{_LAYER}.mlp.shared_expert.gate_proj": f"{_BLOCK}.mlp.shared.gate",
        f"{_LAYER}.mlp.shared_expert.up_proj": f"{_BLOCK}.mlp.shared.up",
        f"{_LAYER}.mlp.shared_expert.down_proj": f"{_BLOCK}.mlp.shared.down",
        f"{_LAYER}.mlp.shared_expert_gate": f"{_BLOCK}.mlp.shared_gate",
    }
)
QWEN2_MOE = LLAMA | without(_EXPERTS, "shared") | _SHARED_EXPERT
QWEN3_5_MOE = without(QWEN3_5, ".mlp.") | without(_EXPERTS, "shared") | _SHARED_EXPERT
QWEN3_NEXT = (
    _GATED
    | _NET
    | without(_EXPERTS, "shared")
    | _SHARED_EXPERT
    | {
        f"{_LINEAR}.in_proj_qkvz.weight": Fused((*_DELTA_QKV, _DELTA_GATE), "delta_heads"),
        f"{_LINEAR}.in_proj_ba.weight": Fused((_BETA, _DECAY), "delta_heads"),
    }
)
NANOCHAT = without(LLAMA, ".mlp.", "norm") | tensors(
    {f"{_LAYER}.mlp.fc1": _UP, f"{_LAYER}.mlp.fc2": f"{_BLOCK}.mlp.down"}
)
_CONV = f"{_BLOCK}.conv"
_LFM2 = without(LLAMA, ".mlp.", "norm", "o_proj") | tensors(
    {
        "model.embedding_norm": "norm",
        f"{_LAYER}.operator_norm": f"{_BLOCK}.norm_1",
        f"{_LAYER}.ffn_norm": f"{_BLOCK}.norm_2",
        f"{_LAYER}.self_attn.out_proj": f"{_BLOCK}.attn.projection",
        f"{_LAYER}.self_attn.q_layernorm": f"{_BLOCK}.attn.query_norm",
        f"{_LAYER}.self_attn.k_layernorm": f"{_BLOCK}.attn.key_norm",
        f"{_LAYER}.conv.in_proj": f"{_CONV}.into",
        f"{_LAYER}.conv.out_proj": f"{_CONV}.projection",
        f"{_LAYER}.feed_forward.w1": _GATE,
        f"{_LAYER}.feed_forward.w3": _UP,
        f"{_LAYER}.feed_forward.w2": f"{_BLOCK}.mlp.down",
    }
)
LFM2 = _LFM2 | {f"{_LAYER}.conv.conv.weight": f"{_CONV}.conv", f"{_LAYER}.conv.conv.bias": f"{_CONV}.bias"}
LFM2_MOE = (
    LFM2
    | tensors(
        {
            f"{_LAYER}.feed_forward.gate": f"{_BLOCK}.mlp.router",
            f"{_LAYER}.feed_forward.experts.{{e}}.w1": f"{_EXPERT}.gate",
            f"{_LAYER}.feed_forward.experts.{{e}}.w3": f"{_EXPERT}.up",
            f"{_LAYER}.feed_forward.experts.{{e}}.w2": f"{_EXPERT}.down",
        }
    )
    | {f"{_LAYER}.feed_forward.expert_bias": _CORRECTION}
)
GEMMA4 = GEMMA3 | {f"{_LAYER}.layer_scalar": f"{_BLOCK}.scale"}
GEMMA4_TEXT = (
    GEMMA4
    | tensors(
        {
            "model.embed_tokens_per_layer": "per_layer.embed",
            "model.per_layer_model_projection": "per_layer.narrow",
            "model.per_layer_projection_norm": "per_layer.norm",
            f"{_LAYER}.per_layer_input_gate": f"{_BLOCK}.per_layer.gate",
            f"{_LAYER}.per_layer_projection": f"{_BLOCK}.per_layer.widen",
            f"{_LAYER}.post_per_layer_input_norm": f"{_BLOCK}.per_layer.norm",
            f"{_LAYER}.post_feedforward_layernorm_1": f"{_BLOCK}.beside.plain_post_norm",
            f"{_LAYER}.pre_feedforward_layernorm_2": f"{_BLOCK}.beside.norm",
            f"{_LAYER}.post_feedforward_layernorm_2": f"{_BLOCK}.beside.mlp_post_norm",
        }
    )
    | {
        f"{_LAYER}.router.proj.weight": f"{_BLOCK}.beside.mlp.router.weight",
        f"{_LAYER}.router.scale": f"{_BLOCK}.beside.mlp.router.scale",
        f"{_LAYER}.router.per_expert_scale": f"{_BLOCK}.beside.mlp.router.expert_scale",
        f"{_LAYER}.experts.gate_up_proj": Stacked(
            Fused(tuple(f"{_BLOCK}.beside.mlp.experts.{{e}}.{part}.weight" for part in ("gate", "up")), "blocks")
        ),
        f"{_LAYER}.experts.down_proj": Stacked(f"{_BLOCK}.beside.mlp.experts.{{e}}.down.weight"),
    }
)
