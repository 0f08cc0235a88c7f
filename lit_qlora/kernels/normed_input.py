"""The way back through an RMS norm and the A of the adapters that read what it gives, in two passes.

The first sums over the features of a row what the norm's gradient needs. The second gives the gradient of x and that of
A: a program takes a stripe of columns and a part of the rows. It reads its columns of A once, and each of x, the
gradient and the residual once for both results.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import PIPELINE, VARYING, cdiv, fitting, power_of_2, shared_memory, stages, tl, triton
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import Norm

if triton is not None:
    from lit_qlora.kernels.dropout import factor

STRIPE = 64
"""Columns that a program takes."""
PROGRAMS = 256
"""Of the second pass, about: two on each multiprocessor of an H200."""


def normed_input_backward(
    d_out: Tensor,
    x: Tensor,
    z: Tensor,
    a: Tensor,
    gradient: Tensor,
    scale: float,
    pending: Pending,
    norm: Norm,
    statistics: Tensor,
    residual: Tensor | None = None,
    dropout: Dropout = NONE,
) -> Tensor:
    """The gradient of x; adds scale * dZ^T dropout(N) to that of A, for N = norm(x).

    Args:
        d_out: [dN | dZ], (T, E + R), rows contiguous: gradients of N through the base, and of Z.
        x: (T, E), contiguous.
        z: (T, R), Z itself: its product with dZ is the adapters' part of a sum over N.
        a: (R, E), stacked and scaled A; gradient: (R, E) float32.
        norm: an RMS norm; statistics: of the rows, as add_norm returned them.
        residual: (T, E), what is added to the result.
        dropout: of the adapters' input.

    Returns:
        (T, E) in the dtype of x.
    """
    rows, (rank, width) = x.size(0), a.shape
    padded = power_of_2(rank)
    weight = x if norm.weight is None else norm.weight
    sums = torch.empty(rows, device=x.device, dtype=torch.float32)
    _row_sums[(rows,)](
        d_out, d_out.stride(0), x, weight, statistics, z, sums, width,
        R=rank, RP=padded, HAS_W=norm.weight is not None, BLOCK=power_of_2(width), num_warps=4,
    )  # fmt: skip
    size, room = (3 * STRIPE + padded) * x.element_size(), shared_memory(x)
    block = fitting(64, size, room)
    splits = min(cdiv(rows, block), max(1, round(PROGRAMS / cdiv(width, STRIPE))))
    each = cdiv(cdiv(rows, splits), block) * block
    splits = cdiv(rows, each)
    dx, parts = torch.empty_like(x), torch.empty(splits, rank, width, device=x.device, dtype=torch.float32)
    _gradients[(cdiv(width, STRIPE), splits)](
        d_out, d_out.stride(0), x, weight, statistics, a, x if residual is None else residual, sums, dx, parts,
        rows, each, width, dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=padded, HAS_W=norm.weight is not None, HAS_RESIDUAL=residual is not None, DROP=dropout.p > 0,
        BT=block, BN=STRIPE, STAGES=stages(size * block, 3, min(room, PIPELINE)), num_warps=8,
    )  # fmt: skip
    pending.add(parts, gradient, scale)
    return dx


if triton is not None:

    @triton.jit
    def _row_sums(
        G, ld, X, W, STATISTICS, Z, SUMS, E,
        R: tl.constexpr, RP: tl.constexpr, HAS_W: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        k, j = tl.arange(0, BLOCK), tl.arange(0, RP)
        g = tl.load(G + t * ld + k, k < E, 0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(W + k, k < E, 0.0).to(tl.float32)
        rstd = tl.load(STATISTICS + t)
        # The sum over k of (dZ A)_k w_k x_k is dZ . Z / rstd, the dropped elements left out on both sides.
        dz = tl.load(G + t * ld + E + j, j < R, 0.0).to(tl.float32)
        z = tl.load(Z + t * R + j, j < R, 0.0).to(tl.float32)
        total = tl.sum(g * tl.load(X + t * E + k, k < E, 0.0).to(tl.float32), 0) + tl.sum(dz * z, 0) / rstd
        tl.store(SUMS + t, total * rstd * rstd * rstd / E)

    @triton.jit(do_not_specialize=VARYING)
    def _gradients(
        G, ld, X, W, STATISTICS, A, RESIDUAL, SUMS, DX, PARTS, T, each, E, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, HAS_W: tl.constexpr, HAS_RESIDUAL: tl.constexpr, DROP: tl.constexpr,
        BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        k = tl.program_id(0) * BN + tl.arange(0, BN)
        split = tl.program_id(1)
        in_k = k < E
        j = tl.arange(0, RP)
        a = tl.load(A + j[:, None] * E + k[None, :], (j < R)[:, None] & in_k[None, :], 0.0)
        w = tl.full((BN,), 1.0, tl.float32)
        if HAS_W:
            w = tl.load(W + k, in_k, 0.0).to(tl.float32)
        total = tl.zeros((BN, RP), tl.float32)
        end = min(T, (split + 1) * each)
        for t0 in tl.range(split * each, end, BT, num_stages=STAGES):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)
            in_t = t < end
            inside = in_t[:, None] & in_k[None, :]
            at = t[:, None] * E + k[None, :]
            dz = tl.load(G + t[:, None] * ld + E + j[None, :], in_t[:, None] & (j < R)[None, :], 0.0)
            x = tl.load(X + at, inside, 0.0)
            rstd = tl.load(STATISTICS + t, in_t, 1.0)
            update = tl.dot(dz, a)
            read = x
            if DROP:
                kept = factor(at, SEED, offset, threshold, scale)
                update *= kept
                read = tl.where(kept > 0, x, 0.0).to(x.dtype)  # times the factor it may be too much for float16
            scaled = (dz.to(tl.float32) * rstd[:, None]).to(dz.dtype)
            total = tl.dot(tl.trans(read), scaled, total)
            g = (tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32) + update) * w[None, :]
            g = g * rstd[:, None] - x.to(tl.float32) * tl.load(SUMS + t, in_t, 0.0)[:, None]
            if HAS_RESIDUAL:
                g += tl.load(RESIDUAL + at, inside, 0.0).to(tl.float32)
            tl.store(DX + at, g.to(DX.dtype.element_ty), inside)
        to = PARTS + split.to(tl.int64) * R * E + k[:, None] + j[None, :] * E
        tl.store(to, total * (scale * w)[:, None], in_k[:, None] & (j < R)[None, :])
