"""Renders chat templates, in a process of its own that may use little memory: a template is a program by a stranger.

lit_qlora.prompts.chat_template runs this file; it knows nothing but the standard library and jinja2.
"""

import json
import resource
import sys
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 2**30  # bytes of address space; rendering a conversation takes some 50 MB


class Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark answers, stands for what is inside."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own way

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The statements between the two tags."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    """What a template calls when it does not like the conversation."""
    raise TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as Hugging Face's templates expect it: without HTML's escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def render_stages(template: Template, variables: dict[str, Any], messages: list[Any], stages: list[Any]) -> Any:
    """What each stage adds to the one before it, or, as a text, why that cannot be told."""
    before, added = "", []
    try:
        for count, begin in stages:
            text = template.render(variables | {"messages": messages[:count], "add_generation_prompt": begin})
            if not text.startswith(before):
                return f"it writes what comes before message {count} differently once the conversation goes on"
            added.append(text[len(before) :])
            before = text
    except Exception as error:  # whatever the stranger's program does
        return f"{type(error).__name__}: {error}"
    return added


def main() -> None:
    """Answer each line of stdin, a request, with a line: a JSON list with what render_stages says, or a text."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
    compiled = cache(environment.from_string)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            template = compiled(request["template"])
        except Exception as error:  # whatever the stranger's program does
            answer: Any = f"{type(error).__name__}: {error}"
        else:
            variables, conversations = request["variables"], request["conversations"]
            answer = [render_stages(template, variables, messages, stages) for messages, stages in conversations]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
