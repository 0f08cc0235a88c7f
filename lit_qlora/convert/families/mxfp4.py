"""OCP Microscaling FP4, as gpt-oss's experts are published: 4-bit floats; 32 of them share a power of two."""

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_BIAS = 127  # of the exponents in `scales`


def unpack(blocks: Tensor, scales: Tensor) -> Tensor:
    """The numbers that MXFP4 stands for, exactly.

    Args:
        blocks: (experts, rows, groups, 16) uint8, two numbers a byte, the lower four bits first.
        scales: (experts, rows, groups) uint8.

    Returns:
        (experts, rows, groups * 32) bfloat16.

    Source: OCP Microscaling Formats (MX) Specification 1.0, sec. 5.3.3 and 6.3.
    """
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], dtype=torch.bfloat16, device=blocks.device)
    out = torch.empty(*scales.shape, 32, dtype=torch.bfloat16, device=blocks.device)
    for one, block, scale in zip(out, blocks, scales, strict=True):  # an expert at a time: the indices take much room
        one[..., 0::2] = values[(block & 15).int()]
        one[..., 1::2] = values[(block >> 4).int()]
        torch.ldexp(one, scale.int()[..., None] - _BIAS, out=one)
    return out.flatten(2)
