"""The shares that a delta net forgets and corrects, from what its layers give for each head: one pass each way."""

import torch
from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, tl, triton

BLOCK = 1024


def gates_forward(x: Tensor, rate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The logarithms of the shares that stay, -rate softplus(b + bias), and the shares sigmoid(a) that are corrected.

    Args:
        x: (T, 2 H), a and b side by side, rows contiguous.
        rate, bias: (H,) float32.

    Returns:
        Twice (T, H) float32.
    """
    heads = len(rate)
    kept, beta = (torch.empty(len(x), heads, device=x.device, dtype=torch.float32) for _ in range(2))
    _gates[(cdiv(kept.numel(), BLOCK),)](
        x, x.stride(0), rate, bias, kept, beta, len(x), heads, BLOCK=BLOCK, num_warps=4
    )
    return kept, beta


def gates_backward(d_kept: Tensor, d_beta: Tensor, x: Tensor, rate: Tensor, bias: Tensor) -> Tensor:
    """The gradient of x, (T, 2 H); those of what gates_forward returned are contiguous."""
    d_x, heads = torch.empty(x.shape, device=x.device, dtype=x.dtype), len(rate)
    _gates_backward[(cdiv(d_kept.numel(), BLOCK),)](
        x, x.stride(0), rate, bias, d_kept, d_beta, d_x, len(x), heads, BLOCK=BLOCK, num_warps=4
    )
    return d_x


if triton is not None:

    @triton.jit(do_not_specialize=VARYING)
    def _gates(X, ld, RATE, BIAS, KEPT, BETA, T, heads, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, t, h = at < T.to(tl.int64) * heads, at // heads, at % heads
        a = tl.load(X + t * ld + h, inside, 0.0).to(tl.float32)
        b = tl.load(X + t * ld + heads + h, inside, 0.0).to(tl.float32) + tl.load(BIAS + h)
        softplus = tl.maximum(b, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(b)))
        tl.store(KEPT + at, -tl.load(RATE + h) * softplus, inside)
        tl.store(BETA + at, tl.sigmoid(a), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _gates_backward(X, ld, RATE, BIAS, D_KEPT, D_BETA, DX, T, heads, BLOCK: tl.constexpr):
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, t, h = at < T.to(tl.int64) * heads, at // heads, at % heads
        share = tl.sigmoid(tl.load(X + t * ld + h, inside, 0.0).to(tl.float32))
        b = tl.load(X + t * ld + heads + h, inside, 0.0).to(tl.float32) + tl.load(BIAS + h)
        da = tl.load(D_BETA + at, inside, 0.0).to(tl.float32) * share * (1.0 - share)
        db = -tl.load(D_KEPT + at, inside, 0.0).to(tl.float32) * tl.load(RATE + h) * tl.sigmoid(b)
        tl.store(DX + t * 2 * heads + h, da.to(DX.dtype.element_ty), inside)
        tl.store(DX + t * 2 * heads + heads + h, db.to(DX.dtype.element_ty), inside)
