"""What optimizers do on a GPU alone: one kernel for an update, and state that can leave the GPU."""

import pytest
import torch
from torch import nn

from lit_qlora.settings import OPTIMIZERS, OptimizerConfig, TrainConfig
from lit_qlora.train.optim import make_optimizer, measure_state_bytes, repage
from lit_qlora.train.training_state import pack, unpack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda")


def matrix() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(512, 1024, device=DEVICE))


def step(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, times: int) -> None:
    for number in range(times):
        parameter.grad = torch.sin(parameter.detach() + number)
        optimizer.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_with_a_short_name_runs(name: str) -> None:
    assert measure_state_bytes(OptimizerConfig(name=name), TrainConfig(), DEVICE, vectors=True) <= 8.01


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_updates_are_fused_unless_gradients_are_scaled(name: str) -> None:
    for scaled in (False, True):
        optimizer = make_optimizer([("a", matrix())], OptimizerConfig(name=name), TrainConfig(), scaled=scaled)
        assert bool(optimizer.param_groups[0]["fused"]) != scaled


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_six_steps_are_three_a_saved_state_and_three_more(name: str) -> None:
    config, train = OptimizerConfig(name=name), TrainConfig(learning_rate=0.01)
    whole = matrix()
    optimizer = make_optimizer([("a", whole)], config, train)
    step(optimizer, whole, 3)
    torch.cuda.synchronize()
    other = nn.Parameter(whole.detach().clone())
    second = make_optimizer([("a", other)], config, train)
    tensors: dict[str, torch.Tensor] = {}
    second.load_state_dict(unpack(pack(optimizer.state_dict(), tensors, "optimizer"), tensors))
    repage(second)
    for one, parameter in ((optimizer, whole), (second, other)):
        step(one, parameter, 3)
    torch.cuda.synchronize()
    assert torch.equal(whole, other)


@pytest.mark.parametrize("name", ["paged-adamw", "paged-adamw8bit", "paged-adamw32bit"])
def test_paged_state_is_still_paged_after_it_was_loaded(name: str) -> None:
    config, train = OptimizerConfig(name=name), TrainConfig()
    first, second = matrix(), matrix()
    optimizer = make_optimizer([("a", first)], config, train)
    step(optimizer, first, 1)
    other = make_optimizer([("a", second)], config, train)
    other.load_state_dict(optimizer.state_dict())
    assert not getattr(other.state[second]["state1"], "is_paged", False)  # what repage is for
    repage(other)
    assert other.state[second]["state1"].is_paged
    torch.cuda.synchronize()
    assert torch.equal(other.state[second]["state1"].cpu(), optimizer.state[first]["state1"].cpu())
