"""Norms of single heads, and rotation, of queries and keys: one pass forward and one backward.

Forward: queries and keys of the stacked [query | key | value] are read once and written once; values are not copied,
except where they are normed too, or are the keys as they were projected (Gemma 4).
Backward: the three gradients become the stack's in the same pass. It computes the norms' statistics again, from heads
that it reads anyway. RMSNorm: Zhang & Sennrich 2019; norms of queries and keys: Henry et al. 2020.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.launch import cdiv, power_of_2, tl, triton

HEADS = 8
"""Heads of a token that a program takes; with 128 features they are eight elements a thread."""


@dataclass(frozen=True)
class HeadNorm:
    """RMS norms over each head of queries and keys.

    Attributes:
        weights: (2, D) float32, of queries and of keys; (1, D) without keys.
        late: the norm follows the rotation.
        values: values are normed too, without a weight.
        values_of_keys: with `values`: they are the keys as they were projected, and the stack has none of its own.
    """

    weights: Tensor
    eps: float
    late: bool = False
    values: bool = False
    values_of_keys: bool = False


@dataclass(frozen=True)
class Rotation:
    """Rotation by position: positions (T,) int32; cos and sin (P, R / 2) float32; pairs as in kernels.rope."""

    positions: Tensor
    cos: Tensor
    sin: Tensor
    interleaved: bool = False


def norm_rotate(
    qkv: Tensor, norm: HeadNorm | None, rotation: Rotation | None, scale: Tensor | None, heads: tuple[int, int, int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries (T, H, D) and keys (T, K, D), normed, rotated, and queries times `scale`; and values (T, K, D).

    Args:
        qkv: (T, at least (H + 2 K) D, or (H + K) D with values_of_keys), rows contiguous.
        scale: (T,) float32.
        heads: H, K, D.
    """
    queries, keys, size = heads
    out = torch.empty(len(qkv), queries + keys, size, device=qkv.device, dtype=qkv.dtype)
    _norm_rotate[(len(qkv), cdiv(queries, HEADS) + cdiv(keys, HEADS))](
        qkv, qkv.stride(0), out, out.stride(0), *_tables(qkv, norm, rotation, scale), queries, keys,
        **_settings(size, norm, rotation, scale), num_warps=4,
    )  # fmt: skip
    q, k = out.split((queries, keys), dim=1)
    first = queries if norm is not None and norm.values_of_keys else queries + keys
    v = qkv[:, first * size : (first + keys) * size].unflatten(1, (keys, size))
    if norm is not None and norm.values:
        plain, v = v, torch.empty(len(qkv), keys, size, device=qkv.device, dtype=qkv.dtype)
        _norm_values[(len(qkv), cdiv(keys, HEADS))](
            plain, qkv.stride(0), v, keys, norm.eps, D=size, DP=power_of_2(size, 1), BH=HEADS, num_warps=4
        )
    return q, k, v


def norm_rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    norm: HeadNorm | None,
    rotation: Rotation | None,
    scale: Tensor | None,
    out: Tensor | None = None,
) -> Tensor:
    """The gradient of qkv, which norm_rotate read.

    Args:
        dq: (T, H, D); dk, dv: (T, K, D); any stride between tokens, heads dense.
        out: as qkv, whose further columns stay as they are; None for a new one.
    """
    rows, queries, size = dq.shape
    keys = dk.size(1)
    out = torch.empty_like(qkv, memory_format=torch.contiguous_format) if out is None else out
    stacked = 1 if norm is not None and norm.values_of_keys else 2
    _norm_rotate_backward[(rows, cdiv(queries, HEADS) + stacked * cdiv(keys, HEADS))](
        dq, dk, dv, dq.stride(0), dk.stride(0), dv.stride(0), qkv, qkv.stride(0), out, out.stride(0),
        *_tables(qkv, norm, rotation, scale), queries, keys, VALUES=norm is not None and norm.values,
        OF_KEYS=stacked == 1, **_settings(size, norm, rotation, scale), num_warps=4,
    )  # fmt: skip
    return out


def _tables(
    x: Tensor, norm: HeadNorm | None, rotation: Rotation | None, scale: Tensor | None
) -> tuple[Tensor | float, ...]:
    """Arguments of both kernels; a tensor that is not read is replaced by x."""
    position, cos, sin = (x, x, x) if rotation is None else (rotation.positions, rotation.cos, rotation.sin)
    weights, eps = (x, 0.0) if norm is None else (norm.weights, norm.eps)
    return position, cos, sin, weights, eps, x if scale is None else scale


