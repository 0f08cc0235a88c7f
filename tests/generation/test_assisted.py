"""A draft model changes how fast an answer comes, and nothing else."""

from collections import Counter
from typing import Any

import pytest
import torch

from lit_qlora.generation import Draft, generate, stream
from lit_qlora.generation.assisted import check
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig
from tests.conftest import tiny_model

PROMPTS = [[5, 9, 200], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]
SETTINGS: list[dict[str, Any]] = [{}, {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 9}]


def draft_of(model: GPT, likeness: float) -> GPT:
    """A model that guesses well: `model` with some noise, the less the greater `likeness`."""
    other = tiny_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for mine, its in zip(other.parameters(), model.parameters(), strict=True):
            mine.copy_(its + (1 - likeness) * 0.1 * torch.randn(its.shape, generator=generator))
    return other


@pytest.mark.parametrize(
    ("settings", "likeness", "tokens"),
    [
        pytest.param(SETTINGS[(i + j + k) % 2], likeness, tokens, marks=[pytest.mark.slow] if k else [])
        for k in range(2)
        for i, likeness in enumerate([0.0, 0.9, 1.0])
        for j, tokens in enumerate([1, 4, 30])
    ],
    ids=str,
)
def test_the_likeliest_answer_is_the_same_with_a_draft_model(
    settings: dict[str, Any], likeness: float, tokens: int
) -> None:
    model = tiny_model()
    config = GenerationConfig(max_new_tokens=30, **settings)
    expected = generate(model, PROMPTS, config, (17, 40), vocab_size=300)
    draft = Draft(draft_of(model, likeness), tokens)
    assert generate(model, PROMPTS, config, (17, 40), vocab_size=300, draft=draft) == expected
    assert list(stream(model, PROMPTS[0], config, (17, 40), vocab_size=300, draft=draft)) == expected[0]


def test_a_good_draft_model_saves_the_model_most_of_its_passes() -> None:
    model = tiny_model()
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    generate(model, PROMPTS[:1], GenerationConfig(max_new_tokens=30), (), draft=Draft(draft_of(model, 1.0), 5))
    assert len(calls) == 5  # 30 tokens, six with each pass


def test_answers_end_at_stop_strings_and_at_the_context_and_drafts_may_have_a_smaller_one() -> None:
    model, small = tiny_model(block_size=40), tiny_model(block_size=20)
    config = GenerationConfig(max_new_tokens=100)
    expected = generate(model, PROMPTS, config, ())
    assert generate(model, PROMPTS, config, (), draft=Draft(small)) == expected
    assert [len(prompt) + len(answer) for prompt, answer in zip(PROMPTS, expected, strict=True)] == [40] * 3
    stopped = generate(model, PROMPTS, config, (), stop=lambda ids: len(ids) == 3, draft=Draft(small))
    assert stopped == [answer[:3] for answer in expected]


@pytest.mark.parametrize("seed", range(3))
def test_checked_guesses_have_the_distribution_that_is_wanted(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, draws = 4, 8000
    q = [(2 * torch.randn(size, generator=generator)).softmax(dim=-1) for _ in range(2)]
    p = [(2 * torch.randn(size, generator=generator)).softmax(dim=-1) for _ in range(3)]
    p[0][1] = 0  # what must not be chosen is not, however likely the draft model finds it
    p[0] /= p[0].sum()
    counts: Counter[tuple[int, ...]] = Counter()
    guesses = [torch.multinomial(row, draws, replacement=True, generator=generator).tolist() for row in q]
    for pair in zip(*guesses, strict=True):
        tokens = check(pair, q, p, generator)
        while len(tokens) < 3:  # go on with the wanted probabilities alone
            tokens.append(int(torch.multinomial(p[len(tokens)], 1, generator=generator)))
        counts[tuple(tokens)] += 1
    statistic = 0.0
    for tokens in torch.cartesian_prod(*[torch.arange(size)] * 3).tolist():
        expected = draws * float(p[0][tokens[0]] * p[1][tokens[1]] * p[2][tokens[2]])
        if expected == 0:
            assert counts[tuple(tokens)] == 0
        else:
            statistic += (counts[tuple(tokens)] - expected) ** 2 / expected
    assert statistic < 95  # chi-square with 47 degrees of freedom exceeds this once in 20,000 times


def test_drawn_answers_have_the_models_own_distribution() -> None:
    model, other = tiny_model(vocab_size=5, n_layer=1), tiny_model(seed=3, vocab_size=5, n_layer=1)
    prompt, draws = [2, 1], 1200
    config = GenerationConfig(max_new_tokens=2, temperature=0.7, num_return_sequences=draws, seed=5)
    counts = Counter(map(tuple, generate(model, [prompt], config, (), draft=Draft(other, 2))))
    with torch.no_grad():
        first = (model(torch.tensor([prompt]))[0, -1] / 0.7).softmax(dim=-1)
        statistic = 0.0
        for a in range(5):
            second = (model(torch.tensor([[*prompt, a]]))[0, -1] / 0.7).softmax(dim=-1)
            for b in range(5):
                expected = draws * float(first[a] * second[b])
                statistic += (counts[a, b] - expected) ** 2 / expected
    assert statistic < 60  # chi-square with 24 degrees of freedom exceeds this once in 15,000 times
