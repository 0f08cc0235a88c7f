"""Chat templates: strangers' programs, kept in their place; and what users typed, kept apart from control tokens."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lit_qlora.errors import CheckpointError
from lit_qlora.prompts import chat_template
from lit_qlora.prompts.chat_template import Guard, find_chat_template, render

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HELLO = [{"role": "user", "content": "Hello"}]


def test_a_conversation_is_rendered_with_and_without_the_beginning_of_an_answer() -> None:
    user = "<|im_start|>user\nHello<|im_end|>\n"
    assert render(CHATML, {}, [(HELLO, False), (HELLO, True)]) == [user, f"{user}<|im_start|>assistant\n"]


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content | trim }}", "<s>Hello"),
        ("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}x{% endfor %}y", "y"),
        ("a{% generation %}{{ messages[0].content }}{% endgeneration %}", "aHello"),
        ("{{ strftime_now('%%') }}", "%"),
        ("{{ messages | tojson }}", json.dumps(HELLO)),
        ("{% if tools is none and not documents %}plain{% endif %}", "plain"),
    ],
)
def test_what_templates_use_is_there(template: str, text: str) -> None:
    assert render(template, {"bos_token": "<s>", "tools": None, "documents": None}, [(HELLO, False)]) == [text]


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError"),
        ("{{ raise_exception('only users may speak') }}", "only users may speak"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ messages[7].content.upper() }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 'a' * 10 ** 10 }}", "MemoryError"),
        ("{{ 'a ' * 3000000 }}", "it writes more than 4,1.* characters"),
        (
            "{% set ns = namespace(x='aaaaaaaa') %}{% for i in range(90) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "memory|Memory",
        ),
    ],
    ids=str,
)
def test_a_template_that_fails_or_attacks_is_refused_with_the_reason(template: str, reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        render(template, {}, [(HELLO, False)])


def test_a_template_that_does_not_come_to_an_end_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    bomb = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(CheckpointError, match="took more than 1 s"):
        render(bomb, {}, [(HELLO, False)])


def test_a_template_sees_nothing_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    for attempt in ("{{ environ }}", "{{ self.__init__.__globals__ }}", "{{ cycler.__init__.__globals__.os.environ }}"):
        try:
            (text,) = render(attempt, {}, [(HELLO, False)])
        except CheckpointError as error:
            text = str(error)
        assert "hunter2" not in text


def test_the_template_is_found_where_tokenizers_keep_it(tmp_path: Path) -> None:
    assert find_chat_template(tmp_path) is None
    config = tmp_path / "tokenizer_config.json"
    config.write_text("{}")
    assert find_chat_template(tmp_path) is None
    config.write_text(json.dumps({"chat_template": "a"}))
    assert find_chat_template(tmp_path) == "a"
    named = [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "c"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert find_chat_template(tmp_path) == "c"
    (tmp_path / "chat_template.jinja").write_text("d\n")
    assert find_chat_template(tmp_path) == "d\n"


def test_a_damaged_tokenizer_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: not valid JSON"):
        find_chat_template(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("chat_template.jinja", b"caf\xe9", "chat_template.jinja:1: byte 0xe9 is not UTF-8"),
        ("tokenizer_config.json", b'{"a": "caf\xe9"}', "tokenizer_config.json:1: byte 0xe9 is not UTF-8"),
        ("tokenizer_config.json", b'{"chat_template": 5}', "chat_template is int, not text"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "default"}]}', "no list of names and templates"),
        ("tokenizer_config.json", b'{"chat_template": ["a"]}', "no list of names and templates"),
    ],
)
def test_a_template_that_is_no_text_is_named(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        find_chat_template(tmp_path)


def test_control_tokens_that_a_user_typed_are_told_from_those_of_the_template() -> None:
    typed = "a <|im_end|> b \ue000"
    guard = Guard(["<|im_start|>", "<|im_end|>"], [typed])
    rendered = f"<|im_start|>{guard.guard(typed)}<|im_end|>"
    assert guard.split(rendered) == [("<|im_start|>", True), (typed, False), ("<|im_end|>", True)]


def test_a_control_token_of_one_character_is_text_because_nobody_could_tell_who_wrote_it() -> None:
    guard = Guard(["x", "<s>"], ["x <s>"])
    assert guard.split(f"<s>{guard.guard('x <s>')}") == [("<s>", True), ("x <s>", False)]


def test_without_control_tokens_everything_is_text() -> None:
    guard = Guard([], ["a"])
    assert guard.split(guard.guard("a </s>")) == [("a </s>", False)]


def test_a_rendering_ends_by_itself_where_whoever_asked_was_killed() -> None:
    forever = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    question = {"seconds": -0.99, "template": forever, "variables": {}, "marks": "\ue000\ue001"}
    question["conversations"] = [([{"role": "user", "content": "x"}], {}, "text")]
    worker = [sys.executable, "-I", str(Path(chat_template.__file__).with_name("template_worker.py"))]
    done = subprocess.run(worker, input=json.dumps(question) + "\n", capture_output=True, text=True)
    assert done.returncode == -signal.SIGALRM, done.stderr
