"""Renders chat templates, in a process of its own that may use little memory: a template is a program by a stranger.

lit_qlora.prompts.chat_template runs this file; it knows nothing but the standard library and jinja2.
"""

import json
import re
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cache
from os.path import commonprefix
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space; rendering a conversation takes some 50 MB
MOST_WRITTEN = 2**22  # characters that a template may write beside its messages, and eight times their own
ANCHOR = 16  # characters before an answer by which it is found where a template does not begin answers
Turn = tuple[str, str, str, bool]
"""The prompt, the answer, all that a model is asked the answer with where that is something else, and whether that is
the prompt with more behind it."""


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark what an assistant says.

    Its text is put between the environment's two marks, which nothing else holds.
    """

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two tags, with marks around them."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        begin, end = (nodes.Output([nodes.TemplateData(mark)], lineno=line) for mark in self.environment.marks)  # type: ignore[attr-defined]
        return [begin, *body, end]


def refuse(message: str) -> NoReturn:
    """Refuse the conversation; a template calls it when it does not like it."""
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as Hugging Face's templates expect it: without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


class Writer:
    """Writes one conversation with a template.

    Args:
        marks: the two that the template's environment has.
        most: characters that it may write.
    """

    def __init__(
        self, template: Template, variables: dict[str, Any], messages: list[Any], marks: str, most: int
    ) -> None:
        self.template, self.variables, self.messages, self.marks, self.most = template, variables, messages, marks, most
        self.answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]

    def render(self, count: int, begin: bool) -> str:
        """The first `count` messages, and the beginning of an answer or not, without marks."""
        text = self.marked(count, begin)
        return re.sub(f"[{self.marks}]", "", text) if self.marks[0] in text else text

    def marked(self, count: int, begin: bool) -> str:
        """As render, with marks."""
        text = self.template.render(
            self.variables | {"messages": self.messages[:count], "add_generation_prompt": begin}
        )
        if len(text) > self.most:
            raise TemplateError(f"it writes more than {self.most:,} characters")
        return text

    def marked_turns(self, begin: bool) -> list[Turn | None] | str:
        """Return the texts outside and inside each pair of marks; with `begin`, the text behind the last pair too."""
        *pairs, tail = re.split(f"[{self.marks}]", self.marked(len(self.messages), begin))
        turns: list[Turn | None] = [
            (out, inside, "", False) for out, inside in zip(pairs[::2], pairs[1::2], strict=True)
        ]
        if len(turns) != len(self.answers):
            return f"it marks {len(turns)} texts as generated, and the conversation has {len(self.answers)} answers"
        return [*turns, (tail, "", "", False)] if begin else turns

    def turns(self) -> list[Turn | None] | str:
        """Return each prompt, its answer, and how the prompt goes on where a model is asked for the answer.

        All messages before an answer are rendered twice: with the beginning of an answer, and with the answer. The
        answer is the rest of the second text. Some templates write the past differently once the conversation goes
        on. Then the conversation as a whole counts: an answer that is not in it word for word is None, and part of
        the next prompt.
        """
        before = ""
        turns: list[Turn | None] = []
        for k in self.answers:
            pair = self.pair(k)
            if isinstance(pair, str) or not pair[0].startswith(before):
                return self.located()
            prompt, answer, asked, more = pair
            turns.append((prompt[len(before) :], answer, asked, more))
            before = prompt + answer
        return turns

    def pair(self, k: int) -> Turn | str:
        """The answer that message `k` is, with all before it as its prompt; or why that is unknown."""
        asked, answered = self.render(k, True), self.render(k + 1, False)
        if answered.startswith(asked):
            return asked, answered[len(asked) :], "", False
        past = self.render(k, False)
        if answered.startswith(past):
            prompt = commonprefix((asked, answered))  # noqa: RUF071 - of characters, for they are texts
            return prompt, answered[len(prompt) :], asked, True
        begins = past[-ANCHOR:] + (asked[len(past) :] if asked.startswith(past) else "")
        at = answered.rfind(begins)
        if at < 0:
            return f"it writes what comes before message {k + 1} differently once the conversation goes on"
        at += len(begins)
        return answered[:at], answered[at:], asked, False

    def located(self) -> list[Turn | None] | str:
        """The answers as they stand in the whole conversation, or why the last cannot be told."""
        *earlier, last = self.answers
        whole = self.pair(last)
        if isinstance(whole, str):
            return whole
        turns: list[Turn | None] = []
        at = 0
        for k in earlier:
            pair = self.pair(k)
            start = -1 if isinstance(pair, str) else self.find(k, pair, whole[0], at)
            if isinstance(pair, str) or start < 0:
                turns.append(None)
                continue
            turns.append((whole[0][at:start], *pair[1:]))
            at = start + len(pair[1])
        return [*turns, (whole[0][at:], *whole[1:])]

    def find(self, k: int, pair: Turn, whole: str, at: int) -> int:
        """Find the index in `whole` of the answer that message `k` is, behind its opening; -1 if it is not there."""
        prompt, answer, *_ = pair
        past = self.render(k, False)
        begins = prompt[len(past) :] if prompt.startswith(past) else ""
        begins = begins or prompt[-ANCHOR:]
        found = whole.find(begins + answer, at) if answer.strip() else -1
        return found if found < 0 else found + len(begins)


def answer(line: str, compiled: Callable[[str, str], Template]) -> Any:
    """Answer a request: return a list, or a text that says why there is none."""
    request = json.loads(line)
    marks, variables = request["marks"], request["variables"]
    try:
        template = compiled(request["template"], marks)
    except Exception as error:  # whatever the stranger's program does
        return f"{type(error).__name__}: {error}"
    answers: list[Any] = []
    for messages, own, how in request["conversations"]:
        writer = Writer(template, variables | own, messages, marks, MOST_WRITTEN + 8 * len(line))
        try:
            if how in ("text", "prompt"):
                answers.append([writer.render(len(messages), how == "prompt")])
            else:
                answers.append(writer.turns() if how == "turns" else writer.marked_turns(how == "marked prompt"))
        except Exception as error:  # whatever the stranger's program does
            answers.append(f"{type(error).__name__}: {error}")
    return answers


def main() -> None:
    """Answer each line of stdin, a request, with a line: a JSON list, or a text that says what is wrong."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}

    @cache
    def compiled(source: str, marks: str) -> Template:
        environment.marks = marks  # type: ignore[attr-defined]
        return environment.from_string(source)

    for line in sys.stdin:
        print(json.dumps(answer(line, compiled)), flush=True)


if __name__ == "__main__":
    main()
