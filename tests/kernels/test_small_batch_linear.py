"""Products of a few rows with a weight as it is stored are those with the weight that is dequantised."""

import pytest
import torch
from torch import Tensor

from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.small_batch_linear import MOST_ROWS, product, product_reference
from lit_qlora.kernels.stack import Stack, end_to_end
from lit_qlora.quantize import QuantizedLinear, stack_weights
from lit_qlora.settings import SCHEMES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
STACKS = [
    (Stack(rows=(33,), slots=(-1,), r=0), 64),
    (Stack(rows=(7,), slots=(0,), r=3), 192),
    (Stack(rows=(32, 32, 10), slots=(0, -1, 1), r=8), 256),
    (Stack(rows=(19, 19), slots=(0, 1), r=16), 1344),
]
"""A row of the last one is longer than what a program of one warp reads at once."""


def close(y: Tensor, expected: Tensor) -> bool:
    """Equal but for the order of the sum, and the one rounding of the result."""
    return torch.allclose(y.float(), expected, rtol=1e-5 if y.dtype == torch.float32 else 4e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "many"), [(1, small_batch_linear.BUSY_ROWS), (1, 1), (MOST_ROWS - 3, small_batch_linear.BUSY_ROWS)]
)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("stack", "k"), STACKS, ids=str)
def test_a_product_with_a_packed_weight_is_that_with_the_dequantised_one(
    stack: Stack, k: int, scheme: str, rows: int, many: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_batch_linear, "BUSY_ROWS", many)
    torch.manual_seed(0)
    weights = [torch.randn(n, k, device=DEVICE, dtype=dtype) for n in stack.rows]
    if scheme == "none":
        packed = dense = torch.cat(weights)
    else:
        layers = [QuantizedLinear(weight, None, scheme) for weight in weights]
        dense = torch.cat([layer.dequantize() for layer in layers])
        packed = stack_weights(layers)
        if packed is None:
            pytest.skip("blocks of these shapes do not stack")
    x = torch.randn(rows, k, device=DEVICE, dtype=dtype)
    bias = torch.randn(stack.n, device=DEVICE, dtype=dtype)
    z = torch.randn(rows, stack.rank, device=DEVICE, dtype=dtype) if stack.rank else None
    b = torch.randn(stack.adapted_rows, stack.r, device=DEVICE, dtype=dtype) if stack.rank else None
    y = product(x, packed, stack, stack.table(DEVICE), bias, z, b)
    assert y.dtype == dtype
    assert close(y, product_reference(x, dense, bias, z, b, stack))


def test_rows_of_a_weight_may_lie_apart() -> None:
    whole, x, stack = torch.randn(40, 80, device=DEVICE), torch.randn(1, 64, device=DEVICE), Stack((40,), (-1,), 0)
    y = product(x, whole[:, :64], stack, stack.table(DEVICE))
    assert close(y, product_reference(x, whole[:, :64], None, None, None, stack))


def test_what_lies_end_to_end_is_joined_without_a_copy() -> None:
    whole = torch.arange(60.0).view(10, 6)[:, :4]
    parts = list(whole.split([3, 5, 2]))
    joined = end_to_end(parts)
    assert torch.equal(joined, whole)
    assert joined.data_ptr() == whole.data_ptr()
    for others in ([parts[1], parts[0]], [parts[0], parts[2]], [parts[0], parts[1].clone()]):
        joined = end_to_end(others)
        assert torch.equal(joined, torch.cat(others))
        assert joined.untyped_storage().data_ptr() != whole.untyped_storage().data_ptr()
