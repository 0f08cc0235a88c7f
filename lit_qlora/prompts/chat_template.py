"""The chat template that comes with a tokenizer: a jinja program that writes a conversation as one text.

It runs in a process of its own, sandboxed and bounded in time and memory. Its text becomes pieces: control tokens,
which only the template can write, and text, which never becomes a control token whatever a user typed.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from threading import Event, Lock, Timer
from typing import Any, Literal

from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import read_json, read_text

SECONDS = 10.0  # for one conversation; a rendering takes some 0.1 ms
SECONDS_EACH = 0.01  # for each further one
MARKS = "\ufdd0\ufdd1"  # around what a template marks as generated, where no message is looked at
Message = Mapping[str, Any]
"""{"role": "system", "user", "assistant" or "tool", "content": ..., and other keys that templates read}."""


def find_chat_template(directory: Path) -> str | None:
    """The chat template of the tokenizer in `directory`, if it has one.

    Raises:
        CheckpointError: if the file that should hold it cannot be read.
    """
    alone, config = directory / "chat_template.jinja", directory / "tokenizer_config.json"
    try:
        if alone.is_file():
            return read_text(alone)
        if not config.is_file():
            return None
        found: Any = read_json(config).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (KeyError, TypeError):
        raise CheckpointError(f"{config}: chat_template is no list of names and templates.") from None
    if not isinstance(found, str | None):
        raise CheckpointError(f"{config}: chat_template is {type(found).__name__}, not text.")
    return found


def with_defaults(template: str, variables: Mapping[str, Any]) -> str:
    """The template with values of its variables where nobody gives any; it writes nothing else for that."""
    lines = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}{{% endif %}}\n"
        for name, value in variables.items()
    )
    return lines + template


def _literal(value: Any) -> str:
    """A value that JSON can hold as jinja writes it."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_literal(str(key))}: {_literal(of)}" for key, of in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    return "none" if value is None else json.dumps(value, ensure_ascii=False)


Request = tuple[Sequence[Message], bool]
"""Messages, and whether the beginning of an answer follows."""
How = Literal["text", "prompt", "turns", "marked", "marked prompt", "asked turns", "asked marked"]
"""A conversation as one text, with the beginning of an answer or without; the prompt and the answer of each turn, told
by rendering again and again, or by the template's own marks; the same with a prompt behind the last answer; the first
two with each answer behind the text that asks for it."""
RenderedTurn = tuple[str, str, str, bool, bool]
"""See lit_qlora.prompts.template_worker.Turn."""
Rendered = list[RenderedTurn | None] | str
"""The turns, None where an answer is part of the next prompt; or why the template cannot write them."""


def render(template: str, variables: Mapping[str, Any], requests: Sequence[Request]) -> list[str]:
    """Each conversation as the text that `template` makes of it.

    Args:
        variables: what else the template may use, such as bos_token.

    Raises:
        CheckpointError: if the template is no jinja, refuses a conversation, reaches for what the sandbox forbids, or
            takes too long or too much memory.
    """
    renderer = Renderer(template, variables)
    try:
        return renderer.render(requests)
    finally:
        renderer.close()


