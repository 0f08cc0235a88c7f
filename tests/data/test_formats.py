"""What records look like: every format in the table is recognised and read as it is meant."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data.examples import Example, Reading, read_examples
from lit_qlora.data.formats import FORMATS
from lit_qlora.errors import DataError, UsageError
from lit_qlora.prompts.conversation import Conversation
from lit_qlora.settings import DataConfig

SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
TREE = [
    {"message_id": "1", "parent_id": None, "role": "prompter", "text": "Why?", "rank": None, "deleted": False},
    {"message_id": "2", "parent_id": "1", "role": "assistant", "text": "No idea.", "rank": 1, "deleted": False},
    {"message_id": "3", "parent_id": "1", "role": "assistant", "text": "Because.", "rank": 0, "deleted": False},
    {"message_id": "9", "parent_id": "1", "role": "assistant", "text": "Spam.", "rank": -1, "deleted": True},
    {"message_id": "4", "parent_id": "3", "role": "prompter", "text": "Really?", "rank": None, "deleted": False},
    {"message_id": "5", "parent_id": "4", "role": "assistant", "text": "Really.", "rank": None, "deleted": False},
    {"message_id": "6", "parent_id": "5", "role": "prompter", "text": "Hm.", "rank": None, "deleted": False},
    {"message_id": "7", "parent_id": None, "role": "prompter", "text": "Who?", "rank": None, "deleted": False},
    {"message_id": "8", "parent_id": "7", "role": "assistant", "text": "Me.", "rank": 0, "deleted": False},
]
WHOLE_TREE = {
    "message_tree_id": "1",
    "prompt": {
        "text": "Why?",
        "role": "prompter",
        "replies": [
            {"text": "No idea.", "role": "assistant", "rank": 1, "replies": []},
            {"text": "Because.", "role": "assistant", "rank": 0, "replies": []},
        ],
    },
}
BEST = Conversation.of(("Why?", "Because."), ("Really?", "Really."))
RED_DOT = {"product": "Beseye Pro", "category": "Camera", "description": "It sees.", "text": "..."}
RED_DOT_PROMPT = "Create a detailed description for the following product: Beseye Pro, belonging to category: Camera"
CASES: dict[str, tuple[list[dict[str, Any]], list[Conversation]]] = {
    "alpaca": (
        [{"instruction": "Hi", "input": "in", "output": "Yo", "system": "Be kind."}],
        [Conversation.of(("Hi", "Yo"), input="in", system="Be kind.")],
    ),
    "dolly": (
        [{"instruction": "Hi", "context": "in", "response": "Yo", "category": "open_qa"}],
        [Conversation.of(("Hi", "Yo"), input="in")],
    ),
    "lima": (
        [{"conversations": ["Hi", "Yo", "A", "B"], "source": "x"}],
        [Conversation.of(("Hi", "Yo"), ("A", "B"))],
    ),
    "longform": ([{"input": "Hi", "output": "Yo", "source": "x"}], [Conversation.of(("Hi", "Yo"))]),
    "flan": ([{"inputs": "Hi", "targets": "Yo", "task": "x"}], [Conversation.of(("Hi", "Yo"))]),
    "oasst1": (TREE, [BEST, Conversation.of(("Who?", "Me."))]),
    "oasst1-trees": ([WHOLE_TREE], [Conversation.of(("Why?", "Because."))]),
    "self-instruct": ([{"prompt": "Hi", "completion": "Yo"}], [Conversation.of(("Hi", "Yo"))]),
    "prompt-response": ([{"prompt": "Hi", "response": "Yo"}], [Conversation.of(("Hi", "Yo"))]),
    "qa": ([{"question": "Hi", "answer": "Yo"}], [Conversation.of(("Hi", "Yo"))]),
    "hh-rlhf": (
        [{"chosen": "\n\nHuman: Hi\n\nAssistant: Yo\n\nHuman: A\n\nAssistant: B", "rejected": "x"}],
        [Conversation.of(("Hi", "Yo"), ("A", "B"))],
    ),
    "chip2": ([{"text": "<human>: Hi\n<bot>: Yo", "metadata": {}}], [Conversation.of(("Hi", "Yo"))]),
    "guanaco": (
        [{"text": "### Human: Hi### Assistant: Yo### Human: A\n### Assistant: B"}],
        [Conversation.of(("Hi", "Yo"), ("A", "B"))],
    ),
    "sharegpt": (
        [{"conversations": SHAREGPT, "system": "Be kind."}],
        [Conversation.of(("Hi", "Yo"), system="Be kind.")],
    ),
    "messages": (
        [{"messages": [{"role": "system", "content": "Be kind."}, *MESSAGES]}],
        [Conversation.of(("Hi", "Yo"), system="Be kind.")],
    ),
    "red-dot": ([RED_DOT], [Conversation.of((RED_DOT_PROMPT, "It sees."))]),
    "text": ([{"text": "Once upon a time."}], [Conversation.of(("", "Once upon a time."))]),
}


def read(tmp_path: Path, rows: list[Any], **settings: Any) -> Reading:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_examples(path, **settings)


def said(example: Example) -> Conversation:
    """The conversation alone."""
    return Conversation(example.messages, example.input, example.variables)


def test_every_format_has_a_case() -> None:
    assert set(CASES) == set(FORMATS) - {"alpaca-gpt4", "tokens"}  # which have Alpaca's columns, and no conversations


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("how", ["auto", "named"])
def test_a_format_is_recognised_and_read(tmp_path: Path, name: str, how: str) -> None:
    rows, expected = CASES[name]
    reading = read(tmp_path, rows, format="auto" if how == "auto" else name)
    assert reading.format == name
    assert list(map(said, reading.examples)) == expected
    assert reading.saw == f"columns {', '.join(rows[0])}"


@pytest.mark.parametrize("name", ["sharegpt", "lima", "messages", "oasst1"])
def test_conversations_survive_a_parquet_file(tmp_path: Path, name: str) -> None:
    import pyarrow
    import pyarrow.parquet

    rows, expected = CASES[name]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    reading = read_examples(tmp_path / "a.parquet")
    assert reading.format == name
    assert list(map(said, reading.examples)) == expected


def test_an_answer_of_weight_zero_is_context_only(tmp_path: Path) -> None:
    spoken = [*MESSAGES, MESSAGES[0], MESSAGES[1]]
    spoken[1] = MESSAGES[1] | {"weight": 0}
    (example,) = read(tmp_path, [{"messages": spoken}]).examples
    assert [message.weight for message in example.answers] == [0, 1]


def test_any_columns_can_be_named(tmp_path: Path) -> None:
    rows = [{"frage": "Hi", "text": "in", "antwort": "Yo", "rolle": "Be kind."}]
    reading = read(tmp_path, rows, columns="frage:instruction, antwort:output,text:input,rolle:system")
    assert list(map(said, reading.examples)) == [Conversation.of(("Hi", "Yo"), input="in", system="Be kind.")]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ("a:instruction", "of no column that it is the output"),
        ("a:output", "of no column that it is the instruction"),
        ("a:instruction,b:outptu", "Did you mean output"),
        ("instruction,output", "data.columns: 'instruction' is not of the form theirs:ours"),
        ("a:instruction,b:instruction,c:output", "'instruction' stands twice"),
        ("a:instruction,a:output", "'a' stands twice"),
    ],
)
def test_columns_that_make_no_sense_are_refused(tmp_path: Path, columns: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        read(tmp_path, [{"a": "1", "b": "2"}], columns=columns)


def test_a_named_column_that_no_record_has_is_refused_even_where_it_may_be_empty(tmp_path: Path) -> None:
    rows = [{"frage": "Hi", "antwort": "Yo"}, {"frage": "Hi", "antwort": "Yo", "kontext": "in"}]
    with pytest.raises(DataError, match=r"no record has a column 'kontxt' \(has: frage, antwort\)"):
        read(tmp_path, rows, columns="frage:instruction,antwort:output,kontxt:input")
    examples = read(tmp_path, rows, columns="frage:instruction,antwort:output,kontext:input").examples
    assert [example.input for example in examples] == ["", "in"]
    with pytest.raises(UsageError, match=r"data\.format would have no effect"):
        DataConfig(columns="a:instruction,b:output", format="dolly")


def test_a_first_record_that_is_not_like_the_others_does_not_hide_their_format(tmp_path: Path) -> None:
    rows = [{"context": "in"}, *CASES["dolly"][0]]
    with pytest.raises(DataError, match=r"a\.jsonl:1: no 'instruction' \(has: context\)"):
        read(tmp_path, rows)
    reading = read(tmp_path, rows, skip=True)
    assert (reading.format, reading.skipped) == ("dolly", 1)
    assert reading.saw == "columns instruction, context, response, category"


def test_an_unknown_format_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.format 'dolyl' is not known\. Did you mean dolly\?"):
        read(tmp_path, [{"a": "1"}], format="dolyl")


def test_a_message_that_replies_to_itself_is_named(tmp_path: Path) -> None:
    circle = TREE[1] | {"message_id": "1"}
    with pytest.raises(DataError, match=r":1: the message '1' replies to itself"):
        read(tmp_path, [TREE[0], circle])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"message_id": [1]}, r"'message_id' is list, not text"),
        ({"parent_id": {}}, r"'parent_id' is dict, not text"),
        ({"role": 5}, "nobody answered"),
    ],
)
def test_a_message_of_a_tree_that_is_none_is_named(tmp_path: Path, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=rf":9: {reason}|:8: {reason}"):
        read(tmp_path, [*TREE[:8], TREE[8] | change])


@pytest.mark.parametrize("replies", [5, "text", [None], {"a": 1}])
def test_replies_that_are_none_are_named(tmp_path: Path, replies: Any) -> None:
    with pytest.raises(DataError, match=r":1: 'replies' is not a list of messages"):
        read(tmp_path, [WHOLE_TREE | {"prompt": WHOLE_TREE["prompt"] | {"replies": replies}}])


def test_a_rank_that_is_no_number_is_none(tmp_path: Path) -> None:
    odd = TREE[1] | {"rank": "best"}
    assert read(tmp_path, [TREE[0], odd, *TREE[2:]]).examples[0].messages == BEST.messages


def test_messages_that_reply_to_nobody_are_named(tmp_path: Path) -> None:
    orphan = TREE[1] | {"message_id": "77", "parent_id": "66"}
    with pytest.raises(DataError, match=r":10: its parent_id '66' is no message of this file"):
        read(tmp_path, [*TREE, orphan])


def test_pairs_of_preferences_name_the_columns_that_can_be_learnt(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' * 60)
    with pytest.raises(
        DataError, match=r"pairs .*\nfinetune/lora\.py learns the good ones with --data\.columns prompt:instr"
    ):
        read_examples(path)
    assert read_examples(path, columns="prompt:instruction,chosen:output").examples[0].output == "b"
