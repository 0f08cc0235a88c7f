"""Cross-entropy and its gradient from logits, in place: the logits of a slice become d loss / d logits.

Two reads and one write of (T, V); nothing of that size is kept. The softmax is float32, with the maximum and the sum
found in one pass. Milakov & Gimelshein 2018. Exponentials have the base 2, which GPUs compute; what concerns one label
is done for it alone, not compared with each logit, where the instructions would take longer than the bytes.
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
    (rows, vocab), (width, warps) = logits.shape, BLOCKS
    group = 8 if vocab > 16 * width else 4
    _cross_entropy[(rows,)](
        logits, logits.stride(0), labels, weights, loss, loss if hits is None else hits, vocab, cap or 0.0,
        CAPPED=cap is not None, COUNT=hits is not None, GROUP=group, WIDTH=min(width, power_of_2(vocab)),
        num_warps=warps,
    )  # fmt: skip


BLOCKS = (4096, 16)
"""Running maxima and warps: of 15 choices the fastest on an H200 for 128,256 and 151,936 logits, near it for 32,000.

A new maximum costs an exponential, so several logits of a time share one: 8 where there are many, else 4.
"""

if triton is not None:
    LOG2_E = tl.constexpr(1.4426950408889634)

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
        right, right_slope = _soft(tl.load(row + label + tl.arange(0, 1)).to(tl.float32), cap, CAPPED)
        block: tl.constexpr = GROUP * WIDTH
        c = tl.arange(0, GROUP)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
        largest = tl.full((WIDTH,), -float("inf"), tl.float32)
        scaled = tl.full((WIDTH,), -float("inf"), tl.float32)  # its logarithm's base is 2, as that of all sums here
        total = tl.zeros((WIDTH,), tl.float32)
        for v0 in range(0, V, block):
            x, _ = _soft(tl.load(row + v0 + c, v0 + c < V, -float("inf")).to(tl.float32), cap, CAPPED)
            if CAPPED:
                x = tl.where(v0 + c < V, x, -float("inf"))
            largest = tl.maximum(largest, tl.max(x, axis=0))
            old, scaled = scaled, largest * LOG2_E
            shift = tl.where(scaled == -float("inf"), 0.0, scaled)  # a column that has seen no logit yet
            total = total * tl.exp2(old - shift) + tl.sum(tl.exp2(x * LOG2_E - shift[None, :]), axis=0)
        peak = tl.max(scaled, 0)
        peak = tl.where(peak == -float("inf"), 0.0, peak)  # no logit is a number that counts: the sum says so
        rest = tl.log2(tl.sum(total * tl.exp2(scaled - peak), 0))
        log_sum = peak + rest
        leads = tl.sum((right == tl.max(largest, 0)).to(tl.int32), 0) > 0
        bits = tl.where(known, rest - (right * LOG2_E - peak), 0.0)  # infinite, times 0, would be NaN
        tl.store(LOSS + t + tl.arange(0, 1), bits / LOG2_E * weight)
        tl.debug_barrier()  # every thread has read the label's logit before it becomes a gradient
        before = tl.zeros((WIDTH,), tl.int32)
        blocks = tl.cdiv(V, block)
        for i in range(blocks):  # from the end, which was read last and may still be in the cache
            v = (blocks - 1 - i) * block + c
            x, slope = _soft(tl.load(row + v, v < V, -float("inf")).to(tl.float32), cap, CAPPED)
            if COUNT:  # noqa: SIM102 - the outer one decides what is compiled
                if leads:  # of equal logits the first is the likeliest, as in torch.argmax
                    before |= tl.max(((x == right) & (v < label)).to(tl.int32), axis=0)
            tl.store(row + v, (tl.exp2(x * LOG2_E - log_sum) * weight * slope).to(LOGITS.dtype.element_ty), v < V)
        if COUNT:
            tl.atomic_add(HITS, 1, known & leads & (tl.max(before, 0) == 0), sem="relaxed")
        tl.debug_barrier()  # the label's gradient is written once more, so that no other element is compared with it
        g = (tl.exp2(right * LOG2_E - log_sum) - 1.0) * weight * right_slope
        tl.store(row + label + tl.arange(0, 1), g.to(LOGITS.dtype.element_ty))
