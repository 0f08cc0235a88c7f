"""Products of each choice's row with the frozen weights of its expert, LoRA's and the activation in the same tile.

A program computes a tile of rows of one expert. The low-rank part is one more product of a few columns at its end. So
one dequantised weight serves the forward and the backward pass, and weights in 16 bit need no copy. The weight of a
choice goes into h, the activation's output: down is linear, so the sum over a token's choices becomes a plain one.
Nobody saves the output of down. Where the weight multiplies what an expert reads, `before`, it goes into gate and up,
which are linear too: their products are those of the token as it is.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.experts import Choices
from lit_qlora.kernels.launch import (
    VARYING,
    cdiv,
    fitting,
    is_hopper,
    power_of_2,
    shared_memory,
    stages,
    tiled,
    tl,
    triton,
)

if triton is not None:
    from lit_qlora.kernels.activation import combine_weighted
    from lit_qlora.kernels.dropout import factor

BK = 64  # of the summed dimension, at a time
GROUP = 8  # tiles of rows whose programs run side by side over the same columns, where an expert is large
LARGE = 2**26  # bytes of an expert's matrix, about the L2 cache of an H200
MOST_RANK = 64  # columns of Z at a time


@dataclass(frozen=True)
class LowRank:
    """The part of a product that adapters add: Z B of each row, with the B of its expert.

    Attributes:
        z: (C, R), rows contiguous.
        b: (n_expert, R, N), strides as they come.
        dropout: what the update is multiplied by, element by element of (C, N), where it is a gradient of dropped X.
    """

    z: Tensor
    b: Tensor
    dropout: Dropout = NONE


def activate_reference(branches: Tensor, function: str) -> Tensor:
    """Gate and up side by side, (C, 2 F), as kernels.activation.combine_branches combines them."""
    gate, up = branches.chunk(2, dim=1)
    if function == "clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * torch.sigmoid(1.702 * gate) * (up + 1)
    if function == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if function == "gelu_tanh" else "none") * up


def weigh_reference(branches: Tensor, weight: Tensor, function: str, before: bool) -> Tensor:
    """Gate and up side by side, (C, 2 F), and the weights (C, 1), as kernels.activation.combine_weighted does it."""
    return (
        activate_reference(weight * branches, function) if before else weight * activate_reference(branches, function)
    )


def gate_up_reference(
    x: Tensor,
    weight: Tensor,
    choices: Choices,
    function: str,
    low_rank: tuple[LowRank | None, LowRank | None] = (None, None),
    bias: Tensor | None = None,
    wants_branches: bool = True,
    wants_h: bool = True,
    before: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute gate_up in plain torch."""
    width = weight.size(1) // 2
    branches = x.new_empty(choices.rows, 2 * width)
    for e, rows in choices.each():
        y = x[choices.token[rows].long()] @ weight[e].T
        for half, low in zip(y.split(width, dim=1), low_rank, strict=True):
            if low is not None:
                half += low.z[rows] @ low.b[e]
        branches[rows] = y if bias is None else y + bias[e]
    h = weigh_reference(branches, choices.weight[:, None].to(x.dtype), function, before)
    return branches if wants_branches else branches[:0], h if wants_h else h[:0]


