"""What learns, how much of it there is, and what it computes."""

import copy

import pytest
import torch
from torch import nn

from lit_qlora.errors import UsageError
from lit_qlora.lora.layer import LoRALinear, add_lora, count_trainable, lora_state
from lit_qlora.lora.merge import merge_measured
from lit_qlora.model.config import ModelConfig
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import Storage, frozen_weight, quantize_linears
from lit_qlora.run.plan import MicroBatches, Room, make_plan
from lit_qlora.settings import LoRAConfig, Scheme, Target, TrainConfig
from tests.conftest import tiny_model

TOKENS = torch.randint(0, 320, (2, 9), generator=torch.Generator().manual_seed(0))
EVERYTHING: tuple[Target, ...] = ("all", "head")
# name, layers, width, heads, feed-forward width, vocabulary
LLAMA_2_7B = ("Llama-2-7B", 32, 4096, 32, 11008, 32000)
LLAMA_2_13B = ("Llama-2-13B", 40, 5120, 40, 13824, 32000)
OPEN_LLAMA_3B = ("OpenLLaMA-3b-v2", 26, 3200, 32, 8640, 32000)


def on_meta(shape: tuple[str, int, int, int, int, int]) -> GPT:
    name, n_layer, n_embd, n_head, ffn_size, vocab_size = shape
    config = ModelConfig(
        name=name,
        n_layer=n_layer,
        n_embd=n_embd,
        n_head=n_head,
        n_kv_head=n_head,
        head_size=n_embd // n_head,
        ffn_size=ffn_size,
        vocab_size=vocab_size,
        block_size=4096,
    )
    return GPT.skeleton(config)


@pytest.mark.parametrize(
    ("shape", "r", "targets", "trainable"),
    [
        (LLAMA_2_7B, 8, ("query", "value"), 4_194_304),
        (LLAMA_2_7B, 8, EVERYTHING, 20_277_248),
        (LLAMA_2_7B, 8, ("all",), 19_988_480),
        (LLAMA_2_7B, 16, EVERYTHING, 40_554_496),
        (LLAMA_2_7B, 256, EVERYTHING, 648_871_936),
        (LLAMA_2_7B, 64, ("all",), 159_907_840),
        (LLAMA_2_13B, 8, ("query", "value"), 6_553_600),
        (OPEN_LLAMA_3B, 8, ("query", "value"), 2_662_400),
        (OPEN_LLAMA_3B, 16, ("query", "value"), 5_324_800),
        (OPEN_LLAMA_3B, 8, EVERYTHING, 12_994_560),
        (OPEN_LLAMA_3B, 8, ("all",), 12_712_960),
        (OPEN_LLAMA_3B, 16, ("all", "head"), 25_989_120),
    ],
)
def test_trainable_parameters_are_those_of_the_published_runs(
    shape: tuple[str, int, int, int, int, int], r: int, targets: tuple[Target, ...], trainable: int
) -> None:
    model = on_meta(shape)
    add_lora(model, LoRAConfig(r=r, targets=targets))
    assert count_trainable(model) == trainable


@pytest.mark.parametrize(("shape", "frozen"), [(LLAMA_2_7B, 6_738_415_616), (OPEN_LLAMA_3B, 3_426_473_600)])
def test_frozen_parameters_are_those_of_the_published_models(
    shape: tuple[str, int, int, int, int, int], frozen: int
) -> None:
    assert sum(parameter.numel() for parameter in on_meta(shape).parameters()) == frozen


def test_a_fresh_adapter_changes_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        before = model(TOKENS)
        add_lora(model, LoRAConfig(targets=EVERYTHING))
        assert torch.equal(model.train()(TOKENS), before)


def test_only_targets_learn() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(targets=("query", "mlp")))
    assert {name.split(".")[-2] for name in lora_state(model)} == {"query", "gate", "up", "down"}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(lora_state(model))


