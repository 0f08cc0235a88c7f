"""The gate of attention's output is that of float64, forward and backward."""

import pytest
import torch

from lit_qlora.kernels.gate import gate_backward, gate_forward
from lit_qlora.kernels.launch import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_the_product_and_both_gradients_are_those_of_float64() -> None:
    torch.manual_seed(0)
    x, d_out = torch.randn(3, 1100), torch.randn(3, 1100)
    stacked = torch.randn(3, 1500)  # gates are columns of a wider product
    exact = x.double().requires_grad_(), stacked[:, 400:].double().requires_grad_()
    expected = exact[0] * exact[1].sigmoid()
    gradients = torch.autograd.grad(expected, exact, d_out.double())
    out, d_x, d_stacked = (t.to(DEVICE) for t in (torch.zeros(3, 1108), d_out.clone(), torch.zeros(3, 1500)))
    gates = stacked.to(DEVICE)[:, 400:]
    gate_forward(x.to(DEVICE), gates, out)
    gate_backward(d_x, x.to(DEVICE), gates, d_stacked[:, 400:])
    for found, meant in zip((out[:, :1100], d_x, d_stacked[:, 400:]), (expected, *gradients), strict=True):
        torch.testing.assert_close(found.cpu().double(), meant.detach(), rtol=1e-5, atol=1e-5)
    assert not out[:, 1100:].any()
    assert not d_stacked[:, :400].any()
