"""The measured effects of quantisation on a base, and the storage of its layers that they advise within a budget.

scripts/plan_quantization.py writes the table into the folder of the checkpoint. Groups are layers that read the same
input, because the fast path stacks them. Their effects are added up as if they were independent.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from lit_qlora.checkpoint.allocation import Choice, allocate
from lit_qlora.checkpoint.checkpoint import content_hash
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage, bits_per_weight
from lit_qlora.settings import Budget, FinetuneConfig, Quantization, Scheme, check
from lit_qlora.settings.checks import fit
from lit_qlora.settings.limits import Count, NotNegative, Pattern

FILE = "quantization.json"
MEASURED: tuple[Scheme, ...] = ("bnb.nf4-dq", "bnb.nf4", "bnb.int8")
CHOICES: tuple[Scheme, ...] = ("none", *MEASURED)
"""The schemes among which a budget chooses."""
Settled = TypeVar("Settled", bound=FinetuneConfig)


@dataclass(frozen=True)
class Group:
    """Layers that read the same input, and so are stored alike."""

    layers: tuple[str, ...]
    """Patterns of their paths, in which all experts of a block are one."""
    weights: int
    kl: dict[str, float]
    """By scheme of MEASURED, the KL divergence of the model with this group alone quantised, in nats a token."""

    @property
    def name(self) -> str:
        """The layers in short, such as blocks.3.attn.query+key+value."""
        first = self.layers[0]
        return "+".join([first, *(path.rpartition(".")[2] for path in self.layers[1:])])


@dataclass(frozen=True)
class Table:
    """The effects of quantisation on a base, group by group.

    Attributes:
        sha256: of the base's weights.
        text: sha256 of the ids of the text that they were measured on; tokens: how many there are.
        dtype: of the weights when they were measured.
    """

    sha256: str
    text: str
    tokens: int
    dtype: str
    groups: tuple[Group, ...]

    def within(self, budget: Budget, config: ModelConfig, dtype: torch.dtype) -> Quantization:
        """The storage with the least sum of effects within a budget, exactly.

        Args:
            dtype: of the weights that are not quantised.

        Raises:
            UsageError: if the budget is too small.
        """
        beside = other_bytes(config, self.groups, dtype)
        most = budget.amount - beside
        if budget.bits:
            most = budget.amount / 8 * sum(group.weights for group in self.groups)
        choices = [self._choices(group, dtype) for group in self.groups]
        chosen = allocate(choices, int(most))
        if chosen is None:
            least = sum(min(choice.size for choice in group) for group in choices)
            bits = 8 * least / max(1, sum(group.weights for group in self.groups))
            raise UsageError(
                f"quantize_budget is too small for {config.name}: its weights take at least "
                f"{rounded_up(beside + least) / 1e9:.4g}GB, and {rounded_up(bits):.4g}bits a weight of linear layers."
            )
        return as_quantization(self.groups, [CHOICES[number] for number in chosen])

    def by_scheme(self, storage: Quantization) -> dict[Scheme, list[Group]]:
        """The groups of each scheme of a storage."""
        found: dict[Scheme, list[Group]] = {}
        for group in self.groups:
            scheme = Storage(torch.float32, *storage).scheme(example(group.layers[0]))
            found.setdefault(scheme, []).append(group)
        return found

    def predicted(self, storage: Quantization) -> float:
        """The sum of the effects of a storage."""
        found = self.by_scheme(storage)
        return sum(group.kl.get(scheme, 0.0) for scheme, groups in found.items() for group in groups)

    def sizes(self, storage: Quantization, config: ModelConfig, dtype: torch.dtype) -> tuple[int, float]:
        """Bytes of all weights in a storage, and bits a weight of the groups."""
        found = self.by_scheme(storage).items()
        size = sum(bytes_of(group.weights, scheme, dtype) for scheme, groups in found for group in groups)
        bits = 8 * size / max(1, sum(group.weights for group in self.groups))
        return other_bytes(config, self.groups, dtype) + size, bits

    @staticmethod
    def _choices(group: Group, dtype: torch.dtype) -> list[Choice]:
        kl = {"none": 0.0, **group.kl}
        return [Choice(bytes_of(group.weights, scheme, dtype), kl[scheme]) for scheme in CHOICES]


def bytes_of(weights: int, scheme: Scheme, dtype: torch.dtype) -> int:
    """Bytes of so many weights, rounded up."""
    return -int(-weights * bits_per_weight(scheme, dtype) // 8)


def rounded_up(value: float) -> float:
    """The value with four digits, and no less than it is."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 3)
    return math.ceil(value / unit) * unit


