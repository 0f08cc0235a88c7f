"""Every way in which data is wrong that people have met, and what they are told: place, reason, what to do.

The numbers B01 to B29 count them.
"""

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data.examples import read_examples
from lit_qlora.data.load import Loaded, load
from lit_qlora.data.readers import READERS
from lit_qlora.data.sources import find_sources
from lit_qlora.errors import DataError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig
from tests.data.test_sources import compressed

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
ALPACA_HEADER = "instruction,input,output\n"


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


ADVICE = "\n       Mend them, or leave them out with --data.on_error skip."


def refusal(path: Path, **settings: Any) -> str:
    """What is told, without what to do where that is the same for most."""
    with pytest.raises(DataError) as caught:
        read_examples(path, **settings)
    return str(caught.value).removesuffix(ADVICE)


@pytest.fixture
def loaded(tiny_checkpoint: Path, tmp_path: Path):
    """Loads rows as a run does."""

    def run(rows: list[Any], max_length: int = 96, **settings: Any) -> Loaded:
        path = write(tmp_path / "a.jsonl", lines(*rows))
        data = DataConfig(**{"path": str(path), "prompt": "qa", "cache_dir": "none"} | settings)
        return load(data, tiny_checkpoint, Tokenizer(tiny_checkpoint), max_length, seed=1)

    return run


def test_b01_a_malformed_line_is_placed_by_line_and_column(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*[GOOD] * 16, '{"instruction": "x", "output": }', GOOD))
    assert refusal(path) == f"{path}:17: not valid JSON: Expecting value at column 32"
    path = write(tmp_path / "a.json", '[\n {"instruction": "x",\n  "output": }]')
    assert refusal(path) == f"{path}:3: not valid JSON: Expecting value at column 13."


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('[{"instruction": "x"} {"a": 1}]', "Expecting ',' delimiter at column 23"),
        ('[{"instruction": "x"}', "the list has no end"),
        ("[1] 2", "Extra data at column 5"),
        ("[", "Expecting value"),
        ("5 6", "Extra data"),
        ("nul", "Expecting value"),
    ],
)
def test_b01_a_list_that_is_none_is_placed_too(tmp_path: Path, content: str, reason: str) -> None:
    assert reason in refusal(write(tmp_path / "a.json", content))


def test_b02_blank_lines_are_no_errors(tmp_path: Path) -> None:
    assert len(read_examples(write(tmp_path / "a.jsonl", f"\n{lines(GOOD)}\n \n{lines(GOOD)}\n\n")).examples) == 2


def test_b03_a_byte_that_is_not_utf8_is_placed(tmp_path: Path) -> None:
    bad = b'{"instruction": "caf\xe9", "output": "x"}\n'
    path = write(tmp_path / "a.jsonl", lines(*[GOOD] * 60).encode() + bad)
    assert refusal(path).startswith(f"{path}:61: byte 0xe9 is not UTF-8 (column 21).")


def test_b03_lines_that_are_not_utf8_can_be_skipped_one_by_one(tmp_path: Path) -> None:
    bad = b'{"instruction": "caf\xe9", "output": "x"}\n'
    path = write(tmp_path / "a.jsonl", bad + lines(GOOD).encode() + bad)
    assert [line.split(":")[1] for line in refusal(path).splitlines()] == ["1", "3"]
    reading = read_examples(path, skip=True)
    assert (len(reading.examples), reading.skipped) == (1, 2)


@pytest.mark.parametrize("name", ["a.json", "a.csv", "a.txt"])
def test_b03_every_kind_of_file_says_where_it_is_not_utf8(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, b"\xef\xbb\xbf[\n\n caf\xe9")
    assert f"{path}:3: byte 0xe9 is not UTF-8 (column 5)." in refusal(path, columns="a:instruction,b:output")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_b04_a_byte_order_mark_is_no_error(tmp_path: Path, name: str) -> None:
    text = {"a.json": json.dumps([GOOD]), "a.jsonl": lines(GOOD), "a.csv": ALPACA_HEADER + "a,,b\n"}[name]
    assert len(read_examples(write(tmp_path / name, "\ufeff" + text)).examples) == 1


