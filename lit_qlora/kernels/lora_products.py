"""LoRA's low-rank products: Z = X A^T on the way in, the gradients of A and B and the rank-R update on the way back.

All of them are bound by reading a (T, K) tensor once. The sums over K or T are split over programs and added in a fixed
order, so results are the same on every run.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import PIPELINE, VARYING, cdiv, fitting, power_of_2, shared_memory, stages, tl, triton
from lit_qlora.kernels.norm import Norm
from lit_qlora.kernels.stack import Stack

if triton is not None:
    from lit_qlora.kernels.activation import activate
    from lit_qlora.kernels.dropout import factor

NO_NORM = Norm("none")
MOST_RANK = 32
"""Rank of an adapter up to which these kernels are used: a program holds a row of Z, or a stripe of the gradients, in
registers. At 64 they still can, but cuBLAS takes 3 % less of a step on an H200."""
LEAST_STRIPE = 16
"""Columns of dY that a program sums over, at least."""


def project(
    x: Tensor,
    a: Tensor,
    out: Tensor,
    activation: Activation | None = None,
    copy: bool = False,
    dropout: Dropout = NONE,
) -> Tensor:
    """Z = dropout(X) A^T, written behind the first K columns of `out` and returned on its own.

    Args:
        x: (T, K), rows contiguous; with a gated `activation` (T, 2 K), gate and up.
        a: (R, K), stacked and scaled A.
        out: (T, K + R), rows contiguous. Its first K columns are X already, unless:
        activation: X is what it makes of x, and is written there.
        copy: x is copied there.

    Returns:
        (T, R), contiguous, in the dtype of x.
    """
    rows, (rank, k) = x.size(0), a.shape
    active = activation is not None
    if copy:
        # Not by the kernel: Triton 3.6 on an H100 lets the store of what was loaded overwrite rows that the product
        # still reads, from 64 columns of Z on. tests/gpu/test_lora_products_gpu.py found it.
        copy_rows(x, out[:, :k])
        x = out
    size, room = (64 + power_of_2(rank)) * x.element_size(), shared_memory(x)
    block, bm = fitting(128, size, room), 32 if active else 64
    splits = min(16, max(2, cdiv(256, cdiv(rows, bm))))  # enough programs to fill a GPU
    each = cdiv(cdiv(k, splits), block) * block
    splits = cdiv(k, each)
    parts = torch.empty(splits, rows, rank, device=x.device, dtype=torch.float32)
    _project[(cdiv(rows, bm), splits)](
        x, x.stride(0), out, out.stride(0), a, parts, rows, k, each,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), FUNCTION=activation.function if activation else "",
        GATED=activation is not None and activation.gated, DROP=dropout.p > 0, BM=bm, BK=block,
        num_warps=4, num_stages=stages(size * block, 3, min(room, PIPELINE)),
    )  # fmt: skip
    z = torch.empty(rows, rank, device=x.device, dtype=x.dtype)
    _finish[(cdiv(rows * rank, 512),)](
        parts, out[:, k:], out.stride(0), z, rows * rank, SPLITS=splits, R=rank, BLOCK=512, num_warps=4
    )
    return z


def copy_rows(x: Tensor, out: Tensor) -> None:
    """Write x (T, K) into `out`, rows of both contiguous.

    As words of 8 bytes where the rows allow it: PyTorch copies rows that do not touch number by number, which takes an
    H100 1.65 times as long.
    """
    per_word = 8 // x.element_size()
    elements = (x.size(1), x.stride(0), x.storage_offset(), out.stride(0), out.storage_offset())
    if x.dtype == out.dtype and not any(count % per_word for count in elements):
        x, out = x.view(torch.int64), out.view(torch.int64)
    out.copy_(x)


def copy_scaled(x: Tensor, scale: float, out: Tensor) -> None:
    """Write scale * x into `out`, of as many elements and any dtype; both contiguous.

    torch.mul does not read several numbers at a time where dtypes differ: an H200 copies 2.4 TB/s so.
    """
    _copy_scaled[(cdiv(x.numel(), 2048),)](x, out, x.numel(), scale, BLOCK=2048, num_warps=4)


def scale_rows(x: Tensor, factors: Tensor) -> Tensor:
    """A copy of x (T, R), rows contiguous, times a float32 factor of each row (T,), in the dtype of x."""
    out = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    _scale_rows[(cdiv(x.numel(), 1024),)](x, x.stride(0), factors, out, x.numel(), R=x.size(1), BLOCK=1024, num_warps=4)
    return out


def rank_update(d_out: Tensor, a: Tensor | None, k: int, dropout: Dropout = NONE) -> Tensor:
    """The sum dX + dropout'(dZ A) for d_out = [dX | dZ], (T, K + R); returns (T, K)."""
    if a is None:
        return d_out
    rows, rank = d_out.size(0), a.size(0)
    out = torch.empty(rows, k, device=d_out.device, dtype=d_out.dtype)
    block = fitting(128, power_of_2(rank) * a.element_size(), shared_memory(d_out))
    _rank_update[(cdiv(k, block), cdiv(rows, 16))](
        d_out, d_out.stride(0), a, out, rows, k, dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), DROP=dropout.p > 0, BM=16, BN=block, num_warps=4,
    )  # fmt: skip
    return out


