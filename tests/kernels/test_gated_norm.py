"""The norm with a gate is that of float64, forward and backward, with the gate behind it or before it."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels.gated_norm import GatedNorm, gated_norm, gated_norm_backward
from lit_qlora.kernels.launch import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("groups", "size", "shared", "before"),
    [(3, 128, True, False), (5, 24, True, False), (2, 96, False, True), (1, 2500, False, True)],
)
def test_output_and_both_gradients_are_those_of_float64(groups: int, size: int, shared: bool, before: bool) -> None:
    torch.manual_seed(0)
    tokens, width = 7, groups * size
    x, z = torch.randn(tokens, width, dtype=torch.float64), torch.randn(tokens, width + 9, dtype=torch.float64)
    weight, d_out = torch.rand(size if shared else width, dtype=torch.float64), torch.randn_like(x)
    leaves = x.clone().requires_grad_(), z.clone().requires_grad_()
    share = F.silu(leaves[1][:, 9:])
    normed = F.rms_norm((leaves[0] * share if before else leaves[0]).unflatten(1, (groups, size)), (size,), eps=1e-3)
    expected = (normed * weight.view(-1, size)).flatten(1)
    expected = expected if before else expected * share
    gradients = torch.autograd.grad(expected, leaves, d_out)

    def low(tensor: Tensor) -> Tensor:
        return tensor.float().to(DEVICE)

    norm, d_z = GatedNorm(low(weight), 1e-3, groups, before), torch.full_like(low(z), 5.0)
    found = gated_norm(low(x), low(z)[:, 9:], norm)
    d_x = gated_norm_backward(low(d_out), low(x), low(z)[:, 9:], norm, d_z[:, 9:])
    meant = expected, gradients[0], gradients[1][:, 9:]
    for ours, theirs in zip((found, d_x, d_z[:, 9:]), meant, strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=2e-5, atol=2e-5)
    assert (d_z[:, :9] == 5).all()
