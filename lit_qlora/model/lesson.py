"""The likeliest tokens of a teacher, and the loss that learns them: Hinton et al. 2015, arXiv 1503.02531.

Of each labelled token the likeliest tokens of the teacher are known, and all others together as one more outcome. With
every token of the vocabulary known this is the divergence of the whole distributions.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Value = TypeVar("Value", Tensor, float)


class Lesson:
    """The likeliest tokens of a teacher in a micro-batch, and how the loss mixes them with the labels.

    A plain class, so that nothing on its way to the model rounds it to 16 bit.

    Attributes:
        ids: (..., K) int32, the likeliest tokens behind each token.
        log_probs: (..., K + 1) float32, of them, and of all other tokens together, at `temperature`.
        share: weight of the divergence; that of the cross-entropy is the rest.
        sums: (2,) float32, the weighted sums of cross-entropy and divergence are added to it.
    """

    def __init__(self, ids: Tensor, log_probs: Tensor, share: float, temperature: float, sums: Tensor) -> None:
        self.ids, self.log_probs = ids, log_probs
        self.share, self.temperature, self.sums = share, temperature, sums

    def map(self, change: Callable[[Tensor], Tensor]) -> "Lesson":
        """The same with both tensors changed alike."""
        return Lesson(change(self.ids), change(self.log_probs), self.share, self.temperature, self.sums)

    def part(self, rows: slice) -> "Lesson":
        """Of these tokens."""
        return self.map(lambda tensor: tensor[rows])

    def to(self, device: torch.device) -> "Lesson":
        """On a device."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


def mix(cross_entropy: Value, divergence: Value, share: float, temperature: float) -> Value:
    """The loss of these two, which are of one token each or sums. The square keeps the size of gradients."""
    return (1 - share) * cross_entropy + share * temperature**2 * divergence


def divergence(logits: Tensor, ids: Tensor, log_probs: Tensor, temperature: float) -> Tensor:
    """KL(teacher || model) of each row, over the known tokens and the others together.

    Args:
        logits: (N, V) float32 or float64, of the model.
        ids, log_probs: (N, K) and (N, K + 1), see Lesson.

    Returns:
        (N,).
    """
    logits, ids = logits / temperature, ids.long()
    own = logits.gather(1, ids)
    if ids.size(1) < logits.size(1):
        rest = logits.scatter(1, ids, -torch.inf).logsumexp(1, keepdim=True)
        own = torch.cat((own, rest), 1)
    own = own - logits.logsumexp(1, keepdim=True)
    wanted = log_probs[:, : own.size(1)]
    return torch.where(wanted > -torch.inf, wanted.exp() * (wanted - own), 0.0).sum(1)


def linear_distillation(
    hidden: Tensor,
    to_logits: Callable[[Tensor], Tensor],
    labels: Tensor,
    weights: Tensor | None,
    lesson: Lesson,
    at_once: int,
    hits: Tensor | None = None,
) -> Tensor:
    """The mix of cross-entropy and divergence, summed over the labelled tokens; see gpt.linear_cross_entropy.

    Args:
        hidden: (B, T, E).
        to_logits: (..., E) -> (..., V).
        labels: (B, T) int64; weights: (B, T) float32 or None.
        lesson: of (B, T) tokens, on the device of `hidden`.
        at_once: tokens whose logits exist at a time.
        hits: see GPT.

    Returns:
        float32 scalar.
    """
    known = (labels.flatten() >= 0).nonzero()[:, 0]
    wanted, read = labels.flatten()[known], hidden.flatten(0, 1)[known]
    factors = torch.ones_like(wanted, dtype=torch.float32) if weights is None else weights.flatten()[known]
    told = lesson.map(lambda tensor: tensor.flatten(0, 1)[known])

    def parts(read: Tensor, wanted: Tensor, factors: Tensor, ids: Tensor, log_probs: Tensor) -> tuple[Tensor, Tensor]:
        logits = to_logits(read).float()
        right = (logits.detach().argmax(dim=-1) == wanted).sum()
        each = torch.stack(
            (
                F.cross_entropy(logits, wanted, reduction="none"),
                divergence(logits, ids, log_probs, lesson.temperature),
            )
        )
        return each @ factors, right

    total = torch.zeros(2, device=hidden.device)
    slices = (one.split(at_once) for one in (read, wanted, factors, told.ids, told.log_probs))
    for some in zip(*slices, strict=True):
        both, right = parts(*some) if len(known) <= at_once else checkpoint(parts, *some, use_reentrant=False)
        total = total + both
        if hits is not None:  # outside of what is recomputed
            hits += right
    lesson.sums += total.detach()
    entropy, apart = total.unbind()
    return mix(entropy, apart, lesson.share, lesson.temperature)