def other_bytes(config: ModelConfig, groups: Sequence[Group], dtype: torch.dtype) -> int:
    """Bytes of all weights that are in no group, and so are never quantised."""
    whole = sum(parameter.numel() for parameter in GPT.skeleton(config).parameters())
    return (whole - sum(group.weights for group in groups)) * dtype.itemsize


def as_quantization(groups: Sequence[Group], schemes: Sequence[Scheme]) -> Quantization:
    """The storage that gives each group its scheme: that of most weights in general, and the others by name."""
    weights: Counter[Scheme] = Counter()
    for group, scheme in zip(groups, schemes, strict=True):
        weights[scheme] += group.weights * (group.layers != ("head",))
    general: Scheme = max(weights, key=lambda scheme: weights[scheme], default="none")
    layers = []
    for group, scheme in zip(groups, schemes, strict=True):
        if scheme != ("none" if group.layers == ("head",) else general):
            layers += [(pattern, scheme) for pattern in group.layers]
    return Quantization(general, False, tuple(layers))


def example(pattern: str) -> str:
    """A path that a pattern of a group matches."""
    return pattern.replace(r"\d+", "0").replace("\\", "")


def pattern_of(path: str) -> str:
    """The pattern that a layer of a group has: one for the same layer of all experts."""
    return re.sub(r"experts\.\d+\.", r"experts.\\d+.", path)


def write_table(directory: Path, table: Table) -> None:
    """Write a table into the folder of its checkpoint.

    Raises:
        ResourceError: if it cannot be written.
    """
    write_text(directory / FILE, json.dumps(asdict(table), indent=1) + "\n")


def read_table(directory: Path) -> Table | None:
    """The table of the checkpoint in `directory`; None if there is none, or it is of other weights.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = directory / FILE
    if not path.is_file():
        return None
    try:
        table = _parse(read_json(path))
    except (KeyError, TypeError, AttributeError, UsageError) as error:
        raise CheckpointError(f"{path} is damaged ({error}). scripts/plan_quantization.py makes it again.") from None
    return table if table.sha256 == content_hash(directory) else None


def _parse(content: dict[str, Any]) -> Table:
    groups = tuple(
        Group(
            fit(group["layers"], tuple[Pattern, ...], "layers"),
            fit(group["weights"], Count, "weights"),
            {scheme: fit(group["kl"][scheme], NotNegative, scheme) for scheme in MEASURED},
        )
        for group in content["groups"]
    )
    check(all(group.layers for group in groups), "a group without layers")
    words = {name: fit(content[name], str, name) for name in ("sha256", "text", "dtype")}
    return Table(**words, tokens=fit(content["tokens"], int, "tokens"), groups=groups)


def choose(directory: Path, budget: str, dtype: torch.dtype) -> Quantization:
    """The storage that the table of a checkpoint advises within a budget.

    Raises:
        CheckpointError: if nothing was measured.
        UsageError: if the budget is too small.
    """
    config, table = ModelConfig.load(directory), read_table(directory)
    if table is None:
        raise CheckpointError(
            f"quantize auto: the effects of quantisation on {directory} are not measured.\n"
            f"Measure them once: python scripts/plan_quantization.py --checkpoint_dir {directory}"
        )
    return table.within(Budget.parse(budget), config, dtype)


def within_budget(config: Settled, dtype: torch.dtype) -> Settled:
    """The settings of a run whose budget, if it has one, has decided about each layer.

    Raises:
        CheckpointError: if nothing was measured.
        UsageError: if the budget is too small.
    """
    if config.quantize_budget is None:
        return config
    chosen = choose(config.checkpoint_dir, config.quantize_budget, dtype)
    return replace(config, quantize=chosen.quantize, quantize_layers=dict(chosen.layers), quantize_budget=None)
