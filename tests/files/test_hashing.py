"""A remembered hash is believed only where the file cannot have changed since."""

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.files import hashing
from lit_qlora.files.hashing import HASHES, hash_files, remember

OLD, NEW = b"old weights", b"new weights"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A file whose hash is remembered."""
    path = tmp_path / "folder/weights"
    path.parent.mkdir()
    path.write_bytes(OLD)
    assert hash_files([path]) == {"weights": sha256(OLD)}
    return path


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read to be hashed."""
    found: list[Path] = []
    hash_file = hashing.hash_file
    monkeypatch.setattr(hashing, "hash_file", lambda path: found.append(path) or hash_file(path))
    return found


def test_a_file_is_hashed_once(file: Path, read: list[Path]) -> None:
    for _ in range(3):
        assert hash_files([file]) == {"weights": sha256(OLD)}
    assert read == []


def change_in_place(path: Path) -> None:
    path.write_bytes(NEW)


def replace(path: Path) -> None:
    other = path.with_name("other")
    other.write_bytes(NEW)
    other.replace(path)


@pytest.mark.parametrize("change", [change_in_place, replace])
def test_another_content_of_the_same_size_and_time_is_found(change: Any, file: Path) -> None:
    before = file.stat()
    change(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert hash_files([file]) == {"weights": sha256(NEW)}


def test_a_change_right_after_the_hash_is_found(tmp_path: Path) -> None:
    """Within a tick of the file system's clock, ctime does not tell them apart."""
    path = tmp_path / "weights"
    for content in (OLD, NEW) * 5:
        path.write_bytes(content)
        os.utime(path, (1, 1))
        assert hash_files([path]) == {"weights": sha256(content)}


def test_a_change_right_after_writing_is_found(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    for _ in range(5):
        path.write_bytes(OLD)
        remember(tmp_path, {"weights": sha256(OLD)})
        path.write_bytes(NEW)
        os.utime(path, ns=(0, json.loads((tmp_path / HASHES).read_text())["weights"]["mtime_ns"]))
        assert hash_files([path]) == {"weights": sha256(NEW)}


def test_the_hash_of_large_files_is_kept_from_writing_on(
    tmp_path: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hashing, "WORTH_WAITING", 1)
    (tmp_path / "weights").write_bytes(OLD)
    remember(tmp_path, {"weights": sha256(OLD)})
    assert hash_files([tmp_path / "weights"]) == {"weights": sha256(OLD)}
    assert read == []


@pytest.mark.parametrize("copy", [shutil.copytree, lambda a, b: os.system(f"cp -a {a} {b}")])
def test_a_copy_is_hashed_once(copy: Any, file: Path, tmp_path: Path, read: list[Path]) -> None:
    copy(file.parent, tmp_path / "copy")
    for _ in range(3):
        assert hash_files([tmp_path / "copy/weights"]) == {"weights": sha256(OLD)}
    assert len(read) == 1


def test_a_stamp_that_is_stale_but_right_is_renewed(file: Path, read: list[Path]) -> None:
    os.utime(file)
    for _ in range(3):
        assert hash_files([file]) == {"weights": sha256(OLD)}
    assert len(read) == 1


def test_a_copy_does_not_bring_the_hash_of_another_file(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(file.parent, other)
    (other / "weights").write_bytes(NEW)
    shutil.copystat(file, other / "weights")
    assert hash_files([other / "weights"]) == {"weights": sha256(NEW)}


def test_whole_seconds_prove_something_after_two(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = json.loads((file.parent / HASHES).read_text())["weights"]
    row["ctime_ns"] = 1_000_000_000
    monkeypatch.setattr(hashing, "_stamp", lambda _: {key: row[key] for key in ("bytes", "ctime_ns", "inode")})
    assert hashing._believed(file, {**row, "hashed_ns": 2_500_000_000}) is None
    assert hashing._believed(file, {**row, "hashed_ns": 3_000_000_000}) is not None


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"weights": 5}', '{"weights": {"bytes": 11}}', "\0", "[" * 10**5])
def test_a_damaged_memory_is_as_good_as_none(content: str, file: Path) -> None:
    (file.parent / HASHES).write_text(content)
    assert hash_files([file]) == {"weights": sha256(OLD)}


def test_the_memory_of_an_earlier_version_is_not_believed(file: Path) -> None:
    row = {"bytes": len(OLD), "mtime_ns": file.stat().st_mtime_ns, "sha256": sha256(NEW)}
    (file.parent / HASHES).write_text(json.dumps({"weights": row}))
    assert hash_files([file]) == {"weights": sha256(OLD)}


def test_a_file_that_changes_while_it_is_hashed_is_hashed_again(
    file: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = hashing.hash_file

    def changed_meanwhile(path: Path) -> str:
        digest = inner(path)
        if len(read) == 1:
            path.write_bytes(NEW)
        return digest

    monkeypatch.setattr(hashing, "hash_file", changed_meanwhile)
    os.utime(file)
    hash_files([file])
    assert hash_files([file]) == {"weights": sha256(NEW)}


def test_a_clock_that_was_set_back_makes_it_hash_not_wait(
    file: Path, read: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: pytest.fail("waited"))
    monkeypatch.setattr(time, "time_ns", lambda: 10**9)
    os.utime(file)
    for _ in range(2):
        assert hash_files([file]) == {"weights": sha256(OLD)}
    assert len(read) == 2


def test_files_of_one_directory_may_be_hashed_in_turns(file: Path, read: list[Path]) -> None:
    other = file.with_name("other")
    other.write_bytes(NEW)
    for _ in range(3):
        assert hash_files([file]) | hash_files([other]) == {"weights": sha256(OLD), "other": sha256(NEW)}
    assert len(read) == 1