def gate_up(
    x: Tensor,
    weight: Tensor,
    choices: Choices,
    function: str,
    low_rank: tuple[LowRank | None, LowRank | None] = (None, None),
    bias: Tensor | None = None,
    wants_branches: bool = True,
    wants_h: bool = True,
    before: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gate and up of each choice, (C, 2 F), and h = weight * function(gate, up), (C, F).

    Args:
        x: (T, K), rows contiguous; each choice reads its token's row.
        weight: (n_expert, 2 F, K), gate over up.
        function: see kernels.activation.combine_branches.
        low_rank: of gate and of up, without dropout; both of one rank.
        bias: (n_expert, 2 F).
        wants_branches, wants_h: what is not wanted is an empty tensor.
        before: h = function(weight * gate, weight * up).
    """
    experts, both, k = weight.shape
    width, rows = both // 2, choices.rows
    branches = x.new_empty(rows if wants_branches else 0, both)
    h = x.new_empty(rows if wants_h else 0, width)
    gate, up = low_rank
    some = gate or up
    rank = some.z.size(1) if some else 0
    z_gate, z_up = (x if low is None else low.z for low in low_rank)
    b_gate, b_up = (x.new_empty(0, 0, 0) if low is None else low.b for low in low_rank)
    bn, warps, most = BLOCKS_GATE_UP
    in_flight = stages((choices.tile + 2 * bn) * BK * x.element_size(), most, shared_memory(x))
    piece = fitting(MOST_RANK, 2 * (choices.tile + 2 * bn) * x.element_size(), shared_memory(x))
    group = group_of(weight)
    x, gathered = gather(x, choices, both)
    by_block = not gathered and not (x.stride(0) * x.element_size()) % 16
    _gate_up[(cdiv(choices.most_tiles, group) * group * cdiv(width, bn),)](
        tiled(x, choices.tile, BK) if by_block else x, x, x.stride(0), choices.token, choices.weight,
        tiled(weight.view(2 * experts, width, k), 2, bn, BK),
        z_gate, z_gate.stride(0), b_gate, *b_gate.stride(), z_up, z_up.stride(0), b_up, *b_up.stride(),
        x if bias is None else bias, branches, h, choices.ends, choices.tiles, choices.most_tiles, width, k,
        BY_BLOCK=by_block, GATHERED=gathered, R=rank, RB=min(power_of_2(rank), piece),
        GATE=gate is not None, UP=up is not None, HAS_BIAS=bias is not None, FUNCTION=function, EVEN=k % BK == 0,
        BRANCHES=wants_branches, WANTS_H=wants_h, BEFORE=before, BM=choices.tile, BN=bn, BK=BK, GROUP=group,
        num_warps=warps, num_stages=in_flight,
    )  # fmt: skip
    return branches, h


def gather(x: Tensor, choices: Choices, columns: int) -> tuple[Tensor, bool]:
    """Rows that a product is to take, and whether it has to gather them: (T, K) and True, or (C, K) and False.

    A Hopper's engine for tiles brings consecutive rows faster than threads gather them. To write them first takes 1 and
    2 % of the time of Mixtral's products, which gain 3 and 6 %, but 12 and 25 % of Qwen3-30B-A3B's.
    """
    if columns < MANY_COLUMNS or not is_hopper(x):
        return x, True
    return x.index_select(0, choices.token), False


def group_of(weight: Tensor) -> int:
    """Tiles that take a column of (n_expert, N, K) before they go on to the next.

    An expert of Mixtral has more weights than the cache holds. Tile by tile each would be read from memory again.
    """
    return GROUP if weight[0].nbytes > LARGE else 1


def product_reference(
    x: Tensor,
    weight: Tensor,
    choices: Choices,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    gathered: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Compute product in plain torch."""
    out = x.new_empty(choices.rows, weight.size(2 if transposed else 1))
    for e, rows in choices.each():
        own = x[choices.token[rows].long()] if gathered else x[rows]
        out[rows] = own @ (weight[e] if transposed else weight[e].T)
        if low_rank is not None:
            update = low_rank.z[rows] @ low_rank.b[e]
            if low_rank.dropout.p:
                update *= factor_reference(len(out), out.size(1), low_rank.dropout, x.device)[rows].to(x.dtype)
            out[rows] += update
        if bias is not None:
            out[rows] += choices.weight[rows, None].to(x.dtype) * bias[e]
    return out


def product(
    x: Tensor,
    weight: Tensor,
    choices: Choices,
    low_rank: LowRank | None = None,
    bias: Tensor | None = None,
    gathered: bool = False,
    transposed: bool = False,
) -> Tensor:
    """Y = X W^T + Z B of each choice, (C, N), with the weights of its expert; bias times the weight of the choice.

    Args:
        x: (C, K), or (T, K) if `gathered`, where a choice reads its token's row; rows contiguous.
        weight: (n_expert, N, K), or if `transposed` (n_expert, K, N) and X W.
        bias: (n_expert, N).
    """
    n, k = (weight.size(2), weight.size(1)) if transposed else (weight.size(1), weight.size(2))
    out = x.new_empty(choices.rows, n)
    z, b = (x, x.new_empty(0, 0, 0)) if low_rank is None else (low_rank.z, low_rank.b)
    dropout = NONE if low_rank is None else low_rank.dropout
    rank = 0 if low_rank is None else z.size(1)
    bn, warps, most = BLOCKS_DROPOUT if dropout.p else BLOCKS_PRODUCT
    in_flight = stages((choices.tile + bn) * BK * x.element_size(), most, shared_memory(x))
    if gathered:
        x, gathered = gather(x, choices, n)
    # TMA reads whole rows; those behind the end of an expert are read and not stored.
    by_block = not gathered and not (x.stride(0) * x.element_size()) % 16
    flat = weight.view(-1, weight.size(2))
    group = group_of(weight)
    _product[(cdiv(choices.most_tiles, group) * group * cdiv(n, bn),)](
        tiled(x, choices.tile, BK) if by_block else x, x, x.stride(0), choices.token,
        tiled(flat, BK, bn) if transposed else tiled(flat, bn, BK), z, z.stride(0), b, *b.stride(),
        x if bias is None else bias, choices.weight, out, choices.ends, choices.tiles, choices.most_tiles, n, k,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        BY_BLOCK=by_block, GATHERED=gathered, TRANSPOSED=transposed, R=rank, RB=min(power_of_2(rank), MOST_RANK),
        HAS_BIAS=bias is not None, DROP=dropout.p > 0, EVEN=k % BK == 0,
        BM=choices.tile, BN=bn, BK=BK, GROUP=group, num_warps=warps, num_stages=in_flight,
    )  # fmt: skip
    return out


BLOCKS_GATE_UP = (128, 8, 4)
"""Columns of gate and of up that a program computes, warps, and iterations in flight: the fastest on an H200."""
BLOCKS_PRODUCT = (256, 8, 4)
"""Columns, warps and iterations in flight of the other products, on the same."""
BLOCKS_DROPOUT = (128, 8, 4)
"""With dropout, whose sum takes registers besides: of 256 columns ptxas finds no allocation for a B200."""
MANY_COLUMNS = 8192
"""From so many columns of a product on, its rows are gathered before it; see gather."""

if triton is not None:

    @triton.jit
    def _tile_and_column(columns, BN: tl.constexpr, GROUP: tl.constexpr):
        """The tile of rows of this program, and its first column: all tiles of a group before the next column."""
        inside = tl.program_id(0) % (GROUP * columns)
        return tl.program_id(0) // (GROUP * columns) * GROUP + inside % GROUP, inside // GROUP * BN

    @triton.jit
    def _update(
        acc, Z, ldz, row, B, sb_r, sb_n, n, in_n, SEED, offset, threshold, scale, width,
        R: tl.constexpr, RB: tl.constexpr, DROP: tl.constexpr,
    ):  # fmt: skip
        """The sum acc + Z B of these rows and columns, in pieces of RB columns of Z; B is one expert's."""
        update = acc
        if DROP:
            update = tl.zeros_like(acc)
        for j0 in tl.static_range(0, R, RB):
            j = j0 + tl.arange(0, RB)
            z = tl.load(Z + row[:, None] * ldz + j[None, :], (j < R)[None, :], 0.0)
            b = tl.load(B + j[:, None] * sb_r + n[None, :] * sb_n, (j < R)[:, None] & in_n[None, :], 0.0)
            update = tl.dot(z, b, update)
        if DROP:
            at = row.to(tl.int64)[:, None] * width + n[None, :]
            update = acc + update * factor(at, SEED, offset, threshold, scale)
        return update

    @triton.jit
    def _update_both(
        both, Z_GATE, ldz_gate, B_GATE, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_r, bu_n, row, n, of_gate, in_n,
        R: tl.constexpr, RB: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
    ):  # fmt: skip
        """The sum of [gate | up] and [Z of gate | Z of up] times B of both, with zeros where they do not meet.

        One product into the same sums: with two into halves of them, ptxas had too few registers to let the loop's run.
        """
        i = tl.arange(0, 2 * RB)
        first = i < RB
        for j0 in tl.static_range(0, R, RB):
            j = j0 + i % RB
            some = (j < R) & tl.where(first, GATE, UP)
            z_at = Z_GATE + row[:, None] * ldz_gate + j[None, :]
            z_at = tl.where(first[None, :], z_at, Z_UP + row[:, None] * ldz_up + j[None, :])
            b_at = B_GATE + j[:, None] * bg_r + n[None, :] * bg_n
            b_at = tl.where(first[:, None], b_at, B_UP + j[:, None] * bu_r + n[None, :] * bu_n)
            meet = some[:, None] & in_n[None, :] & (first[:, None] == of_gate[None, :])
            both = tl.dot(tl.load(z_at, some[None, :], 0.0), tl.load(b_at, meet, 0.0), both)
        return both

    @triton.jit
    def _gate_up_tile(
        XB, X, ldx, TOKEN, WEIGHT, W, Z_GATE, ldz_gate, B_GATE, bg_e, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_e, bu_r, bu_n,
        BIAS, BRANCHES_TO, H, e, row0, end, n0, F, K,
        BY_BLOCK: tl.constexpr, GATHERED: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, GATE: tl.constexpr,
        UP: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr, EVEN: tl.constexpr,
        BRANCHES: tl.constexpr, WANTS_H: tl.constexpr, BEFORE: tl.constexpr, BM: tl.constexpr, FEW: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        """A tile of BM rows. FEW computes its transpose: a Hopper's matrix units take 64 rows or more, but 8 columns.

        See PTX ISA, wgmma.mma_async.
        """
        row = row0 + tl.arange(0, BM)
        safe = tl.minimum(row, end - 1)
        k = tl.arange(0, BK)
        source = safe
        if GATHERED:
            source = tl.load(TOKEN + safe)
        x_at = X + source.to(tl.int64)[:, None] * ldx + k[None, :]
        both = tl.zeros((2 * BN, BM) if FEW else (BM, 2 * BN), tl.float32)
        tl.assume(K > 0)  # or ptxas lets each instruction of the matrix units wait for the last, as zeros skip the loop
        for k0 in range(0, K, BK):  # a block of gate and the one of up beside it, in one product
            if BY_BLOCK:
                x = XB.load([row0, k0])
            elif EVEN:
                x = tl.load(x_at + k0)
            else:
                x = tl.load(x_at + k0, (k0 + k < K)[None, :], 0.0)
            w = W.load([2 * e, n0, k0]).reshape(2 * BN, BK)
            both = tl.dot(w, x.T, both) if FEW else tl.dot(x, w.T, both)
        if FEW:
            both = both.T
        far, c = e.to(tl.int64), tl.arange(0, 2 * BN)
        n = n0 + c % BN
        if GATE or UP:
            b_gate, b_up = B_GATE + far * bg_e, B_UP + far * bu_e
            both = _update_both(
                both, Z_GATE, ldz_gate, b_gate, bg_r, bg_n, Z_UP, ldz_up, b_up, bu_r, bu_n, safe, n, c < BN, n < F,
                R, RB, GATE, UP,
            )  # fmt: skip
        if HAS_BIAS:
            both += tl.load(BIAS + e * 2 * F + c // BN * F + n, n < F, 0.0).to(tl.float32)[None, :]
        # The backward pass will read them rounded, so h is made of the rounded ones.
        gate, up = both.to(X.dtype.element_ty).reshape(BM, 2, BN).permute(0, 2, 1).split()
        n = n0 + tl.arange(0, BN)
        in_n = n < F
        own = (row < end)[:, None] & in_n[None, :]
        if BRANCHES:
            to = BRANCHES_TO + row.to(tl.int64)[:, None] * (2 * F) + n[None, :]
            tl.store(to, gate, own)
            tl.store(to + F, up, own)
        if WANTS_H:
            weight = tl.load(WEIGHT + safe)[:, None]
            h, _, _, _ = combine_weighted(gate.to(tl.float32), up.to(tl.float32), weight, FUNCTION, BEFORE)
            tl.store(H + row.to(tl.int64)[:, None] * F + n[None, :], h.to(H.dtype.element_ty), own)

    @triton.jit(do_not_specialize=["most_tiles"])
    def _gate_up(
        XB, X, ldx, TOKEN, WEIGHT, W, Z_GATE, ldz_gate, B_GATE, bg_e, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_e, bu_r, bu_n,
        BIAS, BRANCHES_TO, H, ENDS, TILES, most_tiles, F, K,
        BY_BLOCK: tl.constexpr, GATHERED: tl.constexpr, R: tl.constexpr, RB: tl.constexpr, GATE: tl.constexpr,
        UP: tl.constexpr, HAS_BIAS: tl.constexpr, FUNCTION: tl.constexpr, EVEN: tl.constexpr,
        BRANCHES: tl.constexpr, WANTS_H: tl.constexpr, BEFORE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
        BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        tile, n0 = _tile_and_column(tl.cdiv(F, BN), BN, GROUP)
        if tile < tl.load(TILES + 2 * most_tiles):
            e, row0 = tl.load(TILES + tile), tl.load(TILES + most_tiles + tile)
            end = tl.load(ENDS + e + 1)
            if end - row0 <= BM // 4:  # few rows are left: a quarter or half of the work, see _product
                _gate_up_tile(
                    XB, X, ldx, TOKEN, WEIGHT, W, Z_GATE, ldz_gate, B_GATE, bg_e, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_e,
                    bu_r, bu_n, BIAS, BRANCHES_TO, H, e, row0, end, n0, F, K, False, GATHERED, R, RB, GATE, UP,
                    HAS_BIAS, FUNCTION, EVEN, BRANCHES, WANTS_H, BEFORE, BM // 4, True, BN, BK,
                )  # fmt: skip
            elif end - row0 <= BM // 2:
                _gate_up_tile(
                    XB, X, ldx, TOKEN, WEIGHT, W, Z_GATE, ldz_gate, B_GATE, bg_e, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_e,
                    bu_r, bu_n, BIAS, BRANCHES_TO, H, e, row0, end, n0, F, K, False, GATHERED, R, RB, GATE, UP,
                    HAS_BIAS, FUNCTION, EVEN, BRANCHES, WANTS_H, BEFORE, BM // 2, False, BN, BK,
                )  # fmt: skip
            else:
                _gate_up_tile(
                    XB, X, ldx, TOKEN, WEIGHT, W, Z_GATE, ldz_gate, B_GATE, bg_e, bg_r, bg_n, Z_UP, ldz_up, B_UP, bu_e,
                    bu_r, bu_n, BIAS, BRANCHES_TO, H, e, row0, end, n0, F, K, BY_BLOCK, GATHERED, R, RB, GATE, UP,
                    HAS_BIAS, FUNCTION, EVEN, BRANCHES, WANTS_H, BEFORE, BM, False, BN, BK,
                )  # fmt: skip

    @triton.jit
    def _product_tile(
        XB, X, ldx, TOKEN, W, Z, ldz, B, sb_e, sb_r, sb_n, BIAS, WEIGHT, OUT, e, row0, end, n0, N, K,
        SEED, offset, threshold, scale,
        BY_BLOCK: tl.constexpr, GATHERED: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
        HAS_BIAS: tl.constexpr, DROP: tl.constexpr, EVEN: tl.constexpr,
        BM: tl.constexpr, FEW: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    ):  # fmt: skip
        row = row0 + tl.arange(0, BM)
        safe = tl.minimum(row, end - 1)
        k = tl.arange(0, BK)
        source = safe
        if GATHERED:
            source = tl.load(TOKEN + safe)
        x_at = X + source.to(tl.int64)[:, None] * ldx + k[None, :]
        acc = tl.zeros((BN, BM) if FEW else (BM, BN), tl.float32)
        tl.assume(K > 0)  # see _gate_up_tile
        for k0 in range(0, K, BK):
            if BY_BLOCK:
                x = XB.load([row0, k0])
            elif EVEN:
                x = tl.load(x_at + k0)
            else:
                x = tl.load(x_at + k0, (k0 + k < K)[None, :], 0.0)
            # Rows of a transposed W behind the expert's last meet zeros of X.
            w = W.load([e * K + k0, n0]) if TRANSPOSED else W.load([e * N + n0, k0]).T
            acc = tl.dot(w.T, x.T, acc) if FEW else tl.dot(x, w, acc)
        if FEW:
            acc = acc.T
        n = n0 + tl.arange(0, BN)
        in_n = n < N
        if R > 0:
            b = B + e.to(tl.int64) * sb_e
            acc = _update(acc, Z, ldz, safe, b, sb_r, sb_n, n, in_n, SEED, offset, threshold, scale, N, R, RB, DROP)
        if HAS_BIAS:
            acc += tl.load(WEIGHT + safe)[:, None] * tl.load(BIAS + e * N + n, in_n, 0.0).to(tl.float32)[None, :]
        own = (row < end)[:, None] & in_n[None, :]
        tl.store(OUT + row.to(tl.int64)[:, None] * N + n[None, :], acc.to(OUT.dtype.element_ty), own)

    @triton.jit(do_not_specialize=["most_tiles", *VARYING])
    def _product(
        XB, X, ldx, TOKEN, W, Z, ldz, B, sb_e, sb_r, sb_n, BIAS, WEIGHT, OUT, ENDS, TILES, most_tiles, N, K,
        SEED, offset, threshold, scale,
        BY_BLOCK: tl.constexpr, GATHERED: tl.constexpr, TRANSPOSED: tl.constexpr, R: tl.constexpr, RB: tl.constexpr,
        HAS_BIAS: tl.constexpr, DROP: tl.constexpr, EVEN: tl.constexpr,
        BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
    ):  # fmt: skip
        tile, n0 = _tile_and_column(tl.cdiv(N, BN), BN, GROUP)
        if tile < tl.load(TILES + 2 * most_tiles):
            e, row0 = tl.load(TILES + tile), tl.load(TILES + most_tiles + tile)
            end = tl.load(ENDS + e + 1)
            # Where few rows are left: a quarter or half of the work, and no block of X that reaches beyond them.
            if end - row0 <= BM // 4:
                _product_tile(
                    XB, X, ldx, TOKEN, W, Z, ldz, B, sb_e, sb_r, sb_n, BIAS, WEIGHT, OUT, e, row0, end, n0, N, K,
                    SEED, offset, threshold, scale, False, GATHERED, TRANSPOSED, R, RB, HAS_BIAS, DROP, EVEN,
                    BM // 4, True, BN, BK,
                )  # fmt: skip
            elif end - row0 <= BM // 2:
                _product_tile(
                    XB, X, ldx, TOKEN, W, Z, ldz, B, sb_e, sb_r, sb_n, BIAS, WEIGHT, OUT, e, row0, end, n0, N, K,
                    SEED, offset, threshold, scale, False, GATHERED, TRANSPOSED, R, RB, HAS_BIAS, DROP, EVEN,
                    BM // 2, False, BN, BK,
                )  # fmt: skip
            else:
                _product_tile(
                    XB, X, ldx, TOKEN, W, Z, ldz, B, sb_e, sb_r, sb_n, BIAS, WEIGHT, OUT, e, row0, end, n0, N, K,
                    SEED, offset, threshold, scale, BY_BLOCK, GATHERED, TRANSPOSED, R, RB, HAS_BIAS, DROP, EVEN,
                    BM, False, BN, BK,
                )  # fmt: skip
