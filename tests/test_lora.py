"""What learns, how much of it there is, and what it computes."""

import pytest
import torch

from lit_qlora.config import ModelConfig
from lit_qlora.errors import UsageError
from lit_qlora.lora import LoRALinear, add_lora, count_trainable, lora_state
from lit_qlora.model import GPT
from lit_qlora.settings import LoRAConfig, Target
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
    with torch.device("meta"):
        return GPT(config)


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
