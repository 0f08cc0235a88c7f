"""Cross-entropy and its gradient from logits, in place: the logits of a slice become d loss / d logits.

Two reads and one write of (T, V); nothing of that size is kept. The softmax is float32, with the maximum and the sum
found in one pass. Milakov & Gimelshein 2018. The same pass tells if the label is the likeliest token.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.launch import power_of_2, tl, triton


def cross_entropy_reference(
    logits: Tensor, labels: Tensor, weights: Tensor, cap: float | None = None
) -> tuple[Tensor, Tensor]:
    """Compute cross_entropy_ in plain torch: the weighted loss of each row, and the gradient of their sum."""
    capped = logits.float() if cap is None else cap * torch.tanh(logits.float() / cap)
    log_probs = capped.log_softmax(-1)
    kept = (labels >= 0).float() * weights
    target = labels.clamp(min=0)[:, None]
    loss = -log_probs.gather(1, target)[:, 0] * kept
    gradient = log_probs.exp().scatter_add(1, target, -torch.ones_like(target, dtype=torch.float32))
    gradient = gradient if cap is None else gradient * (1 - (capped / cap).square())
    return loss, (gradient * kept[:, None]).to(logits.dtype)


def cross_entropy_(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor,
    loss: Tensor,
    cap: float | None = None,
    hits: Tensor | None = None,
) -> None:
    """Turn logits into the gradient of the weighted sum of losses, in place.

    Args:
        logits: (T, V), rows contiguous.
        labels: (T,) int64; a negative one has no loss.
        weights: (T,) float32.
        loss: (T,) float32, written.
        cap: logits x count as cap * tanh(x / cap).
        hits: () int64, the number of rows whose argmax is the label is added to it.
    """
    (rows, vocab), (group, width, warps) = logits.shape, BLOCKS
    _cross_entropy[(rows,)](
        logits, logits.stride(0), labels, weights, loss, loss if hits is None else hits, vocab, cap or 0.0,
        CAPPED=cap is not None, COUNT=hits is not None, GROUP=group, WIDTH=min(width, power_of_2(vocab)),
        num_warps=warps,
    )  # fmt: skip


BLOCKS = (4, 4096, 16)
"""Logits at a time for each running maximum, such maxima, and warps: with hits the fastest of 10 choices on an H200.

A new maximum costs an exponential, and the units for these limit the kernel; so several logits share one.
"""

if triton is not None:

    @triton.jit
    def _soft(x, cap, CAPPED: tl.constexpr):
        """The logit that counts, and what its gradient is multiplied by."""
        slope = tl.full(x.shape, 1.0, tl.float32)
        if CAPPED:
            share = 2.0 * tl.sigmoid(2.0 * x / cap) - 1.0  # tanh
            slope = 1.0 - share * share
            x = cap * share
        return x, slope

    @triton.jit
    def _cross_entropy(
        LOGITS, ld, LABELS, WEIGHTS, LOSS, HITS, V, cap,
        CAPPED: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        row = LOGITS + t * ld
        label = tl.load(LABELS + t)
        known = label >= 0
        weight = tl.where(known, tl.load(WEIGHTS + t), 0.0)
        label = tl.maximum(label, 0)
        right, _right_slope = _soft(tl.load(row + label + tl.arange(0, 1)).to(tl.float32), cap, CAPPED)
        block: tl.constexpr = GROUP * WIDTH
        c = tl.arange(0, GROUP)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        beaten = tl.zeros((WIDTH,), tl.int32)
        largest = tl.full((WIDTH,), -float("inf"), tl.float32)
        total = tl.zeros((WIDTH,), tl.float32)
        for v0 in range(0, V, block):
            x, _ = _soft(tl.load(row + v0 + c, v0 + c < V, 0.0).to(tl.float32), cap, CAPPED)
            x = tl.where(v0 + c < V, x, -float("inf"))
            if COUNT:  # of equal logits the first is the likeliest, as in torch.argmax
                beats = (v0 + c != label) & ((x > right) | ((x == right) & (v0 + c < label)))
                beaten |= tl.max(beats.to(tl.int32), axis=0)
            new = tl.maximum(largest, tl.max(x, axis=0))
            new = tl.where(new == -float("inf"), 0.0, new)  # a column that has seen no logit yet
            total = total * tl.exp(largest - new) + tl.sum(tl.exp(x - new[None, :]), axis=0)
            largest = new
        most = tl.max(largest, 0)
        log_sum = most + tl.log(tl.sum(total * tl.exp(largest - most), 0))
        if COUNT:
            tl.atomic_add(HITS, 1, known & (tl.max(beaten, 0) == 0), sem="relaxed")
        tl.store(LOSS + t + tl.arange(0, 1), (log_sum - right) * weight)
        tl.debug_barrier()  # every thread has read the label's logit before it becomes a gradient
        blocks = tl.cdiv(V, block)
        for i in range(blocks):  # from the end, which was read last and may still be in the cache
            v = (blocks - 1 - i) * block + c
            x, slope = _soft(tl.load(row + v, v < V, 0.0).to(tl.float32), cap, CAPPED)
            g = (tl.exp(x - log_sum) - tl.where(v == label, 1.0, 0.0)) * weight * slope
            tl.store(row + v, g.to(LOGITS.dtype.element_ty), v < V)
