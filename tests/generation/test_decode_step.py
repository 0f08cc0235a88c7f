"""The decoding step of few launches gives the logits of the plain model, for every kind of model that it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.generation.decode_step import FastStep, why_not
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.kernels.small_batch_linear import MOST_ROWS
from lit_qlora.lora.adapter_switch import Selection, SwitchedLinear
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.model.gpt import GPT, KVCache
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import SCHEMES, LoRAConfig, Scheme
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 20, 7, 8, 1, 2], [7]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 4},
    "neox": {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
    "mqa": {"n_kv_head": 1, "qkv_bias": True, "attention_scale": 0.2},
    "qwen3": {"qk_norm": "head", "tied_head": True, "head_size": 32},
    "gemma": {"norm": "rms_plus_one", "norm_position": "both", "ffn": "geglu_tanh", "embedding_multiplier": 8.0}
    | {"logit_softcap": 3.0, "attention_softcap": 5.0, "sliding_window": 4},
    "granite_swa": {"attention_sinks": True, "sliding_window": 4, "qkv_bias": True},
    "olmo2": {"norm_position": "after", "qk_norm": "full"},
    "gpt2": {"norm": "layer", "ffn": "gelu_tanh", "positions": "learned", "mlp_bias": True, "projection_bias": True},
    "gemma4": {
        "qk_norm": "head",
        "value_norm": True,
        "key_is_value": True,
        "block_scale": True,
        "norm_position": "both",
    }
    | {"sliding_window": 4, "full_attention_layers": (1,), "full_head_size": 32, "full_kv_heads": 1},
    "gemma4-E": {"qk_norm": "head", "value_norm": True, "block_scale": True, "norm_position": "both", "n_layer": 4}
    | {"sliding_window": 4, "full_attention_layers": (1, 3), "full_head_size": 32, "shared_kv_layers": 2}
    | {"shared_kv_ffn_size": 192, "per_layer_size": 24, "per_layer_vocab": 96, "ffn": "geglu_tanh"},
    "nanochat": {"embedding_norm": True, "norm": "rms_no_weight", "qk_norm": "head", "qk_norm_after_rope": True}
    | {"ffn": "relu2"},
    "hunyuan": {"qk_norm": "head", "qk_norm_after_rope": True, "rope_fraction": 0.5},
    "granite": {"residual_multiplier": 0.5, "logit_multiplier": 0.25, "rope_interleaved": True},
}
UNSUITED: dict[str, tuple[dict[str, Any], str]] = {
    "late norms": ({"qk_norm": "each_head", "qk_norm_after_rope": True}, "norms behind the rotation"),
}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are taken for large ones, because it is programs that Triton's interpreter takes its time for."""
    monkeypatch.setattr(small_batch_linear, "BUSY_ROWS", 1)


def steps(
    model: GPT, fast: bool, prompts: list[list[int]] = PROMPTS, count: int = 2, spare: int | None = None
) -> list[Tensor]:
    """The logits of some steps, each after tokens that are the same whatever the logits were."""
    cache = SlotCache(model.config, len(prompts), 32, model.embed.weight.dtype, DEVICE)
    with torch.no_grad():
        for row, prompt in enumerate(prompts):
            own = KVCache(model.config, 1, len(prompt), model.embed.weight.dtype, DEVICE)
            model.hidden(torch.tensor([prompt], device=DEVICE), own)
            cache.put(row, own, 0)
        cache.limit = 16
        step = FastStep(model, cache, spare) if fast else None
        logits = []
        for i in range(count):
            tokens = (torch.arange(len(prompts), device=DEVICE)[:, None] * 69 + 11 + i) % 96
            logits.append(step(tokens[:, 0]) if step else model(tokens, cache)[:, 0])
    assert cache.lengths.tolist() == [len(prompt) + count for prompt in prompts]
    return logits


def agree(model: GPT) -> None:
    model.to(DEVICE)
    expected = steps(model, fast=False)
    for logits, plain in zip(steps(model, fast=True), expected, strict=True):
        assert torch.allclose(logits, plain, rtol=1e-4, atol=1e-4)
    # The weights are stacked by now, one text is computed by another kernel, and the plain model is what it was.
    (alone,) = steps(model, fast=True, prompts=PROMPTS[:1], count=1)
    assert torch.allclose(alone, expected[0][:1], rtol=1e-4, atol=1e-4)
    assert torch.allclose(steps(model, fast=False)[0], expected[0], rtol=1e-5, atol=1e-5)


QUICK = ("llama", "granite_swa")


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MODELS])
def test_logits_are_those_of_the_plain_model(name: str) -> None:
    agree(tiny_model(vocab_size=96, **MODELS[name]))


