"""Prompt styles: their words, the ids that they become, and the small file that remembers which one was used."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data import Encoder, Encoding, Example
from lit_qlora.errors import CheckpointError, DataError, UsageError
from lit_qlora.inference import encode_prompt, stop_ids
from lit_qlora.prompts.chat_template import Renderer
from lit_qlora.prompts.conversation import Conversation, Message, prompt_of
from lit_qlora.prompts.pieces import Control
from lit_qlora.prompts.style import (
    FILE_NAME,
    STYLES,
    EncodedTurn,
    Style,
    TemplateStyle,
    find_style,
    knobs_style,
    read_style,
    style_json,
)
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.prompts.wordings import WORDINGS
from lit_qlora.settings import PromptKnobs

CONTROLS = [
    *("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    *("<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"),
]
TEMPLATES = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "llama3": "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim "
    "+ '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "gemma": "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' "
    "+ m.content + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}",
    "phi3": "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
}
"""What the makers' templates write, without what they refuse."""
TALK = Conversation.of(("Hi, who are you?", "A fox."), ("And\nthen?", "I ran."))
FIRST, SECOND = TALK.messages[:2], TALK.messages[2:]


def write_chatty_tokenizer(directory: Path) -> None:
    """A byte-level tokenizer with the control tokens of every style."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@pytest.fixture(scope="module")
def chatty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with that tokenizer."""
    directory = tmp_path_factory.mktemp("chatty")
    write_chatty_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def tokenizer(chatty: Path) -> Tokenizer:
    return Tokenizer(chatty)


def flat(turns: list[EncodedTurn]) -> list[int]:
    return [i for turn in turns for part in turn[:2] for i in part]


def example(said: Conversation, place: str = "a") -> Example:
    return Example(said.messages, said.input, said.variables, place)


# The words.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("input", ["", "Some input."])
def test_every_style_holds_instruction_and_input_and_system(style: str, input: str) -> None:
    prompt = STYLES[style].render("Do {this}\nand that.", input, "Be kind.")
    assert prompt.count("Do {this}\nand that.") == 1
    assert prompt.count("Be kind.") == 1
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


def test_the_variant_with_an_end_writes_it_behind_the_answer(tokenizer: Tokenizer) -> None:
    style = STYLES["alpaca-end"]
    (turns,) = style.encode_many(tokenizer, [Conversation.of(("Name it.", "Beseye Pro"))])
    text = "### Instruction:\n\nName it.\n\n### Response:\nBeseye Pro\n### End"
    assert tokenizer.decode(flat(turns)).endswith(text)
    assert turns[0].answer[-1] == tokenizer.eos_id
    assert style.said(tokenizer.decode(turns[0].answer)) == "Beseye Pro"


@pytest.mark.parametrize("style", STYLES)
def test_no_style_ends_in_a_space_that_tokenizers_would_join_to_the_answer(style: str) -> None:
    assert not STYLES[style].render("a", "b").endswith(" ")


def test_an_unknown_style_is_answered_with_the_nearest_and_all() -> None:
    with pytest.raises(
        UsageError, match=r"'alpca' is not a prompt style\. Did you mean alpaca\? Known: alpaca, alpaca"
    ):
        find_style("alpca")
    with pytest.raises(UsageError, match=r"'zzz' is not a prompt style\. Known: "):
        find_style("zzz")


# The ids.


@pytest.mark.parametrize(
    ("name", "system"),
    [(name, system) for name in TEMPLATES for system in ("", "Be brief.") if (name, system) != ("gemma", "Be brief.")],
)
def test_ids_are_those_that_transformers_makes_of_the_template(
    chatty: Path, tokenizer: Tokenizer, name: str, system: str
) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(chatty)
    theirs.chat_template = TEMPLATES[name]
    said = Conversation((*([Message("system", system)] if system else []), *TALK.messages))
    messages = [{"role": message.role, "content": message.content} for message in said.messages]
    expected = theirs.apply_chat_template(messages, return_dict=False)
    prompt = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
    for style in (STYLES[name], TemplateStyle(TEMPLATES[name])):
        ids = flat(style.encode_many(tokenizer, [said])[0])
        assert ids == expected[: len(ids)]  # a newline behind the last answer is nobody's to learn
        assert tokenizer.decode(expected[len(ids) :]) in ("", "\n")
        assert style.encode_prompt(tokenizer, said.prompt) == prompt


