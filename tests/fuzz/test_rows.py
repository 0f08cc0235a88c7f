"""Rows of any values, in any columns, become samples or are refused with one message."""

import json
import random
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.data import steps
from lit_qlora.data.load import load
from lit_qlora.data.preferences import read_preferences
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, PreferenceConfig, PreferenceRunConfig
from tests.fuzz.property import cases, holds, kept, quick, slow
from tests.fuzz.strategies import HOSTILE
from tests.fuzz.targets import Target

KIND = "rows"
COLUMNS = [
    *("instruction", "input", "output", "prompt", "completion", "response", "question", "answer", "context", "text"),
    *("system", "history", "messages", "conversations", "tools", "functions", "documents", "weight", "train"),
    *("input_ids", "labels", "attention_mask", "chosen", "rejected", "label", "chat_template_kwargs", "x", ""),
    "margin",
]
KEYS = ["role", "content", "from", "value", "tool_calls", "name", "weight", "train", "thinking", "reasoning_content"]
ROLES = ["system", "user", "assistant", "tool", "human", "gpt", "function", "function_call", "developer", "x"]
texts = st.one_of(st.text(max_size=30), st.sampled_from(["", "</s>", "<s>", "[INST]", "a\u200bb", "\r", "1", "Hi."]))
anything = st.one_of(texts, st.sampled_from(HOSTILE), st.integers(-3, 400), st.floats())
values = st.recursive(
    anything, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=3), max_leaves=8
)
messages = st.lists(
    st.one_of(
        st.fixed_dictionaries({"role": st.sampled_from(ROLES), "content": texts}),
        st.dictionaries(st.sampled_from(KEYS), st.one_of(values, st.sampled_from(ROLES)), max_size=4),
    ),
    max_size=5,
)
rows = st.lists(
    st.one_of(
        st.dictionaries(st.sampled_from(COLUMNS), st.one_of(values, texts, messages), max_size=4),
        st.fixed_dictionaries({"messages": messages}),
        st.fixed_dictionaries({"instruction": texts, "output": texts}),
        st.fixed_dictionaries(
            {"input_ids": st.lists(st.integers(-200, 400)), "labels": st.lists(st.integers(-200, 400))}
        ),
        values,
    ),
    min_size=1,
    max_size=3,
)


answers = st.one_of(texts, messages, st.lists(st.one_of(texts, messages), max_size=3), values)
judged_rows = st.lists(
    st.one_of(
        st.fixed_dictionaries(
            {"prompt": answers, "chosen": answers, "rejected": answers},
            optional={"margin": values, "system": texts, "tools": values},
        ),
        st.fixed_dictionaries({"prompt": texts, "chosen": texts, "rejected": texts}),
        st.fixed_dictionaries({"prompt": answers, "completion": answers, "label": st.one_of(st.booleans(), values)}),
        st.fixed_dictionaries({"chosen": answers, "rejected": answers}),
        st.dictionaries(st.sampled_from(COLUMNS), st.one_of(values, texts, messages), max_size=4),
        values,
    ),
    min_size=1,
    max_size=3,
)


@pytest.fixture(scope="module")
def reader(targets: Mapping[str, Target], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reads rows as a run does; True if they were taken."""
    base, path = targets["weights"].folder, tmp_path_factory.mktemp("rows") / "a.jsonl"
    tokenizer, rng = Tokenizer(base), random.Random(0)

    def read(content: bytes) -> bool:
        def use() -> None:
            path.write_bytes(content)
            data = DataConfig(path=str(path), prompt="qa", cache_dir="none", on_error=rng.choice(("stop", "skip")))
            load(data, base, tokenizer, 96, seed=1)

        return holds(KIND, content, use)

    return read


@pytest.fixture(scope="module")
def judge(targets: Mapping[str, Target], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Reads rows as a run on judged answers does, and lays them out; True if they were taken."""
    base, path = targets["weights"].folder, tmp_path_factory.mktemp("judged") / "a.jsonl"
    rng = random.Random(0)

    def read(content: bytes) -> bool:
        def use() -> None:
            path.write_bytes(content)
            data = DataConfig(
                path=str(path),
                prompt="qa",
                cache_dir="none",
                on_error=rng.choice(("stop", "skip")),
                max_length=rng.choice((8, 96)),
                allow=rng.choice(((), ("prompts_differ", "unread"))),
            )
            how = PreferenceConfig(loss=rng.choice(("dpo", "kto", "orpo")))
            found = read_preferences(PreferenceRunConfig(checkpoint_dir=base, data=data, preference=how), how)
            list(steps(found.train, found.batching, 1))

        return holds("judged", content, use)

    return read


def as_lines(rows: list[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_rows_become_samples_or_are_refused_in_words(reader: Any) -> None:
    @quick(20)
    @given(rows)
    def run(some: list[Any]) -> None:
        reader(as_lines(some))

    with kept():
        run()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_thousands_of_rows_become_samples_or_are_refused_in_words(reader: Any) -> None:
    accepted: list[bool] = []

    @slow
    @given(rows)
    def run(some: list[Any]) -> None:
        accepted.append(reader(as_lines(some)))

    with kept():
        for _ in range(10):
            run()
    print(f"{KIND}: {len(accepted)} tried, {sum(accepted)} accepted")


def test_judged_answers_become_comparisons_or_are_refused_in_words(judge: Any) -> None:
    @quick(6)
    @given(judged_rows)
    def run(some: list[Any]) -> None:
        judge(as_lines(some))

    with kept():
        run()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_thousands_of_judged_answers_become_comparisons_or_are_refused_in_words(judge: Any) -> None:
    accepted: list[bool] = []

    @slow
    @given(judged_rows)
    def run(some: list[Any]) -> None:
        accepted.append(judge(as_lines(some)))

    with kept():
        for _ in range(10):
            run()
    print(f"judged: {len(accepted)} tried, {sum(accepted)} accepted")


def test_what_once_broke_the_data_no_longer_does(reader: Any, judge: Any) -> None:
    for case in cases(KIND):
        reader(case.read_bytes())
    for case in cases("judged"):
        judge(case.read_bytes())


def test_a_good_row_is_taken(reader: Any) -> None:
    assert reader(as_lines([{"instruction": "Add 1 and 2.", "output": "3"}, {"instruction": "a", "output": "b"}]))


def test_a_row_that_is_none_is_not(reader: Any) -> None:
    assert not reader(b"{")
