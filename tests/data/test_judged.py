"""Judged answers are read in the forms that data sets have, and nothing of them is lost without a word."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_qlora.data.comparisons import CHOSEN, ELSEWHERE, REJECTED, Comparisons
from lit_qlora.data.preferences import can_share, read_preferences
from lit_qlora.errors import DataError, UserError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, PreferenceConfig, PreferenceRunConfig, TrainConfig
from tests.conftest import tiny_config

ASKED, GOOD, BAD = "What is 1 plus 2?", "3", "It is 4."


def said(role: str, text: str) -> dict[str, str]:
    return {"role": role, "content": text}


FORMS: dict[str, dict[str, Any]] = {
    "preference": {"prompt": ASKED, "chosen": GOOD, "rejected": BAD},
    "preference, messages": {
        "prompt": [said("user", ASKED)],
        "chosen": [said("assistant", GOOD)],
        "rejected": [said("assistant", BAD)],
    },
    "preference, ultrafeedback": {
        "prompt": ASKED,
        "chosen": [said("user", ASKED), said("assistant", GOOD)],
        "rejected": [said("user", ASKED), said("assistant", BAD)],
        "score_chosen": 8.0,
    },
    "preference-messages": {
        "chosen": [said("user", ASKED), said("assistant", GOOD)],
        "rejected": [said("user", ASKED), said("assistant", BAD)],
    },
    "preference-question": {"question": ASKED, "chosen": GOOD, "rejected": BAD},
    "preference-instruction": {"instruction": ASKED, "input": "", "chosen": GOOD, "rejected": BAD},
    "hh-rlhf": {
        "chosen": f"\n\nHuman: {ASKED}\n\nAssistant: {GOOD}",
        "rejected": f"\n\nHuman: {ASKED}\n\nAssistant: {BAD}",
    },
}


def read(
    file: Path, checkpoint: Path, records: list[dict[str, Any]], how: PreferenceConfig | None = None, **data: Any
) -> Any:
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    settings = DataConfig(**{"path": str(file), "prompt": "qa", "val_fraction": 0, "cache_dir": "none"} | data)
    how = how or PreferenceConfig()
    return read_preferences(PreferenceRunConfig(checkpoint_dir=checkpoint, data=settings, preference=how), how)


def texts(data: Any, checkpoint: Path) -> list[str]:
    return [Tokenizer(checkpoint).decode(sample.tokens.tolist()) for sample in data.train.samples]


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_a_pair_makes_the_same_tokens(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    found = read(tmp_path / "a.jsonl", tiny_checkpoint, [FORMS[name]])
    assert found.audit.sources[0].split("format ")[1].startswith(name.split(",")[0])
    assert texts(found, tiny_checkpoint) == [f"Q: {ASKED}\nA: {answer}" for answer in (GOOD, BAD)]
    assert found.train.sides.tolist() == [CHOSEN, REJECTED]
    prompt = int(np.argmax(found.train.samples[0].trained))
    assert found.train.shared.tolist() == [prompt - 1]


def test_several_rejected_answers_are_compared_with_the_chosen_one(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = FORMS["preference"] | {"rejected": ["4", "It is 5.", GOOD], "margin": 0.5}
    train = read(tmp_path / "a.jsonl", tiny_checkpoint, [record]).train
    assert train.sides.tolist() == [CHOSEN, REJECTED, REJECTED]  # the third equals the chosen one
    assert train.margins.tolist() == [0.5]


def test_kto_takes_single_answers_and_the_sides_of_pairs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    kto = PreferenceConfig(loss="kto")
    single = [{"prompt": ASKED, "completion": GOOD, "label": True}, {"prompt": "a?", "completion": "b", "label": False}]
    of_singles = read(tmp_path / "a.jsonl", tiny_checkpoint, single, kto).train
    of_pairs = read(tmp_path / "b.jsonl", tiny_checkpoint, [FORMS["preference"]], kto).train
    for train in (of_singles, of_pairs):
        assert train.sides.tolist() == [CHOSEN, ELSEWHERE, REJECTED, ELSEWHERE]
    with pytest.raises(DataError, match=r"--preference\.loss kto"):
        read(tmp_path / "c.jsonl", tiny_checkpoint, single)


def test_answers_to_a_prompt_are_trained_on_or_validated_on_together(tiny_checkpoint: Path, tmp_path: Path) -> None:
    records = [{"prompt": f"{n}?", "chosen": f"{n}", "rejected": ["a", "b"][: 1 + n % 2]} for n in range(10)]
    data = read(tmp_path / "a.jsonl", tiny_checkpoint, records, val_fraction=0.3)
    assert (len(data.train), len(data.val)) == (7, 3)
    for part in (data.train, data.val):
        assert isinstance(part, Comparisons)
        assert [part[i].sides[0] for i in range(len(part))] == [CHOSEN] * len(part)


def test_the_cache_gives_the_same_comparisons(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("lit_qlora.data.cache.WORTH_KEEPING", 1)
    records = [FORMS["preference"] | {"margin": 0.25}, FORMS["preference"] | {"rejected": ["5", "6"]}]
    first, again = (
        read(tmp_path / "a.jsonl", tiny_checkpoint, records, cache_dir=str(tmp_path / "cache")).train for _ in range(2)
    )
    assert list((tmp_path / "cache").iterdir())
    assert again.sides.tolist() == first.sides.tolist()
    assert again.margins.tolist() == first.margins.tolist() == [0.25, 0.0]
    assert again.samples.tokens.tolist() == first.samples.tokens.tolist()


PAIR = FORMS["preference"]
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "an empty answer": (PAIR | {"rejected": " "}, {}, "a.jsonl:1: an answer is empty"),
    "another prompt": (
        FORMS["preference, ultrafeedback"] | {"prompt": "And 2 plus 2?"},
        {},
        "'chosen' is a conversation without what 'prompt' asks",
    ),
    "a margin that is none": (PAIR | {"margin": "much"}, {}, "'margin' is 'much'"),
    "a margin that nobody reads": (PAIR | {"margin": 1.0}, {"loss": "ipo"}, "ipo does not read the column 'margin'"),
    "a label that is none": ({"prompt": "a", "completion": "b", "label": 2}, {"loss": "kto"}, "neither true nor false"),
    "a weight": (
        FORMS["preference, messages"] | {"chosen": [said("assistant", GOOD) | {"weight": 0.5}]},
        {},
        "answers that are compared weigh alike",
    ),
    "unread meaning": (PAIR | {"score": 3}, {}, "'score' (3) is not read"),
    "no judgement": ({"instruction": "a", "output": "b"}, {}, "Needed are prompt, chosen and rejected"),
    "no text": (PAIR | {"chosen": 3}, {}, "'chosen' is int, not text"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_record_that_cannot_be_compared_is_refused_with_the_reason(
    name: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    record, how, message = REFUSED[name]
    with pytest.raises(UserError) as refused:
        read(tmp_path / "a.jsonl", tiny_checkpoint, [record], PreferenceConfig(**how))
    assert message in str(refused.value)


def test_a_file_without_records_is_refused_by_its_path(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as refused:
        read(tmp_path / "a.jsonl", tiny_checkpoint, [])
    assert str(refused.value) == f"{tmp_path}/a.jsonl holds no judged answers."


def test_the_audit_knows_pairs(tiny_checkpoint: Path, tmp_path: Path) -> None:
    records = [
        *({"prompt": f"{n}?", "chosen": "a long answer", "rejected": "no"} for n in range(8)),
        {"prompt": "a?", "chosen": "same", "rejected": "same"},
        {"prompt": "b?", "chosen": "word " * 40, "rejected": "no"},
        {"chosen": "x", "rejected": "y", "prompt": "c?"},
    ]
    notes = "\n".join(read(tmp_path / "a.jsonl", tiny_checkpoint, records, max_length=32).audit.notes())
    for told in (
        "1 rejected answers equal the chosen one and were left out",
        "1 records have nothing left to compare",
        "10 pairs; median tokens",
        "of the chosen answers are the longer ones",
        "in 1 pairs one side was cut",
    ):
        assert told in notes


def test_answers_to_different_prompts_stop_the_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    record = {
        "chosen": [said("user", "one?"), said("assistant", GOOD)],
        "rejected": [said("user", "two?"), said("assistant", BAD)],
    }
    with pytest.raises(DataError, match=r"answers to different prompts.*prompts_differ"):
        read(tmp_path / "a.jsonl", tiny_checkpoint, [record])
    assert len(read(tmp_path / "a.jsonl", tiny_checkpoint, [record], allow="prompts_differ").train) == 1


@pytest.mark.parametrize(
    ("changes", "train", "shares"),
    [
        ({}, {}, True),
        ({"attention_softcap": 5.0}, {}, False),
        ({"rope_scaling": "dynamic"}, {}, False),
        ({}, {"hidden_dropout": 0.1}, False),
    ],
)
def test_answers_share_a_prompt_where_attention_can_read_it_once(
    changes: dict[str, Any], train: dict[str, Any], shares: bool
) -> None:
    assert can_share(tiny_config(**changes), TrainConfig(**train)) == shares
