"""Tools, calls and thoughts: ids and masks are those that transformers makes of a template with the same structure.

The templates have the structure of those that are published with these models, in words of their own, and the
{% generation %} marks by which transformers tells what an assistant says.
"""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lit_qlora.data import Encoder, Encoding, Example
from lit_qlora.data.messages import conversation_of
from lit_qlora.errors import CheckpointError, DataError, UsageError
from lit_qlora.prompts.conversation import Conversation
from lit_qlora.prompts.style import STYLES, TemplateStyle, UnwritableError
from lit_qlora.prompts.tokenizer import Tokenizer

CONTROLS = [
    *(
        "<s>",
        "</s>",
        "<|im_start|>",
        "<|im_end|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "<|eom_id|>",
    ),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "[INST]",
        "[/INST]",
        "[TOOL_CALLS]",
        "[AVAILABLE_TOOLS]",
        "[/AVAILABLE_TOOLS]",
    ),
    *(
        "[TOOL_RESULTS]",
        "[/TOOL_RESULTS]",
        "<|start|>",
        "<|end|>",
        "<|message|>",
        "<|channel|>",
        "<|call|>",
        "<|return|>",
    ),
    *("<|user|>", "<|assistant|>", "<|system|>", "<|observation|>", "<|User|>", "<|Assistant|>", "<|tool_calls|>"),
]
TEMPLATES = {path.stem: path.read_text() for path in sorted(Path(__file__).with_name("templates").glob("*.jinja"))}
QWEN25, QWEN3, GEMMA3 = TEMPLATES["qwen2.5"], TEMPLATES["qwen3"], TEMPLATES["gemma3"]
THOUGHT_KEYS = {"qwen3": "reasoning_content", "glm4.5": "reasoning_content", "harmony": "thinking"}
WITHOUT_TOOLS = ("gemma3", "r1")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Émile's weather <|im_end|>",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
        },
    }
]
CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}},
}
HELLO = [{"role": "user", "content": "Hi, who are you?"}, {"role": "assistant", "content": "A fox."}]
MORE = [{"role": "user", "content": "And\nthen?"}, {"role": "assistant", "content": "I ran."}]
ERRAND = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "get_weather", "tool_call_id": "abcdefghi", "content": '{"sky": "wet"}'},
    {"role": "assistant", "content": "It rains."},
]
THOUGHTS = ["I am asked.", "It goes on."]
KIND = [{"role": "system", "content": "Be kind."}]


