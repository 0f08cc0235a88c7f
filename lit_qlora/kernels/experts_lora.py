"""LoRA's low-rank products with experts: Z = X A^T of each choice, and the gradients of A and B, sums over rows.

Each choice meets the A or B of its expert. Sums over rows are split into chunks only for experts with many rows, so
programs have about as much to do however unevenly tokens choose. The sums of the chunks are added in a fixed order, so
results are the same on every run.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.experts import Choices
from lit_qlora.kernels.launch import VARYING, cdiv, fitting, power_of_2, shared_memory, tl, triton

if triton is not None:
    from lit_qlora.kernels.dropout import factor

MOST_RANK = 64  # columns of Z that a program computes
FOLD = 4096  # elements of a gradient a program of `fold`


def rows_of(x: Tensor, choices: Choices, rows: slice, gathered: bool, dropout: Dropout) -> Tensor:
    """X of some choices, with elements dropped; for references."""
    own = x[choices.token[rows].long()] if gathered else x[rows]
    if not dropout.p:
        return own
    return own * factor_reference(choices.rows, x.size(1), dropout, x.device)[rows].to(x.dtype)


def project_reference(
    x: Tensor, a: Tensor, choices: Choices, gathered: bool = False, dropout: Dropout = NONE
) -> Tensor:
    """Project in plain torch."""
    _, parts, rank, k = a.shape
    z = x.new_empty(choices.rows, parts, rank)
    for e, rows in choices.each():
        own = rows_of(x, choices, rows, gathered, dropout).unflatten(1, (parts, k))
        z[rows] = torch.einsum("tpk,prk->tpr", own, a[e])
    return z.flatten(1)


def project(x: Tensor, a: Tensor, choices: Choices, gathered: bool = False, dropout: Dropout = NONE) -> Tensor:
    """Z = dropout(X) A^T of each choice with the A of its expert, (C, S R) in the dtype of x.

    Args:
        x: (C, S K), or (T, S K) if `gathered`, where a choice reads its token's row; rows contiguous.
        a: (n_expert, S, R, K), strides as they come: part s of x meets part s of A.
        dropout: of elements of (C, S K); only where S is 1.
    """
    _, parts, rank, k = a.shape
    z = torch.empty(choices.rows, parts * rank, dtype=x.dtype, device=x.device)
    block = min(power_of_2(rank), MOST_RANK)
    columns, bm = parts * cdiv(rank, block), min(choices.tile, BLOCKS_PROJECT[0])
    while bm > LEAST_ROWS and choices.most_tiles * cdiv(choices.tile, bm) * columns < FILLING:
        bm //= 2
    sub, bk = cdiv(choices.tile, bm), BLOCKS_PROJECT[1]
    if k >= LONG:
        bk = fitting(WIDE, 2 * (bm + block) * x.element_size(), shared_memory(x))
    _project[(choices.most_tiles * sub, columns)](
        x, x.stride(0), choices.token, a, *a.stride(), z, choices.ends, choices.tiles, choices.most_tiles, k,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        GATHERED=gathered, DROP=dropout.p > 0, PARTS=parts, R=rank, RB=block, SUB=sub, EVEN=k % bk == 0,
        BM=bm, BK=bk, num_warps=4, num_stages=3,
    )  # fmt: skip
    return z


def gradient_reference(
    x: Tensor,
    q: Tensor,
    gradient: Tensor,
    choices: Choices,
    scale: float = 1.0,
    gathered: bool = False,
    dropout: Dropout = NONE,
) -> None:
    """Add the gradient in plain torch."""
    for e, rows in choices.each():
        gradient[e] += scale * (rows_of(x, choices, rows, gathered, dropout).T @ q[rows]).to(gradient.dtype)


def add_gradient(
    x: Tensor,
    q: Tensor,
    gradient: Tensor,
    choices: Choices,
    scale: float = 1.0,
    gathered: bool = False,
    dropout: Dropout = NONE,
    folds: "Folds | None" = None,
) -> None:
    """Add scale * dropout(X)^T Q, the sum over the rows of each expert, to its gradient.

    Args:
        x: (C, N), or (T, N) if `gathered`; q: (C, R); rows of both contiguous.
        gradient: (n_expert, N, R) float32; its experts are dense pieces of memory of one size, in order or with gaps.
        dropout: of elements of (C, N).
        folds: adds up the sums of chunks later; None for at once.
    """
    _, n, rank = gradient.shape
    block, bn = min(power_of_2(rank), MOST_RANK), BLOCKS_GRADIENT[1]
    parts = torch.empty(choices.most_chunks, n * rank, dtype=torch.float32, device=x.device)
    dense = (rank, 1) if gradient.stride(2) == 1 else (1, n)
    assert gradient.stride()[1:] == dense, "the experts' gradients are dense"
    _gradient[(cdiv(n, bn), choices.most_chunks, cdiv(rank, block))](
        x, x.stride(0), choices.token, q, q.stride(0), gradient, *gradient.stride(), parts,
        choices.ends, choices.chunks, choices.most_chunks, choices.chunk, n, scale,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        GATHERED=gathered, DROP=dropout.p > 0, R=rank, RB=block, BT=BLOCKS_GRADIENT[0], BN=bn,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    if folds is None:
        fold([(parts, gradient)], choices)
    else:
        folds.add(parts, gradient)


class Folds:
    """Sums of chunks that are still to be added to gradients; two share a launch."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.waiting: list[tuple[Tensor, Tensor]] = []

    def add(self, parts: Tensor, gradient: Tensor) -> None:
        """Add what chunks have left, see `fold`, now or with the next one."""
        self.waiting.append((parts, gradient))
        if len(self.waiting) == 2:
            self.flush()

    def flush(self) -> None:
        """Add what is waiting."""
        fold(self.waiting, self.choices)
        self.waiting = []


