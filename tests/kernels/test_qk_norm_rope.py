"""Norm and rotation of queries and keys in one kernel are those of float64, forward and backward."""

import pytest
import torch
from torch import Tensor

from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.qk_norm_rope import HeadNorm, Rotation, norm_rotate, norm_rotate_backward

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, EPS = 5, 1e-5
SHAPES = {"grouped": (5, 2, 16), "one key, more heads than a program takes": (9, 1, 16), "96 features": (2, 2, 96)}
WAYS = {  # share of a head that is rotated, interleaved pairs, norm, norm behind the rotation, scale of the queries
    "qwen3": (1.0, False, True, False, False),
    "norm behind the rotation": (1.0, False, True, True, True),
    "part of a head in interleaved pairs": (0.5, True, True, True, False),
    "part of a head": (0.5, False, True, False, False),
    "scale alone": (1.0, False, False, False, True),
    "no rotation": (0.0, False, True, False, True),
    "normed values": (1.0, False, True, False, False),
    "keys as values": (0.5, False, True, True, True),
}


def rotated(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """The first R features of x (T, heads, D) turned by angles (T, R / 2), as complex numbers."""
    half = angles.size(1)
    if not half:
        return x
    pairs = x[..., : 2 * half].unflatten(-1, (half, 2) if interleaved else (2, half))
    pairs = pairs if interleaved else pairs.mT
    turned = torch.view_as_real(
        torch.view_as_complex(pairs.contiguous()) * torch.polar(angles * 0 + 1, angles)[:, None]
    )
    turned = turned if interleaved else turned.mT
    return torch.cat((turned.flatten(-2), x[..., 2 * half :]), dim=-1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
def test_queries_keys_and_gradient_are_those_of_float64(shape: str, way: str) -> None:
    heads, (share, interleaved, normed, late, scales) = SHAPES[shape], WAYS[way]
    (queries, keys, size), of_keys = heads, way == "keys as values"
    half = int(share * size / 2)
    torch.manual_seed(0)
    x = torch.randn(T, (queries + (1 if of_keys else 2) * keys) * size, dtype=torch.float64)
    weights, scale = torch.rand(2, size, dtype=torch.float64) + 0.5, torch.rand(T, dtype=torch.float64) + 0.5
    positions, angles = torch.randperm(7)[:T], 3 * torch.randn(7, half, dtype=torch.float64)

    def meaning(part: Tensor, weight: Tensor, factor: Tensor) -> Tensor:
        part = part * torch.rsqrt(part.square().mean(-1, keepdim=True) + EPS) if normed else part
        part = part * weight if normed and not late else part
        part = rotated(part, angles[positions], interleaved)
        return (part * weight if normed and late else part) * factor[:, None, None]

    leaf = x.clone().requires_grad_()
    q, k, *rest = leaf.view(T, -1, size).split((queries, keys) if of_keys else (queries, keys, keys), dim=1)
    v, values = k if of_keys else rest[0], "values" in way
    v = v * torch.rsqrt(v.square().mean(-1, keepdim=True) + EPS) if values else v
    one = torch.ones(T, dtype=torch.float64)
    expected = meaning(q, weights[0], scale if scales else one), meaning(k, weights[1], one)
    upstream = [torch.randn_like(part) for part in (q, k, v)]
    total = sum((part * d).sum() for part, d in zip((*expected, v), upstream, strict=True))
    (gradient,) = torch.autograd.grad(total, leaf)

    def low(tensor: Tensor) -> Tensor:
        return tensor.float().to(DEVICE)

    norm = HeadNorm(low(weights), EPS, late, values, of_keys) if normed else None
    rotation = Rotation(positions.int().to(DEVICE), low(angles.cos()), low(angles.sin()), interleaved) if half else None
    settings = norm, rotation, low(scale) if scales else None
    found = norm_rotate(low(x), *settings, heads)
    back = norm_rotate_backward(*map(low, upstream), low(x), *settings)
    for ours, theirs in zip((*found, back), (*expected, v, gradient), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs.detach(), rtol=2e-5, atol=2e-5)
