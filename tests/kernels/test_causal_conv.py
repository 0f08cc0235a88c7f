"""The convolution before a delta net or state space is that of float64, both ways, and stays in documents."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels.causal_conv import HeadConv, convolve, convolve_backward
from lit_qlora.kernels.launch import AVAILABLE

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FIRSTS = [0, 0, 0, 0, 0, 5, 6, 6, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 8, 19]
"""The first token of each token's document, some shorter than the convolution."""
SHAPES = {  # features of keys, of values and of a head; norm, bias
    "delta net, more tokens than a program takes": (256, 512, 256, True, False),
    "values of other heads, not a power of 2": (24, 44, 12, True, False),
    "state space": (32, 80, 32, False, True),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_queries_keys_values_and_gradient_are_those_of_float64(shape: str) -> None:
    keys, values, size, norms, biased = SHAPES[shape]
    torch.manual_seed(0)
    width, tokens = 2 * keys + values, len(FIRSTS)
    x = torch.randn(tokens, width + 7, dtype=torch.float64)  # more columns than are convolved
    taps, bias = torch.randn(4, width, dtype=torch.float64), torch.randn(width, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    rows = []
    for t, first in enumerate(FIRSTS):
        seen = range(max(first, t - 3), t + 1)
        rows.append(sum((leaf[u, :width] * taps[3 - (t - u)] for u in seen), bias if biased else torch.zeros(width)))
    parts = list(F.silu(torch.stack(rows)).split((keys, keys, values), dim=1))  # type: ignore[arg-type]
    if norms:
        for i, scale in ((0, 0.3), (1, 1.0)):
            heads = parts[i].unflatten(1, (-1, size))
            length = (heads.square().sum(-1, keepdim=True) + 1e-3).sqrt()
            parts[i] = (scale * heads / length).flatten(1)
    upstream = [torch.randn_like(part) for part in parts]
    (gradient,) = torch.autograd.grad(sum((part * d).sum() for part, d in zip(parts, upstream, strict=True)), leaf)  # type: ignore[arg-type]

    def low(tensor: Tensor) -> Tensor:
        return tensor.float().to(DEVICE)

    conv = HeadConv(low(taps), low(bias) if biased else None, keys, values, size, 0.3, 1e-3 if norms else None)
    firsts = torch.tensor(FIRSTS, dtype=torch.int32, device=DEVICE)
    found, d_x = convolve(low(x), firsts, conv), torch.full_like(low(x), 5.0)
    convolve_backward(*map(low, upstream), low(x), firsts, conv, d_x)
    for ours, theirs in zip((*found, d_x[:, :width]), (*parts, gradient[:, :width]), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=2e-5, atol=2e-5)
    assert (d_x[:, width:] == 5).all()
