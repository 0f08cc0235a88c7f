"""The chat template that comes with a tokenizer: a jinja program that writes a conversation as one text.

It runs in a process of its own, sandboxed and bounded in time and memory. Its text becomes pieces: control tokens,
which only the template can write, and text, which never becomes a control token whatever a user typed.
"""

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from threading import Event, Timer
from typing import Any

from lit_qlora.errors import CheckpointError

SECONDS = 10.0  # for one conversation; a rendering takes some 0.1 ms
SECONDS_EACH = 0.01  # for each further one
Message = Mapping[str, str]
"""{"role": "system", "user" or "assistant", "content": ...}."""


def find_chat_template(directory: Path) -> str | None:
    """The chat template of the tokenizer in `directory`, if it has one.

    Raises:
        CheckpointError: if the file that should hold it cannot be read.
    """
    alone = directory / "chat_template.jinja"
    if alone.is_file():
        return alone.read_text(encoding="utf-8")
    config = directory / "tokenizer_config.json"
    if not config.is_file():
        return None
    try:
        found: Any = json.loads(config.read_text(encoding="utf-8")).get("chat_template")
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{config}: not a JSON object: {error}.") from None
    if isinstance(found, list):  # several, by name
        found = {entry["name"]: entry["template"] for entry in found}.get("default")
    return found


Request = tuple[Sequence[Message], bool]
"""Messages, and whether the beginning of an answer follows."""


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

    def render(self, requests: Sequence[Request]) -> list[str]:
        """See the function of this name."""
        conversations = [{"messages": list(messages), "add_generation_prompt": begin} for messages, begin in requests]
        question = {"template": self.template, "variables": self.variables, "conversations": conversations}
        answers = self._ask(json.dumps(question), SECONDS + SECONDS_EACH * len(requests))
        if answers and "error" in answers[-1]:
            raise CheckpointError(f"The chat template fails: {answers[-1]['error']}")
        return [answer["text"] for answer in answers]

    def close(self) -> None:
        """End the process."""
        if self._process:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()

    def _ask(self, question: str, seconds: float) -> list[dict[str, str]]:
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
            answers: list[dict[str, str]] = json.loads(process.stdout.readline())
        except (ValueError, BrokenPipeError):
            self.close()
            reason = f"took more than {seconds:.0f} s" if late.is_set() else "used too much memory"
            raise CheckpointError(f"The chat template {reason}. Give another --data.prompt.") from None
        finally:
            timer.cancel()
        return answers


class Guard:
    """Keeps control tokens that users typed apart from those that the template writes.

    A mark is put into what a user typed wherever it is the name of a control token, and taken out of the pieces.
    """

    def __init__(self, control_tokens: Iterable[str], texts: Iterable[str]) -> None:
        names = sorted((name for name in control_tokens if name), key=len, reverse=True)
        self.control = re.compile("(" + "|".join(map(re.escape, names)) + ")") if names else re.compile("(?!)()")
        used = set().union(*map(set, texts))
        self.mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in used)

    def guard(self, text: str) -> str:
        """`text` without the name of any control token."""
        return self.control.sub(lambda found: found[0][:1] + self.mark + found[0][1:], text)

    def split(self, rendered: str) -> list[tuple[str, bool]]:
        """(text, whether it is a control token) in order."""
        parts = self.control.split(rendered)
        pieces = [(part.replace(self.mark, ""), bool(i % 2)) for i, part in enumerate(parts)]
        return [piece for piece in pieces if piece[0]]
