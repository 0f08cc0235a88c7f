"""Hugging Face's model families, and their spelling of our configuration and our weights.

A family is a row in FAMILIES; there is no code per family. A setting of config.json that this model cannot do is
refused by name: ignoring it would give a different model.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_qlora.checkpoint.safetensors_io import name_some
from lit_qlora.checkpoint.shards import Weights
from lit_qlora.convert.families import mxfp4
from lit_qlora.convert.families.read import Family, read_fields, take_another
from lit_qlora.convert.families.rules import DROP, Either, Fused, Packed, Rule, Transposed, When, join, parts_of, split
from lit_qlora.convert.families.table import FAMILIES, VERIFIED_WITH
from lit_qlora.convert.families.unpacking import is_beside, read_unpacked, why_unreadable
from lit_qlora.convert.families.wrappers import WRAPPERS, text_part, wrapped
from lit_qlora.errors import CheckpointError, did_you_mean
from lit_qlora.model.config import ModelConfig

__all__ = [
    "DROP",
    "FAMILIES",
    "VERIFIED_WITH",
    "WRAPPERS",
    "Family",
    "Fused",
    "Rule",
    "TheirTensor",
    "Transposed",
    "check_kept",
    "check_rules",
    "family_of",
    "fill",
    "find_family",
    "find_rule",
    "is_beside",
    "is_kept",
    "join_all",
    "parts_of",
    "read_config",
    "read_whole",
    "template",
    "their_module",
    "their_tensors",
    "to_ours",
]


QUANTISED = (".absmax", ".quant_map", ".SCB", ".qweight", ".qzeros", ".weight_scale", ".weight_scale_inv")
"""Endings of the names of tensors that bitsandbytes, GPTQ, AWQ and FP8 store for packed weights."""


IMPOSSIBLE = {
    "bitnet": "its weights are ternary and its activations 8-bit integers, unlike those of any model here",
    "falcon_h1": "its blocks have attention and a state space side by side; here a block has one of them",
    "nemotron_h": "its blocks have a mixer or an MLP alone; here a block has both",
}
"""model_type -> why no row can describe it."""


TEXT_ALONE = "Take the language model that it was made of, if that is published alone."


def find_family(name: str) -> Family:
    """The row of this model_type. Raises CheckpointError for one that has none."""
    if name in IMPOSSIBLE:
        raise CheckpointError(f"model_type {name!r} is not supported: {IMPOSSIBLE[name]}.\n{take_another()}")
    if name not in FAMILIES:
        known = sorted({*FAMILIES, *WRAPPERS})
        raise CheckpointError(
            f"model_type {name!r} is not supported.{did_you_mean(name, known)} Known: {', '.join(known)}.\n"
            f"{take_another()} A new family is one row in lit_qlora/convert/families/."
        )
    return FAMILIES[name]


@cache
def _family(name: str, wrapper: str) -> Family:
    return wrapped(find_family(name), wrapper) if wrapper else find_family(name)


def family_of(config: ModelConfig) -> Family:
    """The row that this model was converted with, in the names of what it is the language model of."""
    return _family(config.family, config.wrapper)


def read_config(theirs: Mapping[str, Any], name: str) -> ModelConfig:
    """Our configuration for a Hugging Face config.json. Raises CheckpointError for what this model cannot do."""
    outer = str(theirs.get("model_type"))
    theirs = text_part(theirs)
    kind = str(theirs.get("model_type"))
    family = find_family(kind)
    packed = theirs.get("quantization_config")
    if packed is not None and (reason := why_unreadable(packed, family.unpacks)):
        raise CheckpointError(
            f"{name} is already quantised ({reason}). Take the 16-bit original{_original(theirs, name)}; "
            "it is quantised when loaded."
        )
    config = read_fields(theirs, kind, family, name)
    if outer not in WRAPPERS:
        return config
    if not WRAPPERS[outer].shapes_logits and (config.logit_multiplier != 1 or config.logit_softcap):
        raise CheckpointError(
            f"{name}: transformers leaves out the scale or cap of {kind}'s logits in {outer}.\n{TEXT_ALONE}"
        )
    if not WRAPPERS[outer].windows and config.sliding_window:
        raise CheckpointError(
            f"{name}: transformers has no sliding window in {outer}, and config.json asks for one.\n{TEXT_ALONE}"
        )
    return replace(config, wrapper=outer)


def _original(theirs: Mapping[str, Any], name: str) -> str:
    """', ORG/NAME' of the model that another was made of, as far as its config.json says."""
    before = theirs.get("_name_or_path")
    known = isinstance(before, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", before) and before != name
    return f", {before}" if known else ""


def template(name: str) -> tuple[str, dict[str, str]]:
    """Take the numbers out of a name.

    "blocks.3.mlp.experts.7.up" -> ("blocks.{i}.mlp.experts.{e}.up", {"i": "3", "e": "7"})
    """
    numbers = re.findall(r"(?<=\.)\d+(?=\.|$)", name)
    for letter in "ie"[: len(numbers)]:
        name = re.sub(r"(?<=\.)\d+(?=\.|$)", f"{{{letter}}}", name, count=1)
    return name, dict(zip("ie", numbers, strict=False))


def fill(template: str, numbers: Mapping[str, str]) -> str:
    """The inverse of template; numbers that are not given stay open."""
    for letter, number in numbers.items():
        template = template.replace(f"{{{letter}}}", number)
    return template


def find_rule(name: str, family: Family) -> tuple[Rule | None, dict[str, str]]:
    """The rule for one of their tensors, and the numbers of its layer and expert."""
    spelled, numbers = template(name)
    return family.weights.get(spelled), numbers


def is_kept(name: str, config: ModelConfig) -> bool:
    """True for a tensor that our model has no use for, and that an export has to give back."""
    family = family_of(config)
    rule, numbers = find_rule(name, family)
    if family.further_layers and ".layers." in name and int(numbers.get("i", 0)) >= config.n_layer:
        return True
    if rule is not None and config.reuses(int(numbers.get("i", 0))):  # files can hold what the block does not use
        return any(re.fullmatch(r"blocks\.{i}\.attn\.(key|value|key_norm)\.\w+", part) for part in parts_of(rule))
    constant = template(name)[0] in family.constants
    return constant or (rule is None and any(part in family.kept for part in name.split(".")[:2]))


def check_kept(name: str, tensor: Tensor, config: ModelConfig) -> Tensor:
    """Return a tensor that is kept. Raises CheckpointError for a constant that is not ours."""
    constant = family_of(config).constants.get(template(name)[0])
    if constant is not None and not torch.allclose(tensor.float(), torch.tensor(constant), rtol=2**-7, atol=0):
        raise CheckpointError(
            f"{config.name}: {name} is {tensor.tolist()}; only {constant} is supported.\n{take_another()}"
        )
    return tensor


def check_rules(names: Iterable[str], config: ModelConfig) -> None:
    """Raise CheckpointError for tensors that the family of `config` has no rule for, naming them."""
    family = family_of(config)
    names = set(names)
    unknown = [
        name
        for name in sorted(names)
        if find_rule(name, family)[0] is None and not is_kept(name, config) and not is_beside(name, names)
    ]
    if packed := [name for name in unknown if name.endswith(QUANTISED)]:
        raise CheckpointError(
            f"{config.name} is already quantised ({packed[0]}). Take the 16-bit original; it is quantised when loaded."
        )
    if unknown:
        raise CheckpointError(
            f"{config.name}: {len(unknown)} tensors have no rule in FAMILIES[{config.family!r}]:\n  "
            + name_some(unknown, most=len(unknown))
            + "\nEither config.json is of another model than the files, or they are of a newer kind of this family."
        )


def read_whole(name: str, weights: Weights, config: ModelConfig, spec: bool = False) -> Tensor:
    """One of their tensors, unpacked where files hold it in 8 or 4 bits.

    Args:
        spec: read nothing but its shape and dtype, as a tensor on the meta device.
    """
    if isinstance(find_rule(name, family_of(config))[0], Packed):
        read = weights.specs.__getitem__ if spec else weights.read
        return mxfp4.unpack(read(name), read(Packed.scales(name)))
    return read_unpacked(name, weights, spec)


def to_ours(name: str, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Rename one of their tensors, splitting it where it holds several of our layers; {} for one that we have not.

    Args:
        tensor: as read_whole returns it.
    """
    if is_kept(name, config):
        return {}
    rule, numbers = find_rule(name, family_of(config))
    assert rule is not None, name
    if rule == DROP or (config.tied_head and rule == "head.weight"):
        return {}
    return {fill(new, numbers): part for new, part in split(rule, tensor, config).items()}


