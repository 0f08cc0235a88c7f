"""Attention with sinks from attention without them."""

import pytest
import torch

from lit_qlora.fused.attention import _with_sinks
from lit_qlora.kernels.attention import Scores, attend, attend_backward
from lit_qlora.kernels.launch import AVAILABLE
from tests.kernels.test_attention import DEVICE, meaning

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")


@pytest.mark.parametrize("cap", [None, 4.0])
def test_sum_and_output_of_the_whole_softmax_give_the_gradients_with_sinks(cap: float | None) -> None:
    """The backward pass of attention knows no sinks: flash attention's is of the same form as the kernel's."""
    ends, scores = [0, 11, 40], Scores(0.4, cap, window=20)
    torch.manual_seed(0)
    q, k, v = (torch.randn(40, heads, 16, dtype=torch.float64).requires_grad_() for heads in (4, 2, 2))
    sinks, d_out = 2 * torch.randn(4, dtype=torch.float64), torch.randn(40, 4, 16, dtype=torch.float64)
    exact = meaning(q, k, v, ends, scores, sinks)
    gradients = torch.autograd.grad(exact, (q, k, v), d_out)

    own = [x.detach().float().to(DEVICE) for x in (q, k, v)]
    layout = torch.tensor(ends, dtype=torch.int32, device=DEVICE), 29
    out, log_sum = attend(*own, scores, *layout)
    out, log_sum = _with_sinks(out, log_sum.T, sinks.float().to(DEVICE))
    back = attend_backward(d_out.float().to(DEVICE), *own, out, log_sum.T.contiguous(), scores, *layout)
    for ours, theirs in zip((out, *back), (exact, *gradients), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=1e-4, atol=2e-5)
