"""Reading files of examples. Every complaint names its place, and all of them come at once."""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_qlora.errors import DataError, did_you_mean

COLUMNS = ("instruction", "input", "output")
SUFFIXES = (".json", ".jsonl", ".csv")
SHOWN = 10  # complaints that a message shows; the rest are counted


@dataclass(frozen=True, slots=True)
class Example:
    """One instruction and the answer that is wanted."""

    instruction: str
    input: str
    output: str
    place: str
    """Where it stands, e.g. train.jsonl:17, for messages."""


def find_files(path: Path, val_path: Path | None) -> tuple[Path, Path | None]:
    """The training and validation file that data.path and data.val_path name.

    Raises:
        DataError: if a file is absent, or a directory holds no training file or more than one.
    """
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"data.path {path} does not exist.{did_you_mean(path.name, beside)}")
    if path.is_dir():
        train, own_val = _only_one(path, "train"), _only_one(path, "val")
        if train is None:
            raise DataError(f"{path} holds no train.json, train.jsonl or train.csv.")
        path, val_path = train, val_path or own_val
    for file in (path, val_path):
        if file is None:
            continue
        if not file.is_file():
            raise DataError(f"data.val_path {file} is not a file.")
        if file.suffix not in SUFFIXES:
            raise DataError(f"{file}: files of type {file.suffix!r} cannot be read. Known: {', '.join(SUFFIXES)}.")
    return path, val_path


def read_examples(path: Path) -> list[Example]:
    """All examples of a .json, .jsonl or .csv file with the columns instruction, input (may be absent) and output.

    Blank lines and a byte-order mark are no errors.

    Raises:
        DataError: listing the first few things that are wrong, with their places, and counting all.
    """
    text = _read_text(path)
    records = {".json": _from_json, ".jsonl": _from_jsonl, ".csv": _from_csv}[path.suffix](path, text)
    examples: list[Example] = []
    complaints: list[str] = []
    for place, record in records:
        complaint = str(record) if isinstance(record, DataError) else _complaint(record)
        if complaint:
            complaints.append(f"{place}: {complaint}")
        else:
            instruction, input, output = (str(record.get(column) or "") for column in COLUMNS)
            examples.append(Example(instruction, input, output, place))
    if complaints:
        more = [f"... and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
        raise DataError("\n       ".join(complaints[:SHOWN] + more))
    if not examples:
        raise DataError(f"{path} holds no samples.")
    return examples


def _only_one(directory: Path, stem: str) -> Path | None:
    found = [directory / f"{stem}{suffix}" for suffix in SUFFIXES if (directory / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{directory} holds several {stem} files: {', '.join(p.name for p in found)}. Name one.")
    return found[0] if found else None


def _read_text(path: Path) -> str:
    content = path.read_bytes()
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} looks like UTF-16. Save it as UTF-8.")
    if content[:2] == b"\x1f\x8b":
        raise DataError(f"{path} is compressed with gzip. Decompress it first.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise DataError(
            f"{path}:{line}: byte 0x{content[error.start]:02x} is not UTF-8 (column {column}). Save the file as UTF-8."
        ) from None


Records = Iterable[tuple[str, Any]]
"""(place, record), where a record that could not be read is a DataError that says why."""


def _from_json(path: Path, text: str) -> Records:
    if not text.strip():
        return []
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not isinstance(error, json.JSONDecodeError):
            raise DataError(f"{path}: not valid JSON: {error}.") from None
        if error.msg == "Extra data" and text.lstrip().startswith("{"):
            return _from_jsonl(path, text)  # JSON lines under the name .json
        raise DataError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}.") from None
    if isinstance(content, dict):
        lists = [key for key, value in content.items() if isinstance(value, list)]
        if "instruction" in content:
            content = [content]
        else:
            hint = f" Did you mean the list under {lists[0]!r}? Save that alone." if lists else ""
            raise DataError(f"{path}: expected a list of samples, found an object.{hint}")
    if not isinstance(content, list):
        raise DataError(f"{path}: expected a list of samples, found {type(content).__name__}.")
    return [(f"{path}: sample {number}", record) for number, record in enumerate(content, start=1)]


def _from_jsonl(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield f"{path}:{number}", json.loads(line)
        except json.JSONDecodeError as error:
            yield f"{path}:{number}", DataError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            yield f"{path}:{number}", DataError(f"not valid JSON: {error}")


def _from_csv(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    line = 1  # where the record begins, which can be several lines before its end
    try:
        header = next((row for row in reader if "".join(row).strip()), [])
        if header and "instruction" not in header:
            delimiters = [mark for mark in ";\t|" if mark in header[0]]
            hint = f" Is it delimited by {delimiters[0]!r}? Save it with commas." if delimiters else ""
            raise DataError(f"{path}:{reader.line_num}: no column 'instruction' (found: {', '.join(header)}).{hint}")
        line = reader.line_num + 1
        for row in reader:
            if "".join(row).strip():  # else it is blank
                record = dict(zip(header, row, strict=False))
                wrong = DataError(f"has {len(row)} columns, the header {len(header)}")
                yield f"{path}:{line}", record if len(row) == len(header) else wrong
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}. Is a quotation mark unclosed?") from None


def _complaint(record: Any) -> str:
    """What is wrong with a record, or ''."""
    if not isinstance(record, dict):
        return f"expected an object with {', '.join(COLUMNS)}, found {type(record).__name__}"
    for column in ("instruction", "output"):
        if column not in record:
            return f"no {column!r} (has: {', '.join(map(str, record)) or 'nothing'})"
    for column in COLUMNS:
        value = record.get(column)
        if not isinstance(value, str) and not (column == "input" and value is None):
            return f"{column!r} is {'null' if value is None else type(value).__name__}, not text"
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            return f"{column!r} holds half of a surrogate pair, which is no character"
    if not record["output"].strip():
        return "the answer in 'output' is empty"
    return ""
