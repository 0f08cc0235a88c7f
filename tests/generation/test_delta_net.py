"""Generation where blocks have states, or no keys and values of their own: all features, or a refusal by name."""

import pytest
import torch

from lit_qlora.errors import UsageError
from lit_qlora.generation import Draft, generate
from lit_qlora.generation.batching import Batcher, Request
from lit_qlora.settings import GenerationConfig
from tests.model.test_switches import model_of

CASES = ["qwen3_5", "gemma4-E", pytest.param("granitemoehybrid-spaces", marks=pytest.mark.slow)]
PROMPTS = [[5, 9, 20], [7], [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_a_batch_of_unequal_prompts_is_answered_as_each_alone(
    case: str, settings: dict[str, int], fixed_shapes: bool
) -> None:
    model, config = model_of(case), GenerationConfig(max_new_tokens=12, **settings)
    together = generate(model, PROMPTS, config, (17,), fixed_shapes=fixed_shapes)
    alone = [answer for prompt in PROMPTS for answer in generate(model, [prompt], config, (17,), fixed_shapes=False)]
    assert together == alone
    assert len({tuple(answer) for answer in together}) >= len(PROMPTS)


def test_the_likeliest_answer_is_that_of_whole_texts_read_again() -> None:
    model, text = model_of("qwen3_next"), list(PROMPTS[2])
    (answer,) = generate(model, [text], GenerationConfig(max_new_tokens=9), ())
    with torch.no_grad():
        for token in answer:
            assert int(model(torch.tensor([text]))[0, -1].argmax()) == token
            text.append(token)


@pytest.mark.parametrize("case", CASES)
def test_requests_that_come_and_go_in_slots_are_answered_as_alone(case: str) -> None:
    model, config = model_of(case), GenerationConfig(max_new_tokens=12)
    expected = generate(model, PROMPTS, config, ())
    batcher = Batcher(model, 2, lambda adapters: None, context=40)
    requests = [Request(prompt, config, (), room) for prompt, room in zip(PROMPTS, (4, 9, 12), strict=True)]
    waiting = list(requests)
    while waiting or batcher.active:
        while waiting and len(batcher.active) < 2:
            batcher.join(waiting.pop(0))
        batcher.step()
        batcher.look_ahead()
    for request, answer in zip(requests, expected, strict=True):
        assert request.answer == answer[: request.room]


@pytest.mark.parametrize(
    ("case", "kind"),
    [("qwen3_5", "gated delta net"), ("lfm2", "short convolution"), ("granitemoehybrid-spaces", "state s")],
)
def test_a_draft_whose_guesses_it_could_not_forget_is_refused_by_name(case: str, kind: str) -> None:
    model = model_of(case)
    with pytest.raises(UsageError, match=rf"{case} keeps a state .* \({kind}.* takes no part in assisted generation"):
        generate(model, PROMPTS, GenerationConfig(max_new_tokens=5), (), draft=Draft(model))
