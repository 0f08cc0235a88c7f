"""Encoded sources, in memory or on disk, where the next run finds them again.

An entry of the cache is a folder with flat arrays, which are memory-mapped, and facts.json. It appears whole or not at
all, and may be deleted at any time.
"""

import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_qlora.data.encode import Counts, EncodedSample
from lit_qlora.data.samples import Samples

WORTH_KEEPING = 2**20  # tokens; fewer are encoded again in less than a second
FORGOTTEN = 86_400.0  # seconds after which an unfinished entry is nobody's any more
Arrays = dict[str, npt.NDArray[Any]]
ARRAYS: dict[str, Any] = {
    "tokens": np.int32,
    "trained": np.bool_,
    "ends": np.int64,
    "labelled": np.int64,
    "lengths": np.int64,
    "digests": np.uint64,
}


@dataclass(frozen=True)
class Facts:
    """What is known of a source besides its samples."""

    source: str
    sha256: str
    format: str
    saw: str
    """By what the format was recognised."""
    counts: Counts


@dataclass(frozen=True)
class Encoded:
    """A source, encoded."""

    samples: Samples
    lengths: npt.NDArray[np.int64]
    """(S,) tokens of each sample before anything was cut."""
    digests: npt.NDArray[np.uint64]
    """(S,) hashes of what each sample says."""
    facts: Facts
    cached: bool = False
    """Whether it was found, not made."""

    @staticmethod
    def of(arrays: Arrays, facts: Facts, cached: bool = False) -> "Encoded":
        """A source of the arrays that collect makes."""
        ends = arrays["ends"]
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        samples = Samples(arrays["tokens"], arrays["trained"], starts, ends, arrays["labelled"])
        return Encoded(samples, arrays["lengths"], arrays["digests"], facts, cached)


def directory(setting: str) -> Path | None:
    """Where the cache is, for a data.cache_dir; None if there is to be none."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_qlora" / "data"


def collect(samples: Iterable[EncodedSample]) -> Arrays:
    """The arrays of a source, in chunks, so that no more than its ids are ever held."""
    chunks: dict[str, list[npt.NDArray[Any]]] = {name: [np.zeros(0, kind)] for name, kind in ARRAYS.items()}
    end = 0

    def flush(pending: list[EncodedSample]) -> None:
        nonlocal end
        ends = end + np.cumsum([len(one.sample.tokens) for one in pending], dtype=np.int64)
        end = int(ends[-1])
        chunks["tokens"].append(np.concatenate([one.sample.tokens for one in pending]))
        chunks["trained"].append(np.concatenate([one.sample.trained for one in pending]))
        chunks["ends"].append(ends)
        chunks["labelled"].append(np.array([one.sample.labelled for one in pending], np.int64))
        chunks["lengths"].append(np.array([one.length for one in pending], np.int64))
        chunks["digests"].append(np.array([one.digest for one in pending], np.uint64))

    pending: list[EncodedSample] = []
    for one in samples:
        pending.append(one)
        if len(pending) == 4096:
            flush(pending)
            pending = []
    if pending:
        flush(pending)
    return {name: np.concatenate(chunks.pop(name)) for name in ARRAYS}


def load(directory: Path, key: str) -> Encoded | None:
    """The entry `key`, if there is one that is whole."""
    folder = directory / key
    try:
        facts = json.loads((folder / "facts.json").read_text())
        arrays = {}
        for name, kind in ARRAYS.items():
            size = facts["sizes"][name]
            file = folder / f"{name}.bin"
            if file.stat().st_size != size * np.dtype(kind).itemsize:
                return None
            arrays[name] = np.memmap(file, kind, "r", shape=(size,)) if size else np.zeros(0, kind)
        said = facts["facts"]
        return Encoded.of(arrays, Facts(**said | {"counts": Counts(**said["counts"])}), cached=True)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save(directory: Path, key: str, arrays: Arrays, facts: Facts) -> None:
    """Keep an entry. Where that is impossible, as on a full or read-only disk, nothing is kept.

    The folder is filled under another name and renamed, so that whoever is killed leaves nothing that looks whole.
    """
    folder, unfinished = directory / key, directory / f"{key}.{os.getpid()}.unfinished"
    sizes = {name: len(array) for name, array in arrays.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _forget(directory)
        unfinished.mkdir()
        for name, array in arrays.items():
            with open(unfinished / f"{name}.bin", "wb") as file:
                array.tofile(file)
                file.flush()
                os.fsync(file.fileno())
        with open(unfinished / "facts.json", "w") as text:
            json.dump({"facts": asdict(facts), "sizes": sizes}, text)
            text.flush()
            os.fsync(text.fileno())
        if load(directory, key) is None:
            shutil.rmtree(folder, ignore_errors=True)  # if there is one, it is damaged
        unfinished.rename(folder)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)


def _forget(directory: Path) -> None:
    """Remove what runs that were killed have left."""
    for folder in directory.glob("*.unfinished"):
        if time.time() - folder.stat().st_mtime > FORGOTTEN:
            shutil.rmtree(folder, ignore_errors=True)
