"""A prompt style as other programs read it: a chat template in jinja, and one in the language of Go for Ollama.

Both are made from the words of the style, so they say nothing else.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from lit_qlora.prompts.conversation import Conversation
from lit_qlora.prompts.pieces import BOS, Piece, Vocabulary, resolve_control
from lit_qlora.prompts.style import Style, TemplateStyle, WordedStyle

_SYSTEM, _ASKED, _ANSWER = "\x00system\x00", "\x00asked\x00", "\x00answer\x00"
_VARIABLE = re.compile(f"({_SYSTEM}|{_ASKED}|{_ANSWER})")


@dataclass(frozen=True)
class _Part:
    """Literal text, or one of the three variables."""

    text: str
    begins: bool = False
    """It stands directly behind BOS, as the beginning of a text."""

    @property
    def is_variable(self) -> bool:
        """True if a program has to put something in."""
        return bool(_VARIABLE.fullmatch(self.text))


@dataclass(frozen=True)
class _Words:
    """The parts that a style writes in each of five situations."""

    first: list[_Part]
    first_with_system: list[_Part]
    first_with_empty_system: list[_Part]
    later: list[_Part]
    answer: list[_Part]


def chat_template(style: Style, tokenizer: Vocabulary, llama_cpp: bool = False) -> str:
    """A jinja program that writes conversations as `style` does with this tokenizer.

    What begins an answer is part of the question before it, so add_generation_prompt changes nothing.

    Args:
        llama_cpp: for its own tokenizer, which puts a space between BOS and a text by itself.

    Raises:
        UsageError: if the tokenizer lacks a control token of the style.
    """
    if isinstance(style, TemplateStyle):
        return style.source
    words = _words(style, tokenizer)
    names = {_SYSTEM: "system", _ASKED: "message['content']", _ANSWER: "message['content']"}

    def value(part: _Part) -> str:
        name = names[part.text] if part.is_variable else _quoted(part.text)
        if not part.begins or llama_cpp or not tokenizer.opening("a"):
            return name
        if not part.is_variable:
            return _quoted(tokenizer.opening(part.text) + part.text)
        needed = name if tokenizer.opening(" ") else f"{name}[:1] not in ['', ' ', '▁']"
        return f"(' ' if {needed} else '') + {name}"

    def write(parts: Iterable[_Part]) -> str:
        return "".join(f"{{{{- {value(part)} -}}}}" for part in parts)

    return f"""{{%- set system = none -%}}
{{%- if messages[0]['role'] == 'system' -%}}
{{%- set system = messages[0]['content'] -%}}
{{%- set messages = messages[1:] -%}}
{{%- endif -%}}
{{%- for message in messages -%}}
{{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}}
{{{{- raise_exception('The style {style.name} has words for one system message, then user and assistant in turn.') -}}}}
{{%- elif message['role'] == 'assistant' -%}}
{write(words.answer)}
{{%- elif not loop.first -%}}
{write(words.later)}
{{%- elif system is none -%}}
{write(words.first)}
{{%- elif system -%}}
{write(words.first_with_system)}
{{%- else -%}}
{write(words.first_with_empty_system)}
{{%- endif -%}}
{{%- endfor -%}}
"""


def go_template(style: Style, tokenizer: Vocabulary) -> str | None:
    """The same for Ollama, which writes the first BOS itself; None for a style that is a jinja program."""
    if isinstance(style, TemplateStyle):
        return None
    words = _words(style, tokenizer)
    names = {_SYSTEM: "$.System", _ASKED: ".Content", _ANSWER: ".Content"}

    def write(parts: Iterable[_Part]) -> str:
        return "".join(f"{{{{ {names[part.text] if part.is_variable else _quoted(part.text)} }}}}" for part in parts)

    def without_bos(parts: list[_Part]) -> list[_Part]:
        begins = tokenizer.use_bos and bool(parts) and parts[0].text == tokenizer.content(tokenizer.bos_id)
        return parts[1:] if begins else parts

    return f"""{{{{- $first := true }}}}
{{{{- range .Messages }}}}
{{{{- if eq .Role "user" }}}}
{{{{- if not $first }}}}{write(words.later)}
{{{{- else if $.System }}}}{write(without_bos(words.first_with_system))}
{{{{- else }}}}{write(without_bos(words.first))}
{{{{- end }}}}
{{{{- $first = false }}}}
{{{{- else if eq .Role "assistant" }}}}{write(words.answer)}
{{{{- end }}}}
{{{{- end }}}}"""


def _words(style: Style, tokenizer: Vocabulary) -> _Words:
    assert isinstance(style, WordedStyle)

    def prompt(conversation: Conversation, turn: int = 0) -> list[_Part]:
        return _parts(tokenizer, style.write(tokenizer, [conversation])[0][turn].prompt)

    turn = (_ASKED, _ANSWER)
    bare, whole, empty = (Conversation.of(turn, turn, system=system) for system in (None, _SYSTEM, ""))
    answer = _parts(tokenizer, style.write(tokenizer, [bare])[0][0].answer)
    return _Words(prompt(bare), prompt(whole), prompt(empty), later=prompt(bare, turn=1), answer=answer)


def _parts(tokenizer: Vocabulary, pieces: Iterable[Piece]) -> list[_Part]:
    """Pieces as literal text and variables, control tokens by their names."""
    parts: list[_Part] = []
    begins = False
    for piece in pieces:
        found = piece if isinstance(piece, str) else resolve_control(tokenizer, piece)
        if isinstance(found, str):
            for text in filter(None, _VARIABLE.split(found)):
                parts.append(_Part(text, begins))
                begins = False
        elif found is not None:
            parts.append(_Part(tokenizer.content(found)))
            begins = piece == BOS
    return parts


def _quoted(text: str) -> str:
    """Text as a literal that jinja and Go read alike."""
    return json.dumps(text, ensure_ascii=False)
