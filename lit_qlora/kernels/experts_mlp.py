"""The backward pass of the activation of experts, between down and gate and up, in one read of both.

h = weight * function(gate, up), or function(weight * gate, weight * up) with `before`. From dH come d_gate and d_up,
written over gate and up, and the gradient of the weight, a sum over columns. The sums over an expert's rows for down's
A and for gate's and up's B need the same numbers, so they are computed here too. A program takes a stripe of columns
and a chunk of an expert's rows.
"""

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.experts import Choices
from lit_qlora.kernels.experts_lora import Folds
from lit_qlora.kernels.experts_products import weigh_reference
from lit_qlora.kernels.launch import VARYING, cdiv, power_of_2, tl, triton

if triton is not None:
    from lit_qlora.kernels.activation import combine_weighted
    from lit_qlora.kernels.dropout import factor


def mlp_backward_reference(
    branches: Tensor,
    dh: Tensor,
    choices: Choices,
    function: str,
    down: tuple[Tensor, Tensor, float] | None = None,
    gate_up: tuple[Tensor, Tensor, tuple[int, int]] | None = None,
    dropout: Dropout = NONE,
    h: Tensor | None = None,
    before: bool = False,
) -> Tensor:
    """Compute mlp_backward by autograd; the parts of the gradient of the weight are one."""
    with torch.enable_grad():
        leaf, weight = branches.detach().clone().requires_grad_(), choices.weight[:, None].to(dh.dtype).requires_grad_()
        value = weigh_reference(leaf, weight, function, before)
        d_branches, d_weight = torch.autograd.grad(value, (leaf, weight), dh)
    weighted, width = value.detach(), dh.size(1)
    branches.copy_(d_branches)
    if dropout.p:
        weighted *= factor_reference(len(dh), width, dropout, dh.device).to(dh.dtype)
    if h is not None:
        h.copy_(weighted)
    for e, rows in choices.each():
        if down is not None:
            dz, gradient, scale = down
            gradient[e] += scale * (dz[rows].T @ weighted[rows]).to(gradient.dtype)
        if gate_up is not None:
            z, gradient, slots = gate_up
            r = gradient.size(2)
            for half, slot in zip(d_branches[rows].split(width, dim=1), slots, strict=True):
                if slot >= 0:
                    first = 0 if _is_tied(z, slots, r) else slot * r
                    own = z[rows, first : first + r]
                    gradient[e, slot * width : (slot + 1) * width] += (half.T @ own).to(gradient.dtype)
    return d_weight.T


def mlp_backward(
    branches: Tensor,
    dh: Tensor,
    choices: Choices,
    function: str,
    down: tuple[Tensor, Tensor, float] | None = None,
    gate_up: tuple[Tensor, Tensor, tuple[int, int]] | None = None,
    dropout: Dropout = NONE,
    h: Tensor | None = None,
    folds: Folds | None = None,
    before: bool = False,
) -> Tensor:
    """Turn gate and up into their gradients, in place; add to those of the adapters.

    Args:
        branches: (C, 2 F), contiguous; dh: (C, F), contiguous, gradients of h with those through down's adapter.
        down: gradients of down's Z, (C, R), the float32 gradient of its A, (n_expert, R, F), and alpha / r.
        gate_up: Z of the adapters of gate and up, (C, slots r), or (C, r) if they share an A; the float32 gradient of
            their stacked B, of shape (n_expert, slots F, r); the slots of gate and up, -1 without an adapter.
        dropout: of the input of down's adapter, elements of (C, F).
        h: where h, with elements dropped, is written for sums that are done elsewhere; None if nobody wants it.
        folds: adds up the sums of chunks later; None for at once.
        before: see the module.

    Returns:
        Parts (S, C) of the gradient of the weights of the choices; float32.
    """
    if down is None and gate_up is None and h is None:
        return _without_adapters(branches, dh, choices, function, before)
    width, device = dh.size(1), dh.device
    dz, grad_a, alpha = down or (branches, None, 1.0)
    z, grad_b, slots = gate_up or (branches, None, (-1, -1))
    rank, size_a = (0, 0) if grad_a is None else (grad_a.size(1), grad_a.size(1) * grad_a.size(2))
    r, size_b = (0, 0) if grad_b is None else (grad_b.size(2), grad_b.size(1) * grad_b.size(2))
    bt, bn, in_flight = BLOCKS[max(power_of_2(rank), power_of_2(r))]
    stripes = cdiv(width, bn)
    d_weight = torch.empty(stripes, choices.rows, dtype=torch.float32, device=device)
    sums = [
        (torch.empty(choices.most_chunks, size, dtype=torch.float32, device=device), gradient)
        for size, gradient in ((size_a, grad_a), (size_b, grad_b))
        if gradient is not None
    ]
    parts_a = sums[0][0] if grad_a is not None else d_weight
    parts_b = sums[-1][0] if grad_b is not None else d_weight
    _backward[(stripes, choices.most_chunks)](
        branches, dh, choices.weight, dz, dz.stride(0), z, z.stride(0),
        d_weight if grad_a is None else grad_a, 0 if grad_a is None else grad_a.stride(0),
        d_weight if grad_b is None else grad_b, 0 if grad_b is None else grad_b.stride(0), parts_a, parts_b, size_b,
        d_weight, dh if h is None else h, choices.ends, choices.chunks, choices.most_chunks, choices.chunk,
        width, choices.rows, alpha, dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=power_of_2(rank), r=r, rP=power_of_2(r), GATE=slots[0], UP=slots[1],
        TIED=int(_is_tied(z, slots, r)), FUNCTION=function, BEFORE=before, DROP=dropout.p > 0,
        WANTS_H=h is not None, BT=bt, BN=bn, STAGES=in_flight, num_warps=4,
    )  # fmt: skip
    later = folds or Folds(choices)
    for parts, gradient in sums:
        later.add(parts, gradient)
    if folds is None:
        later.flush()
    return d_weight


