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

GROUPS = 128
"""Blocks of 64 weights a program. 256 must be a multiple, so that those of a whole program share an outer scale."""


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
        NESTED=stored.nested is not None, WHOLE=each % GROUPS == 0, G=GROUPS, num_warps=4,
        enable_fp_fusion=False,  # bitsandbytes rounds after the product and after the sum
    )  # fmt: skip
    return out


if triton is not None:
    from lit_qlora.kernels.dequantize import look_up

    @triton.jit
    def _four_bit(
        WORDS, ABSMAX, CODE, CODE2, OUTER, OFFSET, OUT, blocks, each, outer_each,
        NESTED: tl.constexpr, WHOLE: tl.constexpr, G: tl.constexpr,
    ):  # fmt: skip
        """A program takes G blocks, which are all of one matrix if WHOLE."""
        first = tl.program_id(0).to(tl.int64) * G
        block = first + tl.arange(0, G)
        inside = None if WHOLE else block < blocks
        rows = None if WHOLE else (block < blocks)[:, None]
        scale = tl.load(ABSMAX + block, inside)
        if NESTED:
            one = (first if WHOLE else tl.minimum(block, blocks - 1)).to(tl.int32)
            matrix = one // each
            outer = tl.load(OUTER + matrix * outer_each + (one - matrix * each) // 256)
            scale = tl.load(CODE2 + scale.to(tl.int32)) * outer + tl.load(OFFSET + matrix)
        words = tl.load(WORDS + block[:, None] * 8 + tl.arange(0, 8)[None, :], rows)
        value = look_up(words, tl.load(CODE + tl.arange(0, 16)), G) * scale[:, None]
        to = OUT + block[:, None] * 64 + tl.arange(0, 64)[None, :]
        tl.store(to, value.to(OUT.dtype.element_ty), rows)

    @triton.jit
    def _eight_bit(PACKED, ABSMAX, OUT, K, PER_STEP: tl.constexpr, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < K
        w = tl.load(PACKED + row * K + k, inside, 0).to(tl.float32) * tl.load(ABSMAX + row)
        tl.store(OUT + row * K + k, (w * PER_STEP).to(OUT.dtype.element_ty), inside)
