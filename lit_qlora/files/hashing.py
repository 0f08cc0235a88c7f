"""sha256 of files, kept beside them for as long as their size and time stand: hashing runs at about 2 GB/s."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

_HASHES = ".sha256.json"


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> sha256, for files of one directory; remembered there."""
    paths = list(paths)
    directory = paths[0].parent
    known = _kept_hashes(directory)
    hashes = {}
    for path in paths:
        kept = known.get(path.name)
        hashes[path.name] = kept["sha256"] if kept and _stamp(path).items() <= kept.items() else hash_file(path)
    if any(name not in known or known[name]["sha256"] != digest for name, digest in hashes.items()):
        remember(directory, hashes)
    return hashes


def combine(hashes: Mapping[str, str]) -> str:
    """The hash of a file, or of several what `sha256sum FILE... | sha256sum` prints."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hashlib.sha256("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _kept_hashes(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        kept: Any = json.loads((directory / _HASHES).read_text())
        return {name: row for name, row in kept.items() if row.keys() == {"bytes", "mtime_ns", "sha256"}}
    except (OSError, ValueError, AttributeError):
        return {}  # not kept yet, or unreadable: hash again


def remember(directory: Path, hashes: Mapping[str, str]) -> None:
    """Keep the hashes of files of `directory`, by name."""
    record = {name: {**_stamp(directory / name), "sha256": digest} for name, digest in hashes.items()}
    with suppress(OSError):  # a read-only checkpoint is hashed each time
        (directory / _HASHES).write_text(json.dumps(record, indent=2) + "\n")


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
