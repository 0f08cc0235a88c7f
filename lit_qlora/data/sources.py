"""Where records come from: files of several kinds, directories, and data sets of the Hugging Face hub."""

import codecs
import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lit_qlora.errors import DataError, did_you_mean

HUB = "hf:"
VAL_SPLITS = ("validation", "val", "valid", "dev")  # what hub data sets call the part that is held out

Record = tuple[str, Any]
"""(place, content); the content of a record that cannot be read is a DataError that says why."""


@dataclass(frozen=True)
class Source:
    """A file, or a split of a hub data set."""

    path: str
    """As it was given, without a number of times; for a directory, the file in it."""
    split: str = ""
    """Of a hub data set."""
    times: float = 1.0
    """How often an epoch sees each sample."""

    def __str__(self) -> str:
        return f"{self.path} ({self.split})" if self.split else self.path


def find_sources(paths: Iterable[str], val_path: str | None) -> tuple[list[Source], Source | None]:
    """What data.path and data.val_path name: training sources, and the source to validate on.

    A directory or hub data set has a validation part of its own; the first such part is taken unless val_path is given.

    Raises:
        DataError: if a file is absent, or a directory holds no training file or more than one.
    """
    train: list[Source] = []
    val: list[Source] = []
    for text in paths:
        path, times = _times(text)
        if path.startswith(HUB):
            splits = _hub_splits(path)
            train.append(Source(path, "train" if "train" in splits else splits[0], times))
            val += [Source(path, name) for name in VAL_SPLITS if name in splits]
            continue
        if not Path(path).exists():
            near = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
            raise DataError(f"data.path {path} does not exist.{did_you_mean(Path(path).name, near)}")
        if Path(path).is_dir():
            own_train, own_val = _only_one(Path(path), "train"), _only_one(Path(path), "val")
            if own_train is None:
                names = ", ".join(f"train{suffix}" for suffix in READERS)
                raise DataError(f"{path} holds no training file: none of {names}.")
            path = own_train
            val += [Source(own_val)] if own_val else []
        train.append(Source(_readable(path), times=times))
    if val_path is not None and val_path.startswith(HUB):
        return train, Source(val_path, _hub_splits(val_path)[0])
    if val_path is not None:
        if not Path(val_path).is_file():
            raise DataError(f"data.val_path {val_path} is not a file.")
        return train, Source(_readable(val_path))
    return train, val[0] if val else None


