"""From examples to ids: which tokens are labelled, what is cut, and that the end of an answer survives."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_qlora.data import Encoder, Encoding, Example, Sample
from lit_qlora.data.encode import Counts
from lit_qlora.errors import DataError
from lit_qlora.prompts.conversation import Conversation, Message
from lit_qlora.prompts.style import STYLES, Style, TemplateStyle, knobs_style
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import PromptKnobs
from tests.conftest import TEXT_STYLES

TALK = Conversation.of(("Hi", "Yo."), ("1 plus 1?", "2"), ("And 2 plus 2?", "4, as ever")).messages
KIND = (Message("system", "Be kind."), *TALK)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return Tokenizer(tiny_checkpoint)


def example(instruction: str, output: str, input: str = "", system: str | None = None) -> Example:
    said = Conversation.of((instruction, output), system=system)
    return Example(said.messages, input, location="a.jsonl:1")


def encode(
    tokenizer: Tokenizer, examples: Iterable[Example], style: str = "qa", max_length: int = 512, **limits: Any
) -> tuple[list[Sample], Counts]:
    encoder = Encoder(tokenizer, STYLES[style], Encoding(max_length=max_length, **limits))
    return [one.sample for one in encoder.encode(list(examples))], encoder.counts


def labelled(tokenizer: Tokenizer, sample: Sample) -> list[str]:
    """The labelled parts of a sample."""
    parts: list[list[int]] = []
    for i, (token, trained) in enumerate(zip(sample.tokens.tolist(), sample.trained, strict=True)):
        if trained:
            if not sample.trained[i - 1]:
                parts.append([])
            parts[-1].append(token)
    assert all(part[-1] == tokenizer.eos_id for part in parts)
    return [tokenizer.decode(part).strip(" ") for part in parts]


def given(tokenizer: Tokenizer, sample: Sample) -> str:
    return tokenizer.decode(sample.tokens[~sample.trained].tolist())


@pytest.mark.parametrize("style", TEXT_STYLES)
def test_a_sample_is_bos_prompt_answer_eos(tokenizer: Tokenizer, style: str) -> None:
    (sample,), _ = encode(tokenizer, [example("1 plus 2?", "It is\n3.", "x")], style)
    at = int(sample.trained.argmax())
    prompt, answer = sample.tokens[:at].tolist(), sample.tokens[at:].tolist()
    assert prompt == tokenizer.encode(STYLES[style].render("1 plus 2?", "x"), bos=True)
    assert (prompt.count(tokenizer.bos_id), answer.count(tokenizer.eos_id), answer[-1]) == (1, 1, tokenizer.eos_id)
    whole = STYLES[style].render("1 plus 2?", "x") + STYLES[style].gap + "It is\n3." + STYLES[style].tail
    assert tokenizer.decode(sample.tokens.tolist()) == whole


def test_the_answer_alone_is_labelled_unless_the_prompt_is_wanted_too(tokenizer: Tokenizer) -> None:
    examples = [example("What is 1 plus 2?", "3")]
    (masked,), _ = encode(tokenizer, examples)
    (whole,), _ = encode(tokenizer, examples, mask_prompt=False)
    assert masked.labelled == len(tokenizer.encode(" 3", continuation=True)) + 1
    assert whole.tokens.tolist() == masked.tokens.tolist()
    assert whole.labelled == len(whole.tokens) - 1


def test_the_prompt_is_masked_by_its_place_even_where_the_answer_repeats_it(tokenizer: Tokenizer) -> None:
    prompt = STYLES["alpaca"].render("a", "")
    (sample,), _ = encode(tokenizer, [example("a", prompt)], "alpaca")
    assert int(sample.trained.argmax()) == len(tokenizer.encode(prompt))
    assert labelled(tokenizer, sample) == [prompt]


def test_every_turn_of_a_conversation_is_labelled_with_its_end(tokenizer: Tokenizer) -> None:
    (sample,), counts = encode(tokenizer, [Example(TALK)], "vicuna")
    assert labelled(tokenizer, sample) == ["Yo.", "2", "4, as ever"]
    assert given(tokenizer, sample).endswith(
        "USER: Hi ASSISTANT:USER: 1 plus 1? ASSISTANT:USER: And 2 plus 2? ASSISTANT:"
    )
    assert (counts.turns, counts.ended) == (3, 3)


def test_turns_can_be_left_to_be_context_only(tokenizer: Tokenizer) -> None:
    (last,), _ = encode(tokenizer, [Example(TALK)], "vicuna", only_last_answer=True)
    assert labelled(tokenizer, last) == ["4, as ever"]
    silent = (*TALK[:3], TALK[3]._replace(weight=0.0), *TALK[4:])
    (some,), _ = encode(tokenizer, [Example(silent)], "vicuna")
    assert labelled(tokenizer, some) == ["Yo.", "4, as ever"]
    assert last.tokens.tolist() == some.tokens.tolist()


def test_a_system_message_stands_for_samples_that_have_none(tokenizer: Tokenizer) -> None:
    samples, _ = encode(tokenizer, [example("a", "b"), example("a", "b", system="Own.")], system="Given.")
    assert [given(tokenizer, sample) for sample in samples] == ["Given.\n\nQ: a\nA:", "Own.\n\nQ: a\nA:"]
    raw, _ = encode(tokenizer, [example("", "b c")], "text", system="Given.")
    assert raw[0].tokens.tolist() == tokenizer.encode("b c", eos=True)


def test_raw_text_is_labelled_whole_and_long_text_in_pieces_that_lose_nothing(tokenizer: Tokenizer) -> None:
    text = "What is 3 plus 4? It is 7. " * 9
    ids = tokenizer.encode(text, eos=True)
    (whole,), _ = encode(tokenizer, [example("", text)], "text")
    assert whole.tokens.tolist() == ids
    assert whole.labelled == len(ids) - 1
    pieces, counts = encode(tokenizer, [example("", text)], "text", max_length=16)
    assert len(pieces) > 5
    assert all(len(piece.tokens) <= 16 for piece in pieces)
    assert [i for piece in pieces for i in piece.tokens[piece.trained].tolist()] == ids[1:]  # each once, in order
    assert (counts.turns, counts.ended, counts.cut_answers) == (1, 1, 0)


def test_a_prompt_that_is_empty_is_masked_cut_and_counted_as_a_prompt(tokenizer: Tokenizer) -> None:
    (whole, cut), counts = encode(tokenizer, [example("", "3"), example("", "9 " * 80)], max_length=64)
    assert given(tokenizer, whole) == given(tokenizer, cut) == "Q: \nA:"
    assert cut.tokens[-1] == tokenizer.eos_id
    assert (counts.empty_prompts, counts.cut_answers) == (2, 1)


def test_nothing_at_all_is_left_out(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "use_bos", False)
    bare = PromptKnobs(add_eos_token_to_prompt=False, add_eos_token_to_answer=False)
    encoder = Encoder(tokenizer, knobs_style(bare), Encoding(max_length=64))
    assert list(encoder.encode([example("", "")])) == []
    assert encoder.counts.masked == 1


# What is too long.


@pytest.mark.parametrize("max_length", range(8, 60))
@pytest.mark.parametrize("overlong", ["truncate_left", "truncate_right"])
def test_every_cut_keeps_bos_the_style_some_prompt_some_answer_and_eos(
    tokenizer: Tokenizer, max_length: int, overlong: str
) -> None:
    short, long = example("What is 1 plus 2?", "3"), example("What is 1 plus 2?", "9 " * 40)
    both = example("What is 1 plus 2? " * 9, "9 " * 40, "4 plus 4 " * 9)
    samples, counts = encode(tokenizer, [short, long, both], max_length=max_length, overlong=overlong)
    assert len(samples) + counts.dropped == 3
    assert samples or max_length < 20
    for sample in samples:
        assert len(sample.tokens) <= max_length
        assert sample.tokens[0] == tokenizer.bos_id
        assert sample.tokens[-1] == tokenizer.eos_id
        prompt = given(tokenizer, sample)
        assert prompt.startswith("Q: ")
        assert prompt.endswith("\nA:")
        assert len(prompt.strip()) > len("Q: \nA:")
        assert sample.labelled >= 2


@pytest.mark.parametrize("style", TEXT_STYLES)
@pytest.mark.parametrize("overlong", ["truncate_left", "truncate_right"])
def test_every_answer_that_is_left_of_anything_ends_and_is_not_empty(
    tokenizer: Tokenizer, style: str, overlong: str
) -> None:
    source = random.Random(f"{style} {overlong}")

    def text() -> str:
        return " ".join(str(source.randint(0, 99)) for _ in range(source.randint(1, 40)))

    given = [
        Example(Conversation.of(*((text(), text()) for _ in range(source.randint(1, 4)))).messages, text())
        for _ in range(20)
    ]
    left = 0
    for _ in range(10):
        limits = Encoding(
            max_length=source.randint(60, 400),
            max_length_prompt=source.choice([None, source.randint(2, 300)]),
            max_length_answer=source.choice([None, source.randint(2, 60)]),
            overlong=overlong,  # type: ignore[arg-type]
            label_cut_ends=True,
        )
        encoder = Encoder(tokenizer, STYLES[style], limits)
        samples = [one.sample for one in encoder.encode(given)]
        assert len(samples) + encoder.counts.dropped == 20
        assert encoder.counts.turns == encoder.counts.ended >= len(samples)
        left += len(samples)
        for sample in samples:
            assert len(sample.tokens) <= limits.max_length
            ends = [i + 1 for i in range(len(sample.tokens)) if not sample.trained[i : i + 2].all()]
            parts = [part for part in np.split(sample.trained, ends) if part.any()]
            assert all(2 <= len(part) <= (limits.max_length_answer or 400) for part in parts)
            answers = sample.tokens[sample.trained].tolist()
            assert answers.count(tokenizer.eos_id) == len(parts)
    assert left > 30


def test_the_prompt_gives_way_first_at_its_beginning_or_its_end(tokenizer: Tokenizer) -> None:
    long = example("one two three four five six seven", "fine")
    full, _ = encode(tokenizer, [long])
    for overlong, kept in (("truncate_left", "seven"), ("truncate_right", "one")):
        (cut,), counts = encode(tokenizer, [long], max_length=len(full[0].tokens) - 8, overlong=overlong)
        assert labelled(tokenizer, cut) == ["fine"]
        assert kept in given(tokenizer, cut)
        assert given(tokenizer, cut).startswith("Q: ")
        assert (counts.cut_prompts, counts.cut_answers) == (1, 0)


def test_a_long_input_is_cut_before_a_short_instruction(tokenizer: Tokenizer) -> None:
    (cut,), _ = encode(tokenizer, [example("Sum up:", "ok", "word " * 60)], max_length=64)
    assert given(tokenizer, cut).startswith("Q: Sum up:\n")


def test_the_prompt_never_vanishes_for_a_long_answer(tokenizer: Tokenizer) -> None:
    question = "What is 1 plus 2?"
    (cut,), counts = encode(tokenizer, [example(question, "9 " * 400)], max_length=96, label_cut_ends=True)
    assert given(tokenizer, cut) == f"Q: {question}\nA:"
    assert len(cut.tokens) == 96
    assert (counts.cut_prompts, counts.cut_answers) == (0, 1)
    (both,), counts = encode(tokenizer, [example("4 plus 4 " * 90, "9 " * 400)], max_length=96, label_cut_ends=True)
    assert 40 <= 96 - both.labelled <= 48  # half of the room
    assert (counts.cut_prompts, counts.cut_answers) == (1, 1)


def test_prompts_and_answers_can_have_limits_of_their_own(tokenizer: Tokenizer) -> None:
    long = example("4 plus 4 " * 20, "9 " * 40)
    limits = {"max_length_prompt": 20, "max_length_answer": 7, "label_cut_ends": True}
    (cut,), counts = encode(tokenizer, [long], **limits)
    assert 15 <= len(cut.tokens) - cut.labelled <= 20
    assert cut.labelled == 7
    assert cut.tokens[-1] == tokenizer.eos_id
    assert (counts.cut_prompts, counts.cut_answers) == (1, 1)
    (talk,), _ = encode(tokenizer, [Example(long.messages * 2)], **limits)
    assert talk.labelled == 14


def test_the_end_of_a_cut_answer_is_labelled_only_if_asked_for(tokenizer: Tokenizer) -> None:
    said = [example("4 plus 4", "8"), example("4 plus 4", "9 " * 40)]
    (whole, cut), _ = encode(tokenizer, said, max_length_answer=7)
    assert (whole.trained[-1], cut.trained[-1], cut.trained[-2]) == (True, False, True)
    _, asked = encode(tokenizer, said, max_length_answer=7, label_cut_ends=True)[0]
    assert asked.tokens.tolist() == cut.tokens.tolist()
    assert asked.trained[-1]


@pytest.mark.parametrize(("overlong", "left"), [("truncate_left", KIND[:1] + TALK[2:]), ("truncate_right", KIND[:5])])
def test_of_a_long_conversation_whole_turns_go(tokenizer: Tokenizer, overlong: str, left: tuple[Message, ...]) -> None:
    (whole,), _ = encode(tokenizer, [Example(KIND)], "guanaco")
    length = len(whole.tokens) - 1
    (cut,), counts = encode(tokenizer, [Example(KIND)], "guanaco", length, overlong=overlong)
    (expected,), _ = encode(tokenizer, [Example(left)], "guanaco")
    assert cut.tokens.tolist() == expected.tokens.tolist()  # the system message is still before all
    assert (counts.cut_turns, counts.cut_prompts, counts.cut_answers) == (1, 0, 0)


def test_what_is_too_long_can_be_dropped_or_refused(tokenizer: Tokenizer) -> None:
    examples = [example("1", "2"), example("1", "3 " * 40)]
    samples, counts = encode(tokenizer, examples, max_length=32, overlong="drop")
    assert (len(samples), counts.dropped) == (1, 1)
    with pytest.raises(DataError, match=r"^a\.jsonl:1: \d+ tokens do not fit\n +data\.max_length is 32\. Raise the"):
        encode(tokenizer, examples, max_length=32, overlong="error")
    with pytest.raises(
        DataError, match=r"(?s)^(a\.jsonl:1: \d+ tokens do not fit\s+){10}\.\.\. and 20 more\s+data\.max"
    ):
        encode(tokenizer, examples * 30, max_length=32, overlong="error")
    for limit in ({"max_length_prompt": 4}, {"max_length_answer": 2}):
        assert encode(tokenizer, examples[1:], overlong="drop", **limit)[1].dropped == 1


@pytest.mark.parametrize("style", ["guanaco", "template"])
@pytest.mark.parametrize("overlong", ["truncate_left", "truncate_right"])
def test_what_is_too_long_is_cut_together_in_a_few_rounds_and_as_alone(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, style: str, overlong: str
) -> None:
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    chosen: Style = TemplateStyle(template) if style == "template" else STYLES[style]
    talks = [Example(TALK[: 2 + 2 * (i % 3)] * (1 + i % 4)) for i in range(12)]
    examples = talks + [example("4 plus 4 " * 9, "9 " * 40)] * 3
    limits = Encoding(max_length=40, overlong=overlong, max_length_answer=12)  # type: ignore[arg-type]
    asked = []
    encode_many = type(chosen).encode_many

    def counting(self: Style, tokenizer: Tokenizer, conversations: list, *how: bool) -> list:
        asked.append(len(conversations))
        return encode_many(self, tokenizer, conversations, *how)

    monkeypatch.setattr(type(chosen), "encode_many", counting)
    encoder = Encoder(tokenizer, chosen, limits)
    asked.clear()
    together = [one.sample.tokens.tolist() for one in encoder.encode(examples)]
    assert encoder.counts.cut_turns > 9
    assert encoder.counts.cut_prompts >= encoder.counts.cut_answers == 3
    assert asked[0] == 15
    assert len(asked) < 15  # not one call for each cut
    assert sum(asked) > 40
    alone = [one.sample.tokens.tolist() for e in examples for one in Encoder(tokenizer, chosen, limits).encode([e])]
    assert together == alone


def test_what_has_no_room_for_its_prompt_is_dropped_and_counted(tokenizer: Tokenizer) -> None:
    samples, counts = encode(tokenizer, [example("1 plus 1?", "2")], "alpaca", max_length=32)
    assert (samples, counts.dropped) == ([], 1)


def test_answers_without_an_end_are_counted(tokenizer: Tokenizer) -> None:
    style = knobs_style(PromptKnobs(add_eos_token_to_answer=False))
    encoder = Encoder(tokenizer, style, Encoding(max_length=64))
    (one,) = encoder.encode([example("a", "b")])
    assert one.sample.tokens[-1] != tokenizer.eos_id
    assert (encoder.counts.turns, encoder.counts.ended) == (1, 0)


def test_encoding_many_at_once_is_encoding_each(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = [example(f"What is {a} plus {a}?", str(a), "x" * (a % 3)) for a in range(20)]
    together, _ = encode(tokenizer, examples)
    monkeypatch.setattr("lit_qlora.data.encode.AT_ONCE", 3)
    in_threes, _ = encode(tokenizer, examples)
    alone = [encode(tokenizer, [one])[0][0] for one in examples]
    for others in (in_threes, alone):
        assert [sample.tokens.tolist() for sample in others] == [sample.tokens.tolist() for sample in together]