def test_b05_utf16_is_called_by_its_name(tmp_path: Path) -> None:
    assert "looks like UTF-16" in refusal(write(tmp_path / "a.json", json.dumps([GOOD]).encode("utf-16")))


@pytest.mark.parametrize("content", ["", "\n \n", "\ufeff"])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv", "a.tsv", "a.txt"])
def test_b06_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path / name, content)
    assert refusal(path) == f"{path} holds no samples."


def test_b07_an_empty_list_and_a_lone_header_are_refused(tmp_path: Path) -> None:
    assert "holds no samples" in refusal(write(tmp_path / "a.json", " [ ] "))
    assert "holds no samples" in refusal(write(tmp_path / "a.csv", ALPACA_HEADER))


def test_b08_one_sample_is_enough_and_leaves_none_to_validate_on(loaded) -> None:
    found = loaded([GOOD])
    assert (len(found.train), len(found.val)) == (1, 0)
    assert "there is no sample to validate on" in found.audit.notes()


def test_b09_a_list_inside_an_object_is_pointed_at(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "a.json", json.dumps({"version": 1, "data": [GOOD]})))
    assert "expected a list of samples, found an object. Did you mean the list under 'data'?" in message


def test_b09_a_lone_conversation_is_a_sample(tmp_path: Path) -> None:
    spoken = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Yo"}]
    assert len(read_examples(write(tmp_path / "a.json", json.dumps({"conversations": spoken}))).examples) == 1


def test_b10_a_missing_column_is_named_with_the_sample_and_what_it_has(tmp_path: Path) -> None:
    rows = [*[GOOD] * 6, {"instruction": "a", "input": "b", "answer": "c"}]
    path = write(tmp_path / "a.json", json.dumps(rows, indent=0))
    assert refusal(path) == f"{path}:32: sample 7: no 'output' (has: instruction, input, answer)"


def test_b10_of_many_columns_the_first_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, {str(i): "a" for i in range(500)}))
    assert refusal(path).endswith("(has: " + ", ".join(map(str, range(20))) + ", ...)")


def test_b11_columns_that_no_format_has_are_listed_with_the_flag_that_names_them(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"frage_prompt": "a", "antwort": "b"}))
    message = refusal(path)
    assert message.startswith(f"{path}:1: no format has the columns frage_prompt, antwort.\n")
    flag = "frage_prompt:instruction,antwort:output"
    assert f"--data.columns {flag}, or name a --data.format: alpaca," in message
    assert len(read_examples(path, columns=flag).examples) == 1


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), (5, "int"), (1.5, "float"), (["a"], "list"), ({}, "dict"), (True, "bool")],
)
def test_b12_a_value_that_is_not_text_is_named_by_its_type(tmp_path: Path, value: object, name: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, GOOD | {"output": value}))
    assert refusal(path) == f"{path}:2: 'output' is {name}, not text"


@pytest.mark.parametrize("record", ["hello", "", 5, None, [], [GOOD], True])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_b12_a_record_that_is_no_object_is_refused(tmp_path: Path, name: str, record: object) -> None:
    content = json.dumps([GOOD, record]) if name == "a.json" else lines(GOOD, json.dumps(record))
    message = refusal(write(tmp_path / name, content))
    assert message.endswith(
        f"expected an object with instruction, input, output, system, found {type(record).__name__}"
    )


@pytest.mark.parametrize("answer", ["", "  \n\t"])
def test_b13_an_empty_answer_is_refused_unless_it_is_allowed(tmp_path: Path, loaded, answer: str) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, GOOD | {"output": answer}))
    assert f"{path}:2: the answer in 'output' is empty" in refusal(path)
    assert "--data.allow empty_answers" in refusal(path)
    found = loaded([GOOD, GOOD | {"output": answer}], allow="empty_answers", val_fraction=0.0)
    assert len(found.train) == 2
    assert "1 answers are empty" in found.audit.notes()


