"""Batches, streams and limits: greedy answers are those of whole forward passes."""

import pytest
import torch

from lit_qlora.errors import NumericalError, UsageError
from lit_qlora.generation import generate, room_for_answer, stream
from lit_qlora.model.gpt import GPT
from lit_qlora.settings import GenerationConfig
from tests.conftest import tiny_model

PROMPTS = [[5, 9, 200], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 8]]


def greedy(count: int) -> GenerationConfig:
    return GenerationConfig(max_new_tokens=count)


def answer_without_cache(model: GPT, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"sliding_window": 6},
        {"norm": "layer", "ffn": "gelu", "parallel_residual": True, "rope_fraction": 0.25, "n_kv_head": 4},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 32, "tied_head": True},
    ],
    ids=["llama", "sliding_window", "neox", "llama3_tied"],
)
def test_greedy_answers_with_a_cache_are_those_of_full_forward_passes(changes):
    model = tiny_model(**changes)
    answers = generate(model, PROMPTS, greedy(20), stop_ids=())
    assert answers == [answer_without_cache(model, prompt, 20) for prompt in PROMPTS]
    assert len({tuple(answer) for answer in answers}) == len(PROMPTS)


def test_a_batch_of_unequal_prompts_is_answered_like_each_of_them_alone():
    model = tiny_model()
    together = generate(model, PROMPTS, greedy(30), stop_ids=(17, 40))
    assert together == [generate(model, [prompt], greedy(30), stop_ids=(17, 40))[0] for prompt in PROMPTS]


def test_a_stream_gives_the_answer_of_generate():
    model = tiny_model()
    sampling = GenerationConfig(max_new_tokens=25, temperature=1.0, top_k=20, seed=3)
    assert list(stream(model, PROMPTS[0], sampling, ())) == generate(model, PROMPTS[:1], sampling, ())[0]


def test_each_answer_ends_at_its_own_stop_id_without_it():
    model = tiny_model()
    full = generate(model, PROMPTS, greedy(12), stop_ids=())
    stops = {full[0][4], full[2][7]}
    for answer, whole in zip(generate(model, PROMPTS, greedy(12), stops), full, strict=True):
        end = next((i for i, token in enumerate(whole) if token in stops), len(whole))
        assert answer == whole[:end]
    assert list(stream(model, PROMPTS[0], greedy(12), {full[0][4]})) == full[0][: full[0].index(full[0][4])]


def test_an_answer_ends_where_the_caller_says_so():
    model = tiny_model()
    full = generate(model, PROMPTS, greedy(12), stop_ids=())
    answers = generate(model, PROMPTS, greedy(12), (), stop=lambda ids: len(ids) == 3)
    assert answers == [answer[:3] for answer in full]


def test_prompt_and_answer_never_exceed_the_context():
    model = tiny_model(block_size=16)
    answers = generate(model, PROMPTS, greedy(100), stop_ids=())
    assert [len(p) + len(a) for p, a in zip(PROMPTS, answers, strict=True)] == [16] * 4
    assert answers == [answer_without_cache(model, p, 16 - len(p)) for p in PROMPTS]
    assert room_for_answer(model, 15, 100) == 1


def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers():
    with pytest.raises(UsageError, match="16 tokens, and the model's context holds 16"):
        generate(tiny_model(block_size=16), [[1], [2] * 16], greedy(5), stop_ids=())


def test_an_empty_prompt_is_refused_and_no_prompts_have_no_answers():
    with pytest.raises(UsageError, match="empty"):
        list(stream(tiny_model(), [], greedy(5), ()))
    assert generate(tiny_model(), [], greedy(5), ()) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_ids_beyond_the_tokenizer_are_never_chosen(temperature):
    model = tiny_model()
    with torch.no_grad():
        model.head.weight[250:] *= 10  # makes some of them likelier than all others
    sampling = GenerationConfig(max_new_tokens=20, temperature=temperature, seed=1)
    assert any(token >= 250 for answer in generate(model, PROMPTS, sampling, ()) for token in answer)
    answers = generate(model, PROMPTS, sampling, (), vocab_size=250)
    assert all(token < 250 for answer in answers for token in answer)


def test_training_goes_on_as_it_was_even_if_generation_fails():
    model = tiny_model().train()
    generate(model, PROMPTS, greedy(3), ())
    assert model.training
    assert model.blocks[0].training
    with torch.no_grad():
        model.head.weight[3] = torch.nan
    with pytest.raises(NumericalError):
        generate(model, PROMPTS, greedy(3), ())
    assert model.training
    answer = stream(tiny_model(), [1], greedy(3), ())
    next(answer)
    assert torch.is_grad_enabled()


def test_a_seed_fixes_the_answer():
    model = tiny_model()

    def answer(seed):
        return generate(model, PROMPTS, GenerationConfig(max_new_tokens=20, temperature=1.0, seed=seed), ())

    assert answer(1) == answer(1)
    assert answer(1) != answer(2)
