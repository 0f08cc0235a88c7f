"""Calls of tools in an answer, as models write them, in the form of OpenAI's API."""

import json
import re
import secrets
from collections.abc import Collection
from typing import Any

from lit_qlora.files.reading import check_depth

_MARKED = re.compile(r"<tool_call>\s*(.*?)\s*</tool_call>", re.DOTALL)
_DECODER = json.JSONDecoder()


def read_calls(text: str, names: Collection[str]) -> tuple[str, list[dict[str, Any]]]:
    """Split an answer into the words before its calls, and the calls. An answer with anything else is words alone.

    Three notations are known. Hermes and Qwen write JSON objects between <tool_call> and </tool_call>. Mistral writes
    a list of objects, behind [TOOL_CALLS], a control token or text. Llama 3 writes objects alone, with "parameters"
    for the arguments.

    Args:
        names: of the tools that may be called.
    """
    words, *marked = _MARKED.split(text)
    if any(between.strip() for between in marked[1::2]):
        return text, []
    parts = marked[::2] if marked else [text.strip().removeprefix("[TOOL_CALLS]")]
    calls = [_call(value, names) for part in parts for value in _values(part)]
    found = [call for call in calls if call]
    return (words.strip() if marked else "", found) if found and len(found) == len(calls) else (text, [])


def _values(text: str) -> list[Any]:
    """The JSON values that the text consists of; [None] if it holds anything else."""
    values: list[Any] = []
    text = text.strip()
    while text:
        try:
            value, end = _DECODER.raw_decode(text)
            check_depth(value)
            json.dumps(value, ensure_ascii=False, allow_nan=False).encode()  # as it will be sent
        except (ValueError, RecursionError):
            return [None]
        values += value if isinstance(value, list) else [value]
        text = text[end:].lstrip(" \n;,")
    return values


def _call(value: Any, names: Collection[str]) -> dict[str, Any] | None:
    """A call in OpenAI's form; None if the value is none."""
    if not isinstance(value, dict) or value.get("name") not in names:
        return None
    arguments = value.get("arguments", value.get("parameters", {}))
    if not isinstance(arguments, dict):
        return None
    function = {"name": value["name"], "arguments": json.dumps(arguments, ensure_ascii=False)}
    # Nine letters and digits, for Mistral's templates take no other.
    return {"id": secrets.token_hex(5)[:9], "type": "function", "function": function}
