"""The short convolution in front of a delta net or state space, which mixes tokens with those before them.

One pass each way over the stacked [query | key | value]: a sum over the last tokens of the same document, SiLU, and for
a delta net queries and keys of length one. The backward pass computes the sums again, from the few rows that it reads.
"""

from dataclasses import dataclass

from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, tl, triton

if triton is not None:
    from lit_qlora.kernels.activation import activate

TILE = 2048
"""Elements of a program; with four warps they are 16 a thread. The backward pass has twice as many, since the last rows
of a tile are computed twice."""


@dataclass(frozen=True)
class HeadConv:
    """A convolution of C = 2 K + V features: queries and keys of K features, and values of V.

    Attributes:
        taps: (W, C), the weights of each feature, that of the token itself last.
        bias: (C,), or None.
        keys: K. values: V.
        size: features of a head of queries and keys.
        scale: of queries.
        eps: heads of queries and keys are divided by sqrt(sum of squares + eps); None for no norm.
    """

    taps: Tensor
    bias: Tensor | None
    keys: int
    values: int
    size: int
    scale: float = 1.0
    eps: float | None = None


def convolve(x: Tensor, firsts: Tensor, conv: HeadConv) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, K), keys (T, K) and values (T, V).

    Args:
        x: (T, at least C), rows contiguous.
        firsts: (T,) int32, the first token of each token's document.
    """
    q, k, v = (x.new_empty(len(x), width) for width in (conv.keys, conv.keys, conv.values))
    settings = _settings(conv)
    tile = settings["BT"] = max(1, TILE // settings["DP"])
    _convolve[(cdiv(len(x), tile), _blocks(conv))](
        x, x.stride(0), conv.taps, conv.taps if conv.bias is None else conv.bias, firsts, q, k, v, len(x),
        conv.keys, conv.values, conv.scale, conv.eps or 0.0, **settings, num_warps=4,
    )  # fmt: skip
    return q, k, v


def convolve_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, x: Tensor, firsts: Tensor, conv: HeadConv, d_x: Tensor
) -> None:
    """Write the gradient of x into the first C columns of `d_x`.

    Args:
        dq, dk, dv: of what `convolve` returned, contiguous.
        d_x: (T, at least C), rows contiguous.
    """
    settings = _settings(conv)
    settings["BT"] = max(16, 2 * TILE // settings["DP"])
    _convolve_backward[(cdiv(len(x), settings["BT"] - len(conv.taps) + 1), _blocks(conv))](
        x, x.stride(0), conv.taps, conv.taps if conv.bias is None else conv.bias, firsts, dq, dk, dv, d_x,
        d_x.stride(0), len(x), conv.keys, conv.values, conv.scale, conv.eps or 0.0, **settings, num_warps=4,
    )  # fmt: skip


def _blocks(conv: HeadConv) -> int:
    """Programs of each few tokens: one for each head, and values in parts of that size."""
    return 2 * (conv.keys // conv.size) + cdiv(conv.values, conv.size)


def _settings(conv: HeadConv) -> dict[str, int]:
    return {
        "D": conv.size,
        "DP": power_of_2(conv.size),
        "W": len(conv.taps),
        "NORM": conv.eps is not None,
        "HAS_BIAS": conv.bias is not None,
    }


if triton is not None:
    NOWHERE = tl.constexpr(2**31 - 1)  # begins a document of no token

    @triton.jit
    def _sum_of_taps(
        X, ld, TAPS, BIAS, t, first, c, inside, features, W: tl.constexpr, HAS_BIAS: tl.constexpr
    ):  # fmt: skip
        """The convolution at tokens t of documents that begin at `first`."""
        total = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
        for i in tl.static_range(W):
            tap = tl.load(TAPS + (W - 1 - i) * features + c, inside, 0.0).to(tl.float32)
            seen = (t - i >= first)[:, None] & inside[None, :]
            total += tap[None, :] * tl.load(X + (t - i)[:, None] * ld + c[None, :], seen, 0.0).to(tl.float32)
        if HAS_BIAS:
            total += tl.load(BIAS + c, inside, 0.0).to(tl.float32)[None, :]
        return total

    @triton.jit(do_not_specialize=VARYING)
    def _convolve(
        X, ld, TAPS, BIAS, FIRSTS, Q, K, V, T, keys, values, scale, eps,
        D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
        BT: tl.constexpr,
    ):  # fmt: skip
        t, block = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1)
        d, features = tl.arange(0, DP), 2 * keys + values
        c = block * D + d
        inside = (d < D) & (c < features)
        first = tl.load(FIRSTS + t, t < T, NOWHERE)
        x = _sum_of_taps(X, ld, TAPS, BIAS, t, first, c, inside, features, W, HAS_BIAS)
        x, _ = activate(x, "silu")
        if NORM:
            x = tl.where(inside[None, :], x, 0.0)
            factor = 1.0 / tl.sqrt(tl.sum(x * x, 1) + eps)
            factor *= tl.where(block * D < keys, scale, 1.0)
            x = x * tl.where(block * D < 2 * keys, factor, 1.0)[:, None]
        out, width = Q, tl.where(block * D < 2 * keys, keys, values)
        if block * D >= keys:
            out = K
        if block * D >= 2 * keys:
            out = V
        start = tl.minimum(block * D // keys, 2) * keys
        own = (t < T)[:, None] & inside[None, :]
        tl.store(out + t[:, None] * width + (c - start)[None, :], x.to(Q.dtype.element_ty), own)

    @triton.jit(do_not_specialize=VARYING)
    def _convolve_backward(
        X, ld, TAPS, BIAS, FIRSTS, DQ, DK, DV, DX, ldd, T, keys, values, scale, eps,
        D: tl.constexpr, DP: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr, HAS_BIAS: tl.constexpr,
        BT: tl.constexpr,
    ):  # fmt: skip
        row, block = tl.arange(0, BT), tl.program_id(1)
        t = tl.program_id(0).to(tl.int64) * (BT - W + 1) + row  # gradients of the last W - 1 are for the next program
        d, features = tl.arange(0, DP), 2 * keys + values
        c = block * D + d
        inside = (d < D) & (c < features)
        gradient, width = DQ, tl.where(block * D < 2 * keys, keys, values)
        if block * D >= keys:
            gradient = DK
        if block * D >= 2 * keys:
            gradient = DV
        start = tl.minimum(block * D // keys, 2) * keys
        first = tl.load(FIRSTS + t, t < T, NOWHERE)
        own = (t < T)[:, None] & inside[None, :]
        x = _sum_of_taps(X, ld, TAPS, BIAS, t, first, c, inside, features, W, HAS_BIAS)
        x, slope = activate(x, "silu")
        g = tl.load(gradient + t[:, None] * width + (c - start)[None, :], own, 0.0).to(tl.float32)
        if NORM:
            x = tl.where(inside[None, :], x, 0.0)
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) + eps)
            shift = tl.sum(x * g, 1) * rstd * rstd
            factor = rstd * tl.where(block * D < keys, scale, 1.0)
            normed = (g - x * shift[:, None]) * factor[:, None]
            g = tl.where(block * D < 2 * keys, normed, g)
        g *= slope
        total = g * tl.load(TAPS + (W - 1) * features + c, inside, 0.0).to(tl.float32)[None, :]
        low = g.to(X.dtype.element_ty)
        for i in tl.static_range(1, W):  # token t is read by those behind it, whose rows a product with ones moves up
            moved = (row[None, :] == row[:, None] + i) & (first[None, :] <= t[:, None])
            tap = tl.load(TAPS + (W - 1 - i) * features + c, inside, 0.0).to(tl.float32)
            total += tap[None, :] * tl.dot(moved.to(low.dtype), low, input_precision="ieee")
        tl.store(DX + t[:, None] * ldd + c[None, :], total.to(DX.dtype.element_ty), own & (row <= BT - W)[:, None])
