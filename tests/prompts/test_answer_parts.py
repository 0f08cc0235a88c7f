"""An answer is taken apart into thoughts, words and calls, whole as in pieces."""

import json
from typing import Any

import pytest

from lit_qlora.prompts import template_worker
from lit_qlora.prompts.answer_parts import PLAIN, THOUGHTS, Answer, MarkedText, Notation, read_calls
from lit_qlora.prompts.conversation import REASONING

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {"type": "object", "properties": {"zip": {"type": "string"}}},
        },
    }
]
FUNCTIONS = {tool["function"]["name"]: tool["function"] for tool in TOOLS}
HARMONY = Notation(harmony=True, calls=True)
THINKING = Notation(("<think>", "</think>"), calls=True)
ARGUMENT = "<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n"
FUNCTION = "<tool_call>\n<function=get_weather>\n<parameter=city>\nOslo\n</parameter>\n</function>\n</tool_call>"
NOTATIONS = {
    "hermes": "Let me look.\n<tool_call>\n{call}\n</tool_call>\n<tool_call>\n{call}\n</tool_call>",
    "mistral": "[TOOL_CALLS][{call}, {call}]",
    "mistral-args": "[TOOL_CALLS]get_weather[ARGS]{arguments}[TOOL_CALLS]get_weather[ARGS] {arguments}",
    "llama": "{call}; {call}",
    "qwen3.5": f"Let me look.\n{FUNCTION}\n{FUNCTION}",
    "glm": f"Let me look.\n<tool_call>get_weather\n{ARGUMENT}</tool_call>\n"
    f"<tool_call>get_weather\n{ARGUMENT}</tool_call>",
    "harmony": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary<|message|>Let me look."
    "<|end|><|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{arguments}<|call|>"
    "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{arguments}<|call|>",
}
CALLED = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}


def in_pieces(notation: Notation, text: str, size: int, tools: Any = TOOLS, begun: bool = False) -> Answer:
    reader = notation.reader(tools, begun=begun)
    parts = [part for at in range(0, len(text), size) for part in reader.push(text[at : at + size])] + reader.end()
    said = {kind: "".join(part.text for part in parts if part.kind == kind) for kind in ("content", "reasoning")}
    return Answer(**said, calls=reader.calls)


@pytest.mark.parametrize("size", [1, 2, 7, 999])
@pytest.mark.parametrize(
    ("notation", "text", "begun", "reasoning", "content"),
    [
        (PLAIN, " It rains. ", False, "", " It rains. "),
        (PLAIN, "<think>a</think>b", False, "", "<think>a</think>b"),
        (THINKING, "\n<think>\nI am asked.\n</think>\n\nIt rains.\n", False, "I am asked.", "It rains.\n"),
        (THINKING, "I am < asked.\n</think>\n\nIt rains.", True, "I am < asked.", "It rains."),
        (THINKING, "I am asked, and", True, "I am asked, and", ""),
        (THINKING, "<think>I am</thi", False, "I am</thi", ""),
        (THINKING, "It rains, <think> they said", False, "", "It rains, <think> they said"),
        (THINKING, "<thin", False, "", "<thin"),
        (THINKING, "a <tool_cal", False, "", "a <tool_cal"),
        (
            HARMONY,
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
            "<|start|>assistant<|channel|>final<|message|>It < rains.<|return|>",
            False,
            "a\nb",
            "It < rains.",
        ),
        (HARMONY, "<|channel|>final<|message|>It rai", False, "", "It rai"),
        (HARMONY, "It rains.", False, "", "It rains."),
        (HARMONY, "<|channel|>comm", False, "", "comm"),
    ],
)
def test_thoughts_and_words(
    notation: Notation, text: str, begun: bool, reasoning: str, content: str, size: int
) -> None:
    assert in_pieces(notation, text, size, begun=begun) == Answer(content, reasoning)


@pytest.mark.parametrize("notation", NOTATIONS)
@pytest.mark.parametrize("key", ["arguments", "parameters"])
@pytest.mark.parametrize("size", [1, 5, 999])
def test_calls_are_read_in_the_notations_in_use(notation: str, key: str, size: int) -> None:
    call = json.dumps({"name": "get_weather", key: {"city": "Oslo"}})
    text = NOTATIONS[notation].replace("{call}", call).replace("{arguments}", '{"city": "Oslo"}')
    answer = in_pieces(HARMONY if notation == "harmony" else THINKING, text, size)
    assert answer.content == ("" if notation in ("mistral", "mistral-args", "llama") else "Let me look.")
    assert answer.reasoning == ("Hm." if notation == "harmony" else "")
    assert [call["function"] for call in answer.calls] == [CALLED] * 2
    assert len({call["id"] for call in answer.calls}) == 2
    assert all(len(call["id"]) == 9 and call["id"].isalnum() for call in answer.calls)


