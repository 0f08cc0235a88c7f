"""How each Hugging Face model family spells our configuration and our weights.

A family is a row in FAMILIES; there is no code per family. What a config.json asks for and this model cannot do is
refused by name: a setting that is ignored would be a different model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lit_qlora.config import ModelConfig
from lit_qlora.errors import CheckpointError

DROP = ""
"""The rule of a tensor that our model computes instead of loading."""


@dataclass(frozen=True)
class Fused:
    """The rule of a tensor that holds several of our layers, stacked along its rows.

    heads: head by head, the rows of each part in turn (GPT-NeoX: query, key, value of head 0, then of head 1, ...).
    """

    parts: tuple[str, ...]
    layout: Literal["heads"] = "heads"

    def split(self, fused: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(H * parts * D, ...) -> {part: (H * D, ...)}."""
        heads = fused.unflatten(0, (config.n_head, len(self.parts), config.head_size))
        return {part: heads[:, i].flatten(0, 1) for i, part in enumerate(self.parts)}

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        heads = [parts[part].unflatten(0, (config.n_head, config.head_size)) for part in self.parts]
        return torch.stack(heads, dim=1).flatten(0, 2)


Rule = str | Fused
"""Where one of their tensors goes: one of our names, DROP, or a Fused."""

LLAMA_WEIGHTS: dict[str, Rule] = {
    "model.embed_tokens.weight": "embed.weight",
    "model.layers.{i}.input_layernorm.weight": "blocks.{i}.norm_1.weight",
    "model.layers.{i}.self_attn.q_proj.weight": "blocks.{i}.attn.query.weight",
    "model.layers.{i}.self_attn.k_proj.weight": "blocks.{i}.attn.key.weight",
    "model.layers.{i}.self_attn.v_proj.weight": "blocks.{i}.attn.value.weight",
    "model.layers.{i}.self_attn.o_proj.weight": "blocks.{i}.attn.projection.weight",
    "model.layers.{i}.self_attn.rotary_emb.inv_freq": DROP,
    "model.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.norm_2.weight",
    "model.layers.{i}.mlp.gate_proj.weight": "blocks.{i}.mlp.gate.weight",
    "model.layers.{i}.mlp.up_proj.weight": "blocks.{i}.mlp.up.weight",
    "model.layers.{i}.mlp.down_proj.weight": "blocks.{i}.mlp.down.weight",
    "model.norm.weight": "norm.weight",
    "lm_head.weight": "head.weight",
    # With "attention_bias" or "mlp_bias" in config.json:
    "model.layers.{i}.self_attn.q_proj.bias": "blocks.{i}.attn.query.bias",
    "model.layers.{i}.self_attn.k_proj.bias": "blocks.{i}.attn.key.bias",
    "model.layers.{i}.self_attn.v_proj.bias": "blocks.{i}.attn.value.bias",
    "model.layers.{i}.self_attn.o_proj.bias": "blocks.{i}.attn.projection.bias",
    "model.layers.{i}.mlp.gate_proj.bias": "blocks.{i}.mlp.gate.bias",
    "model.layers.{i}.mlp.up_proj.bias": "blocks.{i}.mlp.up.bias",
    "model.layers.{i}.mlp.down_proj.bias": "blocks.{i}.mlp.down.bias",
}
_NEOX_QKV = ("blocks.{i}.attn.query", "blocks.{i}.attn.key", "blocks.{i}.attn.value")
NEOX_WEIGHTS: dict[str, Rule] = {
    "gpt_neox.embed_in.weight": "embed.weight",
    "gpt_neox.layers.{i}.input_layernorm.weight": "blocks.{i}.norm_1.weight",
    "gpt_neox.layers.{i}.input_layernorm.bias": "blocks.{i}.norm_1.bias",
    "gpt_neox.layers.{i}.attention.query_key_value.weight": Fused(tuple(f"{part}.weight" for part in _NEOX_QKV)),
    "gpt_neox.layers.{i}.attention.query_key_value.bias": Fused(tuple(f"{part}.bias" for part in _NEOX_QKV)),
    "gpt_neox.layers.{i}.attention.dense.weight": "blocks.{i}.attn.projection.weight",
    "gpt_neox.layers.{i}.attention.dense.bias": "blocks.{i}.attn.projection.bias",
    "gpt_neox.layers.{i}.attention.rotary_emb.inv_freq": DROP,
    "gpt_neox.layers.{i}.attention.masked_bias": DROP,
    "gpt_neox.layers.{i}.attention.bias": DROP,
    "gpt_neox.layers.{i}.post_attention_layernorm.weight": "blocks.{i}.norm_2.weight",
    "gpt_neox.layers.{i}.post_attention_layernorm.bias": "blocks.{i}.norm_2.bias",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight": "blocks.{i}.mlp.up.weight",
    "gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias": "blocks.{i}.mlp.up.bias",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight": "blocks.{i}.mlp.down.weight",
    "gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias": "blocks.{i}.mlp.down.bias",
    "gpt_neox.final_layer_norm.weight": "norm.weight",
    "gpt_neox.final_layer_norm.bias": "norm.bias",
    "embed_out.weight": "head.weight",
    "lm_head.weight": "head.weight",  # what transformers 5 calls it in memory
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """How one Hugging Face `model_type` spells our configuration and our weights."""

    weights: Mapping[str, Rule]
    fields: Mapping[str, str] = field(default_factory=dict)
    """Our field -> their config.json key, where it differs from LLAMA_FIELDS."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Our fields that hold for the whole family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What transformers assumes for a key that config.json leaves out, where it differs from LLAMA_DEFAULTS."""
    refuse: Mapping[str, Any] = field(default_factory=dict)
    """Their key -> the only value that this model can do."""


LLAMA_FIELDS = {
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
    "rope_fraction": "partial_rotary_factor",
    "tied_head": "tie_word_embeddings",
}
LLAMA_DEFAULTS = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
}
FAMILIES: dict[str, Family] = {
    "llama": Family(
        weights=LLAMA_WEIGHTS,
        fields={"qkv_bias": "attention_bias", "projection_bias": "attention_bias", "mlp_bias": "mlp_bias"},
    ),
    "mistral": Family(
        weights=LLAMA_WEIGHTS,
        fields={"sliding_window": "sliding_window"},
        defaults={"max_position_embeddings": 131_072, "sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Family(
        weights=LLAMA_WEIGHTS,
        fixed={"qkv_bias": True},
        defaults={"max_position_embeddings": 32_768},
        refuse={"use_sliding_window": False},
    ),
    "gpt_neox": Family(
        weights=NEOX_WEIGHTS,
        fields={
            "norm_eps": "layer_norm_eps",
            "rope_fraction": "rotary_pct",
            "rope_theta": "rotary_emb_base",
            "qkv_bias": "attention_bias",
            "projection_bias": "attention_bias",
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
}
ACTIVATIONS = {
    "silu": "swiglu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def find_family(name: str) -> Family:
    """The row of this model_type. Raises CheckpointError for one that has none."""
    if name not in FAMILIES:
        raise CheckpointError(
            f"model_type {name!r} is not supported. Known: {', '.join(sorted(FAMILIES))}.\n"
            "A new family is one row in lit_qlora/families.py."
        )
    return FAMILIES[name]


def read_config(theirs: Mapping[str, Any], name: str) -> ModelConfig:
    """Our configuration for a Hugging Face config.json. Raises CheckpointError for what this model cannot do."""
    kind = str(theirs.get("model_type"))
    family = find_family(kind)
    if "quantization_config" in theirs:
        raise CheckpointError(f"{name} is already quantised. Take the 16-bit original; it is quantised when loaded.")
    for key, allowed in family.refuse.items():
        if theirs.get(key, allowed) != allowed:
            raise CheckpointError(f"{name}: config.json has {key} {theirs[key]!r}, which is not supported yet.")
    theirs = {**LLAMA_DEFAULTS, **family.defaults, **theirs}
    # transformers 5 writes one table, rope_parameters; before, scaling stood in rope_scaling and the rest beside it.
    rope = {**(theirs.get("rope_scaling") or {}), **(theirs.get("rope_parameters") or {})}
    fields = {**LLAMA_FIELDS, **family.fields}
    for ours, key in (("rope_theta", "rope_theta"), ("rope_fraction", "partial_rotary_factor")):
        if key in rope:
            theirs[fields[ours]] = rope[key]

    values: dict[str, Any] = {ours: theirs[key] for ours, key in fields.items() if theirs.get(key) is not None}
    activation = theirs["hidden_act"]
    if activation not in ACTIVATIONS or (ACTIVATIONS[activation] == "swiglu") != (kind != "gpt_neox"):
        raise CheckpointError(f"{name}: config.json has hidden_act {activation!r}, which is not supported for {kind}.")
    values |= {"ffn": ACTIVATIONS[activation], **_rope_scaling(rope, theirs, name), **family.fixed}
    try:
        values.setdefault("n_kv_head", values["n_head"])
        values.setdefault("head_size", values["n_embd"] // values["n_head"])
        return ModelConfig(name=name, family=kind, **values)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{name}: config.json is incomplete: {error}.") from None


def _rope_scaling(rope: Mapping[str, Any], theirs: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return {}
    if kind == "linear":
        return {"rope_scaling": "linear", "rope_factor": rope["factor"]}
    if kind == "llama3":
        return {
            "rope_scaling": "llama3",
            "rope_factor": rope["factor"],
            "rope_low_freq_factor": rope["low_freq_factor"],
            "rope_high_freq_factor": rope["high_freq_factor"],
            "rope_original_block_size": rope["original_max_position_embeddings"],
        }
    raise CheckpointError(f"{name}: RoPE scaling {kind!r} is not supported yet (known: default, linear, llama3).")


def find_rule(name: str, family: Family) -> tuple[Rule | None, str]:
    """The rule for one of their tensors and the number of its layer ('' outside the layers)."""
    layer = re.search(r"\.(\d+)\.", name)
    rule = family.weights.get(re.sub(r"\.\d+\.", ".{i}.", name, count=1))
    return rule, layer[1] if layer else ""


def to_ours(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Rename one of their tensors, splitting it where it holds several of our layers; {} for one that we drop."""
    rule, layer = find_rule(name, find_family(config.family))
    assert rule is not None, name
    if rule == DROP or (rule == "head.weight" and config.tied_head):
        return {}
    parts = {rule: tensor} if isinstance(rule, str) else rule.split(tensor, config)
    return {new.replace("{i}", layer): part for new, part in parts.items()}


def their_module(path: str, family: Family) -> tuple[str, Fused | None]:
    """Their path of one of our linear layers, and the rule if it is part of a fused one.

    "blocks.3.attn.query" -> ("model.layers.3.self_attn.q_proj", None) for llama.
    """
    layer = re.search(r"\.(\d+)\.", path)
    ours = re.sub(r"\.\d+\.", ".{i}.", path, count=1) + ".weight"
    # The last of several names is what transformers calls it in memory.
    for theirs, rule in reversed(list(family.weights.items())):
        if rule == ours or (isinstance(rule, Fused) and ours in rule.parts):
            module = theirs.removesuffix(".weight").replace("{i}", layer[1] if layer else "")
            return module, rule if isinstance(rule, Fused) else None
    raise CheckpointError(f"{path} has no counterpart in this model family.")
