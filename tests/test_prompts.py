"""Prompt styles, and the small file that remembers which one a checkpoint was made with."""

from pathlib import Path

import pytest

from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.prompts import FILE_NAME, STYLES, find_style, read_style, style_json


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("input", ["", "Some input."])
def test_every_style_holds_instruction_and_input(style: str, input: str) -> None:
    prompt = STYLES[style].render("Do {this}\nand that.", input)
    assert prompt.count("Do {this}\nand that.") == 1
    assert input in prompt


def test_alpaca_is_the_prompt_that_alpaca_was_trained_on() -> None:
    assert STYLES["alpaca"].render("Add.", "") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Response:\n"
    )
    assert STYLES["alpaca"].render("Add.", "1 2") == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n"
    )


@pytest.mark.parametrize("style", STYLES)
def test_no_style_ends_in_a_space_that_tokenizers_would_join_to_the_answer(style: str) -> None:
    assert not STYLES[style].render("a", "b").endswith(" ")


def test_an_unknown_style_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(UsageError, match=r"'alpca' is not a prompt style\. Did you mean alpaca\? Known: alpaca, plain"):
        find_style("alpca")
    with pytest.raises(UsageError, match=r"'zzz' is not a prompt style\. Known: "):
        find_style("zzz")


@pytest.mark.parametrize("style", STYLES)
def test_the_style_is_remembered_beside_the_weights(tmp_path: Path, style: str) -> None:
    assert read_style(tmp_path) is None
    (tmp_path / FILE_NAME).write_text(style_json(style))
    assert read_style(tmp_path) == style


@pytest.mark.parametrize("content", ["", "[]", "5", "null", "{}", '{"style": "nope"}', '{"style": ["qa"]}'])
def test_a_damaged_style_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=FILE_NAME):
        read_style(tmp_path)