def _without_adapters(branches: Tensor, dh: Tensor, choices: Choices, function: str, before: bool) -> Tensor:
    """As mlp_backward where no adapter wants a sum over rows: a program takes whole rows, of any experts."""
    rows, width = dh.shape
    d_weight = torch.empty(1, rows, dtype=torch.float32, device=dh.device)
    bt, bn, warps = BLOCKS_WITHOUT
    _backward_alone[(cdiv(rows, bt),)](
        branches, dh, choices.weight, d_weight, width, rows,
        FUNCTION=function, BEFORE=before, BT=bt, BN=bn, num_warps=warps,
    )  # fmt: skip
    return d_weight


def _is_tied(z: Tensor, slots: tuple[int, int], r: int) -> bool:
    """Tell whether gate and up read the same columns of Z."""
    return min(slots) >= 0 and z.size(1) == r


BLOCKS = {16: (32, 64, 3), 32: (32, 64, 3), 64: (16, 64, 3)}
"""Rows, columns and iterations in flight for each padded rank: of 10 choices for 16 the fastest on an H200 for experts
as wide as Mixtral's; the others have as few registers."""
BLOCKS_WITHOUT = (1, 1024, 4)
"""Rows, columns at a time and warps without adapters: the fastest of 8 choices on an H200 for three widths."""