def test_b14_a_prompt_of_blanks_is_counted(loaded) -> None:
    found = loaded([GOOD, GOOD | {"instruction": " \n"}, GOOD | {"instruction": "", "input": "x"}])
    assert "1 prompts are empty" in found.audit.notes()


def test_b15_control_characters_are_counted(loaded) -> None:
    found = loaded([GOOD, GOOD | {"input": "a\0b"}, GOOD | {"output": "a\x1bb"}, GOOD | {"output": "a\tb\nc"}])
    assert "2 samples hold NUL or other control characters" in found.audit.notes()


def test_b15_half_a_surrogate_pair_is_refused_because_no_tokenizer_can_encode_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"instruction": "a", "output": "\\ud83d"}\n')
    assert refusal(path) == f"{path}:1: 'output' holds half of a surrogate pair, which is no character"
    whole = write(tmp_path / "b.jsonl", '{"instruction": "a", "output": "\\ud83d\\ude42"}\n')
    assert read_examples(whole).examples[0].output == "🙂"


def test_b16_answers_that_are_cut_are_counted_and_most_of_them_stop_the_run(loaded) -> None:
    long = GOOD | {"output": "9 " * 60}
    assert "1 answers were cut (25 %)" in loaded([GOOD, GOOD, GOOD, long]).audit.notes()
    assert loaded([GOOD, GOOD, GOOD, long]).audit.red == []
    (red,) = loaded([GOOD, long, long]).audit.red
    assert red.startswith("2 of 3 answers do not fit into 96 tokens, counting their prompts. Raise data.max_length")
    assert loaded([GOOD, long, long], allow="cut_answers").audit.red == []


def test_b17_a_run_with_every_label_masked_is_refused(loaded) -> None:
    silent = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}
    with pytest.raises(
        DataError, match=r"no token would be labelled; of 2 samples 0 are too long .* 2 have no labelled"
    ):
        loaded([silent, silent])
    heard = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    (red,) = loaded([silent, silent, heard]).audit.red
    assert red.startswith("2 of 3 samples have no labelled token")


def test_b18_no_sample_is_longer_than_the_context(loaded) -> None:
    found = loaded([GOOD, GOOD | {"instruction": "7 " * 200}, GOOD | {"output": "9 " * 200}])
    assert max(found.train.lengths.max(), found.val.lengths.max()) <= 96
    assert "1 prompts were cut" in found.audit.notes()
    assert found.audit.warnings == []


def test_b19_prompts_that_are_mostly_cut_are_a_warning(loaded) -> None:
    found = loaded([GOOD | {"instruction": "word " * 200}] * 3, val_fraction=0.0)
    (warning,) = found.audit.warnings
    assert warning.startswith("3 of 3 prompts were cut at their beginning: a sample may have 96 tokens, and the median")
    assert warning.endswith("Raise --data.max_length, or look at what is left.")


def test_b19_samples_that_come_twice_are_counted(loaded) -> None:
    rows = [GOOD | {"output": str(i)} for i in range(5)]
    assert "2 samples say what an earlier one says" in loaded([*rows, rows[0], rows[0]], val_fraction=0.0).audit.notes()


def test_b20_validation_samples_that_are_trained_on_are_counted(loaded, tmp_path: Path) -> None:
    rows = [GOOD | {"output": str(i)} for i in range(5)]
    val = write(tmp_path / "val.jsonl", lines(rows[1], GOOD | {"output": "new"}))
    found = loaded(rows, val_path=str(val))
    assert "1 validation samples are also trained on" in found.audit.notes()


def test_b21_names_of_control_tokens_are_text_and_counted(loaded, tiny_checkpoint: Path) -> None:
    found = loaded([GOOD, GOOD | {"instruction": "What is </s>?", "output": "<s>"}], val_fraction=0.0)
    tokenizer = Tokenizer(tiny_checkpoint)
    assert "1 samples name a control token, which is encoded as text" in found.audit.notes()
    assert (found.train[1].tokens == tokenizer.eos_id).sum() == 1


