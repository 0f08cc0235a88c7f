"""A token's products with its own experts are those with their dequantised weights."""

import pytest
import torch

from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.chosen_experts import product, product_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import Stack
from lit_qlora.quantize import QuantizedLinear, stack_matrices

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
CHOSEN = torch.tensor([[2, 0], [2, 1]], device=DEVICE)
GATE_AND_UP = (Stack((64, 64), (-1, 0), 3), 256)
"""Scales of each fill whole blocks of codes."""
ODD = (Stack((34,), (0,), 8), 192)
"""Programs of four rows do not divide it."""
CASES = [(*GATE_AND_UP, scheme) for scheme in ("none", "bnb.nf4", "bnb.nf4-dq", "bnb.int8")]
CASES += [(*ODD, scheme) for scheme in ("none", "bnb.nf4", "bnb.int8")]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("stack", "k", "scheme"), CASES, ids=str)
def test_a_product_is_that_with_the_dequantised_weights_of_the_chosen_experts(
    stack: Stack, k: int, scheme: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small_batch_linear, "BUSY_ROWS", 1)
    torch.manual_seed(0)
    weights = torch.randn(3, len(stack.rows), stack.rows[0], k, device=DEVICE, dtype=dtype)
    if scheme == "none":
        packed = dense = weights.flatten(1, 2)
    else:
        layers = [QuantizedLinear(weight, None, scheme) for weight in weights.flatten(0, 1)]
        packed = stack_matrices(layers)
        dense = torch.stack([layer.dequantize() for layer in layers]).view(3, stack.n, k)
    bias = torch.randn(3, stack.n, device=DEVICE, dtype=dtype)
    z = torch.randn(4, stack.rank, device=DEVICE, dtype=dtype)
    b = torch.randn(3, stack.adapted_rows, stack.r, device=DEVICE, dtype=dtype)
    shares = torch.rand(2, 2, device=DEVICE)
    of_tokens, of_choices = (torch.randn(rows, k, device=DEVICE, dtype=dtype) for rows in (2, 4))
    y = product(of_choices, packed, CHOSEN, stack, stack.table(DEVICE), bias, z, b, shares, torch.float32)
    expected = product_reference(of_choices, dense, CHOSEN, stack, bias, z, b, shares)
    assert torch.allclose(y, expected, rtol=1e-5, atol=1e-4)
    y = product(of_tokens, packed, CHOSEN, stack, stack.table(DEVICE))
    assert y.dtype == dtype
    expected = product_reference(of_tokens, dense, CHOSEN, stack)
    assert torch.allclose(y.float(), expected, rtol=1e-5 if dtype == torch.float32 else 8e-3, atol=1e-4)
