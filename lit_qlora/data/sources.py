"""Sources of records: files of several kinds, folders, patterns, and data sets of the Hugging Face hub or saved."""

import hashlib
import re
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache
from glob import glob, has_magic
from itertools import chain
from pathlib import Path
from typing import Any

from lit_qlora.data.hub_sets import HUB_SETS, HubSet, find_hub_set
from lit_qlora.data.readers import PACKABLE, READERS, Record, describe
from lit_qlora.data.text_files import PACKED, kind_of
from lit_qlora.errors import DataError, did_you_mean
from lit_qlora.files.atomic import recover_files
from lit_qlora.files.reading import read_json

HUB = "hf:"
VAL_SPLITS = ("validation", "val", "valid", "dev")  # names that hub data sets give to the part that is held out


@dataclass(frozen=True)
class Source:
    """A file, several files together, or a split of a hub data set."""

    path: str
    """As it was given, without a number of times; for a folder with a training file, that file."""
    split: str = ""
    """Of a hub data set."""
    times: float = 1.0
    """Times that an epoch sees each sample."""
    several: tuple[str, ...] = ()
    """The files, if `path` stands for more than one."""

    def __str__(self) -> str:
        known = self._known
        where = f"{HUB}{known.repo}, {self.split}" if known else self.split
        return f"{self.path} ({where})" if self.split else self.path

    @property
    def files(self) -> list[Path]:
        """The files; none of a hub data set."""
        return [] if self.split else [Path(file) for file in self.several or (self.path,)]

    def saw(self) -> str:
        """Say how the files are delimited, encoded and counted, unless all of it is as usual; each part after '; '."""
        found = dict.fromkeys(said for file in self.files if (said := describe(file)))
        count = f"{len(self.several)} files" if self.several else ""
        return "".join(f"; {said}" for said in (*found, count) if said)

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

    A folder or hub data set may have a validation part of its own; the first such part is taken unless val_path is
    given. `~` is the home folder.

    Raises:
        DataError: if a file is absent, or a folder or pattern holds none, or none that can be read.
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
        own_train, own_val = _find(path, "data.path")
        train.append(replace(own_train, times=times))
        val += own_val
    if val_path is not None and is_hub(val_path):
        splits = list(_hub(val_path))
        return train, Source(val_path, next((name for name in (*VAL_SPLITS, "test") if name in splits), splits[0]))
    if val_path is not None:
        whole, own = _find(val_path, "data.val_path")
        return train, own[0] if own else whole
    return train, val[0] if val else None


def _find(text: str, setting: str) -> tuple[Source, list[Source]]:
    """The source that a path or a pattern stands for, and what it holds to validate on."""
    path = Path(text).expanduser()
    _put_back(path)
    if path.is_dir():
        return _in_folder(path, setting)
    if path.exists():
        return Source(_readable(str(path))), []
    if has_magic(text):
        files = [Path(name) for name in sorted(glob(str(path), recursive=True)) if Path(name).is_file()]
        if not files:
            raise DataError(f"{setting} {text} matches no file.")
        return _together(str(path), files), []
    near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    names = "" if set("/.") & set(text) else f"\nData sets known by name: {', '.join(HUB_SETS)}."
    known = [*near, *(HUB_SETS if names else ())]
    hint = did_you_mean(path.name, known) or _on_the_hub(text)
    raise DataError(f"{setting} {text} does not exist.{hint}{names}")


def _together(path: str, files: Sequence[Path]) -> Source:
    """Several files as one source."""
    several = tuple(_readable(str(file)) for file in files)
    return Source(path, several=several) if several[1:] else Source(several[0])


SAVED, SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that the library datasets writes beside the data of a split, and beside the folders of several."""
PARTS = re.compile(r"(train|validation|valid|val|dev|test)(?![a-z])")
"""Matches the beginning of a file's name that tells which part of a data set it holds."""


