"""Samples that a run leaves out of training, named by a hash in a file that scripts/review_data.py writes."""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

from lit_qlora.data.samples import Sample
from lit_qlora.errors import DataError
from lit_qlora.files.reading import read_text

HASH = re.compile(r"[0-9a-f]{16}")


def hash_of(*samples: Sample) -> str:
    """Hash the ids of a sample, or of all answers of a comparison.

    Another prompt style or limit of length gives another hash.
    """
    return hashlib.blake2b(b"".join(sample.tokens.tobytes() for sample in samples), digest_size=8).hexdigest()


def read_hashes(path: Path) -> dict[str, bool]:
    """Read the hashes in a file: the first word of each line that is neither empty nor begins with #.

    Returns:
        Hash -> True where each of its lines says that it repeats itself: copies go, and the first of them stays.

    Raises:
        DataError: if the file cannot be read, or a line begins with something else.
    """
    hashes: dict[str, bool] = {}
    try:
        lines = read_text(path, DataError).splitlines()
    except OSError as error:
        raise DataError(f"data.exclude {path} cannot be read: {error.strerror}.") from None
    for number, line in enumerate(lines, start=1):
        word, *more = line.split(maxsplit=3) or ["#"]
        if word.startswith("#"):
            continue
        if not HASH.fullmatch(word):
            raise DataError(f"{path}:{number}: the line must begin with the hash of a sample, got {word[:40]!r}.")
        hashes[word] = hashes.get(word, True) and [part.rstrip(":") for part in more[:2]] == ["repeats", word]
    return hashes


def leave_out(path: Path, sources: Sequence[Sequence[str]], chosen: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the chosen samples of each source, without those in the file.

    Args:
        sources: the hashes of all samples of each source.

    Raises:
        DataError: if a hash in the file is that of no sample, so that it would have no effect, or nothing is left.
    """
    hashes = read_hashes(path)
    found: set[str] = set()
    firsts = {one for one in hashes if hashes[one]}
    kept: list[list[int]] = []
    for own, some in zip(sources, chosen, strict=True):
        found |= hashes.keys() & own
        kept.append([])
        for number in some:
            if own[number] not in hashes or own[number] in firsts:
                kept[-1].append(number)
                firsts.discard(own[number])
    if lost := len(hashes.keys() - found):
        raise DataError(
            f"data.exclude {path}: {lost} of {len(hashes)} samples are not in the training data.\n"
            "Other data, another data.prompt or another limit of length gives other hashes; review the data again."
        )
    if not any(kept):
        raise DataError(f"data.exclude {path} leaves no sample to train on.")
    return kept
