"""Steps of fixed shapes give the tokens of ordinary ones."""

from typing import Any

import pytest

from lit_qlora.generation import generate, graphed_step
from lit_qlora.generation.graphed_step import columns
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import GenerationConfig
from tests.conftest import tiny_model

PROMPTS = [[5, 9, 200], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8]]
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "window": {"sliding_window": 6},
    "neox": {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
    "mqa": {"n_kv_head": 1, "attention_softcap": 5.0},
    "experts": {"n_expert": 4, "n_expert_per_token": 2, "expert_size": 32},
}


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS], ids=["one", "several"])
@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_fixed_shapes_do_not_change_the_answers(
    name: str, settings: dict[str, Any], prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphed_step, "SMALLEST", 8)  # so that the limit grows on the way
    model = tiny_model(**MODELS[name])
    config = GenerationConfig(max_new_tokens=40, **settings)
    expected = generate(model, prompts, config, (17, 40), fixed_shapes=False)
    assert generate(model, prompts, config, (17, 40), fixed_shapes=True) == expected


def test_fixed_shapes_do_not_change_the_answers_of_a_quantised_model() -> None:
    model = tiny_model()
    quantize_linears(model, "bnb.nf4")
    config = GenerationConfig(max_new_tokens=40)
    expected = generate(model, PROMPTS, config, (), fixed_shapes=False)
    assert generate(model, PROMPTS, config, (), fixed_shapes=True) == expected


def test_a_text_may_fill_the_context_to_the_last_token() -> None:
    model = tiny_model(block_size=16)
    config = GenerationConfig(max_new_tokens=100)
    answers = generate(model, PROMPTS, config, (), fixed_shapes=True)
    assert answers == generate(model, PROMPTS, config, (), fixed_shapes=False)
    assert [len(p) + len(a) for p, a in zip(PROMPTS, answers, strict=True)] == [16] * 4


def test_the_columns_double_until_they_hold_the_text() -> None:
    assert [columns(n, 1500) for n in (1, 256, 257, 600, 1024, 1025, 1500)] == [256, 256, 512, 1024, 1024, 1500, 1500]
