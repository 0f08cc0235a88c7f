"""Files of prompts that are to be answered."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lit_qlora.data.messages import conversation_of, variables_of
from lit_qlora.data.sources import Source, find_file, read_records
from lit_qlora.data.text_files import kind_of
from lit_qlora.errors import DataError
from lit_qlora.files.reading import read_json
from lit_qlora.prompts.conversation import NOTHING, Conversation, Message, prompt_of


def read_prompts(
    path: Path, system: str = "", variables: Mapping[str, Any] = NOTHING
) -> Iterator[tuple[str, Conversation, dict[str, Any]]]:
    """Place, conversation to be answered, and original row of each prompt.

    Args:
        path: a line each (.txt), or records with instruction or prompt, and perhaps input and system, or with messages
            and perhaps tools.
        system: what the model is told before all, where a record does not say.
        variables: see read_variables; a record's own come before them.

    Raises:
        DataError: if the file cannot be read, holds no prompt, or a row has none.
    """
    source = find_file(path)
    records = _read_lines(source) if kind_of(path) == ".txt" else read_records(source)
    found = False
    for location, row in records:
        for value in (row, *(row.values() if isinstance(row, dict) else ())):
            if isinstance(value, DataError):
                raise DataError(f"{location}: {value}")
        if not isinstance(row, dict):
            raise DataError(f"{location}: expected an object with instruction or prompt, found {type(row).__name__}.")
        try:
            asked = _asked(row)
        except DataError as error:
            raise DataError(f"{location}: {error}.") from None
        if system and asked.system is None:
            asked = replace(asked, messages=(Message("system", system), *asked.messages))
        if variables:
            asked = replace(asked, variables={**variables, **asked.variables})
        found = True
        yield location, asked, row
    if not found:
        raise DataError(f"{path} holds no prompt.")


def read_variables(tools: Path | None, documents: Path | None) -> dict[str, Any]:
    """The variables that a chat template has besides messages, from JSON files with a list each.

    Raises:
        DataError: if a file cannot be read, or holds something else.
    """
    found: dict[str, Any] = {}
    for name, path in (("tools", tools), ("documents", documents)):
        if path is None:
            continue
        found |= variables_of({name: json.dumps(read_json(path, DataError, kind=list))})
    for tool in found.get("tools", ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            form = '{"type": "function", "function": {"name": "f"}}'
            raise DataError(f"{tools}: a tool has the form {form}, got {json.dumps(tool)[:80]}.")
    return found


def _asked(row: dict[str, Any]) -> Conversation:
    """Make a prompt of a row."""
    for column in ("messages", "conversations"):
        if isinstance(row.get(column), list):
            return conversation_of(row[column], row, answered=False)
    ask = next((row[name] for name in ("instruction", "prompt") if row.get(name)), None)
    if not isinstance(ask, str):
        raise DataError(f"no instruction and no prompt (has: {', '.join(map(str, row)) or 'nothing'})")
    asked = prompt_of(ask, str(row.get("input") or ""), str(row.get("system") or "") or None)
    return replace(asked, variables=variables_of(row))


def _read_lines(source: Source) -> Iterator[tuple[str, Any]]:
    """A prompt for each line of a text file that is not blank."""
    for location, row in read_records(source):
        assert isinstance(row, dict)
        for number, line in enumerate(row["text"].split("\n"), start=1):
            if line.strip():
                yield f"{location}:{number}", {"prompt": line.strip()}