class Renderer:
    """The process that renders a template, for conversations that come one after the other.

    Args:
        variables: see render.
    """

    def __init__(self, template: str, variables: Mapping[str, Any]) -> None:
        self.template, self.variables = template, dict(variables)
        self._process: subprocess.Popen[str] | None = None
        self._lock = Lock()

    def render(self, requests: Sequence[Request]) -> list[str]:
        """See the function of this name."""
        texts: list[str] = []
        for found in self._answers([(messages, {}, "prompt" if begin else "text") for messages, begin in requests]):
            if isinstance(found, str):
                raise CheckpointError(f"The chat template fails: {found}")
            texts += found
        return texts

    def try_all(self, conversations: Sequence[tuple[Sequence[Message], Mapping[str, Any], bool]]) -> list[str | None]:
        """Each conversation as a text, or None where the template refuses it.

        Args:
            conversations: messages, variables of their own, and whether the beginning of an answer follows.
        """
        asked: list[tuple[Sequence[Message], Mapping[str, Any], How]] = [
            (messages, variables, "prompt" if begin else "text") for messages, variables, begin in conversations
        ]
        return [None if isinstance(found, str) else found[0] for found in self._answers(asked)]

    def render_turns(
        self, conversations: Sequence[tuple[Sequence[Message], Mapping[str, Any]]], how: How, marks: str
    ) -> list[Rendered]:
        """The turns of each conversation; see lit_qlora.prompts.template_worker.Writer.

        Args:
            conversations: messages, and variables of their own.
            marks: two characters that no message holds.

        Raises:
            CheckpointError: if the template is no jinja, or takes too long or too much memory.
        """
        return self._answers([(*conversation, how) for conversation in conversations], marks)

    def _answers(
        self, conversations: Sequence[tuple[Sequence[Message], Mapping[str, Any], How]], marks: str = MARKS
    ) -> list[Any]:
        seconds = SECONDS + SECONDS_EACH * sum(len(messages) for messages, *_ in conversations)
        question = {
            "seconds": seconds,
            "template": self.template,
            "variables": self.variables,
            "marks": marks,
            "conversations": conversations,
        }
        with self._lock:
            answers = self._ask(json.dumps(question), seconds)
        if isinstance(answers, str):
            raise CheckpointError(f"The chat template fails: {answers}")
        return answers

    def close(self) -> None:
        """End the process."""
        if self._process:
            process, self._process = self._process, None
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with suppress(OSError):  # what it has not read is lost
                    pipe.close()  # type: ignore[union-attr]

    def __del__(self) -> None:
        self.close()

    def _ask(self, question: str, seconds: float) -> list[Any] | str:
        if self._process and self._process.poll() is not None:  # a signal to the whole group has ended it
            self.close()
        process = self._process = self._process or subprocess.Popen(
            [sys.executable, "-I", str(Path(__file__).with_name("template_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="ascii",
            env={},
        )
        assert process.stdin
        assert process.stdout
        late = Event()

        def give_up() -> None:
            late.set()
            process.kill()

        timer = Timer(seconds, give_up)
        timer.start()
        try:
            process.stdin.write(f"{question}\n")
            process.stdin.flush()
            answers: list[Any] | str = json.loads(process.stdout.readline())
        except (ValueError, OSError):
            self.close()
            reason = (
                f"took more than {seconds:.0f} s" if late.is_set() else "ended its process, or used too much memory"
            )
            raise CheckpointError(f"The chat template {reason}. Give another --data.prompt.") from None
        finally:
            timer.cancel()
        return answers


class Guard:
    """Keeps control tokens that users typed apart from the control tokens that the template writes.

    A mark is put into each name of a control token that a user typed, and taken out of the pieces. A name of one
    character has no room for it, so it is always text.
    """

    def __init__(self, control_tokens: Iterable[str], texts: Iterable[str]) -> None:
        names = sorted((name for name in control_tokens if len(name) > 1), key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)()")
        texts = list(texts)
        texts = list(texts)
        unused = (mark for mark in map(chr, range(0xE000, 0xF900)) if not any(mark in text for text in texts))
        self.mark, *around = islice(unused, 3)
        self.marks = "".join(around)
        """Two more characters that no text holds."""

    def guard(self, text: str) -> str:
        """`text` without the name of any control token."""
        return self.control.sub(lambda found: found[0][:1] + self.mark + found[0][1:], text)

    def guard_all(self, value: Any) -> Any:
        """Return `value`, which JSON can hold, with all its texts guarded."""
        if isinstance(value, str):
            return self.guard(value)
        if isinstance(value, Mapping):
            return {self.guard(str(key)): self.guard_all(one) for key, one in value.items()}
        return list(map(self.guard_all, value)) if isinstance(value, list | tuple) else value

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """(text, whether it is a control token) in order."""
        pieces = [(part, bool(i % 2)) for i, part in enumerate(self.control.split(rendered)) if part]
        if self.mark not in rendered:
            return pieces
        return [(text, is_control) for part, is_control in pieces if (text := part.replace(self.mark, ""))]
