"""An RMS norm of heads, or of groups of features, with a gate of SiLU behind it or before it: one pass each way.

The backward pass computes the statistics again from what it reads anyway, and writes the gates' gradient to its place
in a stack. RMSNorm: Zhang & Sennrich 2019.
"""

from dataclasses import dataclass

from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, tl, triton

if triton is not None:
    from lit_qlora.kernels.activation import activate

TILE = 2048
"""Elements of a program, unless a group has more; with four warps they are 16 a thread."""


@dataclass(frozen=True)
class GatedNorm:
    """norm(x) weight silu(z), or with `before` norm(x silu(z)) weight.

    Attributes:
        weight: (D,) if all groups share it, or (G D,).
        groups: G of D features each.
    """

    weight: Tensor
    eps: float
    groups: int
    before: bool = False


def gated_norm(x: Tensor, gates: Tensor, norm: GatedNorm) -> Tensor:
    """The norm with its gate, (T, G D).

    Args:
        x: (T, G D), contiguous; gates: (T, G D), rows contiguous.
    """
    out, rows = x.new_empty(x.shape), x.size(0) * norm.groups
    tile, settings = _settings(x, norm)
    _gated_norm[(cdiv(rows, tile),)](
        x, gates, gates.stride(0), norm.weight, out, len(x), norm.groups, norm.eps, **settings, num_warps=4
    )
    return out


def gated_norm_backward(d_out: Tensor, x: Tensor, gates: Tensor, norm: GatedNorm, d_gates: Tensor) -> Tensor:
    """The gradient of x, and into `d_gates` (T, G D), rows contiguous, that of the gates.

    d_out and x are contiguous.
    """
    d_x, rows = x.new_empty(x.shape), x.size(0) * norm.groups
    tile, settings = _settings(x, norm)
    _gated_norm_backward[(cdiv(rows, tile),)](
        d_out, x, gates, gates.stride(0), norm.weight, d_x, d_gates, d_gates.stride(0), len(x), norm.groups, norm.eps,
        **settings, num_warps=4,
    )  # fmt: skip
    return d_x


def _settings(x: Tensor, norm: GatedNorm) -> tuple[int, dict[str, int]]:
    size = x.size(1) // norm.groups
    padded = power_of_2(size)
    tile = max(1, TILE // padded)
    shared = norm.weight.numel() == size
    return tile, {"D": size, "DP": padded, "SHARED": shared, "BEFORE": norm.before, "BR": tile}


if triton is not None:

    @triton.jit(do_not_specialize=VARYING)
    def _gated_norm(
        X, Z, ld, WEIGHT, OUT, T, groups, eps,
        D: tl.constexpr, DP: tl.constexpr, SHARED: tl.constexpr, BEFORE: tl.constexpr, BR: tl.constexpr,
    ):  # fmt: skip
        row, d = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, DP)
        inside = (row < T.to(tl.int64) * groups)[:, None] & (d < D)[None, :]
        t, at = row // groups, row[:, None] * D + d[None, :]
        column = (row % groups)[:, None] * D + d[None, :]
        x = tl.load(X + at, inside, 0.0).to(tl.float32)
        share, _ = activate(tl.load(Z + t[:, None] * ld + column, inside, 0.0).to(tl.float32), "silu")
        if SHARED:
            column = tl.broadcast_to(d[None, :], (BR, DP))
        weight = tl.load(WEIGHT + column, inside, 0.0).to(tl.float32)
        if BEFORE:
            x = x * share
            share = 1.0
        rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
        tl.store(OUT + at, (x * rstd[:, None] * weight * share).to(OUT.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _gated_norm_backward(
        DOUT, X, Z, ld, WEIGHT, DX, DZ, ldd, T, groups, eps,
        D: tl.constexpr, DP: tl.constexpr, SHARED: tl.constexpr, BEFORE: tl.constexpr, BR: tl.constexpr,
    ):  # fmt: skip
        row, d = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR), tl.arange(0, DP)
        inside = (row < T.to(tl.int64) * groups)[:, None] & (d < D)[None, :]
        t, at = row // groups, row[:, None] * D + d[None, :]
        column = (row % groups)[:, None] * D + d[None, :]
        x = tl.load(X + at, inside, 0.0).to(tl.float32)
        g = tl.load(DOUT + at, inside, 0.0).to(tl.float32)
        share, slope = activate(tl.load(Z + t[:, None] * ld + column, inside, 0.0).to(tl.float32), "silu")
        to = DZ + t[:, None] * ldd + column
        if SHARED:
            column = tl.broadcast_to(d[None, :], (BR, DP))
        g *= tl.load(WEIGHT + column, inside, 0.0).to(tl.float32)
        normed = x * share if BEFORE else x
        rstd = 1.0 / tl.sqrt(tl.sum(normed * normed, 1) / D + eps)
        normed *= rstd[:, None]
        through = g if BEFORE else g * share
        through = (through - normed * (tl.sum(through * normed, 1) / D)[:, None]) * rstd[:, None]
        if BEFORE:
            dx, dz = through * share, through * x * slope
        else:
            dx, dz = through, g * normed * slope
        tl.store(DX + at, dx.to(DX.dtype.element_ty), inside)
        tl.store(to, dz.to(DZ.dtype.element_ty), inside)