@pytest.mark.parametrize("name", [*STYLES, "template", "knobs"])
def test_training_generation_and_chat_see_the_same_ids(chatty: Path, tokenizer: Tokenizer, name: str) -> None:
    style = TemplateStyle(TEMPLATES["chatml"]) if name == "template" else find_style(name)
    single = example(Conversation.of(("Why?", "So."), input="This.", system="Be kind."))
    talk = example(Conversation((Message("system", "Be kind."), *TALK.messages)))
    encoder = Encoder(tokenizer, style, Encoding(max_length=4096))
    alone, spoken = (one.sample for one in encoder.encode([single, talk]))
    given = alone.tokens[: int(alone.trained.argmax())].tolist()
    assert given == encode_prompt(tokenizer, style, prompt_of("Why?", "This.", "Be kind."))
    answers = [i for i in range(1, len(spoken.trained)) if spoken.trained[i] and not spoken.trained[i - 1]]
    for turn, begins in enumerate(answers):  # each turn of a chat is what training saw before its answer
        prompt = encode_prompt(tokenizer, style, Conversation(talk.messages[: 2 + 2 * turn]))
        assert spoken.tokens[:begins].tolist() == prompt
    assert len(answers) == 2
    assert int(alone.tokens[-1]) in stop_ids(tokenizer, style)


@pytest.mark.parametrize("name", [*STYLES, "template"])
def test_what_a_user_types_never_becomes_a_control_token(tokenizer: Tokenizer, name: str) -> None:
    style = TemplateStyle(TEMPLATES["chatml"]) if name == "template" else find_style(name)
    typed = "x".join(CONTROLS)
    count = {}
    for text in ("harmless", typed):
        said = Conversation.of((text, text), input=text, system=text)
        ids = flat(style.encode_many(tokenizer, [said])[0])
        count[text] = [ids.count(i) for i in tokenizer.control_tokens.values()]
        assert tokenizer.decode(ids).count(text) >= 3
    assert count["harmless"] == count[typed]


@pytest.mark.parametrize("name", [*STYLES, "template"])
def test_an_answer_ends_with_what_ends_it_and_generation_stops_there(tokenizer: Tokenizer, name: str) -> None:
    style = TemplateStyle(TEMPLATES["llama3"]) if name == "template" else find_style(name)
    (turns,) = style.encode_many(tokenizer, [TALK])
    ends = {turn.answer[-1] for turn in turns}
    assert ends == style.stop_ids(tokenizer)
    wanted = "<|eot_id|>" if name == "template" else (WORDINGS[name].end or Control("")).name
    assert ends == {tokenizer.eos_id if wanted == "<EOS>" else tokenizer.control_tokens[wanted]}
    assert [style.said(tokenizer.decode(turn.answer)) for turn in turns] == ["A fox.", "I ran."]


@pytest.mark.parametrize("name", ["chatml", "llama3", "phi3", "gemma"])
def test_a_style_whose_control_tokens_the_tokenizer_lacks_is_refused(tiny_checkpoint: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"needs the control token '<.*which the tokenizer does not have"):
        STYLES[name].encode_prompt(Tokenizer(tiny_checkpoint), prompt_of("a"))


def test_a_control_token_that_a_tokenizer_may_lack_is_text_there(tiny_checkpoint: Path) -> None:
    tokenizer = Tokenizer(tiny_checkpoint)
    ids = STYLES["mistral"].encode_prompt(tokenizer, prompt_of("a"))
    assert tokenizer.decode(ids) == "[INST] a [/INST]"
    assert ids.count(tokenizer.bos_id) == 1


def test_the_knobs_of_h2o_put_texts_and_eos_around_prompt_and_answer(tokenizer: Tokenizer) -> None:
    knobs = PromptKnobs(text_system_start="S:", text_prompt_start="<|prompt|>", text_answer_separator="<|answer|>")
    (turns,) = knobs_style(knobs).encode_many(tokenizer, [Conversation.of(("Hi", "Yo"), system="kind")])
    ((prompt, answer, _),) = turns
    eos = tokenizer.eos_id
    assert [prompt.count(eos), answer.count(eos), answer[-1]] == [2, 1, eos]
    assert tokenizer.decode(prompt) == "S:kind<|prompt|>Hi<|answer|>"
    bare = PromptKnobs(add_eos_token_to_prompt=False, add_eos_token_to_answer=False, add_eos_token_to_system=False)
    style = knobs_style(bare)
    assert eos not in flat(style.encode_many(tokenizer, [Conversation.of(("Hi", "Yo"), system="kind")])[0])
    assert style.stop_ids(tokenizer) == frozenset()


# Templates that leave out earlier thoughts.

THOUGHTFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content }}<|im_end|>{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HISTORY = "<|im_start|>user\nHi, who are you?<|im_end|>\n<|im_start|>assistant\nA fox.<|im_end|>\n"
ASKED = HISTORY + "<|im_start|>user\nAnd\nthen?<|im_end|>\n<|im_start|>assistant\n"
LAST = "<think>\n\n</think>\n\nI ran.<|im_end|>"


def test_where_history_is_written_differently_it_is_part_of_the_last_prompt(tokenizer: Tokenizer) -> None:
    style = TemplateStyle(THOUGHTFUL)
    one, two = style.encode_many(tokenizer, [Conversation(FIRST), TALK])
    assert one[0].answer == tokenizer.encode_marked("<think>\n\n</think>\n\nA fox.<|im_end|>", bos=False)
    last = EncodedTurn(tokenizer.encode_marked(ASKED, bos=False), tokenizer.encode_marked(LAST, bos=False))
    assert two == [EncodedTurn([], []), last]


def test_a_chat_goes_on_where_history_is_written_differently(tokenizer: Tokenizer) -> None:
    ids = TemplateStyle(THOUGHTFUL).encode_prompt(tokenizer, TALK.prompt)
    assert ids == tokenizer.encode_marked(ASKED, bos=False)


@pytest.mark.parametrize("only_last_answer", [False, True])
def test_only_the_last_answer_is_labelled_where_history_is_written_differently(
    tokenizer: Tokenizer, only_last_answer: bool
) -> None:
    whole = Encoding(max_length=4096, only_last_answer=only_last_answer, split_rewritten=False)
    encoder = Encoder(tokenizer, TemplateStyle(THOUGHTFUL), whole)
    (found,) = encoder.encode([example(TALK)])
    tokens, trained = found.sample.tokens, found.sample.trained
    assert tokens[trained].tolist() == tokenizer.encode_marked(LAST, bos=False)
    counts = encoder.counts
    assert (counts.turns, counts.ended, counts.untaught) == (1, 1, 0 if only_last_answer else 1)


def trained_text(tokenizer: Tokenizer, style: Style, said: Conversation, **limits: Any) -> tuple[str, Encoder]:
    encoder = Encoder(tokenizer, style, Encoding(**{"max_length": 4096, "split_rewritten": False} | limits))
    (found,) = encoder.encode([example(said)])
    return tokenizer.decode(found.sample.tokens[found.sample.trained].tolist()), encoder


def test_a_long_last_answer_costs_no_history(tokenizer: Tokenizer) -> None:
    _, encoder = trained_text(tokenizer, TemplateStyle(THOUGHTFUL), TALK, max_length_answer=12)
    assert (encoder.counts.cut_turns, encoder.counts.cut_answers) == (0, 1)


def test_an_empty_first_prompt_is_not_taken_for_history(tokenizer: Tokenizer) -> None:
    said = Conversation.of(("", "A fox is an animal of the wood"), ("And then, what did he do?", "I ran."))
    text, encoder = trained_text(tokenizer, STYLES["text"], said, max_length_prompt=6)
    assert "is an animal" in text
    assert encoder.counts.cut_turns == 0


def test_an_answer_of_weight_zero_is_not_labelled_as_history_either(tokenizer: Tokenizer) -> None:
    silent = Conversation((FIRST[0], FIRST[1]._replace(weight=0.0), *SECOND))
    for given, expected in ((TALK, True), (silent, False)):
        text, encoder = trained_text(tokenizer, TemplateStyle(THOUGHTFUL), given, mask_prompt=False)
        assert ("A fox." in text) is expected
        assert text.endswith("I ran.")
        assert encoder.counts.untaught == 0


@pytest.mark.parametrize("of_prompt", [False, True], ids=["the whole", "the prompt"])
def test_a_conversation_that_is_too_long_loses_its_first_turn_where_history_is_written_differently(
    tokenizer: Tokenizer, of_prompt: bool
) -> None:
    style = TemplateStyle(THOUGHTFUL)
    (((prompt, answer, _),),) = style.encode_many(tokenizer, [Conversation(SECOND)])
    limits = Encoding(
        max_length=4096 if of_prompt else len(prompt + answer), max_length_prompt=len(prompt), split_rewritten=False
    )
    encoder = Encoder(tokenizer, style, limits if of_prompt else replace(limits, max_length_prompt=None))
    (found,) = encoder.encode([example(TALK)])
    assert found.sample.tokens.tolist() == prompt + answer
    assert (encoder.counts.cut_turns, encoder.counts.cut_prompts) == (1, 0)


# Templates that cannot be trained on.


def test_answers_before_which_a_template_rewrites_the_past_are_labelled_as_asked_or_counted(
    tokenizer: Tokenizer,
) -> None:
    template = "{{ messages | length }} messages so far:{% for m in messages %}|{{ m.content }}{% endfor %}"
    for as_asked, number in ((False, 2), (True, 1)):
        encoder = Encoder(tokenizer, TemplateStyle(template), Encoding(max_length=4096, split_rewritten=as_asked))
        (found,) = encoder.encode([example(Conversation(FIRST))])
        assert tokenizer.decode(found.sample.tokens.tolist()) == f"{number} messages so far:|Hi, who are you?|A fox."
        assert tokenizer.decode(found.sample.tokens[found.sample.trained].tolist()) == "|A fox."
        assert encoder.counts.rewritten == number - 1
    asked = TemplateStyle(template).encode_prompt(tokenizer, Conversation(FIRST[:1]))
    assert tokenizer.decode(asked) == "1 messages so far:|Hi, who are you?"


@pytest.mark.parametrize("talk", [TALK, Conversation(FIRST)], ids=["two turns", "one"])
def test_a_template_that_writes_all_of_the_past_differently_before_an_answer_is_refused(
    tokenizer: Tokenizer, talk: Conversation
) -> None:
    template = (
        "{% for m in messages %}{{ messages | length }}{{ m.content | replace('i', messages | length) }}{% endfor %}"
    )
    with pytest.raises(CheckpointError, match=r"writes what comes before message \d differently once"):
        TemplateStyle(template).encode_many(tokenizer, [talk])


PREFILLED = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>Well, {% endif %}"
)


