"""The backward pass of down(activation(gate) * up) between the two products with frozen weights, in one read.

From dH = [dH_base | dZ] and [gate | up] come [d_gate | d_up], written over gate and up. The partial sums of
the gradients of down's A and of gate's and up's B need the same numbers, so they are computed here too. A program takes
a stripe of columns and a part of the rows. An MLP without a gate has one branch, which is activated.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, tl, triton
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.stack import Stack

if triton is not None:
    from lit_qlora.kernels.activation import activate
    from lit_qlora.kernels.dropout import factor


def mlp_forward(branches: Tensor, out: Tensor, activation: Activation) -> None:
    """The activation of branches (T, 2 F), gate and up, or (T, F), into the first F columns of `out`."""
    rows, width = branches.size(0), branches.size(1) // activation.branches
    _forward[(rows, cdiv(width, 2048))](
        branches, branches.stride(0), out, out.stride(0), width,
        FUNCTION=activation.function, GATED=activation.gated, BLOCK=2048, num_warps=8,
    )  # fmt: skip


def mlp_backward(
    branches: Tensor,
    dh: Tensor,
    activation: Activation,
    a: Tensor | None,
    grad_a: Tensor | None,
    z: Tensor | None,
    grad_b: Tensor | None,
    stack: Stack,
    scale: float,
    pending: Pending,
    dropout: Dropout = NONE,
    writes_h: bool = False,
) -> None:
    """Turn the branches into their gradients, in place, and add to the gradients of the adapters.

    Args:
        branches: (T, 2 F) or (T, F), contiguous.
        dh: (T, F + R), gradients of h through down's base and of its Z.
        a, grad_a: down's scaled A (R, F), R at most 64, and its float32 gradient; None without an adapter.
        z, grad_b: Z of the branches (T, R'), and the float32 gradient of their stacked B; None without an adapter.
        stack: of the branches.
        scale: alpha / r, for grad_a.
        dropout: of the input of down's adapter.
        writes_h: write h, with elements dropped, over the first F columns of `dh`, for sums that are done elsewhere.
    """
    rows, width = branches.size(0), branches.size(1) // activation.branches
    rank = 0 if a is None else a.size(0)
    r = 0 if z is None else stack.r
    splits = min(SPLITS, cdiv(rows, 64))
    each = cdiv(cdiv(rows, splits), 64) * 64
    splits = cdiv(rows, each)
    device = branches.device
    parts_a = torch.empty(splits, rank, width, device=device, dtype=torch.float32)
    adapted = 0 if z is None else stack.adapted_rows
    parts_b = torch.empty(splits, adapted, r, device=device, dtype=torch.float32)
    slot_first, slot_up = (*stack.slots, -1)[:2] if z is not None else (-1, -1)
    bt, bn, in_flight = BLOCKS[max(power_of_2(rank), power_of_2(r))]
    _backward[(cdiv(width, bn), splits)](
        branches, branches.stride(0), dh, dh.stride(0), branches if a is None else a, branches if z is None else z,
        0 if z is None else z.size(1), parts_a, parts_b, rows, width, each, adapted,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), r=r, rP=power_of_2(r), FIRST=slot_first, UP=slot_up,
        FUNCTION=activation.function, GATED=activation.gated, DROP=dropout.p > 0, WRITES_H=writes_h, BT=bt, BN=bn,
        STAGES=in_flight, num_warps=4,
    )  # fmt: skip
    if grad_a is not None:
        pending.add(parts_a, grad_a, scale)
    if grad_b is not None:
        pending.add(parts_b, grad_b, 1.0)


BLOCKS = {16: (16, 128, 2), 32: (32, 64, 2), 64: (32, 64, 3)}
"""Rows, columns and iterations in flight for each padded rank: the fastest of 15 choices on an H100, no dropout."""
SPLITS = 4
"""Parts of the rows, at most, that are summed apart."""

if triton is not None:

    @triton.jit
    def _forward(X, ldx, H, ldh, F, FUNCTION: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < F
        h, _ = activate(tl.load(X + t * ldx + n, inside, 0.0).to(tl.float32), FUNCTION)
        if GATED:
            h *= tl.load(X + t * ldx + F + n, inside, 0.0).to(tl.float32)
        tl.store(H + t * ldh + n, h.to(H.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _backward(
        X, ldx, DH, ldh, A, Z, ldz, PARTS_A, PARTS_B, T, F, each, adapted, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, r: tl.constexpr, rP: tl.constexpr, FIRST: tl.constexpr, UP: tl.constexpr,
        FUNCTION: tl.constexpr, GATED: tl.constexpr, DROP: tl.constexpr, WRITES_H: tl.constexpr,
        BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        split = tl.program_id(1)
        in_n = n < F
        i = tl.arange(0, RP)
        j = tl.arange(0, rP)
        if R > 0:
            a = tl.load(A + i[:, None] * F + n[None, :], (i < R)[:, None] & in_n[None, :], 0.0)
        sum_a = tl.zeros((RP, BN), tl.float32)
        sum_first = tl.zeros((rP, BN), tl.float32)
        sum_up = tl.zeros((rP, BN), tl.float32)
        end = min(T, (split + 1) * each)
        for t0 in tl.range(split * each, end, BT, num_stages=STAGES):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)
            in_t = t < end
            inside = in_t[:, None] & in_n[None, :]
            at_h = DH + t[:, None] * ldh + n[None, :]
            dh = tl.load(at_h, inside, 0.0).to(tl.float32)
            if DROP:
                kept = factor(t[:, None] * F + n[None, :], SEED, offset, threshold, scale)
            if R > 0:
                dz = tl.load(DH + t[:, None] * ldh + F + i[None, :], in_t[:, None] & (i < R)[None, :], 0.0)
                update = tl.dot(dz, a)
                if DROP:
                    update *= kept
                dh += update
            at = X + t[:, None] * ldx + n[None, :]
            h, slope = activate(tl.load(at, inside, 0.0).to(tl.float32), FUNCTION)
            if GATED:
                up = tl.load(at + F, inside, 0.0).to(tl.float32)
                d_up = (dh * h).to(X.dtype.element_ty)
                tl.store(at + F, d_up, inside)
                dh *= up
                h *= up
            d_first = (dh * slope).to(X.dtype.element_ty)
            tl.store(at, d_first, inside)
            if DROP:
                h *= kept
            if WRITES_H:
                tl.store(at_h, h.to(DH.dtype.element_ty), inside)
            if R > 0:
                sum_a = tl.dot(tl.trans(dz), h.to(X.dtype.element_ty), sum_a)
            if r > 0:
                own = in_t[:, None] & (j < r)[None, :]
                if FIRST >= 0:
                    z = tl.load(Z + t[:, None] * ldz + FIRST * r + j[None, :], own, 0.0)
                    sum_first = tl.dot(tl.trans(z), d_first, sum_first)
                if UP >= 0:
                    z = tl.load(Z + t[:, None] * ldz + UP * r + j[None, :], own, 0.0)
                    sum_up = tl.dot(tl.trans(z), d_up, sum_up)
        if R > 0:
            to = (split.to(tl.int64) * R + i)[:, None] * F + n[None, :]
            tl.store(PARTS_A + to, sum_a, (i < R)[:, None] & in_n[None, :])
        if r > 0:
            own = (j < r)[:, None] & in_n[None, :]
            base = PARTS_B + split.to(tl.int64) * adapted * r
            if FIRST >= 0:
                tl.store(base + n[None, :] * r + j[:, None], sum_first, own)
            if UP >= 0:
                first = F if FIRST >= 0 else 0
                tl.store(base + (first + n)[None, :] * r + j[:, None], sum_up, own)
