"""The gated delta rule by kernels is the one of torch, forward and backward, packed or not."""

import pytest
import torch
import torch.nn.functional as F

from lit_qlora.fused.attention import Layout
from lit_qlora.fused.delta_rule import by_kernels, why_no_kernels
from lit_qlora.fused.documents import Documents
from lit_qlora.model.delta_net import delta_rule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("size", [32, 64, 128])
@pytest.mark.parametrize("packed", [False, True])
def test_they_are_as_near_to_float64_as_bfloat16_allows(packed: bool, size: int) -> None:
    """Keys of 128 fail on a Hopper with Triton 3.4 to 3.7.0 where lift_refusal is left out: fla-core refuses them."""
    pytest.importorskip("fla")
    cuda = torch.device("cuda")
    if reason := why_no_kernels(torch.cuda.get_device_capability(), size):
        pytest.skip(reason)
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 200, heads, size, device=cuda, dtype=torch.float64) for heads in (2, 2, 4))
    parts = [
        F.normalize(q, dim=-1) / size**0.5,
        F.normalize(k, dim=-1),
        v,
        -torch.rand(2, 200, 4, device=cuda, dtype=torch.float64),
        torch.rand(2, 200, 4, device=cuda, dtype=torch.float64),
    ]
    segments = torch.tensor([[0] * 70 + [1] * 130, [0] * 199 + [-1]]) if packed else None
    documents = None if segments is None else segments.to(cuda)
    exact = [part.clone().requires_grad_() for part in parts]
    weight = torch.randn_like(v)
    q, k, v, kept, beta = exact
    q, k = (x.repeat_interleave(2, dim=2) for x in (q, k))  # a head of keys serves two of values
    expected = delta_rule(q, k, v, kept, beta, documents)[0]
    gradients = torch.autograd.grad((expected * weight).sum(), exact)
    low = [part.float().requires_grad_() for part in parts]
    q, k, v = (part.bfloat16() for part in low[:3])
    found = by_kernels(q, k, v, low[3], low[4], Documents.of(Layout.of(2, 200, segments, cuda), cuda))
    own = torch.autograd.grad((found.float() * weight.float()).sum(), low)
    for ours, theirs in zip((found, *own), (expected, *gradients), strict=True):
        assert (ours.double() - theirs).norm() < 2e-2 * theirs.norm()