def thoughtful(messages: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """The messages with thoughts of the assistant under `key`."""
    thoughts = iter(THOUGHTS)
    return [{**message, key: next(thoughts)} if message["role"] == "assistant" else message for message in messages]


def cases() -> list[Any]:
    """(template, messages, tools) of all that a template has words for."""
    found = []
    for name in TEMPLATES:
        talks = {"one": HELLO, "two": HELLO + MORE, "told": KIND + HELLO + MORE}
        if name not in WITHOUT_TOOLS:
            talks |= {
                "call": ERRAND[:2],
                "errand": ERRAND,
                "errands": HELLO + ERRAND + MORE,
                "told errand": KIND + ERRAND,
            }
        if name == "mistral":  # see the test of its system message
            talks = {kind: messages for kind, messages in talks.items() if "told" not in kind}
        if key := THOUGHT_KEYS.get(name):
            talks |= {
                "thought": thoughtful(HELLO, key),
                "thoughts": thoughtful(HELLO + MORE, key),
                "thoughtful errand": thoughtful(ERRAND, key),
            }
        found += [
            pytest.param(
                name,
                messages,
                None if name in WITHOUT_TOOLS or kind in ("one", "two", "told") else TOOLS,
                id=f"{name} {kind}",
            )
            for kind, messages in talks.items()
        ]
        if name not in WITHOUT_TOOLS:
            found.append(pytest.param(name, HELLO + MORE, TOOLS, id=f"{name} unused tools"))
    return found


def unmarked(template: str) -> str:
    """The template without {% generation %}, as most are published."""
    return re.sub(r"(?<=[-%] )(end)?generation(?= )", lambda tag: "endif" if tag[1] else "if true", template)


@cache
def style_of(template: str) -> TemplateStyle:
    """The style of a template, whose process is started once."""
    return TemplateStyle(template)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer with the control tokens of all these templates."""
    from tokenizers import AddedToken, decoders, models, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    directory = tmp_path_factory.mktemp("tools")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in CONTROLS])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return directory


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def theirs(directory: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def said_of(messages: list[dict[str, Any]], tools: list[Any] | None) -> Conversation:
    return conversation_of(messages, {"tools": tools} if tools else {})


def reference(theirs: Any, template: str, messages: list[Any], tools: Any, **more: Any) -> tuple[list[int], list[int]]:
    """Ids and mask of transformers; a control token in a tool's description is text here, so it is one there, too."""
    plain = json.loads(json.dumps([messages, tools]).replace("<|im_end|>", "<|im\ue000_end|>"))
    theirs.chat_template = template
    found = theirs.apply_chat_template(
        plain[0], tools=plain[1], return_dict=True, return_assistant_tokens_mask="generation %}" in template, **more
    )
    ids = found["input_ids"]
    mask = found.get("assistant_masks", [0] * len(ids))
    hidden = theirs.encode("\ue000", add_special_tokens=False)
    kept = [i for i in range(len(ids)) if not any(ids[i - k : i - k + 3] == hidden for k in range(3) if i >= k)]
    return [ids[i] for i in kept], [mask[i] for i in kept]


def encoded(
    tokenizer: Tokenizer, template: str, said: Conversation, room: int = 9999
) -> tuple[list[int], list[int], Encoder]:
    """Ids, mask and what has encoded them, of the conversation as a whole."""
    encoder = Encoder(tokenizer, style_of(template), Encoding(max_length=room, split_rewritten=False))
    (found,) = encoder.encode([Example(said.messages, said.input, said.variables, "a:1")])
    return found.sample.tokens.tolist(), found.sample.trained.astype(int).tolist(), encoder


@pytest.mark.parametrize(("name", "messages", "tools"), cases())
def test_ids_and_masks_are_those_of_transformers(
    tokenizer: Tokenizer, theirs: Any, name: str, messages: list[Any], tools: Any
) -> None:
    ids, mask = reference(theirs, TEMPLATES[name], messages, tools)
    ours, trained, encoder = encoded(tokenizer, TEMPLATES[name], said_of(messages, tools))
    assert ours == ids[: len(ours)]
    assert trained == mask[: len(ours)]
    assert not any(mask[len(ours) :])  # what is left out is what nobody learns
    assert not encoder.unread.red()


@pytest.mark.parametrize(("name", "messages", "tools"), cases())
def test_without_marks_ids_are_the_same_and_labelled_tokens_are_among_them(
    tokenizer: Tokenizer, theirs: Any, name: str, messages: list[Any], tools: Any
) -> None:
    ids, mask = reference(theirs, TEMPLATES[name], messages, tools)
    ours, trained, encoder = encoded(tokenizer, unmarked(TEMPLATES[name]), said_of(messages, tools))
    if name == "glm4.5":  # nothing ends its last answer, so EOS does
        assert (ours.pop(), trained.pop()) == (tokenizer.eos_id, 1)
    assert ours == ids[: len(ours)]
    assert tokenizer.decode(ids[len(ours) :]).strip() == ""
    if encoder.counts.untaught:
        last = max(i for i in range(len(mask)) if not mask[i] and any(mask[i:]))
        assert trained[last + 1 :] == mask[last + 1 : len(ours)]
        assert all(theirs_too or not labelled for labelled, theirs_too in zip(trained, mask, strict=False))
    else:
        assert trained == mask[: len(ours)]
    rewriting = {"qwen3", "harmony", "glm4.5"}
    assert not encoder.counts.untaught or name in rewriting


@pytest.mark.parametrize(("name", "messages", "tools"), cases())
@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
def test_each_answer_is_labelled_once_behind_the_prompt_that_transformers_asks_it_with(
    tokenizer: Tokenizer, theirs: Any, name: str, messages: list[Any], tools: Any, marks: bool
) -> None:
    template = TEMPLATES[name] if marks else unmarked(TEMPLATES[name])
    encoder = Encoder(tokenizer, style_of(template), Encoding(max_length=9999))
    said = said_of(messages, tools)
    found = [one.sample for one in encoder.encode([Example(said.messages, said.input, said.variables, "a:1")])]
    labelled = []
    for sample in found:
        if name == "glm4.5" and not marks:  # nothing ends the last answer, so EOS does
            sample.trained[-1] = False
        edges = np.flatnonzero(np.diff(sample.trained.astype(int), append=0))
        for before, end in zip(edges[::2], edges[1::2], strict=True):
            labelled.append((sample.tokens[: before + 1].tolist(), sample.tokens[before + 1 : end + 1].tolist()))
    expected = []
    for k in (k for k, message in enumerate(messages) if message["role"] == "assistant"):
        asked, _ = reference(theirs, template, messages[:k], tools, add_generation_prompt=True)
        whole, mask = reference(theirs, TEMPLATES[name], messages[: k + 1], tools)
        end = max(i for i in range(len(mask)) if mask[i]) + 1
        if name == "r1":  # it leaves out the thought that it has begun
            thought = theirs.encode("\n</think>\n\n", add_special_tokens=False)
            expected.append((asked, thought + whole[len(asked) - len(theirs.encode("<think>\n")) : end]))
        else:  # a template may write the past differently once the answer is there, so its beginning tells where it is
            expected.append((asked, whole[max(i for i in range(end) if not mask[i]) + 1 : end]))
    assert sorted(labelled) == sorted(expected)
    assert encoder.counts.split == len(found) - 1
    assert encoder.counts.untaught == encoder.counts.begun == 0


def test_an_answer_goes_on_the_thought_that_its_prompt_begins(tokenizer: Tokenizer) -> None:
    said = [HELLO[0], {**HELLO[1], "reasoning_content": "I am asked."}, MORE[0]]
    for last, thought in (({"content": "<think>\nIt goes on.\n</think>\n\nI ran."}, "It goes on."), (MORE[1], "")):
        talk = said_of([*said, {"role": "assistant", "content": "", **last}], None)
        for template in (TEMPLATES["r1"], unmarked(TEMPLATES["r1"])):
            encoder = Encoder(tokenizer, style_of(template), Encoding(max_length=9999))
            texts = []
            for found in encoder.encode([Example(talk.messages, location="a:1")]):
                sample = found.sample
                texts.append(tokenizer.decode(sample.tokens[sample.trained].tolist()))
                asked = tokenizer.decode(sample.tokens[~sample.trained].tolist())
                assert asked.endswith("<think>\n")
            assert texts == ["I am asked.\n</think>\n\nA fox.", f"{thought}\n</think>\n\nI ran."]
            assert "I am asked" not in asked
            counts = encoder.counts
            assert (counts.begun, counts.split, counts.unthought, counts.thoughts) == (0, 1, int(not thought), 0)
            assert not encoder.unread.red()


def test_an_answer_stands_behind_the_empty_thought_that_it_is_asked_with(tokenizer: Tokenizer) -> None:
    """Gemma 4 is asked so, and its template leaves the empty thought out of what was said."""
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<|channel>thought\n<channel|>{% endif %}"
    )
    talk = said_of(HELLO + MORE, None)
    encoder = Encoder(tokenizer, style_of(template), Encoding(max_length=9999))
    samples = [found.sample for found in encoder.encode([Example(talk.messages, location="a:1")])]
    assert [tokenizer.decode(one.tokens[one.trained].tolist()) for one in samples] == ["A fox.", "I ran."]
    asked = [tokenizer.decode(one.tokens[~one.trained].tolist()) for one in samples]
    assert all(prompt.endswith("assistant\n<|channel>thought\n<channel|>") for prompt in asked)
    assert (encoder.counts.begun, encoder.counts.split) == (0, 1)


