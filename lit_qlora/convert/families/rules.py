"""Rules by which their tensors hold ours: renamed, stacked along the rows, transposed, or one for each expert.

A rule is exact in both directions: join undoes split, bit for bit. Names are templates: {i} stands for the number of
the block, {e} for that of the expert or head.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from lit_qlora.model.config import ModelConfig

DROP = ""
"""The rule of a tensor that our model computes instead of loading."""


@dataclass(frozen=True)
class Fused:
    """The rule of a tensor that holds several of our layers, stacked along its rows.

    heads: the query heads of a group, its key head, its value head; then the next group (GPT-NeoX, Falcon, DeepSeek).
    query_heads: the same with a group for each query head (Qwen3-Next's output gate).
    delta_heads: the same with a group for each key head of a gated delta net.
    blocks: all rows of the first part, then all of the next (Phi-3).
    alternating: one row of each part in turn (gpt-oss).
    """

    parts: tuple[str, ...]
    layout: Literal["heads", "query_heads", "delta_heads", "blocks", "alternating"] = "heads"

    def split(self, fused: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(rows, ...) -> {part: (its rows, ...)}."""
        sizes = self.sizes(len(fused), config)
        if count := self.groups(config):
            groups = fused.unflatten(0, (count, -1))
            pieces = [t.flatten(0, 1) for t in groups.split([size // count for size in sizes], dim=1)]
        elif self.layout == "blocks":
            pieces = list(fused.split(sizes))
        else:
            pieces = list(fused.unflatten(0, (-1, len(self.parts))).unbind(1))
        return {part: piece.contiguous() for part, piece in zip(self.parts, pieces, strict=True)}

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        pieces = [parts[part] for part in self.parts]
        if count := self.groups(config):
            grouped = [piece.unflatten(0, (count, -1)) for piece in pieces]
            return torch.cat(grouped, dim=1).flatten(0, 1)
        return torch.cat(pieces) if self.layout == "blocks" else torch.stack(pieces, dim=1).flatten(0, 1)

    def groups(self, config: ModelConfig) -> int | None:
        """Count the groups of heads, None where parts are not laid out in groups."""
        counts = {"heads": config.n_kv_head, "query_heads": config.n_head, "delta_heads": config.delta_key_heads}
        return counts.get(self.layout)

    def sizes(self, rows: int, config: ModelConfig) -> list[int]:
        """Count the rows of each part."""
        own_key = config.head_size - config.latent_rope_size
        delta_keys = config.delta_key_heads * config.delta_key_size
        delta_values = config.delta_value_heads * config.delta_value_size
        heads = {
            "delta.query": delta_keys,
            "delta.key": delta_keys,
            "delta.value": delta_values,
            "delta.output_gate": delta_values,
            "delta.beta": config.delta_value_heads,
            "delta.decay": config.delta_value_heads,
            "query": config.n_head * config.head_size,
            "query_gate": config.n_head * config.head_size,
            "key": config.n_kv_head * own_key,
            "value": config.n_kv_head * config.value_size,
        }
        paths = [part.removesuffix(".weight").removesuffix(".bias").split(".") for part in self.parts]
        layers = [".".join(path[-2:] if "delta" in path else path[-1:]) for path in paths]
        shares = [heads.get(layer, 1) for layer in layers]
        return [rows * share // sum(shares) for share in shares]


@dataclass(frozen=True)
class Transposed:
    """The rule of a matrix (in, out) where ours are (out, in): GPT-2's Conv1D, gpt-oss's experts."""

    rule: "str | Fused"

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names."""
        return parts_of(self.rule)

    def split(self, matrix: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(in, rows) -> {part: (its rows, in)}."""
        return split(self.rule, matrix.T.contiguous(), config)

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        return join(self.rule, parts, config).T.contiguous()


@dataclass(frozen=True)
class EitherWay(Transposed):
    """The rule of a matrix that some files hold as (in, out) and others as (out, in); the first is written."""

    inside: Literal["n_embd", "expert_size"]
    """The field of ModelConfig that is `in`. Where it equals out, as in transformers, (out, in) is meant."""

    def split(self, matrix: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(in, rows) or (rows, in) -> {part: (its rows, in)}."""
        ours = matrix.size(1) == getattr(config, self.inside)
        return split(self.rule, matrix, config) if ours else super().split(matrix, config)


@dataclass(frozen=True)
class Stacked:
    """The rule of a tensor with one more dimension in front, over which {e} counts in our names."""

    rule: "str | Fused | Transposed"

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names, with {e}."""
        return parts_of(self.rule)

    def split(self, stack: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(count, ...) -> {part: (...)} for each of them."""
        return {
            part.replace("{e}", str(e)): piece.contiguous()
            for e, layer in enumerate(stack)
            for part, piece in split(self.rule, layer, config).items()
        }

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        layers: list[Tensor] = []
        while self.parts[0].replace("{e}", str(len(layers))) in parts:
            mine = {part: parts[part.replace("{e}", str(len(layers)))] for part in self.parts}
            layers.append(join(self.rule, mine, config))
        return torch.stack(layers)


@dataclass(frozen=True)
class OneRow:
    """The rule of a vector that files hold as a matrix of one row."""

    part: str

    @property
    def parts(self) -> tuple[str, ...]:
        """Our name."""
        return (self.part,)

    def split(self, row: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """(1, size) -> {part: (size,)}."""
        return {self.part: row[0]}

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        return parts[self.part][None]


@dataclass(frozen=True)
class Either:
    """The rule of a tensor that holds other layers in a model of experts."""

    dense: "str | Fused"
    mixed: "str | Fused"

    @property
    def parts(self) -> tuple[str, ...]:
        """Our names in models of both kinds."""
        return (*parts_of(self.dense), *parts_of(self.mixed))

    def split(self, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
        """Their tensor -> {part: ours}."""
        return split(self.mixed if config.n_expert else self.dense, tensor, config)

    def join(self, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
        """The inverse of split."""
        return join(self.mixed if config.n_expert else self.dense, parts, config)

    def holding(self, part: str) -> "str | Fused":
        """The rule that holds one of our names."""
        return self.dense if part in parts_of(self.dense) else self.mixed


@dataclass(frozen=True)
class When:
    """A rule whose spelling is written only for models that `holds` is true of; it is read for any."""

    rule: "Rule"
    holds: Callable[[ModelConfig], bool]


@dataclass(frozen=True)
class Packed:
    """The rule of a tensor that is packed in 4 bits, NAME_blocks beside NAME_scales; it is read and never written."""

    rule: Stacked

    @staticmethod
    def scales(blocks: str) -> str:
        """The name of the tensor of scales beside `blocks`."""
        return blocks.removesuffix("_blocks") + "_scales"


Rule = str | Fused | Transposed | Stacked | OneRow | Either | When | Packed
"""The rule of one of their tensors: one of our names, DROP, or the way it holds several."""


def split(rule: Rule, tensor: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """Their tensor -> {one of our name templates: ours}."""
    if isinstance(rule, When | Packed):
        return split(rule.rule, tensor, config)
    return {rule: tensor} if isinstance(rule, str) else rule.split(tensor, config)


def join(rule: Rule, parts: Mapping[str, Tensor], config: ModelConfig) -> Tensor:
    """The inverse of split."""
    if isinstance(rule, When | Packed):
        return join(rule.rule, parts, config)
    return parts[rule] if isinstance(rule, str) else rule.join(parts, config)


def parts_of(rule: Rule) -> tuple[str, ...]:
    """The templates of ours that one of their tensors holds."""
    if isinstance(rule, When | Packed):
        return parts_of(rule.rule)
    return (rule,) if isinstance(rule, str) else rule.parts


def tensors(modules: Mapping[str, Rule]) -> dict[str, Rule]:
    """The rules of the weights and biases of modules, from rules of the modules."""
    return {their + kind: _suffixed(rule, kind) for their, rule in modules.items() for kind in (".weight", ".bias")}


def _suffixed(rule: Rule, kind: str) -> Rule:
    if isinstance(rule, str):
        return rule + kind
    if isinstance(rule, Fused):
        return replace(rule, parts=tuple(part + kind for part in rule.parts))
    if isinstance(rule, OneRow):
        return rule
    if isinstance(rule, Either):
        return Either(_suffixed(rule.dense, kind), _suffixed(rule.mixed, kind))  # type: ignore[arg-type]
    if isinstance(rule, Transposed) and kind == ".bias":
        return _suffixed(rule.rule, kind)
    return replace(rule, rule=_suffixed(rule.rule, kind))  # type: ignore[arg-type]
