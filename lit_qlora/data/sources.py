"""Sources of records: files of several kinds, directories, and data sets of the Hugging Face hub."""

import hashlib
import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lit_qlora.data.hub_sets import HUB_SETS, HubSet, find_hub_set
from lit_qlora.data.readers import READERS, Record
from lit_qlora.errors import DataError, did_you_mean
from lit_qlora.files.atomic import recover_files

HUB = "hf:"
VAL_SPLITS = ("validation", "val", "valid", "dev")  # names that hub data sets give to the part that is held out


@dataclass(frozen=True)
class Source:
    """A file, or a split of a hub data set."""

    path: str
    """As it was given, without a number of times; for a directory, the file in it."""
    split: str = ""
    """Of a hub data set."""
    times: float = 1.0
    """Times that an epoch sees each sample."""

    def __str__(self) -> str:
        known = self._known
        where = f"{HUB}{known.repo}, {self.split}" if known else self.split
        return f"{self.path} ({where})" if self.split else self.path

    @property
    def format(self) -> str:
        """Format of the records where the name of the data set tells it, else 'auto'."""
        return self._known.format if self._known else "auto"

    @property
    def _known(self) -> HubSet | None:
        return find_hub_set(self.path) if self.split else None


ORG_AND_NAME = re.compile(r"[\w.-]+/[\w-][\w.-]*").fullmatch
"""Matches the name of a data set of the hub, and of a file in a folder."""
TRAIN, RECORD, REPORT = "train.jsonl", "prepared.json", "report.md"
BESIDE_TRAIN = ("val.jsonl", RECORD, REPORT)
"""Files of prepared data besides TRAIN, which says that they are complete. RECORD names the checkpoint."""


def find_sources(paths: Iterable[str], val_path: str | None) -> tuple[list[Source], Source | None]:
    """Find the sources that data.path and data.val_path name: training sources, and the source to validate on.

    A directory or hub data set has a validation part of its own; the first such part is taken unless val_path is given.

    Raises:
        DataError: if a file is absent, or a directory holds no training file or more than one.
    """
    train: list[Source] = []
    val: list[Source] = []
    for text in paths:
        path, times = _times(text)
        if is_hub(path):
            splits = list(_hub(path))
            train.append(Source(path, "train" if "train" in splits else splits[0], times))
            val += [Source(path, name) for name in VAL_SPLITS if name in splits and name != train[-1].split]
            continue
        _put_back(Path(path))
        if not Path(path).exists():
            near = [p.name for p in Path(path).parent.iterdir()] if Path(path).parent.is_dir() else []
            names = "" if set("/.") & set(path) else f"\nData sets known by name: {', '.join(HUB_SETS)}."
            known = [*near, *(HUB_SETS if names else ())]
            hint = did_you_mean(Path(path).name, known) or _on_the_hub(path)
            raise DataError(f"data.path {path} does not exist.{hint}{names}")
        if Path(path).is_dir():
            own_train, own_val = _only_one(Path(path), "train"), _only_one(Path(path), "val")
            if own_train is None:
                names = ", ".join(f"train{suffix}" for suffix in READERS)
                raise DataError(f"{path} holds no training file: none of {names}.")
            path = own_train
            val += [Source(own_val)] if own_val else []
        train.append(Source(_readable(path), times=times))
    if val_path is not None and is_hub(val_path):
        splits = list(_hub(val_path))
        return train, Source(val_path, next((name for name in (*VAL_SPLITS, "test") if name in splits), splits[0]))
    if val_path is not None:
        if not Path(val_path).is_file():
            raise DataError(f"data.val_path {val_path} is not a file.")
        return train, Source(_readable(val_path))
    return train, val[0] if val else None


def _on_the_hub(path: str) -> str:
    """Return ' On the hub: hf:ORG/NAME' for a path that may be meant so, else ''."""
    return f" On the hub: hf:{path}" if ORG_AND_NAME(path) and Path(path).suffix not in READERS else ""


def is_hub(path: str) -> bool:
    """Tell if a path names a data set of the hub: hf:ORG/NAME, or a name of HUB_SETS."""
    return path.startswith(HUB) or find_hub_set(path) is not None


def _put_back(path: Path) -> None:
    """Put back the prepared data that a preparation had moved aside when it was killed."""
    folder = path if path.is_dir() else path.parent
    if folder.is_dir() and not (folder / TRAIN).exists():
        with suppress(OSError):  # what is missing is named then
            recover_files(folder, TRAIN, BESIDE_TRAIN)


def find_file(path: Path) -> Source:
    """A file as a source.

    Raises:
        DataError: if it is absent or of a type that cannot be read.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        if path.is_dir():
            raise DataError(f"{path} is a folder. Name a file.")
        raise DataError(f"{path} does not exist.{did_you_mean(path.name, beside)}")
    return Source(_readable(str(path)))


def fingerprint(source: Source) -> str:
    """Sha256 of the source's content."""
    if source.split:
        digest = hashlib.sha256()
        for file in _hub_split(source).cache_files:
            digest.update(sha256(Path(file["filename"])).encode())
        return digest.hexdigest()
    return sha256(Path(source.path))


def sha256(path: Path) -> str:
    """Of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_records(source: Source) -> Iterable[Record]:
    """All records of a source, with their locations; blank lines and a byte-order mark are no errors.

    Raises:
        DataError: if the source as a whole cannot be read.
    """
    if source.split:
        return ((f"{source}: row {i}", row) for i, row in enumerate(_hub_split(source), start=1))
    return READERS[Path(source.path).suffix.lower()](Path(source.path))


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
        if Path(f"*{number}").suffix in READERS:
            raise DataError(f"data.path {text}: patterns are not expanded. Name the files, e.g. [a.jsonl,b.jsonl].")
        raise DataError(f"data.path {text}: {number!r} is not how often; write e.g. {path or 'a.jsonl'}*0.5.")
    return path, times


def _readable(path: str) -> str:
    suffix = Path(path).suffix.lower()
    if suffix not in READERS:
        hint = " Decompress it first." if suffix in (".gz", ".zip", ".bz2", ".xz", ".zst") else ""
        raise DataError(f"{path}: files of type {suffix!r} cannot be read.{hint} Known: {', '.join(READERS)}.")
    return path


def _only_one(directory: Path, stem: str) -> str | None:
    found = [directory / f"{stem}{suffix}" for suffix in READERS if (directory / f"{stem}{suffix}").is_file()]
    if len(found) > 1:
        raise DataError(f"{directory} holds several {stem} files: {', '.join(p.name for p in found)}. Name one.")
    return str(found[0]) if found else None


# The hub, through the library datasets, which keeps what it has downloaded and obeys HF_HUB_OFFLINE.


def _hub_split(source: Source) -> Any:
    return _hub(source.path)[source.split]


@cache
def _hub(path: str) -> Any:
    """All splits of hf:ORG/NAME or hf:ORG/NAME:CONFIG, or of a data set that is known by name."""
    name, _, config = path.removeprefix(HUB).partition(":")
    known = find_hub_set(path)
    arguments = known.arguments if known else {}
    if known:
        name, path = known.repo, f"{path} ({HUB}{known.repo})"
    try:
        import datasets
    except ImportError:
        raise DataError(f"{path} needs the library datasets: pip install datasets.") from None
    try:
        return datasets.load_dataset(name, config or None, **arguments)
    except Exception as error:  # the library raises some twenty kinds
        reason = str(error).strip().partition("\n")[0]
        raise DataError(
            f"{path} cannot be loaded: {reason}\nIf this machine is offline, load it once where there is a network "
            "and copy the cache (HF_HOME), or give a file."
        ) from None
