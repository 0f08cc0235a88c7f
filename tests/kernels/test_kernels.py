"""Norm, thin products, SwiGLU, RoPE and cross-entropy compute what their references compute."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels.cross_entropy import cross_entropy_, cross_entropy_reference
from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.norm import add_norm, add_norm_reference, norm_backward, norm_backward_reference
from lit_qlora.kernels.rope import rotate_, rotate_backward, rotate_reference
from lit_qlora.kernels.stack import Stack
from lit_qlora.kernels.swiglu import swiglu, swiglu_backward
from lit_qlora.kernels.thin import Pending, grad_a, grad_b, project, rank_update

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = 1e-5 if DEVICE == "cpu" else 2e-3  # on a GPU, products of float32 are in tf32
DROPOUTS = [NONE, Dropout(p=0.3, seed=12345)]


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, measured over the whole tensor; a NaN is never near."""
    assert float((actual - expected).norm()) <= NEAR * float(expected.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("with_y", [True, False])
def test_norm_of_the_sum(width: int, with_y: bool) -> None:
    x, weight = rand(5, width), rand(width)
    y = rand(5, width) if with_y else None
    out = torch.full((5, width + 3), 7.0, device=DEVICE)
    total, rstd = add_norm(x, y, weight, out, 1e-5)
    for actual, expected in zip((total, out[:, :width], rstd), add_norm_reference(x, y, weight, 1e-5), strict=True):
        assert_near(actual, expected)
    assert (out[:, width:] == 7).all()


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("rank", [0, 3, 16])
def test_backward_of_the_norm(rank: int, dropout: Dropout) -> None:
    width, rows = 96, 19
    x, weight, residual, d_out = rand(rows, width), rand(width), rand(rows, width), rand(rows, width + rank)
    _, normed, rstd = add_norm_reference(x, None, weight, 1e-5)
    a = rand(rank, width) if rank else None
    z = (normed * factor_reference(rows, width, dropout, DEVICE)) @ a.T if a is not None else None
    actual = norm_backward(d_out, x, weight, rstd, z, a, residual, dropout)
    torch.testing.assert_close(actual, norm_backward_reference(d_out, x, weight, rstd, a, residual, dropout))
    leaf = x.clone().requires_grad_()
    normed = leaf * torch.rsqrt(leaf.square().mean(-1, keepdim=True) + 1e-5) * weight
    loss = (normed * d_out[:, :width]).sum() + (leaf * residual).sum()
    if a is not None:
        loss = loss + ((normed * factor_reference(rows, width, dropout, DEVICE)) @ a.T * d_out[:, width:]).sum()
    assert_near(actual, torch.autograd.grad(loss, leaf)[0])


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["in place", "copy", "swiglu"])
@pytest.mark.parametrize(("rows", "k", "rank"), [(1, 64, 8), (70, 200, 3), (65, 1030, 48)])
def test_projection(rows: int, k: int, rank: int, kind: str, dropout: Dropout) -> None:
    a, out = rand(rank, k) / k**0.5, torch.full((rows, k + rank), 7.0, device=DEVICE)
    x = rand(rows, 2 * k if kind == "swiglu" else k)
    expected = F.silu(x[:, :k]) * x[:, k:] if kind == "swiglu" else x
    if kind == "in place":
        out[:, :k] = x
        z = project(out, a, out, dropout=dropout)
    else:
        z = project(x, a, out, swiglu=kind == "swiglu", copy=kind == "copy", dropout=dropout)
    assert_near(out[:, :k], expected)
    expected_z = (expected * factor_reference(rows, k, dropout, DEVICE)) @ a.T
    assert_near(z, expected_z)
    assert_near(out[:, k:], expected_z)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_rank_update(dropout: Dropout) -> None:
    d_out, a = rand(37, 200 + 5), rand(5, 200)
    expected = d_out[:, :200] + d_out[:, 200:] @ a * factor_reference(37, 200, dropout, DEVICE)
    assert_near(rank_update(d_out, a, 200, dropout), expected)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize(("rows", "k", "rank"), [(70, 200, 3), (130, 4100, 20)])
def test_gradient_of_a(rows: int, k: int, rank: int, norm: bool, dropout: Dropout) -> None:
    x, dz, gradient = rand(rows, k), rand(rows, rank), rand(rank, k)
    weight, rstd = rand(k), rand(rows).abs()
    normed = x * rstd[:, None] * weight if norm else x
    expected = gradient + 2 * dz.T @ (normed * factor_reference(rows, k, dropout, DEVICE))
    pending = Pending()
    grad_a(x, dz, gradient, 2.0, pending, rstd if norm else None, weight if norm else None, dropout)
    pending.flush()
    assert_near(gradient, expected)


