"""Formats of records: a table of the formats in use, each with the columns that it is recognised by."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lit_qlora.data.messages import (
    ASSISTANT,
    conversation_of,
    named,
    names_of,
    system_of,
    text_of,
    turns_of,
    variables_of,
)
from lit_qlora.data.templates import Template
from lit_qlora.data.tokenized import Tokenized, read_tokenized
from lit_qlora.errors import DataError, UsageError, did_you_mean
from lit_qlora.prompts.conversation import NOTHING, Conversation, Message
from lit_qlora.prompts.wordings import with_input

Fields = Mapping[str, Any]
OURS = ("instruction", "input", "output", "system")
BESIDE = ("system", "system_prompt", "tools", "functions", "documents", "chat_template_kwargs")
"""Columns that are read beside the columns of a format."""


@dataclass(frozen=True)
class Format:
    """A row of FORMATS."""

    needs: tuple[str, ...]
    """Columns without which a record is not of this format."""
    read: Callable[[Fields], Conversation | Tokenized]
    """Makes a conversation of a record; what is wrong with it is a DataError."""
    begins: str = ""
    """A regular expression that the first needed column begins with, where the columns alone do not tell."""
    gather: Callable[[Iterable[tuple[str, Any]]], Iterable[tuple[str, Any]]] | None = None
    """Makes the records of conversations, where one is spread over several."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Their column -> ours, for formats that only differ in names."""
    reads: tuple[str, ...] = BESIDE
    """Columns that are read besides the needed ones."""
    leaves: tuple[str, ...] = ()
    """Columns that are left out on purpose, though they mean something."""
    chosen: bool = False
    """True if the settings name the columns to read, so that the others are left out on purpose."""


def from_columns(columns: Mapping[str, str], chosen: bool = False) -> Format:
    """The format whose records have a column each for instruction, input, output and system.

    Args:
        columns: their name -> ours.
        chosen: nothing is read but these.
    """
    theirs = {ours: name for name, ours in columns.items()}
    instruction, output = theirs["instruction"], theirs["output"]
    about, told = theirs.get("input"), theirs.get("system")

    def read(record: Fields) -> Conversation:
        asked, answer = text_of(record, instruction), text_of(record, output)
        material = text_of(record, about, optional=True) if about else ""
        past = [] if chosen else _history(record)
        variables = NOTHING if chosen else variables_of(record)
        system = system_of(record) if not chosen else (text_of(record, told, optional=True) or None) if told else None
        if past and material:
            asked, material = with_input(asked, material), ""
        opening = (Message("system", system),) if system is not None else ()
        messages = (*opening, *past, Message("user", asked), Message("assistant", answer))
        return Conversation(messages, material, variables)

    others = () if chosen else (*BESIDE, "history")
    return Format((instruction, output), read, columns=columns, reads=(*columns, *others), chosen=chosen)


def from_templates(prompt: str, answer: str) -> Format:
    """The format whose prompts and answers are texts with the values of columns in them.

    Raises:
        UsageError: if a text names no column, or its braces do not match.
    """
    asked, answered = Template.parse("data.template", prompt), Template.parse("data.answer_template", answer)

    def read(record: Fields) -> Conversation:
        return Conversation.of((asked.fill(record), answered.fill(record)))

    return Format(tuple(dict.fromkeys((*asked.columns, *answered.columns))), read, reads=(), chosen=True)


def _history(record: Fields) -> list[Message]:
    """The turns before the instruction: a list of [prompt, answer]."""
    found = named(record, "history")
    return [
        Message(role, text)  # type: ignore[arg-type]
        for pair in found or ()
        for role, text in zip(("user", "assistant"), _pair(pair), strict=True)
    ]


def _pair(value: Any) -> tuple[str, str]:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise DataError("'history' is not a list of [prompt, answer]")
    return value[0], value[1]


def red_dot(record: Fields) -> Conversation:
    """A product of the Red Dot Design Award and its description."""
    product, category = text_of(record, "product"), text_of(record, "category")
    asked = f"Create a detailed description for the following product: {product}, belonging to category: {category}"
    return Conversation.of((asked, text_of(record, "description")))


def raw_text(record: Fields) -> Conversation:
    """Read a text without a prompt; every token is labelled."""
    return Conversation.of(("", text_of(record, "text")))


def messages(column: str) -> Callable[[Fields], Conversation]:
    """Reads {column: [{"role": "user", "content": "..."}, ...]}, as OpenAI has it, or "from" and "value" for these."""
    return lambda record: conversation_of(_list(record, column), record)


