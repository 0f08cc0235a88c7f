"""Answers taken apart as they come: thoughts, words, and calls of tools, in the notations that models know."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal, NamedTuple, Protocol

from lit_qlora.prompts.calls import BEGINNINGS, MARKS, Call, Tool, call_of, read_calls, values_of

THOUGHTS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|channel>thought", "<channel|>"),
)
"""Marks around a thought; Gemma 4's first one is a control token with a word behind it."""
HARMONY_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
HARMONY = ("<|channel|>", "<|message|>", "<|constrain|>", *HARMONY_ENDS)


class Part(NamedTuple):
    """A piece of an answer."""

    kind: Literal["reasoning", "content"]
    text: str


@dataclass
class Answer:
    """An answer taken apart."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, parts: Sequence[Part]) -> Sequence[Part]:
        """Append parts of it, and return them."""
        for kind, text in parts:
            setattr(self, kind, getattr(self, kind) + text)
        return parts


@dataclass(frozen=True)
class Notation:
    """The way in which a style writes the parts of an answer."""

    thought: tuple[str, str] | None = None
    """Marks around a thought; None if the style has no thoughts."""
    harmony: bool = False
    """Each part is a message of its own, on a channel: analysis, commentary or final."""
    calls: bool = False
    """The style may write calls."""

    @staticmethod
    def of(template: str) -> "Notation":
        """The notation of a chat template, by the marks that it writes or looks for."""
        if "<|channel|>" in template and "<|message|>" in template:
            return Notation(harmony=True, calls=True)
        return Notation(next((pair for pair in THOUGHTS if pair[1] in template), None), calls=True)

    @property
    def marks(self) -> tuple[str, ...]:
        """The names that tell the parts from each other, where they are control tokens."""
        if self.harmony:
            return HARMONY
        of_thought = [mark.removesuffix("thought") for mark in self.thought or ()]
        return (*of_thought, *(MARKS if self.calls else ()))

    def begins_thought(self, prompt: str) -> bool:
        """Tell if a prompt ends with the beginning of a thought."""
        return self.thought is not None and prompt.rstrip().endswith(self.thought[0])

    def behind_thought(self, text: str) -> str:
        """The part of a written answer behind its thought; all of it if it has none."""
        before, closed, said = text.partition(self.thought[1]) if self.thought else (text, "", "")
        return said.lstrip() if closed else before

    def reader(self, tools: Iterable[Tool] = (), *, begun: bool = False) -> "Reader":
        """Return a new reader of one answer."""
        return _Harmony(tools) if self.harmony else _Marked(tools, self.thought, begun)


PLAIN = Notation()
"""The notation of a style that has neither thoughts nor calls."""


class Decodes(Protocol):
    """The part of lit_qlora.prompts.tokenizer.Tokenizer that is needed here."""

    control_tokens: dict[str, int]

    def decode(self, ids: Sequence[int]) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.decode."""
        ...


