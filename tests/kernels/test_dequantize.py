"""Dequantisation in one launch is bitsandbytes' own, to the last bit, for stacks of every shape."""

import pytest
import torch

from lit_qlora.kernels.dequantize import dequantize, dequantize_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.stack import Stack
from lit_qlora.quantize import QuantizedLinear, stack_weights
from lit_qlora.settings import SCHEMES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float32, torch.bfloat16]
QUANTIZED = [scheme for scheme in SCHEMES if scheme != "none"]
STACKS = [
    (Stack(rows=(33,), slots=(-1,), r=0), 64),
    (Stack(rows=(7,), slots=(0,), r=3), 192),
    (Stack(rows=(256, 128, 128), slots=(0, -1, 1), r=8), 256),
    (Stack(rows=(128, 128), slots=(0, 1), r=16), 192),
    (Stack(rows=(3, 2), slots=(0, 1), r=4), 8192),
    (Stack(rows=(40, 24, 30), slots=(1, -1, 0), r=70), 64),
    (Stack(rows=(40, 24), slots=(0, 0), r=20), 64),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize(("stack", "k"), STACKS, ids=str)
def test_the_workspace_holds_what_bitsandbytes_dequantises_and_b(
    stack: Stack, k: int, scheme: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    layers = [QuantizedLinear(torch.randn(n, k, device=DEVICE, dtype=dtype), None, scheme) for n in stack.rows]
    weights = torch.cat([layer.dequantize() for layer in layers])
    weight = stack_weights(layers)
    assert weight is not None
    b = torch.randn(stack.adapted_rows, stack.r, device=DEVICE, dtype=dtype) if stack.rank else None
    out, expected = (torch.full((stack.n, k + stack.rank), 7.0, device=DEVICE, dtype=dtype) for _ in range(2))
    dequantize(weight, b, out, stack, stack.table(DEVICE))
    dequantize_reference(weight, b, expected, stack)
    assert torch.equal(out, expected)
    assert torch.equal(out[:, :k], weights)
    assert torch.equal(torch.cat([layer.dequantize() for layer in layers]), weights)  # of which they keep views
