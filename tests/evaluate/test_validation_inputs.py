"""What is asked at validations is read from data and files, and refused before a model is loaded."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lit_qlora.data import RunData, read_data
from lit_qlora.errors import DataError, UsageError
from lit_qlora.evaluate.validation_inputs import PROBE_TOKENS, question, read_probes
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.prompts.style import TemplateStyle
from lit_qlora.settings import DataConfig, EvalConfig, FinetuneConfig
from tests.data.test_load import REWRITING
from tests.scripts.test_generate import with_template


@pytest.fixture
def config(tiny_checkpoint: Path, examples_file: Path, tmp_path: Path) -> FinetuneConfig:
    data = DataConfig(path=str(examples_file), prompt="qa", val_fraction=0.2, cache_dir=str(tmp_path / "cache"))
    return FinetuneConfig(checkpoint_dir=tiny_checkpoint, data=data)


@pytest.fixture
def data(config: FinetuneConfig) -> RunData:
    return read_data(config)


def test_a_question_is_all_before_the_last_answer(data: RunData) -> None:
    tokens, labels = data.val_batches[0].tokens[0], data.val_batches[0].labels[0]
    asked = question(data, tokens, labels)
    assert asked
    assert asked.prompt.startswith("Q: What is")
    assert asked.prompt.endswith("?\nA:")
    a, b = (int(word) for word in asked.prompt[11:-4].split(" plus "))
    assert asked.wanted == str(a + b)


def test_a_known_answer_is_compared_without_its_thought(data: RunData) -> None:
    template = "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if false %}<think></think>{% endif %}"
    encode, end = data.tokenizer.encode, data.tokenizer.eos_id
    asked, said = encode("Q:"), [*encode("<think>Hm.</think> 2", bos=False), end]
    tokens = torch.tensor(asked + said[:-1])
    labels = torch.tensor([-100] * (len(asked) - 1) + said)
    assert question(replace(data, style=TemplateStyle(template)), tokens, labels).wanted == "2"


def test_of_a_conversation_the_last_answer_is_asked_for(config: FinetuneConfig, tmp_path: Path) -> None:
    path = tmp_path / "talk.jsonl"
    with path.open("w") as file:
        for system in ("a", "b", "c", "d"):  # equal samples would all be learnt or all be asked
            turns = [
                ("system", system),
                ("user", "one"),
                ("assistant", "two"),
                ("user", "three"),
                ("assistant", "four"),
            ]
            print(json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}), file=file)
    data = read_data(replace(config, data=replace(config.data, path=str(path))))
    asked = question(data, data.val_batches[0].tokens[0], data.val_batches[0].labels[0])
    assert asked
    assert "A: two" in asked.prompt
    assert asked.prompt.endswith("Q: three\nA:")
    assert asked.wanted == "four"


def test_a_text_that_is_labelled_from_its_beginning_asks_nothing(config: FinetuneConfig, tmp_path: Path) -> None:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(f'{{"text": "What is 1 plus {i}?"}}\n' for i in range(9)))
    text = replace(config, data=replace(config.data, path=str(path), prompt="auto"), eval=EvalConfig(generate=1))
    data = read_data(text)
    assert question(data, data.val_batches[0].tokens[0], data.val_batches[0].labels[0]) is None
    with pytest.raises(UsageError, match=r"eval.generate compares answers.*texts without prompts"):
        read_probes(text, data)


def test_questions_are_of_all_lengths(config: FinetuneConfig, data: RunData) -> None:
    probes = read_probes(replace(config, eval=EvalConfig(generate=4)), data)
    every = read_probes(replace(config, eval=EvalConfig(generate=99)), data)
    assert len(every.questions) == data.val_samples == 8
    assert probes.questions == every.questions[::2]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"best": "chrf"}, "eval.best chrf needs --eval.generate."),
        ({"best": "kl_to_base"}, "eval.best kl_to_base needs --eval.kl_text."),
        ({"best": "val_acuracy"}, "eval.best 'val_acuracy' is not a metric of validations. Did you mean val_accuracy?"),
        ({"best": "mmlu/acc"}, "eval.best 'mmlu/acc' is not a metric"),
        ({"kl_text": Path("absent.txt")}, "eval.kl_text absent.txt cannot be read: No such file or directory."),
        ({"prompts": Path("absent.txt")}, "absent.txt"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    config: FinetuneConfig, data: RunData, settings: dict, message: str
) -> None:
    with pytest.raises((UsageError, DataError)) as caught:
        read_probes(replace(config, eval=EvalConfig(**settings)), data)
    assert message in str(caught.value)


def test_questions_are_the_same_where_prompts_are_labelled_too(config: FinetuneConfig, data: RunData) -> None:
    config = replace(config, eval=EvalConfig(generate=5))
    whole = replace(config, data=replace(config.data, mask_prompt=False))
    assert read_probes(whole, read_data(whole)).questions == read_probes(config, data).questions


def test_prompts_come_from_lines_or_records(config: FinetuneConfig, data: RunData, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("What is 1 plus 1?\n\nWhat is 2 plus 2?\n")
    (tmp_path / "p.jsonl").write_text('{"instruction": "Add.", "input": "1, 2"}\n')
    lines, records = (
        read_probes(replace(config, eval=EvalConfig(prompts=tmp_path / name)), data).prompts
        for name in ("p.txt", "p.jsonl")
    )
    assert [asked.prompt for asked in lines] == ["What is 1 plus 1?", "What is 2 plus 2?"]
    assert lines[0].ids == data.style.encode_prompt(data.tokenizer, prompt_of("What is 1 plus 1?"))
    assert records[0].prompt == "Add.\n1, 2"
    assert records[0].ids == data.style.encode_prompt(data.tokenizer, prompt_of("Add.", "1, 2"))


def test_the_text_that_comes_with_the_package_is_read(config: FinetuneConfig, data: RunData) -> None:
    probes = read_probes(replace(config, eval=EvalConfig(kl_text=Path("default"))), data)
    assert data.tokenizer.decode(probes.text).startswith("A bicycle is steered by its front wheel")
    assert len(probes.text) == PROBE_TOKENS


@pytest.mark.parametrize(
    ("path", "message"),
    [("absent.txt", "eval.prompts: .*absent.txt does not exist"), (".", "eval.prompts: .* is a folder. Name a file")],
)
def test_a_file_of_prompts_that_cannot_be_read_is_named_with_its_setting(
    config: FinetuneConfig, data: RunData, tmp_path: Path, path: str, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        read_probes(replace(config, eval=EvalConfig(prompts=tmp_path / path)), data)


def test_questions_of_data_without_masks_are_those_of_its_own_samples(
    config: FinetuneConfig, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    own = with_template(tiny_checkpoint, tmp_path / "own", REWRITING)
    with (tmp_path / "talks.jsonl").open("w") as file:
        for name in range(8):
            said = [str(name), "0", "1", "1"]
            talk = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
            print(json.dumps({"messages": talk}), file=file)
    whole = replace(config.data, path=str(tmp_path / "talks.jsonl"), prompt="template", mask_prompt=False)
    config = replace(config, checkpoint_dir=own, data=whole, eval=EvalConfig(generate=8))
    found = read_probes(config, read_data(config)).questions
    assert {one.wanted for one in found} == {"Hm. 1"}  # by itself the first answer would be a sample, too
