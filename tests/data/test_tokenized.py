"""Records that are token ids already: taken as they are, after the same checks."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data.load import Loaded, load
from lit_qlora.errors import DataError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig


@pytest.fixture
def loaded(tiny_checkpoint: Path, tmp_path: Path):
    def run(*rows: Any, max_length: int = 8, **settings: Any) -> Loaded:
        (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        config = {"path": str(tmp_path / "a.jsonl"), "cache_dir": "none", "val_fraction": 0.0} | settings
        return load(DataConfig(**config), tiny_checkpoint, Tokenizer(tiny_checkpoint), max_length, seed=1)

    return run


def test_ids_and_labels_are_taken_as_they_are(loaded, tiny_checkpoint: Path) -> None:
    end = Tokenizer(tiny_checkpoint).eos_id
    given = {"input_ids": [1, 20, 21, end], "labels": [-100, -100, 21, end], "token_type_ids": [0] * 4}
    padded = {"input_ids": [0, 0, 1, 20, end, 0], "attention_mask": [0, 0, 1, 1, 1, 0]}
    data = loaded(given, padded)
    first, second = data.train
    assert (first.tokens.tolist(), first.trained.tolist()) == (given["input_ids"], [False, False, True, True])
    assert (second.tokens.tolist(), second.trained.tolist()) == ([1, 20, end], [False, True, True])
    counts = data.audit.counts
    assert (counts.turns, counts.ended, data.audit.red) == (2, 2, [])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input_ids": [1, 999_999]}, "a.jsonl:1: 'input_ids' has 999999, the tokenizer"),
        ({"input_ids": [1, -1]}, "'input_ids' has -1, the tokenizer"),
        ({"input_ids": [1]}, "'input_ids' holds no token that another one predicts"),
        ({"input_ids": "1 2"}, "'input_ids' is no list of whole numbers"),
        ({"input_ids": [1, 2.0]}, "'input_ids' is no list of whole numbers"),
        ({"labels": [20, 21, -100]}, "'labels' has 20 at 0, neither -100 nor 'input_ids' there, 1. Are they shifted?"),
        ({"labels": [1]}, "'labels' has 1 entries, 'input_ids' has 3"),
        ({"attention_mask": [1, 0, 1]}, "'attention_mask' marks padding between tokens"),
        ({"attention_mask": [2, 2, 2]}, "'attention_mask' marks padding between tokens"),
    ],
)
def test_ids_that_cannot_be_labelled_are_refused(loaded, change: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        loaded({"input_ids": [1, 20, 21]} | change)


def test_what_is_too_long_or_masked_whole_is_left_out_and_counted(loaded) -> None:
    fine, long = {"input_ids": [1, 20]}, {"input_ids": [1] * 9}
    counts = loaded(fine, long, fine | {"labels": [-100, -100]}).audit.counts
    assert (counts.examples, counts.dropped, counts.masked) == (3, 1, 1)
    with pytest.raises(DataError, match=r"a\.jsonl:2: 9 tokens do not fit into 8"):
        loaded(fine, long, overlong="error")
