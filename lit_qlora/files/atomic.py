"""Files that are there whole or not at all, whatever stops the program."""

import os
from collections.abc import Iterable
from pathlib import Path


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a file, or what a link points to; whoever reads it sees all of it, or what was there before.

    Args:
        text: in one or in pieces.

    Raises:
        OSError: if the disk is full or may not be written.
    """
    path = path.resolve()
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines([text] if isinstance(text, str) else text)
        flush(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    flush(path.parent)