class Pending:
    """Sums over the parts of a split reduction that are still to be added to gradients; two share a launch."""

    def __init__(self) -> None:
        self.waiting: list[tuple[Tensor, Tensor, float]] = []

    def add(self, parts: Tensor, gradient: Tensor, scale: float) -> None:
        """Add scale * sum of parts (S, ...) to `gradient`, now or with the next one."""
        self.waiting.append((parts, gradient, scale))
        if len(self.waiting) == 2:
            self.flush()

    def flush(self) -> None:
        """Add what is waiting."""
        if not self.waiting:
            return
        (p, g, s), (q, h, t) = self.waiting[0], self.waiting[-1]
        first, second = cdiv(g.numel(), 1024), cdiv(h.numel(), 1024) if len(self.waiting) == 2 else 0
        _reduce[(first + second,)](
            p, g, p.size(0), g.numel(), s, first, q, h, q.size(0), h.numel(), t, BLOCK=1024, num_warps=4
        )
        self.waiting.clear()


def grad_a(
    x: Tensor,
    dz: Tensor,
    gradient: Tensor,
    scale: float,
    pending: Pending,
    norm: Norm = NO_NORM,
    statistics: Tensor | None = None,
    dropout: Dropout = NONE,
) -> None:
    """Add scale * dZ^T dropout(X) to the stacked gradient of A, (R, K) float32.

    With `norm` and the `statistics` of the rows, X is norm(x), which is not saved: of an RMSNorm the rows' sizes go to
    dZ and the weight to the sum; of a layer norm it is formed again.
    """
    rows, (rank, k) = x.size(0), gradient.shape
    wide = k > 4096 and rank <= 128  # a program holds a stripe of the sum
    bn = 128 if wide else 64
    bt, in_flight = _rows_at_once(bn + power_of_2(rank), x)
    splits, each = _split(rows, cdiv(k, bn))
    parts = torch.empty(splits, rank, k, device=x.device, dtype=torch.float32)
    _transposed_product[(cdiv(k, bn), splits)](
        x, x.stride(0), dz, dz.stride(0), x if statistics is None else statistics,
        x if norm.weight is None else norm.weight, x if norm.bias is None else norm.bias, parts, 1, k, x,
        rows, each, k, k, dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), LAYERS=0, KIND=norm.statistics, HAS_W=norm.weight is not None,
        HAS_B=norm.bias is not None, DROP=dropout.p > 0, TALL=not wide, BT=bt, BN=bn,
        num_warps=4, num_stages=in_flight,
    )  # fmt: skip
    pending.add(parts, gradient, scale)


def grad_b(dy: Tensor, z: Tensor, gradient: Tensor, stack: Stack, table: Tensor, pending: Pending) -> None:
    """Add dY^T Z to the stacked gradient of B, (adapted rows, r) float32; each layer with its own columns of Z.

    Args:
        dy: (T, N), gradients of all layers of the stack, rows contiguous.
        z: (T, R).
        table: Stack.table, on the device.
    """
    rows, n = dy.shape
    adapted, r = gradient.shape
    wide = n > 4096
    bn = stripe(stack, 128 if wide else 64)
    bt, in_flight = _rows_at_once(bn + power_of_2(r), dy)
    splits, each = _split(rows, cdiv(n, bn))
    parts = torch.empty(splits, adapted, r, device=dy.device, dtype=torch.float32)
    _transposed_product[(cdiv(n, bn), splits)](
        dy, dy.stride(0), z, z.stride(0), dy, dy, dy, parts, r, 1, table, rows, each, n, adapted, None, 0, 0, 1.0,
        R=r, RP=power_of_2(r), LAYERS=len(stack.rows), KIND=0, HAS_W=False, HAS_B=False, DROP=False,
        TALL=bn >= 64 and not wide, BT=bt, BN=bn, num_warps=4, num_stages=in_flight,
    )  # fmt: skip
    pending.add(parts, gradient, 1.0)


