"""Kernels sum float16 in float32: their results are float64's up to the rounding of what they read and write."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.fused import large_rank
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.cross_entropy import cross_entropy_
from lit_qlora.kernels.decode_attention import attend, attend_reference
from lit_qlora.kernels.dropout import Dropout, factor_reference
from lit_qlora.kernels.experts import sort
from lit_qlora.kernels.experts_products import LowRank, gate_up, gate_up_reference, product_reference
from lit_qlora.kernels.experts_products import product as experts_product
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.lora_products import Pending, grad_a, grad_b, project, rank_update
from lit_qlora.kernels.mlp import mlp_backward, mlp_forward
from lit_qlora.kernels.norm import Norm, add_norm
from lit_qlora.kernels.normed_input import normed_input_backward
from lit_qlora.kernels.small_batch_linear import product
from lit_qlora.kernels.stack import Stack

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDING = 2**-11
LARGE = 60_000.0
"""Near the largest number of float16, 65,504."""


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def half(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE).half()


def error(actual: Tensor, exact: Tensor) -> float:
    """Over the whole tensor, in roundings of float16; infinite where a number is not finite."""
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual.double() - exact).norm() / exact.norm() / ROUNDING)


def test_norms_of_rows_whose_squares_float16_cannot_hold() -> None:
    x, weight, d_out = LARGE / 4 * half(19, 96).clamp(-3, 3), half(96), 1000 * half(19, 96 + 8)
    norm, a, out = Norm("rms", 1e-5, weight), half(8, 96), torch.empty_like(x)
    _, statistics = add_norm(x, None, norm, out)
    leaf = x.double().requires_grad_()
    exact = F.rms_norm(leaf, (96,), weight.double(), 1e-5)
    assert error(out, exact.detach()) < 1
    z = (exact.detach() @ a.double().T).half()
    d_exact = d_out[:, :96].double() + d_out[:, 96:].double() @ a.double()
    gradient = normed_input_backward(
        d_out, x, z, a, torch.zeros(8, 96, device=DEVICE), 1.0, Pending(), norm, statistics
    )
    assert error(gradient, torch.autograd.grad(exact, leaf, d_exact)[0]) < 2


@pytest.mark.parametrize("by", ["both gradients at once", "its own kernel", "cuBLAS"])
def test_the_gradient_of_a_from_kept_elements_that_float16_cannot_hold_scaled(by: str) -> None:
    x, weight, a, dz = LARGE / 3 * half(70, 96).clamp(-3, 3), half(96), half(8, 96), half(70, 8)
    norm, dropout = Norm("rms", 1e-5, weight), Dropout(0.5, torch.tensor([3], device=DEVICE), 4)
    _, statistics = add_norm(x, None, norm, torch.empty_like(x))
    normed = F.rms_norm(x.double(), (96,), weight.double(), 1e-5)
    dropped = normed * factor_reference(70, 96, dropout, DEVICE)
    gradient, pending = torch.zeros(8, 96, device=DEVICE), Pending()
    if by == "cuBLAS":
        large_rank.grad_a(x, dz, large_rank.Sum(gradient), 2.0, dropout, norm, statistics)
    elif by == "its own kernel":
        grad_a(x, dz, gradient, 2.0, pending, norm, statistics, dropout)
    else:
        d_out, z = torch.cat((half(70, 96), dz), dim=1), (dropped @ a.double().T).half()
        normed_input_backward(d_out, x, z, a, gradient, 2.0, pending, norm, statistics, None, dropout)
    pending.flush()
    assert error(gradient, 2 * dz.double().T @ dropped) < 1


def test_adapters_products_and_their_gradients() -> None:
    x, a, both = half(70, 192), half(16, 192), torch.empty(70, 208, device=DEVICE, dtype=torch.float16)
    z = project(x, a, both, copy=True)
    assert error(z, x.double() @ a.double().T) < 1
    assert error(rank_update(both, a, 192), x.double() + z.double() @ a.double()) < 1
    stack, pending = Stack((192,), (0,), 16), Pending()
    gradient_a, gradient_b = torch.zeros(16, 192, device=DEVICE), torch.zeros(192, 16, device=DEVICE)
    grad_a(x, z, gradient_a, 2.0, pending)
    grad_b(x, z, gradient_b, stack, stack.table(DEVICE), pending)
    pending.flush()
    assert error(gradient_a, 2 * z.double().T @ x.double()) < 0.1  # written in float32
    assert error(gradient_b, x.double().T @ z.double()) < 0.1


def test_the_mlp_and_its_gradients() -> None:
    branches, activation = half(70, 256), Activation("silu", gated=True)
    h = torch.empty(70, 128, device=DEVICE, dtype=torch.float16)
    mlp_forward(branches, h, activation)
    leaf, d_h = branches.double().requires_grad_(), half(70, 128)
    gate, up = leaf.chunk(2, 1)
    exact = F.silu(gate) * up
    assert error(h, exact.detach()) < 1
    mlp_backward(branches, d_h, activation, None, None, None, None, Stack((128, 128), (-1, -1), 0), 1.0, Pending())
    assert error(branches, torch.autograd.grad(exact, leaf, d_h.double())[0]) < 1


@pytest.mark.parametrize("size", [1.0, LARGE / 4])
def test_losses_of_logits_up_to_the_largest(size: float) -> None:
    logits, labels = (size * half(9, 5000)).clamp(-LARGE, LARGE), torch.arange(9, device=DEVICE)
    weights, loss = torch.ones(9, device=DEVICE), torch.empty(9, device=DEVICE)
    leaf = logits.double().requires_grad_()
    exact = F.cross_entropy(leaf, labels, reduction="none")
    (gradient,) = torch.autograd.grad(exact.sum(), leaf)
    cross_entropy_(logits, labels, weights, loss)
    assert error(loss, exact.detach()) < 0.1
    assert float((logits.double() - gradient).abs().max()) < ROUNDING


def test_a_token_attends_to_scores_that_float16_cannot_hold() -> None:
    queries, keys, values = 200 * half(2, 4, 32), 200 * half(2, 2, 80, 32), half(2, 2, 80, 32)
    lengths = torch.tensor([3, 79], device=DEVICE)
    out = attend(queries, keys, values, lengths, 80)
    exact = attend_reference(queries, keys, values, lengths, 32**-0.5, None)
    assert error(out, exact.double()) < 2


@pytest.mark.parametrize("rows", [1, 7])
def test_products_of_a_few_rows(rows: int) -> None:
    x, weight, stack = half(rows, 192), half(40, 192), Stack((40,), (0,), 8)
    z, b = half(rows, 8), half(40, 8)
    y = product(x, weight, stack, stack.table(DEVICE), None, z, b)
    assert error(y, x.double() @ weight.double().T + z.double() @ b.double().T) < 1


def test_products_of_experts_with_few_and_many_rows() -> None:
    rows = torch.tensor([20, 50, 130], device=DEVICE)
    chosen = torch.arange(3, device=DEVICE).repeat_interleave(rows).int()[:, None]
    choices = sort(torch.rand(200, 1, device=DEVICE), chosen, 3)
    x, wide, down = half(200, 80), half(3, 2 * 48, 80), half(3, 80, 48)
    low = LowRank(half(200, 8), half(3, 8, 48))
    both = LowRank(low.z.double(), low.b.double())
    exact, _ = gate_up_reference(x.double(), wide.double(), choices, "silu", (both, both))
    assert error(gate_up(x, wide, choices, "silu", (low, low))[0], exact) < 1
    for transposed, weight in ((False, wide[:, :48]), (True, down)):
        exact = product_reference(x.double(), weight.double(), choices, both, transposed=transposed)
        assert error(experts_product(x, weight.contiguous(), choices, low, transposed=transposed), exact) < 1