def _settings(size: int, norm: HeadNorm | None, rotation: Rotation | None, scale: Tensor | None) -> dict[str, int]:
    half = 0 if rotation is None else rotation.cos.size(1)
    interleaved = rotation is not None and rotation.interleaved
    return {
        "D": size,
        "DP": power_of_2(size, 1),
        "HALF": half,
        "HP": power_of_2(max(half, 1), 1),
        "STEP": 2 if interleaved else 1,
        "GAP": 1 if interleaved else half,
        "NORM": norm is not None,
        "LATE": norm is not None and norm.late,
        "HAS_SCALE": scale is not None,
        "BH": HEADS,
    }


if triton is not None:

    @triton.jit
    def _norm_rotate(
        QKV, ld, OUT, ldo, POSITIONS, COS, SIN, W, eps, SCALE, queries, keys,
        D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr,
        NORM: tl.constexpr, LATE: tl.constexpr, HAS_SCALE: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        first_key = tl.cdiv(queries, BH)
        is_key = tl.program_id(1) >= first_key
        own = (tl.program_id(1) - tl.where(is_key, first_key, 0)) * BH + tl.arange(0, BH)  # of queries, or of keys
        inside = (own < tl.where(is_key, keys, queries))[:, None]
        h = own + tl.where(is_key, queries, 0)
        source, to = QKV + t * ld + h[:, None] * D, OUT + t * ldo + h[:, None] * D
        weight = W + tl.where(is_key, D, 0)
        j, d = tl.arange(0, HP), tl.arange(0, DP)
        in_pair, in_rest = inside & (j < HALF)[None, :], inside & ((d >= 2 * HALF) & (d < D))[None, :]
        factor = tl.full((BH, 1), 1.0, tl.float32)
        if HAS_SCALE:
            factor = tl.where(is_key, factor, tl.load(SCALE + t))
        a = tl.load(source + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
        b = tl.load(source + GAP + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
        if 2 * HALF < D:
            rest = tl.load(source + d[None, :], in_rest, 0.0).to(tl.float32)
        if NORM:
            squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            if 2 * HALF < D:
                squares += tl.sum(rest * rest, 1)
                rest *= tl.load(weight + d, d < D, 0.0)[None, :]
            factor = factor / tl.sqrt(squares / D + eps)[:, None]
            wa = tl.load(weight + STEP * j, j < HALF, 0.0)[None, :]
            wb = tl.load(weight + GAP + STEP * j, j < HALF, 0.0)[None, :]
            if not LATE:
                a, b = a * wa, b * wb
        if HALF > 0:
            position = tl.load(POSITIONS + t)
            c = tl.load(COS + position * HALF + j, j < HALF, 0.0)[None, :]
            s = tl.load(SIN + position * HALF + j, j < HALF, 0.0)[None, :]
            a, b = a * c - b * s, b * c + a * s
            if LATE:
                a, b = a * wa, b * wb
            tl.store(to + STEP * j[None, :], (a * factor).to(OUT.dtype.element_ty), in_pair)
            tl.store(to + GAP + STEP * j[None, :], (b * factor).to(OUT.dtype.element_ty), in_pair)
        if 2 * HALF < D:
            tl.store(to + d[None, :], (rest * factor).to(OUT.dtype.element_ty), in_rest)

    @triton.jit
    def _norm_values(V, ld, OUT, keys, eps, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        h, d = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, DP)
        at, inside = h[:, None] * D + d[None, :], (h < keys)[:, None] & (d < D)[None, :]
        v = tl.load(V + t * ld + at, inside, 0.0).to(tl.float32)
        v = v / tl.sqrt(tl.sum(v * v, 1) / D + eps)[:, None]
        tl.store(OUT + t * keys * D + at, v.to(OUT.dtype.element_ty), inside)

    @triton.jit
    def _norm_rotate_backward(
        DQ, DK, DV, step_q, step_k, step_v, QKV, ld, OUT, ldo, POSITIONS, COS, SIN, W, eps, SCALE, queries, keys,
        D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr,
        NORM: tl.constexpr, LATE: tl.constexpr, VALUES: tl.constexpr, OF_KEYS: tl.constexpr,
        HAS_SCALE: tl.constexpr, BH: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        block, query_blocks, key_blocks = tl.program_id(1), tl.cdiv(queries, BH), tl.cdiv(keys, BH)
        j, d = tl.arange(0, HP), tl.arange(0, DP)
        if block >= query_blocks + key_blocks:
            group = (block - query_blocks - key_blocks) * BH + tl.arange(0, BH)
            in_value = (group < keys)[:, None] & (d < D)[None, :]
            v = tl.load(DV + t * step_v + group[:, None] * D + d[None, :], in_value, 0.0)
            at = (queries + keys + group)[:, None] * D + d[None, :]
            if VALUES:
                x, gv = tl.load(QKV + t * ld + at, in_value, 0.0).to(tl.float32), v.to(tl.float32)
                rstd = 1.0 / tl.sqrt(tl.sum(x * x, 1) / D + eps)
                shift = (tl.sum(x * gv, 1) * rstd * rstd / D)[:, None]
                v = ((gv - x * shift) * rstd[:, None]).to(v.dtype)
            tl.store(OUT + t * ldo + at, v, in_value)
        else:
            is_key = block >= query_blocks
            own = (block - tl.where(is_key, query_blocks, 0)) * BH + tl.arange(0, BH)
            inside = (own < tl.where(is_key, keys, queries))[:, None]
            h = own + tl.where(is_key, queries, 0)
            gradient = DQ + t * step_q + own[:, None] * D
            if is_key:
                gradient = DK + t * step_k + own[:, None] * D
            source, to = QKV + t * ld + h[:, None] * D, OUT + t * ldo + h[:, None] * D
            weight = W + tl.where(is_key, D, 0)
            in_pair, in_rest = inside & (j < HALF)[None, :], inside & ((d >= 2 * HALF) & (d < D))[None, :]
            ga = tl.load(gradient + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
            gb = tl.load(gradient + GAP + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
            if 2 * HALF < D:
                rest = tl.load(gradient + d[None, :], in_rest, 0.0).to(tl.float32)
            if HAS_SCALE:
                scale = tl.where(is_key, 1.0, tl.load(SCALE + t))
                ga, gb = ga * scale, gb * scale
                if 2 * HALF < D:
                    rest *= scale
            if NORM:
                wa = tl.load(weight + STEP * j, j < HALF, 0.0)[None, :]
                wb = tl.load(weight + GAP + STEP * j, j < HALF, 0.0)[None, :]
                if 2 * HALF < D:
                    rest *= tl.load(weight + d, d < D, 0.0)[None, :]
                if LATE:
                    ga, gb = ga * wa, gb * wb
            if HALF > 0:
                position = tl.load(POSITIONS + t)
                c = tl.load(COS + position * HALF + j, j < HALF, 0.0)[None, :]
                s = tl.load(SIN + position * HALF + j, j < HALF, 0.0)[None, :]
                ga, gb = ga * c + gb * s, gb * c - ga * s
            if NORM:
                if not LATE:
                    ga, gb = ga * wa, gb * wb
                if OF_KEYS:  # noqa: SIM102 - the outer one decides what is compiled
                    if is_key:  # values of the same input and its size: gradients add up before the norm's
                        of_value = DV + t * step_v + own[:, None] * D
                        ga += tl.load(of_value + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
                        gb += tl.load(of_value + GAP + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
                        if 2 * HALF < D:
                            rest += tl.load(of_value + d[None, :], in_rest, 0.0).to(tl.float32)
                a = tl.load(source + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
                b = tl.load(source + GAP + STEP * j[None, :], in_pair, 0.0).to(tl.float32)
                squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
                products = tl.sum(a * ga, 1) + tl.sum(b * gb, 1)
                if 2 * HALF < D:
                    x = tl.load(source + d[None, :], in_rest, 0.0).to(tl.float32)
                    squares += tl.sum(x * x, 1)
                    products += tl.sum(x * rest, 1)
                rstd = 1.0 / tl.sqrt(squares / D + eps)
                shift = (products * rstd * rstd / D)[:, None]
                ga, gb = (ga - a * shift) * rstd[:, None], (gb - b * shift) * rstd[:, None]
                if 2 * HALF < D:
                    rest = (rest - x * shift) * rstd[:, None]
            if HALF > 0:
                tl.store(to + STEP * j[None, :], ga.to(OUT.dtype.element_ty), in_pair)
                tl.store(to + GAP + STEP * j[None, :], gb.to(OUT.dtype.element_ty), in_pair)
            if 2 * HALF < D:
                tl.store(to + d[None, :], rest.to(OUT.dtype.element_ty), in_rest)
