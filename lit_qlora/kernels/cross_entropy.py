"""Cross-entropy and its gradient from logits, in place: the logits of a slice become d loss / d logits.

Two reads and one write of (T, V); nothing of that size is kept. The softmax is float32, with the maximum and the sum
found in one pass. Milakov & Gimelshein 2018.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.launch import power_of_2, tl, triton


def cross_entropy_reference(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """What cross_entropy_ means: the weighted loss of each row, and the gradient of their sum."""
    log_probs = logits.float().log_softmax(-1)
    kept = (labels >= 0).float() * weights
    target = labels.clamp(min=0)[:, None]
    loss = -log_probs.gather(1, target)[:, 0] * kept
    gradient = log_probs.exp().scatter_add(1, target, -torch.ones_like(target, dtype=torch.float32))
    return loss, (gradient * kept[:, None]).to(logits.dtype)


def cross_entropy_(logits: Tensor, labels: Tensor, weights: Tensor, loss: Tensor) -> None:
    """Turn logits into the gradient of the weighted sum of losses, in place.

    Args:
        logits: (T, V), rows contiguous.
        labels: (T,) int64; a negative one has no loss.
        weights: (T,) float32.
        loss: (T,) float32, written.
    """
    rows, vocab = logits.shape
    _cross_entropy[(rows,)](
        logits, logits.stride(0), labels, weights, loss, vocab, BLOCK=min(4096, power_of_2(vocab)), num_warps=8
    )


if triton is not None:

    @triton.jit
    def _cross_entropy(LOGITS, ld, LABELS, WEIGHTS, LOSS, V, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        row = LOGITS + t * ld
        label = tl.load(LABELS + t)
        weight = tl.where(label >= 0, tl.load(WEIGHTS + t), 0.0)
        label = tl.maximum(label, 0)
        c = tl.arange(0, BLOCK)
        largest = tl.full((BLOCK,), -float("inf"), tl.float32)
        total = tl.zeros((BLOCK,), tl.float32)
        for v0 in range(0, V, BLOCK):
            x = tl.load(row + v0 + c, v0 + c < V, -float("inf")).to(tl.float32)
            new = tl.maximum(largest, x)
            new = tl.where(new == -float("inf"), 0.0, new)  # a column that has seen no logit yet
            total = total * tl.exp(largest - new) + tl.exp(x - new)
            largest = new
        most = tl.max(largest, 0)
        log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
        tl.store(LOSS + t, (log_sum - tl.load(row + label).to(tl.float32)) * weight)
        tl.debug_barrier()  # every thread has read the label's logit before it becomes a gradient
        for v0 in range(0, V, BLOCK):
            v = v0 + c
            x = tl.load(row + v, v < V, 0.0).to(tl.float32)
            g = (tl.exp(x - log_sum) - tl.where(v == label, 1.0, 0.0)) * weight
            tl.store(row + v, g.to(LOGITS.dtype.element_ty), v < V)