def test_answers_that_begin_otherwise_than_they_are_asked_for_are_labelled_as_they_are_and_counted(
    tokenizer: Tokenizer,
) -> None:
    encoder = Encoder(tokenizer, TemplateStyle(PREFILLED), Encoding(max_length=4096))
    (found,) = encoder.encode([example(TALK)])
    whole = "<|user|>Hi, who are you?<|assistant|>A fox.</s><|user|>And\nthen?<|assistant|>I ran.</s>"
    assert found.sample.tokens.tolist() == tokenizer.encode_marked(whole, bos=False)
    assert tokenizer.decode(found.sample.tokens[found.sample.trained].tolist()) == "A fox.I ran."
    assert encoder.counts.begun == 2
    asked = TemplateStyle(PREFILLED).encode_prompt(tokenizer, TALK.prompt)
    assert asked == tokenizer.encode_marked(f"{whole.removesuffix('I ran.</s>')}Well, ", bos=False)


def test_a_template_that_refuses_one_message_alone_is_refused_for_two_turns_too(tokenizer: Tokenizer) -> None:
    picky = TEMPLATES["chatml"] + "{% if messages | length == 1 %}{{ raise_exception('too few') }}{% endif %}"
    with pytest.raises(CheckpointError, match="too few"):
        TemplateStyle(picky).encode_many(tokenizer, [TALK])


@pytest.mark.parametrize("template", ["", "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"])
def test_a_template_that_leaves_answers_out_is_refused(tokenizer: Tokenizer, template: str) -> None:
    with pytest.raises(CheckpointError, match="it leaves out the answer of turn 1"):
        TemplateStyle(template).encode_many(tokenizer, [TALK])


SYSTEMLESS = TEMPLATES["chatml"] + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"


def test_samples_that_a_template_refuses_are_named_or_skipped(tokenizer: Tokenizer) -> None:
    opening = (Message("system", "Be."),)
    said = [Example(opening * (i % 5 == 0) + TALK.messages, location=f"a:{i}") for i in range(60)]
    encoder = Encoder(tokenizer, TemplateStyle(SYSTEMLESS), Encoding(max_length=4096))
    with pytest.raises(DataError) as caught:
        list(encoder.encode(said))
    lines = str(caught.value).splitlines()
    assert lines[0] == "a:0: the chat template fails: TemplateError: no system"
    assert [line.split(":")[1] for line in lines[:10]] == [str(i) for i in range(0, 50, 5)]
    assert lines[10].strip() == "... and 2 more"
    assert "--data.on_error skip" in lines[11]
    encoder = Encoder(tokenizer, TemplateStyle(SYSTEMLESS), Encoding(max_length=4096, on_error="skip"))
    assert len(list(encoder.encode(said))) == 48
    assert (encoder.counts.examples, encoder.counts.skipped) == (48, 12)


