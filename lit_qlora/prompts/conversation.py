"""A conversation: messages with roles, and all else that their writer said about them."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, Self

Role = Literal["system", "developer", "user", "assistant", "tool"]
Keys = Mapping[str, Any]
NOTHING: Keys = MappingProxyType({})
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets and templates have the thoughts of an assistant."""
OPENING = ("system", "developer")


class Message(NamedTuple):
    """A message."""

    role: Role
    content: str | None
    """None only for an assistant that calls tools and says nothing."""
    keys: Keys = NOTHING
    """Its other keys as templates read them, such as tool_calls, reasoning_content, name and tool_call_id."""
    weight: float = 1.0
    """Of an assistant: the loss of its tokens is multiplied by it, from 0, which leaves it out, to 1."""

    @property
    def text(self) -> str:
        """Its content, '' if it has none."""
        return self.content or ""

    @property
    def is_answer(self) -> bool:
        """True if an assistant says it."""
        return self.role == "assistant"


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages: perhaps one of system or developer, then of user, assistant and tools.

    A conversation to train on ends with an answer, a prompt with a message that is to be answered.
    """

    messages: tuple[Message, ...]
    input: str = ""
    """The material of the first user message, for styles that keep it apart from the instruction."""
    variables: Keys = field(default_factory=lambda: NOTHING)
    """Values that a template may read besides messages, such as tools and documents."""

    @staticmethod
    def of(*turns: tuple[str, str], system: str | None = None, input: str = "") -> "Conversation":
        """A conversation of (prompt, answer) pairs behind a system message, unless that is None."""
        opening = (Message("system", system),) if system is not None else ()
        spoken = (Message(*one) for ask, answer in turns for one in (("user", ask), ("assistant", answer)))
        return Conversation((*opening, *spoken), input)

    @property
    def answers(self) -> list[Message]:
        """The messages of assistants, in order."""
        return [message for message in self.messages if message.role == "assistant"]

    @property
    def system(self) -> str | None:
        """The opening message of system or developer; None if there is none, which is not an empty one."""
        first = self.messages[0] if self.messages else None
        return first.text if first and first.role in OPENING else None

    @property
    def instruction(self) -> str:
        """The first prompt."""
        return next((message.text for message in self.messages if message.role == "user"), "")

    @property
    def question(self) -> str:
        """The last prompt."""
        return next((message.text for message in reversed(self.messages) if message.role == "user"), "")

    @property
    def output(self) -> str:
        """The last message, which is the last answer of a conversation to train on."""
        return self.messages[-1].text

    @property
    def prompt(self) -> "Conversation":
        """The conversation up to its last answer."""
        return replace(self, messages=self.messages[:-1])

    @property
    def plain(self) -> bool:
        """True if there is nothing but the texts of the messages."""
        if self.variables:
            return False
        for message in self.messages:  # noqa: SIM110 - half the time of any(), for each of a million conversations
            if message.keys:
                return False
        return True

    def without(self, names: Collection[str]) -> Self:
        """The conversation without these keys of messages and variables."""
        messages = tuple(
            message._replace(keys={name: value for name, value in message.keys.items() if name not in names})
            for message in self.messages
        )
        variables = {name: value for name, value in self.variables.items() if name not in names}
        return replace(self, messages=messages, variables=variables)

    def weighing(self, only: Collection[int]) -> Self:
        """The conversation with weight 0 for all answers but those with these numbers."""
        numbers = count()
        messages = tuple(
            message._replace(weight=0.0) if message.is_answer and next(numbers) not in only else message
            for message in self.messages
        )
        return replace(self, messages=messages)

    def up_to_answer(self, number: int) -> Self:
        """The conversation that ends with answer `number`."""
        ends = [i + 1 for i, message in enumerate(self.messages) if message.is_answer]
        return replace(self, messages=self.messages[: ends[number]])

    def without_last_turn(self) -> Self:
        """The conversation without its last answer and what led to it from the answer before."""
        ends = [i + 1 for i, message in enumerate(self.messages) if message.role == "assistant"]
        return replace(self, messages=self.messages[: ends[-2]])

    def without_first_turns(self) -> Self | None:
        """The conversation without its first user message and all up to the second; None if there is only one."""
        asked = [i for i, message in enumerate(self.messages) if message.role == "user"]
        if len(asked) < 2:
            return None
        return replace(self, messages=(*self.messages[: asked[0]], *self.messages[asked[1] :]), input="")

    def longest_of_prompt(self, number: int) -> int:
        """Return the index of the message with the longest text between answer `number` and the answer before it."""
        ends = [-1, *(i for i, message in enumerate(self.messages) if message.role == "assistant")]
        between = range(ends[number] + 1, ends[number + 1])
        given = [i for i in between if self.messages[i].role not in OPENING]
        return max(given, key=lambda i: len(self.messages[i].text))


def prompt_of(
    instruction: str, input: str = "", system: str | None = None, history: Sequence[Message] = ()
) -> Conversation:
    """A prompt.

    Args:
        input: the material of the first prompt, for styles that keep the two apart.
        system: what the model is told before all; None for nothing.
        history: the messages between.
    """
    opening = (Message("system", system),) if system is not None else ()
    return Conversation((*opening, *history, Message("user", instruction)), input)