@pytest.mark.parametrize(("name", "messages", "tools"), cases())
@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
def test_a_prompt_is_what_transformers_asks_with(
    tokenizer: Tokenizer, theirs: Any, name: str, messages: list[Any], tools: Any, marks: bool
) -> None:
    template = TEMPLATES[name] if marks else unmarked(TEMPLATES[name])
    expected, _ = reference(theirs, template, messages[:-1], tools, add_generation_prompt=True)
    assert style_of(template).encode_prompt(tokenizer, said_of(messages, tools).prompt) == expected


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
def test_a_template_that_writes_the_system_message_into_the_last_prompt_only_is_refused_with_one(
    tokenizer: Tokenizer, theirs: Any, marks: bool
) -> None:
    style = style_of(TEMPLATES["mistral"] if marks else unmarked(TEMPLATES["mistral"]))
    said = said_of(KIND + HELLO + MORE, None)
    with pytest.raises(UnwritableError, match="it leaves out the system message"):
        style.encode_many(tokenizer, [said])
    expected, _ = reference(theirs, TEMPLATES["mistral"], KIND + HELLO + MORE[:1], None, add_generation_prompt=True)
    assert style.encode_prompt(tokenizer, said.prompt) == expected


def test_answers_end_with_what_ends_words_and_with_what_ends_calls(tokenizer: Tokenizer) -> None:
    ends = {"harmony": {"<|return|>", "<|call|>"}, "qwen2.5": {"<|im_end|>"}, "llama3.1": {"<|eot_id|>"}}
    for name, expected in ends.items():
        found = style_of(TEMPLATES[name]).stop_ids(tokenizer)
        assert found - {tokenizer.eos_id} == {tokenizer.control_tokens[end] for end in expected}


