"""Causal attention whose scores are capped, forward and backward, without a matrix of all scores.

Scores s become cap tanh(s / cap) (Gemma Team 2024, "Gemma 2"). Softmax runs over blocks of keys as they are read (Dao
et al. 2022, "FlashAttention"); the backward pass computes the scores again. Documents lie end to end; a token attends
to its own document, within a window if there is one. One program makes each sum, so results repeat bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, fitting, power_of_2, shared_memory, stages, tl, triton


@dataclass(frozen=True)
class Scores:
    """The scores of queries and keys.

    Attributes:
        scale: factor of their products.
        cap: None for no cap.
        window: tokens that a token attends to, itself included; None for all before it.
    """

    scale: float
    cap: float | None = None
    window: int | None = None


def attend(q: Tensor, k: Tensor, v: Tensor, scores: Scores, ends: Tensor, longest: int) -> tuple[Tensor, Tensor]:
    """The attention's output (T, H, D), and for each query the logarithm of its softmax's sum, (H, T) float32.

    Args:
        q: (T, H, D); k, v: (T, K, D), where each serves H / K queries; any stride between tokens, heads dense.
        ends: (documents + 1,) int32, the first token of each document and the end of the last.
        longest: tokens of the longest document, at least.
    """
    tokens, heads, size = q.shape
    out = torch.empty(tokens, heads, size, device=q.device, dtype=q.dtype)
    log_sum = torch.empty(heads, tokens, device=q.device, dtype=torch.float32)
    block = _block(q)
    _forward[(cdiv(longest, block), len(ends) - 1, heads)](
        q, k, v, q.stride(0), k.stride(0), v.stride(0), out, log_sum, ends, tokens, heads // k.size(1),
        *_of_scores(scores), heads, **_settings(q, scores), num_warps=4 if size <= 128 else 8,
    )  # fmt: skip
    return out, log_sum


def attend_backward(
    d_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    scores: Scores,
    ends: Tensor,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of queries, keys and values, contiguous.

    Args:
        d_out, out: (T, H, D), contiguous; others as for attend.
    """
    tokens, heads, size = q.shape
    keys = k.size(1)
    dq, dk, dv = (torch.empty(x.shape, device=x.device, dtype=x.dtype) for x in (q, k, v))
    inner = torch.empty_like(log_sum)  # of each query's output and its gradient
    _inner[(tokens, cdiv(heads, 8))](d_out, out, inner, tokens, heads, D=size, DP=power_of_2(size), BH=8, num_warps=4)
    block = _block(q)
    arguments = (
        q, k, v, q.stride(0), k.stride(0), v.stride(0), d_out, log_sum, inner, ends, tokens, heads // keys,
        *_of_scores(scores), heads, keys,
    )  # fmt: skip
    settings, warps = _settings(q, scores), 4 if size <= 128 else 8
    _backward_q[(cdiv(longest, block), len(ends) - 1, heads)](*arguments, dq, **settings, num_warps=warps)
    _backward_kv[(cdiv(longest, block), len(ends) - 1, keys)](*arguments, dk, dv, **settings, num_warps=warps)
    return dq, dk, dv


def _block(q: Tensor) -> int:
    """Queries, or keys, of a program: four blocks of them lie in shared memory, on Turing in float32."""
    padded = power_of_2(q.size(2))
    return fitting(64 if padded <= 128 else 32, 3 * padded * q.element_size(), shared_memory(q))


def _of_scores(scores: Scores) -> tuple[float, float, int]:
    return scores.scale, scores.cap or 1.0, scores.window or 0


def _settings(q: Tensor, scores: Scores) -> dict[str, int]:
    size = q.size(2)
    block, padded = _block(q), power_of_2(size)
    each = 2 * block * padded * q.element_size()
    return {
        "D": size,
        "DP": padded,
        "CAPPED": scores.cap is not None,
        "WINDOWED": scores.window is not None,
        "BLOCK": block,
        # Two blocks are there throughout, and two are read in each iteration.
        "STAGES": stages(each, 2, shared_memory(q) - 2 * each),
    }


