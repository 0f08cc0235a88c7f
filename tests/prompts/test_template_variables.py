"""Variables of a chat template: the prompt is the one that transformers makes with them, and none is without effect."""

import json
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.data.load import choose_style as style_of_data
from lit_qlora.errors import UsageError
from lit_qlora.inference import choose_style
from lit_qlora.prompts.chat_template import with_defaults
from lit_qlora.prompts.conversation import Conversation, Message
from lit_qlora.prompts.pieces import Nameless
from lit_qlora.prompts.style import FILE_NAME, STYLES, TemplateStyle, read_style, style_json
from lit_qlora.settings import DataConfig

THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: "
    "{% if enable_thinking is defined and enable_thinking is false %}(no thought) {% endif %}{% endif %}"
)
ASKED = Conversation((Message("user", "Hi"),))


def prompt(style: Any, conversation: Conversation = ASKED) -> str:
    return "".join(str(piece) for part in style.write_prompt(Nameless(), conversation) for piece in part)


def rendered(template: str, **variables: Any) -> str:
    """What transformers makes of it."""
    from transformers.utils.chat_template_utils import render_jinja_template

    messages = [{"role": "user", "content": "Hi"}]
    ((text,), _) = render_jinja_template([messages], chat_template=template, add_generation_prompt=True, **variables)
    return str(text)


@pytest.mark.parametrize("before", ["", "\n", "\n\n  ", "  {% if true %} a{% endif %}\n", "{%- set b = 1 %}\n b "])
def test_transformers_makes_the_same_of_the_template_as_with_the_variables(before: str) -> None:
    template = before + THINKING + "{{ effort | default('') }}"
    for variables in ({}, {"enable_thinking": False}, {"enable_thinking": True, "effort": "lo\n'w\""}):
        assert rendered(with_defaults(template, variables)) == rendered(template, **variables)


@pytest.mark.parametrize(
    "value", [None, True, 3, -2.5, "a\n'b'\"{{ c }}{% d %}\\n ☃", [None, [1]], {"a b": {"c": None}}]
)
def test_a_value_arrives_as_it_was_given(value: Any) -> None:
    assert json.loads(rendered(with_defaults("{{ x | tojson }}", {"x": value}))) == value


def test_a_conversation_that_says_a_variable_has_its_own() -> None:
    style = TemplateStyle(THINKING).with_variables({"enable_thinking": False})
    assert prompt(style).endswith("assistant: (no thought) ")
    assert prompt(style, Conversation(ASKED.messages, variables={"enable_thinking": True})).endswith("assistant: ")
    again = style.with_variables({"enable_thinking": True})
    assert prompt(again) == prompt(TemplateStyle(THINKING))


def test_a_style_is_recorded_with_its_variables(tmp_path: Path) -> None:
    style = TemplateStyle(THINKING).with_variables({"enable_thinking": False})
    (tmp_path / FILE_NAME).write_text(style_json(style))
    assert read_style(tmp_path) == style != TemplateStyle(THINKING)


def test_commands_ask_with_the_variables_and_training_trains_with_them(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text(THINKING)
    variables = {"enable_thinking": False}
    expected = TemplateStyle(THINKING).with_variables(variables)
    assert style_of_data(DataConfig(template_variables=variables), tmp_path) == expected
    for name, recorded in (("auto", TemplateStyle(THINKING)), ("template", STYLES["alpaca"])):
        assert choose_style(name, recorded, tmp_path, variables) == expected


def test_a_variable_without_effect_is_refused_by_name() -> None:
    refusals = {
        "enable_thinkin": r"does not use the variable enable_thinkin. Did you mean enable_thinking\?",
        "a b": "does not use the variable a b.",
        "messages": "template variable messages is no setting",
        "tools": "template variable tools is no setting",
    }
    style = TemplateStyle(THINKING)
    for name, message in refusals.items():
        with pytest.raises(UsageError, match=message):
            style.with_variables({name: 1})


def test_styles_without_variables_refuse_them_by_name() -> None:
    with pytest.raises(UsageError, match="alpaca is no chat template and has no enable_thinking"):
        choose_style("alpaca", None, None, {"enable_thinking": False})
    with pytest.raises(UsageError, match="Without a prompt style there is no variable enable_thinking"):
        choose_style("none", None, None, {"enable_thinking": False})


def test_a_variable_that_tells_only_in_some_conversations_is_no_stranger() -> None:
    style = TemplateStyle(
        "{% if tools and first %}x{% endif %}"
        "{% for m in messages if m.role == 'system' and second %}x{% endfor %}"
        "{% for m in messages if m.reasoning_content and third and not loop.last %}x{% endfor %}"
    )
    assert [style.reads(name, False, True) for name in ("first", "second", "third", "fourth")] == [True] * 3 + [False]
