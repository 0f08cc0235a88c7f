"""Files and directories that are atomic: whole or absent, whatever stops the program.

Each is made under a temporary name beside its own, flushed to the disk, and then renamed. A temporary name is locked
while it is in use. So other programs, also in other containers, can tell it from the remains of a killed one.
"""

import ctypes
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path

from lit_qlora.errors import ResourceError
from lit_qlora.signals import held

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux' fcntl.h and fs.h


def flush(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says about a full disk or a missing permission into a ResourceError about `path`."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"Cannot write {path}: {error.strerror or error}.\n"
            "What was there before is untouched, or replaced as a whole."
        ) from None


def not_a_link(path: str, flags: int) -> int:
    """Open a file for `open`, whose opener this is, but no link.

    In a stranger's folder, a link could stand for any file of the user's.

    Raises:
        OSError: if it is a link, or cannot be opened.
    """
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)


@contextmanager
def replacing(path: Path, follow: bool = False) -> Iterator[Path]:
    """A temporary name for a file, which then replaces `path`.

    Args:
        follow: replace the file that a link of this name points to, if it is there; else the link itself, which in a
            stranger's folder could stand for any file of the user's.

    Raises:
        OSError: if the disk is full or may not be written; what was there before is untouched.
    """
    path = path.resolve() if follow and path.exists() else path.parent.resolve() / path.name
    _remove_left_over(path)
    with held() as signals:
        temporary, handle = _locked(path, lambda name: os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            with signals.lifted():
                yield temporary
                flush(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        finally:
            os.close(handle)
        flush(path.parent)


def write_text(path: Path, text: str | Iterable[str], errors: str = "strict", follow: bool = False) -> None:
    """Write a text file in UTF-8, atomically.

    Args:
        text: in one or in pieces.
        follow: see replacing.
        errors: as in open, for what is no character, such as a byte of a path that is not UTF-8.

    Raises:
        OSError: see replacing.
    """
    with replacing(path, follow) as temporary, temporary.open("w", encoding="utf-8", errors=errors) as file:
        file.writelines([text] if isinstance(text, str) else text)


def write_link(path: Path, target: str) -> None:
    """Let `path` be a link to `target`, atomically.

    Raises:
        OSError: if it cannot be done; what was there before is untouched.
    """
    temporary = _temporary_name(path)
    with held():
        try:
            temporary.symlink_to(target)
            temporary.replace(path)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        flush(path.parent)


@contextmanager
def temporary_directory(final: Path) -> Iterator[Path]:
    """A new directory beside `final`, on the same file system; removed with what is left in it, as is an empty parent.

    What programs that were killed left beside `final` is removed too, and what they had moved aside is put back.

    Raises:
        OSError: if it cannot be made.
    """
    final = final.resolve()
    new = not final.parent.exists()
    final.parent.mkdir(parents=True, exist_ok=True)
    _put_back(final)
    _remove_left_over(final)
    with held() as signals:
        path, handle = _locked_directory(final)
        try:
            with signals.lifted():
                yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            os.close(handle)
            if new:
                with suppress(OSError):  # something is in it
                    final.parent.rmdir()


def publish(complete: Path, final: Path) -> None:
    """Give the directory `complete` its final name, after everything in it is on the disk.

    A directory that had the name before is there until the new one is, and is afterwards called `complete`.

    Raises:
        OSError: if it cannot be done; what was there before is then there again.
    """
    final = final.resolve()
    for path in complete.iterdir():
        flush(path)
    flush(complete)
    with held():
        if not final.exists():
            complete.rename(final)
        elif not final.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(final))
        elif not _exchange(complete, final):
            _exchange_in_steps(complete, final)
        flush(final.parent)


def replace_files(staged: Path, directory: Path, last: str, owned: Iterable[str]) -> None:
    """Move all files of `staged` to `directory`, which may hold others, in the place of its files called `owned`.

    The file `last` says that the others are complete: the old one goes first and the new one comes last. A program that
    is killed in between leaves the old files in a directory beside `last`; recover_files puts them back.

    Args:
        owned: patterns of names.

    Raises:
        OSError: if it cannot be done; what was there before is then there again.
    """
    recover_files(directory, last, owned)
    new = sorted((path.name for path in staged.iterdir()), key=last.__eq__)
    for name in new:
        flush(staged / name)
    with held():
        old = _names(directory, (last, *owned)) | {name for name in new if (directory / name).is_file()}
        going, handle = _locked_directory(directory / last, "going")
        aside = going.with_name(going.name.replace(".going-", ".old-"))
        try:
            for name in sorted(old, key=last.__ne__):
                (directory / name).rename(going / name)
            going.rename(aside)
            flush(directory)
            for name in new:
                (staged / name).rename(directory / name)
        except BaseException:
            if aside.exists():
                for name in new:
                    if not (staged / name).exists():
                        (directory / name).rename(staged / name)
            _move_back(aside if aside.exists() else going, directory, last)
            raise
        finally:
            os.close(handle)
        try:
            flush(directory)
        finally:  # the new files are there
            shutil.rmtree(aside, ignore_errors=True)


@held()
def recover_files(directory: Path, last: str, owned: Iterable[str]) -> None:
    """Put back what a program that was killed in replace_files had moved aside, unless the new files are complete."""
    for going in filter(is_left_over, directory.glob(f"{last}.going-*")):
        _move_back(going, directory, last)
    for aside in filter(is_left_over, directory.glob(f"{last}.old-*")):
        if not (directory / last).exists():
            for name in _names(directory, owned):
                (directory / name).unlink()
            _move_back(aside, directory, last)
        shutil.rmtree(aside, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory, which is whole as long as it has its name."""
    with held():
        gone = path.rename(_temporary_name(path))
        shutil.rmtree(gone, ignore_errors=True)


def is_left_over(temporary: Path) -> bool:
    """True if the program that made `temporary` has ended: nobody holds its lock."""
    if temporary.is_symlink():
        return True  # made and renamed in one breath
    handle = _claim(temporary)
    if handle is not None:
        os.close(handle)
    return handle is not None


def _temporary_name(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f"{path.name}.{kind}-{secrets.token_hex(4)}")


def _locked_directory(beside: Path, kind: str = "tmp") -> tuple[Path, int]:
    """A new directory, and the handle that locks it."""

    def make(path: Path) -> int:
        path.mkdir()
        return os.open(path, os.O_RDONLY)

    return _locked(beside, make, kind)


def _locked(beside: Path, make: Callable[[Path], int], kind: str = "tmp") -> tuple[Path, int]:
    """A new path that `make` makes and opens, and the handle that locks it."""
    while True:
        path = _temporary_name(beside, kind)
        handle = make(path)
        _lock(handle)
        if path.exists():
            return path, handle
        os.close(handle)  # another program saw it before it was locked, and removed it


def _lock(handle: int) -> None:
    with suppress(OSError):  # NFS may refuse; then nothing there is taken for left over
        fcntl.flock(handle, fcntl.LOCK_EX)


def _claim(temporary: Path) -> int | None:
    """The handle that locks what is left over, or None if it is in use or nobody can tell."""
    try:
        handle = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_left_over(path: Path) -> None:
    """Remove temporary files and directories of `path` that programs have left."""
    for left in path.parent.glob(f"{_escaped(path.name)}.tmp-*"):
        if (handle := _claim(left)) is not None:  # held until it is gone
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                with suppress(OSError):
                    left.unlink()
            os.close(handle)


@held()
def _put_back(final: Path) -> None:
    """Give a directory its name again, where a program was killed after it had moved it aside in publish."""
    for aside in filter(is_left_over, final.parent.glob(f"{_escaped(final.name)}.old-*")):
        if final.exists():
            shutil.rmtree(aside, ignore_errors=True)
        else:
            aside.rename(final)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the kernel or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    names = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0)


def _exchange_in_steps(complete: Path, final: Path) -> None:
    """Swap two names where that takes several steps; _put_back goes on after a kill between them."""
    aside = _temporary_name(final, "old")
    handle = os.open(final, os.O_RDONLY)
    _lock(handle)
    try:
        final.rename(aside)
        try:
            complete.rename(final)
        except OSError:
            aside.rename(final)
            raise
        with suppress(OSError):
            aside.rename(complete)
    finally:
        os.close(handle)


def _names(directory: Path, patterns: Iterable[str]) -> set[str]:
    patterns = tuple(patterns)
    return {
        path.name
        for path in directory.iterdir()
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in patterns)
    }


def _move_back(aside: Path, directory: Path, last: str) -> None:
    for name in sorted(os.listdir(aside), key=last.__eq__):
        (aside / name).rename(directory / name)
    aside.rmdir()


def _escaped(name: str) -> str:
    """`name` as a glob pattern that matches it alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
