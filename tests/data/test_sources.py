"""Where records come from: files of several kinds, directories, hub data sets, and several of them together."""

import bz2
import gzip
import json
import lzma
from pathlib import Path

import pytest

from lit_qlora.data.examples import read_examples
from lit_qlora.data.sources import Source, find_file, find_sources, fingerprint, read_records
from lit_qlora.errors import DataError

GOOD = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
OTHER = {"instruction": "Add.", "input": "1, 2\n3", "output": 'Six, "really" 🦊.'}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: object) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def parquet(path: Path, *rows: dict) -> Path:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    return path


def compressed(kind: str, content: bytes) -> bytes:
    import pyarrow

    if kind != "zst":
        return {"gz": gzip, "bz2": bz2, "xz": lzma}[kind].compress(content)
    buffer = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(buffer, "zstd") as packed:
        packed.write(content)
    return buffer.getvalue().to_pybytes()


CSV = 'instruction,input,output\nName a colour.,,Blue.\nAdd.,"1, 2\n3","Six, ""really"" 🦊."\n'
TSV = 'instruction\tinput\toutput\nName a colour.\t\tBlue.\nAdd.\t"1, 2\n3"\t"Six, ""really"" 🦊."\n'
KINDS = {
    "a.json": json.dumps([GOOD, OTHER], indent=1),
    "b.json": json.dumps([GOOD, OTHER]),
    "c.json": lines(GOOD, OTHER),  # JSON lines under a name that does not say so
    "a.jsonl": lines(GOOD, OTHER),
    "b.jsonl": json.dumps([GOOD, OTHER], indent=1),  # and the reverse
    "A.JSON": json.dumps([GOOD, OTHER]),
    "a.csv": CSV,
    "a.tsv": TSV,
}


@pytest.mark.parametrize("piece", [1, 5, 2**22])
@pytest.mark.parametrize("name", [*KINDS, "a.parquet"])
def test_the_same_samples_come_out_of_every_kind_of_file(
    tmp_path: Path, name: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.data.text_files.PIECE", piece)
    path = tmp_path / name
    write(path, KINDS[name]) if name in KINDS else parquet(path, GOOD, OTHER)
    read = read_examples(path)
    assert [(e.instruction, e.input, e.output) for e in read.examples] == [tuple(GOOD.values()), tuple(OTHER.values())]
    assert read.format == "alpaca"
    assert all(example.location.startswith(str(path)) for example in read.examples)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(
    "change",
    [
        lambda text: "\ufeff" + text,
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\n\n" + text + "\n \n",
    ],
    ids=["byte-order mark", "carriage returns", "blank lines"],
)
def test_what_editors_do_to_files_does_no_harm(tmp_path: Path, name: str, change) -> None:
    if name == "a.tsv" and change(" ") != "\ufeff ":
        change = str  # a blank in a table of tabs is a row
    read = read_examples(write(tmp_path / name, change(KINDS[name])))
    assert [(e.instruction, e.output) for e in read.examples] == [
        ("Name a colour.", "Blue."),
        ("Add.", OTHER["output"]),
    ]


@pytest.mark.parametrize("piece", [1, 7, 2**22])
def test_places_are_lines_and_numbers(tmp_path: Path, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_qlora.data.text_files.PIECE", piece)
    listed = write(
        tmp_path / "a.json", '[\n {"instruction": "a",\n  "output": "b"},\n\n {"instruction": "c", "output": "d"}]'
    )
    assert [e.location for e in read_examples(listed).examples] == [f"{listed}:2: sample 1", f"{listed}:5: sample 2"]
    table = write(tmp_path / "a.csv", 'instruction,output\na,"b\nb"\n\nc,d\n')
    assert [e.location for e in read_examples(table).examples] == [f"{table}:2", f"{table}:5"]
    rows = parquet(tmp_path / "a.parquet", GOOD, GOOD)
    assert [e.location for e in read_examples(rows).examples] == [f"{rows}: row 1", f"{rows}: row 2"]


@pytest.mark.parametrize("piece", [1, 7, 2**22])
@pytest.mark.parametrize("place", [(3, 13), (1, 2)])
def test_a_mistake_is_placed_however_the_file_is_read(
    tmp_path: Path, place: tuple[int, int], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_qlora.data.text_files.PIECE", piece)
    text = '[\n {"instruction": "x",\n  "output": }]' if place[0] == 3 else "[x"
    path = write(tmp_path / "a.json", text)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value) == f"{path}:{place[0]}: not valid JSON: Expecting value at column {place[1]}."


def test_rare_line_separators_are_text_not_ends_of_lines(tmp_path: Path) -> None:
    text = "one\u2028two\x0bthree\x85four"
    row = GOOD | {"output": text}
    for path in (
        write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False)),
        write(tmp_path / "a.csv", f"instruction,input,output\na,,{text}\n"),
    ):
        assert read_examples(path).examples[0].output == text


def test_a_text_file_is_one_document_without_a_prompt(tmp_path: Path) -> None:
    read = read_examples(write(tmp_path / "a.txt", "Once upon a time.\n\nThe end.\n"))
    (example,) = read.examples
    assert (read.format, example.instruction, example.output) == ("text", "", "Once upon a time.\n\nThe end.\n")


