"""The convolution between two gates is that of float64, forward and backward, and stays in documents."""

import pytest
import torch

from lit_qlora.kernels.gated_conv import GatedConv, gated_conv, gated_conv_backward
from lit_qlora.kernels.launch import AVAILABLE
from tests.kernels.test_causal_conv import FIRSTS

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("biased", [False, True])
def test_output_and_gradient_are_those_of_float64(biased: bool) -> None:
    torch.manual_seed(0)
    width = 270  # more than a program takes
    x, taps = torch.randn(len(FIRSTS), 3 * width, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    bias, d_out = torch.randn(width, dtype=torch.float64), torch.randn(len(FIRSTS), width, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    entrance, leaves, value = leaf.chunk(3, dim=1)
    rows = []
    for t, first in enumerate(FIRSTS):
        seen = range(max(first, t - 2), t + 1)
        start = bias if biased else torch.zeros(width)
        rows.append(leaves[t] * sum(((entrance * value)[u] * taps[2 - (t - u)] for u in seen), start))
    expected = torch.stack(rows)
    (gradient,) = torch.autograd.grad(expected, leaf, d_out)
    x, taps, bias, d_out = (tensor.float().to(DEVICE) for tensor in (x, taps, bias, d_out))
    firsts = torch.tensor(FIRSTS, dtype=torch.int32, device=DEVICE)
    conv = GatedConv(taps, bias if biased else None)
    found = gated_conv(x, firsts, conv), gated_conv_backward(d_out, x, firsts, conv)
    for ours, theirs in zip(found, (expected, gradient), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=2e-5, atol=2e-5)