def lima(record: Fields) -> Conversation:
    """{"conversations": ["...", "..."]}: user and assistant in turn. A last word without an answer is left out."""
    spoken = _list(record, "conversations")
    for i, text in enumerate(spoken, start=1):
        if not isinstance(text, str):
            raise DataError(f"turn {i} is {type(text).__name__}, not text")
    if len(spoken) < 2:
        raise DataError("'conversations' holds no answer")
    return Conversation.of(*zip(spoken[::2], spoken[1::2], strict=False), system=system_of(record))


def marked(column: str, user: str, assistant: str) -> Callable[[Fields], Conversation]:
    """Reads conversations that stand in one text, with marks such as "<human>:" and "<bot>:"."""
    marks = re.compile(f"({re.escape(user)}|{re.escape(assistant)})")

    def read(record: Fields) -> Conversation:
        head, *parts = marks.split(text_of(record, column))
        roles = ["user" if mark == user else "assistant" for mark in parts[::2]]
        spoken = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
        system = [{"role": "system", "content": head.strip()}] if head.strip() else []
        return turns_of([*system, *spoken])

    return read


def best_paths(records: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """From each tree of messages the path of the best-ranked replies, as a record of the format messages.

    Trees come as rows that name their parents, or whole, as {"prompt": {"text": ..., "replies": [...]}}.
    """
    rows: list[tuple[str, Any]] = []
    for location, record in records:
        whole = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(record, dict):
            yield location, record
        elif no_id := next(
            (c for c in ("message_id", "parent_id") if not isinstance(record.get(c), str | int | None)), ""
        ):
            yield location, DataError(f"{no_id!r} is {type(record[no_id]).__name__}, not text")
        elif isinstance(whole, dict):
            yield location, _best_path(whole, lambda message: message.get("replies") or [])
        else:
            rows.append((location, record))
    replies: dict[Any, list[dict[str, Any]]] = {}
    for _, row in rows:
        replies.setdefault(row.get("parent_id"), []).append(row)
    known = {row.get("message_id") for _, row in rows}
    for location, row in rows:
        if row.get("parent_id") is None:
            yield location, _best_path(row, lambda message: replies.get(message.get("message_id"), []))
        elif row["parent_id"] not in known:
            yield location, DataError(f"its parent_id {row['parent_id']!r} is no message of this file")


def _best_path(root: dict[str, Any], replies: Callable[[dict[str, Any]], list[dict[str, Any]]]) -> Any:
    path: list[dict[str, Any]] = []
    best, seen = [root], set()
    while best:
        message = best[0]
        if id(message) in seen:
            return DataError(f"the message {message.get('message_id')!r} replies to itself")
        seen.add(id(message))
        path.append({"role": message.get("role"), "content": message.get("text")})
        answers = replies(message)
        if not isinstance(answers, list) or not all(isinstance(reply, dict) for reply in answers):
            return DataError("'replies' is not a list of messages")
        left = [reply for reply in answers if not reply.get("deleted")]
        # The best has rank 0; what nobody has ranked comes last, in the order of the file.
        best = sorted(left, key=lambda reply: rank if isinstance(rank := reply.get("rank"), int | float) else math.inf)
    while path and str(path[-1]["role"]).lower() not in ASSISTANT:
        path.pop()  # nobody answered it
    return {"messages": path} if path else DataError("nobody answered")


def _list(record: Fields, column: str) -> list[Any]:
    value = record.get(column)
    if not isinstance(value, list):
        raise DataError(f"{column!r} is {'null' if value is None else type(value).__name__}, not a list")
    return value


ALPACA = from_columns({"instruction": "instruction", "input": "input", "output": "output", "system": "system"})
FORMATS: dict[str, Format] = {
    "alpaca": ALPACA,
    "alpaca-gpt4": ALPACA,
    "dolly": from_columns({"instruction": "instruction", "context": "input", "response": "output"}),
    "tokens": Format(("input_ids",), read_tokenized, reads=("labels", "attention_mask", "token_type_ids")),
    "messages": Format(("messages",), messages("messages")),
    "sharegpt": Format(("conversations",), messages("conversations"), begins=r"\[\{"),
    "lima": Format(("conversations",), lima, begins=r"\['|\[\"", reads=("system", "system_prompt")),
    "oasst1": Format(("message_id", "parent_id", "text", "role"), messages("messages"), gather=best_paths),
    "oasst1-trees": Format(("message_tree_id", "prompt"), messages("messages"), gather=best_paths),
    "hh-rlhf": Format(
        ("chosen",),
        marked("chosen", "\n\nHuman:", "\n\nAssistant:"),
        begins=r"Human:",
        reads=(),
        leaves=("rejected",),
    ),
    "chip2": Format(("text",), marked("text", "<human>:", "<bot>:"), begins="<human>:", reads=()),
    "guanaco": Format(("text",), marked("text", "### Human:", "### Assistant:"), begins="### Human:", reads=()),
    "red-dot": Format(("product", "category", "description"), red_dot, reads=()),
    "flan": from_columns({"inputs": "instruction", "targets": "output"}),
    "self-instruct": from_columns({"prompt": "instruction", "completion": "output"}),
    "prompt-response": from_columns({"prompt": "instruction", "response": "output"}),
    "qa": from_columns({"question": "instruction", "context": "input", "answer": "output"}),
    "longform": from_columns({"input": "instruction", "output": "output"}),
    "text": Format(("text",), raw_text, reads=()),
}
"""In the order in which they are tried; the first whose columns are all there is taken."""


def pick_format(
    name: str, columns: str, records: list[tuple[str, Any]], templates: tuple[str, str] | None = None
) -> tuple[str, Format, str]:
    """The format that the settings name, or the one that the first records have.

    Args:
        name: as data.format.
        columns: as data.columns.
        records: the first, as they were read; an error without a location ends what can be read.
        templates: as data.template and data.answer_template.

    Returns:
        Its name, the format, and what was seen, for people.

    Raises:
        UsageError: if the settings name a format or a column that does not exist.
        DataError: if no format fits; it names the columns that were found.
    """
    dicts = [record for _, record in records if isinstance(record, dict)]
    first = dicts[0] if dicts else {}
    found = f"columns {names_of(first)}"
    if columns or templates:
        setting = "data.template" if templates else "data.columns"
        form = from_templates(*templates) if templates else from_columns(_parse_columns(columns), chosen=True)
        for theirs in form.columns or form.needs:
            if dicts and not any(theirs in record for record in dicts):
                raise DataError(
                    f"{setting}: no record has a column {theirs!r} (has: {names_of(first)})."
                    f"{did_you_mean(theirs, list(map(str, first)))}"
                )
        return setting.removeprefix("data."), form, f"{columns or ', '.join(form.needs)} of {found}"
    if name != "auto":
        if name not in FORMATS:
            raise UsageError(
                f"data.format {name!r} is not known.{did_you_mean(name, list(FORMATS))} Known: {', '.join(FORMATS)}."
            )
        return name, FORMATS[name], found
    for record in dicts:  # the first may not be like the others, and then says so itself
        for known, form in FORMATS.items():
            if _fits(record, form):
                return known, form, f"columns {names_of(record)}"
        if "chosen" in record and "rejected" in record:
            raise DataError(_PREFERENCES)
    if not first:
        return "alpaca", ALPACA, found  # all are wrong, and each says so itself
    end, last = records[-1]
    if isinstance(last, DataError) and not end:
        raise last  # what makes the file unreadable comes before what its columns mean
    location = next(location for location, record in records if record is first)
    raise DataError(
        f"{location}: no format has the {found}.\n"
        f"Say which is what, e.g. --data.columns {_guess(list(map(str, first)))}, or name a --data.format: "
        f"{', '.join(FORMATS)}."
    )


_PREFERENCES = (
    "The columns chosen and rejected are pairs to prefer one answer of: finetune/preference.py learns from both.\n"
    "finetune/lora.py learns the good ones with --data.columns prompt:instruction,chosen:output."
)


def _fits(record: Fields, form: Format) -> bool:
    there = all(column in record for column in form.needs)
    return there and (not form.begins or bool(re.match(form.begins, str(record[form.needs[0]]).lstrip())))


def _parse_columns(text: str) -> dict[str, str]:
    parts = [part.strip() for part in text.split(",")]
    pairs = [part.rpartition(":")[::2] for part in parts]
    columns = dict(pairs)
    for part, (theirs, ours) in zip(parts, pairs, strict=True):
        if ours not in OURS or not theirs:
            raise UsageError(
                f"data.columns: {part!r} is not of the form theirs:ours with one of {', '.join(OURS)}."
                f"{did_you_mean(ours, OURS)}"
            )
    for names in zip(*pairs, strict=True):
        if twice := next((name for name in names if names.count(name) > 1), None):
            raise UsageError(f"data.columns: {twice!r} stands twice.")
    for ours in ("instruction", "output"):
        if ours not in columns.values():
            raise UsageError(f"data.columns says of no column that it is the {ours}: theirs:{ours} is missing.")
    return columns


def _guess(columns: list[str]) -> str:
    hints = {
        "instruction": ("instruction", "prompt", "question", "query", "source", "input", "text", "title"),
        "output": ("output", "completion", "answer", "response", "reply", "target", "label", "chosen", "text"),
    }
    guess: dict[str, str] = {}
    for ours, words in hints.items():
        near = [c for word in words for c in columns if word in c.lower() and c not in guess.values()]
        left = [c for c in columns if c not in guess.values()]
        guess[ours] = next(iter(near or left), "answer")
    return ",".join(f"{theirs}:{ours}" for ours, theirs in guess.items())
