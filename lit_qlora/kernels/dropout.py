"""Dropout without stored masks: whether an element is kept is a hash of its place and a seed, computed where needed.

The hash is the finaliser of MurmurHash3 (Appleby, public domain), 32 bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.launch import tl, triton


@dataclass(frozen=True)
class Dropout:
    """Which elements of an adapter's input are dropped in this forward pass, and so in its backward pass."""

    p: float = 0.0
    seed: int = 0

    @property
    def threshold(self) -> int:
        """Hashes below it are dropped."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """What a kept element is multiplied by."""
        return 1 / (1 - self.p)


NONE = Dropout()


def factor_reference(rows: int, columns: int, dropout: Dropout, device: torch.device | str = "cpu") -> Tensor:
    """What each element is multiplied by, (rows, columns) float32: 0 or 1 / (1 - p)."""
    mask = 2**32 - 1
    h = torch.arange(rows * columns, device=device, dtype=torch.int64).view(rows, columns)
    h = (h * 0x9E3779B1 + dropout.seed) & mask
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> shift)) * multiplier) & mask
    return torch.where(h >= dropout.threshold, dropout.scale, 0.0).float()


if triton is not None:

    @triton.jit
    def factor(at, seed, threshold, scale):
        """What the elements at these places (row * columns + column) are multiplied by, float32."""
        h = at.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        h = h ^ (h >> 16)
        return tl.where(h >= threshold.to(tl.uint32), scale, 0.0)
