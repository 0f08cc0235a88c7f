"""Files and directories that are atomic: whole or absent, whatever stops the program."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_qlora.errors import ResourceError


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


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a missing permission into a ResourceError about `place`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"Cannot write {place}: {error.strerror or error}.\nWhat was there before is untouched."
        ) from None


@contextmanager
def temporary_directory(final: Path) -> Iterator[Path]:
    """A new directory beside `final`, on the same file system; removed with what is left in it.

    What programs that were killed left beside `final` is removed too.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for left in final.parent.glob(f"{final.name}.tmp-*"):
        if is_left_over(left):
            shutil.rmtree(left, ignore_errors=True)
    path = final.with_name(f"{final.name}.tmp-{os.getpid()}")
    try:
        path.mkdir()
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def is_left_over(temporary: Path) -> bool:
    """Whether the program that made `temporary`, whose name ends with its process id, has ended."""
    process = temporary.name.rpartition("-")[2]
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return True
    except OSError:
        return False  # somebody else's
    return int(process) == os.getpid()  # ours are gone when they end: an earlier program had the same number


def publish(complete: Path, final: Path) -> None:
    """Give the directory `complete` its final name, after everything in it is on the disk."""
    for path in complete.iterdir():
        flush(path)
    flush(complete)
    if final.exists():
        shutil.rmtree(final)
    complete.rename(final)
    flush(final.parent)
