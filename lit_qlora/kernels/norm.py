"""Residual add and norm in one pass, and the way back.

Forward: x' = x + y, out = norm(x'): reads two, writes two, and saves a statistic or two of each row. RMSNorm: Zhang &
Sennrich 2019; LayerNorm: Ba et al. 2016. Backward: the normed input is not saved, since it follows from x and its
statistics.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_qlora.kernels.launch import VARYING, power_of_2, tl, triton


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


def norm_backward_reference(d_out: Tensor, x: Tensor, norm: Norm, residual: Tensor | None) -> Tensor:
    """Compute norm_backward by autograd."""
    with torch.enable_grad():
        leaf = x.float().requires_grad_()
        (dx,) = torch.autograd.grad(norm_reference(leaf, norm) + 0 * leaf, leaf, d_out.float())
    return (dx if residual is None else dx + residual.float()).to(x.dtype)


def norm_backward(d_out: Tensor, x: Tensor, norm: Norm, statistics: Tensor, residual: Tensor | None = None) -> Tensor:
    """The gradient of x.

    Args:
        d_out: (T, E), the gradient of norm(x), rows contiguous.
        x: (T, E), contiguous.
        statistics: of the rows, as add_norm returned them.
        residual: (T, E), what is added to the result.

    Returns:
        (T, E) in the dtype of x.
    """
    rows, width = x.shape
    dx = torch.empty_like(x)
    _norm_backward[(rows,)](
        d_out, d_out.stride(0), x, x if norm.weight is None else norm.weight, statistics,
        x if residual is None else residual, dx, rows, width, KIND=norm.statistics, HAS_W=norm.weight is not None,
        HAS_RESIDUAL=residual is not None, BLOCK=power_of_2(width), num_warps=8,
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
        G, ld, X, W, STATISTICS, RESIDUAL, DX, T, E,
        KIND: tl.constexpr, HAS_W: tl.constexpr, HAS_RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0).to(tl.int64)
        k = tl.arange(0, BLOCK)
        inside = k < E
        g = tl.load(G + t * ld + k, inside, 0.0).to(tl.float32)
        if HAS_W:
            g *= tl.load(W + k, inside, 0.0).to(tl.float32)
        if KIND > 0:
            x = tl.load(X + t * E + k, inside, 0.0).to(tl.float32)
            rstd = tl.load(STATISTICS + t)
            if KIND == 2:
                x = tl.where(inside, x - tl.load(STATISTICS + T + t), 0.0)
                g = tl.where(inside, g - tl.sum(g, 0) / E, 0.0)
            g = g * rstd - x * (tl.sum(g * x, 0) * rstd * rstd * rstd / E)
        if HAS_RESIDUAL:
            g += tl.load(RESIDUAL + t * E + k, inside, 0.0).to(tl.float32)
        tl.store(DX + t * E + k, g.to(DX.dtype.element_ty), inside)
