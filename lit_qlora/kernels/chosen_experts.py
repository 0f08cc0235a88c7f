"""Products of a token with the weights of its own experts alone, read as they are stored.

With few tokens most experts are not chosen: a token of 8 of 128 experts needs a sixteenth of the weights. A program
takes some rows of the weight for one choice, a token and one of its experts. It reads the number of the expert on the
device, so that a CUDA graph can hold it. Two tokens with the same expert read it twice, the second time often from the
cache of the GPU.
"""

from typing import Any

import torch
from torch import Tensor

from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.experts_dequantize import Matrices
from lit_qlora.kernels.launch import INTERPRETED, cdiv, power_of_2, tl, triton
from lit_qlora.kernels.stack import PER_STEP, EightBit, FourBit, Stack


def product_reference(
    x: Tensor,
    weight: Tensor,
    chosen: Tensor,
    stack: Stack,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    b: Tensor | None = None,
    shares: Tensor | None = None,
) -> Tensor:
    """Compute product in plain torch, of weights (n_expert, N, K); float32."""
    rows = x.float().repeat_interleave(chosen.numel() // len(x), dim=0)
    out = []
    for choice, e in enumerate(chosen.flatten().tolist()):
        own = None if z is None else z[choice : choice + 1]
        y = small_batch_linear.product_reference(
            rows[choice : choice + 1],
            weight[e],
            None if bias is None else bias[e],
            own,
            None if b is None else b[e],
            stack,
        )
        out.append(y if shares is None else y * shares.flatten()[choice])
    return torch.cat(out)


def product(
    x: Tensor,
    weight: Matrices | Tensor,
    chosen: Tensor,
    stack: Stack,
    table: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    b: Tensor | None = None,
    shares: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """X W^T + bias + Z B^T of each choice with its expert's weights, times the share of the choice.

    Args:
        x: (T, K), whose rows serve k choices each, or (C, K); contiguous.
        weight: of all experts; if it is a tensor (n_expert, N, K), contiguous, in the dtype of x. Doubly quantised
            matrices have a multiple of 256 scales each.
        chosen: (T, k) int64, contiguous; C = T k choices.
        stack: of the layers of one expert, and where their adapters lie; table: stack.table, on the device.
        bias: (n_expert, N).
        z: (C, R), contiguous, in the dtype of x; b: (n_expert, adapted rows, r), contiguous.
        shares: (T, k) float32; None for 1.
        dtype: of the result; None for that of x.

    Returns:
        (C, N).
    """
    choices, n, k = chosen.numel(), stack.n, x.size(1)
    out = torch.empty(choices, n, device=x.device, dtype=dtype or x.dtype)
    nested: Any = (x,) * 3
    stored = weight.stored if isinstance(weight, Matrices) else weight
    if isinstance(stored, FourBit):
        kind, packed, scales, code = 4, stored.packed, stored.absmax, stored.code
        nested = stored.nested or nested
    elif isinstance(stored, EightBit):
        kind, packed, scales, code = 8, stored.packed, stored.absmax, x
    else:
        kind, packed, scales, code = 16, stored, x, x
    is_nested = isinstance(stored, FourBit) and stored.nested is not None
    of_matrix = weight.shape[1] if isinstance(weight, Matrices) else n
    experts = weight.size(0) if isinstance(weight, Tensor) else weight.shape[0] * weight.shape[1] // n
    alone, warps = (4, 1) if n * choices >= small_batch_linear.BUSY_ROWS else (1, 4)
    _chosen[(choices, cdiv(n, alone))](
        x, chosen, packed, k // 2 if kind == 4 else k, scales, code, *nested, x if bias is None else bias,
        x if z is None else z, x if b is None else b, table, x if shares is None else shares, out,
        choices // len(x), experts * n, n, k, of_matrix, stack.adapted_rows,
        KIND=kind, NESTED=is_nested, PER_STEP=PER_STEP, PER_LANE={4: 32, 8: 16, 16: 16 // x.element_size()}[kind],
        HAS_BIAS=bias is not None, R=0 if z is None else stack.rank, r=max(stack.r, 1), RP=power_of_2(stack.rank),
        LAYERS=len(stack.rows), SHARES=shares is not None, PACK=x.dtype == torch.bfloat16 and not INTERPRETED,
        BN=alone, LANES=32 * warps, num_warps=warps,
        enable_fp_fusion=not is_nested,  # bitsandbytes rounds a scale's scale after the product and after the sum
    )  # fmt: skip
    return out


if triton is not None:
    from lit_qlora.kernels.small_batch_linear import _own_b, _weights

    @triton.jit
    def _chosen(
        X, CHOSEN, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, BIAS, Z, B, TABLE, SHARE, OUT,
        each, all_rows, N, K, of_matrix, adapted,
        KIND: tl.constexpr, NESTED: tl.constexpr, PER_STEP: tl.constexpr, PER_LANE: tl.constexpr,
        HAS_BIAS: tl.constexpr, R: tl.constexpr, r: tl.constexpr, RP: tl.constexpr, LAYERS: tl.constexpr,
        SHARES: tl.constexpr, PACK: tl.constexpr, BN: tl.constexpr, LANES: tl.constexpr,
    ):  # fmt: skip
        choice = tl.program_id(0)
        expert = tl.load(CHOSEN + choice).to(tl.int32)
        own = tl.program_id(1) * BN + tl.arange(0, BN)
        in_n = own < N
        n = tl.where(in_n, expert * N + own, all_rows)  # among the rows of all experts
        source = X + (choice // each).to(tl.int64) * K
        within = tl.arange(0, LANES)[:, None] * PER_LANE + tl.arange(0, PER_LANE)[None, :]
        offset = tl.zeros((BN,), tl.float32)
        if NESTED:
            offset = tl.load(OFFSET + n // of_matrix, in_n, 0.0)
        total = tl.zeros((BN, LANES), tl.float32)
        for k0 in range(0, K, LANES * PER_LANE):
            x = tl.load(source + k0 + within, k0 + within < K, 0.0)
            w = _weights(
                n, k0, PACKED, stride, SCALES, CODE, CODE2, OUTER, OFFSET, offset, all_rows, K, x.dtype,
                KIND, NESTED, PER_STEP, PER_LANE, BN, LANES, PACK,
            )  # fmt: skip
            total += tl.sum(w * x.to(tl.float32)[None, :, :], 2)
        y = tl.sum(total, 1)
        if HAS_BIAS:
            y += tl.load(BIAS + n, in_n, 0.0).to(tl.float32)
        if R > 0:
            j = tl.arange(0, RP)
            z = tl.load(Z + choice.to(tl.int64) * R + j, j < R, 0.0).to(tl.float32)
            b = _own_b(own, B + expert.to(tl.int64) * adapted * r, TABLE, N, R, r, RP, LAYERS)
            y += tl.sum(b.to(tl.float32) * z[None, :], 1)
        if SHARES:
            y *= tl.load(SHARE + choice)
        tl.store(OUT + choice.to(tl.int64) * N + own, y.to(OUT.dtype.element_ty), in_n)
