"""Files that are there whole or not at all."""

from pathlib import Path

import pytest

from lit_qlora.disk import write_text


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for text in ("old", "né\n"):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["write_text", "replace"])
def test_a_file_that_cannot_be_written_is_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write = Path.write_text

    def half(self: Path, what: str | Path, **settings: str) -> None:
        if isinstance(what, str):
            write(self, what[:1], **settings)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, failing, half)
    with pytest.raises(OSError, match="No space left"):
        write_text(path, "new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
