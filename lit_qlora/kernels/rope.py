"""Rotating queries and keys in place inside the stacked [query | key | value], and the way back.

The backward kernel undoes the rotation and stacks the three gradients in the same pass. Su et al. 2021, eq. 34; feature
i is paired with i + R/2, or with `interleaved` feature 2 i with 2 i + 1, as in model.py.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.launch import cdiv, power_of_2, tl, triton


def rotate_reference(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False) -> Tensor:
    """Rotate in plain torch: the first R of D features of x (..., D) turned by angles (..., R / 2)."""
    half = cos.size(-1)
    first, second = (
        (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(half), slice(half, 2 * half))
    )
    a, b, out = x[..., first].float(), x[..., second].float(), x.clone()
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def rotate_(
    qkv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, heads: int, head_size: int, interleaved: bool = False
) -> None:
    """Rotate the first `heads` heads (queries and keys) of qkv, in place.

    Args:
        qkv: (T, at least heads * head_size), rows contiguous.
        positions: (T,) int32.
        cos, sin: (P, R / 2) float32, a row a position.
    """
    half = cos.size(1)
    _rotate[(qkv.size(0), cdiv(heads, 32))](
        qkv,
        qkv.stride(0),
        positions,
        cos,
        sin,
        heads,
        D=head_size,
        HALF=half,
        STEP=2 if interleaved else 1,
        GAP=1 if interleaved else half,
        HP=power_of_2(half, 1),
        BH=32,
        num_warps=4,
    )


def rotate_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The gradient of the stacked qkv before the rotation, (T, (H + 2 K) D).

    Args:
        dq: (T, H, D); dk, dv: (T, K, D); any stride between tokens, heads dense.
    """
    rows, heads, head_size = dq.shape
    groups = dk.size(1)
    out = torch.empty(rows, (heads + 2 * groups) * head_size, device=dq.device, dtype=dq.dtype)
    _rotate_backward[(rows, 3)](
        dq, dk, dv, dq.stride(0), dk.stride(0), dv.stride(0), out, out.stride(0), positions, cos, sin, heads, groups,
        D=head_size, DP=power_of_2(head_size), HALF=cos.size(1), HP=power_of_2(cos.size(1), 1),
        STEP=2 if interleaved else 1, GAP=1 if interleaved else cos.size(1), BH=power_of_2(heads),
        num_warps=4,
    )  # fmt: skip
    return out


if triton is not None:

    @triton.jit
    def _rotate(
        QKV, ld, POSITIONS, COS, SIN, heads,
        D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1) * BH + tl.arange(0, BH)
        j = tl.arange(0, HP)
        inside = (h < heads)[:, None] & (j < HALF)[None, :]
        position = tl.load(POSITIONS + t)
        c = tl.load(COS + position * HALF + j, j < HALF, 0.0)[None, :]
        s = tl.load(SIN + position * HALF + j, j < HALF, 0.0)[None, :]
        at = QKV + t * ld + h[:, None] * D + STEP * j[None, :]
        a = tl.load(at, inside, 0.0).to(tl.float32)
        b = tl.load(at + GAP, inside, 0.0).to(tl.float32)
        tl.store(at, (a * c - b * s).to(QKV.dtype.element_ty), inside)
        tl.store(at + GAP, (b * c + a * s).to(QKV.dtype.element_ty), inside)

    @triton.jit
    def _rotate_backward(
        DQ, DK, DV, step_q, step_k, step_v, OUT, ld, POSITIONS, COS, SIN, heads, groups,
        D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr,
        STEP: tl.constexpr, GAP: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        which = tl.program_id(1)
        h = tl.arange(0, BH)
        d = tl.arange(0, DP)
        count = heads if which == 0 else groups
        first = 0 if which == 0 else (heads if which == 1 else heads + groups)
        to = OUT + t * ld + (first + h)[:, None] * D
        inside = (h < count)[:, None]
        if which == 2:
            v = tl.load(DV + t * step_v + h[:, None] * D + d[None, :], inside & (d < D)[None, :], 0.0)
            tl.store(to + d[None, :], v, inside & (d < D)[None, :])
        else:
            source = DQ + t * step_q + h[:, None] * D
            if which == 1:
                source = DK + t * step_k + h[:, None] * D
            j = tl.arange(0, HP)
            own = inside & (j < HALF)[None, :]
            position = tl.load(POSITIONS + t)
            c = tl.load(COS + position * HALF + j, j < HALF, 0.0)[None, :]
            s = tl.load(SIN + position * HALF + j, j < HALF, 0.0)[None, :]
            a = tl.load(source + STEP * j[None, :], own, 0.0).to(tl.float32)
            b = tl.load(source + GAP + STEP * j[None, :], own, 0.0).to(tl.float32)
            tl.store(to + STEP * j[None, :], (a * c + b * s).to(OUT.dtype.element_ty), own)
            tl.store(to + GAP + STEP * j[None, :], (b * c - a * s).to(OUT.dtype.element_ty), own)
            if 2 * HALF < D:
                rest = inside & (d >= 2 * HALF)[None, :] & (d < D)[None, :]
                tl.store(to + d[None, :], tl.load(source + d[None, :], rest, 0.0), rest)
