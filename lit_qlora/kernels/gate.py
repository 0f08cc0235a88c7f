"""The gate of attention's output: it is multiplied by the sigmoid of another projection, in one pass each way."""

from torch import Tensor

from lit_qlora.kernels.launch import cdiv, tl, triton


def gate_forward(x: Tensor, gates: Tensor, out: Tensor) -> None:
    """Write x sigmoid(gates) into the first N columns of `out`.

    Args:
        x: (T, N), contiguous; gates: (T, N), rows contiguous.
        out: (T, at least N), rows contiguous.
    """
    rows, width = x.shape
    _forward[(rows, cdiv(width, 1024))](x, gates, gates.stride(0), out, out.stride(0), width, BLOCK=1024, num_warps=4)


def gate_backward(d_out: Tensor, x: Tensor, gates: Tensor, d_gates: Tensor) -> None:
    """Turn the gradient of the product into that of x, in place, and write that of the gates.

    Args:
        d_out, x: (T, N), contiguous; gates, d_gates: (T, N), rows contiguous.
    """
    rows, width = x.shape
    _backward[(rows, cdiv(width, 1024))](
        d_out, x, gates, gates.stride(0), d_gates, d_gates.stride(0), width, BLOCK=1024, num_warps=4
    )


if triton is not None:

    @triton.jit
    def _forward(X, GATES, ldg, OUT, ldo, N, BLOCK: tl.constexpr):
        t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < N
        share = tl.sigmoid(tl.load(GATES + t * ldg + n, inside, 0.0).to(tl.float32))
        x = tl.load(X + t * N + n, inside, 0.0).to(tl.float32)
        tl.store(OUT + t * ldo + n, (x * share).to(OUT.dtype.element_ty), inside)

    @triton.jit
    def _backward(D, X, GATES, ldg, DG, ldd, N, BLOCK: tl.constexpr):
        t, n = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = n < N
        share = tl.sigmoid(tl.load(GATES + t * ldg + n, inside, 0.0).to(tl.float32))
        x = tl.load(X + t * N + n, inside, 0.0).to(tl.float32)
        d = tl.load(D + t * N + n, inside, 0.0).to(tl.float32)
        tl.store(DG + t * ldd + n, (d * x * share * (1 - share)).to(DG.dtype.element_ty), inside)
        tl.store(D + t * N + n, (d * share).to(D.dtype.element_ty), inside)
