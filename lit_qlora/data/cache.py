"""Encoded sources, in memory or on disk, where the next run finds them again.

An entry of the cache is a folder with flat arrays, which are memory-mapped, and facts.json, which holds their sums. It
appears whole or not at all, and may be deleted at any time; lit_qlora.files.cache_folder deletes what is not used.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_qlora.data.encode import Counts, EncodedSample
from lit_qlora.data.samples import Samples
from lit_qlora.data.sources import sha256
from lit_qlora.errors import CheckpointError
from lit_qlora.files.atomic import publish
from lit_qlora.files.cache_folder import prune, use
from lit_qlora.files.reading import read_json

WORTH_KEEPING = 2**20  # tokens; fewer are encoded again in less than a second
FACTS = "facts.json"
AT_ONCE = 4096  # samples that become arrays together
Arrays = dict[str, npt.NDArray[Any]]
ARRAYS: dict[str, Any] = {
    "tokens": np.int32,
    "trained": np.bool_,
    "ends": np.int64,
    "labelled": np.int64,
    "lengths": np.int64,
    "digests": np.uint64,
    "joined": np.bool_,
    "sides": np.int8,
    "margins": np.float32,
    "weighted": np.int64,
    "weights": np.float32,
}
"""The last two are the tokens whose loss is multiplied by less than 1, and by what."""


@dataclass(frozen=True)
class Facts:
    """The facts about a source besides its samples."""

    source: str
    sha256: str
    format: str
    saw: str
    """The sign that the format was recognised by."""
    counts: Counts
    unread: dict[str, Any]
    """The contents that nobody reads; see Unread.facts."""


@dataclass(frozen=True)
class Encoded:
    """A source, encoded."""

    samples: Samples
    lengths: npt.NDArray[np.int64]
    """(S,) tokens of each sample before anything was cut."""
    digests: npt.NDArray[np.uint64]
    """(S,) hashes of what each sample says."""
    joined: npt.NDArray[np.bool_]
    """(S,) which samples are of the same conversation as the sample before them."""
    sides: npt.NDArray[np.int8]
    """(S,) of judged answers, see data.comparisons; 0 for other samples."""
    margins: npt.NDArray[np.float32]
    """(S,) of chosen answers, how much better they are."""
    facts: Facts
    cached: bool = False
    """True if it was found, not made."""

    @staticmethod
    def of(arrays: Arrays, facts: Facts, cached: bool = False) -> "Encoded":
        """A source of the arrays that collect makes."""
        ends = arrays["ends"]
        starts = np.concatenate([np.zeros(1, np.int64), ends[:-1]])[: len(ends)]
        weights = None
        if len(arrays["weighted"]):
            weights = arrays["trained"].astype(np.float32)
            weights[arrays["weighted"]] = arrays["weights"]
        samples = Samples(arrays["tokens"], arrays["trained"], starts, ends, arrays["labelled"], weights)
        lengths, digests, joined, sides, margins = (
            arrays[name] for name in ("lengths", "digests", "joined", "sides", "margins")
        )
        return Encoded(samples, lengths, digests, joined, sides, margins, facts, cached)


def load(directory: Path, key: str) -> Encoded | None:
    """The entry `key`, if there is one that is whole."""
    folder = directory / key
    use(folder)
    try:
        facts = read_json(folder / FACTS)
        arrays = {}
        for name, kind in ARRAYS.items():
            size, expected = facts["arrays"][name]
            file = folder / f"{name}.bin"
            if file.stat().st_size != size * np.dtype(kind).itemsize or sha256(file) != expected:
                return None
            arrays[name] = _mapped(file, name, size)
        said = facts["facts"]
        return Encoded.of(arrays, Facts(**said | {"counts": Counts(**said["counts"])}), cached=True)
    except (OSError, CheckpointError, ValueError, KeyError, TypeError, OverflowError):
        return None


def _mapped(file: Path | FileIO, name: str, size: int) -> npt.NDArray[Any]:
    """An array on disk; an empty file cannot be mapped."""
    return np.memmap(file, ARRAYS[name], "r", shape=(size,)) if size else np.zeros(0, ARRAYS[name])


class Store:
    """Takes the samples of a source one by one: in memory while they are few, then in the cache, if there is one.

    The folder is filled under another name and renamed at the end, so that whoever is killed leaves nothing that looks
    whole. Its files stay open and are what finish returns, so it may be deleted at any moment. Where it cannot be
    written, as on a full or read-only disk, everything stays in memory.

    Args:
        directory: of the cache; None if there is none.
        key: of the entry.
    """

    def __init__(self, directory: Path | None, key: str) -> None:
        self.directory, self.key = directory, key
        self.unfinished = directory / f"{key}.{os.getpid()}.unfinished" if directory else None
        self.pending: list[EncodedSample] = []
        self.chunks: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in ARRAYS}
        self.sizes = dict.fromkeys(ARRAYS, 0)
        self.written = dict.fromkeys(ARRAYS, 0)
        self.files: dict[str, FileIO] = {}

    def add(self, sample: EncodedSample) -> None:
        """Take one."""
        self.pending.append(sample)
        if len(self.pending) == AT_ONCE:
            self._flush()

    def finish(self, facts: Facts) -> Encoded:
        """All that was taken, and keep it where it is worth it."""
        if self.pending:
            self._flush()
        if self.files:
            self._guarded(self._publish, facts)
        if self.files:
            arrays: Arrays = {name: _mapped(file, name, self.sizes[name]) for name, file in self.files.items()}
        else:
            arrays = {
                name: np.concatenate([np.zeros(0, kind), *self.chunks.pop(name)]) for name, kind in ARRAYS.items()
            }
        return Encoded.of(arrays, facts)

    def close(self) -> None:
        """Let go of the files, and remove them unless they have become an entry."""
        for file in self.files.values():
            file.close()
        self.files.clear()
        if self.unfinished:
            shutil.rmtree(self.unfinished, ignore_errors=True)

    def _flush(self) -> None:
        """Make arrays of what is pending."""
        some, self.pending = self.pending, []
        lengths = [len(one.sample.tokens) for one in some]
        self._append_weights(some, self.sizes["tokens"] + np.cumsum([0, *lengths[:-1]], dtype=np.int64))
        self._append("joined", np.array([one.joined for one in some], np.bool_))
        self._append("sides", np.array([one.side for one in some], np.int8))
        self._append("margins", np.array([one.margin for one in some], np.float32))
        self._append("ends", self.sizes["tokens"] + np.cumsum(lengths, dtype=np.int64))
        self._append("tokens", np.concatenate([one.sample.tokens for one in some]))
        self._append("trained", np.concatenate([one.sample.trained for one in some]))
        self._append("labelled", np.array([one.sample.labelled for one in some], np.int64))
        self._append("lengths", np.array([one.length for one in some], np.int64))
        self._append("digests", np.array([one.digest for one in some], np.uint64))
        if self.unfinished and self.sizes["tokens"] >= WORTH_KEEPING:
            self._guarded(self._write)

    def _append_weights(self, some: Sequence[EncodedSample], starts: npt.NDArray[np.int64]) -> None:
        """Take what some tokens weigh, if it is not 1."""
        for one, start in zip(some, starts, strict=True):
            if one.sample.weights is not None:
                light = np.flatnonzero(one.sample.trained & (one.sample.weights != 1))
                self._append("weighted", start + light)
                self._append("weights", one.sample.weights[light])

    def _append(self, name: str, array: npt.NDArray[Any]) -> None:
        self.chunks[name].append(array)
        self.sizes[name] += len(array)

    def _write(self) -> None:
        """Move the arrays from memory to disk."""
        assert self.directory
        assert self.unfinished
        if not self.files:
            self.unfinished.mkdir(parents=True)
            for name in ARRAYS:  # unbuffered, so that what is counted as written is
                self.files[name] = FileIO(self.unfinished / f"{name}.bin", "w+")
        for name, chunks in self.chunks.items():
            while chunks:
                rest = memoryview(chunks[0].tobytes())
                while rest:
                    rest = rest[self.files[name].write(rest) :]
                self.written[name] += len(chunks.pop(0))

    def _publish(self, facts: Facts) -> None:
        """Make the entry appear."""
        assert self.directory
        assert self.unfinished
        self._write()
        arrays = {name: (self.sizes[name], sha256(self.unfinished / f"{name}.bin")) for name in ARRAYS}
        (self.unfinished / FACTS).write_text(json.dumps({"facts": asdict(facts), "arrays": arrays}))
        folder = self.directory / self.key
        publish(self.unfinished, folder)
        prune(self.directory, folder, FACTS)

    def _guarded(self, action: Callable[..., None], *arguments: Any) -> None:
        """Do something on disk; if that fails, go on in memory with what was written."""
        assert self.unfinished
        try:
            action(*arguments)
        except OSError:
            for name, file in self.files.items():
                if self.written[name]:
                    file.seek(0)
                    self.chunks[name].insert(0, np.fromfile(file, ARRAYS[name], self.written[name]))
                    self.written[name] = 0
            self.close()
            self.unfinished = None
