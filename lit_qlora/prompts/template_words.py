"""The words that a chat template has for roles, keys and variables, found by rendering it.

A word in its source tells little: it may stand in a comparison, a text or a comment. So each is tried: what it changes
in the rendered text, it means something to the template.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from lit_qlora.prompts.conversation import REASONING

TOOL_ROLES = ("tool", "ipython", "observation", "function")
"""Roles of a tool's result in chat templates, the likeliest first."""
PROBE, NOBODY = "Zqxj", "vwkz"
"""A text and a role that no template knows."""
CALL_ID = "abcdefghi"  # Mistral's templates take no other length
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "f",
            "description": "d",
            "parameters": {"type": "object", "properties": {"k": {"type": "string"}}, "required": ["k"]},
        },
    }
]
ASKED, ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
STANDARD: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "tools": None, "documents": None}
Render = Callable[[Sequence["Trial"]], list[str | None]]
"""Each rendered, None where the template refuses."""


class Trial(NamedTuple):
    """A conversation to render."""

    messages: Sequence[Mapping[str, Any]]
    variables: Mapping[str, Any] = STANDARD
    begin: bool = False
    """Whether the beginning of an answer follows."""


def called(arguments: Any, **keys: Any) -> dict[str, Any]:
    """An answer that calls a tool."""
    call = {"id": CALL_ID, "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call], **keys}


def result(role: str) -> dict[str, Any]:
    """A message of a tool."""
    return {"role": role, "content": PROBE, "name": "f", "tool_call_id": CALL_ID}


class TemplateWords:
    """The words of a template.

    Args:
        render: renders it.
    """

    def __init__(self, render: Render) -> None:
        self._render = render
        self._read: dict[tuple[str, bool], bool] = {}

    @cached_property
    def tool(self) -> str:
        """The role of a tool's result."""
        calls = {"k": "v"} if self.arguments != "texts" else '{"k": "v"}'

        def trials(role: str) -> list[Trial]:
            talks = ([ASKED, called(calls), result(role)], [ASKED, ANSWERED, result(role)])
            return [
                Trial([*talk, *more], STANDARD | {"tools": tools})
                for talk in talks
                for more in ((), (ANSWERED,))
                for tools in (TOOLS, None)
            ]

        return self._known(TOOL_ROLES, trials) or TOOL_ROLES[0]

    @cached_property
    def developer(self) -> str:
        """The role of a developer: its own where the template knows one, else that of the system."""

        def trials(role: str) -> list[Trial]:
            return [Trial([{"role": role, "content": PROBE}, ASKED, *more]) for more in ((), (ANSWERED,))]

        return self._known(("developer",), trials) or "system"

    @cached_property
    def reasoning(self) -> tuple[str, ...]:
        """The keys under which it reads thoughts."""
        plain = {"k": "v"} if self.arguments != "texts" else '{"k": "v"}'
        found = []
        for key in REASONING:
            talks = ([ASKED, {**ANSWERED, key: PROBE}], [ASKED, called(plain, **{key: PROBE})])
            trials = [Trial(talk, STANDARD | {"tools": tools}) for talk in talks for tools in (None, TOOLS)]
            if any(PROBE in (text or "") for text in self._render(trials)):
                found.append(key)
        return tuple(found)

    @cached_property
    def arguments(self) -> Literal["objects", "texts", "any"]:
        """The form in which it writes the arguments of calls well: objects, JSON texts, or both."""
        trials = [
            Trial([ASKED, called(form)], STANDARD | {"tools": tools})
            for form in ({"k": PROBE}, f'{{"k": "{PROBE}"}}')
            for tools in (TOOLS, None)
        ]
        *of_object, of_text, of_text_without = self._render(trials)
        takes_objects = any(PROBE in (text or "") and "{'k'" not in (text or "") for text in of_object)
        takes_texts = any(PROBE in (text or "") and '\\"' not in (text or "") for text in (of_text, of_text_without))
        return "any" if takes_objects and takes_texts else "texts" if takes_texts else "objects"

    @cached_property
    def opening(self) -> str:
        """The text that it begins an answer with."""
        past, asked = self._render([Trial([ASKED]), Trial([ASKED], begin=True)])
        return (asked or "").removeprefix(past or "")

    def reads(self, name: str, of_message: bool, value: Any) -> bool:
        """Tell if this key of a message, or this variable, changes a text.

        Args:
            value: that somebody has given to it.
        """
        key = (name, of_message)
        if key not in self._read:
            self._read[key] = self._tells(self._with_key(name, value) if of_message else self._with(name, value))
        return self._read[key]

    def _tells(self, pairs: Sequence[tuple[Trial, Trial]]) -> bool:
        texts = self._render([trial for pair in pairs for trial in pair])
        return any(without != given for without, given in zip(texts[::2], texts[1::2], strict=True))

    def _with(self, name: str, value: Any) -> list[tuple[Trial, Trial]]:
        """Trials without a variable and with it."""
        thought = ANSWERED | dict.fromkeys(REASONING, PROBE)
        talks: list[tuple[list[Any], bool]] = [
            ([ASKED], True),
            ([ASKED, ANSWERED], False),
            ([{"role": "system", "content": PROBE}, ASKED], True),
            ([ASKED, thought, ASKED], True),
        ]
        return [
            (Trial(talk, others, begin), Trial(talk, others | {name: one}, begin))
            for talk, begin in talks
            for others in (STANDARD, STANDARD | {"tools": TOOLS})[: 1 if name == "tools" else 2]
            for one in (TOOLS if name == "tools" else value, PROBE, True, False)
        ]

    def _with_key(self, name: str, value: Any) -> list[tuple[Trial, Trial]]:
        """Trials without a key of messages and with it."""
        plain = {"k": "v"} if self.arguments != "texts" else '{"k": "v"}'
        if name == "tool_calls":
            silent = {**ANSWERED, "content": ""}
            return [
                (Trial([ASKED, silent], STANDARD | {"tools": tools}),
                 Trial([ASKED, called(plain)], STANDARD | {"tools": tools}))
                for tools in (TOOLS, None)
            ]  # fmt: skip
        talks: list[list[Any]] = [
            [ASKED, ANSWERED],
            [ASKED, called(plain), result(self.tool), ANSWERED],
            [ASKED, called(plain)],
        ]
        variables = STANDARD | {"tools": TOOLS}
        return [
            (
                Trial([{key: of[key] for key in of if key != name} for of in talk], variables),
                Trial([of | {name: one} for of in talk], variables),
            )
            for talk in talks
            for one in (value, PROBE, True, False)
        ]

    def _known(self, roles: Sequence[str], trials: Callable[[str], list[Trial]]) -> str:
        """The first role that the template writes, and otherwise than it writes any role; '' if it knows none."""

        def written(role: str, other: str) -> list[str]:
            return [(text or "").replace(role, NOBODY).replace(other, NOBODY) for text in self._render(trials(role))]

        for role in roles:
            pairs = zip(written(role, role), written(NOBODY, role), strict=True)
            if any(PROBE in theirs and theirs != nobodys for theirs, nobodys in pairs):
                return role
        return ""
