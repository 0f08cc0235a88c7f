"""Files and directories are whole or absent: as they were, or new."""

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.files import atomic
from lit_qlora.files.atomic import (
    is_left_over,
    not_a_link,
    publish,
    recover_files,
    remove_directory,
    replace_files,
    replacing,
    temporary_directory,
    write_link,
    write_text,
)


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "né\n", ["in ", "pieces"]):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == "".join(text)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one_where_it_is_to_be_followed_and_its_file_is_there(tmp_path: Path) -> None:
    there, here = tmp_path / "there.txt", tmp_path / "here.txt"
    here.symlink_to(there)
    there.write_text("old")
    write_text(here, "new", follow=True)
    assert here.is_symlink()
    assert there.read_text() == "new"
    there.unlink()
    write_text(here, "newer", follow=True)
    assert (here.is_symlink(), here.read_text(), there.exists()) == (False, "newer", False)


def test_no_link_of_a_stranger_has_another_file_written(tmp_path: Path) -> None:
    there, here = tmp_path / "there.txt", tmp_path / "here.txt"
    there.write_text("mine")
    here.symlink_to(there)
    with pytest.raises(OSError, match="Too many levels"), open(here, "a", opener=not_a_link):
        pass
    write_text(here, "new")
    assert (here.is_symlink(), here.read_text(), there.read_text()) == (False, "new", "mine")


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device")


def half() -> Iterator[str]:
    yield "half"
    raise full()


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    with pytest.raises(OSError, match="No space left"):
        write_text(path, half())

    def cannot(self: Path, target: Path) -> None:
        raise full()

    monkeypatch.setattr(Path, "replace", cannot)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# What others have left, or are using


