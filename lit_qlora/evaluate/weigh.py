"""The strength of an adapter: the loss and the distance to the base at parts and multiples of its update.

Wortsman et al. 2022 (WiSE-FT) interpolate the weights of a model and its fine-tuned version. Here only B A is scaled.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.data import Batch
from lit_qlora.errors import UsageError
from lit_qlora.lora.embeddings import TrainedEmbedding
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.lora.verify import mean_loss
from lit_qlora.model.gpt import GPT, LOGITS_AT_ONCE

THIRDS = ("first third", "middle third", "last third")
HALVINGS = 10  # of the interval of factors in the search for a budget


@dataclass(frozen=True)
class Strength:
    """Metrics of a part of the update at a factor."""

    part: str
    """"all", or one of THIRDS while the others have factor 1."""
    factor: float
    val_loss: float
    """Nats per labelled token."""
    kl: float
    """KL(base || model) in nats per token of a text."""


class Dial:
    """Scales the update of the adapters in a model.

    Args:
        text: ids on which the distance to the base is measured.

    Raises:
        UsageError: if the update is more than a product B A, so that it has no multiples.
    """

    def __init__(self, model: GPT, batches: Sequence[Batch], text: Sequence[int]) -> None:
        self.model, self.batches = model.eval(), batches
        self.tokens = torch.tensor([text], device=model.embed.weight.device)
        self.layers = {path: m for path, m in model.named_modules() if isinstance(m, LoRALinear)}
        beyond = next((layer.beyond_low_rank for layer in self.layers.values() if layer.beyond_low_rank), "")
        beyond = beyond or ("trained embeddings" if isinstance(model.embed, TrainedEmbedding) else "")
        if beyond:
            raise UsageError(f"The update of this adapter has no multiples: it has {beyond}.")
        self.own = {path: layer.scale for path, layer in self.layers.items()}
        with self.at({}, otherwise=0.0):
            self.before = self._hidden()

    @contextmanager
    def at(self, factors: Mapping[str, float], otherwise: float = 1.0) -> Iterator[None]:
        """Scale the parts inside; a part without a factor gets `otherwise`."""
        before = {path: layer.scale for path, layer in self.layers.items()}
        try:
            for path, layer in self.layers.items():
                layer.scale = self.own[path] * factors.get(third_of(path, len(self.model.blocks)), otherwise)
            yield
        finally:
            for path, layer in self.layers.items():
                layer.scale = before[path]

    def curve(self, factors: Sequence[float]) -> Iterator[Strength]:
        """Measure the whole update at each factor, then each third."""
        for part in ("all", *THIRDS):
            for factor in factors:
                yield self.measure(part, factor)

    def measure(self, part: str, factor: float) -> Strength:
        """Measure one point of the curve."""
        chosen, otherwise = ({}, factor) if part == "all" else ({part: factor}, 1.0)
        with self.at(chosen, otherwise):
            return Strength(part, factor, mean_loss(self.model, self.batches), self._kl())

    def kl(self, factor: float) -> float:
        """Measure the distance to the base with the whole update at a factor."""
        with self.at({}, factor):
            return self._kl()

    @torch.no_grad()
    def _hidden(self) -> Tensor:
        return self.model.hidden(self.tokens)[0]

    @torch.no_grad()
    def _kl(self) -> float:
        """KL(base || model) at the present scales, mean over the text."""
        rows = max(1, LOGITS_AT_ONCE // self.model.config.vocab_size)
        total = 0.0
        for mine, theirs in zip(self._hidden().split(rows), self.before.split(rows), strict=True):
            adapted = self.model.logits(mine).float().log_softmax(dim=-1)
            with self.at({}, otherwise=0.0):
                base = self.model.logits(theirs).float().log_softmax(dim=-1)
            total += float((base.exp() * (base - adapted)).sum(dtype=torch.float64))
        return total / self.tokens.numel()


def third_of(path: str, blocks: int) -> str:
    """Name the third of the blocks that a layer is in; the head is in the last."""
    number = int(path.split(".")[1]) if path.startswith("blocks.") else blocks - 1
    return THIRDS[3 * number // blocks]


def within_budget(dial: Dial, curve: Sequence[Strength], budget: float) -> Strength:
    """Find the factor with the lowest validation loss whose distance to the base is within the budget.

    Besides the factors of the curve it tries the largest one that the budget allows, which lies between two of them.
    """
    whole = sorted((point for point in curve if point.part == "all"), key=lambda point: point.factor)
    beyond = next((number for number, point in enumerate(whole) if point.kl > budget), None)
    candidates = [point for point in whole if point.kl <= budget]
    if beyond:
        low, high = whole[beyond - 1].factor, whole[beyond].factor
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (middle, high) if dial.kl(middle) <= budget else (low, middle)
        candidates.append(dial.measure("all", low))
    return min(candidates, key=lambda point: point.val_loss)


def scaled(state: Mapping[str, Tensor], factor: float) -> dict[str, Tensor]:
    """Return an adapter whose update is `factor` times that of `state`."""
    return {name: tensor * factor if name.endswith(".lora_b") else tensor for name, tensor in state.items()}