def fold(sums: list[tuple[Tensor, Tensor]], choices: Choices) -> None:
    """Add what chunks have left to the gradients of the experts that have more than one chunk, in their order.

    Args:
        sums: up to two pairs of parts (chunks, elements) and a gradient (n_expert, ...), whose experts are dense and
            laid out as the parts.
    """
    if not sums:
        return
    (parts, gradient), (more, other) = sums[0], sums[-1]
    size, size_more = parts.size(1), more.size(1) if len(sums) == 2 else 0
    first = cdiv(size, FOLD)
    _fold[(first + cdiv(size_more, FOLD), choices.experts)](
        parts, gradient, gradient.stride(0), size, first, more, other, other.stride(0), size_more,
        choices.ends, choices.chunks, choices.most_chunks, choices.chunk, BLOCK=FOLD, num_warps=4,
    )  # fmt: skip


BLOCKS_PROJECT = (128, 64)
"""Rows of a program and columns of X at a time, for Z: the fastest on an H200."""
LONG, WIDE = 8192, 256
"""From so many columns on, a program takes more at a time: few programs have too few bytes on their way otherwise."""
LEAST_ROWS = 32
FILLING = 256
"""Programs that fill a GPU: where experts are few and wide, each takes fewer rows, but LEAST_ROWS."""
BLOCKS_GRADIENT = (64, 128)
"""Rows at a time and columns of a program, for gradients, on the same."""

