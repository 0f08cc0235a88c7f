"""An answer is taken apart into thoughts, words and calls, whole as in pieces."""

import json
from typing import Any

import pytest

from lit_qlora.prompts import template_worker
from lit_qlora.prompts.answer_parts import PLAIN, THOUGHTS, Answer, MarkedText, Notation
from lit_qlora.prompts.calls import BEGINNINGS, DEEPSEEK, KIMI, read_calls
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
GEMMA = Notation(("<|channel>thought", "<channel|>"), calls=True)
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
BAR = "\uff5c"
V3 = "<|tool▁call▁begin|>function<|tool▁sep|>get_weather\n```json\n{arguments}\n```<|tool▁call▁end|>"
V31 = "<|tool▁call▁begin|>get_weather<|tool▁sep|>{arguments}<|tool▁call▁end|>"
INVOKED = '<invoke name="get_weather">\n<parameter name="city">Oslo</parameter>\n</invoke>\n'
OF_KIMI = "<|tool_call_begin|>functions.get_weather:{n}<|tool_call_argument_begin|>{arguments}<|tool_call_end|>"
NOTATIONS |= {
    "deepseek-v3": f"Let me look.<|tool▁calls▁begin|>{V3}\n{V3}<|tool▁calls▁end|>".replace("|", BAR),
    "deepseek-v3.1": f"Let me look.<|tool▁calls▁begin|>{V31}{V31}<|tool▁calls▁end|>".replace("|", BAR),
    "gemma4": "Let me look.\n" + '<|tool_call>call:get_weather{city:<|"|>Oslo<|"|>}<tool_call|>' * 2,
    "functiongemma": "<start_function_call>call:get_weather{city:<escape>Oslo<escape>}<end_function_call>" * 2,
    "seed": f"Let me look.\n{FUNCTION}\n{FUNCTION}".replace("tool_call", "seed:tool_call"),
    "minimax": f"Let me look.\n<minimax:tool_call>\n{INVOKED}{INVOKED}</minimax:tool_call>",
    "kimi": f"<|tool_calls_section_begin|>{OF_KIMI.replace('{n}', '0')}{OF_KIMI.replace('{n}', '1')}"
    "<|tool_calls_section_end|>",
    "phi": "<|tool_call|>[{call}, {call}]<|/tool_call|>",
    "granite": "<|tool_call|>[{call}, {call}]",
}
SILENT = {"mistral", "mistral-args", "llama", "functiongemma", "kimi", "phi", "granite"}
"""Notations whose text above has no words before the calls."""
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
        (GEMMA, "<|channel>thought\nI am asked.<channel|>It rains.", False, "I am asked.", "It rains."),
        (GEMMA, "It rains, <|channel>thought", False, "", "It rains, <|channel>thought"),
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
    assert answer.content == ("" if notation in SILENT else "Let me look.")
    assert answer.reasoning == ("Hm." if notation == "harmony" else "")
    assert [call["function"] for call in answer.calls] == [CALLED] * 2
    assert len({call["id"] for call in answer.calls}) == 2
    if notation == "kimi":  # whose template names a result by the id that the model gave
        assert [call["id"] for call in answer.calls] == ["functions.get_weather:0", "functions.get_weather:1"]
    else:
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
        *(
            f"<|tool_call>call:get_weather{body}<tool_call|>"
            for body in ("", "{", "{a}", "{a:}", '{a:<|"|>}', '{a:5"}')
        ),
        "<|tool_call>call:get_weather{}<tool_call|> and more",
        "<|tool_call>call:get_weather{}",
        "<start_function_call>call:other{}<end_function_call>",
        "<minimax:tool_call></minimax:tool_call>",
        f"<|tool▁calls▁begin|>{V31}and more<|tool▁calls▁end|>".replace("|", BAR).replace("{arguments}", "{}"),
        "<|tool▁calls▁begin|><|tool▁calls▁end|>".replace("|", BAR),
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_end|>",
        "<|tool_call|>[]",
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


def as_gemma(value: Any, quote: str) -> str:
    """A value as Gemma's templates write arguments."""
    if isinstance(value, str):
        return quote + value + quote
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{as_gemma(of, quote)}" for key, of in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(as_gemma(of, quote) for of in value) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


@pytest.mark.parametrize(
    ("opens", "quote", "closes"),
    [("<|tool_call>", '<|"|>', "<tool_call|>"), ("<start_function_call>", "<escape>", "<end_function_call>")],
)
def test_gemmas_arguments_are_read_back_whatever_they_are(opens: str, quote: str, closes: str) -> None:
    arguments = {
        "text": '{"a": [1, null]}, true: "\\n" ☃',
        "empty": "",
        "numbers": [0, -3, 2.5, 1e-07, 1e30],
        "deep": {"of": [{"a-b": True, "c": False}, [], {}], "null": None},
    }
    (call,) = read_calls(f"{opens}call:get_weather{as_gemma(arguments, quote)}{closes}", FUNCTIONS)
    assert json.loads(call["function"]["arguments"]) == arguments


def test_a_value_of_gemma_without_quotes_is_a_text_unless_json_knows_it() -> None:
    body = 'city: New York, zip:0150, days: 3, "key":"a:b", at:null'
    (call,) = read_calls(f"<start_function_call>call:get_weather{{{body}}}<end_function_call>", FUNCTIONS)
    assert json.loads(call["function"]["arguments"]) == {
        "city": "New York",
        "zip": "0150",
        "days": 3,
        "key": "a:b",
        "at": None,
    }


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


LONG = 100_000
HOSTILE = {
    "arguments": "<tool_call>f" + "<arg_key>a</arg_key><arg_value>b</arg_value>" * (LONG // 40) + "x</tool_call>",
    "spaces": "<tool_call>" + " " * LONG + "</tool_call>",
    "keys": "<tool_call>f" + "<arg_key>" * (LONG // 9) + "</tool_call>",
    "names": "<tool_call>" + "f " * (LONG // 2) + "</tool_call>",
    "parameters": "<tool_call><function=f>" + "<parameter=a>b</parameter>" * (LONG // 26) + "x</tool_call>",
    "beginnings": "<tool_call><function=f>" + "<parameter=a" * (LONG // 12),
    "objects": "[TOOL_CALLS]" + "{}\n" * (LONG // 3),
    "brackets": "<|tool_call>call:f{a:" + "[" * LONG + "<tool_call|>",
    "quotes": "<|tool_call>call:f{a:" + '"' * LONG + "}<tool_call|>",
    "commas": "<start_function_call>call:f{a:" + "<escape>,<escape>" * (LONG // 17) + "}<end_function_call>",
    **{f"{opens} alone": opens * (LONG // len(opens)) for opens in BEGINNINGS},
    **{f"{opens} before words": (opens + " ") * (LONG // len(opens)) + "f" for opens in BEGINNINGS},
    **{f"{mark} within": opens + mark * (LONG // len(mark)) for marks in (DEEPSEEK, KIMI) for opens in marks[:1]
       for mark in marks[1:]},
}  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_an_answer_that_is_nearly_a_call_is_read_in_no_time(text: str) -> None:
    """Whatever went back over it would take minutes."""
    assert read_calls(text, {"f": {"name": "f"}}) == []


@pytest.mark.parametrize("parameters", [None, 5, [1], {"properties": 5}, {"properties": {"city": 5}}])
def test_a_tool_described_in_no_known_way_is_called_all_the_same(parameters: Any) -> None:
    text = "<tool_call>f\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    (call,) = read_calls(text, {"f": {"name": "f", "parameters": parameters}})
    assert call["function"] == {"name": "f", "arguments": '{"city": "Oslo"}'}
