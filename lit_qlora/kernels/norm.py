"""Residual add and RMSNorm in one pass, and its backward with the adapters' part of the gradient joined in.

Forward: x' = x + y, out = x' / rms(x') * w: reads two, writes two, and keeps one number a row. Zhang & Sennrich 2019.
Backward: the gradient of the normed input arrives as [dN | dZ], base and adapters; dN + dZ A is formed in registers, so
it is never written. Neither is the normed input: sums over it follow from x and the row's scale.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.launch import power_of_2, stages, tl, triton

if triton is not None:
    from lit_qlora.kernels.dropout import factor


def add_norm_reference(x: Tensor, y: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """What add_norm means: the sum, the normed sum, and 1 / rms of each row."""
    total = x if y is None else x + y
    rstd = torch.rsqrt(total.float().square().mean(-1) + eps)
    return total, (total.float() * rstd[:, None] * weight.float()).to(x.dtype), rstd


def add_norm(x: Tensor, y: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Write norm(x + y) into the first E columns of `out`.

    Args:
        x, y: (T, E), contiguous; y None stands for zero.
        out: (T, at least E), rows contiguous.

    Returns:
        x + y (x itself where y is None), and rstd (T,) float32.
    """
    rows, width = x.shape
    total = x if y is None else torch.empty_like(x)
    rstd = torch.empty(rows, device=x.device, dtype=torch.float32)
    _add_norm[(rows,)](
        x, x if y is None else y, total, weight, out, out.stride(0), rstd, width, eps,
        HAS_Y=y is not None, BLOCK=power_of_2(width), num_warps=8,
    )  # fmt: skip
    return total, rstd


def norm_backward_reference(
    d_out: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, a: Tensor | None, residual: Tensor | None, dropout: Dropout
) -> Tensor:
    """What norm_backward means."""
    width = x.size(1)
    d = d_out[:, :width].float()
    if a is not None:
        d = d + (d_out[:, width:].float() @ a.float()) * factor_reference(x.size(0), width, dropout, x.device)
    d = d * weight.float()
    normed = x.float() * rstd[:, None]
    dx = rstd[:, None] * (d - normed * (d * normed).mean(-1, keepdim=True))
    return (dx if residual is None else dx + residual.float()).to(x.dtype)


def norm_backward(
    d_out: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    z: Tensor | None = None,
    a: Tensor | None = None,
    residual: Tensor | None = None,
    dropout: Dropout = NONE,
) -> Tensor:
    """The gradient of x.

    Args:
        d_out: (T, E + R), gradients of the normed input through the base and of Z; R may be 0.
        z: (T, R), Z itself: its product with dZ is the adapters' part of a sum over the normed input.
        a: (R, E), stacked and scaled A.
        residual: (T, E), what is added to the result.
        dropout: of the adapters' input.

    Returns:
        (T, E) in the dtype of x.
    """
    rows, width = x.shape
    rank = 0 if a is None else a.size(0)
    dx = torch.empty_like(x)
    padded = power_of_2(rank)
    block = 256 if padded <= 64 else 64
    in_flight = stages((3 * 16 + padded) * block, x.element_size(), most=4)
    _norm_backward[(triton.cdiv(rows, 16),)](
        d_out, d_out.stride(0), x, weight, rstd, x if z is None else z, x if a is None else a,
        x if residual is None else residual, dx, rows, width, dropout.seed, dropout.threshold, dropout.scale,
        R=rank, RP=padded, HAS_RESIDUAL=residual is not None, DROP=dropout.p > 0, BM=16, BK=block,
        STAGES=in_flight,
        num_warps=4,
    )  # fmt: skip
    return dx


if triton is not None:

    @triton.jit
    def _add_norm(X, Y, TOTAL, W, OUT, ld, RSTD, E, eps, HAS_Y: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, BLOCK)
        inside = k < E
        x = tl.load(X + t * E + k, inside, 0.0).to(tl.float32)
        if HAS_Y:
            total = (x + tl.load(Y + t * E + k, inside, 0.0).to(tl.float32)).to(TOTAL.dtype.element_ty)
            tl.store(TOTAL + t * E + k, total, inside)
            x = total.to(tl.float32)
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / E + eps)
        w = tl.load(W + k, inside, 0.0).to(tl.float32)
        tl.store(OUT + t * ld + k, (x * rstd * w).to(OUT.dtype.element_ty), inside)
        tl.store(RSTD + t, rstd)

    @triton.jit
    def _norm_backward(
        G, ld, X, W, RSTD, Z, A, RESIDUAL, DX, T, E, seed, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr,
        BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        in_t = t < T
        j = tl.arange(0, RP)
        rstd = tl.load(RSTD + t, in_t, 1.0)
        products = tl.zeros((BM, BK), tl.float32)
        for k0 in tl.range(0, E, BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            inside = in_t[:, None] & (k < E)[None, :]
            g = tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32)
            w = tl.load(W + k, k < E, 0.0).to(tl.float32)
            products += g * w[None, :] * tl.load(X + t[:, None] * E + k[None, :], inside, 0.0).to(tl.float32)
        c = tl.sum(products, 1)
        if (
            R > 0
        ):  # the sum over k of (dZ A)_k w_k x_k is dZ . Z / rstd, with the dropped elements left out on both sides
            own = in_t[:, None] & (j < R)[None, :]
            dz = tl.load(G + t[:, None] * ld + E + j[None, :], own, 0.0)
            z = tl.load(Z + t[:, None] * R + j[None, :], own, 0.0).to(tl.float32)
            c += tl.sum(dz.to(tl.float32) * z, 1) / rstd
        c = c * rstd * rstd * rstd / E
        for k0 in tl.range(0, E, BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            inside = in_t[:, None] & (k < E)[None, :]
            at = t[:, None] * E + k[None, :]
            g = tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32)
            if R > 0:
                a = tl.load(A + j[:, None] * E + k[None, :], (j < R)[:, None] & (k < E)[None, :], 0.0)
                update = tl.dot(dz, a)
                if DROP:
                    update *= factor(at, seed, threshold, scale)
                g += update
            w = tl.load(W + k, k < E, 0.0).to(tl.float32)
            dx = g * w[None, :] * rstd[:, None] - tl.load(X + at, inside, 0.0).to(tl.float32) * c[:, None]
            if HAS_RESIDUAL:
                dx += tl.load(RESIDUAL + at, inside, 0.0).to(tl.float32)
            tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)
