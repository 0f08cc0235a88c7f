"""Causal attention with capped scores or large heads, forward and backward, without a matrix of all scores.

Scores s become cap tanh(s / cap) (Gemma Team 2024, "Gemma 2"). Softmax runs over blocks of keys as they are read (Dao
et al. 2022, "FlashAttention"); the backward pass computes the scores again, and with dropout the factors of the
weights. Documents lie end to end; a token attends to its own document, within a window if there is one. One program
makes each sum, so results repeat bit for bit.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout
from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, shared_memory, stages, tiled, tl, triton

if triton is not None:
    from lit_qlora.kernels.dropout import pair_factor, row_hashes

LOG2_E = 1.4426950408889634
TURING = 64 * 2**10
"""Bytes of shared memory of a card without matrix units for Triton, which multiplies in float32 there."""
SPARE = 8 * 2**10
"""Bytes of shared memory for what Triton exchanges between threads."""


@dataclass(frozen=True)
class Scores:
    """The scores of queries and keys.

    Attributes:
        scale: factor of their products.
        cap: None for no cap.
        window: tokens that a token attends to, itself included; None for all before it.
        dropout: of their softmax: row h T + t is query t of head h, a column is a key of its document.
    """

    scale: float
    cap: float | None = None
    window: int | None = None
    dropout: Dropout = NONE


def takes(size: int, element: int, room: int) -> bool:
    """Tell whether a card with `room` bytes of shared memory takes heads of `size` features of `element` bytes."""
    if size % 16 or size > MOST:
        return False
    return all(_fitting(size, element, room, kernel) is not None for kernel in KERNELS)


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
    blocks = _blocks(q, FORWARD)
    _forward[(cdiv(longest, blocks.own), len(ends) - 1, heads)](
        _own(q, blocks), _read(k, blocks), _read(v, blocks), q.stride(0), k.stride(0), v.stride(0), out, log_sum, ends,
        tokens, heads // k.size(1), *_of_scores(scores), heads, **_settings(q, scores, blocks),
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
    strides = q.stride(0), k.stride(0), v.stride(0)
    rest = log_sum, inner, ends, tokens, heads // keys, *_of_scores(scores), heads, keys, scores.scale
    blocks = _blocks(q, BACKWARD_Q)
    grid = cdiv(longest, blocks.own), len(ends) - 1, heads
    read = _read(k, blocks), _read(v, blocks)
    own = _own(q, blocks), _own(d_out, blocks)
    _backward_q[grid](own[0], *read, *strides, own[1], *rest, dq, **_settings(q, scores, blocks))
    for kernel in (BACKWARD_KV, BACKWARD_V) if size > LARGE else (BACKWARD_KV,):
        blocks = _blocks(q, kernel)
        grid = cdiv(longest, blocks.own), len(ends) - 1, keys
        parts = {"OF_KEYS": kernel is BACKWARD_KV, "OF_VALUES": kernel is BACKWARD_V or size <= LARGE}
        read = _read(q, blocks), _read(d_out, blocks)
        _backward_kv[grid](
            read[0],
            _own(k, blocks),
            _own(v, blocks),
            *strides,
            read[1],
            *rest,
            dk,
            dv,
            **parts,
            **_settings(q, scores, blocks),
        )
    return dq, dk, dv


@dataclass(frozen=True)
class Blocks:
    """The work of a program.

    Attributes:
        own: tokens that it computes for, queries or keys.
        other: tokens that it reads at a time.
        warps: of Triton.
        stages: at most so many of its reads are in flight.
        apart: its warps share the scores of a block, each the part of a row; see _products.
    """

    own: int
    other: int
    warps: int
    stages: int = 2
    apart: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel's need of shared memory, and its fastest blocks.

    Attributes:
        own, other: tensors of its own tokens that it holds, and of the tokens that it reads.
        small, large, huge: blocks for heads of up to 128 features, of up to 256 and of more, where the card has the
            shared memory: the fastest of 6 to 10 on an H200 for heads of 128, of 256 and of 512.
    """

    own: int
    other: int
    small: Blocks
    large: Blocks
    huge: Blocks


