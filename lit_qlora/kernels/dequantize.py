"""[W | B]: a group's weights dequantised into a workspace, with LoRA's B beside them, in one launch.

The stacked matrix has K + R columns. So one product Y = [X | Z] [W | B]^T is base and adapters together, with one
rounding. 4-bit weights are what bitsandbytes makes of them, bit for bit: each block of 64 weights has a scale; with
double quantisation the scale is itself an 8-bit code times a float32 for each 256 blocks, plus an offset for each
matrix. Dettmers et al. 2023, sec. 3. One pass reads half a byte and writes two bytes a weight.
"""

import math

import torch
from torch import Tensor

from lit_qlora.kernels.launch import cdiv, power_of_2, tl, triton
from lit_qlora.kernels.stack import BLOCK, PER_STEP, EightBit, FourBit, Stack, Unquantized


def dequantize_reference(weight: FourBit | EightBit, b: Tensor | None, out: Tensor, stack: Stack) -> None:
    """Dequantise in plain torch; the kernel is right when it agrees to the last bit."""
    n, k = stack.n, out.size(1) - stack.rank
    if isinstance(weight, EightBit):
        out[:, :k] = weight.packed.float() * weight.absmax[:, None] * PER_STEP
    else:
        nibbles = torch.stack((weight.packed >> 4, weight.packed & 15), dim=-1).view(-1, BLOCK)
        out[:, :k] = (weight.code[nibbles.long()] * block_scales(weight, stack)[:, None]).view(n, k)
    write_b(b, out, stack)


