"""Which tokens are left, and how often each is drawn: as transformers' own processors say, and as the draws show."""

import math
from typing import Any

import pytest
import torch

from lit_qlora.errors import NumericalError
from lit_qlora.generation.sampling import NO_TOKEN, choose, constrain, narrow
from lit_qlora.settings import GenerationConfig

transformers = pytest.importorskip("transformers")

FILTERS: list[dict[str, Any]] = [
    {"temperature": 0.7},
    {"temperature": 1.9, "top_k": 7},
    {"top_k": 500},
    {"top_p": 0.9},
    {"top_p": 0.05},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.8},
    {"typical_p": 0.2},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9},
]


def theirs(settings: dict[str, Any], logits: torch.Tensor) -> torch.Tensor:
    """What transformers' generate makes of the logits before it draws."""
    config = transformers.GenerationConfig(do_sample=True, **{"top_k": 0} | settings)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=1
        )
    )
    processors = model._get_logits_processor(config, input_ids_seq_length=1)
    scores: torch.Tensor = processors(torch.zeros(len(logits), 1, dtype=torch.long), logits)
    return scores


@pytest.mark.parametrize("settings", FILTERS, ids=str)
def test_the_tokens_that_are_left_are_those_of_transformers(settings: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, 120, generator=generator)
    ours = narrow(logits, GenerationConfig(do_sample=True, **settings)).softmax(dim=-1)
    torch.testing.assert_close(ours, theirs(settings, logits).softmax(dim=-1), rtol=1e-4, atol=1e-7)
    assert (ours > 0).any(dim=-1).all()


@pytest.mark.parametrize("temperature", [1e-30, 1e-42, 1e-300, 5e-324])
def test_the_smallest_temperatures_draw_the_likeliest(temperature: float) -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [-5.0, -7.0, -math.inf]])
    assert choose(scores, GenerationConfig(temperature=temperature)).tolist() == [1, 0]


@pytest.mark.parametrize("row", [[-math.inf] * 3, [math.inf, 0.0, 1.0]], ids=str)
def test_where_there_is_nothing_to_draw_from_it_is_said(row: list[float]) -> None:
    with pytest.raises(NumericalError, match="No token can be drawn"):
        choose(torch.tensor([[1.0, 2.0, 3.0], row]), GenerationConfig(do_sample=True))


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"do_sample": True}, PROBABILITIES),
        ({"temperature": 1.0}, PROBABILITIES),
        ({"temperature": 0.5}, PROBABILITIES**2),
        ({"top_k": 2}, torch.tensor([0, 0.4, 0, 0.3, 0])),
        ({"top_k": 100}, PROBABILITIES),
        ({"top_p": 0.6}, torch.tensor([0, 0.4, 0, 0.3, 0])),
        ({"top_p": 0.71}, torch.tensor([0, 0.4, 0, 0.3, 0.15])),
        ({"top_p": 1e-9}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([0, 0.4, 0, 0.3, 0])),  # 0.4 / 0.85 and 0.3 / 0.85 reach 0.8
        ({"min_p": 0.3}, torch.tensor([0, 0.4, 0, 0.3, 0.15])),
        ({"temperature": 1e-30}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"temperature": 0.0, "top_p": 0.5}, torch.tensor([0, 1.0, 0, 0, 0])),
        ({"do_sample": False}, torch.tensor([0, 1.0, 0, 0, 0])),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_the_probabilities_that_are_left(
    settings: dict[str, Any], expected: torch.Tensor
) -> None:
    draws = 20_000
    generator = torch.Generator().manual_seed(0)
    logits = (PROBABILITIES.log() + 7).expand(draws, -1)
    counts = choose(logits, GenerationConfig(**settings), generator).bincount(minlength=5)
    assert not counts[expected == 0].any()
    expected = expected / expected.sum()
    left = expected > 0
    # Pearson's chi-square; 23 is beyond the 99.98th percentile for up to four degrees of freedom.
    assert ((counts - draws * expected)[left] ** 2 / (draws * expected[left])).sum() < 23


HISTORY = torch.tensor([[NO_TOKEN, NO_TOKEN, 3, 4, 3, 4, 3], [1, 2, 3, 1, 2, 5, 1]])


def test_a_repeated_run_cannot_be_completed() -> None:
    scores = torch.zeros(2, 8)
    config = GenerationConfig(no_repeat_ngram_size=3)
    forbidden = constrain(scores, HISTORY, config, (), 0).isinf()
    # After 4 3 came 4; after 5 1 nothing yet, and padding is no token.
    assert [row.nonzero().flatten().tolist() for row in forbidden] == [[4], []]
    forbidden = constrain(scores, HISTORY, GenerationConfig(no_repeat_ngram_size=2), (), 0).isinf()
    assert [row.nonzero().flatten().tolist() for row in forbidden] == [[4], [2]]
    forbidden = constrain(scores, HISTORY, GenerationConfig(no_repeat_ngram_size=1), (), 0).isinf()
    assert [row.nonzero().flatten().tolist() for row in forbidden] == [[3, 4], [1, 2, 3, 5]]
    assert not constrain(scores, HISTORY, GenerationConfig(no_repeat_ngram_size=9), (), 0).isinf().any()


def test_a_repetition_penalty_moves_seen_tokens_down_whatever_their_sign() -> None:
    scores = torch.tensor([[2.0, -2.0, 2.0, 2.0, -2.0, 0.0, 0.0, 0.0]] * 2)
    penalised = constrain(scores, HISTORY, GenerationConfig(repetition_penalty=2.0), (), 0)
    assert penalised.tolist() == [
        [2.0, -2.0, 2.0, 1.0, -4.0, 0.0, 0.0, 0.0],
        [2.0, -4.0, 1.0, 1.0, -2.0, 0.0, 0.0, 0.0],
    ]


def test_an_answer_cannot_end_before_its_least_length() -> None:
    config = GenerationConfig(min_new_tokens=2)
    for answered, forbidden in ((0, [1, 6]), (1, [1, 6]), (2, [])):
        scores = constrain(torch.zeros(1, 8), HISTORY[:1], config, {1, 6, 900}, answered)
        assert (scores[0] == -math.inf).nonzero().flatten().tolist() == forbidden
