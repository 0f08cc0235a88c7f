"""What is not read: red where it is known to mean something, else a note; it is never dropped without a word."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data.audit import Audit
from lit_qlora.data.load import load
from lit_qlora.data.unread import ADVICE
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig
from tests.data.test_messages import ANSWER, TOOL, USER

ALPACA = {"instruction": "Hi", "output": "Yo"}


@pytest.fixture
def audited(tiny_checkpoint: Path, tmp_path: Path):
    """The audit of records, as a run has it."""

    def run(*records: Any, **settings: Any) -> Audit:
        path = tmp_path / "a.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        config = {"path": str(path), "prompt": "qa", "cache_dir": "none", "val_fraction": 0.0} | settings
        return load(DataConfig(**config), tiny_checkpoint, Tokenizer(tiny_checkpoint), 96, seed=1).audit

    return run


# What the format alpaca reads, and what is no column of anything.
READ = {"system", "system_prompt", "history", "input", "chat_template_kwargs"}


@pytest.mark.parametrize("name", sorted(set(ADVICE) - READ))
def test_a_column_that_means_something_stops_the_run_until_it_is_allowed(audited, name: str) -> None:
    records = [ALPACA, ALPACA | {name: [TOOL] if name in ("tools", "functions", "documents") else "meant"}]
    key = "tools" if name == "functions" else name
    (red,) = audited(*records).red
    assert f"a.jsonl:2: {key!r} (" in red
    assert "in 0 other records" in red
    assert red.endswith("or go on without it with --data.allow unread.")
    allowed = audited(*records, allow="unread")
    assert not allowed.red
    assert any(note.endswith(f"not read: {key}") for note in allowed.notes())


def test_rows_that_say_which_answers_are_bad_are_not_taught(audited) -> None:
    rows = [{"prompt": "Hi", "completion": "Yo", "label": good} for good in (True, False)]
    (red,) = audited(*rows).red
    assert "'label' (true) is not read, here and in 1 other records. Keep the records whose answers are good" in red


@pytest.mark.parametrize("key", ["reasoning_content", "tool_calls"])
def test_keys_of_messages_that_a_style_has_no_words_for_stop_the_run(audited, key: str) -> None:
    value = [{"function": {"name": "f", "arguments": {}}}] if key == "tool_calls" else "Hm."
    (red,) = audited({"messages": [USER, {**ANSWER, key: value}]}).red
    assert f"{key!r} (" in red
    assert "Take --data.prompt template" in red


def test_a_weight_of_what_a_user_says_is_not_read(audited) -> None:
    (red,) = audited({"messages": [{**USER, "weight": 1}, ANSWER]}).red
    assert "'weight' (1) is not read" in red


def test_other_columns_are_listed_once(audited) -> None:
    audit = audited(*[ALPACA | {"source": "web", "id": 5, "empty": None, "images": []}] * 3)
    assert not audit.red
    assert [note for note in audit.notes() if "not read" in note] == [
        f"{audit.sources[0].split('   ')[0]}: not read: id, source"
    ]


def test_columns_that_the_settings_choose_are_the_only_ones_that_count(audited) -> None:
    rows = [{"q": "Hi", "a": "Yo", "score": 5}]
    for settings in ({"columns": "q:instruction,a:output"}, {"template": "{q}", "answer_template": "{a}"}):
        audit = audited(*rows, **settings)
        assert not audit.red
        assert any("not read: score" in note for note in audit.notes())


def test_a_format_says_what_it_leaves_out_on_purpose(audited) -> None:
    audit = audited({"chosen": "\n\nHuman: Hi\n\nAssistant: Yo", "rejected": "\n\nHuman: Hi\n\nAssistant: No"})
    assert not audit.red
    assert any("not read: rejected" in note for note in audit.notes())


def test_texts_that_a_template_has_written_already_stop_the_run(audited) -> None:
    rendered = {"text": "<s>user Hi</s>"}
    (red,) = audited(rendered, rendered).red
    assert "every text holds control tokens, as if a chat template had written it" in red
    assert not audited(rendered, rendered, allow="control_tokens").red
    assert not audited(rendered, {"text": "Once upon a time."}).red
