"""The shares that a delta net forgets and corrects are those of float64, forward and backward."""

import pytest
import torch
import torch.nn.functional as F

from lit_qlora.kernels.delta_gates import gates_backward, gates_forward
from lit_qlora.kernels.launch import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_both_shares_and_the_gradient_are_those_of_float64() -> None:
    torch.manual_seed(0)
    heads, tokens = 6, 200  # more elements than a program takes
    x, rate = 20 * torch.randn(tokens, 2 * heads), torch.rand(heads) + 0.1
    bias, upstream = torch.randn(heads), torch.randn(2, tokens, heads)
    leaf = x.double().requires_grad_()
    kept = -rate.double() * F.softplus(leaf[:, heads:] + bias.double(), threshold=1000)
    expected = kept, leaf[:, :heads].sigmoid()
    (gradient,) = torch.autograd.grad(
        sum((part * d).sum() for part, d in zip(expected, upstream.double(), strict=True)), leaf
    )
    x, rate, bias, upstream = (tensor.to(DEVICE) for tensor in (x, rate, bias, upstream))
    found = *gates_forward(x, rate, bias), gates_backward(upstream[0], upstream[1], x, rate, bias)
    for ours, theirs in zip(found, (*expected, gradient), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=1e-5, atol=1e-5)
