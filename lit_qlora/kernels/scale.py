"""Rows times numbers of the device, in float32: PyTorch rounds a single one to the rows' dtype before it multiplies."""

from torch import Tensor

from lit_qlora.kernels.launch import VARYING, cdiv, tl, triton


def scale_(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply x (T, N), contiguous, in place by `factor`: float32, (T, 1) or for all rows (). Returns x."""
    rows, width = x.shape
    step = factor.stride(0) if factor.dim() else 0
    _scale[(rows, cdiv(width, 2048))](x, factor, step, width, BLOCK=2048, num_warps=4)
    return x


if triton is not None:

    @triton.jit(do_not_specialize=VARYING)
    def _scale(X, FACTOR, step, N, BLOCK: tl.constexpr):
        t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(X + t * N + n, n < N, 0.0).to(tl.float32)
        tl.store(X + t * N + n, (x * tl.load(FACTOR + t * step)).to(X.dtype.element_ty), n < N)
