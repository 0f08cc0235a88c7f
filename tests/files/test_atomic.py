"""Files that are there whole or not at all."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lit_qlora.files.atomic import write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "né\n", ["in ", "pieces"]):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == "".join(text)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path: Path) -> None:
    there, here = tmp_path / "there.txt", tmp_path / "here.txt"
    here.symlink_to(there)
    write_text(here, "new")
    assert here.is_symlink()
    assert there.read_text() == "new"


def full() -> OSError:
    return OSError(28, "No space left on device")


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
