"""Commands that something stops at one of their operations on files, in processes forked from this one."""

import builtins
import errno
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPERATIONS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.truncate"}


def counting_writes(folder: Path, count: Callable[[], None]) -> None:
    """Call `count` before each write to a file in `folder`."""
    plainly = io.open

    def counted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            count()
            return method(*given)

        return call

    def opened(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
        stream = plainly(file, mode, *more, **named)
        if isinstance(file, str | os.PathLike) and str(file).startswith(str(folder)) and set(mode) & set("wax+"):
            for name in ("write", "writelines"):
                setattr(stream, name, counted(getattr(stream, name)))
        return stream

    io.open = builtins.open = opened


def disturbed(folder: Path, number: int, disturbance: Callable[[], None], work: Callable[[], int]) -> tuple[int, bool]:
    """Status of `work` in a process of its own, and whether the operation of this number on files came.

    Status is negative if it was killed.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        left, status = [number], 99
        fsync = os.fsync

        def count() -> None:
            left[0] -= 1
            if left[0] == 0:
                os.write(writer, b"x")
                disturbance()

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open":
                path, mode, flags = arguments[0], arguments[1] or "", arguments[2] or 0
                writes = set(str(mode)) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR)
                if writes and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder)):
                    count()
            elif event in OPERATIONS:
                path = os.fspath(arguments[0])
                if str(path).startswith(str(folder)) or not os.path.isabs(path):  # relative to an open directory
                    count()

        def counted(handle: int) -> None:
            count()
            fsync(handle)

        os.fsync = counted
        counting_writes(folder, count)
        sys.addaudithook(hook)
        try:
            status = work()
        finally:
            os._exit(status)
    os.close(writer)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(reader, "rb") as pipe:
        return status, pipe.read() == b"x"


def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def litter(folder: Path) -> list[Path]:
    return [path for kind in ("tmp", "old", "going") for path in folder.rglob(f"*.{kind}-*")]
