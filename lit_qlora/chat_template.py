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


def render(
    template: str, variables: Mapping[str, Any], requests: Sequence[tuple[Sequence[Message], bool]]
) -> list[str]:
    """Each conversation as the text that `template` makes of it.

    Args:
        variables: what else the template may use, such as bos_token.
        requests: (messages, whether the beginning of an answer follows).

    Raises:
        CheckpointError: if the template is no jinja, refuses a conversation, reaches for what the sandbox forbids, or
            takes too long or too much memory.
    """
    conversations = [{"messages": list(messages), "add_generation_prompt": begin} for messages, begin in requests]
    question = json.dumps({"template": template, "variables": dict(variables), "conversations": conversations})
    seconds = SECONDS + SECONDS_EACH * len(requests)
    worker = Path(__file__).with_name("template_worker.py")
    try:
        done = subprocess.run(
            [sys.executable, "-I", str(worker)],
            input=question,
            capture_output=True,
            encoding="ascii",
            timeout=seconds,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise CheckpointError(
            f"The chat template took more than {seconds:.0f} s. Give another --data.prompt."
        ) from None
    try:
        answers: list[dict[str, str]] = json.loads(done.stdout)
    except ValueError:
        raise CheckpointError("The chat template used too much memory. Give another --data.prompt.") from None
    if answers and "error" in answers[-1]:
        raise CheckpointError(f"The chat template fails: {answers[-1]['error']}")
    return [answer["text"] for answer in answers]


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
