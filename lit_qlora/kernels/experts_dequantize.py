"""The weights of a block's experts dequantised in one launch: matrices of one shape, each quantised by itself.

Their packed weights, scales and offsets lie one behind the other, in the order of the matrices. With double
quantisation each matrix has scales for its own blocks of 256; the last block need not be full. In the layout of
kernels.dequantize, stacked layers share such blocks. The numbers are bitsandbytes' to the last bit.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lit_qlora.kernels.launch import cdiv, tl, triton
from lit_qlora.kernels.stack import BLOCK, PER_STEP, EightBit, FourBit

GROUPS = 64  # blocks of 64 weights a program


@dataclass(frozen=True)
class Matrices:
    """Quantised matrices one behind the other.

    Attributes:
        stored: of all of them; of FourBit's nested parts the scales are ceil(blocks of a matrix / 256) for each.
        shape: (matrices, out, in).
    """

    stored: FourBit | EightBit
    shape: tuple[int, int, int]

    @property
    def numel(self) -> int:
        """Weights of all of them."""
        count, out, width = self.shape
        return count * out * width


def dequantize_reference(weight: Matrices, out: Tensor) -> Tensor:
    """Dequantise in plain torch; the kernel is right when it agrees to the last bit."""
    stored = weight.stored
    if isinstance(stored, EightBit):
        values = stored.packed.float() * stored.absmax[:, None] * PER_STEP
    else:
        scale, each = stored.absmax, len(stored.absmax) // weight.shape[0]
        if stored.nested:
            code, outer, offset = stored.nested
            of_each = outer.view(weight.shape[0], -1).repeat_interleave(256, dim=1)[:, :each]
            scale = code[scale.long()] * of_each.flatten() + offset.repeat_interleave(each)
        nibbles = torch.stack((stored.packed >> 4, stored.packed & 15), dim=-1).view(-1, BLOCK)
        values = stored.code[nibbles.long()] * scale[:, None]
    return out.view(-1).copy_(values.flatten()).view_as(out)


def dequantize(weight: Matrices, out: Tensor) -> Tensor:
    """Write the weights into `out`, contiguous, of as many elements."""
    stored = weight.stored
    if isinstance(stored, EightBit):
        rows, width = stored.packed.shape
        _eight_bit[(rows, cdiv(width, 1024))](
            stored.packed, stored.absmax, out, width, PER_STEP=PER_STEP, BLOCK=1024, num_warps=4
        )
        return out
    blocks = len(stored.absmax)
    each = blocks // weight.shape[0]
    nested: Any = stored.nested or (stored.code,) * 3
    _four_bit[(cdiv(blocks, GROUPS),)](
        stored.words, stored.absmax, stored.code, *nested, out, blocks, each, cdiv(each, 256),
        NESTED=stored.nested is not None, G=GROUPS, num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds after the product and after the sum
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _four_bit(
        PACKED, ABSMAX, CODE, CODE2, OUTER, OFFSET, OUT, blocks, each, outer_each,
        NESTED: tl.constexpr, G: tl.constexpr,
    ):  # fmt: skip
        """A thread takes words of eight weights and finds their scale itself, so that threads exchange nothing."""
        word = tl.program_id(0).to(tl.int64) * (8 * G) + tl.arange(0, 8 * G)
        block = (word // 8).to(tl.int32)
        inside = block < blocks
        if NESTED:
            matrix = block // each
            scale = tl.load(CODE2 + tl.load(ABSMAX + block, inside, 0).to(tl.int32))
            scale = scale * tl.load(OUTER + matrix * outer_each + (block - matrix * each) // 256, inside, 0.0)
            scale = scale + tl.load(OFFSET + matrix, inside, 0.0)
        else:
            scale = tl.load(ABSMAX + block, inside, 0.0)
        eight = tl.load(PACKED + word, inside, 0)
        dtype: tl.constexpr = OUT.dtype.element_ty
        # In each byte the high nibble comes first, and the lowest byte is the first.
        v0 = (tl.load(CODE + ((eight >> 4) & 15)) * scale).to(dtype)
        v1 = (tl.load(CODE + (eight & 15)) * scale).to(dtype)
        v2 = (tl.load(CODE + ((eight >> 12) & 15)) * scale).to(dtype)
        v3 = (tl.load(CODE + ((eight >> 8) & 15)) * scale).to(dtype)
        v4 = (tl.load(CODE + ((eight >> 20) & 15)) * scale).to(dtype)
        v5 = (tl.load(CODE + ((eight >> 16) & 15)) * scale).to(dtype)
        v6 = (tl.load(CODE + ((eight >> 28) & 15)) * scale).to(dtype)
        v7 = (tl.load(CODE + ((eight >> 24) & 15)) * scale).to(dtype)
        even = tl.interleave(tl.interleave(v0, v4), tl.interleave(v2, v6))
        odd = tl.interleave(tl.interleave(v1, v5), tl.interleave(v3, v7))
        to = tl.program_id(0).to(tl.int64) * (64 * G) + tl.arange(0, 64 * G)
        tl.store(OUT + to, tl.interleave(even, odd), to // 64 < blocks)

    @triton.jit
    def _eight_bit(PACKED, ABSMAX, OUT, K, PER_STEP: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < K
        w = tl.load(PACKED + row * K + k, inside, 0).to(tl.float32) * tl.load(ABSMAX + row)
        tl.store(OUT + row * K + k, (w * PER_STEP).to(OUT.dtype.element_ty), inside)