def test_all_is_every_linear_layer_but_the_head() -> None:
    model = tiny_model()
    add_lora(model, LoRAConfig(targets="all"))
    adapted = {name.rpartition(".")[0] for name in lora_state(model)}
    linears = {path for path, module in tiny_model().named_modules() if isinstance(module, torch.nn.Linear)}
    assert adapted == linears - {"head"}


def test_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"\['query'\] match no layer"):
        add_lora(tiny_model().head, LoRAConfig(targets=("query",)))


def test_the_update_is_alpha_over_r_times_b_a() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(12, 7), LoRAConfig(r=4, alpha=32, dropout=0.0))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 12)
    expected = x @ (layer.base.weight + 8 * layer.lora_b @ layer.lora_a).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(64, 64), LoRAConfig(dropout=0.5))
    x = torch.randn(2, 64)
    assert torch.equal(layer.train()(x), layer.base(x))  # B is zero: the base sees no dropout
    torch.nn.init.normal_(layer.lora_b)
    assert not torch.equal(layer.train()(x), layer.train()(x))
    assert torch.equal(layer.eval()(x), layer.eval()(x))


def test_adapters_are_float32_on_a_bf16_base() -> None:
    model = tiny_model().to(torch.bfloat16)
    add_lora(model, LoRAConfig())
    assert {tensor.dtype for tensor in lora_state(model).values()} == {torch.float32}
    assert model(TOKENS).dtype == torch.bfloat16


def test_every_adapter_gets_a_gradient_on_the_first_step() -> None:
    model = tiny_model().train()
    add_lora(model, LoRAConfig(targets=EVERYTHING, dropout=0.0))
    model.loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward()
    assert all(bool(p.grad.any()) for name, p in model.named_parameters() if name.endswith("lora_b"))


# Variants.


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    torch.manual_seed(0)
    layer = LoRALinear(torch.nn.Linear(12, 7), LoRAConfig(r=16, alpha=32, dropout=0.0, rslora=True))
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 12)
    expected = x @ (layer.base.weight + 32 / 4 * layer.lora_b @ layer.lora_a).T + layer.base.bias
    torch.testing.assert_close(layer(x), expected)


def ranks(model: GPT) -> dict[str, int]:
    return {name.removesuffix(".lora_a"): len(t) for name, t in lora_state(model).items() if name.endswith("lora_a")}


def test_patterns_give_layers_ranks_and_scales_of_their_own() -> None:
    model = tiny_model()
    config = LoRAConfig(
        r=4,
        alpha=8,
        targets="all",
        rank_pattern={"blocks.0.mlp.down": 12, "down": 6},
        alpha_pattern={r"attn\.(query|key)": 2},
    )
    add_lora(model, config)
    assert {path: r for path, r in ranks(model).items() if r != 4} == {"blocks.0.mlp.down": 12, "blocks.1.mlp.down": 6}
    scales = {path: module.scale for path, module in model.named_modules() if isinstance(module, LoRALinear)}
    assert scales["blocks.0.mlp.down"] == 8 / 12
    assert {path for path, scale in scales.items() if scale == 2 / 4} == {
        f"blocks.{i}.attn.{word}" for i in (0, 1) for word in ("query", "key")
    }


