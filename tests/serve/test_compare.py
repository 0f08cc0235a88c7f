"""Two models are compared at each token of an answer."""

from typing import Any

import httpx
import pytest
import torch

from lit_qlora.inference import Roster, encode_prompt
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.serve.compare import pieces
from tests.serve.conftest import Running, serving

QUESTION, ANSWER = "What is 3 plus 4?", "It is 7, I think."
BODY = {"model": "sums", "with": "tiny", "messages": [{"role": "user", "content": QUESTION}], "answer": ANSWER}


def compare(server: Running, **changes: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/compare", json=BODY | changes, timeout=60)


def log_probs(roster: Roster, name: str, answer: list[int]) -> torch.Tensor:
    prompt = encode_prompt(roster.tokenizer, roster.styles[name], prompt_of(QUESTION))
    with roster.answering(name), torch.no_grad():
        logits = roster.model(torch.tensor([[*prompt, *answer]]))
    return logits[0, len(prompt) - 1 : -1, : roster.tokenizer.size].double().log_softmax(-1)


def test_each_piece_of_an_answer_has_the_divergence_of_the_other_model(roster: Roster) -> None:
    style = roster.styles["sums"]
    answer = style.encode_answer(roster.tokenizer, ANSWER)[:-1] if style else roster.tokenizer.encode(ANSWER, bos=False)
    first, second = (log_probs(roster, name, answer) for name in ("sums", "tiny"))
    expected = (first.exp() * (first - second)).sum(-1).tolist()
    assert max(expected) > 1e-3
    with serving(roster) as server:
        tokens = compare(server).json()["tokens"]
    assert "".join(token["text"] for token in tokens) == ANSWER
    wanted = list(pieces(roster.tokenizer, style, answer, expected))
    for token, (text, value) in zip(tokens, wanted, strict=True):
        assert token["text"] == text
        assert token["kl"] == pytest.approx(value, rel=1e-3, abs=1e-5)


def test_a_piece_of_several_tokens_has_their_largest_value(roster: Roster) -> None:
    ids = roster.tokenizer.encode("é\U0001f98a!", bos=False)
    values = [float(number) for number in range(len(ids))]
    found = list(pieces(roster.tokenizer, None, ids, values))
    assert "".join(text for text, _ in found).strip() == "é\U0001f98a!"
    assert found[-1][1] == values[-1]
    assert len(found) <= len(ids)


REFUSED = [
    ({"with": "sums"}, 400, "compared with itself"),
    ({"with": "nobody"}, 404, "There is no model 'nobody'"),
    ({"answer": ""}, 400, "answer is empty"),
    ({"answer": "7 " * 500}, 400, "the model's context holds"),
    ({"temperature": 1}, 400, "temperature is not offered"),
    ({"answer": 7}, 400, "answer must be a text"),
]


def test_what_cannot_be_compared_is_refused_in_words(server: Running) -> None:
    for changes, status, says in REFUSED:
        reply = compare(server, **changes)
        assert (reply.status_code, changes) == (status, changes)
        assert says in reply.json()["error"]["message"]


def test_a_comparison_waits_for_its_turn_and_stops_no_answer(roster: Roster) -> None:
    body = {"model": "tiny", "messages": BODY["messages"], "max_tokens": 8, "temperature": 0, "stream": True}
    with (
        serving(roster, pace=0.01) as server,
        httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as answer,
    ):
        lines = answer.iter_lines()
        next(lines)
        assert compare(server).status_code == 200
        assert list(lines)[-2] == "data: [DONE]"


def test_memory_that_runs_out_ends_a_comparison_alone(roster: Roster, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("lit_qlora.serve.app.divergences", fail)
    with serving(roster) as server:
        reply = compare(server)
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "model_error")
        assert httpx.get(f"{server.url}/health").status_code == 200
