"""Losses of routers are the published ones, added to a step's gradient and logged apart from its loss."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from lightning.fabric import Fabric
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from transformers.models.switch_transformers.modeling_switch_transformers import router_z_loss_func

from lit_qlora.data import Samples, Step, steps
from lit_qlora.data.batches import Batching
from lit_qlora.data.samples import Sample
from lit_qlora.errors import UsageError
from lit_qlora.fused import fuse, why_not
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.layer import add_lora
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.mlp import Seen
from lit_qlora.quantize import Storage
from lit_qlora.run.learning import make_learner
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import GuardConfig, LoRAConfig, OptimizerConfig, TrainConfig
from lit_qlora.train.guards import Guard
from lit_qlora.train.loop import Gradients, train
from lit_qlora.train.routers import RouterLosses, balance_loss, count_choices, z_loss
from tests.conftest import tiny_config, tiny_model

EXPERTS = {"n_layer": 2, "n_expert": 4, "n_expert_per_token": 2, "expert_size": 16, "router_normalized": True}
SAMPLES = Samples.of(Sample.of([(7 * i + j * j) % 300 + 1 for j in range(5 + 2 * i)], 2 + i) for i in range(4))
BOTH = {"router_balance_loss": 0.3, "router_z_loss": 0.2}


def seen_by_two_blocks() -> tuple[Seen, Tensor]:
    """Scores of eight tokens in float64, of which two are padding, and a mask that says so."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(8, 4, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0]]).flatten().double()
    return [(one, one.topk(2).indices) for one in scores], mask


def test_the_balance_loss_and_its_gradient_are_those_of_transformers() -> None:
    seen, mask = seen_by_two_blocks()
    scores = tuple(one for one, _ in seen)
    ours = balance_loss(seen, mask, 6, count_choices(seen, mask))
    theirs = load_balancing_loss_func(scores, 4, 2, mask.view(2, 4))
    assert isinstance(theirs, Tensor)
    torch.testing.assert_close(ours, theirs.double(), rtol=1e-6, atol=0)  # theirs sums in float32
    for mine, expected in zip(torch.autograd.grad(ours, scores), torch.autograd.grad(theirs, scores), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-5, atol=1e-8)


def test_the_balance_loss_is_its_definition_in_float64() -> None:
    seen, mask = seen_by_two_blocks()
    kept = torch.cat([one[mask > 0].softmax(dim=-1) for one, _ in seen])
    chosen = torch.nn.functional.one_hot(kept.topk(2).indices, 4).double().sum(dim=1)
    expected = 4 * (chosen.mean(dim=0) * kept.mean(dim=0)).sum()
    torch.testing.assert_close(balance_loss(seen, mask, 6, count_choices(seen, mask)), expected, rtol=1e-14, atol=0)


def test_even_choices_and_probabilities_of_either_kind_have_the_balance_loss_k() -> None:
    even = [(torch.zeros(4, 4), torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]))]
    for sigmoid in (False, True):
        assert float(balance_loss(even, torch.ones(4), 4, count_choices(even, torch.ones(4)), sigmoid)) == 2.0


def test_the_z_loss_is_that_of_transformers() -> None:
    seen, mask = seen_by_two_blocks()
    kept = torch.cat([one[mask > 0] for one, _ in seen])
    torch.testing.assert_close(z_loss(seen, mask, 6), router_z_loss_func(kept[None]), rtol=1e-14, atol=0)  # type: ignore[arg-type]


def learn(
    recompute: bool = False,
    micro: int = 4,
    packed: bool = False,
    fast: bool = False,
    router: str = "softmax",
    **losses: float,
) -> tuple[Any, list[Tensor]]:
    """The record of one step of four samples, and the gradients of the adapters."""
    model = tiny_model(**EXPERTS, router=router)
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(dropout=0.0, targets=("all",)))
    for name, parameter in model.named_parameters():  # or A has no gradient
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter, std=0.1)
    model.recompute = recompute
    if fast:
        assert why_not(model) == ""
        fuse(model)
    config = TrainConfig(learning_rate=1e-3, max_norm=0, **losses)  # type: ignore[arg-type]
    learner = make_learner(
        Fabric(accelerator="cpu", devices=1), model, OptimizerConfig(name="sgd"), config, scaled=False
    )
    found: list[Tensor] = []

    def keep(*_: Any) -> None:
        found.extend(p.grad.clone() for p in learner.trainable.values() if p.grad is not None)

    learner.optimizer.register_step_pre_hook(keep)
    batching = Batching(batch_size=4, micro_batch_size=micro, seed=0, row_length=24 if packed else None)
    (record,) = train(learner, steps(SAMPLES, batching, 1), 1, config, Guard(GuardConfig()))
    return record, found