class MarkedText:
    """Decodes ids as the tokenizer does, but keeps the names of some control tokens.

    Args:
        names: of them; names that are no control tokens are in the text anyway.
    """

    def __init__(self, tokenizer: Decodes, names: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        self._names = {tokenizer.control_tokens[name]: name for name in names if name in tokenizer.control_tokens}

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids."""
        if self._names.keys().isdisjoint(ids):
            return self._tokenizer.decode(ids)
        return "".join(
            "".join(map(self._names.__getitem__, run)) if is_mark else self._tokenizer.decode(list(run))
            for is_mark, run in groupby(ids, key=self._names.__contains__)
        )


class Reader(ABC):
    """Takes one answer apart, piece by piece.

    Thoughts and words come as soon as they are certain. Calls come at the end: they are calls only if nothing else
    follows them, if each is complete, and if each names a tool. Otherwise they are words.

    Args:
        tools: the tools that may be called; without them there are no calls.

    Attributes:
        calls: the calls, once the answer has ended.
    """

    def __init__(self, tools: Iterable[Tool]) -> None:
        self.tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self.calls: list[Call] = []
        self._text = ""  # what nobody was told yet

    def push(self, piece: str) -> list[Part]:
        """The parts that have become certain with this piece."""
        self._text += piece
        return _nonempty(self._read(final=False))

    def end(self) -> list[Part]:
        """The rest, after the last piece."""
        return _nonempty(self._read(final=True))

    def whole(self, text: str) -> Answer:
        """Take a whole answer apart."""
        answer = Answer()
        answer.add([*self.push(text), *self.end()])
        answer.calls = self.calls
        return answer

    @abstractmethod
    def _read(self, *, final: bool) -> list[Part]: ...

    def _take(self, length: int) -> str:
        taken, self._text = self._text[:length], self._text[length:]
        return taken


class _Marked(Reader):
    """A thought between marks, if there is one, then words, then calls."""

    def __init__(self, tools: Iterable[Tool], thought: tuple[str, str] | None, begun: bool) -> None:
        super().__init__(tools)
        self._open, self._close = thought or ("", "")
        self._step: Callable[[bool], list[Part] | None] = self._words
        if thought:
            self._step = self._thought if begun else self._opening
        self._inside = not begun  # behind the white space that a part begins with
        self._spoke = False

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while (found := self._step(final)) is not None:
            parts += found
        return parts

    def _opening(self, final: bool) -> list[Part] | None:
        """Decide whether a thought begins the answer."""
        begins = self._text.lstrip()
        if begins.startswith(self._open):
            self._text, self._step, self._inside = begins[len(self._open) :], self._thought, False
        elif final or not self._open.startswith(begins):
            self._step = self._words
        else:
            return None
        return []

    def _thought(self, final: bool) -> list[Part] | None:
        self._enter()
        at = self._text.find(self._close)
        if at >= 0:
            said = self._take(at).rstrip()
            self._take(len(self._close))
            self._step, self._inside = self._words, False
            return [Part("reasoning", said)]
        return self._certain("reasoning", (self._close,), final)

    def _words(self, final: bool) -> list[Part] | None:
        self._enter()
        if not self.tools:
            return self._certain("content", (), final, holds_space=False)
        if not self._spoke:
            begins = self._text.lstrip()[:1]
            if begins in ("{", "["):
                self._step = self._calls
                return []
            self._spoke = bool(begins)
        at = min((at for mark in BEGINNINGS if (at := self._text.find(mark)) >= 0), default=-1)
        if at >= 0:
            self._step = self._calls  # with the white space before them, which is part of words
            return [Part("content", self._take(len(self._text[:at].rstrip())))]
        return self._certain("content", BEGINNINGS, final)

    def _calls(self, final: bool) -> list[Part] | None:
        if not final or not self._text:
            return None
        self.calls = read_calls(self._text, self.tools)
        text = self._take(len(self._text))
        return [] if self.calls else [Part("content", text)]

    def _enter(self) -> None:
        """Leave out the white space that a part behind a mark begins with."""
        if not self._inside:
            self._text = self._text.lstrip()
            self._inside = bool(self._text)

    def _certain(
        self, kind: Literal["reasoning", "content"], marks: Sequence[str], final: bool, holds_space: bool = True
    ) -> list[Part] | None:
        """The text up to what may be the beginning of a mark, and the white space before it."""
        if not self._text:
            return None
        if final:
            said = self._take(len(self._text))
            return [Part(kind, said.rstrip() if kind == "reasoning" else said)]
        length = len(self._text) - max((_overlap(self._text, mark) for mark in marks), default=0)
        length = len(self._text[:length].rstrip()) if holds_space else length
        return [Part(kind, self._take(length))] if length else None


class _Harmony(Reader):
    """Messages with a header that names channel and recipient, as gpt-oss writes them."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        super().__init__(tools)
        self._kind: Literal["reasoning", "content", "call", ""] = ""  # of the message that is being read
        self._header = ""
        self._said: set[str] = set()  # kinds of which there was a text
        self._begins = False
        self._called: list[tuple[Call | None, str]] = []  # each with its text

    def _read(self, *, final: bool) -> list[Part]:
        parts: list[Part] = []
        while self._text and (found := self._body(final) if self._kind else self._opening(final)) is not None:
            parts += found
        if final and self._called:
            self.calls = [call for call, _ in self._called if call]
            if len(self.calls) < len(self._called):
                self.calls = []
                parts.append(Part("content", "".join(text for _, text in self._called)))
            self._called = []
        return parts

    def _opening(self, final: bool) -> list[Part] | None:
        """Read a header."""
        at = self._text.find("<|message|>")
        if at < 0:
            return [Part("content", _unmarked(self._take(len(self._text))))] if final else None
        self._header, self._begins = self._take(at + len("<|message|>")), True
        thinks = re.search(r"<\|channel\|>\s*analysis\b", self._header)
        self._kind = "call" if "to=" in self._header else "reasoning" if thinks else "content"
        return []

    def _body(self, final: bool) -> list[Part] | None:
        """Read what a message says, up to its end."""
        ends = ((at, mark) for mark in HARMONY_ENDS if (at := self._text.find(mark)) >= 0)
        at, mark = min(ends, default=(len(self._text), ""))
        ended = final or bool(mark)
        if not ended and self._kind != "call":
            at -= max(_overlap(self._text, end) for end in HARMONY_ENDS)
        if not ended and (self._kind == "call" or not at):
            return None
        said, kind = self._take(at), self._kind
        if mark:
            self._take(0 if mark == "<|start|>" else len(mark))
            self._kind = ""
        if kind in ("reasoning", "content"):
            return [self._part(kind, said)]
        name = re.search(r"to=(?:functions\.)?([\w.-]+)", self._header)
        call = call_of(name[1] if name else "", values_of(said), self.tools)
        self._called.append((call, _unmarked(self._header) + said))
        return []

    def _part(self, kind: Literal["reasoning", "content"], text: str) -> Part:
        """A piece of a message; a second message of its kind begins on a line of its own."""
        between = "\n" if text and self._begins and kind in self._said else ""
        if text:
            self._said.add(kind)
            self._begins = False
        return Part(kind, between + text)


def _unmarked(text: str) -> str:
    return re.sub("|".join(map(re.escape, HARMONY)), "", text)


def _nonempty(parts: Iterable[Part]) -> list[Part]:
    return [part for part in parts if part.text]


def _overlap(text: str, mark: str) -> int:
    """Length of the longest end of a text that is a beginning of the mark."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)
