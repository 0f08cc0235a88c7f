"""LoRA's products by cuBLAS are the formulas, however they are divided."""

import pytest
import torch
from torch import nn

from lit_qlora.fused import large_rank
from lit_qlora.fused.kernel_block import ACTIVATIONS
from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dequantize import write_b
from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.lora_products import Pending
from lit_qlora.kernels.norm import Norm, add_norm, norm_reference
from lit_qlora.kernels.stack import Stack

pytestmark = [
    pytest.mark.skipif(not AVAILABLE, reason="needs Triton"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="in float32; tests/gpu is for the GPU"),
]
K, ROWS = 24, 5
STACKS = [Stack((16, 8, 8), (0, 1, 2), 3), Stack((8, 16, 8), (-1, 0, 1), 3), Stack((16, 8, 16), (0, -1, 1), 3)]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("stack", STACKS, ids=str)
def test_products_with_shared_columns_are_those_with_zeros(stack: Stack, has_bias: bool) -> None:
    own = large_rank.beside(stack)
    w, b, bias = torch.randn(stack.n, K), torch.randn(stack.adapted_rows, stack.r), torch.randn(stack.n)
    x, z, dy = torch.randn(ROWS, K), torch.randn(ROWS, stack.rank), torch.randn(ROWS, stack.n)
    matrix, with_zeros = (torch.cat((w, w.new_empty(stack.n, one.rank)), 1) for one in (own, stack))
    write_b(b, matrix, own)
    write_b(b, with_zeros, stack)
    room = torch.cat((x, x.new_empty(ROWS, own.rank)), 1)
    y = large_rank.product(room, z, matrix, bias if has_bias else None, K, stack, None)
    torch.testing.assert_close(y, torch.cat((x, z), 1) @ with_zeros.T + (bias if has_bias else 0))
    torch.testing.assert_close(large_rank.product_back(dy, matrix, K, stack), dy @ with_zeros)
    assert matrix.size(1) < with_zeros.size(1)


def test_an_update_in_place_is_that_of_a_copy() -> None:
    d_out, a = torch.randn(ROWS, K + 3), torch.randn(3, K)
    for dropout in (NONE, Dropout(0.3, torch.tensor([5]))):
        kept = factor_reference(ROWS, K, dropout)
        apart = large_rank.rank_update(d_out, a, K, dropout)
        torch.testing.assert_close(apart, d_out[:, :K] + d_out[:, K:] @ a * kept)
        in_place = d_out.clone()
        assert torch.equal(large_rank.rank_update_(in_place, a, K, dropout), apart)
        assert torch.equal(in_place, torch.cat((apart, d_out[:, K:]), 1))


@pytest.mark.parametrize("dropout", [NONE, Dropout(0.3, torch.tensor([5]))], ids=["", "dropout"])
@pytest.mark.parametrize("kind", ["rms", "layer", "none"])
def test_the_gradient_of_a_is_that_of_the_normed_input(kind: str, dropout: Dropout) -> None:
    norm = Norm(kind, 1e-5, None if kind == "none" else 1 + 0.1 * torch.randn(K))
    x, dz, gradient = 3 * torch.randn(ROWS, K), torch.randn(ROWS, 3), torch.ones(3, K)
    statistics = add_norm(x, None, norm, torch.empty_like(x))[1]
    large_rank.grad_a(x, dz, large_rank.Sum(gradient), 2.0, dropout, norm, statistics)
    x, dz = x.double(), dz.double()
    wanted = 1 + 2 * dz.T @ (norm_reference(x, norm).double() * factor_reference(ROWS, K, dropout))
    torch.testing.assert_close(gradient.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["rms", "none"])
def test_the_first_products_are_written_over_what_is_there(kind: str) -> None:
    norm, stack = Norm(kind, 1e-5, None if kind == "none" else 1 + 0.1 * torch.randn(K)), STACKS[1]
    x, dz, dy, z = (torch.randn(ROWS, n) for n in (K, 3, stack.n, stack.rank))
    statistics = add_norm(x, None, norm, torch.empty_like(x))[1]
    added, written = (
        [large_rank.Sum(torch.full((m, n), value), fresh) for m, n in ((3, K), (stack.adapted_rows, 3))]
        for value, fresh in ((0.0, False), (float("nan"), True))
    )
    for _ in range(2):
        for of_a, of_b in (added, written):
            large_rank.grad_a(x, dz, of_a, 2.0, NONE, norm, statistics)
            large_rank.grad_b(dy, z, of_b, stack)
        for one, other in zip(added, written, strict=True):
            torch.testing.assert_close(other.total, one.total)


@pytest.mark.parametrize("dropout", [NONE, Dropout(0.3, torch.tensor([5]))], ids=["", "dropout"])
@pytest.mark.parametrize("activation", [ACTIVATIONS["swiglu"], ACTIVATIONS["gelu"], nn.Tanh()], ids=str)
def test_gradients_through_an_mlp(activation: Activation | nn.Module, dropout: Dropout) -> None:
    gated = isinstance(activation, Activation) and activation.gated
    stack = Stack((K, K), (0, 1), 3) if gated else Stack((K,), (0,), 3)
    branches, dh, a = torch.randn(ROWS, stack.n), torch.randn(ROWS, K + 3), torch.randn(3, K)
    z, grad_a, grad_b = torch.randn(ROWS, stack.rank), torch.zeros(3, K), torch.zeros(stack.adapted_rows, 3)
    leaf = branches.clone().requires_grad_()
    gate, up = leaf[:, :K], leaf[:, K:] if gated else 1.0
    function = nn.Tanh() if isinstance(activation, nn.Module) else nn.SiLU() if gated else nn.GELU()
    h, kept = function(gate) * up, factor_reference(ROWS, K, dropout)
    d_h = dh[:, :K] + dh[:, K:] @ a * kept
    (d_branches,) = torch.autograd.grad(h, leaf, d_h)
    wanted_a = 2 * dh[:, K:].T @ (h * kept).detach()
    large_rank.through_mlp(
        branches, dh, activation, a, large_rank.Sum(grad_a), z, large_rank.Sum(grad_b), stack, 2.0, Pending(), dropout
    )
    torch.testing.assert_close(branches, d_branches, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_a, wanted_a, rtol=1e-4, atol=1e-5)
    parts = zip(d_branches.split(K, 1), z.split(3, 1), strict=True)
    torch.testing.assert_close(grad_b, torch.cat([d.T @ own for d, own in parts]), rtol=1e-4, atol=1e-5)