@pytest.mark.parametrize(
    ("settings", "blocks"),
    [
        ({"first_layers": 1}, {0}),
        ({"last_layers": 2}, {3, 4}),
        ({"first_layers": 2, "last_layers": 1}, {0, 1, 4}),
        ({"first_layers": 5}, {0, 1, 2, 3, 4}),
    ],
    ids=str,
)
def test_only_the_first_or_last_blocks_learn(settings: dict, blocks: set[int]) -> None:
    model = tiny_model(n_layer=5)
    add_lora(model, LoRAConfig(targets=("query", "head"), **settings))
    assert {int(path.split(".")[1]) for path in ranks(model) if path != "head"} == blocks
    assert "head" in ranks(model)  # it is in no block


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank_pattern": {"down": 3}}, "lora.rank_pattern: down matches no layer that learns"),
        ({"rank_pattern": {"query": 3, "attn.query": 5}}, "lora.rank_pattern: attn.query matches no layer that learns"),
        ({"alpha_pattern": {"blocks.7.*": 3.0}}, "lora.alpha_pattern: blocks.7"),
        ({"first_layers": 3}, "lora.first_layers is 3, but the model has 2 blocks"),
    ],
)
def test_a_variant_that_does_not_fit_the_model_is_refused(settings: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_lora(tiny_model(), LoRAConfig(**settings))


def test_a_fresh_dora_changes_nothing() -> None:
    model = tiny_model()
    with torch.no_grad():
        before = model(TOKENS)
        add_lora(model, LoRAConfig(targets=EVERYTHING, dora=True))
        torch.testing.assert_close(model.train()(TOKENS), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
@pytest.mark.parametrize("bias", [False, True])
def test_dora_learns_lengths_and_directions_apart(bias: bool, scheme: Scheme) -> None:
    """Liu et al. 2024, eq. 5: m (W + B A) / ||W + B A||, row by row in our layout."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=bias))
    quantize_linears(model, scheme)
    layer = LoRALinear(model[0], LoRAConfig(r=4, alpha=8, dropout=0.0, dora=True))
    for parameter in (layer.lora_b, layer.magnitude):
        torch.nn.init.normal_(parameter)  # type: ignore[arg-type]
    x = torch.randn(3, 64)
    whole = frozen_weight(layer.base) + 2 * layer.lora_b @ layer.lora_a
    expected = x @ (layer.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)).T  # type: ignore[index]
    torch.testing.assert_close(layer(x), expected + (layer.base.bias if bias else 0), rtol=1e-4, atol=1e-5)


def test_dora_bears_rows_that_are_zero() -> None:
    """As those of tokens that only fill up a vocabulary."""
    linear = nn.Linear(6, 4, bias=False)
    linear.weight.data[2] = 0
    layer, x = LoRALinear(linear, LoRAConfig(r=2, dropout=0.0, dora=True)), torch.randn(3, 6)
    torch.testing.assert_close(layer(x), linear(x))
    layer(x).square().sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.requires_grad)
    b, magnitude = torch.zeros(4, 2), layer.magnitude.detach()
    merged, _ = merge_measured(linear.weight, linear.weight, layer.lora_a.detach(), b, 1.0, magnitude)
    torch.testing.assert_close(merged, linear.weight.detach())


def test_gradients_of_dora_are_those_of_peft() -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    linear = torch.nn.Linear(12, 7)
    ours = LoRALinear(linear, LoRAConfig(r=4, alpha=8, dropout=0.0, dora=True))
    config = peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=["0"])
    theirs = peft.get_peft_model(torch.nn.Sequential(copy.deepcopy(linear)), config).base_model.model[0]
    pairs = [
        (ours.lora_a, theirs.lora_A["default"].weight),
        (ours.lora_b, theirs.lora_B["default"].weight),
        (ours.magnitude, theirs.lora_magnitude_vector["default"].weight),
    ]
    for mine, other in pairs:
        torch.nn.init.normal_(mine)
        other.data.copy_(mine.data)
    x = torch.randn(5, 12)
    torch.testing.assert_close(ours(x), theirs(x))
    ours(x).square().sum().backward()
    theirs(x).square().sum().backward()
    for mine, other in pairs:
        torch.testing.assert_close(mine.grad, other.grad)


def test_the_plan_counts_what_learns_in_every_variant() -> None:
    for settings in (
        {"dora": True},
        {"rank_pattern": {"down": 3}, "targets": "all"},
        {"last_layers": 1},
        {"train_embeddings": True},
        {"train_tokens": (1, 2)},
        {"init": "pissa"},
    ):
        config = LoRAConfig(**settings)  # type: ignore[arg-type]
        model = tiny_model()
        add_lora(model, config)
        plan = make_plan(model.config, config, Storage(), MicroBatches(64), TrainConfig(), Room())
        assert plan.trainable == count_trainable(model) == sum(t.numel() for t in lora_state(model).values())
