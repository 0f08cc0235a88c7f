"""Mixtures of experts: which experts a token takes, its choices sorted by expert, and the sum over them.

T tokens choose k experts each. The C = T k choices are sorted by expert, and within an expert by token. So each expert
reads a run of rows; the other kernels of experts gather a token's row where it is needed. Products take these rows in
tiles, and sums over rows in chunks, that never reach from one expert into the next. Tables made on the device say where
each begins. The host knows only their largest possible number and starts as many programs; programs behind the last one
return. So the host never asks the device. Gale et al. 2022 (MegaBlocks) sort alike.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, tl, triton

TILE = 128  # rows that a product takes at a time; where an expert has few left, half or a quarter of them
CHUNK = 512  # rows of one program that sums over rows, at least
TOKENS = 32  # of a group, whose choices a program counts
MOST_WARPS = 16  # of a program that chooses or counts, for 128 experts and more: a GPU has no more groups than room
PLACED = 256  # choices that a program places


@dataclass(frozen=True)
class Choices:
    """The choices of T tokens, sorted.

    Attributes:
        chosen: (T, k) int32, experts; weights: (T, k) float32, how much each counts.
        position: (T, k) int32, where the choice lies among the sorted ones.
        token, weight: (C,) of each sorted choice, int32 and float32.
        ends: (n_expert + 1,) int32: expert e owns rows ends[e] to ends[e + 1].
        tiles: int32, the expert of each tile, from `most_tiles` on the first row of each, and their number.
        chunks: int32, the same of chunks, and then the first chunk of each expert.
        tile, chunk: rows of a tile and of a chunk, but for the last of an expert.
        most_tiles, most_chunks: how many there can be.
    """

    chosen: Tensor
    weights: Tensor
    position: Tensor
    token: Tensor
    weight: Tensor
    ends: Tensor
    tiles: Tensor
    chunks: Tensor
    tile: int
    chunk: int
    most_tiles: int
    most_chunks: int

    @property
    def rows(self) -> int:
        """C, the number of choices."""
        return self.token.numel()

    @property
    def experts(self) -> int:
        """Number of experts to choose from."""
        return self.ends.numel() - 1

    def each(self) -> list[tuple[int, slice]]:
        """Experts that were chosen, with their rows. Waits for the device: for references and tests."""
        ends = self.ends.tolist()
        return [(e, slice(*bounds)) for e, bounds in enumerate(pairwise(ends)) if bounds[0] < bounds[1]]


def choose_reference(scores: Tensor, k: int, scale: float) -> tuple[Tensor, Tensor]:
    """Choose in plain torch."""
    best, chosen = scores.topk(k)
    return scale * best.softmax(dim=-1), chosen.int()


@dataclass(frozen=True)
class Counts:
    """Choices as they are counted for `sort`, in groups of TOKENS tokens; all int32.

    Attributes:
        each: (groups, n_expert), how many choose an expert.
        before: (T, k), how many of its group choose a choice's expert before it.
    """

    each: Tensor
    before: Tensor

    @staticmethod
    def room(tokens: int, k: int, experts: int, device: torch.device) -> "Counts":
        """Room for those of so many tokens that choose `k` of so many experts."""
        shapes = ((cdiv(tokens, TOKENS), experts), (tokens, k))
        return Counts(*(torch.empty(shape, dtype=torch.int32, device=device) for shape in shapes))


def choose(scores: Tensor, k: int, scale: float = 1.0, counts: Counts | None = None) -> tuple[Tensor, Tensor]:
    """The k experts with the best scores, and the softmax of theirs times `scale`: weights and experts, both (T, k).

    The softmax over all experts, divided by the sum over the chosen ones, is the same function.

    Args:
        scores: (T, n_expert) float32, contiguous.
        counts: filled for `sort`.
    """
    tokens, experts = scores.shape
    weights = torch.empty(tokens, k, dtype=torch.float32, device=scores.device)
    chosen = torch.empty(tokens, k, dtype=torch.int32, device=scores.device)
    each, before = (chosen, chosen) if counts is None else (counts.each, counts.before)
    _choose[(cdiv(tokens, TOKENS),)](
        scores, weights, chosen, each, before, tokens, scale, COUNTS=counts is not None,
        E=experts, EP=power_of_2(experts), K=k, KP=power_of_2(k, 2), BT=TOKENS, num_warps=_warps(experts),
    )  # fmt: skip
    return weights, chosen


def _warps(experts: int) -> int:
    return min(MOST_WARPS, max(4, power_of_2(experts) // 8))


def choose_backward_reference(choices: Choices, d_weights: Tensor, scale: float) -> Tensor:
    """Compute choose_backward in plain torch, in float32."""
    w = choices.weights
    d_scores = w * (d_weights - (w * d_weights).sum(dim=1, keepdim=True) / scale)
    return d_scores.new_zeros(len(w), choices.experts).scatter_(1, choices.chosen.long(), d_scores)


def choose_backward(choices: Choices, d_weights: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """The gradient of the scores, (T, n_expert) in `dtype`, from that of the weights, (T, k) float32."""
    tokens, k = d_weights.shape
    d_scores = torch.empty(tokens, choices.experts, dtype=dtype, device=d_weights.device)
    _choose_backward[(cdiv(tokens, 16),)](
        choices.weights, choices.chosen, d_weights, d_scores, tokens, scale,
        E=choices.experts, EP=power_of_2(choices.experts), K=k, KP=power_of_2(k, 2), BT=16, num_warps=4,
    )  # fmt: skip
    return d_scores


def sort_reference(weights: Tensor, chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sort in plain torch: position, token, weight and ends of Choices."""
    order = chosen.flatten().long().argsort(stable=True)
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    ends = chosen.flatten().long().bincount(minlength=experts).cumsum(0)
    return position.view_as(chosen).int(), (order // chosen.size(1)).int(), weights.flatten()[order], ends.int()


def sort(
    weights: Tensor,
    chosen: Tensor,
    experts: int,
    tile: int = TILE,
    chunk: int = CHUNK,
    taken: Tensor | None = None,
    counts: Counts | None = None,
) -> Choices:
    """Sort choices by expert, stably, by counting.

    Args:
        weights: (T, k) float32; chosen: (T, k) int32, different ones in a row; both contiguous.
        experts: how many there are to choose from.
        tile, chunk: see Choices; a chunk becomes longer where experts have many rows on average.
        taken: (n_expert,) int64, to which the number of choices of each expert is added.
        counts: if `choose` has filled them; used up.
    """
    (tokens, k), device = chosen.shape, chosen.device
    rows, sizes = tokens * k, {"E": experts, "EP": power_of_2(experts)}
    if counts is None:
        counts = Counts.room(tokens, k, experts, device)
        _count[(cdiv(tokens, TOKENS),)](
            chosen, counts.each, counts.before, tokens, **sizes, K=k, BT=TOKENS, num_warps=_warps(experts)
        )

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device=device)

    # Few experts have more than one chunk, so that little is added up once more.
    chunk = max(chunk, cdiv(3 * rows, 2 * experts * 256) * 256)
    most_tiles, most_chunks = (rows // each + min(experts, rows) for each in (tile, chunk))
    choices = Choices(
        chosen, weights, counts.before, ints(rows), torch.empty(rows, dtype=torch.float32, device=device),
        ints(experts + 1), ints(2 * most_tiles + 1), ints(2 * most_chunks + 1 + experts),
        tile, chunk, most_tiles, most_chunks,
    )  # fmt: skip
    _offsets[(1,)](
        counts.each, choices.ends, choices.tiles, most_tiles, choices.chunks, most_chunks, chunk, len(counts.each),
        choices.ends if taken is None else taken, TAKEN=taken is not None,
        **sizes, BG=max(16, 8192 // power_of_2(experts)), TILE=tile, num_warps=8,
    )  # fmt: skip
    _place[(cdiv(rows, PLACED),)](
        weights, chosen, counts.each, choices.position, choices.token, choices.weight, rows,
        E=experts, K=k, BT=TOKENS, BLOCK=PLACED, num_warps=4,
    )  # fmt: skip
    return choices


def of_tokens(parts: Tensor, choices: Choices) -> Tensor:
    """The sum over S of parts (S, C), each token's own: (T, k) float32."""
    out = torch.empty_like(choices.weights)
    count = out.numel()
    _of_tokens[(cdiv(count, 64),)](
        parts, choices.position, out, count, SPLITS=parts.size(0), AT_ONCE=16, BLOCK=64, num_warps=4
    )  # fmt: skip
    return out


def combine_reference(y: Tensor, choices: Choices, more: Tensor | None) -> Tensor:
    """Combine in plain torch."""
    total = y[choices.position.long()].sum(dim=1)
    return total if more is None else total + more


def combine(y: Tensor, choices: Choices, more: Tensor | None = None) -> Tensor:
    """The sum over each token's rows of y (C, N), and of `more` (T, N) if there is any: (T, N).

    In the order of the choices, in float32, rounded once.
    """
    (tokens, k), n = choices.position.shape, y.size(1)
    out = torch.empty(tokens, n, dtype=y.dtype, device=y.device)
    block = min(4096, power_of_2(n))
    beside = y if more is None else more
    _combine[(tokens, cdiv(n, block))](
        y, choices.position, beside, beside.stride(0), out, n, K=k, HAS_MORE=more is not None, BLOCK=block, num_warps=4
    )
    return out


if triton is not None:
    LOWEST = tl.constexpr(torch.finfo(torch.float32).min)

    @triton.jit
    def _leave_counts(EACH, BEFORE, found, which, t, e, E: tl.constexpr, K: tl.constexpr):
        """Write the counts of a group.

        Args:
            found, which: (BT, EP), 1 where a token has chosen an expert, and the number of that choice among its own.
        """
        tl.store(EACH + tl.program_id(0) * E + e, tl.sum(found, axis=0), e < E)
        tl.store(BEFORE + t[:, None] * K + which, tl.cumsum(found, axis=0) - found, found > 0)

    @triton.jit(do_not_specialize=VARYING)
    def _choose(
        S, WEIGHTS, CHOSEN, EACH, BEFORE, T, scale, COUNTS: tl.constexpr,
        E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        e, j = tl.arange(0, EP), tl.arange(0, KP)
        in_t = t < T
        in_e = (e < E)[None, :]
        scores = tl.load(S + t[:, None] * E + e[None, :], in_t[:, None] & in_e, 0.0).to(tl.float32)
        broken = tl.max((scores != scores).to(tl.int32), axis=1) > 0
        # NaN is chosen last, but is one of the experts; so is minus infinity, which marks those that are taken.
        scores = tl.where(scores > LOWEST, scores, LOWEST)
        scores = tl.where(in_e, scores, float("-inf"))
        best = tl.full((BT, KP), float("-inf"), tl.float32)
        chosen = tl.zeros((BT, KP), tl.int32)
        found = tl.zeros((BT, EP), tl.int32)
        which = tl.zeros((BT, EP), tl.int32)
        for i in tl.static_range(K):
            top, expert = tl.max(scores, axis=1, return_indices=True)
            best = tl.where((j == i)[None, :], top[:, None], best)
            chosen = tl.where((j == i)[None, :], expert[:, None], chosen)
            own = e[None, :] == expert[:, None]
            scores = tl.where(own, float("-inf"), scores)
            found = tl.where(own & in_t[:, None], 1, found)
            which = tl.where(own, i, which)
        if COUNTS:
            _leave_counts(EACH, BEFORE, found, which, t, e, E, K)
        most = tl.max(best, axis=1)
        broken = broken | (most == LOWEST)
        share = tl.exp(best - most[:, None])
        share = scale * share / tl.sum(share, axis=1)[:, None]
        inside = in_t[:, None] & (j < K)[None, :]
        at = t[:, None] * K + j[None, :]
        tl.store(WEIGHTS + at, tl.where(broken[:, None], float("nan"), share), inside)
        tl.store(CHOSEN + at, chosen, inside)

    @triton.jit(do_not_specialize=VARYING)
    def _choose_backward(
        WEIGHTS, CHOSEN, DW, DS, T, scale,
        E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, BT: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        e, j = tl.arange(0, EP), tl.arange(0, KP)
        in_t = t < T
        inside = in_t[:, None] & (j < K)[None, :]
        at = t[:, None] * K + j[None, :]
        w = tl.load(WEIGHTS + at, inside, 0.0)
        dw = tl.load(DW + at, inside, 0.0)
        ds = w * (dw - tl.sum(w * dw, axis=1)[:, None] / scale)
        out = tl.zeros((BT, EP), tl.float32)
        for i in tl.static_range(K):
            chosen = tl.load(CHOSEN + t * K + i, in_t, -1)
            one = tl.sum(tl.where((j == i)[None, :], ds, 0.0), axis=1)
            out += tl.where(e[None, :] == chosen[:, None], one[:, None], 0.0)
        tl.store(DS + t[:, None] * E + e[None, :], out.to(DS.dtype.element_ty), in_t[:, None] & (e < E)[None, :])

    @triton.jit(do_not_specialize=VARYING)
    def _count(
        CHOSEN, EACH, BEFORE, T, E: tl.constexpr, EP: tl.constexpr, K: tl.constexpr, BT: tl.constexpr
    ):  # fmt: skip
        t, e = tl.program_id(0) * BT + tl.arange(0, BT), tl.arange(0, EP)
        found = tl.zeros((BT, EP), tl.int32)
        which = tl.zeros((BT, EP), tl.int32)
        for i in tl.static_range(K):
            own = e[None, :] == tl.load(CHOSEN + t * K + i, t < T, -1)[:, None]
            found = tl.where(own, 1, found)
            which = tl.where(own, i, which)
        _leave_counts(EACH, BEFORE, found, which, t, e, E, K)

    @triton.jit
    def _tabulate(TABLE, most, first, total, each, e, E: tl.constexpr):
        """Experts and first rows of pieces of `each` rows, and their number. Returns each expert's first piece."""
        pieces = (total + each - 1) // each
        begin = tl.cumsum(pieces, axis=0) - pieces
        for i in range(tl.max(pieces, axis=0)):
            tl.store(TABLE + begin + i, e, i < pieces)
            tl.store(TABLE + most + begin + i, first + i * each, i < pieces)
        tl.store(TABLE + 2 * most + e * 0, tl.sum(pieces, axis=0) + e * 0, e == 0)
        return begin

    @triton.jit(do_not_specialize=["most_tiles", "most_chunks", "chunk", "groups"])
    def _offsets(
        COUNTS, ENDS, TILES, most_tiles, CHUNKS, most_chunks, chunk, groups, ADD_TO,
        TAKEN: tl.constexpr, E: tl.constexpr, EP: tl.constexpr, BG: tl.constexpr, TILE: tl.constexpr,
    ):  # fmt: skip
        """One program: the ends, the tables, and instead of each group's counts the first row of each group."""
        e = tl.arange(0, EP)
        total = tl.zeros((EP,), tl.int32)
        for g0 in range(0, groups, BG):
            g = g0 + tl.arange(0, BG)
            inside = (g < groups)[:, None] & (e < E)[None, :]
            total += tl.sum(tl.load(COUNTS + g[:, None] * E + e[None, :], inside, 0), axis=0)
        if TAKEN:
            tl.store(ADD_TO + e, tl.load(ADD_TO + e, e < E, 0) + total, e < E)
        first = tl.cumsum(total, axis=0) - total
        tl.store(ENDS + e, first, e < E)
        tl.store(ENDS + E + e * 0, tl.sum(total, axis=0) + e * 0, e == 0)
        begin = first
        for g0 in range(0, groups, BG):
            g = g0 + tl.arange(0, BG)
            inside = (g < groups)[:, None] & (e < E)[None, :]
            at = COUNTS + g[:, None] * E + e[None, :]
            count = tl.load(at, inside, 0)
            tl.store(at, begin[None, :] + tl.cumsum(count, axis=0) - count, inside)
            begin += tl.sum(count, axis=0)
        _tabulate(TILES, most_tiles, first, total, TILE, e, E)
        first_chunk = _tabulate(CHUNKS, most_chunks, first, total, chunk, e, E)
        tl.store(CHUNKS + 2 * most_chunks + 1 + e, first_chunk, e < E)

    @triton.jit(do_not_specialize=["rows"])
    def _place(
        WEIGHTS, CHOSEN, BEGIN, POSITION, TOKEN, WEIGHT, rows,
        E: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        """Each choice behind those of its group's first row; POSITION holds how many of its group are before it."""
        choice = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside, token = choice < rows, choice // K
        begin = tl.load(BEGIN + token // BT * E + tl.load(CHOSEN + choice, inside, 0), inside, 0)
        row = begin + tl.load(POSITION + choice, inside, 0)
        tl.store(POSITION + choice, row, inside)
        tl.store(TOKEN + row, token, inside)
        tl.store(WEIGHT + row, tl.load(WEIGHTS + choice, inside, 0.0), inside)

    @triton.jit(do_not_specialize=["count"])
    def _of_tokens(
        PARTS, POSITION, OUT, count, SPLITS: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = i < count
        row = tl.load(POSITION + i, inside, 0)
        total = tl.zeros((AT_ONCE, BLOCK), tl.float32)
        for first in range(0, SPLITS, AT_ONCE):  # wide experts have hundreds
            split = first + tl.arange(0, AT_ONCE)
            own = (split < SPLITS)[:, None] & inside[None, :]
            total += tl.load(PARTS + split[:, None] * count + row[None, :], own, 0.0)
        tl.store(OUT + i, tl.sum(total, axis=0), inside)

    @triton.jit
    def _combine(Y, POSITION, MORE, ldm, OUT, N, K: tl.constexpr, HAS_MORE: tl.constexpr, BLOCK: tl.constexpr):
        t = tl.program_id(0).to(tl.int64)
        n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < N
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(K):
            row = tl.load(POSITION + t * K + i).to(tl.int64)
            total += tl.load(Y + row * N + n, inside, 0.0).to(tl.float32)
        if HAS_MORE:
            total += tl.load(MORE + t * ldm + n, inside, 0.0).to(tl.float32)
        tl.store(OUT + t * N + n, total.to(OUT.dtype.element_ty), inside)
