"""Text, JSON and YAML files that somebody else may have written: read within limits, refused with one clear message."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from lit_qlora.errors import CheckpointError, UserError

MOST_TEXT = 2**28
"""Bytes of a text or JSON file; the largest tokenizer.json of a published model has 2**25."""
MOST_YAML = 2**20
"""Bytes of a YAML file, which is read at about 1 MB/s."""
MOST_DEPTH = 64
"""Objects or lists inside each other."""
MOST_VALUES = 2**24
"""Values of a JSON text, some 1 GB in Python; the largest tokenizer.json of a published model has 2**21."""
MOST_NODES = 100_000
"""Values of a YAML file, with each alias counted as the values it stands for."""


def read_text(path: Path, error: type[UserError] = CheckpointError, most: int = MOST_TEXT) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
        error: raised for a wrong content.
        most: bytes.

    Raises:
        OSError: if the file cannot be read.
    """
    content = read_bytes(path, error, most)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = content.count(b"\n", 0, wrong.start) + 1
        byte = content[wrong.start]
        raise error(f"{path}:{line}: byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8.") from None


def read_bytes(path: Path, error: type[UserError] = CheckpointError, most: int = MOST_TEXT) -> bytes:
    """read_text for the bytes themselves."""
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise error(f"{path} is larger than the {most:,} bytes that such a file may have.")
    return content


def read_json(path: Path, error: type[UserError] = CheckpointError, *, kind: type = dict, unique: bool = False) -> Any:
    """The value in a JSON file.

    Args:
        error: raised for a wrong content.
        kind: what the value must be: dict, list, or object for any.
        unique: refuse an object that has a key twice.

    Raises:
        OSError: if the file cannot be read.
    """
    return parse_json(read_text(path, error), str(path), error, kind=kind, unique=unique)


def parse_json(
    text: str | bytes,
    location: str,
    error: type[UserError] = CheckpointError,
    *,
    kind: type = dict,
    unique: bool = False,
    strict: bool = False,
) -> Any:
    """read_json for a text from `location`.

    Args:
        strict: refuse NaN and Infinity, which are no JSON, and bytes of paths that are not UTF-8; Python writes them.
    """
    try:
        value = _checked_json(text, unique, strict)
    except (ValueError, RecursionError) as wrong:
        raise error(f"{location}: not valid JSON: {reason(wrong)}.") from None
    if not isinstance(value, kind):
        names: dict[type, str] = {dict: "an object", list: "a list"}
        raise error(f"{location}: expected {names[kind]}, found {names.get(type(value), type(value).__name__)}.")
    return value


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a log, an object a line, without lines that are torn or hold something else.

    A program that is killed leaves half a line, and a power cut may leave any bytes.

    Raises:
        OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        for line in file:
            try:
                value = _checked_json(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(value, dict):
                yield value


def read_yaml_text(path: Path, error: type[UserError] = CheckpointError) -> str:
    """The text of a YAML file, which any YAML parser can then read in little time and memory.

    Raises:
        OSError: if the file cannot be read.
    """
    text = read_text(path, error, MOST_YAML)
    check_yaml(text, str(path), error)
    return text


def check_yaml(text: str, location: str, error: type[UserError] = CheckpointError) -> None:
    """Raise `error` for a YAML text that is not valid, is nested too deeply, or grows too large through its aliases."""
    import yaml

    sizes: dict[str, int] = {}  # anchor -> values that it stands for
    opened: list[tuple[str, int]] = []  # anchor of each open collection, and the count before it
    count = documents = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            anchor = getattr(event, "anchor", None) or ""
            documents += isinstance(event, yaml.DocumentStartEvent)
            if documents > 1:
                raise ValueError("it holds a second document")
            if isinstance(event, yaml.AliasEvent):
                if anchor not in sizes and anchor not in dict(opened):
                    raise ValueError(f"*{anchor} has no anchor")
                count += sizes.get(anchor, 1)
            elif isinstance(event, yaml.ScalarEvent):
                count += 1
                sizes[anchor] = 1
            elif isinstance(event, yaml.CollectionStartEvent):
                opened.append((anchor, count))
                count += 1
            elif isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                sizes[anchor] = count - before
            if len(opened) > MOST_DEPTH:
                raise ValueError(f"nested more than {MOST_DEPTH} deep")
            if count > MOST_NODES:
                raise ValueError(f"more than {MOST_NODES:,} values, its aliases resolved")
    except (yaml.YAMLError, ValueError, RecursionError) as wrong:
        raise error(f"{location}: not valid YAML: {' '.join(str(wrong).split())}.") from None


def _checked_json(text: str | bytes, unique: bool = False, strict: bool = False) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError, RecursionError: if it is not valid, or beyond the limits.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8-sig")
    if text.count(",") + text.count("[") + text.count("{") > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values")
    pairs, constant = _without_repeats if unique else None, _refuse_constant if strict else None
    value = json.loads(text, parse_float=_finite, parse_constant=constant, object_pairs_hook=pairs)
    if "\\u" in text:
        # Half a character, which no file can hold; a path that is not UTF-8 has its bytes as U+DC80 to U+DCFF.
        json.dumps(value, ensure_ascii=False).encode(errors="strict" if strict else "surrogateescape")
    check_depth(value)
    return value


def check_depth(value: Any) -> None:
    """Raise RecursionError for a value of JSON that is nested more than MOST_DEPTH deep."""
    level = [value] if isinstance(value, _CONTAINERS) else []
    for _ in range(MOST_DEPTH):
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, _CONTAINERS)
        ]
        if not level:
            return
    if any(level):
        raise RecursionError


_CONTAINERS = (dict, list)  # a union would be made anew for each value


def _finite(digits: str) -> float:
    number = float(digits)
    if math.isinf(number):
        raise ValueError(f"the number {digits[:20]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("an object has the same key twice")
    return content


def reason(wrong: Exception) -> str:
    """A few words for what json.loads, or check_depth, raised."""
    if isinstance(wrong, RecursionError):
        return f"nested more than {MOST_DEPTH} deep"
    if isinstance(wrong, UnicodeEncodeError):
        return f"it holds {wrong.object[wrong.start]!a}, which is half a character"
    if isinstance(wrong, UnicodeDecodeError):
        return f"byte 0x{wrong.object[wrong.start]:02x} is not UTF-8"
    if not isinstance(wrong, json.JSONDecodeError) and "int_max_str_digits" in str(wrong):
        return "a number has thousands of digits"
    return str(wrong)
