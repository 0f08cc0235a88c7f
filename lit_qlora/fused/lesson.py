"""The loss of a slice of logits that learns from a teacher, and its gradient, in place; see model.lesson."""

import torch
from torch import Tensor

from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.model.lesson import Lesson, mix


def distill_(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    loss: Tensor,
    lesson: Lesson,
    cap: float | None = None,
    hits: Tensor | None = None,
) -> None:
    """Turn logits into the gradient of the weighted sum of the mixed losses, in place; see cross_entropy_.

    Args:
        lesson: of these T tokens.
    """
    own = logits.clone()
    cross_entropy_(logits, labels, weights, loss, cap, hits)
    known = weights * (labels >= 0)
    gradient, found = divergence_gradient(own, lesson, cap)
    found = found * known
    lesson.sums += torch.stack((loss.sum(), found.sum()))
    loss.copy_(mix(loss, found, lesson.share, lesson.temperature))
    logits.mul_(1 - lesson.share).add_(gradient.mul_((lesson.share * lesson.temperature**2 * known)[:, None]))


def divergence_gradient(logits: Tensor, lesson: Lesson, cap: float | None = None) -> tuple[Tensor, Tensor]:
    """The gradient of each row's divergence at its logits, (T, V) float32, and the divergences (T,).

    A token's gradient is its probability minus the teacher's. Tokens that the teacher does not tell apart share the
    difference of their sums, each by its part of the model's sum.
    """
    ids, wanted = lesson.ids.long(), lesson.log_probs
    x, slope = logits.float(), None
    if cap is not None:
        share = torch.tanh(x / cap)
        x, slope = cap * share, 1 - share.square()
    x = x.div_(lesson.temperature) if cap is not None or logits.dtype != torch.float32 else x / lesson.temperature
    own = x.gather(1, ids)
    x.scatter_(1, ids, -torch.inf)
    rest = x.logsumexp(1, keepdim=True)
    own = torch.cat((own, rest), 1)
    own = own - own.logsumexp(1, keepdim=True)
    there = wanted > -torch.inf
    found = torch.where(there, wanted.exp() * (wanted - own), 0.0).sum(1)
    excess = own.exp() - wanted.exp()
    gradient = x.sub_(rest.nan_to_num(neginf=0.0)).exp_().mul_(excess[:, -1:])
    gradient.scatter_(1, ids, excess[:, :-1]).div_(lesson.temperature)
    return (gradient if slope is None else gradient.mul_(slope)), found
