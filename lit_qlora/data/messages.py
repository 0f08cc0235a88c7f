"""Messages as data sets have them, under their many names, become messages as templates read them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

from lit_qlora.errors import DataError
from lit_qlora.files.reading import parse_json
from lit_qlora.prompts.conversation import NOTHING, OPENING, Conversation, Keys, Message, Role

Fields = Mapping[str, Any]
NAMED = 20  # columns that a message names
ASSISTANT = ("assistant", "gpt", "model", "bot", "chatgpt")
CALL = "function_call"
"""The role, and OpenAI's older key, of an assistant's call of a function."""
ROLES: dict[str, Role] = {
    "system": "system",
    "developer": "developer",
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys((*ASSISTANT, CALL), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython"), "tool"),
}
"""Names that data sets give to the speakers -> their roles here."""
WEIGHTS = ("weight", "train", "training")
"""Keys that give the weight of an answer in the loss."""
NO_KEYS = frozenset({"role", "from", "content", "value"})


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
        raise DataError(f"no {column!r} (has: {names_of(record)})")
    if isinstance(value, DataError):
        raise value
    raise DataError(f"{column!r} is {'null' if value is None else type(value).__name__}, not text")


def text_of_parts(parts: Sequence[Any]) -> str:
    """The text of a content that is a list of parts, joined as chat templates join them, with nothing between.

    Raises:
        DataError: if a part is no text, such as an image.
    """
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else type(part).__name__
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"content of type {kind!r} is not read; this model reads text")
    return "".join(text_of(part, "text") for part in parts)


def names_of(record: Fields) -> str:
    """The names of its columns, the first few if there are many."""
    return ", ".join([*map(str, islice(record, NAMED)), *(["..."] if len(record) > NAMED else [])]) or "nothing"


def named(record: Fields, column: str) -> list[Any] | None:
    """The list in a column, which may be a JSON text; None if it is empty or not there.

    Raises:
        DataError: if it is something else.
    """
    value = record.get(column)
    if isinstance(value, str):
        try:
            value = parse_json(value, "text", DataError, kind=object, strict=True) if value.strip() else None
        except DataError as error:
            raise DataError(f"{column!r} is {error}") from None
    if value is not None and not isinstance(value, list):
        raise DataError(f"{column!r} is {type(value).__name__}, not a list")
    return _clean(value, column) or None


def system_of(record: Fields) -> str | None:
    """Return the text of the column system or system_prompt, for the model to read first; None for nothing."""
    if "system" not in record and "system_prompt" not in record:
        return None
    told = [text for name in ("system", "system_prompt") if (text := text_of(record, name, optional=True))]
    if len(set(told)) > 1:
        raise DataError("'system' and 'system_prompt' say different things")
    return told[0] if told else None


def variables_of(record: Fields) -> Keys:
    """Return the variables that the columns beside the messages give to a template."""
    if not ("tools" in record or "functions" in record or "documents" in record or "chat_template_kwargs" in record):
        return NOTHING
    tools, functions = named(record, "tools"), named(record, "functions")
    if tools and functions:
        raise DataError("'tools' and 'functions' are the same. Keep one")
    if functions or isinstance(record.get("tools"), str):
        tools = [_as_tool(function) for function in functions or tools or ()]
    found = {"tools": tools, "documents": named(record, "documents")}
    others = record.get("chat_template_kwargs") or {}
    if not isinstance(others, dict):
        raise DataError(f"'chat_template_kwargs' is {type(others).__name__}, not an object")
    return {
        name: value for name, value in (found | _clean(others, "chat_template_kwargs")).items() if value is not None
    }


def _as_tool(function: Any) -> Any:
    """A function as OpenAI's tools have it."""
    bare = isinstance(function, dict) and "name" in function and "function" not in function
    return {"type": "function", "function": function} if bare else function


def conversation_of(spoken: list[Any], record: Fields, answered: bool = True) -> Conversation:
    """A conversation of messages, with what the other columns of its record say.

    Args:
        answered: see turns_of.

    Raises:
        DataError: with the number of the turn that is wrong.
    """
    said, system = turns_of(spoken, answered), system_of(record)
    if system is not None and said.system is None:
        said = Conversation((Message("system", system), *said.messages))
    elif system is not None and said.system != system:
        raise DataError("the column of the system message says something else than the first message")
    return Conversation(said.messages, variables=variables_of(record))


