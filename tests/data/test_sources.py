"""Reading examples: three formats, and a complaint with a place for everything that is wrong."""

import json
import time
from pathlib import Path

import pytest

from lit_qlora.data import find_files, read_examples
from lit_qlora.errors import DataError

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def refusal(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(path)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_three_formats_hold_the_same_examples(tmp_path: Path, name: str) -> None:
    content = {
        "a.json": json.dumps([GOOD, GOOD | {"input": 'Not red, "green"\nor blue.'}], indent=1),
        "a.jsonl": lines(GOOD, GOOD | {"input": 'Not red, "green"\nor blue.'}),
        "a.csv": "instruction,input,output\nName a colour.,,Blue.\n"
        'Name a colour.,"Not red, ""green""\nor blue.",Blue.\n',
    }[name]
    first, second = read_examples(write(tmp_path / name, content))
    assert (first.instruction, first.input, first.output) == tuple(GOOD.values())
    assert second.input == 'Not red, "green"\nor blue.'


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path / "a.json", lines(GOOD, GOOD)))) == 2


def test_a_lone_object_is_one_sample(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path / "a.json", json.dumps(GOOD)))) == 1


def test_an_absent_or_null_input_is_an_empty_one(tmp_path: Path) -> None:
    rows = ({"instruction": "a", "output": "b"}, GOOD | {"input": None})
    assert [example.input for example in read_examples(write(tmp_path / "a.jsonl", lines(*rows)))] == ["", ""]


@pytest.mark.parametrize(
    "content",
    [
        "\n\n" + lines(GOOD) + "\n  \n" + lines(GOOD) + "\n\n\n",
        "\ufeff" + lines(GOOD, GOOD),
        lines(GOOD, GOOD).replace("\n", "\r\n"),
        lines(GOOD, GOOD).rstrip("\n"),
    ],
    ids=["blank lines", "byte-order mark", "CRLF", "no newline at the end"],
)
def test_harmless_oddities_of_text_files_are_no_errors(tmp_path: Path, content: str) -> None:
    examples = read_examples(write(tmp_path / "a.jsonl", content))
    assert [(e.instruction, e.output) for e in examples] == [("Name a colour.", "Blue.")] * 2


def test_a_csv_file_may_have_crlf_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = '\ufeffinstruction,input,output\r\n\r\na,"b\r\nc",d\r\n\r\n'
    (example,) = read_examples(write(tmp_path / "a.csv", content))
    assert (example.instruction, example.input, example.output) == ("a", "b\r\nc", "d")


def test_rare_line_separators_are_text_not_ends_of_lines(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree\x85four"
    row = GOOD | {"output": text}
    for path in (
        write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False)),
        write(tmp_path / "a.csv", f"instruction,input,output\na,,{text}\n"),
    ):
        assert read_examples(path)[0].output == text


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert refusal(path) == f"{path} holds no samples."


def test_an_empty_list_and_a_lone_header_are_refused(tmp_path: Path) -> None:
    assert "holds no samples" in refusal(write(tmp_path / "a.json", "[]"))
    assert "holds no samples" in refusal(write(tmp_path / "a.csv", "instruction,input,output\n"))


def test_malformed_json_is_placed_by_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*[GOOD] * 16, '{"instruction": "x", "output": }', GOOD))
    assert refusal(path) == f"{path}:17: not valid JSON: Expecting value at column 32"
    path = write(tmp_path / "a.json", '[\n {"instruction": "x",\n  "output": }]')
    assert refusal(path) == f"{path}:3: not valid JSON: Expecting value at column 13."


def test_every_complaint_comes_at_once_ten_shown_and_all_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "x", "output": 5}, "{", {"output": "x"}] * 5
    message = refusal(write(tmp_path / "a.jsonl", lines(GOOD, *rows))).splitlines()
    assert len(message) == 11
    assert [line.split(":")[1] for line in message[:10]] == [str(number) for number in range(2, 12)]
    assert message[-1].strip() == "... and 5 more"


def test_a_byte_that_is_not_utf8_is_placed(tmp_path: Path) -> None:
    bad = b'{"instruction": "caf\xe9", "output": "x"}\n'
    path = write(tmp_path / "a.jsonl", lines(*[GOOD] * 60).encode() + bad)
    assert refusal(path).startswith(f"{path}:61: byte 0xe9 is not UTF-8 (column 21).")


def test_utf16_and_gzip_are_called_by_their_names(tmp_path: Path) -> None:
    assert "looks like UTF-16" in refusal(write(tmp_path / "a.json", json.dumps([GOOD]).encode("utf-16")))
    assert "Decompress it" in refusal(write(tmp_path / "b.json", b"\x1f\x8b\x08\x00rest"))