def stripe(stack: Stack, most: int = 128) -> int:
    """Columns of dY a program sums over: no stripe may reach from one layer of the stack into the next."""
    return next(
        width for width in (128, 64, 32, LEAST_STRIPE) if width <= most and not any(rows % width for rows in stack.rows)
    )


def _rows_at_once(columns: int, x: Tensor) -> tuple[int, int]:
    """Rows of x that a sum over rows takes at a time, with `columns` of two matrices, and iterations in flight."""
    size, room = columns * x.element_size(), shared_memory(x)
    bt = fitting(64, size, room)
    return bt, stages(bt * size, 4, min(room, PIPELINE))


def _split(rows: int, stripes: int) -> tuple[int, int]:
    """Into how many parts a sum over `rows` is split, and the rows of each."""
    splits = min(8, max(1, round(300 / stripes)), cdiv(rows, 64))
    each = cdiv(cdiv(rows, splits), 64) * 64
    return cdiv(rows, each), each


if triton is not None:

    @triton.jit(do_not_specialize=VARYING)
    def _project(
        X, ldx, OUT, ldo, A, PARTS, T, K, each, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, FUNCTION: tl.constexpr, GATED: tl.constexpr,
        DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        split = tl.program_id(1)
        in_t = (t < T)[:, None]
        j = tl.arange(0, RP)
        acc = tl.zeros((BM, RP), tl.float32)
        end = min(K, (split + 1) * each)
        for k0 in range(split * each, end, BK):
            k = k0 + tl.arange(0, BK)
            inside = in_t & (k < end)[None, :]
            x = tl.load(X + t[:, None] * ldx + k[None, :], inside, 0.0)
            if FUNCTION != "":
                h, _ = activate(x.to(tl.float32), FUNCTION)
                if GATED:
                    h *= tl.load(X + t[:, None] * ldx + (K + k)[None, :], inside, 0.0).to(tl.float32)
                # A sum over one element, or Triton computes h a second time, in the layout that the product wants.
                h = tl.sum(h.reshape(BM, 1, BK), 1)
                x = h.to(OUT.dtype.element_ty)
                tl.store(OUT + t[:, None] * ldo + k[None, :], x, inside)
            if DROP:
                at = t[:, None] * K + k[None, :]
                x = (x.to(tl.float32) * factor(at, SEED, offset, threshold, scale)).to(x.dtype)
            a = tl.load(A + j[:, None] * K + k[None, :], (j < R)[:, None] & (k < end)[None, :], 0.0)
            acc = tl.dot(x, tl.trans(a), acc)
        tl.store(PARTS + (split.to(tl.int64) * T + t)[:, None] * R + j[None, :], acc, in_t & (j < R)[None, :])

    @triton.jit(do_not_specialize=["scale"])
    def _copy_scaled(X, OUT, n, scale, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + i, i < n, 0.0) * scale
        tl.store(OUT + i, x.to(OUT.dtype.element_ty), i < n)

    @triton.jit(do_not_specialize=["n"])
    def _scale_rows(X, ld, FACTORS, OUT, n, R: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside, t = i < n, i // R
        x = tl.load(X + t * ld + (i - t * R), inside, 0.0).to(tl.float32) * tl.load(FACTORS + t, inside, 0.0)
        tl.store(OUT + i, x.to(OUT.dtype.element_ty), inside)

    @triton.jit
    def _finish(PARTS, OUT, ld, Z, n, SPLITS: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < n
        total = tl.zeros((BLOCK,), tl.float32)
        for split in tl.static_range(SPLITS):
            total += tl.load(PARTS + split * n + i, inside, 0.0)
        z = total.to(Z.dtype.element_ty)
        t = (i // R).to(tl.int64)
        tl.store(Z + i, z, inside)
        tl.store(OUT + t * ld + (i - t * R), z, inside)

    @triton.jit(do_not_specialize=VARYING)
    def _rank_update(
        G, ld, A, OUT, T, K, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, DROP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
        k = tl.program_id(0) * BN + tl.arange(0, BN)
        j = tl.arange(0, RP)
        inside = (t < T)[:, None] & (k < K)[None, :]
        at = t[:, None] * K + k[None, :]
        dz = tl.load(G + t[:, None] * ld + K + j[None, :], (t < T)[:, None] & (j < R)[None, :], 0.0)
        a = tl.load(A + j[:, None] * K + k[None, :], (j < R)[:, None] & (k < K)[None, :], 0.0)
        update = tl.dot(dz, a)
        if DROP:
            update *= factor(at, SEED, offset, threshold, scale)
        g = tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32)
        tl.store(OUT + at, (g + update).to(OUT.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _transposed_product(
        P, ldp, Q, ldq, STATISTICS, W, B, PARTS, step_n, step_j, TABLE, T, each, N, rows_out,
        SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, LAYERS: tl.constexpr, KIND: tl.constexpr, HAS_W: tl.constexpr,
        HAS_B: tl.constexpr, DROP: tl.constexpr, TALL: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        """For each column n of P: the sum over t of P[t, n] Q[t, j], a split of the rows t a program.

        TALL keeps the accumulator (BN, RP), else (RP, BN): which of the two the matrix units like better depends on BN.
        """
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        split = tl.program_id(1)
        in_n = n < N
        j = tl.arange(0, RP)
        slot = tl.zeros((BN,), tl.int32)
        row = n
        if LAYERS > 0:
            layer = tl.zeros((BN,), tl.int32)
            for i in tl.static_range(1, LAYERS):
                layer += (n >= tl.load(TABLE + 3 * i)).to(tl.int32)
            slot = tl.load(TABLE + 3 * layer + 1)
            row = n - tl.load(TABLE + 3 * layer) + tl.load(TABLE + 3 * layer + 2)
        end = min(T, (split + 1) * each)
        one = tl.max(slot, 0)  # a stripe lies within one layer
        if TALL:  # noqa: SIM108 - the two have different shapes, so only one may be compiled
            acc = tl.zeros((BN, RP), tl.float32)
        else:
            acc = tl.zeros((RP, BN), tl.float32)
        if one >= 0:
            for t0 in range(split * each, end, BT):
                t = (t0 + tl.arange(0, BT)).to(tl.int64)
                in_t = t < end
                p = tl.load(P + t[:, None] * ldp + n[None, :], in_t[:, None] & in_n[None, :], 0.0)
                if KIND == 2:
                    mean = tl.load(STATISTICS + T + t, in_t, 0.0)
                    x = (p.to(tl.float32) - mean[:, None]) * tl.load(STATISTICS + t, in_t, 0.0)[:, None]
                    if HAS_W:
                        x = x * tl.load(W + n, in_n, 0.0).to(tl.float32)[None, :]
                    if HAS_B:
                        x = x + tl.load(B + n, in_n, 0.0).to(tl.float32)[None, :]
                    p = x.to(p.dtype)
                if DROP:
                    at = t[:, None] * N + n[None, :]
                    # Times the factor of what is kept, x may be too much for float16, so the sum is multiplied.
                    p = tl.where(factor(at, SEED, offset, threshold, scale) > 0, p, 0.0).to(p.dtype)
                q = tl.load(Q + t[:, None] * ldq + one * R + j[None, :], in_t[:, None] & (j < R)[None, :], 0.0)
                if KIND == 1:
                    q = (q.to(tl.float32) * tl.load(STATISTICS + t, in_t, 0.0)[:, None]).to(Q.dtype.element_ty)
                if TALL:  # noqa: SIM108
                    acc = tl.dot(tl.trans(p), q, acc)
                else:
                    acc = tl.dot(tl.trans(q), p, acc)
        if DROP:
            acc = acc * scale
        base = PARTS + split.to(tl.int64) * rows_out * R
        mine = in_n & (slot >= 0)
        if TALL:
            if KIND == 1:
                acc = acc * tl.load(W + n, in_n, 0.0).to(tl.float32)[:, None]
            tl.store(base + row[:, None] * step_n + j[None, :] * step_j, acc, mine[:, None] & (j < R)[None, :])
        else:
            if KIND == 1:
                acc = acc * tl.load(W + n, in_n, 0.0).to(tl.float32)[None, :]
            tl.store(base + row[None, :] * step_n + j[:, None] * step_j, acc, mine[None, :] & (j < R)[:, None])

    @triton.jit
    def _reduce(P, G, splits_p, n_p, scale_p, programs_p, Q, H, splits_q, n_q, scale_q, BLOCK: tl.constexpr):
        pid = tl.program_id(0)
        total = tl.zeros((BLOCK,), tl.float32)
        if pid < programs_p:
            i = pid * BLOCK + tl.arange(0, BLOCK)
            inside = i < n_p
            for split in range(splits_p):
                total += tl.load(P + split * n_p + i, inside, 0.0)
            tl.store(G + i, tl.load(G + i, inside, 0.0) + scale_p * total, inside)
        else:
            i = (pid - programs_p) * BLOCK + tl.arange(0, BLOCK)
            inside = i < n_q
            for split in range(splits_q):
                total += tl.load(Q + split * n_q + i, inside, 0.0)
            tl.store(H + i, tl.load(H + i, inside, 0.0) + scale_q * total, inside)
