"""The official client of the API gets the answers that generation gives."""

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from lit_qlora.generation import generate, text_of
from lit_qlora.inference import Roster, encode_prompt, stop_ids
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.settings import GenerationConfig
from tests.serve.conftest import Running, serving

openai = pytest.importorskip("openai")

QUESTION = "What is 3 plus 4?"


def client(server: Running, key: str = "none") -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)


def expected(roster: Roster, name: str, question: str, count: int, **settings: Any) -> str:
    style = roster.styles[name]
    prompt = encode_prompt(roster.tokenizer, style, prompt_of(question))
    config = GenerationConfig(max_new_tokens=count, **settings)
    with roster.answering(name):
        (ids,) = generate(roster.model, [prompt], config, stop_ids(roster.tokenizer, style), roster.tokenizer.size)
    return text_of(roster.tokenizer, ids, *((style.gap, style.tail) if style else ()))


def test_the_models_are_the_base_and_its_adapters(server: Running) -> None:
    models = client(server).models.list().data
    assert [model.id for model in models] == ["tiny", "sums", "other"]
    assert [model.parent for model in models] == [None, "tiny", "tiny"]
    assert client(server).models.retrieve("sums").id == "sums"


@pytest.mark.parametrize("name", ["tiny", "sums", "other"])
def test_a_chat_is_answered_by_the_adapter_that_it_names(name: str, roster: Roster) -> None:
    answer = expected(roster, name, QUESTION, 12)
    with serving(roster) as server:
        reply = client(server).chat.completions.create(
            model=name, messages=[{"role": "user", "content": QUESTION}], max_tokens=12, temperature=0
        )
    assert reply.choices[0].message.content == answer
    assert reply.choices[0].finish_reason == "length"
    prompt = encode_prompt(roster.tokenizer, roster.styles[name], prompt_of(QUESTION))
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (len(prompt), 12)


def test_a_stream_gives_the_same_text_in_pieces_and_its_usage_at_the_end(server: Running) -> None:
    request: dict[str, Any] = {
        "model": "sums",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": [{"type": "text", "text": QUESTION}]},
        ],
        "max_completion_tokens": 20,
        "temperature": 1.0,
        "top_p": 0.9,
        "seed": 3,
        "n": 2,
    }
    whole = client(server).chat.completions.create(**request)
    texts, reasons, usage = ["", ""], [None, None], None
    for part in client(server).chat.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        usage = part.usage
        for choice in part.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason
    assert texts == [choice.message.content for choice in whole.choices]
    assert texts[0] != texts[1]  # choices have seeds of their own
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usage == whole.usage


def test_completions_go_on_with_bare_texts_up_to_a_stop_string(roster: Roster) -> None:
    tokenizer = roster.tokenizer
    prompt = tokenizer.encode(QUESTION)
    config = GenerationConfig(max_new_tokens=30)
    with roster.answering("tiny"):
        (ids,) = generate(roster.model, [prompt], config, tokenizer.stop_ids, tokenizer.size)
    text = tokenizer.decode(ids)
    stop = text[8:10]
    with serving(roster) as server:
        settings: dict[str, Any] = {"model": "tiny", "prompt": [QUESTION, "Hi"], "max_tokens": 30, "temperature": 0}
        reply = client(server).completions.create(**settings, stop=[stop, "never said"])
        assert reply.choices[0].text == text[: text.index(stop)]
        assert reply.choices[0].finish_reason == "stop"
        assert len(reply.choices) == 2
        pieces = client(server).completions.create(**settings | {"prompt": QUESTION}, stop=stop, stream=True)
        assert "".join(piece.choices[0].text for piece in pieces) == text[: text.index(stop)]


def test_many_at_once_are_answered_as_each_alone(roster: Roster) -> None:
    asked = [(name, f"What is {i} plus 2?") for i in range(8) for name in roster.names]
    answers = [expected(roster, name, question, 10) for name, question in asked]
    with serving(roster, slots=5) as server, ThreadPoolExecutor(24) as pool:

        def ask(one: tuple[str, str]) -> str:
            reply = client(server).chat.completions.create(
                model=one[0], messages=[{"role": "user", "content": one[1]}], max_tokens=10, temperature=0
            )
            text: str = reply.choices[0].message.content
            return text

        assert list(pool.map(ask, asked)) == answers
        server.wait_for(lambda: server.load == (0, 0))


def test_our_own_settings_go_through_the_clients_extra_body(server: Running, roster: Roster) -> None:
    extra = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_tokens": 9, "top_k": 1}
    reply = client(server).chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": QUESTION}], max_tokens=12, extra_body=extra, user="me"
    )
    settings = {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "min_new_tokens": 9}
    text = reply.choices[0].message.content
    assert text == expected(roster, "tiny", QUESTION, 12, **settings)
    assert text != expected(roster, "tiny", QUESTION, 12)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"tools": [{}]}, "tools"),
        ({"frequency_penalty": 0.5}, "frequency_penalty"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 9}, "n"),
        ({"n": True}, "n"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"top_p": 0}, None),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"max_tokens": 5, "max_completion_tokens": 5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"model": 5}, "model"),
        ({"logprobs": 0}, "logprobs"),
        ({"frequency_penalty": False}, "frequency_penalty"),
    ],
    ids=str,
)
def test_what_is_not_offered_is_refused_by_name(server: Running, fields: dict[str, Any], param: str | None) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        client(server).post("/chat/completions", body=body, cast_to=object)
    assert caught.value.param == param


def test_what_asks_for_nothing_is_no_error(server: Running) -> None:
    reply = client(server).chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "x", "name": "Ann"}],
        max_tokens=1,
        frequency_penalty=0,
        logprobs=False,
        store=False,
        metadata={"a": "b"},
    )
    assert reply.choices[0].finish_reason == "length"


def test_the_page_is_whole_in_itself_and_the_browser_may_load_nothing_else(server: Running) -> None:
    import urllib.request

    with urllib.request.urlopen(server.url) as response:
        html, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert policy.count("'sha256-") == 2
    assert "http://" not in html
    assert "https://" not in html
    assert "innerHTML" not in html
    with urllib.request.urlopen(f"{server.url}/health") as response:
        assert json.load(response) == {"status": "ok", "running": 0, "waiting": 0}