if triton is not None:

    @triton.jit(do_not_specialize=["rows"])
    def _backward_alone(
        X, DH, WEIGHT, DW, F, rows,
        FUNCTION: tl.constexpr, BEFORE: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * BT + tl.arange(0, BT)
        far, in_t = t.to(tl.int64), t < rows
        w = tl.load(WEIGHT + t, in_t, 0.0)
        total = tl.zeros((BT,), tl.float32)
        dtype: tl.constexpr = X.dtype.element_ty
        for n0 in range(0, F, BN):
            n = n0 + tl.arange(0, BN)
            inside = in_t[:, None] & (n < F)[None, :]
            dh = tl.load(DH + far[:, None] * F + n[None, :], inside, 0.0).to(tl.float32)
            at = X + far[:, None] * (2 * F) + n[None, :]
            gate, up = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + F, inside, 0.0).to(tl.float32)
            _, by_gate, by_up, by_weight = combine_weighted(gate, up, w[:, None], FUNCTION, BEFORE)
            total += tl.sum(dh * by_weight, axis=1)
            tl.store(at, (dh * by_gate).to(dtype), inside)
            tl.store(at + F, (dh * by_up).to(dtype), inside)
        tl.store(DW + t, total, in_t)

    @triton.jit(do_not_specialize=["most_chunks", "chunk", "rows", *VARYING])
    def _backward(
        X, DH, WEIGHT, DZ, ldd, Z, ldz, GA, sa, GB, sb, PARTS_A, PARTS_B, size_b, DW, H, ENDS, CHUNKS, most_chunks,
        chunk, F, rows, alpha, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, r: tl.constexpr, rP: tl.constexpr, GATE: tl.constexpr, UP: tl.constexpr,
        TIED: tl.constexpr, FUNCTION: tl.constexpr, BEFORE: tl.constexpr, DROP: tl.constexpr, WANTS_H: tl.constexpr,
        BT: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        stripe, c = tl.program_id(0), tl.program_id(1)
        if c < tl.load(CHUNKS + 2 * most_chunks):
            e = tl.load(CHUNKS + c)
            first, last = tl.load(CHUNKS + most_chunks + c), tl.load(ENDS + e + 1)
            end = tl.minimum(first + chunk, last)
            n, i, j = stripe * BN + tl.arange(0, BN), tl.arange(0, RP), tl.arange(0, rP)
            in_n = n < F
            dtype: tl.constexpr = X.dtype.element_ty
            # Columns first: a Hopper's matrix units take 64 rows at least, and ranks are often less.
            sum_a = tl.zeros((BN, RP), tl.float32)
            sum_gate = tl.zeros((BN, rP), tl.float32)
            sum_up = tl.zeros((BN, rP), tl.float32)
            for t0 in tl.range(first, end, BT, num_stages=STAGES):
                t = t0 + tl.arange(0, BT)
                far, in_t = t.to(tl.int64), t < end
                inside = in_t[:, None] & in_n[None, :]
                dh = tl.load(DH + far[:, None] * F + n[None, :], inside, 0.0).to(tl.float32)
                at = X + far[:, None] * (2 * F) + n[None, :]
                gate, up = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + F, inside, 0.0).to(tl.float32)
                # The sum over one element keeps Triton from computing all this again in the layout that products read.
                w = tl.sum(tl.load(WEIGHT + t, in_t, 0.0)[:, None], axis=1)
                h, by_gate, by_up, by_weight = combine_weighted(gate, up, w[:, None], FUNCTION, BEFORE)
                tl.store(DW + stripe * rows + t, tl.sum(dh * by_weight, axis=1), in_t)
                d_gate, d_up = (dh * by_gate).to(dtype), (dh * by_up).to(dtype)
                tl.store(at, d_gate, inside)
                tl.store(at + F, d_up, inside)
                if DROP and (R > 0 or WANTS_H):
                    h *= factor(far[:, None] * F + n[None, :], SEED, offset, threshold, scale)
                if WANTS_H:
                    tl.store(H + far[:, None] * F + n[None, :], h.to(dtype), inside)
                if R > 0:
                    dz = tl.load(DZ + far[:, None] * ldd + i[None, :], in_t[:, None] & (i < R)[None, :], 0.0)
                    sum_a = tl.dot(tl.trans(h.to(dtype)), dz, sum_a)
                own = in_t[:, None] & (j < r)[None, :]
                if GATE >= 0:
                    z = tl.load(Z + far[:, None] * ldz + GATE * r + j[None, :], own, 0.0)
                    sum_gate = tl.dot(tl.trans(d_gate), z, sum_gate)
                if UP >= 0:
                    z = tl.load(Z + far[:, None] * ldz + (UP - TIED) * r + j[None, :], own, 0.0)
                    sum_up = tl.dot(tl.trans(d_up), z, sum_up)
            whole = last - tl.load(ENDS + e) <= chunk
            if R > 0:
                to, mine = i[None, :] * F + n[:, None], (i < R)[None, :] & in_n[:, None]
                _leave(
                    GA + e.to(tl.int64) * sa + to, PARTS_A + c.to(tl.int64) * (R * F) + to, alpha * sum_a, whole, mine
                )
            mine = (j < r)[None, :] & in_n[:, None]
            if GATE >= 0:
                to = (GATE * F + n)[:, None] * r + j[None, :]
                _leave(GB + e.to(tl.int64) * sb + to, PARTS_B + c.to(tl.int64) * size_b + to, sum_gate, whole, mine)
            if UP >= 0:
                to = (UP * F + n)[:, None] * r + j[None, :]
                _leave(GB + e.to(tl.int64) * sb + to, PARTS_B + c.to(tl.int64) * size_b + to, sum_up, whole, mine)

    @triton.jit
    def _leave(gradient, parts, total, whole, mine):
        """Add a sum to a gradient if it is the whole one, else leave it for `fold`."""
        if whole:
            tl.store(gradient, tl.load(gradient, mine, 0.0) + total, mine)
        else:
            tl.store(parts, total, mine)