def test_a_list_inside_an_object_is_pointed_at(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.json", json.dumps({"version": 1, "data": [GOOD]})))
    assert "expected a list of samples, found an object" in message
    assert "'data'" in message


def test_a_missing_column_is_named_with_the_sample_and_what_it_has(tmp_path: Path) -> None:
    rows = [*[GOOD] * 6, {"instruction": "a", "input": "b", "answer": "c"}]
    path = write(tmp_path / "a.json", json.dumps(rows))
    assert refusal(path) == f"{path}: sample 7: no 'output' (has: instruction, input, answer)"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (None, "null"),
        (5, "int"),
        (1.5, "float"),
        (float("nan"), "float"),
        (["a"], "list"),
        ({}, "dict"),
        (True, "bool"),
    ],
)
def test_a_value_that_is_not_text_is_named_by_its_type(tmp_path: Path, value: object, name: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, GOOD | {"output": value}))
    assert refusal(path) == f"{path}:2: 'output' is {name}, not text"


@pytest.mark.parametrize("record", ["hello", "", 5, None, [], [GOOD], True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_record_that_is_no_object_is_refused(tmp_path: Path, name: str, record: object) -> None:
    content = json.dumps([GOOD, record]) if name == "a.json" else lines(GOOD, json.dumps(record))
    message = refusal(write(tmp_path / name, content))
    assert "expected an object with instruction, input, output, found " + type(record).__name__ in message


@pytest.mark.parametrize("answer", ["", "  \n\t"])
def test_an_empty_answer_is_refused(tmp_path: Path, answer: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, GOOD | {"output": answer}))
    assert refusal(path) == f"{path}:2: the answer in 'output' is empty"


def test_half_a_surrogate_pair_is_refused_because_no_tokenizer_can_encode_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "a", "output": "\\ud83d"}\n')
    assert refusal(path) == f"{path}:1: 'output' holds half of a surrogate pair, which is no character"
    whole = write(tmp_path / "b.jsonl", '{"instruction": "a", "output": "\\ud83d\\ude42"}\n')
    assert read_examples(whole)[0].output == "🙂"


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("bomb", ["[" * 100_000, "9" * 5000], ids=["too deep", "too many digits"])
def test_json_bombs_are_refused(tmp_path: Path, name: str, bomb: str) -> None:
    assert "not valid JSON" in refusal(write(tmp_path / name, bomb))


def test_a_line_of_five_megabytes_is_read(tmp_path: Path) -> None:
    (example,) = read_examples(write(tmp_path / "a.jsonl", lines(GOOD | {"output": "x" * 5_000_000})))
    assert len(example.output) == 5_000_000


def test_another_csv_delimiter_is_recognised(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.csv", "instruction;input;output\na;b;c\n"))
    assert "no column 'instruction'" in message
    assert "delimited by ';'" in message


def test_an_unclosed_quotation_mark_is_placed_where_its_record_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,input,output\na,b,c\n\n"d,e,f\ng,h,i\n')
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert "Is a quotation mark unclosed?" in message


def test_a_csv_row_of_another_length_is_placed_where_it_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,input,output\na,"b\nb",c\nd,"e\ne"\nf,g,h,i\n')
    assert refusal(path).splitlines() == [
        f"{path}:4: has 2 columns, the header 3",
        f"       {path}:6: has 4 columns, the header 3",
    ]


def test_fifty_thousand_examples_with_one_bad_line_are_refused_within_two_seconds(tmp_path: Path) -> None:
    good = lines(GOOD)
    path = write(tmp_path / "a.jsonl", good * 49_999 + "{\n" + good)
    start = time.process_time()
    assert refusal(path).startswith(f"{path}:50000: ")
    assert time.process_time() - start < 2


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "alpaca.json", "[]")
    with pytest.raises(DataError, match=r"data\.path .*alpaka\.json does not exist\. Did you mean alpaca\.json\?"):
        find_files(tmp_path / "alpaka.json", None)


def test_an_unknown_type_of_file_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"'\.parquet' cannot be read\. Known: \.json, \.jsonl, \.csv"):
        find_files(write(tmp_path / "a.parquet", ""), None)


def test_a_directory_stands_for_its_train_and_val_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no train\.json, train\.jsonl or train\.csv"):
        find_files(tmp_path, None)
    train = write(tmp_path / "train.csv", "")
    assert find_files(tmp_path, None) == (train, None)
    val = write(tmp_path / "val.json", "")
    assert find_files(tmp_path, None) == (train, val)
    other = write(tmp_path / "other.json", "")
    assert find_files(tmp_path, other) == (train, other)
    write(tmp_path / "train.json", "")
    with pytest.raises(DataError, match=r"several train files: train\.json, train\.csv"):
        find_files(tmp_path, None)


def test_a_validation_file_that_is_none_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.json", "")
    for missing in (tmp_path / "b.json", tmp_path):
        with pytest.raises(DataError, match=r"data\.val_path .* is not a file"):
            find_files(train, missing)