def test_b22_a_delimiter_that_splits_header_and_records_otherwise_is_none(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction;input;output\na;b\n")
    assert refusal(path).startswith(f"{path}:1: there is one column only (instruction;input;output). ")
    assert "Is it delimited by ';'? Then its records have other columns than its header." in refusal(path)


def test_b22_an_unclosed_quotation_mark_is_placed_where_its_record_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,input,output\na,b,c\n\n"d,e,f\ng,h,i\n')
    message = refusal(path)
    assert message.startswith(f"{path}:4: ")
    assert "Is a quotation mark unclosed?" in message


def test_b22_a_row_of_another_length_is_placed_where_it_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'instruction,input,output\na,"b\nb",c\nd,"e\ne"\nf,g,h,i\n')
    assert refusal(path).splitlines() == [
        f"{path}:4: has 2 columns, the header 3",
        f"       {path}:6: has 4 columns, the header 3",
    ]


def test_b22_a_column_that_stands_twice_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "\ninstruction,output,output\na,b,c\n")
    assert refusal(path) == f"{path}:2: the column 'output' stands twice in the header."


def test_b23_carriage_returns_are_no_errors(tmp_path: Path) -> None:
    jsonl = write(tmp_path / "a.jsonl", lines(GOOD, GOOD).replace("\n", "\r\n"))
    table = write(tmp_path / "a.csv", 'instruction,output\r\na,"b\r\nc"\r\n')
    assert len(read_examples(jsonl).examples) == 2
    assert read_examples(table).examples[0].output == "b\r\nc"


def test_b23_carriage_returns_alone_are_called_by_their_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "instruction,output\ra,b\r")
    assert (
        refusal(path) == f"{path}:1: not valid CSV: its lines end with carriage returns alone. Save it with line feeds."
    )


def test_b24_a_directory_without_a_training_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no file of a type that can be read: \.json, \.jsonl, \.csv"):
        find_sources([str(tmp_path)], None)
    write(tmp_path / "test-1.jsonl", "")
    with pytest.raises(DataError, match=r"has no part train, but test\. Name the file or folder"):
        find_sources([str(tmp_path)], None)


def test_b25_an_unknown_type_of_file_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.xlsx", "")
    with pytest.raises(DataError, match=r"'\.xlsx' cannot be read\. Known: \.json, \.jsonl, \.csv, \.tsv, \.parquet"):
        find_sources([str(path)], None)


SAY, ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}


@pytest.mark.parametrize(
    ("spoken", "reason"),
    [
        ([SAY, SAY, ANSWER], "turn 2: the role 'user' comes twice in a row"),
        ([SAY, ANSWER, ANSWER], "turn 3: the role 'assistant' answers nobody"),
        ([ANSWER], "turn 1: the role 'assistant' answers nobody"),
        ([SAY, ANSWER, SAY], "turn 3: nobody answers the last prompt"),
        ([SAY, {"role": "assistant"}], "turn 2: no 'content' (has: role)"),
        ([SAY, {"role": "assistant", "content": None}], "turn 2: 'content' is null, not text"),
        ([SAY, {"role": "robot", "content": "b"}], "turn 2: the role 'robot' is not known (known: system, "),
        ([SAY, "b"], "turn 2 is str, not an object with 'role' and 'content'"),
        ([SAY, {"role": "system", "content": "c"}, ANSWER], "turn 2: a system message stands at the beginning"),
        ([], "the conversation is empty"),
        ("hello", "'messages' is str, not a list"),
        ([SAY, ANSWER | {"content": " "}], "the answer of turn 1 is empty"),
    ],
)
def test_b26_a_conversation_that_is_none_is_placed_by_sample_and_turn(tmp_path: Path, spoken: Any, reason: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"messages": [SAY, ANSWER]}, {"messages": spoken}))
    assert refusal(path).startswith(f"{path}:2: {reason}")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_b27_a_line_of_five_megabytes_is_read(tmp_path: Path, name: str) -> None:
    text = "x" * 5_000_000
    content = f"{ALPACA_HEADER}a,,{text}\n" if name == "a.csv" else json.dumps(GOOD | {"output": text})
    path = write(tmp_path / name, content)
    assert len(read_examples(path).examples[0].output) == 5_000_000


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
@pytest.mark.parametrize("bomb", ["[" * 100_000, "9" * 5000], ids=["too deep", "too many digits"])
def test_b28_json_bombs_are_refused(tmp_path: Path, name: str, bomb: str) -> None:
    assert "not valid JSON" in refusal(write(tmp_path / name, bomb))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ('{"instruction": "a", "output": NaN}', "NaN is not JSON"),
        ('{"instruction": "a", "output": -Infinity}', "-Infinity is not JSON"),
        ('{"instruction": "a", "output": "b", "output": "c"}', "the key 'output' stands twice in one object"),
    ],
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_b28_what_json_allows_and_nobody_means_is_refused_with_its_line(
    tmp_path: Path, name: str, record: str, reason: str
) -> None:
    good = json.dumps(GOOD)
    path = write(tmp_path / name, f"[{good},\n{record}]" if name == "a.json" else f"{good}\n{record}\n")
    place = f"{path}:2: sample 2" if name == "a.json" else f"{path}:2"
    assert refusal(path) == f"{place}: {reason}"


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_b29_a_damaged_compressed_file_is_refused(tmp_path: Path, kind: str) -> None:
    whole = compressed(kind, b"x" * 1000)
    for content in (whole[:-9], whole[:8] + b"?" * 8 + whole[16:]):
        path = write(tmp_path / f"a.jsonl.{kind}", content)
        assert refusal(path).startswith(f"{path} is compressed and damaged: ")


