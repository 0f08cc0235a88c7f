"""A short convolution between two gates (LFM2): one pass each way over the stacked [entrance | exit | value]."""

from dataclasses import dataclass

from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, tl, triton

BT, BE = 8, 256
"""Tokens and features of a program."""


@dataclass(frozen=True)
class GatedConv:
    """exit * (convolution of entrance * value): taps (W, E), that of the token itself last; bias (E,) or None."""

    taps: Tensor
    bias: Tensor | None


def gated_conv(x: Tensor, firsts: Tensor, conv: GatedConv) -> Tensor:
    """The convolution between its gates, (T, E).

    Args:
        x: (T, 3 E), contiguous.
        firsts: (T,) int32, the first token of each token's document.
    """
    size, width = conv.taps.shape
    out = x.new_empty(len(x), width)
    _gated_conv[(cdiv(len(x), BT), cdiv(width, BE))](
        x, conv.taps, conv.taps if conv.bias is None else conv.bias, firsts, out, len(x), width,
        W=size, HAS_BIAS=conv.bias is not None, BT=BT, BE=BE, num_warps=4,
    )  # fmt: skip
    return out


def gated_conv_backward(d_out: Tensor, x: Tensor, firsts: Tensor, conv: GatedConv) -> Tensor:
    """The gradient of x; d_out is contiguous."""
    d_x, (size, width) = x.new_empty(x.shape), conv.taps.shape
    _gated_conv_backward[(cdiv(len(x), BT), cdiv(width, BE))](
        d_out, x, conv.taps, conv.taps if conv.bias is None else conv.bias, firsts, d_x, len(x), width,
        W=size, HAS_BIAS=conv.bias is not None, BT=BT, BE=BE, num_warps=4,
    )  # fmt: skip
    return d_x


if triton is not None:
    NOWHERE = tl.constexpr(2**31 - 1)  # begins a document of no token

    @triton.jit
    def _sum_of_taps(X, TAPS, BIAS, t, first, c, inside, E, W: tl.constexpr, HAS_BIAS: tl.constexpr):
        total = tl.zeros((t.shape[0], c.shape[0]), tl.float32)
        for i in tl.static_range(W):
            tap = tl.load(TAPS + (W - 1 - i) * E + c, inside, 0.0).to(tl.float32)
            at, seen = (t - i)[:, None] * 3 * E + c[None, :], (t - i >= first)[:, None] & inside[None, :]
            entrance, value = (tl.load(X + at, seen, 0.0), tl.load(X + 2 * E + at, seen, 0.0))
            total += tap[None, :] * entrance.to(tl.float32) * value.to(tl.float32)
        if HAS_BIAS:
            total += tl.load(BIAS + c, inside, 0.0).to(tl.float32)[None, :]
        return total

    @triton.jit(do_not_specialize=VARYING)
    def _gated_conv(
        X, TAPS, BIAS, FIRSTS, OUT, T, E,
        W: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    ):  # fmt: skip
        t, c = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
        inside, own = c < E, (t < T)[:, None] & (c < E)[None, :]
        first = tl.load(FIRSTS + t, t < T, NOWHERE)
        total = _sum_of_taps(X, TAPS, BIAS, t, first, c, inside, E, W, HAS_BIAS)
        leaves = tl.load(X + E + t[:, None] * 3 * E + c[None, :], own, 0.0).to(tl.float32)
        tl.store(OUT + t[:, None] * E + c[None, :], (leaves * total).to(OUT.dtype.element_ty), own)

    @triton.jit(do_not_specialize=VARYING)
    def _gated_conv_backward(
        DOUT, X, TAPS, BIAS, FIRSTS, DX, T, E,
        W: tl.constexpr, HAS_BIAS: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
    ):  # fmt: skip
        t, c = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1) * BE + tl.arange(0, BE)
        inside, own = c < E, (t < T)[:, None] & (c < E)[None, :]
        first = tl.load(FIRSTS + t, t < T, NOWHERE)
        total = _sum_of_taps(X, TAPS, BIAS, t, first, c, inside, E, W, HAS_BIAS)
        d_out = tl.load(DOUT + t[:, None] * E + c[None, :], own, 0.0).to(tl.float32)
        at = t[:, None] * 3 * E + c[None, :]
        tl.store(DX + E + at, (d_out * total).to(DX.dtype.element_ty), own)
        d = tl.zeros((BT, BE), tl.float32)
        for i in tl.static_range(W):  # token t is read by itself and by the W - 1 tokens behind it
            u = t + i
            reads = ((u < T) & (tl.load(FIRSTS + u, u < T, NOWHERE) <= t))[:, None] & inside[None, :]
            tap = tl.load(TAPS + (W - 1 - i) * E + c, inside, 0.0).to(tl.float32)
            g = tl.load(DOUT + u[:, None] * E + c[None, :], reads, 0.0).to(tl.float32)
            d += tap[None, :] * g * tl.load(X + E + u[:, None] * 3 * E + c[None, :], reads, 0.0).to(tl.float32)
        entrance = tl.load(X + at, own, 0.0).to(tl.float32)
        value = tl.load(X + 2 * E + at, own, 0.0).to(tl.float32)
        tl.store(DX + at, (d * value).to(DX.dtype.element_ty), own)
        tl.store(DX + 2 * E + at, (d * entrance).to(DX.dtype.element_ty), own)
