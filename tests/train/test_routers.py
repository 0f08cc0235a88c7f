"""How evenly tokens go to experts is counted in training alone, and logged with each step."""

import pytest
import torch
from lightning.fabric import Fabric

from lit_qlora.data import Batch, Step
from lit_qlora.fused import fuse
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GuardConfig, LoRAConfig, OptimizerConfig, TrainConfig
from lit_qlora.train.guards import Guard
from lit_qlora.train.loop import Learner, train
from lit_qlora.train.optim import make_optimizer
from lit_qlora.train.routers import METRICS, RouterHealth
from tests.conftest import tiny_model

EXPERTS = {"n_layer": 1, "n_expert": 4, "n_expert_per_token": 2, "expert_size": 16, "router_normalized": True}
FABRIC = Fabric(accelerator="cpu", devices=1)


def alone(taken: torch.Tensor) -> torch.Tensor:
    """The sum over one process."""
    return taken


def model_of() -> GPT:
    model = tiny_model(**EXPERTS)
    add_lora(model, LoRAConfig(dropout=0.0))
    return model.train()


def test_even_choices_have_entropy_1_and_uneven_ones_less() -> None:
    health = RouterHealth(model_of())
    assert health.taken is not None
    health.taken += torch.tensor([5, 5, 5, 5])
    assert health.measure(alone).tolist() == [1.0, 0.25, 0.0]
    assert not health.taken.any()
    health.taken += torch.tensor([10, 10, 0, 0])
    assert health.measure(alone).tolist() == [0.5, 0.5, 0.5]
    assert health.measure(alone)[0] == 0  # nothing was taken


@pytest.mark.skipif(not AVAILABLE or torch.cuda.is_available(), reason="the fast path on a CPU, in the interpreter")
def test_both_paths_count_the_same_and_only_in_training() -> None:
    counts = []
    for fast in (False, True):
        model = model_of()
        if fast:
            fuse(model)
        health = RouterHealth(model)
        tokens = torch.randint(0, 320, (1, 6), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            model.eval().loss(tokens, tokens)
        assert health.taken is not None
        assert not health.taken.any()
        model.train().loss(tokens, tokens).backward()
        assert health.taken.sum(dim=1).tolist() == [2 * 6] * model.config.n_layer
        counts.append(health.taken.clone())
    assert torch.equal(*counts)


def test_a_model_without_experts_has_no_routers_to_tell_of() -> None:
    assert RouterHealth(tiny_model()).measure(alone).numel() == 0


def test_each_step_logs_how_even_the_choices_were() -> None:
    model = model_of()
    config = TrainConfig(learning_rate=1e-3)
    learner = Learner(FABRIC, model, make_optimizer(model.named_parameters(), OptimizerConfig(), config))
    tokens = torch.randint(0, 320, (2, 9))
    step = Step([Batch(tokens, tokens)], weight=18.0, labelled=18, tokens=18, samples=2, epoch=1.0)
    records = list(train(learner, [step] * 2, 2, config, Guard(GuardConfig()), longest=step))
    for record in records:
        entropy, most, idle = (record[name] for name in METRICS)
        assert 0 < entropy <= 1
        assert 0.25 <= most <= 0.5
        assert 0 <= idle < 1
