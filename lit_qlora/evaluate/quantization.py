"""The effect of quantisation on what a model says: its divergence from the model in 16 or 32 bits, group by group."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_qlora.checkpoint.quantization_table import MEASURED, Group, pattern_of
from lit_qlora.fused.support import stacks_of, stacks_of_experts
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE
from lit_qlora.quantize import QuantizedLinear, Storage
from lit_qlora.settings import Quantization, Scheme

AT_ONCE = 4096  # tokens of a forward pass


class Effects:
    """Measures a model with some of its layers quantised against itself.

    Args:
        model: none of its layers is quantised.
        rows: (B, T) ids of a text.
    """

    def __init__(self, model: GPT, rows: Tensor) -> None:
        self.model, self.head = model.eval(), model.head
        self.rows = rows.to(model.embed.weight.device).split(max(1, AT_ONCE // rows.size(1)))
        self.tokens = rows.numel()
        self.before = [self._hidden(part) for part in self.rows]

    def groups(self) -> Iterator[Group]:
        """Measure each group by itself, a pass for each scheme."""
        for paths in groups_of(self.model):
            kl = {scheme: self.kl(dict.fromkeys(paths, scheme)) for scheme in MEASURED}
            weights = sum(_linear(self.model, path).weight.numel() for path in paths)
            yield Group(tuple(dict.fromkeys(map(pattern_of, paths))), weights, {name: kl[name] for name in MEASURED})

    def of_storage(self, storage: Quantization) -> float:
        """Measure a storage of the whole model."""
        of = Storage(self.model.embed.weight.dtype, *storage)
        paths = [path for path, module in self.model.named_modules() if type(module) is nn.Linear]
        return self.kl({path: of.scheme(path) for path in paths if of.quantizes(path)})

    def kl(self, schemes: dict[str, Scheme]) -> float:
        """KL(model || model with these layers quantised), nats a token."""
        with quantized(self.model, schemes):
            return max(0.0, sum(map(self._divergence, self.before, self.rows)) / self.tokens)  # rounding can go below

    @torch.no_grad()
    def _hidden(self, rows: Tensor) -> Tensor:
        return self.model.hidden(rows).flatten(0, 1)

    @torch.no_grad()
    def _divergence(self, before: Tensor, rows: Tensor) -> float:
        """The sum over the tokens of some rows."""
        at_once = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        total = torch.zeros((), dtype=torch.float64, device=before.device)
        for theirs, mine in zip(before.split(at_once), self._hidden(rows).split(at_once), strict=True):
            changed = self.model.logits(mine).float().log_softmax(dim=-1)
            with _replaced(self.model, {"head": self.head}):
                known = self.model.logits(theirs).float().log_softmax(dim=-1)
            total += (known.exp() * (known - changed)).sum(dtype=torch.float64)
        return float(total)


def groups_of(model: GPT) -> list[list[str]]:
    """The paths of the layers that quantisation makes smaller, in groups that read the same input, or their expert's.

    A tied head is not among them: its weight is the embedding's, which stays.
    """
    every = Storage(quantize="bnb.nf4", quantize_head=not model.config.tied_head)
    linears = {path: module for path, module in model.named_modules() if type(module) is nn.Linear}
    paths = {module: path for path, module in linears.items() if every.quantizes(path)}
    of_experts = (layers for block in model.blocks for layers in stacks_of_experts(block))
    stacks: list[list[nn.Module]] = [*stacks_of(model), *of_experts]
    known = {layer for layers in stacks for layer in layers}
    stacks += [[layer] for layer in paths if layer not in known]
    found = ([paths[layer] for layer in layers if layer in paths] for layers in stacks)
    return [group for group in found if group]


@contextmanager
def quantized(model: GPT, schemes: dict[str, Scheme]) -> Iterator[None]:
    """Let some layers of a model be quantised inside."""
    layers = {}
    for path, scheme in schemes.items():
        linear = _linear(model, path)
        layers[path] = QuantizedLinear(linear.weight.data, None if linear.bias is None else linear.bias.data, scheme)
    with _replaced(model, layers):
        yield


@contextmanager
def _replaced(model: GPT, layers: dict[str, Any]) -> Iterator[None]:
    before = {path: model.get_submodule(path) for path in layers}
    try:
        for path, layer in layers.items():
            model.set_submodule(path, layer)
        yield
    finally:
        for path, layer in before.items():
            model.set_submodule(path, layer)


def _linear(model: GPT, path: str) -> nn.Linear:
    linear = model.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def rows_of(ids: Sequence[int], length: int) -> Tensor:
    """A text in rows of equal length, (B, T); less than a row at its end is left out."""
    length = min(length, len(ids))
    return torch.tensor(ids[: len(ids) // length * length]).view(-1, length)
