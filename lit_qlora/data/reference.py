"""Log-probabilities of answers before training, kept beside the encoded data, so that a next run finds them."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from typing import Any

import numpy as np

from lit_qlora.data.comparisons import Comparisons, Floats
from lit_qlora.data.sources import sha256
from lit_qlora.errors import CheckpointError
from lit_qlora.files import cache_folder
from lit_qlora.files.atomic import publish
from lit_qlora.files.reading import read_json

FACTS, VALUES = "facts.json", "values.bin"
VERSION = 1  # of how they are computed


def key_of(comparisons: Comparisons, facts: Mapping[str, Any]) -> str:
    """The name of the entry for these answers and a model with these facts."""
    digest = hashlib.sha256(json.dumps([VERSION, comparisons.layout.tail, dict(facts)], sort_keys=True).encode())
    samples = comparisons.samples
    for array in (samples.tokens, samples.trained, samples.starts, samples.ends, comparisons.bounds):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def find(setting: str, key: str, count: int) -> Floats | None:
    """The values of `count` answers, if there is an entry that is whole.

    Args:
        setting: data.cache_dir.
    """
    directory = cache_folder.directory(setting, "data")
    if directory is None:
        return None
    folder = directory / key
    cache_folder.use(folder)
    try:
        values = np.fromfile(folder / VALUES, np.float32)
        whole = read_json(folder / FACTS, CheckpointError)["sha256"] == sha256(folder / VALUES)
    except (OSError, CheckpointError, KeyError, TypeError):
        return None
    return values if whole and len(values) == count else None


def keep(setting: str, key: str, values: Floats) -> None:
    """Make an entry; where it cannot be written, nothing is kept."""
    directory = cache_folder.directory(setting, "data")
    if directory is None:
        return
    unfinished = directory / f"{key}.{os.getpid()}.unfinished"
    try:
        unfinished.mkdir(parents=True)
        values.astype(np.float32).tofile(unfinished / VALUES)
        (unfinished / FACTS).write_text(json.dumps({"sha256": sha256(unfinished / VALUES)}))
        publish(unfinished, directory / key)
        cache_folder.prune(directory, directory / key, FACTS)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
