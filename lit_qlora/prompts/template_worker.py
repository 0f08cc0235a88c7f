"""Renders chat templates, in a process of its own that may use little memory: a template is a program by a stranger.

lit_qlora.prompts.chat_template runs this file; it knows nothing but the standard library and jinja2.
"""

import json
import re
import resource
import signal
import sys
from collections.abc import Callable
from datetime import datetime
from functools import cache
from os.path import commonprefix
from typing import Any, NamedTuple, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space; rendering a conversation takes some 50 MB
MOST_WRITTEN = 2**22  # characters that a template may write beside its messages, and eight times their own
NEWLINE = "\n"
ANCHOR = 16  # characters before an answer by which it is found where a template does not begin answers
THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")


class Turn(NamedTuple):
    """A prompt and its answer in a conversation that goes on."""

    prompt: str
    answer: str
    asked: str = ""
    """All that a model is asked the answer with where that is something else."""
    begun: bool = False
    """It is the prompt with more behind it."""
    elsewhere: bool = False
    """Before the answer stands something else than in the conversation that ends with it."""


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
        as_asked: each answer stands behind the text that a model is asked it with, whatever the template makes of it
            once the answer is there.
    """

    def __init__(
        self, template: Template, variables: dict[str, Any], messages: list[Any], marks: str, most: int, as_asked: bool
    ) -> None:
        self.as_asked = as_asked
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
        if len(pairs) != 2 * len(self.answers):
            number = len(pairs) // 2
            return f"it marks {number} texts as generated, and the conversation has {len(self.answers)} answers"
        turns: list[Turn | None] = []
        text = ""
        for k, before, inside in zip(self.answers, pairs[::2], pairs[1::2], strict=True):
            text += before + inside
            elsewhere = not begin and k != self.answers[-1] and not self.render(k + 1, False).startswith(text)
            turns.append(Turn(before, inside, elsewhere=elsewhere))
            if (
                self.as_asked
                and k == self.answers[-1]
                and not text[: len(text) - len(inside)].startswith(self.render(k, True))
            ):
                return self.turns()
        return [*turns, Turn(tail, "")] if begin else turns

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
            if isinstance(pair, str) or not pair.prompt.startswith(before):
                return self.located()
            turns.append(pair._replace(prompt=pair.prompt[len(before) :]))
            before = pair.prompt + pair.answer
        return turns

    def pair(self, k: int) -> Turn | str:
        """The answer that message `k` is, with all before it as its prompt; or why that is unknown."""
        asked, answered = self.render(k, True), self.render(k + 1, False)
        if answered.startswith(asked):
            return Turn(asked, answered[len(asked) :])
        past = self.render(k, False)
        if answered.startswith(past):
            prompt = commonprefix((asked, answered))  # noqa: RUF071 - of characters, for they are texts
            completed = self.completed(self.messages[k], past, asked, answered) if self.as_asked else None
            return completed or Turn(prompt, answered[len(prompt) :], asked, begun=True)
        begins = past[-ANCHOR:] + (asked[len(past) :] if asked.startswith(past) else "")
        at = answered.rfind(begins)
        if at < 0:
            return f"it writes what comes before message {k + 1} differently once the conversation goes on"
        at += len(begins)
        return Turn(asked, answered[at:]) if self.as_asked else Turn(answered[:at], answered[at:], asked)

    def completed(self, message: Any, past: str, asked: str, answered: str) -> Turn | None:
        """The answer behind a thought that its prompt begins, or has empty, and that the template then leaves out."""
        opens, closes = next((pair for pair in THOUGHTS if asked.rstrip().endswith(pair)), ("", ""))
        head, _, begun = asked.rpartition(opens) if opens else ("", "", "")
        if not opens or not head.startswith(past) or not answered.startswith(head):
            return None
        said = answered[len(head) :]
        if begun.strip():
            is_empty = begun.strip() == closes and not said.startswith(opens)
            return Turn(asked, said) if is_empty else None
        if said.startswith(opens):
            return Turn(asked, said[len(opens) :].lstrip())
        before, closed, _ = str(message.get("content") or "").partition(closes)
        thought = next((str(message[key]) for key in THOUGHT_KEYS if message.get(key)), before if closed else "")
        thought = thought.rpartition(opens)[2].strip()
        return Turn(asked, f"{'' if begun else NEWLINE}{thought}\n{closes}\n\n{said.lstrip(NEWLINE)}")

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
            start = -1 if isinstance(pair, str) else self.find(k, pair, whole.prompt, at)
            if isinstance(pair, str) or start < 0:
                turns.append(None)
                continue
            elsewhere = whole.prompt[:start] != pair.prompt
            turns.append(pair._replace(prompt=whole.prompt[at:start], elsewhere=elsewhere))
            at = start + len(pair.answer)
        return [*turns, whole._replace(prompt=whole.prompt[at:])]

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
    signal.setitimer(signal.ITIMER_REAL, request["seconds"] + 1)  # whoever asked may be killed before it gives up
    marks, variables = request["marks"], request["variables"]
    try:
        template = compiled(request["template"], marks)
    except Exception as error:  # whatever the stranger's program does
        return f"{type(error).__name__}: {error}"
    answers: list[Any] = []
    for messages, own, how in request["conversations"]:
        writer = Writer(
            template, variables | own, messages, marks, MOST_WRITTEN + 8 * len(line), how.startswith("asked")
        )
        try:
            if how in ("text", "prompt"):
                answers.append([writer.render(len(messages), how == "prompt")])
            else:
                marked = "marked" in how
                answers.append(writer.marked_turns(how == "marked prompt") if marked else writer.turns())
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
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    main()