def test_losses_of_routers_change_gradients_but_not_the_loss_in_the_log() -> None:
    (plain, without), (record, gradients) = learn(), learn(**BOTH)
    assert record["loss"] == plain["loss"]
    assert not {"router_balance", "router_z"} & plain.keys()
    assert record["router_balance"] > 1
    assert record["router_z"] > 0
    assert any(not torch.equal(*pair) for pair in zip(without, gradients, strict=True))
    assert "router_z" not in learn(router_balance_loss=0.3)[0]


@pytest.mark.parametrize("how", [{"micro": 1}, {"micro": 3}, {"packed": True}, {"recompute": True}], ids=str)
def test_micro_batches_packing_and_recompute_make_no_difference(how: dict[str, Any]) -> None:
    (expected, gradients), (record, found) = learn(**BOTH), learn(**BOTH, **how)
    for name in ("loss", "accuracy", "router_balance", "router_z"):
        assert record[name] == pytest.approx(expected[name], rel=1e-4)
    for mine, reference in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
@pytest.mark.parametrize(
    "how", [pytest.param({"micro": 3}, marks=pytest.mark.slow), {"packed": True, "router": "sigmoid"}], ids=str
)
def test_the_fast_path_has_them_too(how: dict[str, Any]) -> None:
    (expected, gradients), (record, found) = learn(**BOTH, **how), learn(**BOTH, **how, fast=True)
    for name in ("loss", "router_balance", "router_z"):
        assert record[name] == pytest.approx(expected[name], rel=1e-4)
    for mine, reference in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-4, atol=1e-6)


def test_a_step_knows_how_far_its_rows_are_filled() -> None:
    for length in (None, 24):
        whole = next(steps(SAMPLES, Batching(batch_size=4, micro_batch_size=1, seed=0, row_length=length), 1))
        assert sum(whole.filled) == whole.tokens - whole.samples
        halves = [_part(rank, length) for rank in range(2)]
        assert sum(sum(half.filled) for half in halves) == sum(whole.filled)


def _part(rank: int, length: int | None) -> Step:
    return next(steps(SAMPLES, Batching(batch_size=4, micro_batch_size=1, seed=0, row_length=length), 1, rank, 2))


def test_processes_share_the_choices_of_a_step_and_so_add_up_to_its_gradient() -> None:
    model = tiny_model(**EXPERTS)
    model.__dict__["module"] = model  # as Fabric's wrapper has it
    torch.manual_seed(0)
    add_lora(model, LoRAConfig(dropout=0.0, targets=("query",)))
    losses = RouterLosses(model.train(), 0.3, 0.2)
    learns = model.blocks[0].attn.query.lora_b
    sent: list[Tensor] = []

    def gradient(step: Step, summed: Callable[[Tensor], Tensor], world_size: int = 2) -> Tensor:
        """Of one process, which gets `summed` of its choices as the sum over all."""
        fabric = SimpleNamespace(device=learns.device, backward=Tensor.backward, world_size=world_size)
        fabric.all_reduce = lambda value, reduce_op: summed(value)
        learns.grad = None
        Gradients(cast(Any, fabric), cast(Any, model), torch.zeros(()), losses)(step)
        assert learns.grad is not None
        return learns.grad

    def send(counts: Tensor) -> Tensor:
        sent.append(counts)
        return counts

    whole = next(steps(SAMPLES, Batching(batch_size=4, micro_batch_size=4, seed=0), 1))
    expected = gradient(whole, send, world_size=1)
    parts = [_part(rank, None) for rank in range(2)]
    wrong = sum(gradient(part, send) for part in parts)
    right = sum(gradient(part, lambda _: sent[0] + sent[1]) for part in parts)
    torch.testing.assert_close(right, expected, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(wrong, expected, rtol=1e-4, atol=1e-6)  # type: ignore[arg-type]


def plan_of(config: ModelConfig, **losses: float) -> Any:
    train = TrainConfig(**losses)  # type: ignore[arg-type]
    return make_plan(config, LoRAConfig(), Storage(torch.bfloat16), MicroBatches(64), train, Room(2**30))


@pytest.mark.parametrize("name", BOTH)
def test_their_memory_is_planned_and_they_need_experts(name: str) -> None:
    without, planned = (plan_of(tiny_config(**EXPERTS), **losses) for losses in ({}, {name: 0.1}))
    assert planned.activations == without.activations + 3 * 4 * 64 * 4 * 2
    with pytest.raises(UsageError, match=rf"train\.{name}: this model has no experts"):
        plan_of(tiny_config(), **{name: 0.1})
