"""What records look like: a table of the formats in use, each with the columns by which it is recognised."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from lit_qlora.errors import DataError, UsageError, did_you_mean
from lit_qlora.prompts.style import Conversation, Turn

Fields = Mapping[str, Any]
NAMED = 20  # columns that a message names
OURS = ("instruction", "input", "output", "system")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "bot", "chatgpt"), "assistant"),
}
"""What data sets call those who speak, and what they are called here."""


@dataclass(frozen=True)
class Format:
    """A row of FORMATS."""

    needs: tuple[str, ...]
    """Columns without which a record is not of this format."""
    read: Callable[[Fields], Conversation]
    """Makes a conversation of a record; what is wrong with it is a DataError."""
    begins: str = ""
    """A regular expression that the first needed column begins with, where the columns alone do not tell."""
    gather: Callable[[Iterable[tuple[str, Any]]], Iterable[tuple[str, Any]]] | None = None
    """Makes the records of conversations, where one is spread over several."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """Their column -> ours, for those that only differ in names."""


def text_of(record: Fields, column: str, optional: bool = False) -> str:
    """The text in a column.

    Raises:
        DataError: if there is none.
    """
    value = record.get(column)
    if isinstance(value, str):
        if value.isascii() or not re.search("[\ud800-\udfff]", value):
            return value
        raise DataError(f"{column!r} holds half of a surrogate pair, which is no character")
    if optional and value is None:
        return ""
    if column not in record:
        raise DataError(f"no {column!r} (has: {_names(record)})")
    if isinstance(value, DataError):
        raise value
    raise DataError(f"{column!r} is {'null' if value is None else type(value).__name__}, not text")


def _names(record: Fields) -> str:
    """The names of its columns, the first few if there are many."""
    return ", ".join([*map(str, islice(record, NAMED)), *(["..."] if len(record) > NAMED else [])]) or "nothing"


def from_columns(columns: Mapping[str, str]) -> Format:
    """The format whose records have a column each for instruction, input, output and system.

    Args:
        columns: their name -> ours.
    """
    theirs = {ours: name for name, ours in columns.items()}
    instruction, output = theirs["instruction"], theirs["output"]
    others = {ours: name for ours, name in theirs.items() if ours in ("input", "system")}

    def read(record: Fields) -> Conversation:
        turn = Turn(text_of(record, instruction), text_of(record, output))
        return Conversation((turn,), **{ours: text_of(record, name, optional=True) for ours, name in others.items()})

    return Format((instruction, output), read, columns=columns)


def red_dot(record: Fields) -> Conversation:
    """A product of the Red Dot Design Award and its description."""
    product, category = text_of(record, "product"), text_of(record, "category")
    asked = f"Create a detailed description for the following product: {product}, belonging to category: {category}"
    return Conversation((Turn(asked, text_of(record, "description")),))


def raw_text(record: Fields) -> Conversation:
    """A text without a prompt, all of which is learnt."""
    return Conversation((Turn("", text_of(record, "text")),))


def messages(record: Fields) -> Conversation:
    """{"messages": [{"role": "user", "content": "..."}, ...]}, as OpenAI has it; "weight": 0 leaves an answer out."""
    return _conversation(_list(record, "messages"), "role", "content")


def sharegpt(record: Fields) -> Conversation:
    """{"conversations": [{"from": "human", "value": "..."}, ...]}."""
    spoken = _conversation(_list(record, "conversations"), "from", "value")
    return Conversation(spoken.turns, system=spoken.system or text_of(record, "system", optional=True))


def lima(record: Fields) -> Conversation:
    """{"conversations": ["...", "..."]}: user and assistant in turn. A last word without an answer is left out."""
    spoken = _list(record, "conversations")
    for i, text in enumerate(spoken, start=1):
        if not isinstance(text, str):
            raise DataError(f"turn {i} is {type(text).__name__}, not text")
    if len(spoken) < 2:
        raise DataError("'conversations' holds no answer")
    return Conversation(tuple(Turn(*pair) for pair in zip(spoken[::2], spoken[1::2], strict=False)))


def marked(column: str, user: str, assistant: str) -> Callable[[Fields], Conversation]:
    """Reads conversations that stand in one text, with marks such as "<human>:" and "<bot>:"."""
    marks = re.compile(f"({re.escape(user)}|{re.escape(assistant)})")

    def read(record: Fields) -> Conversation:
        head, *parts = marks.split(text_of(record, column))
        roles = ["user" if mark == user else "assistant" for mark in parts[::2]]
        spoken = [{"role": role, "content": text.strip()} for role, text in zip(roles, parts[1::2], strict=True)]
        system = [{"role": "system", "content": head.strip()}] if head.strip() else []
        return _conversation([*system, *spoken], "role", "content")

    return read


def best_paths(records: Iterable[tuple[str, Any]]) -> Iterable[tuple[str, Any]]:
    """From each tree of messages the path of the best-ranked replies, as a record of the format messages.

    Trees come as rows that name their parents, or whole, as {"prompt": {"text": ..., "replies": [...]}}.
    """
    rows: list[tuple[str, Any]] = []
    for place, record in records:
        whole = record.get("prompt") if isinstance(record, dict) else None
        if not isinstance(record, dict):
            yield place, record
        elif no_id := next(
            (c for c in ("message_id", "parent_id") if not isinstance(record.get(c), str | int | None)), ""
        ):
            yield place, DataError(f"{no_id!r} is {type(record[no_id]).__name__}, not text")
        elif isinstance(whole, dict):
            yield place, _best_path(whole, lambda message: message.get("replies") or [])
        else:
            rows.append((place, record))
    replies: dict[Any, list[dict[str, Any]]] = {}
    for _, row in rows:
        replies.setdefault(row.get("parent_id"), []).append(row)
    known = {row.get("message_id") for _, row in rows}
    for place, row in rows:
        if row.get("parent_id") is None:
            yield place, _best_path(row, lambda message: replies.get(message.get("message_id"), []))
        elif row["parent_id"] not in known:
            yield place, DataError(f"its parent_id {row['parent_id']!r} is no message of this file")


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
    while path and ROLES.get(str(path[-1]["role"])) != "assistant":
        path.pop()  # nobody answered it
    return {"messages": path} if path else DataError("nobody answered")


def _list(record: Fields, column: str) -> list[Any]:
    value = record.get(column)
    if not isinstance(value, list):
        raise DataError(f"{column!r} is {'null' if value is None else type(value).__name__}, not a list")
    return value


def _conversation(spoken: list[Any], role_key: str, text_key: str) -> Conversation:
    """A conversation of {role, text} messages: an optional system message, then user and assistant in turn."""
    system, asked = "", None
    turns: list[Turn] = []
    for i, message in enumerate(spoken, start=1):
        if isinstance(message, DataError):
            raise DataError(f"turn {i}: {message}")
        if not isinstance(message, dict):
            raise DataError(f"turn {i} is {type(message).__name__}, not an object with {role_key!r} and {text_key!r}")
        role = ROLES.get(str(message.get(role_key)).lower())
        if role is None:
            known = ", ".join(ROLES)
            raise DataError(f"turn {i}: the role {message.get(role_key)!r} is not known (known: {known})")
        try:
            content = text_of(message, text_key)
        except DataError as error:
            raise DataError(f"turn {i}: {error}") from None
        if role == "system":
            if i > 1:
                raise DataError(f"turn {i}: a system message stands at the beginning or nowhere")
            system = content
        elif role == "user":
            if asked is not None:
                raise DataError(f"turn {i}: the role {message[role_key]!r} comes twice in a row")
            asked = content
        else:
            if asked is None:
                raise DataError(f"turn {i}: the role {message[role_key]!r} answers nobody")
            turns.append(Turn(asked, content, trained=message.get("weight") != 0))
            asked = None
    if asked is not None:
        raise DataError(f"turn {len(spoken)}: nobody answers the last prompt")
    if not turns:
        raise DataError("the conversation is empty")
    return Conversation(tuple(turns), system=system)


ALPACA = from_columns({"instruction": "instruction", "input": "input", "output": "output", "system": "system"})
FORMATS: dict[str, Format] = {
    "alpaca": ALPACA,
    "alpaca-gpt4": ALPACA,
    "dolly": from_columns({"instruction": "instruction", "context": "input", "response": "output"}),
    "messages": Format(("messages",), messages),
    "sharegpt": Format(("conversations",), sharegpt, begins=r"\[\{"),
    "lima": Format(("conversations",), lima, begins=r"\['|\[\""),
    "oasst1": Format(("message_id", "parent_id", "text", "role"), messages, gather=best_paths),
    "oasst1-trees": Format(("message_tree_id", "prompt"), messages, gather=best_paths),
    "hh-rlhf": Format(("chosen",), marked("chosen", "\n\nHuman:", "\n\nAssistant:")),
    "chip2": Format(("text",), marked("text", "<human>:", "<bot>:"), begins="<human>:"),
    "guanaco": Format(("text",), marked("text", "### Human:", "### Assistant:"), begins="### Human:"),
    "red-dot": Format(("product", "category", "description"), red_dot),
    "flan": from_columns({"inputs": "instruction", "targets": "output"}),
    "self-instruct": from_columns({"prompt": "instruction", "completion": "output"}),
    "prompt-response": from_columns({"prompt": "instruction", "response": "output"}),
    "qa": from_columns({"question": "instruction", "context": "input", "answer": "output"}),
    "longform": from_columns({"input": "instruction", "output": "output"}),
    "text": Format(("text",), raw_text),
}
"""In the order in which they are tried; the first whose columns are all there is taken."""


def pick_format(name: str, columns: str, records: list[tuple[str, Any]]) -> tuple[str, Format, str]:
    """The format that the settings name, or the one that the first records have.

    Args:
        name: as data.format.
        columns: as data.columns.
        records: the first, as they were read; an error without a place ends what can be read.

    Returns:
        Its name, the format, and what was seen, for people.

    Raises:
        UsageError: if the settings name a format or a column that does not exist.
        DataError: if no format fits; it names the columns that were found.
    """
    dicts = [record for _, record in records if isinstance(record, dict)]
    first = dicts[0] if dicts else {}
    found = f"columns {_names(first)}"
    if columns:
        parsed = _parse_columns(columns)
        for theirs in parsed:
            if dicts and not any(theirs in record for record in dicts):
                raise DataError(
                    f"data.columns: no record has a column {theirs!r} (has: {_names(first)})."
                    f"{did_you_mean(theirs, list(map(str, first)))}"
                )
        return "columns", from_columns(parsed), f"{columns} of {found}"
    if name != "auto":
        if name not in FORMATS:
            raise UsageError(
                f"data.format {name!r} is not known.{did_you_mean(name, list(FORMATS))} Known: {', '.join(FORMATS)}."
            )
        return name, FORMATS[name], found
    for record in dicts:  # the first may not be like the others, and then says so itself
        for known, form in FORMATS.items():
            if _fits(record, form):
                return known, form, f"columns {_names(record)}"
    if not first:
        return "alpaca", ALPACA, found  # all are wrong, and each says so itself
    end, last = records[-1]
    if isinstance(last, DataError) and not end:
        raise last  # what makes the file unreadable comes before what its columns mean
    place = next(place for place, record in records if record is first)
    raise DataError(
        f"{place}: no format has the {found}.\n"
        f"Say which is what, e.g. --data.columns {_guess(list(map(str, first)))}, or name a --data.format: "
        f"{', '.join(FORMATS)}."
    )


def _fits(record: Fields, form: Format) -> bool:
    there = all(column in record for column in form.needs)
    return there and (not form.begins or bool(re.match(form.begins, str(record[form.needs[0]]).lstrip())))


def _parse_columns(text: str) -> dict[str, str]:
    pairs = [part.strip().rpartition(":")[::2] for part in text.split(",")]
    columns = dict(pairs)
    for theirs, ours in pairs:
        if ours not in OURS or not theirs:
            raise UsageError(
                f"data.columns: {theirs}:{ours} is not of the form theirs:ours with one of {', '.join(OURS)}."
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