def test_what_a_killed_program_left_is_removed_and_what_another_uses_stays(tmp_path: Path) -> None:
    left, used = tmp_path / "a.tmp-1", tmp_path / "a.tmp-999999999"  # the names say nothing
    for folder in (left, used):
        folder.mkdir()
    (tmp_path / "a.tmp-2").write_text("left")
    handle = os.open(used, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with temporary_directory(tmp_path / "a") as mine:
        assert sorted(tmp_path.iterdir()) == sorted([mine, used])
        assert not is_left_over(mine)
        with temporary_directory(tmp_path / "a") as second:
            assert sorted(tmp_path.iterdir()) == sorted([mine, second, used])
    os.close(handle)
    write_text(tmp_path / "a", "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]


def test_names_are_not_patterns(tmp_path: Path) -> None:
    (tmp_path / "ab.tmp-1").mkdir()
    with temporary_directory(tmp_path / "[a]*"):
        pass
    assert (tmp_path / "ab.tmp-1").exists()


def test_a_file_in_use_is_not_taken_for_left_over(tmp_path: Path) -> None:
    with replacing(tmp_path / "a") as mine:
        assert not is_left_over(mine)
        mine.write_text("first")
        write_text(tmp_path / "a", "second")
    assert (tmp_path / "a").read_text() == "first"


def test_what_another_removes_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, removed = atomic._lock, []

    def removed_first(handle: int) -> None:
        if not removed:
            removed.extend(tmp_path.glob("a.tmp-*"))
            removed[0].rmdir() if removed[0].is_dir() else removed[0].unlink()
        lock(handle)

    monkeypatch.setattr(atomic, "_lock", removed_first)
    write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"
    removed.clear()
    with temporary_directory(tmp_path / "a") as mine:
        assert mine.is_dir()
        assert mine not in removed


# Faults and kills at each operation

OPERATIONS = ("rename", "replace", "mkdir", "rmdir", "unlink", "fsync")
OLD, NEW = {"a": "old a", "b": "old b", "last": "old"}, {"a": "new a", "c": "new c", "last": "new"}


def filled(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir() if path.is_file()}


def replace_directory(tmp_path: Path) -> None:
    with temporary_directory(tmp_path / "out") as folder:
        publish(filled(folder, NEW), tmp_path / "out")


def replace_in_directory(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with temporary_directory(out / "staged") as folder:
        replace_files(filled(folder, NEW), out, "last", ["a", "b", "c"])


ACTIONS = {"directory": replace_directory, "files": replace_in_directory}


def disturb(number: int, disturbance: Callable[[], None]) -> list[int]:
    """Let the operation of this number do something else; returns how many are left before it."""
    left = [number]

    def wrap(operation: Callable[..., Any]) -> Callable[..., Any]:
        def disturbed(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                disturbance()
            return operation(*args, **kwargs)

        return disturbed

    for name in OPERATIONS:
        setattr(os, name, wrap(getattr(os, name)))
    return left


def fail() -> None:
    raise OSError(errno.EIO, "Input/output error")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def status_of(action: Callable[[Path], None], tmp_path: Path, number: int, disturbance: Callable[[], None]) -> int:
    """0 done undisturbed, 1 refused, 3 done all the same, negative if killed."""
    child = os.fork()
    if child == 0:
        status = 2
        try:
            left = disturb(number, disturbance)
            action(tmp_path)
            status = 0 if left[0] > 0 else 3
        except OSError:
            status = 1
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("disturbance", [fail, die])
@pytest.mark.parametrize("exchange", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ACTIONS)
def test_at_each_point_the_old_or_the_new_is_there_and_the_next_run_goes_on(
    action: str, exchange: bool, disturbance: Callable[[], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    seen = []
    for number in range(1, 100):
        place = tmp_path / str(number)
        place.mkdir()
        out = filled(place / "out", OLD)
        seen.append(status_of(ACTIONS[action], place, number, disturbance))
        if disturbance is fail or (exchange and action == "directory"):
            assert content(out) in (OLD, NEW)
        else:  # the next program looks after what was killed
            with temporary_directory(place / "out"):
                recover_files(out, "last", ["a", "b", "c"])
            assert content(out) in (OLD, NEW)
        ACTIONS[action](place)
        assert content(out) == NEW
        assert [path.name for path in place.iterdir()] == ["out"]
        assert {path.name for path in out.iterdir()} == set(NEW)
        if seen[-1] == 0:
            break
    assert len(seen) > 10
    assert set(seen[:-1]) <= ({-9} if disturbance is die else {1, 3})


def test_a_directory_keeps_what_is_not_replaced(tmp_path: Path) -> None:
    out = filled(tmp_path / "out", {"README": "mine", **OLD})
    (out / "folder").mkdir()
    replace_in_directory(tmp_path)
    assert content(out) == {"README": "mine", **NEW}
    assert (out / "folder").is_dir()


@pytest.mark.parametrize("exchange", [True, False])
def test_publishing_replaces_a_directory_that_others_see_at_each_moment(
    exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda *_: False)
    (tmp_path / "link").symlink_to(filled(tmp_path / "out", OLD))
    with temporary_directory(tmp_path / "link") as folder:
        publish(filled(folder, NEW), tmp_path / "link")
    assert content(tmp_path / "out") == NEW
    assert (tmp_path / "link").is_symlink()
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_is_not_replaced_by_a_directory(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(NotADirectoryError):
        replace_directory(tmp_path)
    assert (tmp_path / "out").read_text() == "mine"


def test_a_directory_is_not_replaced_by_a_file(tmp_path: Path) -> None:
    out = filled(tmp_path / "out", {"last": "old"})
    filled(out / "a", {"x": "mine"})
    with pytest.raises(OSError, match="directory"):
        replace_in_directory(tmp_path)
    assert content(out) == {"last": "old"}
    assert content(out / "a") == {"x": "mine"}


def test_a_directory_is_removed_by_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = filled(tmp_path / "out", OLD)
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: (path / "a").unlink())  # and is killed
    remove_directory(folder)
    assert not folder.exists()
    monkeypatch.undo()
    with temporary_directory(tmp_path / "out"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    for name in ("new", "kept"):
        with pytest.raises(KeyError), temporary_directory(tmp_path / name / "out"):
            raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_a_link_that_cannot_be_replaced_is_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_link(tmp_path / "best", "a")
    write_link(tmp_path / "best", "b")
    assert os.readlink(tmp_path / "best") == "b"

    def cannot(self: Path, target: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", cannot)
    with pytest.raises(OSError, match="Input/output"):
        write_link(tmp_path / "best", "c")
    assert [(path.name, os.readlink(path)) for path in tmp_path.iterdir()] == [("best", "b")]
