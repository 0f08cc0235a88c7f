"""Tools and thoughts in the official client: the prompt holds them, and they come back in OpenAI's form."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest

from lit_qlora.data.messages import conversation_of
from lit_qlora.inference import Roster, encode_prompt
from lit_qlora.prompts.style import TemplateStyle
from lit_qlora.serve.answers import Answers
from lit_qlora.serve.protocol import read_order
from tests.prompts.test_answer_parts import NOTATIONS, SILENT
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
    return with_template(roster, TEMPLATE)


def with_template(roster: Roster, template: str) -> Roster:
    return replace(roster, styles=roster.styles | {"tiny": TemplateStyle(template)})


@pytest.mark.parametrize("notation", ["hermes", "mistral", "llama", "harmony", "deepseek-v3", "gemma4"])
def test_the_client_gets_calls_whole_and_streamed(tooled: Roster, says, notation: str) -> None:
    if notation == "harmony":
        tooled = with_template(tooled, "<|channel|>final<|message|>" + TEMPLATE)
    said = NOTATIONS[notation].replace("{call}", json.dumps(CALL))
    says(said.replace("{arguments}", json.dumps(CALL["arguments"])))
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "max_tokens": 2}
    with serving(tooled) as server:
        whole = client(server).chat.completions.create(**request).choices[0]
        streamed = [part.choices[0] for part in client(server).chat.completions.create(**request, stream=True)]
    words = None if notation in SILENT else "Let me look."
    thought = "Hm." if notation == "harmony" else None
    assert getattr(whole.message, "reasoning_content", None) == thought
    assert "".join(getattr(choice.delta, "reasoning_content", "") for choice in streamed) == (thought or "")
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


def test_documents_and_other_variables_of_a_request_are_in_the_prompt(roster: Roster) -> None:
    more = "{{ documents[0].text if documents }}{{ reasoning_effort }}{{ '!' if thinking is false }}"
    said = {"documents": [{"text": "Fox."}], "reasoning_effort": "low", "chat_template_kwargs": {"thinking": False}}
    with serving(with_template(roster, more + TEMPLATE)) as server:
        ask = client(server).chat.completions.create
        few = ask(model="tiny", messages=ASKED, max_tokens=1).usage.prompt_tokens
        found = ask(model="tiny", messages=ASKED, max_tokens=1, extra_body=said).usage.prompt_tokens
    count = len(roster.tokenizer.encode(f"Fox.low!{ASKED[0]['content']}|A:", bos=False))
    assert found == count > few


def test_thoughts_and_parts_of_a_request_are_in_the_prompt(roster: Roster) -> None:
    thinking = with_template(roster, TEMPLATE.replace("{{ m.content", "{{ m.reasoning_content or '' }}{{ m.content"))
    answered = {"role": "assistant", "content": "A fox.", "reasoning_content": "Hm."}
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you"}]
    said = read_order({"model": "a", "messages": [{"role": "user", "content": parts}, answered, *ASKED]}, chat=True)
    expected = "Hi you|Hm.A fox.|Weather in Oslo?|A:"
    assert thinking.tokenizer.decode(encode_prompt(thinking.tokenizer, thinking.styles["tiny"], said.conversation)) == (
        expected
    )


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


def test_thoughts_come_apart_from_words_whole_and_streamed(roster: Roster, says) -> None:
    says("I am asked.\n</think>\n\nOslo.")
    thinking = with_template(
        roster,
        TEMPLATE.replace("m.content or ''", "(m.content or '').split('</think>')[-1]").replace("A:", "A:<think>\n"),
    )
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "max_tokens": 2}
    with serving(thinking) as server:
        whole = client(server).chat.completions.create(**request).choices[0]
        streamed = [part.choices[0].delta for part in client(server).chat.completions.create(**request, stream=True)]
    assert (whole.message.reasoning_content, whole.message.content) == ("I am asked.", "Oslo.")
    assert "".join(getattr(delta, "reasoning_content", "") for delta in streamed) == "I am asked."
    assert "".join(delta.content or "" for delta in streamed) == "Oslo."


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"model": "sums"}, "does not write tools"),
        ({"extra_body": {"documents": [{"text": "a"}]}}, "does not write documents"),
        ({"extra_body": {"documents": [5]}}, "documents must be a list of objects"),
        ({"extra_body": {"chat_template_kwargs": {"thinking": True}}}, "does not write thinking"),
        ({"extra_body": {"chat_template_kwargs": 5}}, "chat_template_kwargs must be an object"),
        ({"reasoning_effort": "high"}, "does not write reasoning_effort"),
        ({"tools": {"a": 1}}, "tools must be a list of functions"),
        ({"tools": [{"type": "retrieval"}]}, "tools must be functions such as"),
        ({"tool_choice": "required"}, 'tool_choice "required" is not offered'),
        ({"parallel_tool_calls": False}, "parallel_tool_calls false is not offered"),
        ({"messages": [*ASKED, {"role": "tool", "content": "a"}]}, r"messages\[1\].tool_call_id must be the id"),
        ({"messages": [*ASKED, {"role": "tool", "content": "a", "tool_call_id": "a"}]}, "expected assistant, got tool"),
        ({"messages": [*ASKED, {"role": "assistant", "tool_calls": [5]}]}, r"messages\[1\].tool_calls must be calls"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x/y"}}]}]},
            "content of type 'image_url' is not read",
        ),
        (
            {"messages": [*ASKED, {"role": "assistant", "content": "a", "reasoning_content": "b"}, *ASKED]},
            "does not write reasoning_content",
        ),
    ],
)
def test_what_is_no_tool_or_call_is_refused_by_name(tooled: Roster, change: dict[str, Any], reason: str) -> None:
    request: dict[str, Any] = {"model": "tiny", "messages": ASKED, "tools": [TOOL], "max_tokens": 1} | change
    with serving(tooled) as server, pytest.raises(openai.BadRequestError, match=reason):
        client(server).chat.completions.create(**request)
