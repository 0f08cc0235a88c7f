"""The low-rank products on the GPU in bf16, at every width of block, with rows that do not fill the last one."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_qlora.kernels.activation import Activation
from lit_qlora.kernels.dropout import NONE, Dropout, factor_reference
from lit_qlora.kernels.lora_products import Pending, grad_a, grad_b, project, rank_update
from lit_qlora.kernels.mlp import mlp_backward
from lit_qlora.kernels.norm import Norm, add_norm
from lit_qlora.kernels.normed_input import normed_input_backward
from lit_qlora.kernels.stack import Stack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

ROWS = [37, 100, 300, 512]
RANKS = [16, 48, 64, 96, 128, 192]
K = 256


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def poison() -> None:
    """Let what is allocated next be NaN, so that nothing that was never written goes unnoticed."""
    for size in (2**16, 2**20, 2**24):
        tensors = [torch.full((size // 4,), float("nan"), device="cuda") for _ in range(4)]
        del tensors


def assert_near(compute: Callable[[], Tensor], expected: Tensor) -> None:
    for _ in range(3):
        poison()
        actual = compute().double()
        assert float((actual - expected).norm() / expected.norm()) < 1e-2


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("how", ["in place", "copy", "dropout", "silu"])
def test_project(rows: int, rank: int, how: str) -> None:
    gated = how == "silu"
    x, a = rand(rows, 2 * K if gated else K), rand(rank, K)
    dropout = Dropout(0.3, torch.tensor([7], device="cuda")) if how == "dropout" else NONE
    expected = F.silu(x[:, :K]) * x[:, K:] if gated else x

    def compute() -> Tensor:
        out = torch.empty(rows, K + rank, device="cuda", dtype=torch.bfloat16)
        if how == "in place":
            out[:, :K] = x
        source = out[:, :K] if how == "in place" else x
        z = project(source, a, out, Activation("silu", True) if gated else None, how in ("copy", "dropout"), dropout)
        assert torch.equal(z, out[:, K:])
        assert torch.allclose(out[:, :K], expected, rtol=3e-2, atol=1e-2)
        return z

    kept = factor_reference(rows, K, dropout, "cuda") if how == "dropout" else 1.0
    assert_near(compute, (expected.double() * kept) @ a.double().T)


@pytest.mark.parametrize("rank", [16, 32, 64])
@pytest.mark.parametrize("rows", ROWS)
def test_mlp_backward(rows: int, rank: int) -> None:
    branches, a, z = rand(rows, 2 * K), rand(rank, K) / 16, rand(rows, 2 * rank)
    dh = rand(rows, K + rank)
    exact = branches.double().requires_grad_()
    h = F.silu(exact[:, :K]) * exact[:, K:]
    d = dh[:, :K].double() + dh[:, K:].double() @ a.double()
    h.backward(d)
    assert exact.grad is not None
    stack, pending = Stack((K, K), (0, 1), rank), Pending()
    grad_a, grad_b = torch.zeros(rank, K, device="cuda"), torch.zeros(2 * K, rank, device="cuda")

    def compute() -> Tensor:
        grad_a.zero_(), grad_b.zero_()
        mine = branches.clone()
        mlp_backward(mine, dh, Activation("silu", True), a, grad_a, z, grad_b, stack, 1.0, pending)
        pending.flush()
        return mine

    assert_near(compute, exact.grad)
    assert_near(lambda: (compute(), grad_a)[1], dh[:, K:].double().T @ h.detach())
    of_z = torch.cat([exact.grad[:, :K].T @ z[:, :rank].double(), exact.grad[:, K:].T @ z[:, rank:].double()])
    assert_near(lambda: (compute(), grad_b)[1], of_z)


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", ROWS)
def test_rank_update(rows: int, rank: int) -> None:
    d, a = rand(rows, K + rank), rand(rank, K)
    assert_near(lambda: rank_update(d, a, K), d[:, :K].double() + d[:, K:].double() @ a.double())


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", ROWS)
def test_gradients(rows: int, rank: int) -> None:
    x, dz, pending = rand(rows, K), rand(rows, K + rank)[:, K:], Pending()

    def of_a() -> Tensor:
        gradient = torch.zeros(rank, K, device="cuda")
        grad_a(x, dz, gradient, 1.0, pending)
        pending.flush()
        return gradient

    assert_near(of_a, dz.double().T @ x.double())
    stack = Stack((K,), (0,), rank)

    def of_b() -> Tensor:
        gradient = torch.zeros(K, rank, device="cuda")
        grad_b(x, dz.contiguous(), gradient, stack, stack.table("cuda"), pending)
        pending.flush()
        return gradient

    assert_near(of_b, x.double().T @ dz.double())


@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("rows", ROWS)
def test_backward_of_the_norm_before_adapters(rows: int, rank: int) -> None:
    x, a, weight = rand(rows, K), rand(rank, K) / 16, rand(K)
    norm = Norm("rms", 1e-5, weight)
    d_out = rand(rows, K + rank)
    normed = torch.empty_like(x)
    _, numbers = add_norm(x, None, norm, normed)
    z = normed @ a.T
    exact, exact_a = x.double().requires_grad_(), a.double().requires_grad_()
    y = exact * torch.rsqrt(exact.pow(2).mean(1, keepdim=True) + 1e-5) * weight.double()
    torch.autograd.backward([y, y @ exact_a.T], [d_out[:, :K].double(), d_out[:, K:].double()])
    assert exact.grad is not None
    assert exact_a.grad is not None

    def both() -> tuple[Tensor, Tensor]:
        pending, of_a = Pending(), torch.zeros(rank, K, device="cuda")
        d_x = normed_input_backward(d_out, x, z, a, of_a, 1.0, pending, norm, numbers)
        pending.flush()
        return d_x, of_a

    assert_near(lambda: both()[0], exact.grad)
    assert_near(lambda: both()[1], exact_a.grad)
