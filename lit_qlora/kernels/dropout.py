"""Dropout without stored masks: a hash of its index and a seed says if an element is kept, computed where needed.

The hash is the finaliser of MurmurHash3 (Appleby, public domain), 32 bit. The weights of attention have more elements
than that counts. There a hash of the row's number is mixed with the column's.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, tl, triton


@dataclass(frozen=True)
class Dropout:
    """The elements of a tensor that this forward pass drops, and so its backward pass.

    Attributes:
        seed: (1,) int64 on the device, below 2^31, so that a CUDA graph draws anew when it changes; None drops nothing.
        offset: an integer added to the seed, another one for each tensor.
    """

    p: float = 0.0
    seed: Tensor | None = None
    offset: int = 0

    @property
    def threshold(self) -> int:
        """Hashes below it are dropped."""
        return int(self.p * 2**32)

    @property
    def scale(self) -> float:
        """The factor of a kept element."""
        return 1 / (1 - self.p)


NONE = Dropout()


def factor_reference(rows: int, columns: int, dropout: Dropout, device: torch.device | str = "cpu") -> Tensor:
    """The factor of each element, (rows, columns) float32: 0 or 1 / (1 - p)."""
    h = torch.arange(rows * columns, device=device, dtype=torch.int64).view(rows, columns)
    seed = 0 if dropout.seed is None else (dropout.seed + dropout.offset) % 2**31
    return torch.where(_hash_reference(h, seed) >= dropout.threshold, dropout.scale, 0.0).float()


def pair_factor_reference(rows: Tensor, columns: Tensor, dropout: Dropout) -> Tensor:
    """The factors (R, C) of a large matrix's elements in the rows (R,) and columns (C,) of these numbers."""
    assert dropout.seed is not None
    hashes = _hash_reference(rows.long(), (dropout.seed + dropout.offset) % 2**31)
    h = _hash_reference(columns.long()[None], hashes[:, None])
    return torch.where(h >= dropout.threshold, dropout.scale, 0.0).float()


def _hash_reference(x: Tensor, seed: Tensor | int) -> Tensor:
    """The hash of int64 numbers, below 2^32."""
    mask = 2**32 - 1
    h = (x * 0x9E3779B1 + seed) & mask
    for shift, multiplier in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        h = ((h ^ (h >> shift)) * multiplier) & mask
    return h


def drop(x: Tensor, dropout: Dropout, scales: bool = True) -> Tensor:
    """X (T, K), rows contiguous, with elements dropped; x itself if none are. Without `scales` the others stay."""
    if not dropout.p:
        return x
    rows, k = x.shape
    out = torch.empty(rows, k, device=x.device, dtype=x.dtype)
    _drop[(rows, cdiv(k, 1024))](
        x, x.stride(0), out, k, dropout.seed, dropout.offset, dropout.threshold, dropout.scale if scales else 1.0,
        BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def factor(at, SEED, offset, threshold, scale):
        """The factors of the elements at these indices (row * columns + column), float32."""
        return tl.where(row_hashes(at, SEED, offset) >= threshold.to(tl.uint32), scale, 0.0)

    @triton.jit
    def row_hashes(row, SEED, offset):
        """The hashes of these rows of a large matrix, for pair_factor."""
        seed = (tl.load(SEED) + offset) & 0x7FFFFFFF
        return _mixed(row.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32))

    @triton.jit
    def pair_factor(hashes, column, threshold, scale):
        """The factors (M, N) of these columns (N,) in rows with these hashes (M,), float32."""
        h = _mixed((column.to(tl.uint32) * 0x9E3779B1)[None, :] + hashes[:, None])
        return tl.where(h >= threshold.to(tl.uint32), scale, 0.0)

    @triton.jit
    def _mixed(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B
        h = (h ^ (h >> 13)) * 0xC2B2AE35
        return h ^ (h >> 16)

    @triton.jit(do_not_specialize=VARYING)
    def _drop(X, ld, OUT, K, SEED, offset, threshold, scale, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = k < K
        x = tl.load(X + t * ld + k, inside, 0.0).to(tl.float32) * factor(t * K + k, SEED, offset, threshold, scale)
        tl.store(OUT + t * K + k, x.to(OUT.dtype.element_ty), inside)