def test_a_thought_goes_under_the_key_that_the_template_reads(tokenizer: Tokenizer) -> None:
    for name, key in THOUGHT_KEYS.items():
        expected = encoded(tokenizer, TEMPLATES[name], said_of(thoughtful(HELLO, key), None))[0]
        for other in ("reasoning_content", "reasoning", "thinking"):
            assert encoded(tokenizer, TEMPLATES[name], said_of(thoughtful(HELLO, other), None))[0] == expected


def test_arguments_in_a_json_text_are_objects_unless_the_template_takes_texts(tokenizer: Tokenizer) -> None:
    function = {"name": "get_weather", "arguments": json.dumps(CALL["function"]["arguments"])}
    as_text = [*ERRAND[:1], {**ERRAND[1], "tool_calls": [{**CALL, "function": function}]}]
    expected = encoded(tokenizer, QWEN25, said_of(ERRAND[:2], TOOLS))[0]
    assert encoded(tokenizer, QWEN25, said_of(as_text, TOOLS))[0] == expected
    takes = "{% if call.arguments is string %}{{ call.arguments }}{% else %}{{ call.arguments | tojson }}{% endif %}"
    template = QWEN25.replace("{{ call.arguments | tojson }}", takes)
    assert tokenizer.decode(encoded(tokenizer, template, said_of(as_text, TOOLS))[0]).count('"city"') == 2


@pytest.mark.parametrize("marks", [True, False], ids=["marked", "unmarked"])
def test_labelled_thoughts_that_a_template_leaves_out_are_counted(tokenizer: Tokenizer, marks: bool) -> None:
    said = said_of(thoughtful(HELLO + MORE, "reasoning_content"), None)
    ids, trained, encoder = encoded(tokenizer, QWEN3 if marks else unmarked(QWEN3), said)
    labelled = tokenizer.decode([token for token, is_labelled in zip(ids, trained, strict=True) if is_labelled])
    last = "<think>\nIt goes on.\n</think>\n\nI ran."
    assert labelled == (f"A fox.{last}" if marks else last)
    assert (encoder.counts.thoughts, encoder.counts.untaught) == ((1, 0) if marks else (0, 1))


def test_answers_that_a_template_marks_in_part_are_labelled_in_that_part(tokenizer: Tokenizer) -> None:
    marked = "Hm. {% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    template = (
        f"{{% for m in messages %}}{{{{ m.role }}}}: {{% if m.role == 'assistant' %}}{marked}"
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
    )
    ids, trained, _ = encoded(tokenizer, template, said_of(HELLO + MORE, None))
    assert (
        tokenizer.decode([token for token, is_labelled in zip(ids, trained, strict=True) if is_labelled])
        == "A fox.I ran."
    )
    twice = template.replace("{{ eos_token }}{% endg", "{% endgeneration %}{% generation %}{{ eos_token }}{% endg")
    with pytest.raises(CheckpointError, match="it marks 2 texts as generated, and the conversation has 1 answers"):
        encoded(tokenizer, twice, said_of(HELLO + MORE, None))


