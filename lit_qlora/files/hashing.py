"""sha256 of files, remembered beside them, since hashing runs at about 2 GB/s.

A remembered hash is believed while the file has the stamp that it had when it was hashed: size, inode, and the times
of its content and of its inode. No program can set the latter (ctime). So a file that was changed, replaced or copied
is hashed again, whatever its size and time of content say. The stamp of a file that was changed shortly before it was
hashed proves nothing: the file system's clock may not have advanced since.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_qlora.errors import UserError
from lit_qlora.files.atomic import write_text
from lit_qlora.files.reading import read_json

HASHES = ".sha256.json"
TICK = 20_000_000
"""Nanoseconds within which the clock of a file system advances; Linux counts in steps of at most 10 ms."""
COARSE_TICK = 2_000_000_000
"""The same where times are whole seconds, as on FAT and old NFS."""
WORTH_WAITING = 2**26
"""From so many bytes on, hashing again costs more than waiting for the clock."""
_ROW = {"bytes", "mtime_ns", "ctime_ns", "inode", "hashed_ns", "sha256"}


def hash_files(paths: Iterable[Path]) -> dict[str, str]:
    """File name -> sha256, for files of one directory, which remembers them if it can be written.

    Raises:
        OSError: if a file cannot be read.
    """
    paths = list(paths)
    directory = paths[0].parent
    known = _remembered(directory)
    rows = {path.name: _believed(path, known.get(path.name)) or _hashed(path) for path in paths}
    if any(known.get(name) != row for name, row in rows.items()):
        _write(directory, {name: row for name, row in known.items() if (directory / name).exists()} | rows)
    return {name: row["sha256"] for name, row in rows.items()}


def remember(directory: Path, hashes: Mapping[str, str]) -> None:
    """Keep the hashes of files that were just written to `directory`, by name."""
    stamps = {name: _stamp(directory / name) for name in hashes}
    if sum(stamp["bytes"] for stamp in stamps.values()) > WORTH_WAITING:
        time.sleep(TICK / 1e9)
    now = time.time_ns()
    _write(directory, {name: {**stamps[name], "hashed_ns": now, "sha256": digest} for name, digest in hashes.items()})


def combine(hashes: Mapping[str, str]) -> str:
    """The hash of a file, or of several what `sha256sum FILE... | sha256sum` prints."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    return hash_text("".join(f"{hashes[name]}  {name}\n" for name in sorted(hashes)))


def hash_file(path: Path) -> str:
    """sha256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(text: str) -> str:
    """sha256 of a text, in hex."""
    return hashlib.sha256(text.encode()).hexdigest()


def _believed(path: Path, row: dict[str, Any] | None) -> dict[str, Any] | None:
    """The row of a file, if its stamp stands and proves something."""
    if row is None or not _stamp(path).items() <= row.items():
        return None
    return row if row["hashed_ns"] - row["ctime_ns"] >= _tick(row) else None


def _hashed(path: Path) -> dict[str, Any]:
    """The row of a file, which is read; it proves something unless the file changes meanwhile."""
    before = _stamp(path)
    age = time.time_ns() - before["ctime_ns"]
    if 0 <= age < TICK:
        time.sleep((TICK - age) / 1e9)
    now = time.time_ns()
    digest = hash_file(path)
    return {**before, "hashed_ns": now if _stamp(path) == before else 0, "sha256": digest}


def _stamp(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {
        "bytes": stat.st_size,
        "mtime_ns": stat.st_mtime_ns,
        "ctime_ns": stat.st_ctime_ns,
        "inode": stat.st_ino,
    }


def _tick(stamp: Mapping[str, Any]) -> int:
    return TICK if stamp["ctime_ns"] % 1_000_000_000 else COARSE_TICK


def _remembered(directory: Path) -> dict[str, dict[str, Any]]:
    try:
        rows = read_json(directory / HASHES)
    except (OSError, UserError):
        return {}  # not remembered yet, or unreadable: hash again
    return {name: row for name, row in rows.items() if _is_row(row)}


def _is_row(row: Any) -> bool:
    if not isinstance(row, dict) or row.keys() != _ROW or not isinstance(row["sha256"], str):
        return False
    return all(type(row[key]) is int for key in _ROW - {"sha256"})


def _write(directory: Path, rows: Mapping[str, Any]) -> None:
    with suppress(OSError):  # a read-only directory has its files hashed each time
        write_text(directory / HASHES, json.dumps(rows, indent=2) + "\n")