def find_file(path: Path) -> Source:
    """A file as a source.

    Raises:
        DataError: if it is absent or of a type that cannot be read.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise DataError(f"{path} does not exist.{did_you_mean(path.name, beside)}")
    return Source(_readable(str(path)))


def fingerprint(source: Source) -> str:
    """Sha256 of the source's content."""
    if source.split:
        digest = hashlib.sha256()
        for file in _hub_split(source).cache_files:
            with open(file["filename"], "rb") as arrow:
                digest.update(hashlib.file_digest(arrow, "sha256").digest())
        return digest.hexdigest()
    with open(source.path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_records(source: Source) -> Iterable[Record]:
    """All records of a source, with their places; blank lines and a byte-order mark are no errors.

    Raises:
        DataError: if the source as a whole cannot be read.
    """
    if source.split:
        return ((f"{source}: row {i}", row) for i, row in enumerate(_hub_split(source), start=1))
    return READERS[Path(source.path).suffix](Path(source.path))


def _times(text: str) -> tuple[str, float]:
    """'a.jsonl*0.5' -> ('a.jsonl', 0.5)."""
    path, mark, number = text.rpartition("*")
    if not mark:
        return text, 1.0
    try:
        times = float(number)
    except ValueError:
        times = 0.0
    if not 0 < times < 1e6:
        raise DataError(f"data.path {text}: {number!r} is not how often; write e.g. {path or 'a.jsonl'}*0.5.")
    return path, times


def _readable(path: str) -> str:
    suffix = Path(path).suffix
    if suffix not in READERS:
        hint = " Decompress it first." if suffix in (".gz", ".zip", ".bz2", ".xz", ".zst") else ""
        raise DataError(f"{path}: files of type {suffix!r} cannot be read.{hint} Known: {', '.join(READERS)}.")
    return path


def _only_one(directory: Path, stem: str) -> str | None:
    found = [directory / f"{stem}{suffix}" for suffix in READERS if (directory / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{directory} holds several {stem} files: {', '.join(p.name for p in found)}. Name one.")
    return str(found[0]) if found else None


# Text is read a piece at a time: as one string, a gigabyte of it with a single emoji takes four.


def _pieces(path: Path, size: int = 2**22) -> Iterator[str]:
    """The text of a file, in pieces of some `size` bytes."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        _refuse_by_beginning(path, file.peek(2)[:2])
        try:
            while content := file.read(size):
                yield decoder.decode(content)
            yield decoder.decode(b"", final=True)
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file; only a newline ends one, other separators are text."""
    with open(path, "rb") as file:
        _refuse_by_beginning(path, file.peek(2)[:2])
        try:
            for number, line in enumerate(file):
                yield line.decode("utf-8-sig" if number == 0 else "utf-8")
        except UnicodeDecodeError:
            raise _not_utf8(path) from None


def _refuse_by_beginning(path: Path, beginning: bytes) -> None:
    if beginning in (b"\xff\xfe", b"\xfe\xff"):
        raise DataError(f"{path} looks like UTF-16. Save it as UTF-8.")
    if beginning == b"\x1f\x8b":
        raise DataError(f"{path} is compressed with gzip. Decompress it first.")


def _not_utf8(path: Path) -> DataError:
    content = path.read_bytes()
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        byte = f"byte 0x{content[error.start]:02x}"
        return DataError(f"{path}:{line}: {byte} is not UTF-8 (column {column}). Save the file as UTF-8.")
    return DataError(f"{path} changed while it was read.")


# JSON. What the format allows and no data set means is refused: NaN and Infinity, and a key that stands twice.


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
        self.path, self.pieces = path, _pieces(path)
        self.text, self.at, self.complete = "", 0, False
        self.line, self.line_start = 1, 0  # of what was counted so far; the start can lie before the text that is kept
        self.counted = 0

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
                if end < len(self.text) or not self._more():  # else a number could go on
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more():
                    raise self.refusal(error.msg, error.pos) from None
            except (ValueError, RecursionError) as error:
                raise self.refusal(str(error)) from None

    def place(self, at: int | None = None) -> tuple[int, int]:
        """Line and column of a position, by default of the next character; positions may only grow."""
        at = self.at if at is None else at
        self.line += self.text.count("\n", self.counted, at)
        last = self.text.rfind("\n", self.counted, at)
        self.line_start = last + 1 if last >= 0 else self.line_start
        self.counted = at
        return self.line, at - self.line_start + 1

    def refusal(self, reason: str, at: int | None = None) -> DataError:
        """What to raise."""
        line, column = self.place(at)
        return DataError(f"{self.path}:{line}: not valid JSON: {reason} at column {column}.")

    def _more(self) -> bool:
        """Read on; False at the end of the file."""
        if self.complete:
            return False
        self.place()
        piece = next(self.pieces, None)
        self.complete = piece is None
        self.text = self.text[self.at :] + (piece or "")
        self.line_start, self.counted, self.at = self.line_start - self.at, 0, 0
        return not self.complete


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
        line, number = source.place()[0], number + 1
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
    line, first = source.place()[0], source.peek()
    content = source.value()
    if source.peek():
        if first != "{":
            raise source.refusal("Extra data")
        yield from _from_jsonl(source.path)
        return
    lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
    if lists and "messages" not in lists and not any(isinstance(value, str) for value in content.values()):
        hint = f"Did you mean the list under {lists[0]!r}? Save that alone."
        raise DataError(f"{source.path}: expected a list of samples, found an object. {hint}")
    if not isinstance(content, dict | DataError):
        raise DataError(f"{source.path}: expected a list of samples, found {type(content).__name__}.")
    yield f"{source.path}:{line}: sample 1", content


def _from_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record: Any = _DECODER.decode(line)
        except json.JSONDecodeError as error:
            record = DataError(f"not valid JSON: {error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            record = DataError(f"not valid JSON: {error}")
        yield f"{path}:{number}", record


# Tables and text.


def _from_table(path: Path, delimiter: str) -> Iterator[Record]:
    reader = csv.reader(_lines(path), delimiter=delimiter, strict=True)
    line = 1  # where the record begins, which can be several lines before its end
    try:
        header = next((row for row in reader if "".join(row).strip()), [])
        if len(header) == 1:
            others = [mark for mark in ",;\t|" if mark in header[0]]
            if others:
                hint = f"Is it delimited by {others[0]!r}? Save it with {'commas' if delimiter == ',' else 'tabs'}."
                raise DataError(f"{path}:{reader.line_num}: there is one column only ({header[0]}). {hint}")
        line = reader.line_num + 1
        for row in reader:
            if "".join(row).strip():  # else it is blank
                wrong = DataError(f"has {len(row)} columns, the header {len(header)}")
                yield f"{path}:{line}", dict(zip(header, row, strict=False)) if len(row) == len(header) else wrong
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not valid CSV: {error}. Is a quotation mark unclosed?") from None


def _from_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}: row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path} is not a Parquet file: {str(error).splitlines()[0]}") from None


def _from_text(path: Path) -> Iterator[Record]:
    text = "".join(_pieces(path))
    if text.strip():
        yield str(path), {"text": text}


READERS: dict[str, Callable[[Path], Iterator[Record]]] = {
    ".json": _from_json,
    ".jsonl": _from_jsonl,
    ".csv": partial(_from_table, delimiter=","),
    ".tsv": partial(_from_table, delimiter="\t"),
    ".parquet": _from_parquet,
    ".txt": _from_text,
}


# The hub, through the library datasets, which keeps what it has downloaded and obeys HF_HUB_OFFLINE.


def _hub_splits(path: str) -> list[str]:
    return list(_hub(path))


def _hub_split(source: Source) -> Any:
    return _hub(source.path)[source.split]


def _hub(path: str) -> Any:
    """All splits of hf:ORG/NAME or hf:ORG/NAME:CONFIG."""
    name, _, config = path.removeprefix(HUB).partition(":")
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} needs the library datasets: pip install datasets.") from None
    try:
        return datasets.load_dataset(name, config or None)
    except Exception as error:  # the library raises some twenty kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path} cannot be loaded: {reason}\nIf this machine is offline, load it once where there is a network "
            "and copy the cache (HF_HOME), or give a file."
        ) from None