def test_arguments_are_json_texts_where_the_template_writes_texts_well_and_objects_not(tokenizer: Tokenizer) -> None:
    expected = tokenizer.decode(encoded(tokenizer, QWEN25, said_of(ERRAND[:2], TOOLS))[0])
    template = QWEN25.replace("{{ call.arguments | tojson }}", "{{ call.arguments }}")
    assert tokenizer.decode(encoded(tokenizer, template, said_of(ERRAND[:2], TOOLS))[0]) == expected


def test_what_changes_no_text_is_not_read_however_often_the_template_names_it(tokenizer: Tokenizer) -> None:
    template = (
        "{# tools #}{% set a = tools %}{% for m in messages %}{{ m.content }}"
        "{% if m.tool_call_id == 'tools' %}{% endif %}"
        "{% if enable_thinking is defined and enable_thinking is false %}!{% endif %}{{ eos_token }}{% endfor %}"
    )
    style = TemplateStyle(template)
    answered = HELLO[1] | {"tool_calls": [CALL], "reasoning_content": "a", "tool_call_id": "b"}
    said = conversation_of([HELLO[0], answered], {"tools": TOOLS, "chat_template_kwargs": {"enable_thinking": True}})
    assert style.unread(said).keys() == {"tools", "tool_calls", "reasoning_content", "tool_call_id"}
    for name in TEMPLATES.keys() - WITHOUT_TOOLS:
        assert style_of(TEMPLATES[name]).unread(said_of(ERRAND, TOOLS)).keys() <= {"name", "tool_call_id"}


def test_what_cannot_be_written_is_answered_with_styles_that_can_write_it(tokenizer: Tokenizer) -> None:
    refusing = TemplateStyle("{{ raise_exception('no') }}")
    with pytest.raises(UnwritableError, match=r"Take --data.prompt chatml or llama3 or mistral\.$"):
        refusing.encode_many(tokenizer, [said_of(KIND + HELLO, None)])
    for told in (HELLO, ERRAND):
        with pytest.raises(
            UnwritableError, match=r"Take --data\.prompt template with a checkpoint whose chat template"
        ):
            refusing.encode_many(tokenizer, [said_of(told, TOOLS)])