if triton is not None:

    @triton.jit
    def _capped(s, scale, cap, CAPPED: tl.constexpr):
        """The scores, and their slope by what they are made of."""
        s *= scale
        slope = tl.full(s.shape, 1.0, tl.float32)
        if CAPPED:
            t = 2 * tl.sigmoid(2 * s / cap) - 1  # tanh
            s = cap * t
            slope = 1 - t * t
        return s, slope * scale

    @triton.jit
    def _sees(m, n, length, window, WINDOWED: tl.constexpr):
        """Tell whether queries m (BM,) attend to keys n (BN,) of their document."""
        seen = (n[None, :] <= m[:, None]) & (n < length)[None, :] & (m < length)[:, None]
        if WINDOWED:
            seen = seen & (n[None, :] > m[:, None] - window)
        return seen

    @triton.jit
    def _rows(X, stride, head, first, at, length, D: tl.constexpr, DP: tl.constexpr):
        """A block (B, D) of one head: the tokens `at` of a document."""
        d = tl.arange(0, DP)
        inside = (at < length)[:, None] & (d < D)[None, :]
        return tl.load(X + (first + at).to(tl.int64)[:, None] * stride + head * D + d[None, :], inside, 0.0)

    @triton.jit
    def _store_rows(X, stride, head, first, at, length, value, D: tl.constexpr, DP: tl.constexpr):
        d = tl.arange(0, DP)
        inside = (at < length)[:, None] & (d < D)[None, :]
        to = X + (first + at).to(tl.int64)[:, None] * stride + head * D + d[None, :]
        tl.store(to, value.to(X.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _forward(
        Q, K, V, step_q, step_k, step_v, OUT, LOG_SUM, ENDS, T, shared, scale, cap, window, heads,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        h = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        m0 = tl.program_id(0) * BLOCK
        if m0 < length:
            m = m0 + tl.arange(0, BLOCK)
            q = _rows(Q, step_q, h, first, m, length, D, DP)
            top = tl.full((BLOCK,), -float("inf"), tl.float32)
            total = tl.zeros((BLOCK,), tl.float32)
            acc = tl.zeros((BLOCK, DP), tl.float32)
            begin = 0
            if WINDOWED:
                begin = tl.maximum(m0 - window + 1, 0) // BLOCK * BLOCK
            for n0 in tl.range(begin, tl.minimum(m0 + BLOCK, length), BLOCK, num_stages=STAGES):
                n = n0 + tl.arange(0, BLOCK)
                k = _rows(K, step_k, h // shared, first, n, length, D, DP)
                v = _rows(V, step_v, h // shared, first, n, length, D, DP)
                s, _ = _capped(tl.dot(q, tl.trans(k)), scale, cap, CAPPED)
                s = tl.where(_sees(m, n, length, window, WINDOWED), s, -float("inf"))
                higher = tl.maximum(top, tl.max(s, 1))
                base = tl.where(higher == -float("inf"), 0.0, higher)  # of a query that has seen no key so far
                p = tl.exp(s - base[:, None])
                shrink = tl.exp(top - base)
                total = total * shrink + tl.sum(p, 1)
                acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
                top = higher
            total = tl.where(m < length, total, 1.0)
            _store_rows(OUT, heads * D, h, first, m, length, acc / total[:, None], D, DP)
            tl.store(LOG_SUM + h.to(tl.int64) * T + first + m, top + tl.log(total), m < length)

    @triton.jit(do_not_specialize=VARYING)
    def _inner(DO, O, INNER, T, heads, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr):  # noqa: E741
        t = tl.program_id(0).to(tl.int64)
        h, d = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, DP)
        inside = (h < heads)[:, None] & (d < D)[None, :]
        at = (t * heads + h)[:, None] * D + d[None, :]
        products = tl.load(DO + at, inside, 0.0).to(tl.float32) * tl.load(O + at, inside, 0.0).to(tl.float32)
        tl.store(INNER + h.to(tl.int64) * T + t, tl.sum(products, 1), h < heads)

    @triton.jit(do_not_specialize=VARYING)
    def _backward_q(
        Q, K, V, step_q, step_k, step_v, DO, LOG_SUM, INNER, ENDS, T, shared, scale, cap, window, heads, keys, DQ,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        h = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        m0 = tl.program_id(0) * BLOCK
        if m0 < length:
            m = m0 + tl.arange(0, BLOCK)
            q = _rows(Q, step_q, h, first, m, length, D, DP)
            d_out = _rows(DO, heads * D, h, first, m, length, D, DP)
            at = h.to(tl.int64) * T + first + m
            log_sum, inner = tl.load(LOG_SUM + at, m < length, 0.0), tl.load(INNER + at, m < length, 0.0)
            dq = tl.zeros((BLOCK, DP), tl.float32)
            begin = 0
            if WINDOWED:
                begin = tl.maximum(m0 - window + 1, 0) // BLOCK * BLOCK
            for n0 in tl.range(begin, tl.minimum(m0 + BLOCK, length), BLOCK, num_stages=STAGES):
                n = n0 + tl.arange(0, BLOCK)
                k = _rows(K, step_k, h // shared, first, n, length, D, DP)
                v = _rows(V, step_v, h // shared, first, n, length, D, DP)
                s, slope = _capped(tl.dot(q, tl.trans(k)), scale, cap, CAPPED)
                p = tl.where(_sees(m, n, length, window, WINDOWED), tl.exp(s - log_sum[:, None]), 0.0)
                ds = p * (tl.dot(d_out, tl.trans(v)) - inner[:, None]) * slope
                dq = tl.dot(ds.to(k.dtype), k, dq)
            _store_rows(DQ, heads * D, h, first, m, length, dq, D, DP)

    @triton.jit(do_not_specialize=VARYING)
    def _backward_kv(
        Q, K, V, step_q, step_k, step_v, DO, LOG_SUM, INNER, ENDS, T, shared, scale, cap, window, heads, keys, DK, DV,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK: tl.constexpr,
        STAGES: tl.constexpr,
    ):  # fmt: skip
        g = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        n0 = tl.program_id(0) * BLOCK
        if n0 < length:
            n = n0 + tl.arange(0, BLOCK)
            k = _rows(K, step_k, g, first, n, length, D, DP)
            v = _rows(V, step_v, g, first, n, length, D, DP)
            dk = tl.zeros((BLOCK, DP), tl.float32)
            dv = tl.zeros((BLOCK, DP), tl.float32)
            end = length
            if WINDOWED:
                end = tl.minimum(length, n0 + BLOCK - 1 + window)
            for h in range(g * shared, (g + 1) * shared):
                for m0 in tl.range(n0, end, BLOCK, num_stages=STAGES):
                    m = m0 + tl.arange(0, BLOCK)
                    q = _rows(Q, step_q, h, first, m, length, D, DP)
                    d_out = _rows(DO, heads * D, h, first, m, length, D, DP)
                    at = h * T.to(tl.int64) + first + m
                    log_sum, inner = tl.load(LOG_SUM + at, m < length, 0.0), tl.load(INNER + at, m < length, 0.0)
                    s, slope = _capped(tl.dot(q, tl.trans(k)), scale, cap, CAPPED)
                    p = tl.where(_sees(m, n, length, window, WINDOWED), tl.exp(s - log_sum[:, None]), 0.0)
                    dv = tl.dot(tl.trans(p.to(q.dtype)), d_out, dv)
                    ds = p * (tl.dot(d_out, tl.trans(v)) - inner[:, None]) * slope
                    dk = tl.dot(tl.trans(ds.to(q.dtype)), q, dk)
            _store_rows(DK, keys * D, g, first, n, length, dk, D, DP)
            _store_rows(DV, keys * D, g, first, n, length, dv, D, DP)
