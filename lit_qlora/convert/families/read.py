"""Read their config.json in our words, and refuse by name the settings that this model cannot do."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_qlora.commands import spell
from lit_qlora.convert.families.rules import Rule
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig

Theirs = Mapping[str, Any]
"""The content of config.json, with the family's defaults filled in."""
Reader = str | Callable[[Theirs], Any]
"""The source of a field of ours: one of their keys, or a function of several. None leaves our default."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """The spelling of our configuration and our weights in one Hugging Face `model_type`."""

    weights: Mapping[str, Rule]
    fields: Mapping[str, Reader]
    """Our field -> its source."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Our fields that hold for the whole family."""
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Their key -> the value that transformers assumes where config.json leaves it out."""
    refuse: Mapping[str, Any] = field(default_factory=dict)
    """Their key -> the only value that this model can do, besides null."""
    unpacks: tuple[str, ...] = ()
    """Kinds of quantisation that are undone when files are read."""
    further_layers: bool = False
    """Files hold layers behind the last one, which predict further tokens and are kept as they are."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """Name of a tensor that is kept -> the only value that our model computes with."""
    kept: tuple[str, ...] = ()
    """First or second parts of the names of tensors that our model has no use for, and that are kept as they are."""


def read_fields(theirs: Theirs, kind: str, family: Family, name: str) -> ModelConfig:
    """Our configuration for a config.json of this family. Raises CheckpointError for what this model cannot do."""
    theirs = dict(family.defaults) | dict(theirs)
    for key, allowed in family.refuse.items():
        if theirs.get(key) not in (None, allowed):
            raise CheckpointError(
                f"{name}: config.json has {key} {theirs[key]!r}, which is not supported for {kind}, only {allowed!r}.\n"
                f"{take_another()}"
            )
    try:
        theirs, scaling = read_rope(theirs, family) if "rope_theta" in family.fields else (theirs, {})
        read = {ours: theirs.get(at) if isinstance(at, str) else at(theirs) for ours, at in family.fields.items()}
        values = scaling | {ours: value for ours, value in read.items() if value is not None} | dict(family.fixed)
        values.setdefault("n_kv_head", values["n_head"])
        values.setdefault("head_size", values["n_embd"] // values["n_head"])
        return ModelConfig(name=name, family=kind, **values)
    except UnsupportedError as error:
        raise CheckpointError(
            f"{name}: config.json has {error}, which is not supported for {kind}.\n{take_another()}"
        ) from None
    except CheckpointError as error:  # settings that contradict each other
        raise CheckpointError(f"{error}\n{FROM_THE_HUB}") from None
    except KeyError as error:
        key = str(error.args[0])
        raise CheckpointError(
            f"{name}: config.json is incomplete: {spelling(family, key, key)!r}.\n{FROM_THE_HUB}"
        ) from None
    except TypeError as error:
        raise CheckpointError(f"{name}: config.json is incomplete: {error}.\n{FROM_THE_HUB}") from None
    except (ArithmeticError, AttributeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{name}: config.json makes no sense: {error}.\n{FROM_THE_HUB}") from None


FROM_THE_HUB = "If it was edited, take the one that the model was published with."


def take_another() -> str:
    """Advice about a model that cannot be read."""
    return f"Take another model: {spell('scripts/download.py')} --list names those that are known to work."


class UnsupportedError(Exception):
    """A setting of config.json that this model cannot do: 'hidden_act relu'."""


def read_rope(theirs: Theirs, family: Family) -> tuple[Theirs, dict[str, Any]]:
    """config.json with its tables of RoPE spread out, and our fields of how it is scaled.

    transformers 5 writes one table, rope_parameters, or one for each type of attention; before, the scaling stood in
    rope_scaling and the rest beside it.
    """
    tables: dict[str, Any] = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    rope: dict[str, Any] = {**tables, **(tables.get("full_attention") or {})}
    local: dict[str, Any] = tables.get("sliding_attention") or {}
    spread = dict(theirs) | {key: rope[key] for key in ("llama_4_scaling_beta", "alpha") if key in rope}
    for ours, key in (("rope_theta", "rope_theta"), ("rope_fraction", "partial_rotary_factor")):
        if rope.get(key) is not None:
            spread[spelling(family, ours, key)] = rope[key]
    if "rope_fraction" not in family.fields and spread.get("partial_rotary_factor") not in (None, 1):
        raise UnsupportedError(f"partial_rotary_factor {spread['partial_rotary_factor']}")
    if local:
        kind = local.get("rope_type", "default")
        if kind != "default":
            raise UnsupportedError(f"RoPE scaling {kind!r} in layers with a sliding window")
        if "rope_local_theta" not in family.fields and local.get("rope_theta") != rope.get("rope_theta"):
            raise UnsupportedError(f"another rope_theta ({local['rope_theta']}) in layers with a sliding window")
        spread["rope_local_base_freq"] = local["rope_theta"]
    return spread, read_scaling(rope, spread, family)


def spelling(family: Family, ours: str, otherwise: str) -> str:
    """Their key of one of our fields."""
    key = family.fields.get(ours, otherwise)
    return key if isinstance(key, str) else otherwise


def read_scaling(rope: Theirs, theirs: Theirs, family: Family) -> dict[str, Any]:
    """Our fields of how RoPE is scaled. Raises UnsupportedError for a kind that is not known."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    context = theirs[spelling(family, "block_size", "max_position_embeddings")]
    original = theirs.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    factor = rope.get("factor")
    if kind == "su" or (kind == "yarn" and "short_factor" in rope):  # what Phi-3's first files call it
        kind = "longrope"
    if kind == "dynamic" and rope.get("alpha"):
        if isinstance(family.fields["rope_theta"], str):
            raise UnsupportedError(f"RoPE scaling 'dynamic' with alpha {rope['alpha']}")
        return {}  # in the base already
    if kind == "default":
        # A model without scaling can still need its length: Ministral 3 scales queries by it.
        return {"rope_original_block_size": original} if "query_scale_beta" in family.fields else {}
    scaled = {"rope_scaling": kind, "rope_factor": factor, "rope_original_block_size": original}
    if kind == "proportional":
        return {"rope_scaling": kind, "rope_factor": factor or 1.0}
    if kind == "linear":
        return {"rope_scaling": kind, "rope_factor": factor}
    if kind == "dynamic":
        return scaled | {"rope_original_block_size": context}
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        return scaled | {"rope_low_freq_factor": low, "rope_high_freq_factor": high}
    if kind == "yarn":
        factor = factor or context / original
        truncate = rope.get("truncate")
        return scaled | {
            "rope_factor": factor,
            "rope_beta_fast": rope.get("beta_fast") or 32.0,
            "rope_beta_slow": rope.get("beta_slow") or 1.0,
            "rope_truncate": True if truncate is None else truncate,
            "rope_attention_factor": yarn_attention_factor(rope, factor),
        }
    if kind == "longrope":
        factor = factor or context / original
        attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
        given = rope.get("attention_factor")
        return scaled | {
            "rope_factor": factor,
            "rope_attention_factor": attention if given is None else given,
            "rope_short_factors": tuple(rope["short_factor"]),
            "rope_long_factors": tuple(rope["long_factor"]),
        }
    raise UnsupportedError(f"RoPE scaling {kind!r}")


def yarn_attention_factor(rope: Theirs, factor: float) -> float:
    """The factor of cosines and sines, as given or by Peng et al. 2023, eq. 22, as DeepSeek varies it."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return mscale(factor, rope["mscale"]) / mscale(factor, rope["mscale_all_dim"])
    return mscale(factor)


def mscale(factor: float, weight: float = 1.0) -> float:
    """0.1 weight ln(factor) + 1."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1
