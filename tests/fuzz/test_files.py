"""A file of any kind, broken in any way, is read or refused with one message; nothing is left half done."""

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz.property import cases, kept, quick, slow
from tests.fuzz.targets import Target

KINDS = [
    *("config", "task", "model_config", "tokenizer_config", "special_tokens_map", "added_tokens", "new_tokens"),
    *("generation_config",),
    *("tokenizer_model", "tokenizer_json", "tekken", "head", "head_weights", "weights", "manifest"),
    *("adapter_config", "prompt_style"),
    *("adapter_weights", "state", "state_tensors", "log", "merged", "exported_template"),
    *("exported_tokenizer", "exported_source", "exported_report", "hf_config", "hf_weights", "pickle", "jsonl"),
    *("labels", "json"),
    *("messages", "tokenized", "csv", "prepare_csv", "tsv", "txt", "parquet", "arrow", "gzip"),
    *("zstandard", "saved", "prompts", "history", "answers", "quantization_table"),
]


def test_every_kind_is_tried(targets: Mapping[str, Target]) -> None:
    assert list(targets) == KINDS


@pytest.mark.parametrize("kind", KINDS)
def test_the_good_file_is_accepted(kind: str, targets: Mapping[str, Target]) -> None:
    targets[kind].use(targets[kind].folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_file_is_read_or_refused_in_words(kind: str, targets: Mapping[str, Target]) -> None:
    target = targets[kind]

    @quick(8)
    @given(st.data())
    def run(data: st.DataObject) -> None:
        target.holds(kind, data.draw(target.spoil(target.good)))

    with kept():
        run()


@pytest.mark.slow
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_broken_files_are_read_or_refused_in_words(kind: str, targets: Mapping[str, Target]) -> None:
    target, accepted = targets[kind], []

    @slow
    @given(st.data())
    def run(data: st.DataObject) -> None:
        accepted.append(target.holds(kind, data.draw(target.spoil(target.good))))

    with kept():
        run()
    print(f"{kind}: {len(accepted)} tried, {sum(accepted)} accepted")


@pytest.mark.parametrize("kind", KINDS)
def test_what_once_broke_a_reader_no_longer_does(kind: str, targets: Mapping[str, Target]) -> None:
    for case in cases(kind):
        targets[kind].holds(kind, case.read_bytes())
