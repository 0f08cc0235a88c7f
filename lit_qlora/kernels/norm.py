"""Residual add and norm in one pass, and its backward with the adapters' part of the gradient joined in.

Forward: x' = x + y, out = norm(x'): reads two, writes two, and saves a statistic or two of each row. RMSNorm: Zhang &
Sennrich 2019; LayerNorm: Ba et al. 2016. Backward: the gradient of the normed input arrives as [dN | dZ], base and
adapters; dN + dZ A is formed in registers, so it is never written. Neither is the normed input, which follows from x
and its statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.launch import PIPELINE, VARYING, cdiv, fitting, power_of_2, shared_memory, stages, tl, triton

if triton is not None:
    from lit_qlora.kernels.dropout import factor


@dataclass(frozen=True)
class Norm:
    """A norm over rows of E features.

    Attributes:
        kind: rms, layer, or none, which only multiplies and adds.
        weight, bias: (E,), None for one and zero.
    """

    kind: str
    eps: float = 0.0
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def changes_nothing(self) -> bool:
        """True where its output is its input."""
        return self.kind == "none" and self.weight is None

    @property
    def statistics(self) -> int:
        """Number of statistics of a row: 1 / its size, and with a layer norm its mean."""
        return KINDS[self.kind]


KINDS = {"none": 0, "rms": 1, "layer": 2}


def norm_reference(x: Tensor, norm: Norm) -> Tensor:
    """The norm of x (T, E) in plain torch, float32."""
    out = x.float()
    if norm.kind == "layer":
        out = out - out.mean(-1, keepdim=True)
    if norm.kind != "none":
        out = out * torch.rsqrt(out.square().mean(-1, keepdim=True) + norm.eps)
    out = out if norm.weight is None else out * norm.weight.float()
    return out if norm.bias is None else out + norm.bias.float()


def add_norm(x: Tensor, y: Tensor | None, norm: Norm, out: Tensor) -> tuple[Tensor, Tensor]:
    """Write norm(x + y) into the first E columns of `out`.

    Args:
        x, y: (T, E), contiguous; y None stands for zero.
        out: (T, at least E), rows contiguous.

    Returns:
        x + y (x itself where y is None), and the statistics of the rows, (norm.statistics, T) float32.
    """
    rows, width = x.shape
    total = x if y is None else torch.empty_like(x)
    statistics = torch.empty(norm.statistics, rows, device=x.device, dtype=torch.float32)
    _add_norm[(rows,)](
        x, x if y is None else y, total, x if norm.weight is None else norm.weight,
        x if norm.bias is None else norm.bias, out, out.stride(0), statistics, rows, width, norm.eps,
        KIND=norm.statistics, HAS_Y=y is not None, HAS_W=norm.weight is not None, HAS_B=norm.bias is not None,
        BLOCK=power_of_2(width), num_warps=8,
    )  # fmt: skip
    return total, statistics


def apply_norm(norm: Norm, x: Tensor) -> Tensor:
    """norm(x), which is x itself where the norm changes nothing."""
    if norm.changes_nothing:
        return x
    out = torch.empty_like(x)
    add_norm(x, None, norm, out)
    return out


def norm_backward_reference(
    d_out: Tensor, x: Tensor, norm: Norm, a: Tensor | None, residual: Tensor | None, dropout: Dropout
) -> Tensor:
    """Compute norm_backward by autograd."""
    width = x.size(1)
    d = d_out[:, :width].float()
    if a is not None:
        d = d + (d_out[:, width:].float() @ a.float()) * factor_reference(x.size(0), width, dropout, x.device)
    with torch.enable_grad():
        leaf = x.float().requires_grad_()
        (dx,) = torch.autograd.grad(norm_reference(leaf, norm) + 0 * leaf, leaf, d)
    return (dx if residual is None else dx + residual.float()).to(x.dtype)


def norm_backward(
    d_out: Tensor,
    x: Tensor,
    norm: Norm,
    statistics: Tensor,
    z: Tensor | None = None,
    a: Tensor | None = None,
    residual: Tensor | None = None,
    dropout: Dropout = NONE,
) -> Tensor:
    """The gradient of x.

    Args:
        d_out: (T, E + R), gradients of the normed input through the base and of Z; R may be 0.
        statistics: of the rows, as add_norm returned them.
        z: (T, R), Z itself: its product with dZ is the adapters' part of a sum over the normed input.
        a: (R, E), stacked and scaled A.
        residual: (T, E), what is added to the result.
        dropout: of the adapters' input.

    Returns:
        (T, E) in the dtype of x.
    """
    rows, width = x.shape
    rank = 0 if a is None else a.size(0)
    dx = torch.empty_like(x)
    padded = power_of_2(rank)
    size, room = (3 * 16 + padded) * x.element_size(), shared_memory(x)
    block = fitting(256 if padded <= 64 else 64, size, room)
    _norm_backward[(cdiv(rows, 16),)](
        d_out, d_out.stride(0), x, x if norm.weight is None else norm.weight, statistics, x if z is None else z,
        x if a is None else a, x if residual is None else residual, dx, rows, width,
        dropout.seed, dropout.offset, dropout.threshold, dropout.scale,
        R=rank, RP=padded, KIND=norm.statistics, HAS_W=norm.weight is not None, HAS_RESIDUAL=residual is not None,
        DROP=dropout.p > 0, BM=16, BK=block, STAGES=stages(size * block, 4, min(room, PIPELINE)), num_warps=4,
    )  # fmt: skip
    return dx


def post_norm_backward(norm: Norm, x: Tensor | None, d_out: Tensor) -> Tensor:
    """The gradient of x (T, E) from that of norm(x), without saved statistics.

    Args:
        x: None where the norm only multiplies.
    """
    if norm.changes_nothing:
        return d_out
    x = d_out if x is None else x
    return norm_backward(d_out, x, norm, add_norm(x, None, norm, torch.empty_like(x))[1])


if triton is not None:

    @triton.jit(do_not_specialize=VARYING)
    def _add_norm(
        X, Y, TOTAL, W, B, OUT, ld, STATISTICS, T, E, eps,
        KIND: tl.constexpr, HAS_Y: tl.constexpr, HAS_W: tl.constexpr, HAS_B: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, BLOCK)
        inside = k < E
        x = tl.load(X + t * E + k, inside, 0.0).to(tl.float32)
        if HAS_Y:
            total = (x + tl.load(Y + t * E + k, inside, 0.0).to(tl.float32)).to(TOTAL.dtype.element_ty)
            tl.store(TOTAL + t * E + k, total, inside)
            x = total.to(tl.float32)
        if KIND == 2:
            mean = tl.sum(x, 0) / E
            x = tl.where(inside, x - mean, 0.0)
            tl.store(STATISTICS + T + t, mean)
        if KIND > 0:
            rstd = 1.0 / tl.sqrt(tl.sum(x * x, 0) / E + eps)
            x = x * rstd
            tl.store(STATISTICS + t, rstd)
        if HAS_W:
            x = x * tl.load(W + k, inside, 0.0).to(tl.float32)
        if HAS_B:
            x = x + tl.load(B + k, inside, 0.0).to(tl.float32)
        tl.store(OUT + t * ld + k, x.to(OUT.dtype.element_ty), inside)

    @triton.jit(do_not_specialize=VARYING)
    def _norm_backward(
        G, ld, X, W, STATISTICS, Z, A, RESIDUAL, DX, T, E, SEED, offset, threshold, scale,
        R: tl.constexpr, RP: tl.constexpr, KIND: tl.constexpr, HAS_W: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
        DROP: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
        in_t = t < T
        j = tl.arange(0, RP)
        rstd = tl.full((BM,), 1.0, tl.float32)
        mean = tl.zeros((BM,), tl.float32)
        c = tl.zeros((BM,), tl.float32)
        shift = tl.zeros((BM,), tl.float32)
        own = in_t[:, None] & (j < R)[None, :]
        if R > 0:
            dz = tl.load(G + t[:, None] * ld + E + j[None, :], own, 0.0)
        if KIND > 0:
            rstd = tl.load(STATISTICS + t, in_t, 1.0)
            if KIND == 2:
                mean = tl.load(STATISTICS + T + t, in_t, 0.0)
            products = tl.zeros((BM, BK), tl.float32)
            sums = tl.zeros((BM, BK), tl.float32)
            for k0 in tl.range(0, E, BK, num_stages=STAGES):
                k = k0 + tl.arange(0, BK)
                inside = in_t[:, None] & (k < E)[None, :]
                g = tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32)
                x = tl.load(X + t[:, None] * E + k[None, :], inside, 0.0).to(tl.float32)
                if KIND == 2 and R > 0:
                    a = tl.load(A + j[:, None] * E + k[None, :], (j < R)[:, None] & (k < E)[None, :], 0.0)
                    update = tl.dot(dz, a)
                    if DROP:
                        update *= factor(t[:, None] * E + k[None, :], SEED, offset, threshold, scale)
                    g += update
                if HAS_W:
                    g = g * tl.load(W + k, k < E, 0.0).to(tl.float32)[None, :]
                if KIND == 2:
                    x = x - mean[:, None]
                    sums += g
                products += g * x
            c = tl.sum(products, 1)
            if KIND == 2:
                shift = tl.sum(sums, 1) * rstd / E
            if KIND == 1 and R > 0:
                # The sum over k of (dZ A)_k w_k x_k is dZ . Z / rstd, the dropped elements left out on both sides.
                z = tl.load(Z + t[:, None] * R + j[None, :], own, 0.0).to(tl.float32)
                c += tl.sum(dz.to(tl.float32) * z, 1) / rstd
            c = c * rstd * rstd * rstd / E
        for k0 in tl.range(0, E, BK, num_stages=STAGES):
            k = k0 + tl.arange(0, BK)
            inside = in_t[:, None] & (k < E)[None, :]
            at = t[:, None] * E + k[None, :]
            g = tl.load(G + t[:, None] * ld + k[None, :], inside, 0.0).to(tl.float32)
            if R > 0:
                a = tl.load(A + j[:, None] * E + k[None, :], (j < R)[:, None] & (k < E)[None, :], 0.0)
                update = tl.dot(dz, a)
                if DROP:
                    update *= factor(at, SEED, offset, threshold, scale)
                g += update
            if HAS_W:
                g = g * tl.load(W + k, k < E, 0.0).to(tl.float32)[None, :]
            if KIND > 0:
                x = tl.load(X + at, inside, 0.0).to(tl.float32)
                if KIND == 2:
                    x = x - mean[:, None]
                g = g * rstd[:, None] - x * c[:, None]
                if KIND == 2:
                    g = g - shift[:, None]
            if HAS_RESIDUAL:
                g += tl.load(RESIDUAL + at, inside, 0.0).to(tl.float32)
            tl.store(DX + at, g.to(DX.dtype.element_ty), inside)