@pytest.mark.parametrize("weights", [(1, 1), (0, 1), (1, 0), (0, 0)])
def test_only_answers_that_weigh_something_get_samples_of_their_own(tokenizer: Tokenizer, weights: Any) -> None:
    spoken = [message | {"weight": weights[i // 2]} for i, message in enumerate(thoughtful(HELLO + MORE, "thinking"))]
    spoken = [{k: m[k] for k in m if k != "weight" or m["role"] == "assistant"} for m in spoken]
    encoder = Encoder(tokenizer, style_of(QWEN3), Encoding(max_length=999))
    found = [one.sample for one in encoder.encode([Example(said_of(spoken, None).messages)])]
    assert len(found) == sum(weights)
    assert (encoder.counts.examples, encoder.counts.turns, encoder.counts.split) == (1, sum(weights), weights == (1, 1))
    assert encoder.counts.masked == (not any(weights))


def test_weights_of_answers_weigh_their_tokens(tokenizer: Tokenizer) -> None:
    spoken = [HELLO[0], {**HELLO[1], "weight": 0.25}, MORE[0], {**MORE[1], "train": True}]
    encoder = Encoder(tokenizer, style_of(QWEN25), Encoding(max_length=999))
    (found,) = encoder.encode([Example(said_of(spoken, None).messages)])
    sample = found.sample
    assert sample.weights is not None
    parts = [tokenizer.decode(sample.tokens[sample.weights == weight].tolist()) for weight in (0.25, 1.0)]
    assert parts == ["A fox.", "I ran."]
    assert (sample.weights > 0).tolist() == sample.trained.tolist()
    assert encoder.counts.light == 1


def test_a_style_without_words_for_tools_refuses_them_by_name(tokenizer: Tokenizer) -> None:
    said = said_of(ERRAND, TOOLS)
    with pytest.raises(
        UnwritableError, match="The prompt style chatml has no words for a message of tool at this point"
    ):
        STYLES["chatml"].encode_many(tokenizer, [said])
    asked = said_of(HELLO, TOOLS).prompt
    with pytest.raises(UsageError, match="The prompt style chatml does not write tools"):
        STYLES["chatml"].encode_prompt(tokenizer, asked)
    with pytest.raises(UsageError, match="The prompt style template does not write tools"):
        style_of(GEMMA3).encode_prompt(tokenizer, asked)
    encoder = Encoder(tokenizer, STYLES["chatml"], Encoding(max_length=999))
    with pytest.raises(DataError, match=r"a:1: the prompt style chatml has no words for a message of tool"):
        list(
            encoder.encode(
                [Example(said.messages, location="a:1"), Example(said_of(HELLO, None).messages, location="a:2")]
            )
        )


def test_a_template_that_leaves_out_the_calls_is_refused(tokenizer: Tokenizer) -> None:
    template = QWEN25.replace('"{{ call.name }}"', "").replace("{{ call.arguments | tojson }}", "")
    with pytest.raises(CheckpointError, match="it leaves out the tool calls of turn 1"):
        encoded(tokenizer, template, said_of(ERRAND, TOOLS))


def test_a_developer_is_one_where_the_template_knows_that_role_and_else_the_system(tokenizer: Tokenizer) -> None:
    told = [{"role": "developer", "content": "Be kind."}]
    for name in ("qwen2.5", "gemma3"):
        expected = encoded(tokenizer, TEMPLATES[name], said_of(KIND + HELLO, None))[0]
        assert encoded(tokenizer, TEMPLATES[name], said_of(told + HELLO, None))[0] == expected
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% if m.role != 'developer' %}{{ eos_token }}{% endif %}"
        "{% endfor %}"
    )
    assert tokenizer.decode(encoded(tokenizer, template, said_of(told + HELLO, None))[0]).startswith(
        "developer:Be kind."
    )


@pytest.mark.parametrize(
    ("role", "more"),
    [
        ("tool", ""),
        ("tool", "{% for call in m.tool_calls or [] %}{{ call.function.name }}{% endfor %}"),
        (
            "tool",
            "{% for call in m['tool_calls'] %}{% if call['type'] == 'function' %}{{ call }}{% endif %}{% endfor %}",
        ),
        ("tool", "{# m.role == 'ipython' #}{% if m['role'] == 'ipython' %}{% endif %}"),
        (
            "ipython",
            "{% for tool in tools or [] %}{{ tool.name }}{% endfor %}{% if m['role'] == 'ipython' %}!{% endif %}",
        ),
        ("observation", '{% if tools is defined and m.role in ("user", "observation") %}!{% endif %}'),
        ("function", "{% if m.role not in ['user', 'assistant', 'function'] %}{{ raise_exception('no') }}{% endif %}"),
    ],
)
def test_a_result_has_the_role_that_the_template_writes_as_no_other_and_else_tool(
    tokenizer: Tokenizer, role: str, more: str
) -> None:
    template = f"{{% for m in messages %}}{{{{ m.role }}}}:{{{{ m.content }}}}{more}{{{{ eos_token }}}}{{% endfor %}}"
    messages = [*HELLO, {"role": "tool", "content": "wet"}, MORE[1]]
    assert f"{role}:wet" in tokenizer.decode(encoded(tokenizer, template, said_of(messages, None))[0])


def test_conversations_with_tools_are_cut_between_exchanges(tokenizer: Tokenizer) -> None:
    said = said_of(KIND + ERRAND + MORE, TOOLS)
    rest = said_of(KIND + MORE, TOOLS)
    room = len(encoded(tokenizer, QWEN25, rest)[0])
    cut, _, encoder = encoded(tokenizer, QWEN25, said, room)
    assert cut == encoded(tokenizer, QWEN25, rest)[0]
    assert encoder.counts.cut_turns == 2
    called = said_of(KIND + ERRAND[:2], TOOLS)
    room = len(encoded(tokenizer, QWEN25, called)[0])
    cut, _, _ = encoded(tokenizer, QWEN25, said_of(KIND + ERRAND, TOOLS), room)  # one exchange loses its end
    assert cut == encoded(tokenizer, QWEN25, called)[0]
