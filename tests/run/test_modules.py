"""The report measures the update of each adapted layer as its dense matrix would be, and its gradients by name."""

from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint import safetensors_io
from lit_qlora.lora.layer import LoRALinear
from lit_qlora.run.modules import effective_rank, modules_of, section, singular_values
from lit_qlora.settings import LoRAConfig, OptimizerConfig, TrainConfig
from lit_qlora.train.optim import make_optimizer
from lit_qlora.train.training_state import TENSORS, pack
from tests.conftest import tiny_model
from tests.lora.test_adapter import trained


def test_an_update_is_measured_as_if_it_were_formed(tmp_path: Path) -> None:
    model = trained(tiny_model(), LoRAConfig(r=4, targets=("query", "mlp")))
    layer: Any = model.blocks[1].mlp.down
    assert isinstance(layer, LoRALinear)
    dense = layer.scale * layer.lora_b.detach().double() @ layer.lora_a.detach().double()
    torch.testing.assert_close(singular_values(layer).detach(), torch.linalg.svdvals(dense)[:4])
    found = {module.layer: module for module in modules_of(model, OptimizerConfig(), tmp_path)}["blocks.1.mlp.down"]
    assert found.size == pytest.approx(float(dense.norm() / layer.base.weight.detach().norm()), rel=1e-5)
    assert found.gradient is None  # no state was kept
    assert effective_rank(torch.tensor([2.0, 2.0, 0.0, 0.0])) == pytest.approx(2.0)
    assert effective_rank(torch.zeros(4)) == 0


def test_gradients_are_those_of_the_parameters_of_that_name(tmp_path: Path) -> None:
    model = trained(tiny_model(n_layer=1), LoRAConfig(r=2, targets=("query", "value")))
    settings = OptimizerConfig(lora_plus=4.0, rate_pattern={"value": 0.5})  # so that names are in groups
    optimizer = make_optimizer(model.named_parameters(), settings, TrainConfig())
    sizes = {}
    learners = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    for number, (name, parameter) in enumerate(learners, start=1):
        parameter.grad = torch.full_like(parameter, float(number))
        sizes[name] = 0.001 * number**2 * parameter.numel()  # Adam's second moment after a step
    optimizer.step()
    tensors: dict[str, torch.Tensor] = {}
    pack(optimizer.state_dict(), tensors, "optimizer")
    safetensors_io.write(tmp_path / TENSORS, tensors, tensors.items())
    found = modules_of(model, settings, tmp_path)
    for module in found:
        own = sizes[f"{module.layer}.lora_a"] + sizes[f"{module.layer}.lora_b"]
        assert module.gradient == pytest.approx(own, rel=1e-4)
    share = 100 * (found[0].gradient or 0.0) / sum(sizes.values())
    assert f"{share:.1f} %" in section(found)
