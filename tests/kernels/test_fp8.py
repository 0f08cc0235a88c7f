"""Rows in FP8 are what torch rounds them to, with scales that hide neither a zero nor a NaN."""

import pytest
import torch
from torch import Tensor

from lit_qlora.kernels.dequantize import dequantize_reference
from lit_qlora.kernels.fp8 import FP8, quantize_rows, quantize_weights, scaled_product, scales, weight_scales
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import Stack
from lit_qlora.quantize import QuantizedLinear, stack_weights
from lit_qlora.settings import SCHEMES
from tests.kernels.test_dequantize import DEVICE, DTYPES, STACKS

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
INF, NAN = float("inf"), float("nan")


def same(one: Tensor, other: Tensor) -> bool:
    """True for matrices in FP8 of equal elements; torch does not compare them itself."""
    return one.dtype == other.dtype == FP8 and torch.equal(one.float(), other.float())


def rounded(x: Tensor, scale: Tensor) -> Tensor:
    return (x.float() / scale).to(FP8)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [16, 64, 200, 4112])
@pytest.mark.parametrize("with_columns", [False, True])
def test_rows_are_scaled_and_rounded_to_the_nearest(with_columns: bool, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    magnitudes = torch.randn(9, 1).mul(20).exp2() * torch.randn(9, k + 3).exp2()  # within a row, from 1 to 1,000
    x = (magnitudes * torch.randn(9, k + 3)).to(DEVICE, dtype)
    columns = torch.rand(k, device=DEVICE) if with_columns else None
    out, scale = quantize_rows(x, k, columns)
    exact = x[:, :k].float() if columns is None else x[:, :k].float() * columns
    assert torch.equal(scale, scales(exact.abs().amax(1, keepdim=True)))
    assert same(out, rounded(exact, scale))
    assert ((out.float().abs().amax(1) >= 224) & (out.float().abs().amax(1) <= 448)).all()
    # Half a step of three bits of mantissa, or of the smallest numbers.
    assert ((out.float() * scale - exact).abs() <= torch.maximum(exact.abs() / 16, scale * 2**-10)).all()


@pytest.mark.parametrize("exponent", [-40, -9, 0, 30])
def test_every_number_of_e4m3_stays_what_it_is(exponent: int) -> None:
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(FP8)
    every = every[every.float().isfinite()]
    out, scale = quantize_rows(every.float()[None] * 2.0**exponent, len(every))
    assert float(scale) == 2.0**exponent
    assert same(out[0], every)


def test_a_row_of_zeros_is_zero_and_one_of_the_smallest_numbers_does_not_overflow() -> None:
    x = torch.zeros(3, 32, device=DEVICE)
    x[1] = 1e-38
    x[2] = -3e38
    out, scale = quantize_rows(x, 32)
    assert (scale > 0).all()
    assert torch.isfinite(out.float()).all()
    assert (out[:2].float() == 0).all()
    torch.testing.assert_close(out[2].float() * scale[2], x[2], rtol=1 / 16, atol=0)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite_shows_in_the_whole_row_of_the_product_and_nowhere_else(bad: float) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(4, 64, device=DEVICE), torch.randn(48, 64, device=DEVICE)
    x[2, 5] = bad
    w_scale = scales(w.abs().amax(1))
    y = scaled_product(quantize_rows(x, 64), (rounded(w, w_scale[:, None]), w_scale), torch.bfloat16)
    assert not torch.isfinite(y[2]).any()
    assert torch.isfinite(y[[0, 1, 3]]).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("stack", "k"), STACKS, ids=str)
def test_weights_of_every_storage_are_rounded_where_they_are_written(
    stack: Stack, k: int, scheme: str, transposed: bool
) -> None:
    torch.manual_seed(0)
    dtype = DTYPES[-1]
    weights = [torch.randn(n, k, device=DEVICE, dtype=dtype) * torch.rand(n, 1, device=DEVICE) for n in stack.rows]
    stored: object = torch.cat(weights).to(dtype)
    exact = torch.empty(stack.n, k, device=DEVICE)
    if scheme == "none":
        exact = torch.cat(weights).to(dtype).float()
    else:
        stored = stack_weights([QuantizedLinear(weight.to(dtype), None, scheme) for weight in weights])
        if stored is None:
            pytest.skip("blocks of these shapes do not stack")
        dequantize_reference(stored, None, exact, Stack(stack.rows, (-1,) * len(stack.rows), 0))
    scale = weight_scales(stored, stack)
    assert torch.equal(scale, scales(exact.abs().amax(1)))
    out = torch.empty((k, stack.n) if transposed else (stack.n, k), device=DEVICE, dtype=FP8)
    out = quantize_weights(stored, scale, out.T if transposed else out, stack, stack.table(DEVICE))
    assert same(out.contiguous(), rounded(exact, scale[:, None]))


def test_a_weight_that_is_not_finite_shows_in_its_column_of_the_product() -> None:
    torch.manual_seed(0)
    w, x = torch.randn(32, 64, device=DEVICE), torch.randn(4, 64, device=DEVICE)
    w[3, 7], w[8, 1] = NAN, INF
    stack = Stack((32,), (-1,), 0)
    scale = weight_scales(w, stack)
    out = quantize_weights(w, scale, torch.empty(32, 64, dtype=FP8, device=DEVICE), stack, stack.table(DEVICE))
    y = scaled_product(quantize_rows(x, 64), (out, scale), torch.bfloat16)
    assert (torch.isfinite(y).all(0) == torch.isfinite(w).all(1)).all()
