"""Answers that are kept as they are made."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.errors import ResourceError, UsageError
from lit_qlora.partial_answers import Part


def part(out: Path, *of: object) -> Part:
    return Part(out, *of or ("settings",), folders=(out.parent, None))


def left(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in tmp_path.iterdir())


def test_answers_are_there_again_and_out_when_all_are_made(tmp_path: Path) -> None:
    out = tmp_path / "new" / "out.jsonl"
    with part(out) as one:
        one.add({3: "é", 0: ["a", 1]})
    with part(out) as one:
        assert one.answered == {3: "é", 0: ["a", 1]}
        one.add({1: "b"})
        one.end("all\n")
    assert left(out.parent) == ["out.jsonl"]
    assert out.read_text() == "all\n"


def test_nothing_is_left_of_a_command_without_answers(tmp_path: Path) -> None:
    with part(tmp_path / "out"):
        assert left(tmp_path) == ["out.part"]
    assert left(tmp_path) == []
    begun = part(tmp_path / "out", "others")
    begun.file.close()  # as a kill does
    with part(tmp_path / "out") as one:
        assert not one.answered


def test_two_commands_do_not_make_one_file(tmp_path: Path) -> None:
    with part(tmp_path / "out") as one:
        one.add({0: "a"})
        with pytest.raises(ResourceError, match="another command is making"):
            part(tmp_path / "out")
        one.add({1: "b"})
    with part(tmp_path / "out") as one:
        assert one.answered == {0: "a", 1: "b"}


@pytest.mark.parametrize("change", ["settings", "model", "nothing", "hidden", "link"])
def test_another_model_or_other_settings_are_refused(tmp_path: Path, change: str) -> None:
    (tmp_path / "model").write_text("weights")
    with part(tmp_path / "out") as one:
        one.add({0: "a"})
    if change == "model":
        (tmp_path / "model").write_text("other weights")
    if change == "hidden":  # sums that are remembered
        (tmp_path / ".sha256.json").write_text("{}")
    if change == "link":
        (tmp_path / "dead").symlink_to(tmp_path / "nowhere")
    of = ("other",) if change == "settings" else ()
    if change in ("settings", "model"):
        with pytest.raises(UsageError, match="holds the answers of another command"):
            part(tmp_path / "out", *of)
        return
    with part(tmp_path / "out", *of) as one:
        assert one.answered == {0: "a"}


@pytest.mark.parametrize("damage", ["{", "[]", '{"x": 1}'])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    with part(tmp_path / "out") as one:
        one.add({0: "a"})
    with (tmp_path / "out.part").open("a") as file:
        file.write(f"{damage}\n")
    with pytest.raises(UsageError, match=r"out\.part:3 is damaged"):
        part(tmp_path / "out")


@pytest.mark.parametrize("left", [0, 10, 64, 65, 70])
def test_a_kill_in_the_first_answers_leaves_a_file_that_is_begun_anew(tmp_path: Path, left: int) -> None:
    with part(tmp_path / "out") as one:
        one.add({0: "a"})
    whole = (tmp_path / "out.part").read_bytes()
    assert whole.index(b"\n") == 64
    (tmp_path / "out.part").write_bytes(whole[:left])
    with part(tmp_path / "out") as one:
        assert not one.answered
        one.add({0: "a"})
    assert (tmp_path / "out.part").read_bytes() == whole


def test_what_a_kill_left_of_a_line_is_cut_off(tmp_path: Path) -> None:
    with part(tmp_path / "out") as one:
        one.add({0: "a"})
    with (tmp_path / "out.part").open("a") as file:
        file.write('{"1": "to')
    with part(tmp_path / "out") as one:
        one.add({1: "b"})
    assert [json.loads(line) for line in (tmp_path / "out.part").read_text().splitlines()[1:]] == [
        {"0": "a"},
        {"1": "b"},
    ]


@pytest.mark.parametrize("content", ["years of work", "face\n", "ab12\nof somebody"])
def test_somebody_s_file_is_left_alone(tmp_path: Path, content: str) -> None:
    (tmp_path / "out.part").write_text(content)
    with pytest.raises(UsageError, match="holds the answers of another command"):
        part(tmp_path / "out")
    assert (tmp_path / "out.part").read_text() == content


def test_where_nothing_can_be_written_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.part").mkdir()
    with pytest.raises(ResourceError, match=r"out\.part: Is a directory"):
        part(tmp_path / "out")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lit_qlora.partial_answers.write_text", full)
    with part(tmp_path / "other") as one:
        one.add({0: "a"})
        with pytest.raises(ResourceError, match="No space left"):
            one.end("all")
    assert (tmp_path / "other.part").exists()
