"""Weights and activations in FP8 (e4m3), each row with a scale of its own, for products at twice the rate of 16 bit.

e4m3 has three bits of mantissa and reaches from 2^-9 to 448 (Micikevicius et al. 2022). A row's scale is the power of
two that brings its largest magnitude into (224, 448], so that scaling itself rounds nothing. A row that holds a NaN or
an infinity has an infinite scale: whatever its elements are rounded to, every product with it shows that.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.dequantize import block_scales
from lit_qlora.kernels.launch import INTERPRETED, cdiv, power_of_2, tl, triton
from lit_qlora.kernels.stack import PER_STEP, EightBit, FourBit, Stack

if triton is not None:
    from lit_qlora.kernels.dequantize import block_scale

FP8 = torch.float8_e4m3fn
MULTIPLE = 16  # of it have to be what is summed over and the columns of the result; the fast path's layers are
LEAST = 1e-30  # magnitude of a row of zeros, which has to have a scale too

Weight = FourBit | EightBit | Tensor
"""The stacked weights of a group as they are stored; a tensor is (N, K), rows contiguous."""


def scales(largest: Tensor) -> Tensor:
    """The scales of rows whose largest magnitudes these are, float32 of the same shape."""
    most = largest.float().nan_to_num(nan=torch.inf, posinf=torch.inf).clamp(min=LEAST) * (1 / 448)
    return ((most.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)


def weight_scales(weight: Weight, stack: Stack) -> Tensor:
    """The scales of the rows of W, (N,) float32. Quantised weights have one of the largest magnitude in each block."""
    if isinstance(weight, FourBit):
        return scales(block_scales(weight, stack).view(stack.n, -1).abs().amax(1))
    if isinstance(weight, EightBit):
        return scales(weight.absmax)
    return scales(torch.linalg.vector_norm(weight, torch.inf, dim=1))


def quantize_weights(weight: Weight, scale: Tensor, out: Tensor, stack: Stack, table: Tensor) -> Tensor:
    """Write W / scale, in FP8, into `out`.

    Args:
        scale: (N,), see weight_scales.
        out: (N, K), of any strides: what a product takes as its second factor has to lie along what is summed over.
        table: stack.table, on the device.

    Returns:
        `out`.
    """
    n, k = out.shape
    kind, stored, absmax, nested = 16, weight, scale, None
    code: Tensor = scale  # what is not read
    if isinstance(weight, FourBit):
        kind, stored, absmax, code, nested = 4, weight.packed.view(n, k // 2), weight.absmax, weight.code, weight.nested
    elif isinstance(weight, EightBit):
        kind, stored, absmax = 8, weight.packed, weight.absmax
    assert isinstance(stored, Tensor)
    _weights[(cdiv(k, 64), cdiv(n, 128))](
        stored, stored.stride(0), absmax, code, *(nested or (code,) * 3), table, scale,
        out, out.stride(0), out.stride(1), n, k,
        KIND=kind, NESTED=nested is not None, PER_STEP=PER_STEP, LAYERS=len(stack.rows), BN=128,
        INTERPRETED=INTERPRETED, num_warps=4, enable_fp_fusion=False,  # rounded as where they are dequantised
    )  # fmt: skip
    return out


def quantize_rows(x: Tensor, k: int, columns: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """X in FP8, with the scales of its rows.

    Args:
        x: (T, at least K), rows contiguous; what lies behind column K is left out.
        columns: (K,) float32, what each column is multiplied by.

    Returns:
        (T, K) and (T, 1) float32, whose product is X.
    """
    rows = x.size(0)
    out = torch.empty(rows, k, dtype=FP8, device=x.device)
    scale = torch.empty(rows, 1, device=x.device)
    _rows[(rows,)](
        x, x.stride(0), scale if columns is None else columns, out, scale, k,
        HAS_COLUMNS=columns is not None, LEAST=LEAST, BLOCK=min(4096, power_of_2(k)), INTERPRETED=INTERPRETED,
        num_warps=8,
    )  # fmt: skip
    return out, scale


def scaled_product(
    x: tuple[Tensor, Tensor], w: tuple[Tensor, Tensor], dtype: torch.dtype, bias: Tensor | None = None
) -> Tensor:
    """X W^T + bias of matrices in FP8 and the scales of their rows, summed in float32; (T, N), contiguous."""
    return torch._scaled_mm(x[0], w[0].T, scale_a=x[1], scale_b=w[1].view(1, -1), bias=bias, out_dtype=dtype)


if triton is not None:

    @triton.jit
    def _inverse(scale):
        """1 / scale of a power of two, exactly; of an infinite one it is infinite."""
        return (0x7F000000 - scale.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)

    @triton.jit
    def _store(at, x, inside, INTERPRETED: tl.constexpr):
        if INTERPRETED:  # it loses the carry when it rounds, so there is to be nothing left to round
            exponent = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, 121)
            round_off = (((exponent + 20) << 23) | 0x400000).to(tl.float32, bitcast=True)
            x = (x + round_off) - round_off
        tl.store(at, x.to(at.dtype.element_ty), inside)

    @triton.jit
    def _weights(
        W, ld, ABSMAX, CODE, CODE2, OUTER, OFFSET, TABLE, SCALE, OUT, step_n, step_k, N, K,
        KIND: tl.constexpr, NESTED: tl.constexpr, PER_STEP: tl.constexpr, LAYERS: tl.constexpr, BN: tl.constexpr,
        INTERPRETED: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(1) * BN + tl.arange(0, BN)
        k = tl.program_id(0) * 64 + tl.arange(0, 64)
        in_n = n < N
        inside = in_n[:, None] & (k < K)[None, :]
        row = n.to(tl.int64)
        if KIND == 4:
            block = n * (K // 64) + tl.program_id(0)
            scale = block_scale(block, n, in_n, ABSMAX, CODE2, OUTER, OFFSET, TABLE, NESTED, LAYERS)
            at = row[:, None] * ld + (tl.program_id(0) * 32 + tl.arange(0, 32))[None, :]
            two = tl.load(W + at, in_n[:, None], 0).to(tl.int32)
            high = tl.load(CODE + (two >> 4)) * scale[:, None]
            low = tl.load(CODE + (two & 15)) * scale[:, None]
            w = tl.interleave(high, low)
        else:
            w = tl.load(W + row[:, None] * ld + k[None, :], inside, 0).to(tl.float32)
            if KIND == 8:
                w = w * tl.load(ABSMAX + n, in_n, 0.0)[:, None] * PER_STEP
        w = w * _inverse(tl.load(SCALE + n, in_n, 1.0))[:, None]
        to = row[:, None] * step_n + k.to(tl.int64)[None, :] * step_k
        _store(OUT + to, w, inside, INTERPRETED)

    @triton.jit
    def _rows(
        X, ld, COLUMNS, OUT, SCALE, K,
        HAS_COLUMNS: tl.constexpr, LEAST: tl.constexpr, BLOCK: tl.constexpr, INTERPRETED: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        most = tl.full((BLOCK,), LEAST, tl.float32)
        for k0 in range(0, K, BLOCK):
            k = k0 + tl.arange(0, BLOCK)
            x = tl.load(X + t * ld + k, k < K, 0.0).to(tl.float32)
            if HAS_COLUMNS:
                x = x * tl.load(COLUMNS + k, k < K, 0.0)
            most = tl.maximum(most, tl.where(x == x, tl.abs(x), float("inf")))
        above = (tl.max(most, 0) * (1 / 448)).to(tl.int32, bitcast=True) + 0x7FFFFF
        scale = (above & 0x7F800000).to(tl.float32, bitcast=True)
        tl.store(SCALE + t, scale)
        for k0 in range(0, K, BLOCK):  # once more, but from the cache
            k = k0 + tl.arange(0, BLOCK)
            x = tl.load(X + t * ld + k, k < K, 0.0).to(tl.float32)
            if HAS_COLUMNS:
                x = x * tl.load(COLUMNS + k, k < K, 0.0)
            _store(OUT + t * K + k, x * _inverse(scale), k < K, INTERPRETED)
