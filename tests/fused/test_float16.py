"""With weights in float16 the fast path is as near to float64 as the plain path is, and an overflow shows."""

import copy

import pytest
import torch
from torch import Tensor

from lit_qlora.fused import fuse, why_not
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.adapter import lora_state
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import LoRAConfig
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SCALE = 4096.0
"""What a GradScaler multiplies the loss with."""


EXPERTS = {"n_expert": 3, "n_expert_per_token": 3, "expert_size": 48, "router_normalized": True}
"""Each token takes all experts: of nearly tied ones, either path may take another one."""


def adapted(dtype: torch.dtype, **changes: int) -> GPT:
    """A small model whose weights are float16 numbers and whose adapters are float32, whatever `dtype`."""
    model = tiny_model(std=0.05, **changes).half().to(dtype).requires_grad_(False)
    add_lora(model, LoRAConfig(r=8, alpha=16, targets=("all",), dropout=0.0))
    for tensor in lora_state(model).values():
        torch.nn.init.normal_(tensor, std=0.05)
    return model.to(DEVICE).train()


def scaled_gradients(model: GPT, scale: float = SCALE) -> list[Tensor]:
    """Gradients of the adapters after the loss was scaled and they were scaled back."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(0, 320, (2, 40), generator=generator)
    loss = model.loss(tokens.to(DEVICE), tokens.roll(-1, 1).to(DEVICE)) / tokens.numel()
    (loss * scale).backward()
    learners = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *(parameter.grad.double() / scale for parameter in learners if parameter.grad is not None)]


def error(actual: list[Tensor], exact: list[Tensor]) -> float:
    """Of all gradients together, relative to their norm."""
    apart = sum(float((a.double() - e.double()).square().sum()) for a, e in zip(actual, exact, strict=True))
    return float((apart / sum(float(e.double().square().sum()) for e in exact)) ** 0.5)


@pytest.mark.parametrize("changes", [{}, pytest.param(EXPERTS, marks=pytest.mark.slow)], ids=["dense", "experts"])
def test_gradients_are_as_near_to_float64_as_those_of_the_plain_path(changes: dict[str, int]) -> None:
    torch.manual_seed(0)
    exact_model = adapted(torch.float64, **changes)
    model = adapted(torch.float16, **changes)
    model.load_state_dict(copy.deepcopy(exact_model.state_dict()))
    exact, plain = scaled_gradients(exact_model), scaled_gradients(copy.deepcopy(model))
    assert why_not(model) == ""
    fuse(model)
    fast = scaled_gradients(model)
    assert error(fast[:1], exact[:1]) < 2e-3
    assert error(fast[1:], exact[1:]) < 1.2 * error(plain[1:], exact[1:]) < 2e-2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # Triton's interpreter computes with numpy
@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_an_overflow_of_scaled_gradients_shows_and_leaves_the_next_step_alone(changes: dict[str, int]) -> None:
    model = adapted(torch.float16, **changes)
    fuse(model)
    expected = scaled_gradients(model)
    model.zero_grad()
    assert not all(torch.isfinite(gradient).all() for gradient in scaled_gradients(model, 2.0**40))
    model.zero_grad()
    for gradient, of_first in zip(scaled_gradients(model), expected, strict=True):
        assert torch.equal(gradient, of_first)
