"""Reading files of records: JSON, JSON lines, tables, Parquet, text. Every record has a location, for messages."""

import csv
import json
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

from lit_qlora.data.text_files import UTF8, byte_lines, find_encoding, kind_of, lines, not_utf8, pieces
from lit_qlora.errors import DataError
from lit_qlora.files.reading import check_depth, reason

Record = tuple[str, Any]
"""(location, content); the content of a record that cannot be read is a DataError that says why."""
LONGEST_FIELD = 2**31 - 1  # characters; Python's own limit is 131,072, fewer than some documents have
AT_ONCE = 256  # rows of a Parquet or Arrow file
LOOKED_AT = 20  # records of a table that show its delimiter
NAMES = {",": "commas", "\t": "tabs"}
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""Of a table by its name, unless its records show another."""

# JSON. NaN, Infinity and a key that stands twice are refused: the format allows them, and no data set means them.


def _pairs(pairs: list[tuple[str, Any]]) -> Any:
    record = dict(pairs)
    if len(record) < len(pairs):
        names = [name for name, _ in pairs]
        return DataError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return record


def _constant(name: str) -> DataError:
    return DataError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_constant)
_SPACE = re.compile(r"[ \t\r\n]*")


class _Json:
    """JSON values one after the other, from the pieces of a file."""

    def __init__(self, path: Path) -> None:
        self.path, self.pieces = path, pieces(path)
        self.text, self.at = "", 0
        self.line, self.line_start, self.counted = 1, 0, 0  # lines up to `counted`; the start can lie before the text

    def peek(self) -> str:
        """The next character that is no space, or '' at the end."""
        while True:
            found = _SPACE.match(self.text, self.at)
            assert found
            self.at = found.end()
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def value(self) -> Any:
        """The next value."""
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                check_depth(value)
                if end < len(self.text) or not self._more():  # else a number could go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.refusal(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.refusal(reason(error)) from None

    def location(self, at: int | None = None) -> tuple[int, int]:
        """Line and column of a position, by default of the next character; positions may only grow."""
        at = self.at if at is None else at
        self.line += self.text.count("\n", self.counted, at)
        last = self.text.rfind("\n", self.counted, at)
        self.line_start = last + 1 if last >= 0 else self.line_start
        self.counted = at
        return self.line, at - self.line_start + 1

    def refusal(self, reason: str, at: int | None = None) -> DataError:
        """Make the error to raise, with its location."""
        line, column = self.location(at)
        return DataError(f"{self.path}:{line}: not valid JSON: {reason} at column {column}.")

    def _more(self) -> bool:
        """Read on, as much as there is already, so that a value of any length is tried a few times only."""
        self.location()
        kept = self.text[self.at :]
        more: list[str] = []
        while sum(map(len, more)) <= len(kept) and (piece := next(self.pieces, None)) is not None:
            more.append(piece)
        if not any(more):
            return False
        self.text = kept + "".join(more)
        self.line_start, self.counted, self.at = self.line_start - self.at, 0, 0
        return True


def _from_json(path: Path) -> Iterator[Record]:
    source = _Json(path)
    if not source.peek():
        return
    if source.peek() != "[":
        yield from _from_object(source)
        return
    source.at += 1
    number = 0
    ends_in_comma = False
    while source.peek() != "]" or ends_in_comma:
        line, number = source.location()[0], number + 1
        yield f"{path}:{line}: sample {number}", source.value()
        ends_in_comma = source.peek() == ","
        source.at += ends_in_comma
        if not ends_in_comma and source.peek() != "]":
            raise source.refusal("Expecting ',' delimiter" if source.peek() else "the list has no end")
    source.at += 1
    if source.peek():
        raise source.refusal("Extra data")


def _from_object(source: _Json) -> Iterator[Record]:
    """A .json file that holds no list: one sample, or JSON lines under a name that does not say so."""
    line, first = source.location()[0], source.peek()
    content = source.value()
    if source.peek():
        if first != "{":
            raise source.refusal("Extra data")
        yield from _from_jsonl(source.path)
        return
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    if (
        lists
        and lists[0] not in ("messages", "conversations")
        and not any(isinstance(value, str) for value in content.values())
    ):
        hint = f"Did you mean the list under {lists[0]!r}? Save that alone."
        raise DataError(f"{source.path}: expected a list of samples, found an object. {hint}")
    if not isinstance(content, dict | DataError):
        raise DataError(f"{source.path}: expected a list of samples, found {type(content).__name__}.")
    yield f"{source.path}:{line}: sample 1", content


def _from_jsonl(path: Path) -> Iterator[Record]:
    first = True
    for number, content in enumerate(byte_lines(path), start=1):
        try:
            line = content.decode()
            if not line.strip():
                continue
            if first and line.lstrip().startswith("["):  # a list under a name that promises lines
                yield from _from_json(path)
                return
            first = False
            record: Any = _DECODER.decode(line)
            check_depth(record)
        except UnicodeDecodeError as error:
            record = DataError(not_utf8(error))
        except json.JSONDecodeError as error:
            record = DataError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            record = DataError(f"not valid JSON: {reason(error)}")
        yield f"{path}:{number}", record


# Tables and text.


def find_delimiter(path: Path, encoding: str) -> str:
    """The delimiter that splits header and first records of a table into equally many columns; else the usual one."""
    usual = DELIMITERS[kind_of(path)]
    columns = {mark: _columns(path, encoding, mark) for mark in dict.fromkeys((usual, *",;\t|"))}
    return max(columns, key=lambda mark: columns[mark])


def _columns(path: Path, encoding: str, delimiter: str) -> int:
    """The columns of the first records, 1 if they do not all have as many as the header."""
    csv.field_size_limit(LONGEST_FIELD)
    try:
        rows = (row for row in csv.reader(lines(path, encoding), delimiter=delimiter) if "".join(row).strip())
        counts = {len(row) for row in islice(rows, LOOKED_AT)}
    except (csv.Error, DataError):  # reading it again says so
        return 1
    return counts.pop() if len(counts) == 1 else 1


def describe(path: Path) -> str:
    """The delimiter and encoding of a table or text that are not the usual ones of such a file; else ''."""
    kind = kind_of(path)
    if kind not in (*DELIMITERS, ".txt"):
        return ""
    encoding = find_encoding(path)
    usual = DELIMITERS.get(kind, "")
    delimiter = find_delimiter(path, encoding) if usual else ""
    said = f"delimited by {NAMES.get(delimiter, repr(delimiter))}" if delimiter != usual else ""
    return ", ".join(part for part in (said, encoding if encoding != UTF8 else "") if part)


def _from_table(path: Path) -> Iterator[Record]:
    csv.field_size_limit(LONGEST_FIELD)
    encoding = find_encoding(path)
    delimiter = find_delimiter(path, encoding)
    reader = csv.reader(lines(path, encoding), delimiter=delimiter, strict=True)
    line = 1  # where the record begins, which can be several lines before its end
    try:
        header = next((row for row in reader if "".join(row).strip()), [])
        if twice := next((name for name in header if name.strip() and header.count(name) > 1), None):
            raise DataError(f"{path}:{reader.line_num}: the column {twice!r} stands twice in the header.")
        if len(header) == 1:
            others = [mark for mark in ",;\t|" if mark in header[0]]
            if others:
                hint = f"Is it delimited by {others[0]!r}? Then its records have other columns than its header."
                raise DataError(f"{path}:{reader.line_num}: there is one column only ({header[0]}). {hint}")
        line = reader.line_num + 1
        for row in reader:
            if "".join(row).strip():  # else it is blank
                wrong = DataError(f"has {len(row)} columns, the header {len(header)}")
                yield f"{path}:{line}", dict(zip(header, row, strict=False)) if len(row) == len(header) else wrong
            line = reader.line_num + 1
    except csv.Error as error:
        hint = "Is a quotation mark unclosed?"
        if "new-line character" in str(error):
            error, hint = csv.Error("its lines end with carriage returns alone"), "Save it with line feeds."
        raise DataError(f"{path}:{line}: not valid CSV: {error}. {hint}") from None


def _from_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(AT_ONCE):
                yield from _rows(batch, path, number)
                number += len(batch)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def _from_arrow(path: Path) -> Iterator[Record]:
    """The rows of a file that the library datasets saved."""
    import pyarrow

    number = 0
    try:
        with pyarrow.memory_map(str(path)) as file, _open_arrow(file) as batches:
            for batch in batches:
                batch.validate(full=True)  # a damaged one would end the process
                yield from _rows(batch, path, number)
                number += len(batch)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not an Arrow file: {str(error).splitlines()[0]}") from None


def _open_arrow(file: Any) -> Any:
    """Open a stream of batches, which datasets writes, or a file of them."""
    import pyarrow

    if file.read(6) == b"ARROW1":
        batches = pyarrow.ipc.open_file(file)
        return closing(batches.get_batch(i) for i in range(batches.num_record_batches))
    file.seek(0)
    return pyarrow.ipc.open_stream(file)


def _rows(batch: Any, path: Path, before: int) -> Iterator[Record]:
    """The rows of a part of a Parquet or Arrow file, in Python's types, which hold neither each time nor each byte.

    Args:
        before: rows of the file before them.
    """
    for start in range(0, len(batch), AT_ONCE):  # a file of a megabyte can hold one text a million times
        some = batch.slice(start, AT_ONCE)
        first = before + start + 1
        try:
            rows = some.to_pylist()
        except (ValueError, OverflowError) as error:
            rows_named = f"{path}: rows {first} to {first + len(some) - 1}"
            raise DataError(f"{rows_named} hold what is no value of their type: {error}.") from None
        for number, row in enumerate(rows, first):
            yield f"{path}: row {number}", row


def _from_text(path: Path) -> Iterator[Record]:
    text = "".join(pieces(path, find_encoding(path)))
    if text.strip():
        yield str(path), {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _from_json,
    ".jsonl": _from_jsonl,
    ".csv": _from_table,
    ".tsv": _from_table,
    ".parquet": _from_parquet,
    ".arrow": _from_arrow,
    ".txt": _from_text,
}
PACKABLE = (".json", ".jsonl", ".csv", ".tsv", ".txt")
"""Types that may be compressed as a whole; the others are so inside."""
