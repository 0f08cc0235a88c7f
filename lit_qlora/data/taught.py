"""Samples with what a teacher holds likely at their labelled tokens, kept beside the encoded data.

An entry of the cache is a folder with a file for each part of the samples. A part appears whole or not at all, so that
a run that was stopped goes on with the parts that are missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from lit_qlora.data.samples import Likely, Sample, Samples
from lit_qlora.files import cache_folder
from lit_qlora.files.atomic import replacing, write_text

FACTS = "facts.json"
PART = 2**16  # labelled tokens of a part, about
VERSION = 1  # of how they are computed
SUM = hashlib.sha256().digest_size


class TaughtSamples(Samples):
    """Samples that carry what a teacher holds likely.

    Args:
        parts: of the samples, one after another.
    """

    def __init__(self, samples: Samples, parts: Sequence[Likely]) -> None:
        super().__init__(
            samples.tokens, samples.trained, samples.starts, samples.ends, samples.labelled, samples.weights
        )
        self.parts = parts
        self.first_rows = np.cumsum([0, *(len(part.ids) for part in parts)], dtype=np.int64)
        self.rows = np.concatenate([np.zeros(1, np.int64), np.cumsum(samples.labelled, dtype=np.int64)])

    def _one(self, index: int) -> Sample:
        sample, row = super()._one(index), int(self.rows[index])
        number = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        first = row - int(self.first_rows[number])
        here = slice(first, first + int(self.labelled[index]))
        part = self.parts[number]
        return sample._replace(likely=Likely(part.ids[here], part.log_probs[here]))


def untaught(samples: Samples, top_k: int) -> TaughtSamples:
    """The samples as if a teacher had said nothing yet, in no memory; a dry run takes as long with them."""
    count = int(samples.labelled.sum())
    ids = np.broadcast_to(np.arange(top_k, dtype=np.int32), (count, top_k))
    flat = np.broadcast_to(np.float32(-np.log(top_k + 1)), (count, top_k + 1))
    return TaughtSamples(samples, [Likely(ids, flat)])


def parts_of(samples: Samples) -> list[range]:
    """The samples of each part."""
    ends = np.cumsum(samples.labelled)
    bounds = [0]
    while bounds[-1] < len(samples):
        before = int(ends[bounds[-1] - 1]) if bounds[-1] else 0
        bounds.append(max(bounds[-1] + 1, int(np.searchsorted(ends, before + PART, side="right"))))
    return [range(first, end) for first, end in pairwise(bounds)]


def key_of(samples: Samples, facts: Mapping[str, Any]) -> str:
    """The name of the entry for these samples and a teacher with these facts."""
    digest = hashlib.sha256(json.dumps([VERSION, PART, dict(facts)], sort_keys=True).encode())
    for array in (samples.tokens, samples.trained, samples.starts, samples.ends):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


class Entry:
    """The entry of some samples; nothing is found or kept without a cache, or where its folder cannot be written.

    Args:
        setting: data.cache_dir.
        key: see key_of.
        top_k: tokens that are known of each labelled one.
    """

    def __init__(self, setting: str, key: str, top_k: int) -> None:
        directory = cache_folder.directory(setting, "data")
        self.folder: Path | None = None if directory is None else directory / key
        self.top_k = top_k

    def find(self, number: int, count: int) -> Likely | None:
        """Part `number` of `count` labelled tokens, if it is there and whole."""
        if self.folder is None:
            return None
        cache_folder.use(self.folder)
        path, size = self._path(number), count * (2 * self.top_k + 1) * 4
        try:
            if path.stat().st_size != size + SUM:
                return None
            whole = np.memmap(path, np.uint8, "r")
        except OSError:
            return None
        if hashlib.sha256(whole[:size].data).digest() != whole[size:].tobytes():
            return None
        middle = count * self.top_k * 4
        ids, log_probs = whole[:middle].view(np.int32), whole[middle:size].view(np.float32)
        return Likely(ids.reshape(count, -1), log_probs.reshape(count, -1))

    def keep(self, number: int, likely: Likely, facts: Mapping[str, Any]) -> Likely:
        """Write a part; what is returned takes no memory if that went well."""
        if self.folder is None:
            return likely
        content = likely.ids.astype(np.int32).tobytes() + likely.log_probs.astype(np.float32).tobytes()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / FACTS).is_file():
                write_text(self.folder / FACTS, json.dumps(dict(facts)) + "\n")
            with replacing(self._path(number)) as path:
                path.write_bytes(content + hashlib.sha256(content).digest())
            cache_folder.prune(self.folder.parent, self.folder, FACTS)
        except OSError:
            return likely
        return self.find(number, len(likely.ids)) or likely

    def _path(self, number: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{number:05}.bin"
