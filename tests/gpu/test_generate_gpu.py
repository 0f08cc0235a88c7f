"""Decoding as CUDA graphs gives the text of the plain path, in every storage, for one text and for several."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from lit_qlora.generation import generate, graphed_step, stream
from lit_qlora.generation.batching import Batcher, Request
from lit_qlora.generation.decode_step import FastStep
from lit_qlora.generation.graphed_step import FixedStep
from lit_qlora.generation.slot_cache import SlotCache
from lit_qlora.lora.layer import LoRALinear, add_lora
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import frozen_weight, quantize_linears
from lit_qlora.settings import SCHEMES, GenerationConfig, LoRAConfig, Scheme
from tests.conftest import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[5, 9, 200], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 6},
    "neox": {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
    "mqa": {"n_kv_head": 1},
    "softcap": {"attention_softcap": 5.0, "logit_softcap": 3.0},
    "sinks": {"attention_sinks": True, "sliding_window": 6},
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64},
    "gpt_oss": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 64, "ffn": "swiglu_clamped", "mlp_bias": True}
    | {"router": "softmax_chosen", "router_bias": True, "attention_sinks": True, "sliding_window": 6},
}


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The limits for which graphs were captured."""
    limits: list[int] = []
    step: Callable[[FixedStep, torch.Tensor], Any] = FixedStep.__call__

    def counted(self: FixedStep, tokens: torch.Tensor) -> Any:
        before = len(self.graphs._graphs) if self.graphs else 0
        logits = step(self, tokens)
        if self.graphs and len(self.graphs._graphs) > before:
            limits.append(self.cache.limit)
        return logits

    monkeypatch.setattr(FixedStep, "__call__", counted)
    monkeypatch.setattr(graphed_step, "SMALLEST", 16)
    return limits


@pytest.fixture
def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """For each text or batch of them: 'fast' where its steps are those of generation.decode_step, else 'plain'."""
    taken: list[str] = []
    make = graphed_step._fast_step

    def noted(model: GPT, cache: SlotCache) -> FastStep | None:
        step = make(model, cache)
        taken.append("fast" if step else "plain")
        return step

    monkeypatch.setattr(graphed_step, "_fast_step", noted)
    return taken


def on_gpu(scheme: Scheme = "none", **changes: Any) -> GPT:
    model = tiny_model(**changes).cuda()
    quantize_linears(model, scheme)
    return model


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS, 5 * PROMPTS], ids=["one", "several", "many"])
@pytest.mark.parametrize("name", MODELS)
def test_a_graph_gives_the_greedy_text_of_the_plain_path(
    name: str, prompts: list[list[int]], captures: list[int], steps_taken: list[str]
) -> None:
    model = on_gpu(**MODELS[name])
    config = GenerationConfig(max_new_tokens=50)
    expected = generate(model, prompts, config, (17,), fixed_shapes=False)
    assert captures == []
    assert generate(model, prompts, config, (17,)) == expected
    assert captures
    assert set(steps_taken) == {"fast"}
    assert len(captures) == len(set(captures))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_graph_gives_the_text_of_the_plain_path_in_every_storage(scheme: Scheme, captures: list[int]) -> None:
    model = on_gpu(scheme)
    config = GenerationConfig(max_new_tokens=50)
    assert generate(model, PROMPTS, config, ()) == generate(model, PROMPTS, config, (), fixed_shapes=False)
    assert captures == [16, 32, 60]


def test_drawn_tokens_are_the_same_with_and_without_a_graph(captures: list[int]) -> None:
    model = on_gpu()
    config = GenerationConfig(max_new_tokens=40, temperature=0.9, top_k=50, num_return_sequences=3)
    assert generate(model, PROMPTS, config, ()) == generate(model, PROMPTS, config, (), fixed_shapes=False)
    assert captures


def test_two_streams_that_are_read_in_turns_do_not_disturb_each_other(captures: list[int]) -> None:
    model = on_gpu()
    config = GenerationConfig(max_new_tokens=30)
    expected = [generate(model, [prompt], config, (), fixed_shapes=False)[0] for prompt in PROMPTS[:2]]
    streams = [stream(model, prompt, config, ()) for prompt in PROMPTS[:2]]
    turns = list(zip(*streams, strict=True))
    assert [list(answer) for answer in zip(*turns, strict=True)] == expected


@pytest.mark.parametrize(("count", "spare"), [(1, None), (4, 0), (4, None), (20, 0), (20, None)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fast_step_in_bfloat16_is_as_near_to_float32_as_a_plain_one(
    scheme: Scheme, count: int, spare: int | None
) -> None:
    assert_as_near(scheme, count, spare)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_fast_step_with_experts_in_bfloat16_is_as_near_to_float32_as_a_plain_one(scheme: Scheme, count: int) -> None:
    # Every expert is chosen: nearly tied ones would change places, which outweighs all rounding.
    assert_as_near(scheme, count, None, n_expert=4, n_expert_per_token=4, expert_size=256, router_normalized=True)


def assert_as_near(scheme: Scheme, count: int, spare: int | None, **changes: Any) -> None:
    model = tiny_model(n_embd=256, ffn_size=256, n_kv_head=4, **changes).cuda().bfloat16()
    quantize_linears(model, scheme)
    add_lora(model, LoRAConfig(r=4, alpha=8, targets="all"))
    exact = copy.deepcopy(model.eval())
    for module in exact.modules():
        if isinstance(module, LoRALinear):
            weight = frozen_weight(module.base).float()
            module.base = nn.Linear(module.in_features, module.out_features, bias=False)
            module.base.weight = nn.Parameter(weight)
    exact.float()
    cache, exact_cache = (
        SlotCache(model.config, count, 16, dtype, "cuda") for dtype in (torch.bfloat16, torch.float32)
    )
    plain_cache = SlotCache(model.config, count, 16, torch.bfloat16, "cuda")
    step = FastStep(model, cache, spare)
    with torch.no_grad():
        for token in range(10, 15):
            tokens = torch.arange(token, token + count, device="cuda")
            expected = exact(tokens[:, None], exact_cache)[:, 0]
            plain = (model(tokens[:, None], plain_cache)[:, 0].float() - expected).norm()
            assert (step(tokens).float() - expected).norm() < 2 * plain


def test_slots_replay_graphs_and_answer_as_each_request_alone() -> None:
    model, config = on_gpu("bnb.nf4"), GenerationConfig(max_new_tokens=20)
    expected = generate(model, PROMPTS, config, (), fixed_shapes=False)
    batcher = Batcher(model, 3, lambda adapters: None)
    requests = [Request(prompt, config, (), room) for prompt, room in zip(PROMPTS, (4, 9, 20, 12), strict=True)]
    waiting = list(requests)
    while waiting or batcher.active:
        while waiting and len(batcher.active) < 3:
            batcher.join(waiting.pop(0))
        batcher.step()
        batcher.look_ahead()
    assert batcher._fast is not None
    assert batcher._fast.graphs is not None
    assert {shapes[0] for shapes in batcher._fast.graphs._graphs} == {1, 2, 3}  # type: ignore[index]
    for request, answer in zip(requests, expected, strict=True):
        assert request.answer == answer[: request.room]
