"""Files that somebody else wrote are read within limits, or refused in one message."""

import ast
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.errors import CheckpointError, DataError
from lit_qlora.files import reading
from lit_qlora.files.reading import check_yaml, parse_json, read_json, read_json_lines, read_text, read_yaml_text
from tests.conftest import ROOT

DEEP = 100_000


def written(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "x"
    path.write_bytes(content)
    return path


def test_a_text_is_utf_8_with_or_without_a_mark(tmp_path: Path) -> None:
    assert read_text(written(tmp_path, "né\n".encode())) == "né\n"
    assert read_text(written(tmp_path, "né".encode("utf-8-sig"))) == "né"


def test_a_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    path = written(tmp_path, b"one\ntwo\xff")
    with pytest.raises(DataError, match=f"{path}:2: byte 0xff is not UTF-8"):
        read_text(path, DataError)


def test_no_more_is_read_than_may_be(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="larger than the 1,024 bytes"):
        read_text(Path("/dev/zero"), most=1024)
    assert read_text(written(tmp_path, b"x" * 1024), most=1024) == "x" * 1024


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting ',' delimiter"),
        (b'{"a": "\xff"}', "not UTF-8"),
        (b"[1]", "expected an object, found a list"),
        (b"5", "expected an object, found int"),
        (b'"a"', "expected an object, found str"),
        (b"null", "expected an object, found NoneType"),
        (b'{"a": 1e400}', "the number 1e400 is too large"),
        (b'{"a": ' + b"7" * 5000 + b"}", "a number has thousands of digits"),
        (b'{"a": "\\ud800"}', "half a character"),
        (b'{"\\udfff": 1}', "half a character"),
        (b"[" * DEEP + b"]" * DEEP, "nested more than 64 deep"),
        (b'{"a":' * DEEP + b"1" + b"}" * DEEP, "nested more than 64 deep"),
        (b"[" * DEEP, "nested more than 64 deep"),
    ],
)
def test_json_of_any_kind_is_read_or_refused_in_words(content: bytes, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, content)
    with pytest.raises(CheckpointError, match=words) as caught:
        read_json(path)
    assert str(caught.value).startswith(f"{path}:")
    assert len(str(caught.value)) < len(str(path)) + 200