def test_b29_other_archives_are_called_by_their_name(tmp_path: Path) -> None:
    for name, kind in (("a.zip", ".zip"), ("a.parquet.gz", ".parquet.gz")):
        with pytest.raises(DataError, match=rf"'{kind}' cannot be read\. Decompress it first\."):
            find_sources([str(write(tmp_path / name, ""))], None)


def test_b29_a_file_that_unpacks_to_a_thousand_times_its_size_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.data.text_files.FREE", 0)
    path = write(tmp_path / "a.jsonl.gz", compressed("gz", b" " * 10**6))
    assert refusal(path) == f"{path} unpacks to more than 250 times its size. Decompress it first."


@pytest.mark.parametrize("column", ["a time after the year 9999", "bytes that are no text"])
def test_a_parquet_file_with_a_value_that_python_has_not_is_refused(tmp_path: Path, column: str) -> None:
    import pyarrow
    import pyarrow.parquet

    text = pyarrow.StringArray.from_buffers(
        2, pyarrow.array([0, 1, 2], "int32").buffers()[1], pyarrow.py_buffer(b"a\xff")
    )
    column = pyarrow.array([0, 2**62], pyarrow.timestamp("us")) if column.startswith("a time") else text
    table = pyarrow.table({"instruction": ["a", "b"], "output": ["c", "d"], "other": column})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert refusal(tmp_path / "a.parquet").startswith(f"{tmp_path / 'a.parquet'}: rows 1 to 2 hold what is no value")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_text_that_a_small_file_holds_many_times_is_read_a_few_times_at_once(tmp_path: Path, kind: str) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.DictionaryArray.from_arrays([0] * 20_000, ["x" * 10_000])
    table, path = pyarrow.table({"text": texts}), tmp_path / f"a.{kind}"
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    assert path.stat().st_size < 200_000
    tracemalloc.start()
    location = ""
    for number, (location, _) in enumerate(READERS[f".{kind}"](path), start=1):
        assert location == f"{path}: row {number}"
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert location.endswith("row 20000")
    assert most < 20_000_000


def test_a_parquet_or_arrow_file_that_is_none_is_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    assert "is not a Parquet file" in refusal(write(tmp_path / "a.parquet", b"PAR1 garbage"))
    pyarrow.parquet.write_table(pyarrow.table({"input": ["a"]}), tmp_path / "a.parquet")
    no_name = (tmp_path / "a.parquet").read_bytes().replace(b"input", b"i\xbbput")
    assert "codec can't decode byte 0xbb" in refusal(write(tmp_path / "a.parquet", no_name))
    for content in (b"", b"ARROW1 garbage", b"\xff\xff\xff\xff garbage"):
        assert "is not an Arrow file" in refusal(write(tmp_path / "a.arrow", content))