MIXED: dict[str, Scheme] = {"projection": "none", "down": "bnb.int8", "head": "bnb.nf4-dq"}


@pytest.mark.parametrize(("scheme", "layers"), [*((scheme, {}) for scheme in SCHEMES), ("bnb.nf4", MIXED)])
def test_logits_are_those_of_the_plain_model_in_every_storage(scheme: Scheme, layers: dict[str, Scheme]) -> None:
    model = tiny_model(n_layer=1, vocab_size=96, n_embd=128, ffn_size=128, n_kv_head=4, head_size=32).to(DEVICE)
    quantize_linears(model, scheme, layers=layers)
    agree(model)


@pytest.mark.parametrize("targets", ["all", ("query", "value"), "head"])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_adapters_that_are_not_merged_count(scheme: Scheme, targets: Any) -> None:
    model = tiny_model(n_layer=1, vocab_size=96).to(DEVICE)
    quantize_linears(model, scheme)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=targets, dropout=0.1))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    agree(model.eval())


@pytest.mark.slow
def test_adapters_of_embeddings_for_each_block_count() -> None:
    model = tiny_model(vocab_size=96, **MODELS["gemma4-E"] | {"per_layer_size": 64}).to(DEVICE)
    quantize_linears(model, "bnb.nf4")
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=("per_layer",)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    agree(model.eval())


EXPERTS = {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64}
MIXTURES: dict[str, dict[str, Any]] = {
    "mixtral": {"router": "softmax_chosen"},
    "qwen3_moe": {"router_normalized": True, "qk_norm": "head", "n_layer": 2, "dense_layers": (1,)},
    "gpt_oss": {"router": "softmax_chosen", "router_bias": True, "mlp_bias": True, "qkv_bias": True}
    | {"ffn": "swiglu_clamped", "attention_sinks": True, "sliding_window": 4},
    "deepseek": {"router": "sigmoid", "router_correction": True, "router_normalized": True, "router_scale": 2.5}
    | {"router_groups": 2, "router_groups_kept": 1, "shared_expert_size": 64},
    "qwen2_moe": {"shared_expert_size": 64, "shared_expert_gate": True, "qkv_bias": True},
    "gemma4_moe": {"experts_beside": True, "router_norm": True, "router_normalized": True, "norm_position": "both"},
    "llama4": {"router": "sigmoid", "router_before": True, "n_layer": 2, "shared_expert_size": 64}
    | {"sliding_window": 5, "chunked_window": True, "full_attention_layers": (1,), "no_rope_layers": (1,)}
    | {"qk_norm": "rotated", "qk_norm_after_rope": True, "rope_interleaved": True}
    | {"unrotated_scale_beta": 0.5, "unrotated_scale_size": 4},
}


@pytest.mark.parametrize(
    ("name", "scheme", "adapted"),
    [
        ("gpt_oss", "bnb.nf4-dq", ("all",)),
        pytest.param("gpt_oss", "none", ("mlp",), marks=pytest.mark.slow),
        pytest.param("mixtral", "bnb.nf4", ("all",), marks=pytest.mark.slow),
        pytest.param("mixtral", "bnb.int8", (), marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "bnb.nf4-dq", ("all",), marks=pytest.mark.slow),
        ("deepseek", "bnb.int8", ()),
        pytest.param("qwen2_moe", "none", ("all",), marks=pytest.mark.slow),
        pytest.param("qwen2_moe", "bnb.nf4-dq", ("mlp",), marks=pytest.mark.slow),
        ("gemma4_moe", "none", ()),
        pytest.param("gemma4_moe", "bnb.nf4-dq", ("all",), marks=pytest.mark.slow),
        pytest.param("llama4", "none", ("mlp",), marks=pytest.mark.slow),
        pytest.param("llama4", "bnb.nf4-dq", ("all",), marks=pytest.mark.slow),
    ],
)
def test_each_token_goes_through_its_own_experts(name: str, scheme: Scheme, adapted: tuple[Any, ...]) -> None:
    model = tiny_model(**{"n_layer": 1, "vocab_size": 96, **EXPERTS, **MIXTURES[name]}).to(DEVICE)
    quantize_linears(model, scheme)
    if adapted:
        add_lora(model, LoRAConfig(r=4, alpha=8, targets=adapted))
        for module in model.modules():
            if isinstance(module, LoRALinear):
                nn.init.normal_(module.lora_b, std=0.3)
    assert why_not(model) == ""
    agree(model.eval())


