"""Norm, low-rank products, activations, RoPE and cross-entropy compute what their references compute."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.fused.mlp import ACTIVATIONS
from lit_qlora.kernels import mlp
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.cross_entropy import cross_entropy_, cross_entropy_reference
from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.launch import AVAILABLE, tiled
from lit_qlora.kernels.lora_products import (
    Pending,
    copy_rows,
    copy_scaled,
    grad_a,
    grad_b,
    project,
    rank_update,
    scale_rows,
)
from lit_qlora.kernels.mlp import mlp_backward, mlp_forward
from lit_qlora.kernels.norm import Norm, add_norm, norm_backward, norm_backward_reference, norm_reference
from lit_qlora.kernels.normed_input import normed_input_backward
from lit_qlora.kernels.rope import rotate_, rotate_backward, rotate_reference
from lit_qlora.kernels.stack import Stack
from lit_qlora.model.mlp import ACTIVATIONS as ACTIVATE
from lit_qlora.model.mlp import GATES

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEAR = 1e-5 if DEVICE == "cpu" else 2e-3  # on a GPU, products of float32 are in tf32
DROPOUTS = [NONE, Dropout(0.3, torch.tensor([12345], device=DEVICE), offset=7)]


def plain_activation(kind: str, x: Tensor) -> Tensor:
    """The activation of model.py of gate and up side by side, or of up alone."""
    return ACTIVATE[kind]()(x) if kind in ACTIVATE else GATES[kind](*x.chunk(2, 1))


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE)


def assert_near(actual: Tensor, expected: Tensor) -> None:
    """Equal up to rounding, measured over the whole tensor; a NaN is never near."""
    assert float((actual - expected).norm()) <= NEAR * float(expected.norm())


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_norm(kind: str, width: int) -> Norm:
    """A norm with all that its kind can have; "bare" is a layer norm without weight."""
    weight, bias = rand(width), rand(width) if kind == "layer" else None
    return Norm("layer", 1e-5) if kind == "bare" else Norm(kind, 1e-5, weight, bias)


NORMS = ["rms", "layer", "bare", "none"]


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("width", [64, 96, 1000])
@pytest.mark.parametrize("with_y", [True, False])
def test_norm_of_the_sum(width: int, with_y: bool, kind: str) -> None:
    x, norm = rand(5, width), make_norm(kind, width)
    y = rand(5, width) if with_y else None
    out = torch.full((5, width + 3), 7.0, device=DEVICE)
    total, statistics = add_norm(x, y, norm, out)
    assert_near(total, x if y is None else x + y)
    assert_near(out[:, :width], norm_reference(total, norm))
    assert statistics.shape == (norm.statistics, 5)
    assert (out[:, width:] == 7).all()


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("beside", [0, 3])
@pytest.mark.parametrize("with_residual", [True, False])
def test_backward_of_the_norm(beside: int, with_residual: bool, kind: str) -> None:
    width, rows = 96, 19
    x, norm, d_out = rand(rows, width), make_norm(kind, width), rand(rows, width + beside)[:, :width]
    residual = rand(rows, width) if with_residual else None
    _, statistics = add_norm(x, None, norm, torch.empty_like(x))
    actual = norm_backward(d_out, x, norm, statistics, residual)
    assert_near(actual, norm_backward_reference(d_out, x, norm, residual))


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("weight", [True, False], ids=["", "bare"])
@pytest.mark.parametrize(("rows", "width", "rank"), [(19, 96, 3), (150, 200, 16), (1, 64, 48)])
def test_backward_of_the_norm_before_adapters(rows: int, width: int, rank: int, weight: bool, dropout: Dropout) -> None:
    norm = Norm("rms", 1e-5, rand(width) if weight else None)
    x, residual, d_out, a = rand(rows, width), rand(rows, width), rand(rows, width + rank), rand(rank, width)
    _, statistics = add_norm(x, None, norm, torch.empty_like(x))
    kept = factor_reference(rows, width, dropout, DEVICE)
    leaves = [x.clone().requires_grad_(), a.clone().requires_grad_()]
    normed = norm_reference(leaves[0], norm)
    z = (normed * kept) @ leaves[1].T
    loss = (normed * d_out[:, :width]).sum() + (z * d_out[:, width:]).sum() + (leaves[0] * residual).sum()
    exact = torch.autograd.grad(loss, leaves)
    of_a, pending, z = torch.ones_like(a), Pending(), z.detach()
    d_x = normed_input_backward(d_out, x, z, a, of_a, 0.5, pending, norm, statistics, residual, dropout)
    without = normed_input_backward(d_out, x, z, a, torch.ones_like(a), 0.5, Pending(), norm, statistics, None, dropout)
    pending.flush()
    assert_near(d_x, exact[0])
    assert_near(without, d_x - residual)
    assert_near(of_a, 1 + 0.5 * exact[1])


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["in place", "copy", *ACTIVATIONS])
@pytest.mark.parametrize(("rows", "k", "rank"), [(1, 64, 8), (70, 200, 3), (65, 1030, 48)])
def test_projection(rows: int, k: int, rank: int, kind: str, dropout: Dropout) -> None:
    a, out = rand(rank, k) / k**0.5, torch.full((rows, k + rank), 7.0, device=DEVICE)
    activation = ACTIVATIONS.get(kind)
    x = rand(rows, k * activation.branches if activation else k)
    expected = plain_activation(kind, x) if activation else x
    if kind == "in place":
        out[:, :k] = x
        z = project(out, a, out, dropout=dropout)
    else:
        z = project(x, a, out, activation, copy=kind == "copy", dropout=dropout)
    assert_near(out[:, :k], expected)
    expected_z = (expected * factor_reference(rows, k, dropout, DEVICE)) @ a.T
    assert_near(z, expected_z)
    assert_near(out[:, k:], expected_z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])  # the interpreter cuts bfloat16 off
def test_a_scaled_copy_is_rounded_once(dtype: torch.dtype) -> None:
    x, out = rand(3, 1000), torch.zeros(3001, device=DEVICE, dtype=dtype)
    copy_scaled(x, 1 / 3, out[:3000].view(3, 1000))
    assert torch.equal(out, torch.cat(((x.flatten() * (1 / 3)).to(dtype), out.new_zeros(1))))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_rows_times_their_factors_are_rounded_once(dtype: torch.dtype) -> None:
    x, factors = rand(37, 200).to(dtype), rand(37)
    assert torch.equal(scale_rows(x[:, 3:100], factors), (x[:, 3:100].float() * factors[:, None]).to(dtype))


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
def test_rank_update(dropout: Dropout) -> None:
    d_out, a = rand(37, 200 + 5), rand(5, 200)
    expected = d_out[:, :200] + d_out[:, 200:] @ a * factor_reference(37, 200, dropout, DEVICE)
    assert_near(rank_update(d_out, a, 200, dropout), expected)


@pytest.mark.parametrize("dropout", DROPOUTS, ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["rms", "layer", "bare", ""])
@pytest.mark.parametrize(("rows", "k", "rank"), [(70, 200, 3), (130, 4100, 20)])
def test_gradient_of_a(rows: int, k: int, rank: int, kind: str, dropout: Dropout) -> None:
    x, dz, gradient = rand(rows, k), rand(rows, rank), rand(rank, k)
    norm = make_norm(kind, k) if kind else Norm("none")
    _, statistics = add_norm(x, None, norm, torch.empty_like(x))
    expected = gradient + 2 * dz.T @ (norm_reference(x, norm) * factor_reference(rows, k, dropout, DEVICE))
    pending = Pending()
    grad_a(x, dz, gradient, 2.0, pending, norm, statistics, dropout)
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
@pytest.mark.parametrize(
    ("kind", "slots"),
    [
        (kind, slots)
        for kind, activation in ACTIVATIONS.items()
        for slots in ([(0, 1), (-1, 0), (0, -1), (-1, -1)] if activation.gated else [(0,), (-1,)])
    ],
    ids=str,
)
@pytest.mark.parametrize("rank", [0, 5, 20, 40])
def test_backward_of_the_mlp(rank: int, kind: str, slots: tuple[int, ...], dropout: Dropout) -> None:
    activation = ACTIVATIONS[kind]
    rows, width, r = 70, 128, 4 if rank == 20 else 3  # rows of 16 bytes are read by tiles
    stack = Stack((width,) * len(slots), slots, r if max(slots) >= 0 else 0)
    branches, dh = rand(rows, activation.branches * width), rand(rows, width + rank)
    a = rand(rank, width) if rank else None
    z = rand(rows, stack.rank) if stack.rank else None
    leaf = branches.clone().requires_grad_()
    h = plain_activation(kind, leaf)
    kept = factor_reference(rows, width, dropout, DEVICE)
    loss = (h * dh[:, :width]).sum() + (((h * kept) @ a.T * dh[:, width:]).sum() if a is not None else 0)
    expected = torch.autograd.grad(loss, leaf)[0]
    grads_a = torch.zeros(rank, width, device=DEVICE) if rank else None
    grads_b = torch.zeros(stack.adapted_rows, r, device=DEVICE) if z is not None else None
    pending = Pending()
    mlp_backward(branches, dh, activation, a, grads_a, z, grads_b, stack, 2.0, pending, dropout, writes_h=rank == 0)
    pending.flush()
    assert_near(branches, expected)
    if rank == 0:
        assert_near(dh, (h * kept).detach())
    if grads_a is not None:
        assert_near(grads_a, 2 * dh[:, width:].T @ (h * kept).detach())
    if grads_b is not None and z is not None:
        parts = expected.split(width, 1)
        wanted = [parts[p].T @ z[:, s * r : (s + 1) * r] for p, s in enumerate(slots) if s >= 0]
        assert_near(grads_b, torch.cat(wanted))


@pytest.mark.parametrize(("rank", "width", "by_tiles"), [(16, 192, True), (6, 192, False), (16, 96, False)])
def test_only_hopper_reads_an_mlp_by_tiles_and_no_odd_one(
    rank: int, width: int, by_tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Tensor] = []

    def counted(x: Tensor, *block: int) -> Any:
        made.append(x)
        return tiled(x, *block)

    monkeypatch.setattr(mlp, "tiled", counted)
    monkeypatch.setattr(mlp, "is_hopper", lambda _: True)
    stack, a, z = Stack((width, width), (0, 1), rank), rand(rank, width), rand(40, 2 * rank)
    fresh, dh = rand(40, 2 * width), rand(40, width + rank)

    def run() -> list[Tensor]:
        branches, pending = fresh.clone(), Pending()
        grad_a, grad_b = torch.zeros(rank, width, device=DEVICE), torch.zeros(2 * width, rank, device=DEVICE)
        mlp_backward(branches, dh, Activation("silu", True), a, grad_a, z, grad_b, stack, 2.0, pending)
        pending.flush()
        return [branches, grad_a, grad_b]

    found = run()
    assert bool(made) == by_tiles
    made.clear()
    monkeypatch.setattr(mlp, "is_hopper", lambda _: False)
    for actual, expected in zip(found, run(), strict=True):
        assert_near(actual, expected)
    assert made == []


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # 1 / (1 + infinity) is meant
def test_silu_is_exact_for_gates_of_any_size() -> None:
    gate = torch.cat([torch.linspace(-300, 300, 601), torch.linspace(-1e-30, 1e-30, 7)]).to(DEVICE)
    out = torch.empty(1, len(gate), device=DEVICE)
    mlp_forward(torch.cat([gate, torch.ones_like(gate)])[None], out, Activation("silu", True))
    torch.testing.assert_close(out[0].double(), F.silu(gate.double()), rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_activation_alone(kind: str) -> None:
    activation = ACTIVATIONS[kind]
    branches, out = rand(3, activation.branches * 100), torch.full((3, 104), 7.0, device=DEVICE)
    mlp_forward(branches, out, activation)
    assert_near(out[:, :100], plain_activation(kind, branches))
    assert (out[:, 100:] == 7).all()


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [32, 16, 8])
def test_rotation_and_its_way_back(rotated: int, interleaved: bool) -> None:
    rows, heads, groups, head_size = 7, 4, 2, 32
    angle = rand(20, rotated // 2)
    cos, sin, positions = angle.cos(), angle.sin(), torch.randint(0, 20, (rows,), device=DEVICE, dtype=torch.int32)
    qkv = rand(rows, (heads + 2 * groups) * head_size)

    def plain(x: Tensor) -> Tensor:
        split = x.view(rows, -1, head_size)
        turned = rotate_reference(
            split[:, : heads + groups], cos[positions.long()][:, None], sin[positions.long()][:, None], interleaved
        )
        return torch.cat((turned, split[:, heads + groups :]), 1)

    leaf = qkv.clone().requires_grad_()
    expected = plain(leaf)
    actual = qkv.clone()
    rotate_(actual, positions, cos, sin, heads + groups, head_size, interleaved)
    torch.testing.assert_close(actual.view(rows, -1, head_size), expected.detach())
    d = rand(rows, heads + 2 * groups, head_size)
    dq, dk, dv = d.split((heads, groups, groups), 1)
    back = rotate_backward(dq, dk, dv, positions, cos, sin, interleaved)
    torch.testing.assert_close(back, torch.autograd.grad(expected, leaf, d)[0])


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("vocab", [17, 5000, 70_000])
def test_cross_entropy(vocab: int, cap: float | None) -> None:
    logits, weights = 3 * rand(9, vocab), rand(9).abs()
    labels = torch.randint(0, vocab, (9,), device=DEVICE)
    labels[2] = -100
    leaf = logits.clone().requires_grad_()
    soft = leaf if cap is None else cap * torch.tanh(leaf / cap)
    plain = (weights * F.cross_entropy(soft, labels, reduction="none")).sum()
    expected_loss, expected = cross_entropy_reference(logits, labels, weights, cap)
    torch.testing.assert_close(expected, torch.autograd.grad(plain, leaf)[0])
    loss = torch.full((9,), 7.0, device=DEVICE)
    cross_entropy_(logits, labels, weights, loss, cap)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(logits, expected)
    assert loss[2] == 0


@pytest.mark.parametrize("vocab", [17, 70_000])
def test_cross_entropy_of_logits_far_below_zero_and_none(vocab: int) -> None:
    logits = rand(3, vocab) - 1000
    logits[:, : vocab // 2] = -math.inf  # as the bias of a token that must not be said
    labels = torch.tensor([vocab - 1, vocab - 2, -100], device=DEVICE)
    loss, hits, ones = torch.empty(3, device=DEVICE), torch.zeros((), dtype=torch.int64, device=DEVICE), rand(3).abs()
    expected = F.cross_entropy(logits, labels, reduction="none") * ones
    gradient = (logits.softmax(-1) - F.one_hot(labels.clamp(min=0), vocab)) * ((labels >= 0) * ones)[:, None]
    right = int((logits.argmax(-1) == labels).sum())
    cross_entropy_(logits, labels, ones, loss, None, hits)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits, gradient, rtol=1e-3, atol=1e-5)
    assert int(hits) == right


@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("vocab", [17, 5000, 70_000])  # a part of a block, and three blocks
def test_a_hit_is_a_label_that_torch_s_argmax_is(vocab: int, cap: float | None) -> None:
    logits = rand(8, vocab)
    logits[:4, [3, vocab - 1]] = 9.0  # equal ones: the first counts
    labels = torch.tensor([3, vocab - 1, 3, -100, 5, 6, 7, 8], device=DEVICE)
    labels[4:6] = logits[4:6].argmax(dim=-1)
    weights, hits = torch.ones(8, device=DEVICE), torch.full((), 40, dtype=torch.int64, device=DEVICE)
    right = int((logits.argmax(dim=-1) == labels).sum())
    one, other = (torch.empty(8, device=DEVICE) for _ in range(2))
    same = logits.clone()
    cross_entropy_(same, labels, weights, other, cap)
    cross_entropy_(logits, labels, weights, one, cap, hits)
    assert int(hits) == 40 + right
    assert right >= 4
    assert torch.equal(one, other)
    assert torch.equal(logits, same)


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    def kept(seed: int) -> Tensor:
        return factor_reference(500, 400, Dropout(p, torch.tensor([seed])))

    assert (kept(1) == 0).float().mean().item() == pytest.approx(p, rel=0.05)
    assert kept(1).mean().item() == pytest.approx(1, rel=0.01)
    assert ((kept(1) == 0) & (kept(2) == 0)).float().mean().item() == pytest.approx(p * p, rel=0.2)
    assert (kept(1) == 0).float().mean(0).std() < 0.05


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("width", "behind", "first"), [(64, 16, 0), (64, 8, 0), (64, 3, 0), (63, 16, 0), (64, 16, 1)])
def test_rows_are_copied_whatever_their_place(dtype: torch.dtype, width: int, behind: int, first: int) -> None:
    x = torch.randn(5, width + first).to(dtype)[:, first:]
    out = torch.zeros(5, width + behind, dtype=dtype)
    copy_rows(x, out[:, :width])
    assert torch.equal(out[:, :width], x)
    assert not out[:, width:].any()