@pytest.mark.parametrize(
    "text",
    [
        *("", "It rains.", "5", "{}", "[]", '{"name": "get_weather", "arguments": 5}', '{"name": "other"}', "null"),
        '{"name": "get_weather", "arguments": {}} and more',
        '<tool_call>\n{"name": "get_weather"\n</tool_call>',
        'Hm. \n<tool_call>{"name": "get_weather"}</tool_call> and more',
        '<tool_call>{"name": "get_weather"}</tool_call><tool_call>{"name": "other"}</tool_call>',
        *(f'{{"name": "get_weather", "arguments": {{"a": {value}}}}}' for value in ("1e400", "NaN", '"\\ud800"')),
        '{"name": "get_weather", "arguments": {"a": ' + "[" * 900 + "]" * 900 + "}}",
        "<tool_call>other\n<arg_key>a</arg_key><arg_value>b</arg_value></tool_call>",
        "<tool_call>get_weather\n<arg_key>a</arg_key></tool_call>",
        "<tool_call><function=get_weather><parameter=a>b</function></tool_call>",
        "<tool_call><function=other></function></tool_call>",
        "[TOOL_CALLS]get_weather[ARGS]{} and more",
        "[TOOL_CALLS]get_weather[ARGS]{}[TOOL_CALLS]other[ARGS]{}",
    ],
)
def test_an_answer_that_is_more_than_calls_is_words(text: str) -> None:
    for size in (1, 999):
        assert in_pieces(THINKING, text, size) == Answer(text)


@pytest.mark.parametrize("called", ["other", "get_weather"])
def test_calls_in_harmony_that_are_none_are_words_and_so_are_those_beside_them(called: str) -> None:
    good = "<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{}<|call|>"
    bad = f"<|start|>assistant to=functions.{called}<|channel|>commentary json<|message|>{{<|call|>"
    for size in (1, 999):
        answer = in_pieces(HARMONY, good + bad, size)
        assert answer.calls == []
        assert (
            answer.content
            == good.replace("<|start|>", "")
            .replace("<|channel|>", "")
            .replace("<|message|>", "")
            .replace("<|call|>", "")
            + f"assistant to=functions.{called}commentary json{{"
        )


def test_an_argument_is_a_text_where_the_tool_takes_a_text_and_else_json_if_it_is_some() -> None:
    body = "".join(
        f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n"
        for key, value in {"zip": "0150", "days": "2", "city": "Oslo", "deep": '{"a": [1]}', "most": "1e400"}.items()
    )
    (call,) = read_calls(f"<tool_call>get_weather\n{body}</tool_call>", FUNCTIONS)
    assert json.loads(call["function"]["arguments"]) == {
        "zip": "0150",
        "days": 2,
        "city": "Oslo",
        "deep": {"a": [1]},
        "most": "1e400",
    }


def test_a_parameter_stands_on_lines_of_its_own() -> None:
    body = (
        "<parameter=zip>\n0150\n</parameter>\n<parameter=days>\n2\n</parameter>\n<parameter=city>\n\na\nb\n</parameter>"
    )
    (call,) = read_calls(f"<tool_call>\n<function=get_weather>\n{body}\n</function>\n</tool_call>", FUNCTIONS)
    assert json.loads(call["function"]["arguments"]) == {"zip": "0150", "days": 2, "city": "\na\nb"}


def test_marks_inside_the_text_of_an_argument_are_text() -> None:
    (call,) = read_calls('[TOOL_CALLS][{"name": "get_weather", "arguments": {"city": "a[ARGS]b"}}]', FUNCTIONS)
    assert call["function"]["arguments"] == '{"city": "a[ARGS]b"}'


def test_without_tools_nothing_is_a_call() -> None:
    text = NOTATIONS["llama"].replace("{call}", json.dumps({"name": "get_weather", "arguments": {}}))
    assert in_pieces(THINKING, text, 3, tools=[]) == Answer(text)


def test_what_renders_templates_knows_the_same_marks_and_keys() -> None:
    assert template_worker.THOUGHTS == THOUGHTS
    assert template_worker.THOUGHT_KEYS == REASONING


class Letters:
    """A tokenizer of letters, with two control tokens."""

    control_tokens = {"<|channel|>": 1, "</s>": 2}  # noqa: RUF012 - never changed

    def decode(self, ids: Any) -> str:
        """See lit_qlora.prompts.tokenizer.Tokenizer."""
        return "".join(chr(i) for i in ids if i > 2)


def test_marks_that_are_control_tokens_are_in_the_text_and_others_are_not() -> None:
    ids = [1, *map(ord, "ab"), 2, 1, ord("c")]
    assert MarkedText(Letters(), HARMONY.marks).decode(ids) == "<|channel|>ab<|channel|>c"
    assert MarkedText(Letters(), PLAIN.marks).decode(ids) == "abc"


@pytest.mark.parametrize(
    "body",
    [
        "f" + "<arg_key>a</arg_key><arg_value>b</arg_value>" * 500 + "x",
        " " * 5000,
        "f" + "<arg_key>" * 5000,
        "f " * 5000,
        "<function=f>" + "<parameter=a>b</parameter>" * 500 + "x",
        "<function=f>" + "<parameter=a" * 5000,
    ],
    ids=["arguments", "spaces", "keys", "names", "parameters", "beginnings"],
)
@pytest.mark.parametrize("end", ["</tool_call>", ""])
def test_an_answer_that_is_nearly_a_call_is_read_in_no_time(body: str, end: str) -> None:
    assert read_calls(f"<tool_call>{body}{end}", {"f": {"name": "f"}}) == []


@pytest.mark.parametrize("parameters", [None, 5, [1], {"properties": 5}, {"properties": {"city": 5}}])
def test_a_tool_described_in_no_known_way_is_called_all_the_same(parameters: Any) -> None:
    text = "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    (call,) = read_calls(text, {"f": {"name": "f", "parameters": parameters}})
    assert call["function"] == {"name": "f", "arguments": '{"city": "Oslo"}'}
