"""Texts with labels: which column is which, classes and numbers, and what the audit says of them."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import table
from pyarrow.parquet import write_table

from lit_qlora.data import RunData, steps
from lit_qlora.data.scoring import ids_of, pick_columns, read_plain, read_scored
from lit_qlora.errors import DataError, UsageError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, EvalConfig, FinetuneConfig, LoRAConfig


def read(checkpoint: Path, file: Path, records: list[Any], head: Any = "classify", **data: Any) -> RunData:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = DataConfig(**{"path": str(file), "val_fraction": 0.25} | data)
    return read_scored(FinetuneConfig(checkpoint_dir=checkpoint, head=head, data=settings))


def test_a_label_takes_the_place_of_a_token_behind_its_text(tiny_checkpoint: Path, tmp_path: Path) -> None:
    records = [{"text": f"Q: {i}", "label": "no" if i % 2 else "yes", "id": i} for i in range(8)]
    data = read(tiny_checkpoint, tmp_path / "a.jsonl", records, packing=True)
    assert data.scoring
    assert data.scoring.classes == ("no", "yes")
    assert (len(data.train), data.val_samples) == (6, 2)
    for sample in data.train:
        text = data.tokenizer.decode(sample.tokens[1:-1].tolist())
        assert sample.tokens[0] == data.tokenizer.bos_id  # and no EOS, as transformers encodes a text
        assert data.scoring.name(int(sample.tokens[-1])) == records[int(text.rpartition(" ")[2])]["label"]
        assert sample.trained.tolist() == [False] * (len(sample.tokens) - 1) + [True]
    (step,) = steps(data.train, data.batching, 1)
    assert step.labelled == step.weight == 6
    assert any("classes: " in note for note in data.audit.notes())
    assert any("not read: id" in note for note in data.audit.notes())


@pytest.mark.parametrize(
    ("labels", "classes"),
    [([2, 10, 2], ("2", "10")), (["b", "a", "b"], ("a", "b")), ([True, False, True], ("False", "True"))],
)
def test_classes_are_sorted_as_numbers_if_all_are(
    labels: list[Any], classes: tuple[str, ...], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    rows = [{"sentence": f"text {i}", "category": label} for i, label in enumerate(labels)]
    found = read(tiny_checkpoint, tmp_path / "a.jsonl", rows).scoring
    assert found
    assert found.classes == classes


def test_numbers_are_a_table_of_values(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"review": f"text {i}", "stars": value} for i, value in enumerate((-1.5, "4", 2.0, 4))]
    data = read(
        tiny_checkpoint, tmp_path / "a.jsonl", rows, "regress", columns="review:text,stars:label", val_fraction=0
    )
    assert data.scoring
    assert data.scoring.values == (-1.5, 2.0, 4.0)
    assert [data.scoring.values[int(sample.tokens[-1])] for sample in data.train] == [-1.5, 4.0, 2.0, 4.0]


def test_a_text_that_is_too_long_loses_the_end_that_was_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"text": "1 2 3 4 5 6 7 8 9 10 11 12", "label": label} for label in "ab"]
    left, right = (
        read(tiny_checkpoint, tmp_path / "a.jsonl", rows, max_length=8, overlong=way, val_fraction=0)
        for way in ("truncate_left", "truncate_right")
    )
    for data, begins in ((left, False), (right, True)):
        assert len(data.train[0].tokens) == 9
        assert data.tokenizer.decode(data.train[0].tokens[1:-1].tolist()).strip().startswith("1 2") == begins
    assert "prompts were cut" in left.audit.warnings[0]


@pytest.mark.parametrize(
    ("rows", "head", "columns", "message"),
    [
        ([{"text": "a", "label": 1}, {"text": "b", "label": 1}], "classify", "", "every label is '1'"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "x"}], "regress", "", "a.jsonl:2: .* a label is 'x'"),
        ([{"text": "a", "label": None}], "classify", "", "a.jsonl:1: 'label' is empty"),
        ([{"text": "a", "label": float("nan")}], "classify", "", "a.jsonl:1: NaN is not JSON"),
        ([{"text": "a", "label": [1]}], "classify", "", "list, not a class"),
        ([{"text": "a", "label": 1e19}], "regress", "", "a.jsonl:1: .* too large"),
        ([{"text": "a", "label": -(10**400)}], "regress", "", "a.jsonl:1: .* too large"),
        ([], "classify", "", "holds no record"),
        ([{"text": "a\ud800", "label": 1}], "classify", "", "a.jsonl:1: 'text' holds half of a surrogate pair"),
        ([{"text": "a", "label": "b\ud800"}], "classify", "", "a.jsonl:1: 'label' holds half of a surrogate pair"),
        ([{"text": " ", "label": 1}], "classify", "", "'text' is empty"),
        ([{"body": "a", "label": 1}], "classify", "", "needs a text and a label"),
        ([{"body": "a", "label": 1}], "classify", "text:text,label:label", "no record has a column 'text'"),
        ([{"text": f"{i}", "label": i / 7} for i in range(1001)], "classify", "", "are no classes"),
    ],
)
def test_labels_that_are_none_are_refused(
    rows: list[Any], head: str, columns: str, message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        read(tiny_checkpoint, tmp_path / "a.jsonl", rows, head, columns=columns)


def test_rare_classes_are_a_warning(tiny_checkpoint: Path, tmp_path: Path) -> None:
    rows = [{"text": f"text {i}", "label": "b" if i == 3 else "a"} for i in range(40)]
    data = read(tiny_checkpoint, tmp_path / "a.jsonl", rows, val_fraction=0)
    assert "few are of b (1)" in data.audit.warnings[0]


def test_settings_of_texts_to_write_are_refused_by_name() -> None:
    for name, change in {
        "data.prompt": {"data": DataConfig(prompt="alpaca")},
        "data.mask_prompt": {"data": DataConfig(mask_prompt=False)},
        "data.token_dropout": {"data": DataConfig(token_dropout=0.1)},
        "data.weighting": {"data": DataConfig(weighting="samples")},
        "data.cache_dir": {"data": DataConfig(cache_dir="/a/b")},
        "eval.generate": {"eval": EvalConfig(generate=3)},
        "lora.targets head": {"lora": LoRAConfig(targets=("head",))},
    }.items():
        with pytest.raises(UsageError, match=name):
            FinetuneConfig(head="classify", **change)  # type: ignore[arg-type]


def test_texts_to_classify_need_no_labels(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_plain(str(path), "") == (["one", "two"], None)
    path.write_text('{"text": "one"}\n{"text": "\\ud800"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'text' holds half of a surrogate pair"):
        read_plain(str(path), "")
    with pytest.raises(UsageError, match="its own label"):
        pick_columns("text:text,text:label", [{"text": "one"}], "a.jsonl")
    path.write_text('{"a": "one", "b": "x"}\n')
    assert read_plain(str(path), "a:text") == (["one"], None)
    assert read_plain(str(path), "a:text,b:label") == (["one"], ["x"])


def test_texts_to_classify_are_read_whole_and_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for name in ("train.jsonl", "val.jsonl"):
        (tmp_path / name).write_text('{"text": "one"}\n')
    with pytest.raises(UsageError, match=r"Name the file of one, such as .*val\.jsonl"):
        read_plain(str(tmp_path), "")
    with pytest.raises(UsageError, match="Leave the factor out"):
        read_plain(f"{tmp_path}/val.jsonl*2", "")
    with pytest.raises(UsageError, match="max_length 1 has no room"):
        ids_of(["one"], Tokenizer(tiny_checkpoint), 1)


def test_labels_that_are_no_finite_numbers_are_refused_in_tables_too(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(table({"text": ["a", "b"], "label": [1.0, float("nan")]}), path)
    with pytest.raises(DataError, match="row 2: 'label' is nan, no label"):
        read_plain(str(path), "")
