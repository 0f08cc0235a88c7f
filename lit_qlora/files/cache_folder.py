"""Folders of what can be made again: where they are, and how they stay small.

An entry is a folder named by a hash of all that decides what is in it, which appears and goes as a whole. Nothing in a
cache is missed: whoever finds no entry makes it.
"""

import os
import re
import shutil
import time
from contextlib import suppress
from pathlib import Path

SHARE_OF_DISK = 0.1  # most that a cache may take of what would be free without it
UNUSED = 30 * 86_400.0  # seconds after which an entry that nobody used goes
FORGOTTEN = 86_400.0  # seconds after which an entry that is not whole is nobody's any more
_ENTRY = re.compile(r"[0-9a-f]{32,64}")  # other names are none of ours
_PART = re.compile(rf"{_ENTRY.pattern}\.(tmp-[0-9a-f]+|\d+\.(unfinished|gone))")  # somebody writes or removes it


def directory(setting: str, name: str) -> Path | None:
    """The folder of the cache `name`, for a setting "auto", "none" or a path; None for no cache."""
    if setting == "none":
        return None
    if setting != "auto":
        return Path(setting)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lit_qlora" / name


def use(entry: Path) -> None:
    """Remember that an entry was used now."""
    with suppress(OSError):  # it has gone, or is somebody else's
        os.utime(entry)


def prune(folder: Path, keep: Path, mark: str) -> None:
    """Remove what nobody has used for long, then the longest unused until the rest is no more than a share of the disk.

    An entry gets another name before it is removed, so that other programs find it whole or not at all; who has it
    open can read on. Several programs may do this at once.

    Args:
        keep: the entry that stays, the one that has just been made.
        mark: a file that every entry holds, so that what is in a folder that somebody named is not taken for one.
    """
    now = time.time()
    ages: dict[Path, tuple[float, int]] = {}
    for path in folder.iterdir():
        with suppress(OSError):  # somebody else removes it
            if _PART.fullmatch(path.name) and now - path.stat().st_mtime > FORGOTTEN:
                shutil.rmtree(path, ignore_errors=True)
            if _ENTRY.fullmatch(path.name) and (path / mark).is_file():
                ages[path] = (now - path.stat().st_mtime, sum(file.stat().st_size for file in path.iterdir()))
    total = sum(size for _, size in ages.values())
    most = SHARE_OF_DISK * (shutil.disk_usage(folder).free + total)
    for entry, (age, size) in sorted(ages.items(), key=lambda item: -item[1][0]):
        if entry != keep and (total > most or age > UNUSED):
            with suppress(OSError):
                gone = entry.rename(entry.with_name(f"{entry.name}.{os.getpid()}.gone"))
                total -= size
                shutil.rmtree(gone, ignore_errors=True)