def block_scales(weight: FourBit, stack: Stack) -> Tensor:
    """The scale of each block of 64 weights, (N * K / 64,) float32."""
    if not weight.nested:
        return weight.absmax
    code, outer, offset = weight.nested
    blocks = torch.tensor(stack.rows, device=offset.device) * (len(weight.absmax) // stack.n)
    scale = code[weight.absmax.long()] * outer.repeat_interleave(256)[: len(weight.absmax)]
    return scale + offset.repeat_interleave(blocks)


def write_b(b: Tensor | None, out: Tensor, stack: Stack) -> None:
    """The last R columns of `out`: each adapter's B in its own rows and columns, zero elsewhere."""
    if not stack.rank:
        return
    assert b is not None
    columns = out[:, out.size(1) - stack.rank :]
    columns.zero_()
    for rows, own, rows_b in stack.slices:
        columns[rows, own] = b[rows_b]


def dequantize(
    weight: FourBit | EightBit | Unquantized, b: Tensor | None, out: Tensor, stack: Stack, table: Tensor
) -> Tensor:
    """Write [W | B] into `out`.

    Args:
        b: stacked B, (adapted rows, r), in the dtype of `out`; None where no layer has an adapter.
        out: (N, K + R), rows contiguous.
        table: stack.table, on the device.

    Returns:
        `out`.
    """
    n, k = stack.n, out.size(1) - stack.rank
    of_b = (out if b is None else b, table, out, out.stride(0), n, k)
    columns = min(COLUMNS, power_of_2(stack.rank))
    b_programs = cdiv(n, ROWS) * cdiv(stack.rank, columns)
    rank = {"R": stack.rank, "r": max(stack.r, 1), "COLUMNS": columns, "LAYERS": len(stack.rows), "ROWS": ROWS}
    if isinstance(weight, FourBit):
        in_row, nested = k // BLOCK, weight.nested or (weight.code,) * 3
        group = math.gcd(in_row, TILE)  # a power of two of which a row is a multiple
        programs = cdiv(n, TILE // group) * (in_row // group)
        _four_bit[(b_programs + programs,)](
            weight.words, weight.absmax, weight.code, *nested, *of_b, b_programs,
            NESTED=weight.nested is not None, TILE=TILE, G=group, IN_ROW=in_row, **rank, num_warps=WARPS,
            enable_fp_fusion=False,  # bitsandbytes rounds after the product and after the sum
        )  # fmt: skip
        return out
    if isinstance(weight, Unquantized):
        out[:, :k].copy_(weight.values)
    if isinstance(weight, EightBit):
        _eight_bit[(n, cdiv(k, 1024))](
            weight.packed, weight.absmax, out, out.stride(0), k, PER_STEP=PER_STEP, BLOCK=1024
        )
    if b_programs:
        _b[(b_programs,)](*of_b, **rank)
    return out


TILE, WARPS = 64, 2
"""Blocks of 64 weights a program, and warps: 64 weights a thread, for which it finds one scale. Of five choices on an
H200 none was faster for three matrices."""
ROWS, COLUMNS = 32, 64  # of B a program; larger ones take registers from the programs that dequantise

if triton is not None:

    @triton.jit
    def layer_of(n, TABLE, LAYERS: tl.constexpr):
        """Number of the layer that row n of a stack belongs to."""
        layer = tl.zeros_like(n)
        for p in tl.static_range(1, LAYERS):
            layer += (n >= tl.load(TABLE + 3 * p)).to(tl.int32)
        return layer

    @triton.jit
    def block_scale(
        block, row, inside, ABSMAX, CODE2, OUTER, OFFSET, TABLE, NESTED: tl.constexpr, LAYERS: tl.constexpr
    ):  # fmt: skip
        """Scales of blocks of 64 weights, which lie in these rows."""
        if NESTED:
            scale = tl.load(CODE2 + tl.load(ABSMAX + block, inside, 0).to(tl.int32))
            scale = scale * tl.load(OUTER + block // 256, inside, 0.0)
            scale = scale + tl.load(OFFSET + layer_of(row, TABLE, LAYERS), inside, 0.0)
        else:
            scale = tl.load(ABSMAX + block, inside, 0.0)
        return scale

    @triton.jit
    def _four_bit(
        WORDS, ABSMAX, CODE, CODE2, OUTER, OFFSET, B, TABLE, OUT, ld, N, K, b_programs,
        NESTED: tl.constexpr, TILE: tl.constexpr, G: tl.constexpr, IN_ROW: tl.constexpr, R: tl.constexpr,
        r: tl.constexpr, COLUMNS: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """A program takes G of the IN_ROW blocks of each of TILE / G rows; the first programs write B."""
        pid = tl.program_id(0)
        if pid < b_programs:
            _write_b(pid, B, TABLE, OUT, ld, N, K, R, r, COLUMNS, LAYERS, ROWS)
        else:
            across: tl.constexpr = IN_ROW // G
            i = tl.arange(0, TILE)
            row = (pid - b_programs) // across * (TILE // G) + i // G
            column = (pid - b_programs) % across * G + i % G
            inside = row < N
            block = row * IN_ROW + column
            scale = block_scale(block, row, inside, ABSMAX, CODE2, OUTER, OFFSET, TABLE, NESTED, LAYERS)
            words = tl.load(WORDS + block.to(tl.int64)[:, None] * 8 + tl.arange(0, 8)[None, :], inside[:, None], 0)
            w = look_up(words, tl.load(CODE + tl.arange(0, 16)), TILE) * scale[:, None]
            to = (row.to(tl.int64) * ld + column * 64)[:, None] + tl.arange(0, 64)[None, :]
            tl.store(OUT + to, w.to(OUT.dtype.element_ty), inside[:, None])

    @triton.jit
    def look_up(words, code, blocks: tl.constexpr):
        """The codes' values, (blocks, 64), of eight 4-bit weights in each of the words, (blocks, 8).

        Gathered from shared memory: an address in global memory takes two more instructions for each weight. In each
        byte the high nibble comes first, and the lowest byte is the first.
        """
        shift = 4 * (tl.arange(0, 8) ^ 1)
        nibbles = (words[:, :, None] >> shift[None, None, :]) & 15
        return tl.gather(code, nibbles.reshape(blocks * 64), 0).reshape(blocks, 64)

    @triton.jit
    def _b(
        B, TABLE, OUT, ld, N, K,
        R: tl.constexpr, r: tl.constexpr, COLUMNS: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        _write_b(tl.program_id(0), B, TABLE, OUT, ld, N, K, R, r, COLUMNS, LAYERS, ROWS)

    @triton.jit
    def _write_b(
        pid, B, TABLE, OUT, ld, N, K,
        R: tl.constexpr, r: tl.constexpr, COLUMNS: tl.constexpr, LAYERS: tl.constexpr, ROWS: tl.constexpr,
    ):  # fmt: skip
        """Each adapter's B in its own rows and columns behind the weights, zero elsewhere."""
        across: tl.constexpr = (R + COLUMNS - 1) // COLUMNS
        n = pid // across * ROWS + tl.arange(0, ROWS)
        in_n = n < N
        j = pid % across * COLUMNS + tl.arange(0, COLUMNS)
        layer = layer_of(n, TABLE, LAYERS)
        slot = tl.load(TABLE + 3 * layer + 1, in_n, -1)
        row_b = n - tl.load(TABLE + 3 * layer, in_n, 0) + tl.load(TABLE + 3 * layer + 2, in_n, 0)
        column_b = j[None, :] - slot[:, None] * r
        own = (column_b >= 0) & (column_b < r) & (slot >= 0)[:, None] & in_n[:, None]
        b = tl.load(B + row_b.to(tl.int64)[:, None] * r + column_b, own, 0.0)
        to_b = n.to(tl.int64)[:, None] * ld + K + j[None, :]
        tl.store(OUT + to_b, b.to(OUT.dtype.element_ty), in_n[:, None] & (j < R)[None, :])

    @triton.jit
    def _eight_bit(PACKED, ABSMAX, OUT, ld, K, PER_STEP: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < K
        w = tl.load(PACKED + row * K + k, inside, 0).to(tl.float32) * tl.load(ABSMAX + row)
        tl.store(OUT + row * ld + k, (w * PER_STEP).to(OUT.dtype.element_ty), inside)
