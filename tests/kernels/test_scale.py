"""Rows are multiplied in float32 and rounded once."""

import pytest
import torch
from torch import Tensor

from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.scale import scale_

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
FACTORS = {"one": torch.tensor(1 / 3871), "each": torch.rand(5, 1), "the same": torch.tensor(1 / 3871).expand(5, 1)}


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_factor_is_not_rounded_to_the_rows_dtype(dtype: torch.dtype, factor: Tensor) -> None:
    x, factor = (3000 * torch.randn(5, 2100, device=DEVICE)).to(dtype), factor.to(DEVICE)
    expected = (x.double() * factor.double()).to(dtype)
    assert scale_(x, factor) is x
    torch.testing.assert_close(x, expected, rtol=torch.finfo(dtype).eps / 2, atol=0)
