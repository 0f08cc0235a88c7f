"""The decoding step of few launches gives the logits of the plain model, for every kind of model that it takes."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_qlora.generate.fast import FastStep
from lit_qlora.generate.slots import SlotCache
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora import LoRALinear, add_lora
from lit_qlora.model import GPT, KVCache
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import SCHEMES, LoRAConfig, Scheme
from tests.conftest import tiny_model

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PROMPTS = [[5, 9, 200, 7, 8, 1, 2], [7]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 4},
    "neox": {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
    "mqa": {"n_kv_head": 1, "qkv_bias": True, "attention_scale": 0.2},
    "qwen3": {"qk_norm": "head", "tied_head": True, "head_size": 32},
    "gemma": {"norm": "rms_plus_one", "norm_position": "both", "ffn": "geglu_tanh", "embedding_multiplier": 8.0}
    | {"logit_softcap": 3.0},
    "olmo2": {"norm_position": "after", "qk_norm": "full"},
    "gpt2": {"norm": "layer", "ffn": "gelu_tanh", "positions": "learned", "mlp_bias": True, "projection_bias": True},
    "granite": {"residual_multiplier": 0.5, "logit_multiplier": 0.25, "rope_interleaved": True},
}
UNSUITED: dict[str, dict[str, Any]] = {
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32},
    "softcap": {"attention_softcap": 5.0},
    "late norms": {"qk_norm": "head", "qk_norm_after_rope": True},
}


def steps(model: GPT, fast: bool, count: int = 3) -> list[Tensor]:
    """The logits of some steps, each after tokens that are the same whatever the logits were."""
    cache = SlotCache(model.config, len(PROMPTS), 32, model.embed.weight.dtype, DEVICE)
    with torch.no_grad():
        for row, prompt in enumerate(PROMPTS):
            own = KVCache(model.config, 1, len(prompt), model.embed.weight.dtype, DEVICE)
            model.hidden(torch.tensor([prompt], device=DEVICE), own)
            cache.put(row, own, 0)
        cache.limit = 16
        step = FastStep(model, cache) if fast else None
        logits = []
        for i in range(count):
            tokens = torch.tensor([[11 + i], [80 + i]], device=DEVICE)
            logits.append(step(tokens[:, 0]) if step else model(tokens, cache)[:, 0])
    assert cache.lengths.tolist() == [len(prompt) + count for prompt in PROMPTS]
    return logits


def agree(model: GPT) -> None:
    model.to(DEVICE)
    expected = steps(model, fast=False)
    for _ in range(2):  # the second time the weights are stacked already
        for logits, plain in zip(steps(model, fast=True), expected, strict=True):
            assert torch.allclose(logits, plain, rtol=1e-4, atol=1e-4)
    for logits, plain in zip(steps(model, fast=False), expected, strict=True):
        assert torch.allclose(logits, plain, rtol=1e-5, atol=1e-5), "the plain model is what it was"


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_the_plain_model(name: str) -> None:
    agree(tiny_model(**MODELS[name]))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_plain_model_in_every_storage(scheme: Scheme) -> None:
    model = tiny_model(n_embd=256, ffn_size=256, n_kv_head=4).to(DEVICE)
    quantize_linears(model, scheme)
    agree(model)


@pytest.mark.parametrize("targets", ["all", ("query", "value"), "head"])
@pytest.mark.parametrize("scheme", ["none", "bnb.nf4"])
def test_adapters_that_are_not_merged_count(scheme: Scheme, targets: Any) -> None:
    model = tiny_model().to(DEVICE)
    quantize_linears(model, scheme)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets=targets, dropout=0.1))
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_b, std=0.3)
    agree(model.eval())


@pytest.mark.parametrize("name", UNSUITED)
def test_other_models_are_refused(name: str) -> None:
    model = tiny_model(**UNSUITED[name]).to(DEVICE)
    with pytest.raises(NotImplementedError):
        steps(model, fast=True)


def test_dora_is_refused() -> None:
    model = tiny_model().to(DEVICE)
    add_lora(model, LoRAConfig(r=4, dora=True))
    with pytest.raises(NotImplementedError, match="DoRA"):
        steps(model.eval(), fast=True)