def test_json_that_is_right_is_read_as_it_is(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(64):
        deep = [deep]
    value = {"a": [1, 2.5, None, True], "large": 10**30, "\u00e9": "\u00fc\U0001f600", "n": [[]], "nul": "\0"}
    for ascii_only in (True, False):
        path = written(tmp_path, json.dumps(value, ensure_ascii=ascii_only).encode())
        assert read_json(path) == value
    assert parse_json(json.dumps(deep), "x", kind=list) == deep


def test_a_path_that_is_not_utf_8_comes_back_from_json() -> None:
    path = os.fsdecode(b"caf\xe9.jsonl")
    assert parse_json(json.dumps({"path": path}), "x") == {"path": path}


def test_json_of_more_values_than_memory_holds_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_VALUES", 100)
    assert parse_json(f"[{'1,' * 98}1]", "x", kind=list) == [1] * 99
    for text in (f"[{'1,' * 100}1]", "[" + "[],{}," * 30 + "1]"):
        with pytest.raises(CheckpointError, match="x: not valid JSON: more than 100 values"):
            parse_json(text, "x", kind=list)


def test_numbers_that_json_has_not_can_be_refused() -> None:
    assert parse_json('{"limit": Infinity}', "x") == {"limit": float("inf")}  # some config.json have it
    with pytest.raises(CheckpointError, match="Infinity is not JSON"):
        parse_json('{"limit": Infinity}', "x", strict=True)
    assert parse_json('{"path": "\\udcff"}', "x") == {"path": "\udcff"}
    with pytest.raises(CheckpointError, match="half a character"):
        parse_json('{"path": "\\udcff"}', "x", strict=True)


PARSERS = {"json.load", "json.loads", "json.JSONDecoder", "yaml.load", "yaml.safe_load"}
ELSEWHERE = {
    "lit_qlora/cli.py": "reads a list that was typed, behind check_yaml",
    "lit_qlora/data/readers.py": "streams records, a piece of a file at a time, with check_depth",
    "lit_qlora/device.py": "reads the kernel's own files",
    "lit_qlora/evaluate/validation_inputs.py": "reads a file of this package",
    "lit_qlora/prompts/chat_template.py": "reads the answer of a process of this package",
    "lit_qlora/prompts/template_worker.py": "reads the question, and may import nothing",
    "lit_qlora/run/resume.py": "makes plain values of its own settings",
    "lit_qlora/serve/app.py": "reads the page of this package",
    "lit_qlora/sweep/study.py": "turns values of settings back that it told Optuna",
    "lit_qlora/sweep/trials.py": "makes plain values of its own settings",
    "lit_qlora/train/watch.py": "reads the kernel's own files",
    "lit_qlora/prompts/calls.py": "finds values in what a model said, with check_depth",
    "lit_qlora/prompts/style.py": "makes plain values of its own settings",
    "eval/lm_eval_harness.py": "makes plain values of its own results",
    "scripts/demo.py": "reads what the command before it wrote",
}
"""Files that parse or read texts without files.reading, and why they may."""


def test_whatever_somebody_else_wrote_is_read_in_one_place() -> None:
    found = set()
    for path in (
        file for folder in ("lit_qlora", "scripts", "eval", "finetune") for file in (ROOT / folder).rglob("*.py")
    ):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        names = [ast.unparse(call) for call in calls if isinstance(call, ast.Attribute)]
        if any(name in PARSERS or (name.endswith(".read_text") and name != "reading.read_text") for name in names):
            found.add(str(path.relative_to(ROOT)))
    assert found - {"lit_qlora/files/reading.py"} == set(ELSEWHERE)


def test_keys_can_be_asked_to_be_unique() -> None:
    assert parse_json('{"a": 1, "a": 2}', "x") == {"a": 2}
    with pytest.raises(CheckpointError, match="the same key twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', "x", unique=True)


def test_a_torn_log_is_read_without_what_is_torn(tmp_path: Path) -> None:
    lines = [b'{"step": 1}', b"\xff\x00\x80garbage", b"[1]", b"5", b"null", b"", b"[" * DEEP, b'{"step": 2}', b'{"st']
    assert list(read_json_lines(written(tmp_path, b"\n".join(lines)))) == [{"step": 1}, {"step": 2}]


def bomb(levels: int) -> str:
    rows = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    rows += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, levels)]
    return "\n".join(rows)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(9), "more than 100,000 values, its aliases resolved"),
        ("[" * 3000, "nested more than 64 deep"),
        ("a: " + "{b: " * 3000, "nested more than 64 deep"),
        ("a: [1", "not valid YAML"),
        ("a: \x00", "not valid YAML"),
        ("a: *b", "not valid YAML"),
        ("a: b\n---\nc: d\n", "not valid YAML: it holds a second document"),
    ],
)
def test_yaml_of_any_kind_is_read_or_refused_in_words(text: str, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, text.encode())
    tracemalloc.start()
    with pytest.raises(CheckpointError, match=words) as caught:
        read_yaml_text(path)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    assert str(caught.value).startswith(f"{path}:")
    assert len(str(caught.value)) < len(str(path)) + 300


def test_yaml_that_is_right_is_read_as_it_is(tmp_path: Path) -> None:
    for text in ("", "a: 1\n", bomb(4), "a: &x {b: [1, 2]}\nc: *x\nd: !function utils.f\n"):
        assert read_yaml_text(written(tmp_path, text.encode())) == text


def test_an_alias_of_itself_counts_once() -> None:
    check_yaml("a: &a [*a]", "x")


def test_yaml_that_is_too_long_is_not_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_YAML", 100)
    with pytest.raises(CheckpointError, match="larger than"):
        read_yaml_text(written(tmp_path, b"a: b\n" * 30))