def test_a_template_that_refuses_everything_is_not_the_fault_of_the_data(tokenizer: Tokenizer) -> None:
    said = [Example((Message("system", "Be."), *TALK.messages), location=f"a:{i}") for i in range(3)]
    encoder = Encoder(tokenizer, TemplateStyle(SYSTEMLESS), Encoding(max_length=4096, on_error="skip"))
    with pytest.raises(CheckpointError, match="The chat template fails: TemplateError: no system"):
        list(encoder.encode(said))


def test_a_template_is_rendered_by_one_process_that_is_replaced_when_it_has_ended(tokenizer: Tokenizer) -> None:
    style = TemplateStyle(TEMPLATES["chatml"])
    first = style.encode_many(tokenizer, [TALK])
    process = style._renderer[0]._process
    assert process
    assert style.encode_many(tokenizer, [TALK]) == first
    assert style._renderer[0]._process is process
    process.kill()
    process.wait()
    assert style.encode_many(tokenizer, [TALK]) == first


def test_a_template_that_ends_answers_with_nothing_gets_an_end(tokenizer: Tokenizer) -> None:
    style = TemplateStyle(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    (turns,) = style.encode_many(tokenizer, [TALK])
    assert [turn.answer[-1] for turn in turns] == [tokenizer.eos_id] * 2


def test_many_long_conversations_are_rendered_in_portions(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = TemplateStyle(TEMPLATES["chatml"])
    said = [
        Conversation((*Conversation.of(("x" * size, "y")).messages, *TALK.messages))
        for size in (1, 9000, 2, 3, 5000, 5000)
    ]
    at_once = style.write(tokenizer, said)
    asked = []
    render_turns = Renderer.render_turns

    def counting(self: Renderer, conversations: list, *rest: Any) -> list:
        asked.append(len(conversations))
        return render_turns(self, conversations, *rest)

    monkeypatch.setattr(Renderer, "render_turns", counting)
    monkeypatch.setattr("lit_qlora.prompts.style.RENDERED_AT_ONCE", 30_000)
    assert style.write(tokenizer, said) == at_once
    assert asked == [1, 1, 3, 1]  # what is too much alone goes alone
    assert style.write(tokenizer, []) == []


# The file that travels with adapters and merged models.


@pytest.mark.parametrize("name", [*STYLES, "knobs", "template"])
def test_the_style_is_remembered_beside_the_weights(tmp_path: Path, name: str) -> None:
    style: Style = TemplateStyle(TEMPLATES["chatml"]) if name == "template" else find_style(name)
    if name == "knobs":
        style = knobs_style(PromptKnobs(text_prompt_start="Q "))
    assert read_style(tmp_path) is None
    (tmp_path / FILE_NAME).write_text(style_json(style))
    assert read_style(tmp_path) == style
    facts = json.loads((tmp_path / FILE_NAME).read_text())
    assert facts["sha256"] == style.digest
    assert facts["text"] == style.text


@pytest.mark.parametrize("roles", [[], ["system"], ["user", "user"], ["assistant", "user"], ["user", "tool"]])
def test_messages_that_do_not_take_turns_are_refused(tokenizer: Tokenizer, roles: list[str]) -> None:
    with pytest.raises(UsageError, match="has no words for messages of"):
        STYLES["qa"].as_text(tokenizer, [{"role": role, "content": "x"} for role in roles])


def test_every_style_has_a_text_of_its_own() -> None:
    assert len({style.digest for style in STYLES.values()}) == len(STYLES)


def test_the_short_form_of_the_file_is_read_too(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text('{"style": "qa"}')
    assert read_style(tmp_path) is STYLES["qa"]


def test_a_style_that_has_changed_since_the_training_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(json.dumps(STYLES["qa"].facts() | {"sha256": "0" * 64}))
    with pytest.raises(CheckpointError, match=r"'qa' that this was trained with differs from today's"):
        read_style(tmp_path)


def test_a_chat_template_is_the_style_of_a_checkpoint_that_names_none(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATES["chatml"]}))
    assert read_style(tmp_path) == TemplateStyle(TEMPLATES["chatml"])
    assert find_style("template", directory=tmp_path) == TemplateStyle(TEMPLATES["chatml"])
    (tmp_path / FILE_NAME).write_text('{"style": "alpaca"}')
    assert read_style(tmp_path) is STYLES["alpaca"]


def test_a_wish_for_a_chat_template_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no chat template"):
        find_style("template", directory=tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "5", "null", "{}", '{"style": "nope"}', '{"style": ["qa"]}'),
        '{"style": "knobs", "knobs": {"text_prompt_start": 5}}',
    ],
)
def test_a_damaged_style_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=FILE_NAME):
        read_style(tmp_path)
