"""The backward pass of down(activation(gate) * up) between the two products with frozen weights, in one read.

From dH = [dH_base | dZ] and [gate | up] come [d_gate | d_up], written over gate and up. The partial sums of
the gradients of down's A and of gate's and up's B need the same numbers, so they are computed here too. A program takes
a stripe of columns and a part of the rows. An MLP without a gate has one branch, which is activated.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import VARYING, cdiv, is_hopper, power_of_2, tiled, tl, triton
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
    own_z = branches if z is None else z
    by_tiles = _by_tiles(width, branches, dh, own_z)
    splits = min(SPLITS_OF_TILES if by_tiles else SPLITS, cdiv(rows, 64))
    each = cdiv(cdiv(rows, splits), 64) * 64
    splits = cdiv(rows, each)
    device = branches.device
    parts_a = torch.empty(splits, rank, width, device=device, dtype=torch.float32)
    adapted = 0 if z is None else stack.adapted_rows
    parts_b = torch.empty(splits, adapted, r, device=device, dtype=torch.float32)
    slot_first, slot_up = (*stack.slots, -1)[:2] if z is not None else (-1, -1)
    bt, bn, in_flight = TILES if by_tiles else BLOCKS[max(power_of_2(rank), power_of_2(r))]
    sources = branches, dh, dh, own_z
    if by_tiles:
        columns = bn, bn, power_of_2(rank), power_of_2(r)
        sources = tuple(tiled(x, bt, n) for x, n in zip(sources, columns, strict=True))
    _backward[(cdiv(width, bn), splits)](
        sources[0], branches.stride(0), sources[1], sources[2], dh.stride(0), branches if a is None else a,
        sources[3], own_z.stride(0), parts_a, parts_b, rows, width, each, adapted,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), r=r, rP=power_of_2(r), FIRST=slot_first, UP=slot_up,
        FUNCTION=activation.function, GATED=activation.gated, DROP=dropout.p > 0, WRITES_H=writes_h, TILED=by_tiles,
        BT=bt, BN=bn, STAGES=in_flight, num_warps=4,
    )  # fmt: skip
    if grad_a is not None:
        pending.add(parts_a, grad_a, scale)
    if grad_b is not None:
        pending.add(parts_b, grad_b, 1.0)


BLOCKS = {16: (16, 128, 2), 32: (32, 64, 2), 64: (32, 64, 3)}
"""Rows, columns and iterations in flight for each padded rank: the fastest of 15 choices on an H100, no dropout."""
SPLITS = 4
"""Parts of the rows, at most, that are summed apart."""
TILES, SPLITS_OF_TILES = (32, 64, 3), 6
"""The same by tiles: of 19 choices on an H200 the fastest for one of four widths, and within 6 % of it for three."""


def _by_tiles(width: int, *sources: Tensor) -> bool:
    """Tell whether Hopper's engine reads and writes tiles: from 16 bytes to 16 bytes, and no tile of gate is up's."""
    even = not any(x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16 for x in sources)
    return even and width % TILES[1] == 0 and is_hopper(sources[0])


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
        X, ldx, DH, DZ, ldh, A, Z, ldz, PARTS_A, PARTS_B, T, F, each, adapted, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, r: tl.constexpr, rP: tl.constexpr, FIRST: tl.constexpr, UP: tl.constexpr,
        FUNCTION: tl.constexpr, GATED: tl.constexpr, DROP: tl.constexpr, WRITES_H: tl.constexpr, TILED: tl.constexpr,
        BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        """If TILED, X, DH, DZ (DH in other blocks), Z are tiles, and sums (BN, RP), as Hopper's matrix units want."""
        n0, split = tl.program_id(0) * BN, tl.program_id(1)
        n = n0 + tl.arange(0, BN)
        in_n = n < F
        i = tl.arange(0, RP)
        j = tl.arange(0, rP)
        dtype: tl.constexpr = A.dtype.element_ty
        if R > 0:
            a = tl.load(A + i[:, None] * F + n[None, :], (i < R)[:, None] & in_n[None, :], 0.0)
        sum_a = _zeros(RP, BN, TILED)
        sum_first = _zeros(rP, BN, TILED)
        sum_up = _zeros(rP, BN, TILED)
        end = min(T, (split + 1) * each)
        for t0 in tl.range(split * each, end, BT, num_stages=STAGES):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)
            in_t = t < end
            inside = in_t[:, None] & in_n[None, :]
            if TILED:
                dh, first = DH.load([t0, n0]).to(tl.float32), X.load([t0, n0]).to(tl.float32)
            else:
                at_h, at = DH + t[:, None] * ldh + n[None, :], X + t[:, None] * ldx + n[None, :]
                dh, first = tl.load(at_h, inside, 0.0).to(tl.float32), tl.load(at, inside, 0.0).to(tl.float32)
            if DROP:
                kept = factor(t[:, None] * F + n[None, :], SEED, offset, threshold, scale)
            if R > 0:
                dz = _columns(DZ, t0, t, in_t, ldh, F, i, R, TILED)
                update = tl.dot(dz, a)
                if DROP:
                    update *= kept
                dh += update
                if TILED:  # one layout for both, or Triton computes the activation a second time in another
                    dh, first = tl.split(tl.join(dh, first))
            h, slope = activate(first, FUNCTION)
            if GATED:
                up = X.load([t0, F + n0]) if TILED else tl.load(at + F, inside, 0.0)
                up = up.to(tl.float32)
                d_up = (dh * h).to(dtype)
                if TILED:
                    X.store([t0, F + n0], d_up)
                else:
                    tl.store(at + F, d_up, inside)
                dh *= up
                h *= up
            d_first = (dh * slope).to(dtype)
            if TILED:
                X.store([t0, n0], d_first)
            else:
                tl.store(at, d_first, inside)
            if DROP:
                h *= kept
            if WRITES_H:
                if TILED:
                    DH.store([t0, n0], h.to(dtype))
                else:
                    tl.store(at_h, h.to(dtype), inside)
            if R > 0:
                sum_a = _add_product(sum_a, h.to(dtype), dz, TILED)
            if FIRST >= 0:
                z = _columns(Z, t0, t, in_t, ldz, FIRST * r, j, r, TILED)
                sum_first = _add_product(sum_first, d_first, z, TILED)
            if UP >= 0:
                z = _columns(Z, t0, t, in_t, ldz, UP * r, j, r, TILED)
                sum_up = _add_product(sum_up, d_up, z, TILED)
        if R > 0:
            _store(PARTS_A + split.to(tl.int64) * R * F, sum_a, n, F, 1, i, R, F, TILED)
        base = PARTS_B + split.to(tl.int64) * adapted * r
        if FIRST >= 0:
            _store(base, sum_first, n, F, r, j, r, 1, TILED)
        if UP >= 0:
            row = F if FIRST >= 0 else 0
            _store(base + row * r, sum_up, n, F, r, j, r, 1, TILED)

    @triton.jit
    def _zeros(rank: tl.constexpr, columns: tl.constexpr, TALL: tl.constexpr):
        return tl.zeros((columns, rank) if TALL else (rank, columns), tl.float32)

    @triton.jit
    def _columns(Z, t0, t, in_t, ld, first, j, r: tl.constexpr, TILED: tl.constexpr):
        """Columns first + j of rows t of Z. From r on they are zero, or others in a tile; nothing of these is kept."""
        at, own = t[:, None] * ld + first + j[None, :], in_t[:, None] & (j < r)[None, :]
        return Z.load([t0, first]) if TILED else tl.load(Z + at, own, 0.0)

    @triton.jit
    def _add_product(total, x, z, TALL: tl.constexpr):
        """Add x^T z, or its transpose, to a total."""
        return tl.dot(tl.trans(x), z, total) if TALL else tl.dot(tl.trans(z), x, total)

    @triton.jit
    def _store(to, total, n, F, step_n, j, r: tl.constexpr, step_j, TALL: tl.constexpr):
        """Store the total of columns n and of the adapter's outputs j."""
        if TALL:
            tl.store(to + n[:, None] * step_n + j[None, :] * step_j, total, (n < F)[:, None] & (j < r)[None, :])
        else:
            tl.store(to + n[None, :] * step_n + j[:, None] * step_j, total, (n < F)[None, :] & (j < r)[:, None])
