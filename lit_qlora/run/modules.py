"""The adapted layers of a run: sizes, effective ranks and gradients of their updates, for the report."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import frozen_weight
from lit_qlora.run.page import folded, table
from lit_qlora.settings import OptimizerConfig
from lit_qlora.train.optim import in_groups
from lit_qlora.train.training_state import TENSORS

NOTE = (
    "The size of an update is its Frobenius norm relative to that of its weight. The effective rank is the exponential "
    "of the entropy of the singular values (Roy & Vetterli 2007), at most r. The gradient share is that of the squared "
    "gradients, averaged as Adam's second moment is, over about the last 1,000 steps."
)
HEADER = ("layer", "size of the update", "effective rank", "gradient share")
MOST = 4096
"""Adapted layers that a report measures; of many experts there are more, which would take minutes."""
SECOND_MOMENT = re.compile(r"optimizer/state/(\d+)/exp_avg_sq")


@dataclass(frozen=True)
class Module:
    """An adapted layer, or all experts' layers of a name together."""

    layer: str
    update: float
    """Squared norm of scale B A."""
    weight: float
    """Squared norm of the frozen weight."""
    rank: float
    """Effective rank of the update; of several layers the mean."""
    gradient: float | None
    """Sum of the second moments of A and B; None if the optimizer has none."""

    @property
    def size(self) -> float:
        """Of the update, relative to the weight."""
        return math.sqrt(self.update / self.weight) if self.weight else 0.0


@torch.no_grad()
def modules_of(model: GPT, optimizer: OptimizerConfig, folder: Path) -> list[Module]:
    """Measure each adapted layer of a model that was trained; none if there are more than MOST.

    Args:
        folder: with the optimizer's state at the end of the run.
    """
    learners = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    moments = second_moments(in_groups(learners, optimizer), folder)
    parts: dict[str, list[Module]] = defaultdict(list)
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, LoRALinear)}
    for path, layer in layers.items() if len(layers) <= MOST else ():
        name = re.sub(r"experts\.\d+\.", "experts.*.", path)
        parts[name].append(module_of(name, layer, [moments.get(f"{path}.{part}") for part in ("lora_a", "lora_b")]))
    return [joined(name, some) for name, some in parts.items()]


def module_of(name: str, layer: LoRALinear, moments: Sequence[float | None]) -> Module:
    """Measure one layer."""
    values, known = singular_values(layer), [moment for moment in moments if moment is not None]
    return Module(
        layer=name,
        update=float(values.square().sum()),
        weight=float(frozen_weight(layer.base).float().square().sum()),
        rank=effective_rank(values),
        gradient=sum(known) if len(known) == len(moments) else None,
    )


def joined(name: str, some: Sequence[Module]) -> Module:
    """Take some layers together."""
    gradients = [module.gradient for module in some if module.gradient is not None]
    return Module(
        layer=name,
        update=sum(module.update for module in some),
        weight=sum(module.weight for module in some),
        rank=sum(module.rank for module in some) / len(some),
        gradient=sum(gradients) if len(gradients) == len(some) else None,
    )


def singular_values(layer: LoRALinear) -> Tensor:
    """Compute the singular values of an update, (r,), without forming it."""
    r_b, r_a = (torch.linalg.qr(matrix.double()).R for matrix in (layer.lora_b, layer.lora_a.T))
    return torch.linalg.svdvals(layer.scale * r_b @ r_a.T)


def effective_rank(values: Tensor) -> float:
    """Return exp of the entropy of singular values; 0 if all are zero."""
    if not values.any():
        return 0.0
    shares = values / values.sum()
    return float(torch.special.entr(shares).sum().exp())


def second_moments(names: Iterable[str], folder: Path) -> dict[str, float]:
    """Read the sums of Adam's second moments by parameter; nothing for other optimizers.

    Args:
        names: in the order of the optimizer's state.
    """
    path = folder / TENSORS
    found = [SECOND_MOMENT.fullmatch(name) for name in safetensors_io.read_specs(path)] if path.is_file() else []
    numbers = {int(match[1]): match[0] for match in found if match}
    named = {name: numbers[number] for number, name in enumerate(names) if number in numbers}
    return {name: float(safetensors_io.read_tensor(path, key).double().sum()) for name, key in named.items()}


def section(modules: Sequence[Module]) -> str:
    """Write the section of the report: by kind of layer, by block, and each layer; '' without adapted layers."""
    if not modules:
        return ""
    kinds, blocks = defaultdict(list), defaultdict(list)
    for module in modules:
        kinds[module.layer.rpartition(".")[2]].append(module)
        found = re.match(r"blocks\.(\d+)\.", module.layer)
        blocks[f"block {found[1]}" if found else module.layer].append(module)
    by_kind, by_block = ([joined(name, some) for name, some in groups.items()] for groups in (kinds, blocks))
    return (
        f'<p class="note">{NOTE}</p>'
        + table(_rows(by_kind), HEADER)
        + folded("by block", table(_rows(by_block), HEADER))
        + folded(f"each of {len(modules):,} layers", table(_rows(modules), HEADER))
    )


def _rows(modules: Sequence[Module]) -> list[list[str]]:
    gradients = [module.gradient for module in modules]
    whole = sum(gradient for gradient in gradients if gradient is not None)
    return [
        [
            module.layer,
            f"{100 * module.size:.2f} %",
            f"{module.rank:.1f}",
            "" if module.gradient is None or not whole else f"{100 * module.gradient / whole:.1f} %",
        ]
        for module in modules
    ]