MOST = 512
"""Features of the largest heads."""
LARGE = 256
"""Features above which a head is huge. A program then has the accumulators of keys or of values, not of both."""
FORWARD = Kernel(1, 2, Blocks(64, 64, 4), Blocks(128, 64, 8), Blocks(64, 64, 8, stages=1, apart=True))
BACKWARD_Q = Kernel(2, 2, Blocks(64, 64, 4), Blocks(128, 64, 8), Blocks(64, 32, 8, stages=1, apart=True))
BACKWARD_KV = Kernel(2, 2, Blocks(64, 32, 4), Blocks(64, 64, 8, stages=1), Blocks(64, 32, 8, stages=1, apart=True))
BACKWARD_V = replace(BACKWARD_KV, own=1, huge=FORWARD.huge)
"""Without the gradient of keys."""
KERNELS = (FORWARD, BACKWARD_Q, BACKWARD_KV, BACKWARD_V)
LESS = (Blocks(64, 32, 4), Blocks(32, 32, 4), Blocks(16, 16, 4))
"""Blocks for cards with less shared memory: the first that fits. Huge heads in such blocks are slower than in torch."""


def _blocks(q: Tensor, kernel: Kernel) -> Blocks:
    """The blocks of a kernel that the card of q has the shared memory for."""
    return _fitting(q.size(2), q.element_size(), shared_memory(q), kernel) or replace(LESS[-1], stages=1)


def _fitting(size: int, element: int, room: int, kernel: Kernel) -> Blocks | None:
    """See _blocks; None where even the least may take more."""
    padded = power_of_2(size)
    row = padded * (element if room > TURING else 4)
    room -= SPARE
    best = kernel.huge if padded > LARGE else kernel.large if padded > 128 else kernel.small
    for blocks in (best, *(() if padded > LARGE else LESS)):
        own, other = kernel.own * blocks.own * row, kernel.other * blocks.other * row
        if own + other <= room:
            return replace(blocks, stages=stages(other, blocks.stages, room - own))
    return None


def _own(x: Tensor, blocks: Blocks) -> Any:
    """A tensor (T, heads, D) as a kernel holds a block of its own tokens, zeros where a head's block is wider."""
    return _tiled(x, blocks.own) if power_of_2(x.size(2)) == x.size(2) > LARGE else x


def _read(x: Tensor, blocks: Blocks) -> Any:
    """A tensor (T, heads, D) as a kernel reads it block after block."""
    return _tiled(x, blocks.other) if x.size(2) > LARGE else x


def _tiled(x: Tensor, tokens: int) -> Any:
    if x.stride(0) * x.element_size() % 16:
        x = x.contiguous()
    flat = x.as_strided((x.size(0), x.size(1) * x.size(2)), (x.stride(0), 1))
    return tiled(flat, tokens, power_of_2(x.size(2)))


def _of_scores(scores: Scores) -> tuple[Any, ...]:
    """The factor of a product for tanh, or a softmax in powers of two; the score where tanh is 1; window; dropout."""
    capped = (scores.scale * LOG2_E, 1.0) if scores.cap is None else (scores.scale / scores.cap, scores.cap * LOG2_E)
    drop = scores.dropout
    return *capped, scores.window or 0, drop.seed, drop.offset, drop.threshold, drop.scale


def _settings(q: Tensor, scores: Scores, blocks: Blocks) -> dict[str, int]:
    size = q.size(2)
    return {
        "D": size,
        "DP": power_of_2(size),
        "CAPPED": scores.cap is not None,
        "WINDOWED": scores.window is not None,
        "DROP": scores.dropout.p > 0,
        "OWN": blocks.own,
        "OTHER": blocks.other,
        "STAGES": blocks.stages,
        "TILED": size > LARGE,
        "APART": blocks.apart,
        "num_warps": blocks.warps,
    }