def _in_folder(folder: Path, setting: str) -> tuple[Source, list[Source]]:
    """The source that a folder stands for, and what it holds to validate on.

    That is, in this order: a data set that the library datasets saved; one train file and one val file; files whose
    names begin with a part, such as train-00001-of-00004.parquet; all files.
    """
    if (folder / SAVED_SPLITS).is_file():
        names = [str(name) for name in _list(folder / SAVED_SPLITS, "splits")]
        found = {name: _saved(folder / name) for name in names if (folder / name / SAVED).is_file()}
        return _by_part(folder, found)
    if (folder / SAVED).is_file():
        return _saved(folder), []
    train, val = _only_one(folder, "train"), _only_one(folder, "val")
    if train:
        return Source(train), [Source(val)] if val else []
    files = sorted(file for file in folder.iterdir() if file.is_file() and _is_readable(file))
    parts: dict[str, list[Path]] = {}
    for file in files:
        parts.setdefault(part[1] if (part := PARTS.match(file.name.lower())) else "", []).append(file)
    if "" not in parts and parts:
        return _by_part(folder, {name: _together(f"{folder}/{name}*", some) for name, some in parts.items()})
    if not files:
        raise DataError(f"{setting} {folder} holds no file of a type that can be read: {', '.join(READERS)}.")
    return _together(str(folder), files), []


def _by_part(folder: Path, parts: dict[str, Source]) -> tuple[Source, list[Source]]:
    if "train" not in parts:
        raise DataError(f"{folder} has no part train, but {', '.join(parts) or 'none'}. Name the file or folder.")
    return parts["train"], [parts[name] for name in VAL_SPLITS if name in parts][:1]


def _saved(folder: Path) -> Source:
    """A split that save_to_disk of the library datasets has written."""
    files = _list(folder / SAVED, "_data_files")
    names = [str(file.get("filename")) for file in files if isinstance(file, dict)]
    if not names or len(names) < len(files) or any(Path(name).name != name for name in names):
        raise DataError(f"{folder / SAVED} names no files of its folder.")
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise DataError(f"{folder} is incomplete: {missing[0]} is missing.")
    return Source(str(folder), several=tuple(_readable(str(folder / name)) for name in names))


def _on_the_hub(path: str) -> str:
    """Return ' On the hub: hf:ORG/NAME' for a path that may be meant so, else ''."""
    return f" On the hub: hf:{path}" if ORG_AND_NAME(path) and kind_of(path) not in READERS else ""


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
    if source.several:
        return hashlib.sha256("".join(map(sha256, source.files)).encode()).hexdigest()
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
    return chain.from_iterable(READERS[kind_of(file)](file) for file in source.files)


def _times(text: str) -> tuple[str, float]:
    """'a.jsonl*0.5' -> ('a.jsonl', 0.5)."""
    path, mark, number = text.rpartition("*")
    if not mark:
        return text, 1.0
    try:
        times = float(number)
    except ValueError:
        if (
            glob(str(Path(text).expanduser()), recursive=True)
            or f"/{path}".endswith("/")
            or kind_of(f"x{number}") in READERS
        ):
            return text, 1.0  # the star is of a pattern
        times = 0.0
    if not 0 < times < 1e6:
        raise DataError(f"data.path {text}: {number!r} is not how often; write e.g. {path or 'a.jsonl'}*0.5.")
    return path, times


def _readable(path: str) -> str:
    if not _is_readable(Path(path)):
        suffix = "".join(Path(path).suffixes[-2:]) if Path(path).suffix in PACKED else Path(path).suffix
        packed = Path(path).suffix.lower() in (*PACKED, ".zip", ".7z", ".tgz")
        hint = " Decompress it first." if packed else ""
        raise DataError(f"{path}: files of type {suffix.lower()!r} cannot be read.{hint} Known: {', '.join(READERS)}.")
    return path


def _is_readable(path: Path) -> bool:
    return kind_of(path) in (PACKABLE if path.suffix.lower() in PACKED else READERS)


def _only_one(folder: Path, stem: str) -> str | None:
    names = [f"{stem}{suffix}{packed}" for suffix in READERS for packed in ("", *PACKED)]
    found = [folder / name for name in names if (folder / name).is_file() and _is_readable(folder / name)]
    if len(found) > 1:
        raise DataError(f"{folder} holds several {stem} files: {', '.join(p.name for p in found)}. Name one.")
    return str(found[0]) if found else None


def _list(path: Path, key: str) -> list[Any]:
    """A list in a JSON object; empty if there is none."""
    value = read_json(path, DataError).get(key)
    return value if isinstance(value, list) else []


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
