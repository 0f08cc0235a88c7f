"""Caches stay small: what goes, what stays, and that nobody is disturbed."""

import os
import time
from collections import namedtuple
from pathlib import Path

import pytest

from lit_qlora.files import cache_folder
from lit_qlora.files.cache_folder import FORGOTTEN, UNUSED, directory, prune, use

MARK = "manifest.json"
Usage = namedtuple("Usage", "total used free")


def entry(folder: Path, letter: str, age: float = 0.0, size: int = 100) -> Path:
    path = folder / (letter * 32)
    path.mkdir(parents=True)
    (path / MARK).write_bytes(b"x" * size)
    os.utime(path, (time.time() - age,) * 2)
    return path


def left(folder: Path) -> str:
    return "".join(sorted(path.name[0] for path in folder.iterdir()))


@pytest.fixture(autouse=True)
def _plenty_of_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(10**9, 0, 10**9))


def test_what_nobody_has_used_for_long_goes(tmp_path: Path) -> None:
    for letter, age in (("a", UNUSED + 60), ("b", UNUSED - 60), ("c", UNUSED + 60)):
        entry(tmp_path, letter, age)
    use(tmp_path / ("c" * 32))
    prune(tmp_path, entry(tmp_path, "d"), MARK)
    assert left(tmp_path) == "bcd"


def test_beyond_a_share_of_the_disk_the_longest_unused_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(3000, 0, 2000))
    for age, letter in enumerate("fedcba"):
        entry(tmp_path, letter, age=age)
    prune(tmp_path, tmp_path / ("f" * 32), MARK)
    assert left(tmp_path) == "ef"  # 600 bytes and 2,000 free: 260 may stay


def test_the_newest_entry_stays_however_large_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_folder.shutil, "disk_usage", lambda _: Usage(3000, 0, 0))
    entry(tmp_path, "a")
    prune(tmp_path, entry(tmp_path, "b", age=UNUSED + 60), MARK)
    assert left(tmp_path) == "b"


def test_what_killed_programs_left_goes_after_a_day_and_what_is_not_ours_never(tmp_path: Path) -> None:
    names = [
        "a" * 64 + ".1.unfinished",
        "b" * 32 + ".tmp-1",
        "c" * 32 + ".1.gone",
        "notes",
        "d" * 64,
        "d" * 31,
        "e" * 64 + ".1.x",
    ]
    for name in names:
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (0, 0))
    os.utime(tmp_path / names[-1], (time.time() - FORGOTTEN + 60,) * 2)
    (tmp_path / ("f" * 32)).write_text("a file")
    os.utime(tmp_path / ("f" * 32), (0, 0))
    prune(tmp_path, tmp_path, MARK)
    assert left(tmp_path) == "ddefn"


def test_an_entry_that_is_open_can_be_read_on_and_two_programs_may_prune_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, keep = entry(tmp_path, "a", UNUSED + 60), entry(tmp_path, "b")
    entry(tmp_path, "c", UNUSED + 30)
    rename = Path.rename

    def another_was_faster(self: Path, to: Path) -> Path:
        if self == old:
            monkeypatch.undo()
            prune(tmp_path, keep, MARK)
        return rename(self, to)

    with (old / MARK).open("rb") as file:
        monkeypatch.setattr(Path, "rename", another_was_faster)
        prune(tmp_path, keep, MARK)
        assert left(tmp_path) == "b"
        assert len(file.read()) == 100


def test_an_entry_that_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = entry(tmp_path, "a", UNUSED + 90)
    entry(tmp_path, "b", UNUSED + 60)
    rename = Path.rename

    def refuse(self: Path, to: Path) -> Path:
        if self == stuck:
            raise PermissionError
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse)
    prune(tmp_path, entry(tmp_path, "c"), MARK)
    assert left(tmp_path) == "ac"


def test_a_setting_says_where_a_cache_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert directory("auto", "data") == tmp_path / "lit_qlora/data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert directory("auto", "data") == Path.home() / ".cache/lit_qlora/data"
    assert directory("none", "data") is None
    assert directory("some/where", "data") == Path("some/where")
