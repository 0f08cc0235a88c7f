"""Messages as data sets have them: every name in use is read, every key is kept, nothing is dropped without a word."""

import json
from typing import Any

import pytest

from lit_qlora.data.messages import conversation_of, turns_of
from lit_qlora.errors import DataError
from lit_qlora.prompts.conversation import Conversation, Message

USER, ANSWER = {"role": "user", "content": "Weather in Oslo?"}, {"role": "assistant", "content": "Rain."}
FUNCTION = {"name": "get_weather", "arguments": {"city": "Oslo"}}
CALL = {"type": "function", "function": FUNCTION}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALLED = Message("assistant", None, {"tool_calls": [CALL]})
SPOKEN = (Message("user", "Weather in Oslo?"), CALLED, Message("tool", "wet"), Message("assistant", "Rain."))


def read(*messages: Any, **columns: Any) -> Conversation:
    return conversation_of(list(messages), columns)


@pytest.mark.parametrize(
    "messages",
    [
        [
            USER,
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "wet"},
            ANSWER,
        ],
        [USER, {"role": "assistant", "tool_calls": json.dumps([CALL])}, {"role": "ipython", "content": "wet"}, ANSWER],
        [USER, {"role": "assistant", "function_call": FUNCTION}, {"role": "function", "content": "wet"}, ANSWER],
        [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": json.dumps(FUNCTION)},
            {"from": "observation", "value": "wet"},
            {"from": "gpt", "value": "Rain."},
        ],
    ],
    ids=["tool_calls", "as text", "function_call", "sharegpt"],
)
def test_calls_of_tools_are_read_under_all_their_names(messages: list[Any]) -> None:
    assert read(*messages).messages == SPOKEN


def test_messages_keep_their_keys_and_empty_ones_are_none() -> None:
    thought = {**ANSWER, "reasoning_content": "It is autumn.", "name": "met", "audio": None}
    assert read(USER, thought).messages[1].keys == {"reasoning_content": "It is autumn.", "name": "met"}


@pytest.mark.parametrize(
    ("given", "weight"),
    [
        *((value, 0.0) for value in (False, 0, "0", "false", "False", 0.0)),
        *((value, 1.0) for value in (True, 1, "1", "true")),
        (0.5, 0.5),
        ("0.25", 0.25),
    ],
)
@pytest.mark.parametrize("key", ["weight", "train", "training"])
def test_an_answer_says_its_weight_in_the_loss(key: str, given: Any, weight: float) -> None:
    message = read(USER, {**ANSWER, key: given}).messages[1]
    assert (message.weight, message.keys) == (weight, {})


@pytest.mark.parametrize("given", [2, -1, "much", [1], {"a": 1}])
def test_a_weight_that_is_none_is_refused(given: Any) -> None:
    with pytest.raises(DataError, match=r"turn 2: 'weight' is .*, neither true or false nor a number from 0 to 1"):
        read(USER, {**ANSWER, "weight": given})


def test_columns_beside_the_messages_are_the_templates_variables() -> None:
    for columns in (
        {"tools": [TOOL]},
        {"tools": json.dumps([TOOL])},
        {"tools": json.dumps([TOOL["function"]])},
        {"functions": [TOOL["function"]]},
    ):
        assert read(USER, ANSWER, **columns).variables == {"tools": [TOOL]}
    assert not read(USER, ANSWER, tools=[], documents=None, chat_template_kwargs={}).variables
    found = read(USER, ANSWER, documents=[{"text": "a"}], chat_template_kwargs={"enable_thinking": False}).variables
    assert found == {"documents": [{"text": "a"}], "enable_thinking": False}


def test_a_column_with_a_system_message_is_read_and_an_empty_one_is_none() -> None:
    for name in ("system", "system_prompt"):
        assert read(USER, ANSWER, **{name: "Be brief."}).system == "Be brief."
        assert read(USER, ANSWER, **{name: ""}).system is None
    assert read({"role": "system", "content": ""}, USER, ANSWER).system == ""
    with pytest.raises(DataError, match="says something else than the first message"):
        read({"role": "system", "content": "Be long."}, USER, ANSWER, system="Be brief.")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([USER, {"role": "bing", "content": "a"}], r"turn 2: the role 'bing' is not known \(known: system"),
        ([USER, {"content": "a"}], "turn 2: the role None is not known"),
        ([USER, {"role": "tool", "content": "a"}, ANSWER], "turn 2: the role 'tool' answers nobody"),
        ([USER, ANSWER, ANSWER], "turn 3: the role 'assistant' answers nobody"),
        ([USER, USER, ANSWER], "turn 2: the role 'user' comes twice in a row"),
        ([USER, ANSWER, {"role": "tool", "content": "a"}], "turn 3: nobody answers the last prompt"),
        ([USER, {"from": "function_call", "value": "get_weather()"}], "turn 2: the call of a function: not valid JSON"),
        ([USER, {"from": "function_call", "value": "[]"}], "turn 2: the call of a function has no 'name'"),
        ([USER, {"role": "assistant", "content": None}], "turn 2: 'content' is null, not text"),
        ([USER, {**ANSWER, "tool_calls": 5}], "turn 2: 'tool_calls' is int, not a list"),
        ([USER, {**ANSWER, "tool_calls": ["\ud800"]}], "turn 2: 'tool_calls' holds half of a surrogate pair"),
        ([], "the conversation is empty"),
    ],
)
def test_messages_that_make_no_conversation_are_refused_with_their_number(messages: list[Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(*messages)


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({"tools": "a tool"}, "'tools' is text: not valid JSON"),
        ({"tools": {"a": 1}}, "'tools' is dict, not a list"),
        ({"tools": [TOOL], "functions": [TOOL]}, "'tools' and 'functions' are the same"),
        ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' is list, not an object"),
        ({"system": "a", "system_prompt": "b"}, "'system' and 'system_prompt' say different things"),
    ],
)
def test_columns_beside_the_messages_that_make_no_sense_are_refused(columns: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        read(USER, ANSWER, **columns)


def test_a_content_of_parts_is_their_text_and_other_parts_are_refused_by_name() -> None:
    parts = [{"type": "text", "text": "Hi "}, {"type": "text", "text": "you", "image": None}]
    said = turns_of([{"role": "user", "content": parts}, {"role": "assistant", "content": "A fox."}])
    assert said.question == "Hi you"
    parts.append({"type": "image_url", "image_url": {"url": "http://x/y.png"}})
    with pytest.raises(DataError, match="turn 1: content of type 'image_url' is not read; this model reads text"):
        turns_of([{"role": "user", "content": parts}, {"role": "assistant", "content": "A fox."}])
