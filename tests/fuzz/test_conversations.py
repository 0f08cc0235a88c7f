"""Any conversation, written with any chat template, becomes tokens or is refused with one message."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_qlora.data.messages import conversation_of
from lit_qlora.prompts import chat_template
from lit_qlora.prompts.style import TemplateStyle
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.conftest import ROOT
from tests.fuzz.property import cases, holds, kept, quick, slow
from tests.fuzz.strategies import spoilt
from tests.fuzz.targets import Target
from tests.fuzz.test_rows import messages, values

KIND = "conversations"
TEMPLATES = [file.read_bytes() for file in sorted((ROOT / "tests/prompts/templates").glob("*.jinja"))]
SNIPPETS = [
    *(b"{{", b"}}", b"{%", b"%}", b"{#", b"{{ m.content }}", b"{{ messages }}", b"{% for i in range(99999) %}"),
    *(b"{% endfor %}", b"{{ 'a' * 99999999 }}", b"{{ raise_exception('x') }}", b"{{ ''.__class__ }}", b"{{ 1/0 }}"),
    *(b"{% generation %}", b"{% endgeneration %}", b"{{ x | tojson }}", b"{{ strftime_now('%Y') }}", b"</s>", b"\x00"),
    *(
        b"{% set x = namespace() %}",
        b"{{ messages[0]['content'] }}",
        b"{{ tools }}",
        b"{{ eos_token }}",
        b"\xf0\x9f\x98\x80",
    ),
    *(
        b"{% if add_generation_prompt %}A:{% endif %}",
        b"{{ lipsum(99999) }}",
        b"{{ '%99999999d' % 1 }}",
        b"{% macro f() %}",
    ),
]


templates = st.sampled_from(TEMPLATES).flatmap(lambda good: st.one_of(st.just(good), spoilt(good, SNIPPETS)))
tools = st.one_of(
    st.none(),
    st.just([{"type": "function", "function": {"name": "f", "parameters": {}}}]),
    st.lists(values, max_size=2),
)
talks = st.one_of(
    messages,
    st.lists(st.tuples(st.text(max_size=20), st.text(max_size=20)), min_size=1, max_size=3).map(
        lambda turns: [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
    ),
)
questions = st.fixed_dictionaries(
    {"template": templates.map(lambda code: code.decode(errors="replace")), "messages": talks, "tools": tools}
)


@pytest.fixture(scope="module")
def writer(targets: Mapping[str, Target]) -> Iterator[Callable[[bytes], bool]]:
    """Writes a conversation as data and as a prompt; True if either was taken."""
    tokenizer = Tokenizer(targets["weights"].folder)
    styles = {code: TemplateStyle(code) for code in (template.decode() for template in TEMPLATES)}

    def write(content: bytes) -> bool:
        question = json.loads(content)
        style = styles.get(question["template"]) or TemplateStyle(question["template"])

        def learn() -> None:
            style.encode_many(tokenizer, [conversation_of(question["messages"], {"tools": question["tools"]})])

        def ask() -> None:
            said = conversation_of(question["messages"], {"tools": question["tools"]}, answered=False)
            style.encode_prompt(tokenizer, said)

        return holds(KIND, content, learn) | holds(KIND, content, ask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chat_template, "SECONDS", 1.0)
        yield write


def as_json(question: Any) -> bytes:
    return json.dumps(question).encode()


def test_a_conversation_becomes_tokens_or_is_refused_in_words(writer: Callable[[bytes], bool]) -> None:
    @quick(5)
    @given(questions)
    def run(question: Any) -> None:
        writer(as_json(question))

    with kept():
        run()


@pytest.mark.slow
@pytest.mark.timeout(0)
def test_thousands_of_conversations_become_tokens_or_are_refused_in_words(writer: Callable[[bytes], bool]) -> None:
    accepted: list[bool] = []

    @slow
    @given(questions)
    def run(question: Any) -> None:
        accepted.append(writer(as_json(question)))

    with kept():
        run()
    print(f"{KIND}: {len(accepted)} tried, {sum(accepted)} accepted")


def test_what_once_broke_a_conversation_no_longer_does(writer: Callable[[bytes], bool]) -> None:
    for case in cases(KIND):
        writer(case.read_bytes())
