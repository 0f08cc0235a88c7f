"""Searches with beams: the best answer of all where nothing is pruned, groups that differ, stop strings."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.errors import UsageError
from lit_qlora.generation import generate
from lit_qlora.settings import GenerationConfig
from tests.conftest import ROOT, tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
STOP_IDS = [7, 21]
RECORDED = json.loads((ROOT / "tests/generation/group_beams.json").read_text())
"""Answers of transformers 4.55.4, the last but one minor version with groups of beams."""


def without_chance(parameters: dict[str, torch.Tensor]) -> None:
    """Weights that look random and are the same with every version of torch."""
    with torch.no_grad():
        for i, name in enumerate(sorted(parameters)):
            tensor = parameters[name]
            waves = torch.sin(torch.arange(tensor.numel(), dtype=torch.float64) + 100 * i)
            tensor.copy_(0.4 * torch.frac(1e4 * waves).view(tensor.shape) + float(tensor.ndim == 1))


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["settings"]))
def test_groups_of_beams_answer_as_those_of_transformers_4(case: dict[str, Any], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    without_chance(dict(theirs.named_parameters()))
    theirs.save_pretrained(tmp_path)
    convert_hf_checkpoint(tmp_path, tmp_path / "ours")
    model = load_model(tmp_path / "ours")
    for prompt, answers in zip(case["prompts"], case["answers"], strict=True):
        assert generate(model, [prompt], GenerationConfig(max_new_tokens=16, **case["settings"]), STOP_IDS) == answers


def test_a_search_that_prunes_nothing_finds_the_likeliest_answer_of_all() -> None:
    model = tiny_model(vocab_size=6)
    prompt, length = [3, 1], 3
    scores = {}
    for answer in itertools.product(range(6), repeat=length):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *answer]]))[0, 1:-1].log_softmax(dim=-1)
        scores[answer] = float(logits[torch.arange(length), list(answer)].sum())
    ranking = sorted(scores, key=lambda answer: -scores[answer])[:5]
    config = GenerationConfig(max_new_tokens=length, num_beams=36, num_return_sequences=5)
    assert generate(model, [prompt], config, ()) == [list(answer) for answer in ranking]


def test_a_strong_diversity_penalty_makes_every_group_begin_differently() -> None:
    config = GenerationConfig(
        max_new_tokens=5, num_beams=6, num_beam_groups=6, diversity_penalty=1e4, num_return_sequences=6
    )
    answers = generate(tiny_model(), [[5, 9, 200]], config, ())
    for place in range(5):
        assert len({answer[place] for answer in answers}) == 6


def test_a_search_ends_at_a_stop_string_as_at_a_stop_id() -> None:
    model, prompts = tiny_model(), [[5, 9, 200], [7]]
    config = GenerationConfig(max_new_tokens=10, num_beams=3)
    ends = {token for answer in generate(model, prompts, config, ()) for token in answer[3:5]}
    by_id = generate(model, prompts, config, ends)
    by_string = generate(model, prompts, config, (), stop=lambda answer: answer[-1] in ends)
    assert max(map(len, by_id)) < 10
    for answer, with_string in zip(by_id, by_string, strict=True):
        assert with_string[:-1] == answer
        assert with_string[-1] in ends


def test_beams_respect_the_context_and_the_tokenizer() -> None:
    model = tiny_model(block_size=16)
    prompts = [[5, 9, 200], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
    answers = generate(model, prompts, GenerationConfig(num_beams=3), (), vocab_size=100)
    assert [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)] == [16, 16]
    assert max(token for answer in answers for token in answer) < 100
    config = GenerationConfig(num_beams=3, max_new_tokens=1)
    assert len(generate(model, prompts, config, ())[0]) == 1
    with pytest.raises(UsageError, match="empty"):
        generate(model, [[]], config, ())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_beams": 4, "num_beam_groups": 3, "diversity_penalty": 1.0}, "must divide num_beams"),
        ({"num_beams": 4, "num_beam_groups": 2}, "need each other"),
        ({"diversity_penalty": 1.0}, "need each other"),
        ({"length_penalty": 2.0}, "need num_beams"),
        ({"early_stopping": True}, "need num_beams"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0, "top_k": 5}, "num_beam_groups or do_sample"),
        ({"num_beams": 2, "num_return_sequences": 3}, "must not exceed num_beams"),
        ({"num_return_sequences": 3}, "repeat the same answer"),
        ({"do_sample": True, "temperature": 0.0}, "temperature 0"),
        ({"min_new_tokens": 200}, "min_new_tokens"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        GenerationConfig(**settings)