@pytest.mark.parametrize(
    "stack",
    [
        Stack((64, 32, 32), (0, -1, 1), 4),
        Stack((128, 128), (0, 1), 16),
        Stack((48,), (0,), 3),
        Stack((64, 64), (-1, 0), 8),
    ],
    ids=str,
)
def test_gradient_of_b(stack: Stack) -> None:
    dy, z = rand(70, stack.n), rand(70, stack.rank)
    expected = torch.cat(
        [
            dy_part.T @ z[:, slot * stack.r : (slot + 1) * stack.r]
            for dy_part, slot in zip(dy.split(stack.rows, 1), stack.slots, strict=True)
            if slot >= 0
        ]
    )
    gradient = torch.zeros(stack.adapted_rows, stack.r, device=DEVICE)
    pending = Pending()
    grad_b(dy, z, gradient, stack, stack.table(DEVICE), pending)
    pending.flush()
    assert_near(gradient, expected)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("slots", [(0, 1), (-1, 0), (0, -1), (-1, -1)], ids=str)
@pytest.mark.parametrize("rank", [0, 5])
def test_backward_of_swiglu(rank: int, slots: tuple[int, int], dropout: Dropout) -> None:
    rows, width, r = 70, 128, 3
    stack = Stack((width, width), slots, r if max(slots) >= 0 else 0)
    gate_up, dh = rand(rows, 2 * width), rand(rows, width + rank)
    a = rand(rank, width) if rank else None
    z = rand(rows, stack.rank) if stack.rank else None
    leaf = gate_up.clone().requires_grad_()
    h = F.silu(leaf[:, :width]) * leaf[:, width:]
    kept = factor_reference(rows, width, dropout, DEVICE)
    loss = (h * dh[:, :width]).sum() + (((h * kept) @ a.T * dh[:, width:]).sum() if a is not None else 0)
    expected = torch.autograd.grad(loss, leaf)[0]
    grads_a = torch.zeros(rank, width, device=DEVICE) if rank else None
    grads_b = torch.zeros(stack.adapted_rows, r, device=DEVICE) if z is not None else None
    pending = Pending()
    swiglu_backward(gate_up, dh, a, grads_a, z, grads_b, stack, 2.0, pending, dropout)
    pending.flush()
    assert_near(gate_up, expected)
    if grads_a is not None:
        assert_near(grads_a, 2 * dh[:, width:].T @ (h * kept).detach())
    if grads_b is not None and z is not None:
        parts = [expected[:, :width], expected[:, width:]]
        wanted = [parts[p].T @ z[:, s * r : (s + 1) * r] for p, s in enumerate(slots) if s >= 0]
        assert_near(grads_b, torch.cat(wanted))


def test_swiglu_alone() -> None:
    gate_up, out = rand(3, 2 * 100), torch.full((3, 104), 7.0, device=DEVICE)
    swiglu(gate_up, out)
    torch.testing.assert_close(out[:, :100], F.silu(gate_up[:, :100]) * gate_up[:, 100:])


@pytest.mark.parametrize("rotated", [32, 16, 8])
def test_rotation_and_its_way_back(rotated: int) -> None:
    rows, heads, groups, head_size = 7, 4, 2, 32
    angle = rand(20, rotated // 2)
    cos, sin, positions = angle.cos(), angle.sin(), torch.randint(0, 20, (rows,), device=DEVICE, dtype=torch.int32)
    qkv = rand(rows, (heads + 2 * groups) * head_size)

    def plain(x: Tensor) -> Tensor:
        split = x.view(rows, -1, head_size)
        turned = rotate_reference(
            split[:, : heads + groups], cos[positions.long()][:, None], sin[positions.long()][:, None]
        )
        return torch.cat((turned, split[:, heads + groups :]), 1)

    leaf = qkv.clone().requires_grad_()
    expected = plain(leaf)
    actual = qkv.clone()
    rotate_(actual, positions, cos, sin, heads + groups, head_size)
    torch.testing.assert_close(actual.view(rows, -1, head_size), expected.detach())
    d = rand(rows, heads + 2 * groups, head_size)
    dq, dk, dv = d.split((heads, groups, groups), 1)
    back = rotate_backward(dq, dk, dv, positions, cos, sin)
    torch.testing.assert_close(back, torch.autograd.grad(expected, leaf, d)[0])


@pytest.mark.parametrize("vocab", [17, 5000])
def test_cross_entropy(vocab: int) -> None:
    logits, weights = 3 * rand(9, vocab), rand(9).abs()
    labels = torch.randint(0, vocab, (9,), device=DEVICE)
    labels[2] = -100
    expected_loss, expected = cross_entropy_reference(logits, labels, weights)
    loss = torch.full((9,), 7.0, device=DEVICE)
    cross_entropy_(logits, labels, weights, loss)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(logits, expected)
    assert loss[2] == 0


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    kept: Callable[[int], Tensor] = lambda seed: factor_reference(500, 400, Dropout(p, seed))  # noqa: E731
    assert (kept(1) == 0).float().mean().item() == pytest.approx(p, rel=0.05)
    assert kept(1).mean().item() == pytest.approx(1, rel=0.01)
    assert ((kept(1) == 0) & (kept(2) == 0)).float().mean().item() == pytest.approx(p * p, rel=0.2)
    assert (kept(1) == 0).float().mean(0).std() < 0.05