if triton is not None:

    @triton.jit(do_not_specialize=["most_tiles", *VARYING])
    def _project(
        X, ldx, TOKEN, A, sa_e, sa_s, sa_r, sa_k, Z, ENDS, TILES, most_tiles, K, SEED, offset, threshold, scale,
        GATHERED: tl.constexpr, DROP: tl.constexpr, PARTS: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
        SUB: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        tile, part, j0 = tl.program_id(0) // SUB, tl.program_id(1) % PARTS, tl.program_id(1) // PARTS * RB
        if tile < tl.load(TILES + 2 * most_tiles):
            e = tl.load(TILES + tile)
            first = tl.load(TILES + most_tiles + tile) + tl.program_id(0) % SUB * BM
            row, end = first + tl.arange(0, BM), tl.load(ENDS + e + 1)
            safe = tl.minimum(row, end - 1)
            source = safe
            if GATHERED:
                source = tl.load(TOKEN + safe)
            k, j = tl.arange(0, BK), j0 + tl.arange(0, RB)
            in_j = j < R
            x_at = X + source.to(tl.int64)[:, None] * ldx + part * K + k[None, :]
            a_at = A + e.to(tl.int64) * sa_e + part * sa_s + j[:, None] * sa_r + k[None, :] * sa_k
            acc = tl.zeros((BM, RB), tl.float32)
            for k0 in range(0, tl.where(first < end, K, 0), BK):  # the last tile may have no rows for this program
                if EVEN:
                    x = tl.load(x_at + k0)
                    a = tl.load(a_at + k0 * sa_k, in_j[:, None], 0.0)
                else:
                    in_k = k0 + k < K
                    x = tl.load(x_at + k0, in_k[None, :], 0.0)
                    a = tl.load(a_at + k0 * sa_k, in_j[:, None] & in_k[None, :], 0.0)
                if DROP:
                    at = safe.to(tl.int64)[:, None] * K + (k0 + k)[None, :]
                    x = (x.to(tl.float32) * factor(at, SEED, offset, threshold, scale)).to(x.dtype)
                acc = tl.dot(x, tl.trans(a), acc)
            to = Z + row.to(tl.int64)[:, None] * (PARTS * R) + part * R + j[None, :]
            tl.store(to, acc.to(Z.dtype.element_ty), (row < end)[:, None] & in_j[None, :])

    @triton.jit(do_not_specialize=["most_chunks", "chunk", *VARYING])
    def _gradient(
        X, ldx, TOKEN, Q, ldq, G, sg_e, sg_n, sg_j, PARTS, ENDS, CHUNKS, most_chunks, chunk, N, alpha,
        SEED, offset, threshold, scale,
        GATHERED: tl.constexpr, DROP: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
        BT: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        c = tl.program_id(1)
        if c < tl.load(CHUNKS + 2 * most_chunks):
            e = tl.load(CHUNKS + c)
            first, last = tl.load(CHUNKS + most_chunks + c), tl.load(ENDS + e + 1)
            end = tl.minimum(first + chunk, last)
            n, j = tl.program_id(0) * BN + tl.arange(0, BN), tl.program_id(2) * RB + tl.arange(0, RB)
            in_n, in_j = n < N, j < R
            acc = tl.zeros((BN, RB), tl.float32)
            for t0 in range(first, end, BT):
                t = t0 + tl.arange(0, BT)
                source = tl.minimum(t, end - 1)
                if GATHERED:
                    source = tl.load(TOKEN + source)
                x = tl.load(X + source.to(tl.int64)[:, None] * ldx + n[None, :], in_n[None, :], 0.0)
                if DROP:
                    at = t.to(tl.int64)[:, None] * N + n[None, :]
                    x = (x.to(tl.float32) * factor(at, SEED, offset, threshold, scale)).to(x.dtype)
                q = tl.load(Q + t.to(tl.int64)[:, None] * ldq + j[None, :], (t < end)[:, None] & in_j[None, :], 0.0)
                acc = tl.dot(tl.trans(x), q, acc)
            inside = in_n[:, None] & in_j[None, :]
            at = n[:, None] * sg_n + j[None, :] * sg_j
            if last - tl.load(ENDS + e) <= chunk:
                to = G + e.to(tl.int64) * sg_e + at
                tl.store(to, tl.load(to, inside, 0.0) + alpha * acc, inside)
            else:
                tl.store(PARTS + c.to(tl.int64) * (N * R) + at, alpha * acc, inside)

    @triton.jit(do_not_specialize=["most_chunks", "chunk"])
    def _fold(
        P, G, sg, size, programs, Q, H, sh, size_more, ENDS, CHUNKS, most_chunks, chunk, BLOCK: tl.constexpr
    ):  # fmt: skip
        pid, e = tl.program_id(0), tl.program_id(1)
        rows = tl.load(ENDS + e + 1) - tl.load(ENDS + e)
        if rows > chunk:
            first = tl.load(CHUNKS + 2 * most_chunks + 1 + e)
            chunks = tl.cdiv(rows, chunk)
            total = tl.zeros((BLOCK,), tl.float32)
            if pid < programs:
                i = pid * BLOCK + tl.arange(0, BLOCK)
                for c in range(chunks):
                    total += tl.load(P + (first + c).to(tl.int64) * size + i, i < size, 0.0)
                to = G + e.to(tl.int64) * sg + i
                tl.store(to, tl.load(to, i < size, 0.0) + total, i < size)
            else:
                i = (pid - programs) * BLOCK + tl.arange(0, BLOCK)
                for c in range(chunks):
                    total += tl.load(Q + (first + c).to(tl.int64) * size_more + i, i < size_more, 0.0)
                to = H + e.to(tl.int64) * sh + i
                tl.store(to, tl.load(to, i < size_more, 0.0) + total, i < size_more)