# Which sources data.path and data.val_path name.


def test_a_missing_file_is_answered_with_the_nearest_name(tmp_path: Path) -> None:
    write(tmp_path / "alpaca.json", "[]")
    with pytest.raises(DataError, match=r"data\.path .*alpaka\.json does not exist\. Did you mean alpaca\.json\?"):
        find_sources([str(tmp_path / "alpaka.json")], None)
    with pytest.raises(DataError, match=r"alpaka\.json does not exist\. Did you mean alpaca\.json\?"):
        find_file(tmp_path / "alpaka.json")


def test_a_directory_stands_for_its_train_and_val_files(tmp_path: Path) -> None:
    train = write(tmp_path / "train.csv", "")
    assert find_sources([str(tmp_path)], None) == ([Source(str(train))], None)
    val = write(tmp_path / "val.parquet", "")
    assert find_sources([str(tmp_path)], None) == ([Source(str(train))], Source(str(val)))
    other = write(tmp_path / "other.json", "")
    assert find_sources([str(tmp_path)], str(other)) == ([Source(str(train))], Source(str(other)))
    write(tmp_path / "train.json", "")
    with pytest.raises(DataError, match=r"several train files: train\.json, train\.csv"):
        find_sources([str(tmp_path)], None)


def test_several_sources_say_how_often_they_come(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.json", ""), write(tmp_path / "b.csv", "")
    train, _ = find_sources([str(first), f"{second}*0.5"], None)
    assert train == [Source(str(first)), Source(str(second), times=0.5)]


def test_a_pattern_or_folder_stands_for_all_its_files_together(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.csv"):
        write(tmp_path / name, CSV if name == "c.csv" else lines(GOOD | {"output": name}))
    write(tmp_path / "README.md", "")
    (both,), val = find_sources([f"{tmp_path}/*.jsonl*2"], None)
    assert (both.path, both.times, val) == (f"{tmp_path}/*.jsonl", 2, None)
    read = read_examples(both)
    assert [e.output for e in read.examples] == ["a.jsonl", "b.jsonl"]
    assert read.saw.endswith("; 2 files")
    assert len(read_examples(find_sources([str(tmp_path)], None)[0][0]).examples) == 4
    assert find_sources([f"{tmp_path}/?.csv"], None)[0] == [Source(f"{tmp_path}/c.csv")]
    before = fingerprint(both)
    write(tmp_path / "b.jsonl", "")
    assert fingerprint(both) != before
    with pytest.raises(DataError, match=r"data\.path .*/\*\.tsv matches no file\."):
        find_sources([f"{tmp_path}/*.tsv"], None)


def test_files_of_the_parts_of_a_folder_belong_together(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"):
        write(tmp_path / f"{name}.jsonl", lines(GOOD))
    (train,), val = find_sources([str(tmp_path)], None)
    assert [file.name[:8] for file in train.files] == ["train-00"] * 2
    assert val == Source(f"{tmp_path}/validation-00000-of-00001.jsonl")


def test_the_home_folder_may_be_written_as_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "a.jsonl", lines(GOOD))
    assert find_sources(["~/a.jsonl"], "~/*.jsonl") == ([Source(str(path))], Source(str(path)))


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz", "zst"])
def test_a_compressed_file_is_read_as_what_it_holds(tmp_path: Path, kind: str) -> None:
    for name in ("a.json", "a.jsonl", "a.csv"):
        path = write(tmp_path / f"{name}.{kind}", compressed(kind, KINDS[name].encode()))
        assert [e.output for e in read_examples(find_sources([str(path)], None)[0][0]).examples] == [
            "Blue.",
            OTHER["output"],
        ]


@pytest.mark.parametrize(
    ("encoding", "said"), [("utf-8", ""), ("utf-8-sig", ""), ("utf-16", "UTF-16"), ("cp1252", "Windows-1252")]
)
@pytest.mark.parametrize(("mark", "name"), [(";", "';'"), ("\t", "tabs"), ("|", "'|'"), (",", "")])
def test_a_table_shows_its_delimiter_and_its_encoding(
    tmp_path: Path, mark: str, name: str, encoding: str, said: str
) -> None:
    rows = [["Frage", "Antwort"], ["Größe, Preis", "5 €\nund; mehr"], ["Café?", "déjà vu"]]
    text = "".join(mark.join(f'"{cell}"' for cell in row) + "\r\n" for row in rows)
    path = write(tmp_path / "a.csv", text.encode(encoding))
    read = read_examples(path, columns="Frage:instruction,Antwort:output")
    assert [[e.instruction, e.output] for e in read.examples] == rows[1:]
    told = ", ".join([*([f"delimited by {name}"] if name else []), *([said] if said else [])])
    assert read.saw == "Frage:instruction,Antwort:output of columns Frage, Antwort" + (f"; {told}" if told else "")


def test_text_in_the_encoding_of_windows_is_read_too(tmp_path: Path) -> None:
    read = read_examples(write(tmp_path / "a.txt", "Un café.".encode("cp1252")))
    assert (read.examples[0].output, read.saw) == ("Un café.", "columns text; Windows-1252")


@pytest.mark.parametrize(
    "content",
    [
        "Привет".encode("cp1251"),
        "日本語".encode("shift_jis"),
        "naïve".encode() + b" caf\xe9\x9d",
        "Größe".encode()[:-2],
    ],
    ids=["Russian", "Japanese", "a byte that Windows has not", "a letter that is cut"],
)
def test_an_encoding_that_nobody_can_tell_is_refused_with_the_location(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path / "a.csv", b"instruction,output\n" + content + b",x\n")
    with pytest.raises(DataError, match=rf"{path}:2: byte 0x\w\w is not UTF-8 \(column \d+\)\. Save the file as UTF-8"):
        read_examples(path)


def test_a_data_set_that_the_library_saved_is_read(tmp_path: Path) -> None:
    import datasets

    one = datasets.Dataset.from_list([GOOD, OTHER])
    one.save_to_disk(tmp_path / "one", num_shards=2)
    datasets.DatasetDict(train=one, validation=one.select([0]), test=one).save_to_disk(tmp_path / "parts")
    (train,), none = find_sources([str(tmp_path / "one")], None)
    assert [e.output for e in read_examples(train).examples] == ["Blue.", OTHER["output"]]
    assert none is None
    (train,), val = find_sources([f"{tmp_path}/parts*0.5"], None)
    assert val is not None
    assert [len(read_examples(source).examples) for source in (train, val)] == [2, 1]
    assert train.times == 0.5
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"one is incomplete: data-00001-of-00002\.arrow is missing"):
        find_sources([str(tmp_path / "one")], None)


@pytest.mark.parametrize("times", ["", "0", "-1", "nan", "many", "1e9"])
def test_a_number_of_times_that_is_none_is_refused(tmp_path: Path, times: str) -> None:
    with pytest.raises(DataError, match=r"is not how often; write e\.g\. .*a\.json\*0\.5"):
        find_sources([f"{tmp_path / 'a.json'}*{times}"], None)


def test_a_validation_file_that_is_none_is_refused(tmp_path: Path) -> None:
    train = write(tmp_path / "a.json", "")
    with pytest.raises(DataError, match=r"data\.val_path .*b\.json does not exist\. Did you mean a\.json\?"):
        find_sources([str(train)], str(tmp_path / "b.json"))


def test_the_fingerprint_is_that_of_the_content(tmp_path: Path) -> None:
    one, other = write(tmp_path / "a.json", "[1]"), write(tmp_path / "b.json", "[1]")
    assert fingerprint(Source(str(one))) == fingerprint(Source(str(other)))
    write(other, "[2]")
    assert fingerprint(Source(str(one))) != fingerprint(Source(str(other)))


# The hub, without a network.


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the library datasets that holds org/foxes, as it lies there after a download."""
    import datasets

    cache = tmp_path / "hub"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "foxes"
    folder.mkdir()
    write(folder / "train.jsonl", lines(GOOD, OTHER))
    write(folder / "validation.jsonl", lines(GOOD))
    datasets.load_dataset(str(folder), cache_dir=str(cache))
    (cache / "foxes").rename(cache / "org___foxes")
    return folder


def test_a_hub_data_set_comes_from_the_cache_when_there_is_no_network(hub: Path) -> None:
    train, val = find_sources(["hf:org/foxes*2"], None)
    assert train == [Source("hf:org/foxes", "train", 2.0)]
    assert val == Source("hf:org/foxes", "validation")
    assert find_sources(["hf:org/foxes"], "hf:org/foxes")[1] == val
    read = read_examples(train[0])
    assert [e.output for e in read.examples] == ["Blue.", OTHER["output"]]
    assert read.examples[1].location == "hf:org/foxes (train): row 2"
    assert fingerprint(train[0]) != fingerprint(val)


def test_a_folder_may_stand_for_a_hub_data_set(hub: Path) -> None:
    train, val = find_sources([f"hf:{hub}"], None)
    assert len(list(read_records(train[0]))) == 2
    assert val is not None


def test_a_hub_data_set_that_cannot_be_had_says_what_to_do(hub: Path) -> None:
    with pytest.raises(DataError, match=r"hf:org/wolves cannot be loaded: .*\n.*HF_HOME"):
        find_sources(["hf:org/wolves"], None)


@pytest.mark.parametrize("named", ["", "train.jsonl"])
def test_data_that_a_killed_preparation_moved_aside_is_put_back(named: str, tmp_path: Path) -> None:
    aside = tmp_path / "train.jsonl.old-0123abcd"
    aside.mkdir()
    for name in ("train.jsonl", "val.jsonl"):
        (aside / name).write_text("old")
    (tmp_path / "val.jsonl").write_text("new")
    (train,), _ = find_sources([str(tmp_path / named)], None)
    assert train.path == str(tmp_path / "train.jsonl")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"train.jsonl": "old", "val.jsonl": "old"}
