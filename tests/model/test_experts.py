"""Mixtures of experts: who is chosen, what counts how much, and what of it is trained and stored how."""

from pathlib import Path

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.errors import CheckpointError
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.model.mlp import MoE, Router
from lit_qlora.quantize import QuantizedLinear, Storage, quantize_linears
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, TrainConfig
from tests.conftest import tiny_config, tiny_model, write_checkpoint
from tests.lora.test_adapter import save, trained

EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32}


def experts(**changes: object) -> ModelConfig:
    """A small model of four experts, two for each token."""
    return tiny_config(**EXPERTS | changes)


@pytest.mark.parametrize("shared", [0, 48])
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(shared: int) -> None:
    moe = MoE(experts(shared_expert_size=shared))
    x = torch.randn(2, 5, 64)
    weights, chosen = moe.router(x.flatten(0, 1))
    for token, (row, got) in enumerate(zip(x.flatten(0, 1), moe(x).flatten(0, 1), strict=True)):
        expected = sum(w * moe.experts[e](row) for w, e in zip(weights[token], chosen[token].tolist(), strict=True))
        if moe.shared:
            expected = expected + moe.shared(row)
        torch.testing.assert_close(got, expected)


def route(scores: list[float], correction: list[float] | None = None, **changes: object) -> dict[int, float]:
    """Chosen expert -> its weight, for a token that gives the experts these scores."""
    router = Router(tiny_config(**{"n_expert": len(scores), "n_expert_per_token": 2, "expert_size": 8} | changes))
    with torch.no_grad():
        router.weight.zero_()[:, 0] = torch.tensor(scores)
        if router.correction is not None:
            router.correction.copy_(torch.tensor(correction))
        weights, chosen = router(torch.eye(64)[:1])
    return dict(zip(chosen[0].tolist(), weights[0].tolist(), strict=True))


def test_softmax_before_the_choice_leaves_less_than_one() -> None:
    chances = torch.tensor([1.0, 3.0, 2.0, 0.0]).softmax(0).tolist()
    assert route([1.0, 3.0, 2.0, 0.0]) == pytest.approx({1: chances[1], 2: chances[2]})


def test_softmax_after_the_choice_and_normalised_weights_are_the_same() -> None:
    after = route([1.0, 3.0, 2.0, 0.0], router="softmax_chosen")
    assert after == pytest.approx({1: 0.7310586, 2: 0.2689414})
    assert route([1.0, 3.0, 2.0, 0.0], router_normalized=True) == pytest.approx(after)


def test_a_correction_helps_to_choose_and_does_not_count() -> None:
    settings = {"router": "sigmoid", "router_correction": True, "router_scale": 2.5}
    chosen = route([1.0, 3.0, 2.0, 0.0], [0.0, 0.0, 0.0, 1.0], **settings)
    assert chosen == pytest.approx({3: 2.5 * 0.5, 1: 2.5 * torch.tensor(3.0).sigmoid().item()})


def test_only_experts_of_the_best_groups_are_considered() -> None:
    groups = {"router_groups": 2, "router_groups_kept": 1}
    scores = [4.0, 0.0, 3.0, 3.5]  # the first group has the best expert, the second the best two
    assert set(route(scores, **groups)) == {0, 1}
    assert set(route(scores, router="sigmoid", **groups)) == {2, 3}


def test_a_token_is_routed_alike_in_any_company() -> None:
    model = tiny_model(**EXPERTS)
    tokens = torch.randint(0, 320, (3, 11))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[1:2], model(tokens[1:2]))


def test_experts_are_quantised_and_adapted_and_routers_are_neither() -> None:
    model = GPT(experts(shared_expert_size=48, dense_layers=(0,)))
    quantize_linears(model, "bnb.nf4")
    add_lora(model, LoRAConfig(r=2, targets=("mlp",)))
    adapted = {path for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    parts = ("gate", "up", "down")
    assert adapted == {
        *(f"blocks.0.mlp.{part}" for part in parts),
        *(f"blocks.1.mlp.experts.{e}.{part}" for e in range(4) for part in parts),
        *(f"blocks.1.mlp.shared.{part}" for part in parts),
    }
    assert all(type(model.get_submodule(path).base) is QuantizedLinear for path in adapted)
    assert model.blocks[1].mlp.router.weight.dtype == torch.float32
    assert not model.blocks[1].mlp.router.weight.requires_grad


@pytest.mark.parametrize("scheme", ["bnb.nf4", "bnb.int8"])
def test_a_quantised_checkpoint_keeps_its_routers(tmp_path: Path, scheme: str) -> None:
    model = tiny_model(**EXPERTS)
    loaded = load_model(write_checkpoint(tmp_path / "base", model), quantize=scheme)
    for block, other in zip(model.blocks, loaded.blocks, strict=True):
        assert torch.equal(block.mlp.router.weight, other.mlp.router.weight)
        assert all(type(layer) is QuantizedLinear for layer in (other.mlp.experts[3].up, other.attn.query))


def test_only_the_correction_of_a_router_stays_float32(tmp_path: Path) -> None:
    model = tiny_model(**EXPERTS, router="sigmoid", router_correction=True)
    loaded = load_model(write_checkpoint(tmp_path / "base", model), dtype=torch.bfloat16)
    exact = {name for name, parameter in loaded.named_parameters() if parameter.dtype == torch.float32}
    assert exact == {f"blocks.{i}.mlp.router.correction" for i in range(2)}
    assert loaded(torch.zeros(1, 3, dtype=torch.long)).dtype == torch.bfloat16


def test_recomputed_experts_have_the_same_gradients() -> None:
    model, tokens = tiny_model(**EXPERTS).train(), torch.randint(0, 320, (2, 9))
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_plan_counts_all_experts_and_the_activations_of_the_chosen() -> None:
    lora = LoRAConfig(targets=("mlp",), dropout=0.0)
    four, eight = (
        make_plan(experts(n_expert=n), lora, Storage(), MicroBatches(64), TrainConfig(), Room()) for n in (4, 8)
    )
    assert eight.frozen - four.frozen == 2 * 4 * (3 * 32 * 64 + 64)
    assert eight.trainable == 2 * four.trainable
    assert eight.activations - four.activations == 64 * 2 * 4 * 4  # shares in float32


def test_merging_onto_the_quantised_base_keeps_routers_as_they_are(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model(family="mixtral", **EXPERTS))
    model = load_model(base, quantize="bnb.nf4")
    config = LoRAConfig(targets="all")
    save(tmp_path / "final", trained(model, config), config, base, quantize="bnb.nf4", precision="32-true")
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged", base="quantized")
    merged, tokens = load_model(tmp_path / "merged").eval(), torch.randint(0, 320, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens), model.eval()(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_expert_per_token": 5}, "n_expert_per_token must be from 1 to it"),
        ({"expert_size": 0}, "expert_size positive"),
        ({"router_groups": 3}, "cannot stand in 3 groups"),
        ({"experts_beside": True, "shared_expert_size": 8}, "without shared_expert_size"),
        ({"experts_beside": True, "parallel_residual": True}, "without parallel_residual"),
        ({"router_groups": 2, "router_groups_kept": 3}, "of which 3 are kept"),
        ({"dense_layers": (2,)}, "names blocks \\[2\\], the model has 2"),
    ],
)
def test_impossible_mixtures_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        experts(**changes)