if triton is not None:

    @triton.jit
    def _capped(s, factor, cap, CAPPED: tl.constexpr):
        """The scores in powers of two, and their slope by the products that they are made of, divided by log2(e)."""
        s *= factor
        slope = tl.full(s.shape, 1.0, tl.float32)
        if CAPPED:
            t = 1 - 2 / (1 + tl.exp2(2 * 1.4426950408889634 * s))  # tanh
            s = cap * t
            slope = 1 - t * t
        return s, slope

    @triton.jit
    def _sees(m, n, length, window, WINDOWED: tl.constexpr):
        """Tell whether queries m (BM,) attend to keys n (BN,) of their document."""
        seen = (n[None, :] <= m[:, None]) & (n < length)[None, :] & (m < length)[:, None]
        if WINDOWED:
            seen = seen & (n[None, :] > m[:, None] - window)
        return seen

    @triton.jit
    def _rows(X, stride, head, first, at, length, MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr):
        """A block (B, D) of one head: the tokens `at` of a document, which need no mask where all lie inside it."""
        d = tl.arange(0, DP)
        rows = X + (first + at).to(tl.int64)[:, None] * stride + head * D + d[None, :]
        if MASKED:
            return tl.load(rows, (at < length)[:, None] & (d < D)[None, :], 0.0)
        if D == DP:
            return tl.load(rows)
        return tl.load(rows, (d < D)[None, :], 0.0)

    @triton.jit
    def _products(a, b, length, M: tl.constexpr, N: tl.constexpr, APART: tl.constexpr):
        """The products (M, N) of two blocks of rows; APART, the warps share them.

        Triton has each warp compute whole rows where another dot reads what becomes of them. Of 64 rows and 8 warps
        half then repeat the other half. It looks no further than the end of a loop, here of one turn.
        """
        if APART:
            products = tl.zeros((M, N), tl.float32)
            for _ in tl.range(0, tl.minimum(length, 1), num_stages=1):
                products = tl.dot(a, b, products)
            return products
        else:  # noqa: RET505 - Triton compiles what stands behind a return
            return tl.dot(a, b)

    @triton.jit
    def _block(
        X, stride, head, first, at0, length, B: tl.constexpr, MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
        TILED: tl.constexpr,
    ):  # fmt: skip
        """The block of one head from token at0 on; a tiled one has tokens behind the document, which weigh nothing."""
        if TILED:
            return X.load([first + at0, head * D])
        else:  # noqa: RET505 - Triton compiles what stands behind a return
            return _rows(X, stride, head, first, at0 + tl.arange(0, B), length, MASKED, D, DP)

    @triton.jit
    def _store_rows(X, stride, head, first, at, length, value, D: tl.constexpr, DP: tl.constexpr):
        d = tl.arange(0, DP)
        inside = (at < length)[:, None] & (d < D)[None, :]
        to = X + (first + at).to(tl.int64)[:, None] * stride + head * D + d[None, :]
        tl.store(to, value.to(X.dtype.element_ty), inside)

    @triton.jit
    def _read_keys(
        acc, total, top, q, m, drawn, K, V, step_k, step_v, group, first, length, factor, cap, window, threshold, grown,
        begin, end,
        MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
        DROP: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
    ):  # fmt: skip
        """Go on with the softmax of queries m over the keys from `begin` to `end`."""
        for n0 in tl.range(begin, end, OTHER, num_stages=STAGES):
            n = n0 + tl.arange(0, OTHER)
            k = _block(K, step_k, group, first, n0, length, OTHER, MASKED, D, DP, TILED)
            v = _block(V, step_v, group, first, n0, length, OTHER, MASKED, D, DP, TILED)
            s, _ = _capped(_products(q, tl.trans(k), length, q.shape[0], OTHER, APART), factor, cap, CAPPED)
            if MASKED:
                s = tl.where(_sees(m, n, length, window, WINDOWED), s, -float("inf"))
            higher = tl.maximum(top, tl.max(s, 1))
            base = higher
            if MASKED:
                base = tl.where(higher == -float("inf"), 0.0, higher)  # of a query that has seen no key so far
            p = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            total = total * shrink + tl.sum(p, 1)
            if DROP:
                p *= pair_factor(drawn, n, threshold, grown)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
            top = higher
        return acc, total, top

    @triton.jit
    def _drawn(h, t, T, SEED, offset, DROP: tl.constexpr):
        """The hashes for pair_factor of queries t of head h, if there is dropout."""
        if DROP:
            return row_hashes(h * T + t, SEED, offset)
        else:  # noqa: RET505 - Triton compiles what stands behind a return
            return t

    @triton.jit
    def _first_key(m0, window, OTHER: tl.constexpr, WINDOWED: tl.constexpr):
        """The first key that queries from m0 on attend to."""
        begin = 0
        if WINDOWED:
            begin = tl.maximum(m0 - window + 1, 0) // OTHER * OTHER
        return begin

    @triton.jit(do_not_specialize=VARYING)
    def _forward(
        Q, K, V, step_q, step_k, step_v, OUT, LOG_SUM, ENDS, T, shared, factor, cap, window, SEED, offset, threshold,
        grown, heads,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, DROP: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
    ):  # fmt: skip
        h = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN  # those with most keys begin first
        if m0 < length:
            m = m0 + tl.arange(0, OWN)
            q = _block(Q, step_q, h, first, m0, length, OWN, True, D, DP, TILED and D == DP)
            top = tl.full((OWN,), -float("inf"), tl.float32)
            total = tl.zeros((OWN,), tl.float32)
            acc = tl.zeros((OWN, DP), tl.float32)
            drawn = _drawn(h, first + m, T, SEED, offset, DROP)
            begin = _first_key(m0, window, OTHER, WINDOWED)
            acc, total, top = _read_keys(
                acc, total, top, q, m, drawn, K, V, step_k, step_v, h // shared, first, length, factor, cap, window,
                threshold, grown, begin, m0, WINDOWED, D, DP, CAPPED, WINDOWED, DROP, OTHER, STAGES, TILED, APART,
            )  # fmt: skip
            begin = tl.maximum(begin, m0)
            acc, total, top = _read_keys(
                acc, total, top, q, m, drawn, K, V, step_k, step_v, h // shared, first, length, factor, cap, window,
                threshold, grown, begin, tl.minimum(m0 + OWN, length), True, D, DP, CAPPED, WINDOWED, DROP, OTHER,
                STAGES, TILED, APART,
            )  # fmt: skip
            total = tl.where(m < length, total, 1.0)
            _store_rows(OUT, heads * D, h, first, m, length, acc / total[:, None], D, DP)
            tl.store(LOG_SUM + h.to(tl.int64) * T + first + m, top * 0.6931471805599453 + tl.log(total), m < length)

    @triton.jit(do_not_specialize=VARYING)
    def _inner(DO, O, INNER, T, heads, D: tl.constexpr, DP: tl.constexpr, BH: tl.constexpr):  # noqa: E741
        t = tl.program_id(0).to(tl.int64)
        h, d = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, DP)
        inside = (h < heads)[:, None] & (d < D)[None, :]
        at = (t * heads + h)[:, None] * D + d[None, :]
        products = tl.load(DO + at, inside, 0.0).to(tl.float32) * tl.load(O + at, inside, 0.0).to(tl.float32)
        tl.store(INNER + h.to(tl.int64) * T + t, tl.sum(products, 1), h < heads)

    @triton.jit
    def _add_to_queries(
        dq, q, d_out, log_sum, inner, m, drawn, K, V, step_k, step_v, group, first, length, factor, cap, window,
        threshold, grown, begin, end,
        MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
        DROP: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
    ):  # fmt: skip
        """Add to the gradient of queries m from the keys from `begin` to `end`."""
        for n0 in tl.range(begin, end, OTHER, num_stages=STAGES):
            n = n0 + tl.arange(0, OTHER)
            k = _block(K, step_k, group, first, n0, length, OTHER, MASKED, D, DP, TILED)
            v = _block(V, step_v, group, first, n0, length, OTHER, MASKED, D, DP, TILED)
            s, slope = _capped(_products(q, tl.trans(k), length, q.shape[0], OTHER, APART), factor, cap, CAPPED)
            p = tl.exp2(s - log_sum[:, None])
            if MASKED:
                p = tl.where(_sees(m, n, length, window, WINDOWED), p, 0.0)
            dp = _products(d_out, tl.trans(v), length, q.shape[0], OTHER, APART)
            if DROP:
                dp *= pair_factor(drawn, n, threshold, grown)
            ds = p * (dp - inner[:, None]) * slope
            dq = tl.dot(ds.to(k.dtype), k, dq)
        return dq

    @triton.jit(do_not_specialize=VARYING)
    def _backward_q(
        Q, K, V, step_q, step_k, step_v, DO, LOG_SUM, INNER, ENDS, T, shared, factor, cap, window, SEED, offset,
        threshold, grown, heads, keys, scale, DQ,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, DROP: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
    ):  # fmt: skip
        h = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        m0 = (tl.num_programs(0) - 1 - tl.program_id(0)) * OWN
        if m0 < length:
            m = m0 + tl.arange(0, OWN)
            q = _block(Q, step_q, h, first, m0, length, OWN, True, D, DP, TILED and D == DP)
            d_out = _block(DO, heads * D, h, first, m0, length, OWN, True, D, DP, TILED and D == DP)
            at = h.to(tl.int64) * T + first + m
            log_sum, inner = tl.load(LOG_SUM + at, m < length, 0.0), tl.load(INNER + at, m < length, 0.0)
            log_sum *= 1.4426950408889634
            dq = tl.zeros((OWN, DP), tl.float32)
            drawn = _drawn(h, first + m, T, SEED, offset, DROP)
            begin = _first_key(m0, window, OTHER, WINDOWED)
            dq = _add_to_queries(
                dq, q, d_out, log_sum, inner, m, drawn, K, V, step_k, step_v, h // shared, first, length, factor, cap,
                window, threshold, grown, begin, m0, WINDOWED, D, DP, CAPPED, WINDOWED, DROP, OTHER, STAGES, TILED,
                APART,
            )  # fmt: skip
            begin = tl.maximum(begin, m0)
            dq = _add_to_queries(
                dq, q, d_out, log_sum, inner, m, drawn, K, V, step_k, step_v, h // shared, first, length, factor, cap,
                window, threshold, grown, begin, tl.minimum(m0 + OWN, length), True, D, DP, CAPPED, WINDOWED, DROP,
                OTHER, STAGES, TILED, APART,
            )  # fmt: skip
            _store_rows(DQ, heads * D, h, first, m, length, dq * scale, D, DP)

    @triton.jit
    def _add_to_keys(
        dk, dv, k, v, n, Q, DO, step_q, step_o, LOG_SUM, INNER, T, h, first, length, factor, cap, window, SEED, offset,
        threshold, grown, begin, end,
        MASKED: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
        DROP: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
        OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    ):  # fmt: skip
        """Add to the gradients of keys and values n from the queries from `begin` to `end` of head h."""
        for m0 in tl.range(begin, end, OTHER, num_stages=STAGES):
            m = m0 + tl.arange(0, OTHER)
            q = _block(Q, step_q, h, first, m0, length, OTHER, True, D, DP, TILED)
            d_out = _block(DO, step_o, h, first, m0, length, OTHER, True, D, DP, TILED)
            at = h * T.to(tl.int64) + first + m
            log_sum = tl.load(LOG_SUM + at, m < length, float("inf"))  # a query behind the document has no weight
            inner = tl.load(INNER + at, m < length, 0.0)
            s, slope = _capped(_products(k, tl.trans(q), length, k.shape[0], OTHER, APART), factor, cap, CAPPED)
            p = tl.exp2(s - (1.4426950408889634 * log_sum)[None, :])
            if MASKED:
                p = tl.where(tl.trans(_sees(m, n, length, window, WINDOWED)), p, 0.0)
            weights = p
            if DROP:
                drawn = _drawn(h, first + m, T, SEED, offset, DROP)
                kept = tl.trans(pair_factor(drawn, n, threshold, grown))
                weights *= kept
            if OF_VALUES:
                dv = tl.dot(weights.to(q.dtype), d_out, dv)
            if OF_KEYS:
                dp = _products(v, tl.trans(d_out), length, k.shape[0], OTHER, APART)
                if DROP:
                    dp *= kept
                ds = p * (dp - inner[None, :]) * slope
                dk = tl.dot(ds.to(q.dtype), q, dk)
        return dk, dv

    @triton.jit(do_not_specialize=VARYING)
    def _backward_kv(
        Q, K, V, step_q, step_k, step_v, DO, LOG_SUM, INNER, ENDS, T, shared, factor, cap, window, SEED, offset,
        threshold, grown, heads, keys, scale, DK, DV,
        D: tl.constexpr, DP: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, DROP: tl.constexpr,
        OWN: tl.constexpr, OTHER: tl.constexpr, STAGES: tl.constexpr, TILED: tl.constexpr, APART: tl.constexpr,
        OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
    ):  # fmt: skip
        g = tl.program_id(2)
        first = tl.load(ENDS + tl.program_id(1))
        length = tl.load(ENDS + tl.program_id(1) + 1) - first
        n0 = tl.program_id(0) * OWN
        if n0 < length:
            n = n0 + tl.arange(0, OWN)
            k = _block(K, step_k, g, first, n0, length, OWN, True, D, DP, TILED and D == DP)
            v = _block(V, step_v, g, first, n0, length, OWN, True, D, DP, TILED and D == DP)
            dk = tl.zeros((OWN, DP if OF_KEYS else 1), tl.float32)
            dv = tl.zeros((OWN, DP if OF_VALUES else 1), tl.float32)
            end = length
            if WINDOWED:
                end = tl.minimum(length, n0 + OWN - 1 + window)
            for h in range(g * shared, (g + 1) * shared):
                dk, dv = _add_to_keys(
                    dk, dv, k, v, n, Q, DO, step_q, heads * D, LOG_SUM, INNER, T, h, first, length, factor, cap, window,
                    SEED, offset, threshold, grown, n0, tl.minimum(n0 + OWN, end), True, D, DP, CAPPED, WINDOWED, DROP,
                    OTHER, STAGES, TILED, APART, OF_KEYS, OF_VALUES,
                )  # fmt: skip
                dk, dv = _add_to_keys(
                    dk, dv, k, v, n, Q, DO, step_q, heads * D, LOG_SUM, INNER, T, h, first, length, factor, cap, window,
                    SEED, offset, threshold, grown, n0 + OWN, end, WINDOWED, D, DP, CAPPED, WINDOWED, DROP, OTHER,
                    STAGES, TILED, APART, OF_KEYS, OF_VALUES,
                )  # fmt: skip
            if OF_KEYS:
                _store_rows(DK, keys * D, g, first, n, length, dk * scale, D, DP)
            if OF_VALUES:
                _store_rows(DV, keys * D, g, first, n, length, dv, D, DP)