@pytest.mark.parametrize(
    ("scheme", "changes"),
    [
        ("bnb.nf4-dq", {"router_normalized": True, "mlp_bias": True}),
        ("none", {"router_normalized": True}),
        ("none", {"router": "sigmoid", "router_before": True}),
    ],
)
def test_many_tokens_go_through_all_experts_whose_weights_are_dequantised_once(
    scheme: Scheme, changes: dict[str, Any]
) -> None:
    model = tiny_model(n_layer=1, vocab_size=96, **EXPERTS, **changes).to(DEVICE)
    quantize_linears(model, scheme)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=("mlp",)))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    prompts = [[token] for token in range(7)]  # 14 choices of 4 experts
    expected = steps(model.eval(), fast=False, prompts=prompts, count=1)[0]
    assert torch.allclose(steps(model, fast=True, prompts=prompts, count=1)[0], expected, rtol=1e-4, atol=1e-4)


def test_experts_of_which_some_have_adapters_are_refused() -> None:
    model = tiny_model(n_layer=1, **EXPERTS)
    add_lora(model, LoRAConfig(r=4, targets=("mlp",)))
    expert = model.blocks[0].mlp.experts[1]
    expert.up = expert.up.base
    assert why_not(model) == "adapters on some of the experts"


@pytest.mark.parametrize(("changes", "reason"), UNSUITED.values(), ids=UNSUITED)
def test_other_models_are_refused(changes: dict[str, Any], reason: str) -> None:
    assert why_not(tiny_model(**changes).to(DEVICE)) == reason


def test_dora_is_refused() -> None:
    model = tiny_model().to(DEVICE)
    add_lora(model, LoRAConfig(r=4, dora=True))
    assert why_not(model) == "DoRA"
    assert why_not(model, by_row=True) == "adapters that learn"


@pytest.mark.parametrize(("scheme", "spare"), [("none", 0), ("bnb.nf4-dq", 0), ("bnb.int8", 40000)])
def test_weights_are_dequantised_once_or_cached_for_many_texts(scheme: Scheme, spare: int) -> None:
    model = tiny_model(n_layer=1, vocab_size=96, qkv_bias=True).to(DEVICE)
    quantize_linears(model, scheme, head=True)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=("query", "value", "mlp")))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    prompts = [[token] for token in range(MOST_ROWS + 1)]
    expected = steps(model.eval(), fast=False, prompts=prompts)
    for logits, plain in zip(steps(model, fast=True, prompts=prompts, spare=spare), expected, strict=True):
        assert torch.allclose(logits, plain, rtol=1e-4, atol=1e-4)


def test_cached_weights_take_no_more_than_there_is_to_spare() -> None:
    model = tiny_model(n_layer=1).to(DEVICE)
    quantize_linears(model, "bnb.nf4")
    cached = {}
    for rows in (1, 2, MOST_ROWS + 1):
        for spare in (0, 40000, 10**9):
            cache = SlotCache(model.config, rows, 8, torch.float32, DEVICE)
            products = FastStep(model, cache, spare).blocks[0].products
            kept = [product.cached for product in products if product.cached is not None]
            assert sum(weight.nbytes for weight in kept) <= spare
            cached[rows, spare] = len(kept)
            for product in products:
                needs_one = rows > MOST_ROWS and product.cached is None
                assert (product.workspace is not None) == needs_one
    assert [cached[1, spare] for spare in (0, 40000, 10**9)] == [0, 0, 0]
    assert [cached[2, spare] for spare in (0, 40000, 10**9)] == [0, 1, 4]


def test_an_adapter_that_all_texts_have_switched_on_counts_and_several_at_a_time_are_refused() -> None:
    model, selection = tiny_model(n_layer=1, vocab_size=96).to(DEVICE), Selection()
    for path in ("blocks.0.attn.query", "blocks.0.attn.value", "blocks.0.mlp.down"):
        layer = SwitchedLinear(model.get_submodule(path), selection)
        a, b = torch.randn(4, layer.in_features, device=DEVICE), torch.randn(layer.out_features, 4, device=DEVICE)
        layer.updates["one"] = (0.3 * a, 0.3 * b, 0.5, None)
        model.set_submodule(path, layer)
    base = steps(model, fast=False)[0]
    agree(model)
    selection.groups = [("one", None)]
    assert not torch.allclose(steps(model, fast=False)[0], base, rtol=0.1)
    agree(model)
    selection.groups = [("one", torch.tensor([1], device=DEVICE))]
    assert why_not(model) == "rows that use different adapters"
    assert why_not(model, by_row=True) == ""
    layer.updates["two"] = (a, b, 0.5, torch.ones(layer.out_features, device=DEVICE))
    assert why_not(model, by_row=True) == "DoRA"
