"""Requests that come and go are answered as each would be alone."""

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from lit_qlora.generation import generate
from lit_qlora.generation.batching import Batcher, Request
from lit_qlora.kernels import small_batch_linear
from lit_qlora.kernels.launch import AVAILABLE
from lit_qlora.lora.adapter_switch import Selection, SwitchedLinear
from lit_qlora.model.gpt import GPT
from lit_qlora.quantize import quantize_linears
from lit_qlora.settings import GenerationConfig
from tests.conftest import tiny_model

SETTINGS: list[dict[str, Any]] = [
    {},
    {"do_sample": True, "temperature": 0.8, "top_k": 30},
    {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    {"min_new_tokens": 6},
    {"top_p": 0.8, "seed": 5},
]
STOP_IDS = (17, 40, 99, 180)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 6}, {"positions": "learned"}], ids=str)
def test_requests_that_come_and_go_are_answered_as_each_alone(changes: dict[str, Any]) -> None:
    model, chance = tiny_model(**changes), random.Random(0)
    batcher = Batcher(model, slots=3, select=lambda rows: None, vocab_size=300)
    waiting = [
        Request(
            prompt=[chance.randrange(300) for _ in range(chance.randrange(1, 40))],
            config=GenerationConfig(max_new_tokens=30, **SETTINGS[i % len(SETTINGS)]),
            stop_ids=STOP_IDS,
            room=chance.randrange(1, 30),
        )
        for i in range(14)
    ]
    everyone, most = list(waiting), 0
    while waiting or batcher.active:
        room = 3 - len(batcher.active)
        if waiting and room and chance.random() < 0.8:
            batcher.join(*(waiting.pop() for _ in range(min(len(waiting), chance.randint(1, room)))))
        most = max(most, len(batcher.active))
        if batcher.active:
            batcher.step()
            batcher.look_ahead()
    assert most == 3
    for request in everyone:
        config = GenerationConfig(**{**vars(request.config), "max_new_tokens": 30})
        (alone,) = generate(model, [request.prompt], config, STOP_IDS, vocab_size=300)
        expected = alone[: request.room]
        assert request.answer[: len(expected)] == expected
        assert request.finish_reason == ("length" if len(request.answer) == len(expected) else "stop")


def test_a_request_that_leaves_early_disturbs_nobody() -> None:
    model = tiny_model()
    batcher = Batcher(model, slots=3, select=lambda rows: None)
    requests = [Request([3 + i, 7, 9], GenerationConfig(), (), room=20) for i in range(3)]
    for request in requests:
        batcher.join(request)
    for step in range(20):
        batcher.step()
        if step == 5:
            batcher.leave(requests[0])
        batcher.look_ahead()
    assert len(requests[0].answer) == 6
    for request in requests[1:]:
        assert request.answer == generate(model, [request.prompt], GenerationConfig(max_new_tokens=20), ())[0]
    assert batcher.active == []


def test_a_select_callback_hears_the_adapter_of_every_row() -> None:
    heard: list[list[str | None]] = []
    batcher = Batcher(tiny_model(), slots=2, select=lambda rows: heard.append(list(rows)))
    batcher.join(Request([1], GenerationConfig(), (), room=3, adapter="a"))
    batcher.step()
    batcher.look_ahead()
    batcher.join(Request([1], GenerationConfig(), (), room=3))
    batcher.step()
    batcher.look_ahead()
    assert heard == [["a"], ["a"], [None], ["a", None]]
    assert torch.equal(batcher.cache.lengths, torch.tensor([3, 2]))


def switched(model: GPT, selection: Selection) -> GPT:
    """The model with adapters a, of rank 4 on three layers, and b, of rank 2 on one of these."""
    torch.manual_seed(1)
    for path, ranks in {"attn.query": {"a": 4}, "attn.value": {"a": 4, "b": 2}, "mlp.down": {"a": 4}}.items():
        layer = SwitchedLinear(model.get_submodule(f"blocks.0.{path}"), selection)
        for name, r in ranks.items():
            layer.updates[name] = (torch.randn(r, layer.in_features), torch.randn(layer.out_features, r), 0.3, None)
        model.set_submodule(f"blocks.0.{path}", layer)
    return model


@pytest.mark.skipif(not AVAILABLE, reason="needs Triton")
def test_steps_of_few_launches_answer_requests_with_adapters_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(small_batch_linear, "BUSY_ROWS", 1)
    base = tiny_model(n_layer=1, vocab_size=96)
    quantize_linears(base, "bnb.nf4")
    selection = Selection()
    model, config = switched(base, selection), GenerationConfig(max_new_tokens=4)
    named = [("a", [3, 7, 9]), (None, [3, 7, 9]), ("b", [3, 7, 9]), ("a", [5]), ("b", [2, 4])]
    expected = []
    for name, prompt in named:
        selection.groups = [(name, None)] if name else []
        expected += generate(model, [prompt], config, ())
    assert len({tuple(answer) for answer in expected[:3]}) == 3

    def select(names: Sequence[str | None]) -> None:
        rows = {name: [i for i, other in enumerate(names) if other == name] for name in names if name}
        selection.groups = [(name, torch.tensor(own)) for name, own in rows.items()]

    batcher = Batcher(model, slots=3, select=select, fast=True)
    waiting = [Request(prompt, config, (), room=2 + i % 3, adapter=name) for i, (name, prompt) in enumerate(named)]
    everyone = list(waiting)
    while waiting or batcher.active:
        while waiting and len(batcher.active) < 3:
            batcher.join(waiting.pop(0))
        batcher.step()
        batcher.look_ahead()
    assert [request.answer for request in everyone] == [
        answer[: request.room] for request, answer in zip(everyone, expected, strict=True)
    ]
