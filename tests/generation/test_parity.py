"""Answers are those of transformers' `generate`, token for token, in batches of unequal prompts."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.generation import generate
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig

transformers = pytest.importorskip("transformers")

VOCABULARY = 64
STOP_IDS = [7, 21]
PAD = STOP_IDS[0]  # what transformers fills with; no prompt holds it
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2},
    "gpt_neox": {},
    "mistral": {"num_key_value_heads": 2, "sliding_window": 6},
}


@pytest.fixture(autouse=True)
def _best_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers before 5.24 sort drawn beams: in the order of drawing a good one may miss its end."""
    mixin = transformers.GenerationMixin
    draw = mixin._get_top_k_continuations

    def sorted_draw(*args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        scores, *of_beams = draw(*args, **kwargs)
        order = scores.argsort(dim=-1, descending=True, stable=True)
        return scores.gather(1, order), *(t.gather(1, order[..., None].expand_as(t)) for t in of_beams)

    if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        monkeypatch.setattr(mixin, "_get_top_k_continuations", sorted_draw)


@cache
def models(family: str, seed: int) -> tuple[Any, GPT]:
    """A random transformers model and the same weights as ours."""
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(family, **SIZES | FAMILIES[family])
    config._attn_implementation = "eager"
    theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.25)
    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        convert_hf_checkpoint(Path(directory), Path(directory) / "ours")
        ours = load_model(Path(directory) / "ours").eval()
    return theirs, ours


def prompts(seed: int, count: int, longest: int = 9) -> list[list[int]]:
    """Random prompts, each of another length, without the ids that mean something."""
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.tensor([i for i in range(VOCABULARY) if i not in STOP_IDS])
    return [
        allowed[torch.randint(len(allowed), (max(1, longest - 3 * i),), generator=generator)].tolist()
        for i in range(count)
    ]


def their_answers(model: Any, questions: list[list[int]], settings: dict[str, Any], seed: int) -> list[list[int]]:
    longest = max(map(len, questions))
    ids = torch.tensor([[PAD] * (longest - len(question)) + question for question in questions])
    config = transformers.GenerationConfig(
        **{"do_sample": False, "top_k": 0, "max_new_tokens": 16} | settings,
        pad_token_id=PAD,
        eos_token_id=STOP_IDS,
    )
    torch.manual_seed(seed)
    out = model.generate(ids, attention_mask=(ids != PAD).long(), generation_config=config)
    answers = []
    for row in out[:, longest:].tolist():
        end = next((i for i, token in enumerate(row) if token in STOP_IDS), len(row))
        answers.append(row[:end])
    return answers


def our_answers(model: GPT, questions: list[list[int]], settings: dict[str, Any], seed: int) -> list[list[int]]:
    config = GenerationConfig(**{"max_new_tokens": 16} | settings, seed=seed)
    return generate(model, questions, config, STOP_IDS)


PENALTIES: list[dict[str, Any]] = [
    {},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8},
    {"no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"repetition_penalty": 1.2, "no_repeat_ngram_size": 3, "min_new_tokens": 3, "max_new_tokens": 24},
]
BEAMS: list[dict[str, Any]] = [
    {"num_beams": 2},
    {"num_beams": 4, "num_return_sequences": 4},
    {"num_beams": 3, "length_penalty": 0.0},
    {"num_beams": 3, "length_penalty": 2.0, "num_return_sequences": 2},
    {"num_beams": 4, "length_penalty": -1.0, "early_stopping": True},
    {"num_beams": 4, "early_stopping": True, "num_return_sequences": 3},
    {"num_beams": 4, "early_stopping": "never", "num_return_sequences": 2},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": -0.5},
    {"num_beams": 5, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    {"num_beams": 2, "max_new_tokens": 1, "num_return_sequences": 2},
]
DRAWS: list[dict[str, Any]] = [
    {"do_sample": True},
    {"do_sample": True, "temperature": 0.8, "top_k": 10, "num_return_sequences": 3},
    {"do_sample": True, "top_p": 0.7, "min_p": 0.02, "typical_p": 0.95, "repetition_penalty": 1.1},
    {"do_sample": True, "num_beams": 3},
    {"do_sample": True, "num_beams": 4, "temperature": 0.6, "top_k": 2, "num_return_sequences": 2},
    {"do_sample": True, "num_beams": 2, "temperature": 1.7, "top_p": 0.5, "length_penalty": 0.0, "min_new_tokens": 4},
    {"do_sample": True, "num_beams": 3, "min_p": 0.3, "early_stopping": True, "repetition_penalty": 1.2},
    {"do_sample": True, "num_beams": 3, "typical_p": 0.4, "early_stopping": "never"},
]


@pytest.mark.parametrize(
    ("settings", "family"),
    [
        pytest.param(settings, family, marks=[] if family == "llama" or i % 3 == j else [pytest.mark.slow])
        for i, settings in enumerate(PENALTIES + BEAMS + DRAWS)
        for j, family in enumerate(FAMILIES)
    ],
    ids=str,
)
def test_answers_are_those_of_transformers(settings: dict[str, Any], family: str) -> None:
    for seed in range(3):
        theirs, ours = models(family, seed)
        questions = prompts(seed, 3)
        assert our_answers(ours, questions, settings, seed) == their_answers(theirs, questions, settings, seed)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4}, {"do_sample": True}], ids=str)
def test_some_of_these_answers_end_by_themselves_and_some_at_the_limit(settings: dict[str, Any]) -> None:
    answers = [a for seed in range(3) for a in our_answers(models("llama", seed)[1], prompts(seed, 3), settings, seed)]
    assert {len(answer) == 16 for answer in answers} == {False, True}