# All of it together.


def test_every_number_has_a_test() -> None:
    numbers = {name[6:8] for name in globals() if name.startswith("test_b")}
    assert numbers == {f"{number:02}" for number in range(1, 30)}


def test_a_fault_of_every_record_is_told_once_with_their_number(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*[{"instruction": "x", "output": 5}] * 60))
    assert refusal(path) == f"{path}:1: 'output' is int, not text\n       ... and 59 more, each with this fault"


def test_a_data_set_of_the_hub_is_answered_with_its_name_here() -> None:
    with pytest.raises(DataError, match=r"tatsu-lab/alpaca does not exist\. On the hub: hf:tatsu-lab/alpaca$"):
        find_sources(["tatsu-lab/alpaca"], None)
    with pytest.raises(DataError, match=r"data/alpaca\.json does not exist\.$"):
        find_sources(["data/alpaca.json"], None)


def test_every_complaint_comes_at_once_ten_shown_and_all_counted(tmp_path: Path) -> None:
    rows = [{"instruction": "x", "output": 5}, "{", {"output": "x"}] * 5
    message = refusal(write(tmp_path / "a.jsonl", lines(GOOD, *rows))).splitlines()
    assert len(message) == 11
    assert [line.split(":")[1] for line in message[:10]] == [str(number) for number in range(2, 12)]
    assert message[-1].strip() == "... and 5 more"


@pytest.mark.parametrize(
    ("name", "content", "line", "end"),
    [
        ("a.json", f"[{json.dumps(GOOD)},\n{{}},\n{json.dumps(GOOD)}", 2, "the list has no end"),
        ("a.csv", ALPACA_HEADER + 'a,,b\nc\n"d,e,f\n', 3, "Is a quotation mark unclosed?"),
    ],
)
def test_what_was_wrong_before_a_file_breaks_off_is_told_too_and_the_rest_is_never_skipped(
    tmp_path: Path, name: str, content: str, line: int, end: str
) -> None:
    path = write(tmp_path / name, content)
    for skip in (False, True):
        first, second = refusal(path, skip=skip).splitlines()  # no advice to skip what cannot be counted
        assert first.startswith(f"{path}:{line}: ")
        assert end in second


def test_the_advice_is_to_mend_or_to_skip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(GOOD, "{"))
    with pytest.raises(DataError, match=r"leave them out with --data\.on_error skip\.$"):
        read_examples(path)


def test_what_is_wrong_can_be_skipped_and_is_counted(tmp_path: Path, loaded) -> None:
    rows = [GOOD, {"instruction": "x", "output": 5}, "{", GOOD | {"output": ""}, GOOD | {"output": "Red."}]
    reading = read_examples(write(tmp_path / "b.jsonl", lines(*rows)), skip=True)
    assert (len(reading.examples), reading.skipped) == (2, 3)
    assert (
        "3 records could not be read, or not be written in the style, and were left out"
        in loaded(rows, on_error="skip").audit.notes()
    )
    path = write(tmp_path / "c.jsonl", lines("{", "}"))
    assert refusal(path, skip=True).startswith(f"{path} holds no samples that can be read: {path}:1: not valid JSON")


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.csv"])
def test_fifty_thousand_samples_with_one_bad_one_are_refused_in_seconds(tmp_path: Path, name: str) -> None:
    good = {"instruction": "Name a colour. " * 10, "input": "x" * 50, "output": "Blue. " * 60}
    if name == "a.json":
        content = json.dumps([*[good] * 49_999, {"instruction": "a"}], indent=1)
    elif name == "a.jsonl":
        content = lines(good) * 49_999 + '{"instruction": "a"}\n'
    else:
        content = ALPACA_HEADER + ",".join(good.values()) + "\n" + (",".join(good.values()) + "\n") * 49_998 + "a,b\n"
    path = write(tmp_path / name, content)
    start = time.process_time()
    message = refusal(path)
    assert time.process_time() - start < 10  # it takes half a second of a processor
    assert "\n" not in message
    assert str(path) in message
