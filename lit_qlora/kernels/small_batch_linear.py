"""Products of a few rows with a weight that is read once, as it is stored: y = x W^T, and LoRA's update beside it.

A token that is generated needs every weight once, so its time is that of reading them. 4- and 8-bit weights are
decoded in registers to what kernels.dequantize writes, to the last bit, and never lie in memory; sums are float32. One
row is multiplied without matrix units by programs of one warp, which wait for nothing but their own loads; more rows
with them.
"""

from typing import Any

import torch
from torch import Tensor

from lit_qlora.kernels.launch import INTERPRETED, power_of_2, shared_memory, stages, tl, triton
from lit_qlora.kernels.stack import PER_STEP, EightBit, FourBit, Stack

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of x."""
BUSY_ROWS = 2048
"""Rows of a weight from which on there are enough of them to keep a GPU busy with one warp for four."""
MOST_ROWS = 16
"""Rows up to which reading a weight takes longer than computing with it."""


def product_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, z: Tensor | None, b: Tensor | None, stack: Stack
) -> Tensor:
    """Compute product in plain torch, of a weight (N, K) in the dtype of x; float32."""
    y = x.float() @ weight.float().T
    if bias is not None:
        y = y + bias.float()
    if z is not None:
        assert b is not None
        first = first_b = 0
        for rows, slot in zip(stack.rows, stack.slots, strict=True):
            if slot >= 0:
                own = z[:, slot * stack.r : (slot + 1) * stack.r].float()
                y[:, first : first + rows] += own @ b[first_b : first_b + rows].float().T
                first_b += rows
            first += rows
    return y


def product(
    x: Tensor,
    weight: FourBit | EightBit | Tensor,
    stack: Stack,
    table: Tensor | None,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    b: Tensor | None = None,
) -> Tensor:
    """X W^T + bias, and in the rows of layers with an adapter z B^T.

    Args:
        x: (M, K), contiguous, M from 1 to MOST_ROWS; K a multiple of 64 for 4-bit weights.
        weight: stacked; if it is a tensor (N, K), rows contiguous, in the dtype of x.
        table: stack.table, on the device; not needed for one layer without an adapter.
        bias: (N,).
        z: (M, R), contiguous, in the dtype of x; None where there is no adapter.
        b: stacked B, (adapted rows, r), contiguous, in the dtype of x.

    Returns:
        (M, N).
    """
    rows, k = x.shape
    n = stack.n
    out = torch.empty(rows, n, device=x.device, dtype=x.dtype)
    nested: Any = (x,) * 3
    if isinstance(weight, FourBit):
        kind, packed, scales, code, stride = 4, weight.packed, weight.absmax, weight.code, k // 2
        nested = weight.nested or nested
    elif isinstance(weight, EightBit):
        kind, packed, scales, code, stride = 8, weight.packed, weight.absmax, x, k
    else:
        kind, packed, scales, code, stride = 16, weight, x, x, weight.stride(0)
    is_nested = isinstance(weight, FourBit) and weight.nested is not None
    arguments = (
        x, packed, stride, scales, code, *nested, x if bias is None else bias, x if z is None else z,
        x if b is None else b, x if table is None else table, out, rows, n, k,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "KIND": kind,
        "NESTED": is_nested,
        "PER_STEP": PER_STEP,
        "PER_LANE": {4: 32, 8: 16, 16: 16 // x.element_size()}[kind],
        "HAS_BIAS": bias is not None,
        "R": 0 if z is None else stack.rank,
        "r": max(stack.r, 1),
        "RP": power_of_2(stack.rank),
        "LAYERS": len(stack.rows),
        "PACK": x.dtype == torch.bfloat16 and not INTERPRETED,
        "enable_fp_fusion": not is_nested,  # bitsandbytes rounds a scale's scale after the product and after the sum
    }
    if rows == 1:
        alone, warps = (4, 1) if n >= BUSY_ROWS else (1, 4)
        _one_row[(triton.cdiv(n, alone),)](*arguments, BN=alone, LANES=32 * warps, num_warps=warps, **settings)
    else:
        lanes, size = 256 // settings["PER_LANE"], (32 + MOST_ROWS) * 256 * x.element_size()
        _few_rows[(triton.cdiv(n, 32),)](
            *arguments, BN=32, MP=MOST_ROWS, LANES=lanes, num_warps=2, num_stages=stages(size, 3, shared_memory(x)),
            **settings,
        )  # fmt: skip
    return out


if triton is not None:
    from lit_qlora.kernels.dequantize import layer_of

    @triton.jit
    def _weights(
        n, k0, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, offset, N, K, like,
        KIND: tl.constexpr, NESTED: tl.constexpr, PER_STEP: tl.constexpr, PER_LANE: tl.constexpr,
        BN: tl.constexpr, LANES: tl.constexpr, PACK: tl.constexpr,
    ):  # fmt: skip
        """Rows n (BN,) of W from column k0 on, (BN, LANES, PER_LANE) float32 rounded to `like`; 16 bytes a lane."""
        lane = tl.arange(0, LANES)
        k = k0 + lane * PER_LANE
        inside = (n < N)[:, None] & (k < K)[None, :]
        row = n.to(tl.int64)
        if KIND == 4:
            block = row[:, None] * (K // 64) + (k // 64)[None, :]
            if NESTED:
                scale = tl.load(CODE2 + tl.load(SCALES + block, inside, 0).to(tl.int32))
                scale = scale * tl.load(OUTER + block // 256, inside, 0.0)
                scale = scale + offset[:, None]
            else:
                scale = tl.load(SCALES + block, inside, 0.0)
            at = (row * stride)[:, None] + (k // 2)[None, :]
            two = tl.load(PACKED + at[:, :, None] + tl.arange(0, 16)[None, None, :], inside[:, :, None], 0).to(tl.int32)
            # Among the threads of a warp a code is found faster than in memory.
            code = tl.load(CODE + tl.arange(0, 16))
            flat = tl.reshape(two, (BN * LANES * 16,))
            high = tl.reshape(tl.gather(code, flat >> 4, 0), two.shape) * scale[:, :, None]
            low = tl.reshape(tl.gather(code, flat & 15, 0), two.shape) * scale[:, :, None]
            if PACK:
                high, low = tl.inline_asm_elementwise(
                    """{ .reg .b32 two;
                    cvt.rn.bf16x2.f32 two, $2, $3;
                    and.b32 $0, two, 0xffff0000;
                    shl.b32 $1, two, 16; }""",
                    "=r,=r,r,r", [high, low], dtype=(tl.float32, tl.float32), is_pure=True, pack=1,
                )  # fmt: skip
            else:
                high, low = high.to(like).to(tl.float32), low.to(like).to(tl.float32)
            w = tl.interleave(high, low)  # outside of W it is not zero, but x is
        else:
            at = (row * stride)[:, None] + k[None, :]
            at = at[:, :, None] + tl.arange(0, PER_LANE)[None, None, :]
            inner = inside[:, :, None] & (k[:, None] + tl.arange(0, PER_LANE)[None, :] < K)[None, :, :]
            w = tl.load(PACKED + at, inner, 0).to(tl.float32)
            if KIND == 8:
                scale = tl.load(SCALES + n, n < N, 0.0)
                w = (w * scale[:, None, None] * PER_STEP).to(like).to(tl.float32)
        return w

    @triton.jit
    def _own_b(n, B, TABLE, N, R: tl.constexpr, r: tl.constexpr, RP: tl.constexpr, LAYERS: tl.constexpr):
        """Rows n of B, (BN, RP): each layer's in the columns of its own adapter, zero elsewhere."""
        layer = layer_of(n, TABLE, LAYERS)
        slot = tl.load(TABLE + 3 * layer + 1)
        row_b = n - tl.load(TABLE + 3 * layer) + tl.load(TABLE + 3 * layer + 2)
        column = tl.arange(0, RP)[None, :] - slot[:, None] * r
        own = ((n < N) & (slot >= 0))[:, None] & (column >= 0) & (column < r)
        return tl.load(B + row_b.to(tl.int64)[:, None] * r + column, own, 0.0)

    @triton.jit
    def _one_row(
        X, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, BIAS, Z, B, TABLE, OUT, M, N, K,
        KIND: tl.constexpr, NESTED: tl.constexpr, PER_STEP: tl.constexpr, PER_LANE: tl.constexpr,
        HAS_BIAS: tl.constexpr, R: tl.constexpr, r: tl.constexpr, RP: tl.constexpr, LAYERS: tl.constexpr,
        PACK: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        within = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
        offset = tl.zeros((BN,), tl.float32)
        if NESTED:
            offset = tl.load(OFFSET + layer_of(n, TABLE, LAYERS))
        total = tl.zeros((BN, LANES), tl.float32)
        for k0 in range(0, K, LANES * PER_LANE):
            x = tl.load(X + k0 + within, k0 + within < K, 0.0)
            w = _weights(
                n, k0, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, offset, N, K, x.dtype,
                KIND, NESTED, PER_STEP, PER_LANE, BN, LANES, PACK,
            )  # fmt: skip
            total += tl.sum(w * x.to(tl.float32)[None, :, :], 2)
        y = tl.sum(total, 1)
        if HAS_BIAS:
            y += tl.load(BIAS + n, n < N, 0.0).to(tl.float32)
        if R > 0:
            j = tl.arange(0, RP)
            z = tl.load(Z + j, j < R, 0.0).to(tl.float32)
            y += tl.sum(_own_b(n, B, TABLE, N, R, r, RP, LAYERS).to(tl.float32) * z[None, :], 1)
        tl.store(OUT + n, y.to(OUT.dtype.element_ty), n < N)

    @triton.jit
    def _few_rows(
        X, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, BIAS, Z, B, TABLE, OUT, M, N, K,
        KIND: tl.constexpr, NESTED: tl.constexpr, PER_STEP: tl.constexpr, PER_LANE: tl.constexpr,
        HAS_BIAS: tl.constexpr, R: tl.constexpr, r: tl.constexpr, RP: tl.constexpr, LAYERS: tl.constexpr,
        PACK: tl.constexpr, BN: tl.constexpr, MP: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        BK: tl.constexpr = LANES * PER_LANE
        n = tl.program_id(0) * BN + tl.arange(0, BN)
        m = tl.arange(0, MP)
        j = tl.arange(0, BK)
        offset = tl.zeros((BN,), tl.float32)
        if NESTED:
            offset = tl.load(OFFSET + layer_of(n, TABLE, LAYERS))
        y = tl.zeros((BN, MP), tl.float32)
        for k0 in range(0, K, BK):
            x = tl.load(X + m[None, :] * K + k0 + j[:, None], (m < M)[None, :] & (k0 + j < K)[:, None], 0.0)
            w = _weights(
                n, k0, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, offset, N, K, x.dtype,
                KIND, NESTED, PER_STEP, PER_LANE, BN, LANES, PACK,
            )  # fmt: skip
            y = tl.dot(tl.reshape(w.to(x.dtype), (BN, BK)), x, y, input_precision="ieee")
        in_n = n < N
        if HAS_BIAS:
            y += tl.load(BIAS + n, in_n, 0.0).to(tl.float32)[:, None]
        if R > 0:
            c = tl.arange(0, RP)
            z = tl.load(Z + m[None, :] * R + c[:, None], (m < M)[None, :] & (c < R)[:, None], 0.0)
            y = tl.dot(_own_b(n, B, TABLE, N, R, r, RP, LAYERS), z, y, input_precision="ieee")
        tl.store(OUT + m[None, :] * N + n[:, None], y.to(OUT.dtype.element_ty), in_n[:, None] & (m < M)[None, :])
