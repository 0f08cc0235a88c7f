"""Families whose blocks are state spaces (Mamba-2) but for some, which are attention."""

from collections.abc import Callable

from lit_qlora.convert.families import weights
from lit_qlora.convert.families.read import Family, Reader, Theirs, UnsupportedError
from lit_qlora.convert.families.readers import ATTENTION_BIAS, row
from lit_qlora.convert.families.rms_rows import GRANITE, GRANITE_DEFAULTS

Layers = Callable[[Theirs], tuple[int, ...]]
"""The blocks with a state space."""


def granite_layers(theirs: Theirs) -> tuple[int, ...]:
    """Granite 4: by layer_types, and all of them if config.json has none."""
    types = theirs.get("layer_types") or ["mamba"] * theirs["num_hidden_layers"]
    if unknown := sorted(set(types) - {"attention", "full_attention", "mamba", "linear_attention"}):
        raise UnsupportedError(f"layer_types {unknown}")
    return tuple(i for i, kind in enumerate(types) if kind in ("mamba", "linear_attention"))


def bamba_layers(theirs: Theirs) -> tuple[int, ...]:
    """Bamba: all blocks but the named ones."""
    named = theirs.get("attn_layer_indices") or ()
    return tuple(i for i in range(theirs["num_hidden_layers"]) if i not in named)


def value_size(theirs: Theirs) -> int:
    """Features of a head of a state space, which together are mamba_expand times the width of the model."""
    inside, heads = theirs["mamba_expand"] * theirs["hidden_size"], theirs["mamba_n_heads"]
    size = inside // heads if theirs["mamba_d_head"] == "auto" else theirs["mamba_d_head"]
    if size * heads != inside:
        raise UnsupportedError(f"mamba_d_head {size} in {heads} heads")
    return int(size)


def check_limit(theirs: Theirs) -> bool:
    """True. Raises UnsupportedError if steps have a limit, as in no published model."""
    limit = theirs.get("time_step_limit")
    if limit is not None and (limit[0] or limit[1] not in (float("inf"), {"__float__": "Infinity"})):
        raise UnsupportedError(f"time_step_limit {limit}")
    return True


def state_spaces(layers: Layers) -> dict[str, Reader]:
    """Our fields of state spaces, in a model that has some."""
    sizes: dict[str, Reader] = {
        "state_space": check_limit,
        "delta_key_heads": lambda theirs: theirs["mamba_n_groups"],
        "delta_value_heads": lambda theirs: theirs["mamba_n_heads"],
        "delta_key_size": lambda theirs: theirs["mamba_d_state"],
        "delta_value_size": value_size,
        "delta_conv_size": lambda theirs: theirs["mamba_d_conv"],
        "conv_bias": lambda theirs: theirs["mamba_conv_bias"],
    }

    def if_any(reader: Callable[[Theirs], object]) -> Reader:
        return lambda theirs: reader(theirs) if layers(theirs) else None

    return {"delta_layers": layers, **{ours: if_any(reader) for ours, reader in sizes.items() if callable(reader)}}


def if_experts(key: str, otherwise: str | None = None) -> Reader:
    """A setting of Granite 4's experts, in a model that has some."""
    return lambda theirs: theirs[key] if theirs["num_local_experts"] else theirs[otherwise] if otherwise else None


def granite_unrotated(theirs: Theirs) -> tuple[int, ...]:
    """Granite 4: blocks of attention rotate all or none."""
    return () if theirs["position_embedding_type"] == "rope" else tuple(range(theirs["num_hidden_layers"]))


SPACE_DEFAULTS = {
    "mamba_n_heads": 128,
    "mamba_n_groups": 1,
    "mamba_d_state": 256,
    "mamba_d_head": "auto",
    "mamba_d_conv": 4,
    "mamba_expand": 2,
    "mamba_conv_bias": True,
}
ROWS: dict[str, Family] = {
    "granitemoehybrid": row(
        weights.GRANITE_HYBRID,
        {
            **GRANITE,
            **state_spaces(granite_layers),
            "ffn_size": if_experts("intermediate_size", otherwise="shared_intermediate_size"),
            "n_expert": lambda theirs: theirs["num_local_experts"] or 0,
            "n_expert_per_token": if_experts("num_experts_per_tok"),
            "expert_size": if_experts("intermediate_size"),
            "shared_expert_size": if_experts("shared_intermediate_size"),
            "router": lambda theirs: "softmax_chosen" if theirs["num_local_experts"] else None,
            "no_rope_layers": granite_unrotated,
        },
        defaults={
            **GRANITE_DEFAULTS,
            **SPACE_DEFAULTS,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "position_embedding_type": None,
            "shared_intermediate_size": 1024,
        },
        refuse={"mamba_proj_bias": False},
    ),
    "bamba": row(
        weights.BAMBA,
        {
            **ATTENTION_BIAS,
            **state_spaces(bamba_layers),
            "mlp_bias": "mlp_bias",
            "rope_fraction": lambda theirs: 0.5,  # whatever config.json says
        },
        defaults={
            **SPACE_DEFAULTS,
            "max_position_embeddings": 262_144,
            "rms_norm_eps": 1e-5,
            "num_key_value_heads": 8,
        },
        refuse={"mamba_proj_bias": False},
    ),
}