@dataclass(frozen=True, kw_only=True)
class TheirTensor:
    """One of their tensors, with the names of ours that it is made of."""

    name: str
    rule: Rule
    ours: tuple[str, ...]

    def join(self, ours: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """Make their tensor of ours, reading only self.ours. The inverse of to_ours."""
        numbers = find_rule(self.name, family_of(config))[1]
        parts = {}
        for name in self.ours:
            spelled, own = template(name)
            parts[fill(spelled, {letter: n for letter, n in own.items() if letter not in numbers})] = ours[name]
        return join(self.rule, parts, config)


def their_tensors(ours: Iterable[str], config: ModelConfig) -> list[TheirTensor]:
    """List this family's tensors that hold the tensors named `ours`, in the order of `ours`.

    Raises:
        CheckpointError: listing the tensors that have no counterpart.
    """
    written: dict[str, tuple[str, Rule]] = {}
    for theirs, rule in family_of(config).weights.items():
        if rule != DROP and not isinstance(rule, Packed) and (not isinstance(rule, When) or rule.holds(config)):
            for part in parts_of(rule):
                written.setdefault(part, (theirs, rule))
    found: dict[str, tuple[Rule, list[str]]] = {}
    unknown = []
    for name in ours:
        spelled, numbers = template(name)
        if spelled in written:
            theirs, rule = written[spelled]
            found.setdefault(fill(theirs, numbers), (rule, []))[1].append(name)
        else:
            unknown.append(name)
    if unknown:
        lines = "\n  ".join(unknown)
        raise CheckpointError(f"{len(unknown)} tensors have no counterpart in {config.family}:\n  {lines}")
    return [TheirTensor(name=name, rule=rule, ours=tuple(parts)) for name, (rule, parts) in found.items()]


def join_all(ours: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """All our tensors as theirs."""
    for tensor in their_tensors(ours, config):
        yield tensor.name, tensor.join(ours, config)


def their_module(path: str, family: Family) -> tuple[str, Fused | None]:
    """Their path of one of our linear layers, and the rule if it is part of a fused one.

    "blocks.3.attn.query" -> ("model.layers.3.self_attn.q_proj", None) for llama.

    Raises:
        CheckpointError: if it is no module of theirs, as gpt-oss's experts, which are slices of one parameter.
    """
    ours, numbers = template(path)
    # The last of several names is what transformers calls it in memory.
    for theirs, rule in reversed(list(family.weights.items())):
        if isinstance(rule, Transposed):
            rule = rule.rule
        if isinstance(rule, Either):
            rule = rule.holding(f"{ours}.weight")
        if isinstance(rule, str | Fused) and f"{ours}.weight" in parts_of(rule):
            return fill(theirs.removesuffix(".weight"), numbers), rule if isinstance(rule, Fused) else None
    raise CheckpointError(f"{path} has no counterpart in this model family.")