def turns_of(spoken: Iterable[Any], answered: bool = True) -> Conversation:
    """A conversation of messages: perhaps one of system or developer, then users, assistants and tools.

    Args:
        answered: the last is an answer; else it is to be answered.

    Raises:
        DataError: with the number of the turn that is wrong.
    """
    messages: list[Message] = []
    before = ""
    for i, found in enumerate(spoken, start=1):
        try:
            message = _message(found)
            _check_order(message.role, before, found, i)
        except DataError as error:
            raise DataError(f"turn {i}{'' if str(error).startswith(' is') else ':'} {str(error).lstrip()}") from None
        messages.append(message)
        before = message.role
    if not any(message.role == "assistant" for message in messages) and before in ("", *OPENING):
        raise DataError("the conversation is empty")
    if answered and before != "assistant":
        raise DataError(f"turn {len(messages)}: nobody answers the last prompt")
    if not answered and before == "assistant":
        raise DataError(f"turn {len(messages)}: the last prompt is answered already")
    return Conversation(tuple(messages))


def _check_order(role: Role, before: str, message: Fields, number: int) -> None:
    """Refuse a message that cannot follow the one before it."""
    theirs = message.get("role", message.get("from"))
    if role in OPENING and number > 1:
        raise DataError("a system message stands at the beginning or nowhere")
    if role == "user" and before == "user":
        raise DataError(f"the role {theirs!r} comes twice in a row")
    if role in ("assistant", "tool") and before in ("", *OPENING):
        raise DataError(f"the role {theirs!r} answers nobody")
    if (role == "assistant" and before == "assistant") or (role == "tool" and before == "user"):
        raise DataError(f"the role {theirs!r} answers nobody")


def _message(found: Any) -> Message:
    if isinstance(found, DataError):
        raise found
    if not isinstance(found, dict):
        raise DataError(f" is {type(found).__name__}, not an object with 'role' and 'content'")
    theirs = found.get("role", found.get("from"))
    role = ROLES.get(str(theirs).lower())
    if role is None:
        raise DataError(f"the role {theirs!r} is not known (known: {', '.join(ROLES)})")
    text_key = "value" if "content" not in found and ("value" in found or "from" in found) else "content"
    if isinstance(found.get(text_key), list):
        found = {**found, text_key: text_of_parts(found[text_key])}
    if len(found) == 2 and text_key in found:  # nothing but role and content
        return Message(role, text_of(found, text_key)) if theirs != CALL else _called(found, text_key, {})
    keys = {name: _clean(value, name) for name, value in found.items() if name not in NO_KEYS and value is not None}
    if theirs == CALL:
        return _called(found, text_key, keys)
    if CALL in keys:
        keys["tool_calls"] = [{"type": "function", "function": keys.pop(CALL)}]
    if "tool_calls" in keys:
        keys["tool_calls"] = named(keys, "tool_calls")
        if not keys["tool_calls"]:
            del keys["tool_calls"]
    silent = role == "assistant" and "tool_calls" in keys and found.get(text_key) is None
    text = None if silent else text_of(found, text_key)
    return Message(role, text, keys, _weight(keys)) if role == "assistant" else Message(role, text, keys)


def _called(found: Fields, text_key: str, keys: dict[str, Any]) -> Message:
    """The message of an assistant whose whole text is a call of a function, or several, in JSON."""
    text = text_of(found, text_key)
    value = parse_json(text, "the call of a function", DataError, kind=object, strict=True)
    calls = value if isinstance(value, list) else [value]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise DataError("the call of a function has no 'name'")
    called = [{"type": "function", "function": call} for call in calls]
    return Message("assistant", None, keys | {"tool_calls": called}, _weight(keys))


def _weight(keys: dict[str, Any]) -> float:
    """Take the weight of the answer in the loss, from 0 to 1, out of the keys."""
    weight = 1.0
    for name in WEIGHTS:
        if name in keys:
            weight *= _share(name, keys.pop(name))
    return weight


def _share(name: str, value: Any) -> float:
    given = {"true": 1.0, "false": 0.0}.get(value.lower(), value) if isinstance(value, str) else value
    try:
        share = float(given)
    except (TypeError, ValueError):
        share = -1.0
    if not 0 <= share <= 1:
        raise DataError(f"{name!r} is {value!r}, neither true or false nor a number from 0 to 1")
    return share


def _clean(value: Any, name: str) -> Any:
    """The value as JSON has it.

    Raises:
        DataError: if something in it could not be read, or is no text.
    """
    if isinstance(value, str):
        return text_of({name: value}, name)
    if isinstance(value, dict):
        return {str(key): _clean(one, name) for key, one in value.items()}
    if isinstance(value, list):
        return [_clean(one, name) for one in value]
    if isinstance(value, DataError):
        raise value
    return value if value is None or isinstance(value, bool | int | float) else str(value)
