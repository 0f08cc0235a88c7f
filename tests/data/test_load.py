"""The data of a run: its split, its subset, its mixture, and what is said of it."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data import RunData, read_data, show, steps
from lit_qlora.data.audit import boundary
from lit_qlora.data.load import load
from lit_qlora.errors import DataError, UsageError
from lit_qlora.prompts.style import STYLES
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import DataConfig, EvalConfig, FinetuneConfig
from tests.scripts.test_generate import with_template


def rows(count: int, first: int = 0) -> str:
    numbers = range(first, first + count)
    return "".join(json.dumps({"instruction": f"What is {i} plus 1?", "output": str(i + 1)}) + "\n" for i in numbers)


@pytest.fixture
def read(tiny_checkpoint: Path, tmp_path: Path):
    """Reads data as finetune/lora.py does; paths are below tmp_path."""

    def run(*paths: str, eval_samples: int | None = None, run_seed: int = 1, **settings: Any) -> RunData:
        data = DataConfig(
            **{"path": tuple(f"{tmp_path}/{path}" for path in paths), "prompt": "qa", "cache_dir": "none"} | settings
        )
        return read_data(
            FinetuneConfig(
                checkpoint_dir=tiny_checkpoint, data=data, seed=run_seed, eval=EvalConfig(max_samples=eval_samples)
            )
        )

    (tmp_path / "a.jsonl").write_text(rows(40))
    (tmp_path / "b.jsonl").write_text(rows(10, first=100))
    (tmp_path / "val.jsonl").write_text(rows(3, first=200))
    return run


def numbers(data: RunData) -> list[int]:
    """What the training samples ask for."""
    texts = [show(sample, data.tokenizer, dim=False) for sample in data.train]
    return [int(text.split("What is ")[1].split()[0]) for text in texts]


def test_a_share_is_held_out_and_the_rest_keeps_the_order_of_the_file(read) -> None:
    data = read("a.jsonl", val_fraction=0.1)
    assert (len(data.train), data.val_samples) == (36, 4)
    assert numbers(data) == sorted(numbers(data))
    assert data.audit.overlap == 0


def test_the_split_depends_on_the_seed_alone(read) -> None:
    one = numbers(read("a.jsonl", val_fraction=0.2))
    assert numbers(read("a.jsonl", val_fraction=0.2, packing=True, mask_prompt=False)) == one
    assert numbers(read("a.jsonl", val_fraction=0.2, run_seed=2)) != one


def test_data_has_a_seed_of_its_own_if_somebody_says_so(read) -> None:
    one, other = read("a.jsonl", run_seed=7), read("a.jsonl", run_seed=8, seed=7)
    assert numbers(one) == numbers(other)
    assert (one.batching.seed, other.batching.seed) == (7, 7)


@pytest.mark.parametrize(("fraction", "held_out"), [(0, 0), (0.001, 1), (0.5, 20), (7, 7), (1024, 39)])
def test_what_is_held_out_is_a_share_or_a_number_but_never_all(read, fraction: float, held_out: int) -> None:
    data = read("a.jsonl", val_fraction=fraction)
    assert (len(data.train), data.val_samples) == (40 - held_out, held_out)


def test_equal_samples_are_all_learnt_or_all_validated_on(read) -> None:
    data = read("a.jsonl", "a.jsonl", val_fraction=0.1)
    assert (len(data.train), data.val_samples, data.audit.overlap) == (72, 8, 0)
    assert read("b.jsonl", *["a.jsonl"] * 3, val_fraction=1).val_samples == 1  # a sample that has no equal
    assert read(*["a.jsonl"] * 3, val_fraction=1).val_samples == 3
    assert read("a.jsonl", *["b.jsonl"] * 2, val_fraction=1000).audit.overlap == 0


def test_several_sources_show_their_weights(read) -> None:
    told = read("a.jsonl", "b.jsonl*0.5", val_fraction=0.0).audit.sources
    assert [source.rpartition("   ")[2] for source in told] == ["x 1, 89% of an epoch", "x 0.5, 11% of an epoch"]
    assert "epoch" not in read("a.jsonl").audit.sources[0]


def test_a_validation_file_is_taken_unless_a_split_is_asked_for(read, tmp_path: Path) -> None:
    (tmp_path / "both").mkdir()
    (tmp_path / "both/train.jsonl").write_text(rows(20))
    (tmp_path / "both/val.jsonl").write_text(rows(2, first=50))
    assert read("both").val_samples == 2
    assert read("both", validation_strategy="automatic", val_fraction=0.25).val_samples == 5
    custom = {"validation_strategy": "custom", "val_path": str(tmp_path / "val.jsonl")}
    assert read("a.jsonl", **custom).val_samples == 3
    assert read("a.jsonl", eval_samples=2, **custom).val_samples == 2
    assert sum(len(batch.tokens) for batch in read("a.jsonl", eval_samples=2, **custom).val_batches) == 2


def test_h2o_calls_the_share_validation_size(read, tmp_path: Path) -> None:
    assert read("a.jsonl", validation_strategy="automatic", validation_size=0.01).val_samples == 1
    assert read("a.jsonl", validation_size=0.25).val_samples == 10
    config = DataConfig(validation_size=0.25)
    assert config == DataConfig(val_fraction=0.25)
    assert replace(config, packing=True).val_fraction == 0.25
    with pytest.raises(UsageError, match=r"a share below 1 or a whole number of samples, got 1\.5"):
        DataConfig(val_fraction=1.5)
    with pytest.raises(UsageError, match="Give one"):
        DataConfig(validation_size=0.1, val_fraction=0.2)
    with pytest.raises(UsageError, match=r"data\.validation_size would have no effect"):
        DataConfig(validation_size=0.1, val_path=str(tmp_path / "val.jsonl"))
    with pytest.raises(UsageError, match=r"data\.validation_size must be a share"):
        DataConfig(validation_size=1.5)


def test_a_subset_is_chosen_by_the_seed(read) -> None:
    some = numbers(read("a.jsonl", max_samples=8, val_fraction=0))
    assert len(set(some)) == 8
    assert some == sorted(some) != list(range(8))
    assert numbers(read("a.jsonl", max_samples=8, val_fraction=0)) == some
    assert numbers(read("a.jsonl", max_samples=8, val_fraction=0, seed=2)) != some
    assert len(read("a.jsonl", max_samples=99, val_fraction=0).train) == 40


def test_several_sources_are_mixed_as_often_as_they_should_come(read) -> None:
    data = read("a.jsonl", "b.jsonl*3", val_fraction=0)
    assert data.batching.shares == ((40, 1.0), (10, 3.0))
    (step,) = steps(data.train, replace(data.batching, batch_size=70), total=1)
    assert step.samples == 70
    assert list(data.files) == [source.split("   ")[0] for source in data.audit.sources]
    assert read("a.jsonl", "b.jsonl", val_fraction=0).batching.shares == ()


def test_a_source_of_which_no_epoch_would_see_anything_is_refused(read) -> None:
    for paths in (["a.jsonl*0.01"], ["a.jsonl", "b.jsonl*0.01"]):
        with pytest.raises(DataError, match=r"jsonl\*0\.01: an epoch would see none of its \d+ samples"):
            read(*paths, val_fraction=0)


def test_the_first_the_middle_and_the_last_sample_of_all_sources_are_shown(read) -> None:
    data = read("a.jsonl", "b.jsonl", val_fraction=0)
    shown = [show(sample, data.tokenizer, dim=False).split(" plus")[0] for sample in data.audit.shown]
    assert shown == ["[Q: What is 0", "[Q: What is 25", "[Q: What is 109"]


def test_sources_may_be_of_different_formats(read, tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_text("What is 7 plus 1? It is 8.")
    spoken = [{"role": "user", "content": "What is 9 plus 1?"}, {"role": "assistant", "content": "10"}]
    (tmp_path / "d.jsonl").write_text(json.dumps({"messages": spoken}))
    data = read("a.jsonl", "c.txt", "d.jsonl", val_fraction=0)
    assert [source.split("   ")[1].split(" (")[0] for source in data.audit.sources] == [
        "format alpaca",
        "format text",
        "format messages",
    ]
    (tmp_path / "e.txt").write_text("What is 7 plus 1? It is 8. " * 40)
    assert read("e.txt", val_fraction=0).audit.sources[0].endswith(" pieces of 1")
    text, talk = (show(sample, data.tokenizer, dim=False) for sample in data.train[-2:])
    assert text == "[] -> What is 7 plus 1? It is 8.<end>"
    assert talk == "[Q: What is 9 plus 1?\\nA:] -> 10<end>"
    assert data.style is STYLES["qa"]
    assert read("c.txt", val_fraction=0).style is STYLES["text"]


def test_the_settings_reach_the_batches(read) -> None:
    data = read("a.jsonl", packing=True, pack_length=120, weighting="samples", shuffle=False, drop_last=True)
    batching = data.batching
    assert (batching.row_length, batching.weighting, batching.shuffle, batching.drop_last) == (
        120,
        "samples",
        False,
        True,
    )
    (step,) = steps(data.train, batching, total=1)
    assert {batch.tokens.size(1) for batch in step.batches} == {120}
    assert read("a.jsonl", packing=True).batching.row_length == 96
    assert read("a.jsonl", pad_to_multiple_of=64).batching.multiple == 64
    assert read("a.jsonl", group_by_length=True).batching.group_by_length


def test_a_row_without_room_for_the_longest_sample_is_refused(read) -> None:
    with pytest.raises(UsageError, match=r"data\.pack_length 50 has no room for a sample of 96 tokens"):
        read("a.jsonl", packing=True, pack_length=50)


def test_a_red_finding_stops_the_run(read) -> None:
    with pytest.raises(DataError, match=r"40 of 40 answers do not end with an end-of-text token.*--data\.allow no_eos"):
        read("a.jsonl", prompt="knobs", add_eos_token_to_answer=False)
    data = read("a.jsonl", prompt="knobs", add_eos_token_to_answer=False, allow="no_eos")
    assert "40 of 40 answers do not end" in data.audit.notes()
    with pytest.raises(DataError, match=r"no token would be labelled; of 40 samples 40 are too long for 96 tokens"):
        read("a.jsonl", prompt="alpaca")


def test_the_audit_is_told_in_words_and_pictures(read) -> None:
    audit = read("a.jsonl", val_fraction=0.1).audit
    assert audit.describe().startswith("36 train / 4 val   median ")
    assert f"{audit.labelled:,} of {audit.tokens:,} tokens labelled" in audit.describe()
    counts = [int(line.split()[-1]) for line in audit.histogram().splitlines()]
    assert sum(counts) == 36
    first, bars, last = audit.spark().split(maxsplit=1)[0], audit.spark(), audit.spark().rsplit(maxsplit=1)[1]
    assert (int(first), int(last)) == (audit.lengths.min(), audit.lengths.max())
    assert "█" in bars
    assert audit.notes() == []


def test_unlabelled_tokens_are_dimmed_or_in_brackets(read) -> None:
    data = read("a.jsonl", val_fraction=0)
    sample = data.train[1]
    assert show(sample, data.tokenizer, dim=False) == "[Q: What is 1 plus 1?\\nA:] -> 2<end>"
    assert show(sample, data.tokenizer, dim=True) == "\x1b[2mQ: What is 1 plus 1?\\nA:\x1b[0m -> 2<end>"
    assert boundary(sample, data.tokenizer).split(" || ")[1].startswith("2")


REWRITING = (
    "{% for m in messages %}{{ m.role[0] }}:{% if m.role == 'assistant' and loop.last %}Hm. {% endif %}{{ m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
)
"""Writes a thought before the last answer alone."""


@pytest.mark.parametrize("count", [1, 2, 20])
def test_samples_of_one_conversation_are_all_trained_on_or_all_validated_on(
    count: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = with_template(tiny_checkpoint, tmp_path / "own", REWRITING)
    talks = [[{"role": role, "content": str(i)} for role in ("user", "assistant") * (1 + i % 3)] for i in range(count)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    tokenizer = Tokenizer(own)
    for seed in range(4):
        config = DataConfig(path=f"{tmp_path}/a.jsonl", prompt="template", val_fraction=0.3, cache_dir="none")
        loaded = load(config, own, tokenizer, 96, seed)
        trained, validated = (
            [tokenizer.decode(sample.tokens.tolist()).split(":")[1][:-1] for sample in samples]
            for samples in (loaded.train, loaded.val)
        )
        assert not set(trained) & set(validated)
        assert sorted(trained + validated) == sorted(str(i) for i in range(count) for _ in range(1 + i % 3))
        assert (count == 1) == (not validated)
