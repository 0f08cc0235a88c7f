"""A token's way through attention with a cache of fixed memory: rotate and store, then look at what is stored.

For few texts the keys of a head are split over programs, which would else be as few as there are heads; each leaves
the maximum and the sum of its softmax and the values it found, and a second kernel joins them (Dao et al. 2023,
"Flash-decoding"). How long each text is lies on the device, so that a CUDA graph can hold both.
"""

import math

import torch
from torch import Tensor

from lit_qlora.kernels.launch import fitting, power_of_2, shared_memory, stages, tl, triton

KEYS_AT_ONCE = 32
LEAST_BYTES = 32
"""Of a row that tl.dot takes: 16 numbers of 16 bit, 8 of 32."""
BUSY_PROGRAMS = 256
"""Programs that keep a GPU busy, two for each multiprocessor of an H200. More would begin and end more often."""
MOST_KEYS = 512
"""Keys of a program, so that one long text among short ones does not wait for few programs."""
MOST_PARTS = 64  # programs that share the keys of a head; it goes before MOST_KEYS


def store(
    qkv: Tensor,
    lengths: Tensor,
    rope: tuple[Tensor, Tensor] | None,
    keys: Tensor,
    values: Tensor,
    heads: int,
    interleaved: bool = False,
) -> Tensor:
    """Rotate queries and keys, and put keys and values into the cache, behind what is there.

    Args:
        qkv: (B, (H + 2 K) D), contiguous, one token of each text.
        lengths: (B,) int64, tokens of each text before this one.
        rope: cosines and sines, each (B, R / 2) float32, contiguous; None where nothing is rotated. See kernels.rope.
        keys, values: (B, K, L, D), of the same strides, features contiguous.
        heads: H.

    Returns:
        The rotated queries, (B, H, D).
    """
    rows, groups, size = qkv.size(0), keys.size(1), keys.size(3)
    queries = torch.empty(rows, heads, size, device=qkv.device, dtype=qkv.dtype)
    cos, sin = rope or (lengths, lengths)
    half = cos.size(1) if rope else 0
    _store[(rows, heads + 2 * groups)](
        qkv, lengths, cos, sin, queries, keys, values, keys.stride(0), keys.stride(1), keys.stride(2), heads, groups,
        D=size, DP=power_of_2(size), HALF=half, STEP=2 if interleaved else 1, GAP=1 if interleaved else half,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
    return queries


def attend_reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    window: int | None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    chunked: bool = False,
) -> Tensor:
    """Compute attend in plain torch, in float32."""
    column = torch.arange(keys.size(2), device=keys.device)
    seen = column <= lengths[:, None]
    if window is not None:
        newest = lengths[:, None]
        seen &= column >= (newest // window * window if chunked else newest - window + 1)
    k, v = (t.float().repeat_interleave(queries.size(1) // keys.size(1), dim=1) for t in (keys, values))
    scores = (k @ queries.float()[..., None])[..., 0] * scale
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(len(scores), -1)[..., None]), dim=-1)
    shares = scores.softmax(-1)[..., : keys.size(2)]
    return (shares[:, :, None] @ v)[:, :, 0].flatten(1)


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    limit: int,
    scale: float | None = None,
    window: int | None = None,
    cap: float | None = None,
    sinks: Tensor | None = None,
    chunked: bool = False,
) -> Tensor:
    """Attention of one token of each text to the tokens before it and to itself.

    Args:
        queries: (B, H, D), contiguous.
        keys, values: (B, K, L, D), of the same strides, features contiguous.
        lengths: (B,) int64, tokens before this one.
        limit: no text has more columns than that with this token.
        scale: None for 1 / sqrt(D).
        window: number of tokens that a token sees, itself included; None for all before it.
        cap: scores x become cap * tanh(x / cap).
        sinks: (H,), contiguous, one more score in each head's softmax, without a value.
        chunked: every `window` tokens a chunk begins, and a token sees its own chunk alone.

    Returns:
        (B, H * D).
    """
    rows, heads, size = queries.shape
    groups = keys.size(1)
    each = _keys_of_a_program(limit, rows * groups)
    parts = triton.cdiv(limit, each)
    found = torch.empty(rows, heads, parts, size, device=queries.device, dtype=torch.float32)
    statistics = torch.empty(rows, heads, parts, 2, device=queries.device, dtype=torch.float32)
    out = torch.empty(rows, heads * size, device=queries.device, dtype=queries.dtype)
    shared = heads // groups
    padded, itemsize = (power_of_2(shared), power_of_2(size)), keys.element_size()
    room, column = shared_memory(keys) - math.prod(padded) * itemsize, 2 * padded[1] * itemsize
    at_once = fitting(KEYS_AT_ONCE, column + padded[0] * itemsize, room, LEAST_BYTES // itemsize)
    _attend[(rows * groups, parts)](
        queries, keys, values, keys.stride(0), keys.stride(1), keys.stride(2), lengths, found, statistics, groups,
        size**-0.5 if scale is None else scale, window or 0, cap or 0.0,
        CAPPED=cap is not None, CHUNKED=chunked and window is not None, EACH=each, BT=at_once, G=shared, GP=padded[0],
        D=size, DP=padded[1], num_warps=4, num_stages=stages(column * at_once, 3, room),
    )  # fmt: skip
    _join[(rows, heads)](
        found, statistics, lengths, lengths if sinks is None else sinks, out, parts,
        SINKS=sinks is not None, EACH=each, PP=power_of_2(parts, 1), D=size, DP=power_of_2(size), num_warps=4,
    )  # fmt: skip
    return out


def _keys_of_a_program(limit: int, heads: int) -> int:
    """A multiple of KEYS_AT_ONCE, for so many columns and heads of keys of all texts."""
    parts = min(MOST_PARTS, max(triton.cdiv(BUSY_PROGRAMS, heads), triton.cdiv(limit, MOST_KEYS)))
    return KEYS_AT_ONCE * triton.cdiv(triton.cdiv(limit, KEYS_AT_ONCE), parts)


if triton is not None:

    @triton.jit
    def _store(
        QKV, LENGTHS, COS, SIN, Q, KEYS, VALUES, step_row, step_head, step_column, heads, groups,
        D: tl.constexpr, DP: tl.constexpr, HALF: tl.constexpr, STEP: tl.constexpr, GAP: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        h = tl.program_id(1)
        d = tl.arange(0, DP)
        inside = d < D
        source = QKV + (t * (heads + 2 * groups) + h) * D
        x = tl.load(source + d, inside, 0.0)
        if HALF > 0:  # noqa: SIM102 - the first is decided when the kernel is compiled
            if h < heads + groups:
                # Feature d turns with its partner: the first of the two is a cos - b sin, the second b cos + a sin.
                angle = d % HALF if STEP == 1 else d // 2
                first = d < HALF if STEP == 1 else d % 2 == 0
                turns = d < 2 * HALF
                other = tl.load(source + tl.where(first, d + GAP, d - GAP), turns, 0.0).to(tl.float32)
                c = tl.load(COS + t * HALF + angle, turns, 1.0)
                s = tl.load(SIN + t * HALF + angle, turns, 0.0)
                turned = x.to(tl.float32) * c + tl.where(first, -other, other) * s
                x = tl.where(turns, turned.to(x.dtype), x)
        at = t * step_row + tl.load(LENGTHS + t) * step_column
        if h < heads:
            tl.store(Q + (t * heads + h) * D + d, x, inside)
        elif h < heads + groups:
            tl.store(KEYS + at + (h - heads) * step_head + d, x, inside)
        else:
            tl.store(VALUES + at + (h - heads - groups) * step_head + d, x, inside)

    @triton.jit
    def _attend(
        Q, KEYS, VALUES, step_row, step_head, step_column, LENGTHS, FOUND, STATISTICS, groups, scale, window, cap,
        CAPPED: tl.constexpr, CHUNKED: tl.constexpr, EACH: tl.constexpr, BT: tl.constexpr, G: tl.constexpr,
        GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ):  # fmt: skip
        t = (tl.program_id(0) // groups).to(tl.int64)
        group = tl.program_id(0) % groups
        part = tl.program_id(1)
        newest = tl.load(LENGTHS + t).to(tl.int32)
        begin = part * EACH
        if begin <= newest:
            g = tl.arange(0, GP)
            d = tl.arange(0, DP)
            in_d = (d < D)[None, :]
            head = t * groups * G + group * G + g
            q = tl.load(Q + head[:, None] * D + d[None, :], (g < G)[:, None] & in_d, 0.0)
            base = t * step_row + group * step_head
            top = tl.full((GP,), -float("inf"), tl.float32)
            total = tl.zeros((GP,), tl.float32)
            sums = tl.zeros((GP, DP), tl.float32)
            oldest = 0
            if CHUNKED:
                oldest = newest // window * window
            elif window > 0:
                oldest = newest - window + 1
            first = begin + tl.maximum(oldest - begin, 0) // BT * BT
            for c0 in range(first, min(begin + EACH, newest + 1), BT):
                c = c0 + tl.arange(0, BT)
                seen = (c >= oldest) & (c <= newest)
                at = base + c.to(tl.int64)[:, None] * step_column + d[None, :]
                k = tl.load(KEYS + at, seen[:, None] & in_d, 0.0)
                v = tl.load(VALUES + at, seen[:, None] & in_d, 0.0)
                scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
                if CAPPED:
                    scores = cap * (2.0 * tl.sigmoid(2.0 * scores / cap) - 1.0)  # tanh
                scores = tl.where(seen[None, :], scores, -float("inf"))
                higher = tl.maximum(top, tl.max(scores, 1))
                # A window can leave nothing of a part to be seen.
                level = tl.where(higher == -float("inf"), 0.0, higher)
                p = tl.exp(scores - level[:, None])
                shrink = tl.exp(top - level)
                total = total * shrink + tl.sum(p, 1)
                sums = tl.dot(p.to(v.dtype), v, sums * shrink[:, None], input_precision="ieee")
                top = higher
            to = head * tl.num_programs(1) + part
            tl.store(STATISTICS + to * 2, top, g < G)
            tl.store(STATISTICS + to * 2 + 1, total, g < G)
            tl.store(FOUND + to[:, None] * D + d[None, :], sums, (g < G)[:, None] & in_d)

    @triton.jit
    def _join(
        FOUND, STATISTICS, LENGTHS, SINK, OUT, parts,
        SINKS: tl.constexpr, EACH: tl.constexpr, PP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        head = t * tl.num_programs(1) + tl.program_id(1)
        p = tl.arange(0, PP)
        d = tl.arange(0, DP)
        used = (p < parts) & (p * EACH <= tl.load(LENGTHS + t))
        at = head * parts + p
        top = tl.load(STATISTICS + at * 2, used, -float("inf"))
        highest = tl.max(top, 0)
        if SINKS:
            sink = tl.load(SINK + tl.program_id(1)).to(tl.float32)
            highest = tl.maximum(highest, sink)
        share = tl.exp(top - highest)
        total = tl.sum(share * tl.load(STATISTICS + at * 2 + 1, used, 0.0), 0)
        if SINKS:
            total += tl.exp(sink - highest)
        sums = tl.load(FOUND + at[:, None] * D + d[None, :], used[:, None] & (d < D)[None, :], 0.0)
        y = tl.sum(sums * share[:, None], 0) / total
        tl.store(OUT + head * D + d, y.to(OUT.dtype.element_ty), d < D)
