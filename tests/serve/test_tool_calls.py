"""Tools in the official client: the prompt holds them, calls come back in OpenAI's form, whole and streamed."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from lit_qlora.data.messages import conversation_of
from lit_qlora.inference import Roster, encode_prompt
from lit_qlora.prompts.style import TemplateStyle
from lit_qlora.serve.answers import Answers
from lit_qlora.serve.tool_calls import read_calls
from tests.serve.conftest import serving
from tests.serve.test_app import client

openai = pytest.importorskip("openai")

TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"name": "get_weather", "arguments": {"city": "Oslo"}}
TEMPLATE = """{% for tool in tools or [] %}{{ tool.function.name }}, {% endfor %}
{%- for m in messages %}{{ m.content or '' }}
{%- for call in m.tool_calls or [] %}{{ call.function.name }} {{ call.function.arguments.city }}{% endfor %}|
{%- endfor %}{% if add_generation_prompt %}A:{% endif %}"""
"""With few words, for the model has little room."""
ASKED = [{"role": "user", "content": "Weather in Oslo?"}]
NOTATIONS = {
    "hermes": "Let me look.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>",
    "mistral": "[TOOL_CALLS][{call}, {call}]",
    "mistral, its mark a control token": "[{call}, {call}]",
    "llama": "{call}; {call}",
}


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("key", ["arguments", "parameters"])
def test_calls_are_read_in_the_notations_in_use(notation: str, key: str) -> None:
    call = json.dumps({"name": "get_weather", key: {"city": "Oslo"}})
    words, calls = read_calls(NOTATIONS[notation].replace("{call}", call), ["get_weather"])
    assert words == ("Let me look." if notation == "hermes" else "")
    assert [call["function"] for call in calls] == [{"name": "get_weather", "arguments": '{"city": "Oslo"}'}] * 2
    assert len({call["id"] for call in calls}) == 2
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in calls)


@pytest.mark.parametrize(
    "text",
    [
        *("", "It rains.", "5", "{}", "[]", '{"name": "get_weather", "arguments": 5}', '{"name": "other"}', "null"),
        '{"name": "get_weather", "arguments": {}} and more',
        '<tool_call>\n{"name": "get_weather"\n</tool_call>',
        '<tool_call>{"name": "get_weather"}</tool_call> and more',
        '<tool_call>{"name": "get_weather"}</tool_call><tool_call>{"name": "other"}</tool_call>',
        *(f'{{"name": "get_weather", "arguments": {{"a": {value}}}}}' for value in ("1e400", "NaN", '"\\ud800"')),
        '{"name": "get_weather", "arguments": {"a": ' + "[" * 900 + "]" * 900 + "}}",
    ],
)
def test_an_answer_that_is_more_than_calls_is_words(text: str) -> None:
    assert read_calls(text, ["get_weather"]) == (text, [])


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch):
    """Lets every answer be a text, in pieces of three letters."""

    def say(text: str, reason: str = "stop") -> None:
        async def pieces(self: Answers) -> AsyncIterator[tuple[int, str, str | None]]:
            for at in range(0, len(text), 3):
                yield 0, text[at : at + 3], None
            yield 0, "", reason

        monkeypatch.setattr(Answers, "pieces", pieces)

    return say


@pytest.fixture
def tooled(roster: Roster) -> Roster:
    """A roster whose base has a template with tools."""
    return replace(roster, styles=roster.styles | {"tiny": TemplateStyle(TEMPLATE)})


@pytest.mark.parametrize("notation", NOTATIONS)
def test_the_client_gets_calls_whole_and_streamed(tooled: Roster, says, notation: str) -> None:
    says(NOTATIONS[notation].replace("{call}", json.dumps(CALL)))
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "max_tokens": 2}
    with serving(tooled) as server:
        whole = client(server).chat.completions.create(**request).choices[0]
        streamed = [part.choices[0] for part in client(server).chat.completions.create(**request, stream=True)]
    words = "Let me look." if notation == "hermes" else None
    assert (whole.finish_reason, whole.message.content) == ("tool_calls", words)
    wanted = [("get_weather", CALL["arguments"])] * 2
    assert [(call.function.name, json.loads(call.function.arguments)) for call in whole.message.tool_calls] == wanted
    calls = [call for choice in streamed for call in choice.delta.tool_calls or []]
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == wanted
    assert [call.index for call in calls] == [0, 1]
    assert "".join(choice.delta.content or "" for choice in streamed) == (words or "")
    assert streamed[-1].finish_reason == "tool_calls"


def test_words_are_words_with_tools_and_without(tooled: Roster, says) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 2}
    with serving(tooled) as server:
        for tools, text in (([TOOL], "It rains."), ([], json.dumps(CALL))):
            says(text, "length")
            choice = client(server).chat.completions.create(**request, tools=tools).choices[0]
            assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (text, None, "length")
            parts = client(server).chat.completions.create(**request, tools=tools, stream=True)
            assert "".join(part.choices[0].delta.content or "" for part in parts) == text


def test_the_prompt_holds_tools_calls_and_what_tools_answered(tooled: Roster) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": CALL | {"arguments": json.dumps(CALL["arguments"])}}
    messages = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "wet", "tool_call_id": "abcdefghi"},
    ]
    said = conversation_of([*messages, {"role": "assistant", "content": "a"}], {"tools": [TOOL]}).prompt
    style = tooled.styles["tiny"]
    with serving(tooled) as server:
        ask = client(server).chat.completions.create
        found = ask(model="tiny", messages=messages, tools=[TOOL], max_tokens=1).usage.prompt_tokens
        assert found == len(encode_prompt(tooled.tokenizer, style, said))
        without = ask(model="tiny", messages=ASKED, tools=[TOOL], tool_choice="none", max_tokens=1).usage.prompt_tokens
        assert without == ask(model="tiny", messages=ASKED, max_tokens=1).usage.prompt_tokens < found


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "sums"}, "does not write tools"),
        ({"tools": {"a": 1}}, "tools must be a list of functions"),
        ({"tools": [{"type": "retrieval"}]}, "tools must be functions such as"),
        ({"tool_choice": "required"}, 'tool_choice "required" is not offered'),
        ({"parallel_tool_calls": False}, "parallel_tool_calls false is not offered"),
        ({"messages": [*ASKED, {"role": "tool", "content": "a"}]}, r"messages\[1\].tool_call_id must be the id"),
        ({"messages": [*ASKED, {"role": "tool", "content": "a", "tool_call_id": "a"}]}, "expected assistant, got tool"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [5]}]}, r"messages\[1\].tool_calls must be calls"),
    ],
)
def test_what_is_no_tool_or_call_is_refused_by_name(tooled: Roster, change: dict[str, Any], reason: str) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "max_tokens": 1} | change
    with serving(tooled) as server, pytest.raises(openai.BadRequestError, match=reason):
        client(server).chat.completions.create(**request)
