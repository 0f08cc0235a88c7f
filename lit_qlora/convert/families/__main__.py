"""Print the families, the features that each of them uses, and the version they were held against."""

import signal

from lit_qlora.convert.families import FAMILIES, VERIFIED_WITH, WRAPPERS
from lit_qlora.convert.families.read import Family
from lit_qlora.convert.families.readers import COMMON
from lit_qlora.convert.gguf_architectures import OTHERWISE

FEATURES = {
    "norm": "{} norm",
    "norm_position": "norms {}",
    "shared_norm": "one norm for both",
    "parallel_residual": "parallel residual",
    "qk_norm": "QK norm",
    "qk_norm_after_rope": "QK norm after RoPE",
    "qkv_bias": "QKV bias",
    "mlp_bias": "MLP bias",
    "head_bias": "head bias",
    "clip_qkv": "clipped QKV",
    "embedding_norm": "norm of embeddings",
    "embedding_multiplier": "embedding multiplier",
    "residual_multiplier": "residual multiplier",
    "logit_multiplier": "logit multiplier",
    "logit_softcap": "logit soft cap",
    "attention_scale": "score scale",
    "attention_softcap": "score soft cap",
    "attention_sinks": "attention sinks",
    "query_scale_beta": "query scale by position",
    "unrotated_scale_beta": "query scale by position",
    "sliding_window": "sliding window",
    "chunked_window": "in chunks",
    "full_head_size": "other heads without a window",
    "key_is_value": "keys as values",
    "shared_kv_layers": "shared keys and values",
    "value_norm": "norm of values",
    "block_scale": "block scale",
    "per_layer_size": "per-layer embeddings",
    "full_attention_layers": "not in all blocks",
    "positions": "{} positions",
    "no_rope_layers": "NoPE blocks",
    "rope_local_theta": "two RoPE bases",
    "rope_fraction": "partial RoPE",
    "rope_interleaved": "interleaved RoPE",
    "kv_latent_size": "latent attention",
    "attention_gate": "attention gate",
    "delta_layers": "gated delta nets",
    "state_space": "as state spaces",
    "conv_layers": "short convolutions",
    "n_expert": "experts",
    "router": "{} router",
    "router_tolerance": "router tolerance",
    "router_before": "weighted inputs of experts",
    "router_correction": "router correction",
    "experts_beside": "experts beside an MLP",
    "router_groups": "router groups",
    "shared_expert_size": "shared experts",
    "shared_expert_gate": "gated",
    "dense_layers": "some blocks dense",
}
"""Field that a row reads or fixes -> the feature of its family, in words."""


def features(family: Family) -> str:
    """Name the features that a family can use beyond Llama's."""
    own = {**{ours: reader for ours, reader in family.fields.items() if ours not in COMMON}, **family.fixed}
    named = {ours: value.replace("_", " ") if isinstance(value, str) else "" for ours, value in own.items()}
    return ", ".join(words.format(named[ours]).strip() for ours, words in FEATURES.items() if ours in own)


def limits(name: str) -> list[str]:
    """List what a family cannot take part in, with the reason."""
    family = FAMILIES[name]
    found = [f"no GGUF: {OTHERWISE[name]}"] if name in OTHERWISE else []
    used = {**family.fields, **family.fixed}
    if {"delta_layers", "conv_layers"} & set(used):
        found.append("no draft models, and no shared beginnings: a block has a state")
    if name == "afmoe":
        found.append("no PEFT: it takes the gate of attention for an expert's; merge the adapter instead")
    if name == "mistral4":
        found.append("inside mistral3 alone, as in transformers")
    return found


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head`: the reader has seen enough
    print(
        f"Each family computes what transformers {' and '.join(VERIFIED_WITH)} computes: see tests/model/test_gpt.py.\n"
        "All have tied or separate heads and RoPE: plain, linear, dynamic, llama3, yarn, longrope. What they add:\n"
        "All train on the fast path. In brackets: what a family takes no part in, with the reason.\n"
        "[no GGUF]: scripts/convert_lit_checkpoint.py writes the model for transformers and vLLM.\n"
    )
    for name, family in sorted(FAMILIES.items()):
        short = "".join(f" [{limit}]" for limit in limits(name))
        print(f"{name:20}{features(family)}{short}")
    print("\nThe language model inside, whichever of these it is, with the encoders kept for the export:\n")
    for name, wrapper in sorted(WRAPPERS.items()):
        print(f"{name:20}{', '.join(wrapper.kept)} kept")
