"""From examples to ids: what is learnt, what is cut, and that the end-of-text token survives."""

from pathlib import Path

import pytest

from lit_qlora.data import Example, encode_examples
from lit_qlora.errors import DataError
from lit_qlora.prompts import STYLES
from lit_qlora.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def example(instruction: str, output: str, input: str = "") -> Example:
    return Example(instruction, input, output, place="a.jsonl:1")


@pytest.mark.parametrize("style", STYLES)
def test_a_sample_is_bos_prompt_answer_eos(tokenizer: Tokenizer, style: str) -> None:
    (sample,), _ = encode_examples([example("1 plus 2?", "It is\n3.", "x")], tokenizer, STYLES[style], 512)
    prompt, answer = sample.tokens[: sample.prompt_length], sample.tokens[sample.prompt_length :]
    assert prompt == tokenizer.encode(STYLES[style].render("1 plus 2?", "x"), bos=True)
    assert (prompt.count(tokenizer.bos_id), answer.count(tokenizer.eos_id), answer[-1]) == (1, 1, tokenizer.eos_id)
    assert tokenizer.decode(sample.tokens) == STYLES[style].render("1 plus 2?", "x") + STYLES[style].gap + "It is\n3."


def test_the_answer_alone_is_learnt_unless_the_prompt_is_wanted_too(tokenizer: Tokenizer) -> None:
    examples = [example("What is 1 plus 2?", "3")]
    (masked,), _ = encode_examples(examples, tokenizer, STYLES["qa"], 64)
    (whole,), _ = encode_examples(examples, tokenizer, STYLES["qa"], 64, mask_prompt=False)
    assert masked.labelled == len(tokenizer.encode(" 3", continuation=True)) + 1
    assert whole.tokens == masked.tokens
    assert whole.labelled == len(whole.tokens) - 1


def test_the_prompt_is_masked_by_its_place_even_where_the_answer_repeats_it(tokenizer: Tokenizer) -> None:
    prompt = STYLES["alpaca"].render("a", "")
    (sample,), _ = encode_examples([example("a", prompt)], tokenizer, STYLES["alpaca"], 512)
    assert sample.prompt_length == len(tokenizer.encode(prompt))
    assert tokenizer.decode(sample.tokens[sample.prompt_length :]) == prompt


def test_control_tokens_in_the_data_are_text(tokenizer: Tokenizer) -> None:
    text = "<s>a</s>"
    (sample,), _ = encode_examples([example(text, text)], tokenizer, STYLES["plain"], 64)
    assert sample.tokens.count(tokenizer.bos_id) == 1
    assert sample.tokens.count(tokenizer.eos_id) == 1
    assert tokenizer.decode(sample.tokens) == f"{text}\n{text}"


@pytest.mark.parametrize("max_length", range(8, 40))
def test_every_cut_keeps_bos_eos_and_an_answer(tokenizer: Tokenizer, max_length: int) -> None:
    short, long = example("What is 1 plus 2?", "3"), example("What is 1 plus 2?", "9 " * 20)
    samples, _ = encode_examples([short, short, long], tokenizer, STYLES["qa"], max_length)
    for sample in samples:
        assert len(sample.tokens) <= max_length
        assert sample.tokens[0] == tokenizer.bos_id
        assert sample.tokens[-1] == tokenizer.eos_id
        assert sample.prompt_length >= 2
        assert sample.labelled >= 2


def test_the_beginning_of_the_prompt_goes_first_and_the_answer_stays_whole(tokenizer: Tokenizer) -> None:
    whole, _ = encode_examples([example("What is 1 plus 2?", "3")], tokenizer, STYLES["qa"], 96)
    (cut,), report = encode_examples([example("What is 1 plus 2?", "3")], tokenizer, STYLES["qa"], 10)
    tokens, prompt_length = whole[0]
    assert len(tokens) > 10
    assert cut.tokens == [tokenizer.bos_id, *tokens[len(tokens) - 9 :]]
    assert cut.labelled == len(tokens) - prompt_length
    assert (report.cut_prompts, report.cut_answers) == (1, 0)


def test_what_was_cut_is_counted_and_said(tokenizer: Tokenizer) -> None:
    short, long = example("1", "2"), example("1", "3 " * 40)
    samples, report = encode_examples([short, short, short, long], tokenizer, STYLES["qa"], 32)
    assert (report.cut_prompts, report.cut_answers) == (1, 1)
    assert "1 prompts cut, 1 answers cut (25 %)" in report.describe()
    assert f"longest {max(report.lengths)}" in report.describe()
    assert len(samples[-1].tokens) == 32


def test_a_run_that_would_teach_half_sentences_is_refused(tokenizer: Tokenizer) -> None:
    examples = [example("1", "2"), *[example("1", "3 " * 40)] * 3]
    with pytest.raises(DataError, match=r"3 of 4 answers do not fit into 16 tokens.*\n*Raise data\.max_length"):
        encode_examples(examples, tokenizer, STYLES["qa"], 16)


def test_it_can_be_allowed_by_name(tokenizer: Tokenizer) -> None:
    examples = [example("1", "3 " * 40)] * 3
    samples, report = encode_examples(examples, tokenizer, STYLES["qa"], 16, allow_cut_answers=True)
    assert report.cut_answers == 3
    assert all(len(sample.tokens) == 16 for sample in samples)


def test_a_sample_whose_prompt_vanishes_still_has_a_first_token_that_nothing_predicts() -> None:
    class Blank:
        use_bos = False

        def encode(
            self, text: str, bos: bool | None = None, eos: bool = False, continuation: bool = False
        ) -> list[int]:
            return [7, 8, 2] if eos else []

    (sample,), _ = encode_examples([example(" ", "x")], Blank(), STYLES["plain"], 16)  # type: ignore[arg-type]
    assert sample.prompt_length == 1
