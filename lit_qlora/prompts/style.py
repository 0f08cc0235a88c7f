"""Make ids of conversations: prompts, which are given, and answers, which the model learns to say.

A style writes a conversation as pieces, text and control tokens, and knows from its own structure which of them are
the answers. Training, generation, chat and evaluation all encode through it, so their ids are the same. The style that
an adapter was trained with travels with it, and with the merged checkpoint, in prompt_style.json.
"""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from lit_qlora.errors import CheckpointError, UsageError, did_you_mean
from lit_qlora.files.reading import parse_json, read_json
from lit_qlora.prompts import wordings
from lit_qlora.prompts.answer_parts import PLAIN, Decodes, MarkedText, Notation, Reader
from lit_qlora.prompts.calls import MARKS, Tool
from lit_qlora.prompts.chat_template import Guard, How, RenderedTurn, Renderer, find_chat_template, with_defaults
from lit_qlora.prompts.chat_template import Message as Rendered
from lit_qlora.prompts.conversation import OPENING, REASONING, Conversation, Message, prompt_of
from lit_qlora.prompts.pieces import BOS, EOS, Control, Nameless, Piece, Vocabulary, as_one_text, encode_pieces
from lit_qlora.prompts.template_words import TemplateWords
from lit_qlora.prompts.wordings import Wording
from lit_qlora.settings import PromptKnobs

FILE_NAME = "prompt_style.json"
TEMPLATE = "template"
"""The name of the style that is the tokenizer's own chat template."""
KNOBS = "knobs"
"""The name of the style that PromptKnobs describe."""
READ_BACK = 16
"""Ids at the end of a prompt that hold the beginning of a thought, if there is one."""
RENDERED_AT_ONCE = 2**23  # characters; one may take twelve bytes in JSON, and several copies are made
Remark = Literal["begun", "rewritten", "elsewhere", "unthought", "thoughts", "followed", "cut"]
"""Of an answer: it does not begin as the template asks for it; what comes before it is another text when the template
asks for it; it is another text in the conversation that ends with it; it has no thought, though its prompt begins one;
the template leaves out its thoughts; nothing ends it, but a control token follows; its end was cut."""


class WrittenTurn(NamedTuple):
    """A prompt and its answer, in pieces; both are empty where the answer is part of the next prompt."""

    prompt: list[Piece]
    answer: list[Piece]
    remarks: frozenset[Remark] = frozenset()
    asked: list[Piece] | None = None
    """All that a model is asked the answer with, if that is not what comes before it."""


class EncodedTurn(NamedTuple):
    """Ids of a prompt and of its answer."""

    prompt: list[int]
    answer: list[int]
    remarks: frozenset[Remark] = frozenset()


class UnwritableError(CheckpointError):
    """A style cannot write some of the conversations that it was given."""

    def __init__(self, reasons: Mapping[int, str], fitting: Sequence[str]) -> None:
        self.reasons = reasons
        """For each of them, by its number."""
        self.advice = (
            f"Take --data.prompt {' or '.join(fitting[:3])}."
            if fitting
            else "Take --data.prompt template with a checkpoint whose chat template writes all of it."
        )
        reason = next(iter(reasons.values()))
        super().__init__(f"{reason[:1].upper()}{reason[1:]}.\n{self.advice}")


class Style(ABC):
    """A way to write conversations.

    Attributes:
        name: as in --data.prompt.
        gap, tail: text that an answer has around it, such as a space, and that is not part of what was said.
    """

    name: str
    gap: str
    tail: str

    @abstractmethod
    def write(
        self, tokenizer: Vocabulary, conversations: Sequence[Conversation], as_asked: bool = False
    ) -> list[list[WrittenTurn]]:
        """The turns of each conversation, one for each answer; an answer ends with what ends it.

        Args:
            as_asked: the last answer stands behind the text that a model is asked it with; so do others, unless they
                are "elsewhere". Otherwise all is as the style writes the whole conversation.

        Raises:
            UnwritableError: if the style has no words for some of them.
        """

    @abstractmethod
    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[list[Piece]]:
        """All that a model answers the last message to, in parts that are encoded one by one.

        Raises:
            UnwritableError: if the style has no words for it.
        """

    @abstractmethod
    def reads(self, name: str, of_message: bool, value: Any) -> bool:
        """Tell if the style writes this key of a message, or this variable of a conversation.

        Args:
            value: that it has.
        """

    def with_variables(self, variables: Mapping[str, Any]) -> "Style":
        """The style, with these variables of its chat template where a conversation does not say them.

        Raises:
            UsageError: for variables that it does not use.
        """
        if variables:
            raise UsageError(f"The prompt style {self.name} is no chat template and has no {', '.join(variables)}.")
        return self

    @property
    def notation(self) -> Notation:
        """The way in which answers have thoughts and calls in them."""
        return PLAIN

    def decoder(self, tokenizer: Decodes) -> MarkedText:
        """Decode answers for `reader`: with the control tokens by which the style tells their parts from each other."""
        return MarkedText(tokenizer, self.notation.marks)

    def reader(self, tokenizer: Decodes, prompt: Sequence[int], tools: Iterable[Tool] = ()) -> Reader:
        """Take an answer apart into thoughts, words and calls of these tools.

        Args:
            prompt: its ids, which may end with the beginning of a thought.
        """
        begins = self.decoder(tokenizer).decode(prompt[-READ_BACK:]) if self.notation.thought else ""
        return self.notation.reader(tools, begun=self.notation.begins_thought(begins))

    @property
    @abstractmethod
    def text(self) -> str:
        """The style as a text; any change of it is a change of the style."""

    @property
    def digest(self) -> str:
        """Sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """Return the content of prompt_style.json."""
        return {"style": self.name, "text": self.text, "sha256": self.digest}

    def unread(self, conversation: Conversation) -> dict[str, Any]:
        """The keys of messages and the variables that the style does not write, each with a value of it."""
        if conversation.plain:
            return {}
        found = {name: value for name, value in conversation.variables.items() if not self.reads(name, False, value)}
        for message in reversed(conversation.messages):
            found |= {name: value for name, value in message.keys.items() if not self.reads(name, True, value)}
        return found

    def encode_many(
        self, tokenizer: Vocabulary, conversations: Sequence[Conversation], as_asked: bool = False
    ) -> list[list[EncodedTurn]]:
        """The turns of each conversation in ids; see write."""
        written = self.write(tokenizer, conversations, as_asked)
        encoded = encode_pieces(tokenizer, [[part for turn in turns for part in turn[:2]] for turns in written])
        return [
            [
                EncodedTurn(prompt, answer, turn.remarks)
                for prompt, answer, turn in zip(parts[::2], parts[1::2], turns, strict=True)
            ]
            for parts, turns in zip(encoded, written, strict=True)
        ]

    def encode_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[int]:
        """Ids of all that the model answers to, with BOS where the model uses it.

        Raises:
            UsageError: if the conversation has tools or thoughts that the style does not write.
            UnwritableError: as write_prompt.
        """
        left_out = REASONING if self.notation.thought else ()  # such a template has no words for the thoughts of before
        if unread := self.unread(conversation).keys() & MEANT - {*left_out}:
            raise UsageError(f"The prompt style {self.name} does not write {', '.join(sorted(unread))}.")
        parts = encode_pieces(tokenizer, [self.write_prompt(tokenizer, conversation)])[0]
        return [i for part in parts for i in part]

    def encode_answer(self, tokenizer: Vocabulary, answer: str) -> list[int]:
        """Ids of the answer with the token that ends it; what the model learns to say."""
        return self.encode_many(tokenizer, [Conversation.of(("a", answer))])[0][0].answer

    def stop_ids(self, tokenizer: Vocabulary) -> frozenset[int]:
        """Ids that end an answer in this style."""
        last = self.encode_answer(tokenizer, "a")[-1]
        return frozenset({last} & {tokenizer.eos_id, *tokenizer.control_tokens.values()})

    def render(self, instruction: str, input: str = "", system: str | None = None) -> str:
        """The prompt as a person reads it, control tokens by their names."""
        parts = self.write_prompt(Nameless(), prompt_of(instruction, input, system))
        pieces = (piece for part in parts for piece in part)
        return "".join(piece if isinstance(piece, str) else "" if piece == BOS else piece.name for piece in pieces)

    def as_text(self, tokenizer: Vocabulary, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages as one text, behind which the model goes on; control tokens by their names.

        For programs that know texts only, such as lm-eval: in it nothing tells control tokens from what users typed.

        Args:
            messages: {"role": ..., "content": ...} of a system, if there is one, then of user and assistant in turn.
                If an assistant is the last, its text goes on.

        Raises:
            UsageError: if they come in another order.
        """
        said = [Message(message["role"], message["content"]) for message in messages]  # type: ignore[arg-type]
        roles = [message.role for message in said]
        spoken = roles[roles[:1] == ["system"] :]
        if spoken != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))] or not spoken:
            raise UsageError(f"The style {self.name} has no words for messages of {', '.join(roles) or 'nobody'}.")
        begun = self.gap + said.pop().text if roles[-1] == "assistant" else ""
        parts = self.write_prompt(tokenizer, Conversation(tuple(said)))
        return as_one_text(tokenizer, [piece for part in parts for piece in part]) + begun

    def said(self, text: str) -> str:
        """Return the text of a decoded answer: `text` without gap and tail."""
        return text.removeprefix(self.gap).removesuffix(self.tail)


@dataclass(frozen=True)
class WordedStyle(Style):
    """A style whose words stand in lit_qlora.prompts.wordings."""

    name: str
    wording: Wording = field(repr=False, compare=False)
    knobs: PromptKnobs | None = None

    @property
    def gap(self) -> str:  # type: ignore[override]
        """See Style."""
        return self.wording.gap

    @property
    def tail(self) -> str:  # type: ignore[override]
        """See Style."""
        return self.wording.tail

    def write(
        self, tokenizer: Vocabulary, conversations: Sequence[Conversation], as_asked: bool = False
    ) -> list[list[WrittenTurn]]:
        """See Style."""
        written: list[list[WrittenTurn]] = []
        reasons: dict[int, str] = {}
        for i, conversation in enumerate(conversations):
            turns = self.turns_of(conversation)
            if isinstance(turns, str):
                reasons[i] = turns
            else:
                written.append(turns)
        if reasons:
            raise UnwritableError(reasons, fitting_styles(tokenizer, [conversations[i] for i in reasons]))
        return written

    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[list[Piece]]:
        """See Style."""
        answered = replace(conversation, messages=(*conversation.messages, Message("assistant", "")))
        (turns,) = self.write(tokenizer, [answered])
        return [part for turn in turns for part in turn[:2]][:-1]

    def reads(self, name: str, of_message: bool, value: Any) -> bool:
        """See Style."""
        return False

    @property
    def text(self) -> str:
        """See Style."""
        turn = ("{instruction}", "{answer}")
        lines = []
        for turns in self.write(
            Nameless(), [Conversation.of(turn, turn, system="{system}", input="{input}"), Conversation.of(turn)]
        ):
            pieces = [piece for turn in turns for part in turn[:2] for piece in part]
            lines.append("".join(piece if isinstance(piece, str) else piece.name for piece in pieces))
        return "\n\n\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """See Style."""
        return super().facts() | ({"knobs": asdict(self.knobs)} if self.knobs else {})

    def turns_of(self, conversation: Conversation) -> list[WrittenTurn] | str:
        """The turns of a conversation, or why the style has no words for it."""
        input, system, asked = conversation.input, None, None
        turns: list[WrittenTurn] = []
        for role, content, *_ in conversation.messages:
            if role == "assistant" and asked is not None:
                prompt = self.wording.prompt(asked, input, system, not turns)
                turns.append(WrittenTurn(list(prompt), self._answer(content or "")))
                input, system, asked = "", None, None
            elif role == "user" and asked is None:
                asked = content or ""
            elif role in OPENING and not turns and system is asked is None:
                system = content or ""
            else:
                return f"the prompt style {self.name} has no words for a message of {role} at this point"
        return turns

    def _answer(self, answer: str) -> list[Piece]:
        return [self.gap + answer + self.tail, *([self.wording.end] if self.wording.end else [])]


@dataclass(frozen=True)
class TemplateStyle(Style):
    """The chat template of a tokenizer."""

    source: str = field(repr=False)
    name: str = TEMPLATE
    gap: str = ""
    tail: str = ""
    _renderer: list[Renderer] = field(default_factory=list, init=False, repr=False, compare=False)
    """The process that renders, once there was something to render."""

    @cached_property
    def notation(self) -> Notation:
        """See Style."""
        return Notation.of(_without_comments(self.source))

    def stop_ids(self, tokenizer: Vocabulary) -> frozenset[int]:
        """See Style. A call may end otherwise than words do."""
        function = {"name": "f", "arguments": {"a": "b"}}
        called = Message(
            "assistant", "", {"tool_calls": [{"id": "abcdefghi", "type": "function", "function": function}]}
        )
        tool = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
        said = Conversation((Message("user", "a"), called), variables={"tools": [tool]})
        try:
            last = self.encode_many(tokenizer, [said])[0][0].answer[-1]
        except UnwritableError:
            return super().stop_ids(tokenizer)
        inner = {tokenizer.control_tokens.get(name) for name in MARKS}
        ends = {tokenizer.eos_id, *tokenizer.control_tokens.values()} - inner
        return super().stop_ids(tokenizer) | ({last} & ends)

    @property
    def text(self) -> str:
        """See Style."""
        return self.source

    def write(
        self, tokenizer: Vocabulary, conversations: Sequence[Conversation], as_asked: bool = False
    ) -> list[list[WrittenTurn]]:
        """See Style.

        A template with {% generation %} marks the labelled text itself. With any other, each turn is rendered without
        and with its answer. The answer is the rest of the second text, up to the last control token, which ends it.
        A template may write answers differently once the conversation goes on: some leave out earlier thoughts. Such
        an answer is part of the next prompt, which the model will read, and its own turn is empty.

        Raises:
            CheckpointError: if the template cannot be run.
            UnwritableError: if it refuses conversations, leaves out an answer, or writes the beginning of a
                conversation differently once it goes on. In the last case nothing tells prompt from answer.
        """
        return self._write(tokenizer, conversations, "asked turns" if as_asked else "turns")

    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[list[Piece]]:
        """See Style."""
        # The last prompt is written as training writes it, with some answer behind it, which is then left out.
        answered = conversation
        if not self._is_marked:
            answered = replace(conversation, messages=(*conversation.messages, Message("assistant", "a")))
        (turns,) = self._write(tokenizer, [answered], "turns", is_prompt=True)
        *before, last = turns
        return [[*last.asked]] if last.asked else [*(part for turn in before for part in turn[:2]), last.prompt]

    def reads(self, name: str, of_message: bool, value: Any) -> bool:
        """See Style. Thoughts go under whichever key the template reads, or into answers whose prompt begins one."""
        if of_message and name in REASONING:
            return bool(self._words.reasoning) or self.notation.begins_thought(self._words.opening)
        return self._words.reads(name, of_message, value)

    def with_variables(self, variables: Mapping[str, Any]) -> "TemplateStyle":
        """See Style. The source begins with them, so all programs that read it take them too."""
        variables = json.loads(json.dumps(dict(variables), default=str))  # YAML has dates
        if taken := sorted(variables.keys() & GIVEN):
            raise UsageError(f"The template variable {taken[0]} is no setting: the command gives it.")
        unread = [name for name, value in variables.items() if not self.reads(name, False, value)]
        if unread:
            words = sorted({*re.findall(r"[^\W\d]\w*", self._code)})
            hint = did_you_mean(unread[0], words)
            raise UsageError(f"The chat template does not use the variable {', '.join(unread)}.{hint}")
        return TemplateStyle(with_defaults(self.source, variables)) if variables else self

    @cached_property
    def _code(self) -> str:
        """The statements and expressions of the template."""
        return " ".join(re.findall(r"{[{%].*?(?:[%}]}|\Z)", _without_comments(self.source), re.DOTALL))

    @cached_property
    def _is_marked(self) -> bool:
        """True if the template itself marks the labelled text."""
        return re.search(r"{%[-+]?\s*generation\b", self._code) is not None

    @cached_property
    def _words(self) -> TemplateWords:
        """The names that the template has for the contents of messages."""
        return TemplateWords(lambda trials: self._running().try_all(trials))

    def _write(
        self, tokenizer: Vocabulary, conversations: Sequence[Conversation], how: How, is_prompt: bool = False
    ) -> list[list[WrittenTurn]]:
        """The turns; of a prompt the last answer is not looked at, or is to come where the template has marks."""
        if self._is_marked:
            how = "marked prompt" if is_prompt else "marked" if how == "turns" else "asked marked"
        renderer, variables = self._running(), _variables(tokenizer)
        written: list[list[WrittenTurn]] = []
        reasons: dict[int, str] = {}
        for some in _portions(conversations):
            guard = Guard(tokenizer.control_tokens, _texts(some))
            asked = [(self._messages(one, guard), variables | guard.guard_all(one.variables)) for one in some]
            for conversation, found in zip(some, renderer.render_turns(asked, how, guard.marks), strict=True):
                turns = found if isinstance(found, str) else self._turns(guard, found, conversation, is_prompt)
                if isinstance(turns, str):
                    reasons[len(written)] = f"the chat template fails: {turns}"
                    turns = []
                written.append(turns)
        if reasons:
            raise UnwritableError(reasons, fitting_styles(tokenizer, [conversations[i] for i in reasons]))
        return written

    def _running(self) -> Renderer:
        """The process that renders."""
        if not self._renderer:
            self._renderer.append(Renderer(self.source, {}))
        return self._renderer[0]

    def _messages(self, conversation: Conversation, guard: Guard) -> list[Rendered]:
        """The messages as the template reads them."""
        input = conversation.input
        messages: list[Rendered] = []
        for role, content, keys, _ in conversation.messages:
            name: str = getattr(self._words, role) if role in ("tool", "developer") else role
            if input and role == "user":
                content, input = wordings.with_input(content or "", input), ""
            text = None if content is None else guard.guard(content)
            messages.append({"role": name, "content": text, **(guard.guard_all(self._keys(keys)) if keys else {})})
        return messages

    def _keys(self, keys: Mapping[str, Any]) -> dict[str, Any]:
        """Keys of a message under the template's own names."""
        known = self._words.reasoning
        named = {known[0] if key in REASONING and key not in known and known else key: keys[key] for key in keys}
        if "tool_calls" in named and self._words.arguments != "any":
            as_text = self._words.arguments == "texts"
            named["tool_calls"] = [_with_arguments(call, as_text) for call in named["tool_calls"]]
        return named

    def _turns(
        self, guard: Guard, texts: Sequence[RenderedTurn | None], conversation: Conversation, is_prompt: bool
    ) -> list[WrittenTurn] | str:
        """The turns in pieces, or why they cannot be told."""
        turns: list[WrittenTurn] = []
        rest = ""
        answers = [*conversation.answers, Message("assistant", "")][: len(texts)]  # the last of a prompt is to come
        for text, message in zip(texts, answers, strict=True):
            if text is None:
                turns.append(WrittenTurn([], []))
                continue
            before, answered, asked, begun, elsewhere = text
            prompt = _pieces(guard, rest + before)
            answer = _pieces(guard, (_last_line(prompt) if begun else "") + answered)
            rest = ""
            if not self._is_marked and answer and isinstance(answer[-1], str) and not answer[-1].strip():
                rest = str(answer.pop())
            if left_out := _left_out(message, answer):
                return f"it leaves out the {left_out} of turn {len(turns) + 1}"
            remarks: set[Remark] = {"begun" if begun else "rewritten"} if asked else set()
            remarks |= {"elsewhere"} if elsewhere else set()
            remarks |= {"unthought"} if self._is_unthought(before, answered) else set()
            remarks |= {"thoughts"} if _has_silent_thoughts(message, answer) else set()
            turns.append(WrittenTurn(prompt, answer, frozenset(remarks), _pieces(guard, asked) if asked else None))
        told = (conversation.system or "").strip()
        if told and not any(
            told in _text(turn.prompt) or (is_prompt and told in _text(turn.asked or ())) for turn in turns
        ):
            return "it leaves out the system message"
        return turns if self._is_marked else _ended(turns)

    def _is_unthought(self, prompt: str, answer: str) -> bool:
        """Tell if an answer ends at once the thought that its prompt begins."""
        thought = self.notation.thought
        return thought is not None and self.notation.begins_thought(prompt) and answer.lstrip().startswith(thought[1])


def _without_comments(template: str) -> str:
    """The template without comments; one without an end, which jinja refuses, ends there."""
    return re.sub(r"{#.*?(?:#}|\Z)", "", template, flags=re.DOTALL)


def _with_arguments(call: Any, as_text: bool) -> Any:
    """A tool call with its arguments as an object, or as a JSON text, as OpenAI has them."""
    function = call.get("function") if isinstance(call, Mapping) else None
    arguments = function.get("arguments") if isinstance(function, Mapping) else None
    if not isinstance(function, Mapping) or arguments is None or isinstance(arguments, str) == as_text:
        return call
    if as_text:
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        try:
            arguments = parse_json(str(arguments), "arguments", strict=True)
        except CheckpointError:
            return call
    return {**call, "function": {**function, "arguments": arguments}}


def _last_line(pieces: list[Piece]) -> str:
    """Take what stands behind the last newline, or the last control token, off the end of a prompt."""
    if not pieces or not isinstance(pieces[-1], str):
        return ""
    head, newline, line = pieces.pop().rpartition("\n")  # type: ignore[union-attr]
    if newline:
        pieces.append(head + newline)
    return line


def _left_out(message: Message, answer: Sequence[Piece]) -> str:
    """Name the part of a message that its answer should hold and lacks altogether; '' if it is all there."""
    text = _text(answer)
    if message.text.strip() and not text.strip():
        return "answer"
    for call in message.keys.get("tool_calls", ()) if message.keys else ():
        function = call.get("function", call) if isinstance(call, Mapping) else {}
        if str(function.get("name", "")) not in text:
            return "tool calls"
    return ""


def _text(pieces: Iterable[Piece]) -> str:
    """The pieces that are text, as one."""
    return "".join(piece for piece in pieces if isinstance(piece, str))


def _has_silent_thoughts(message: Message, answer: Sequence[Piece]) -> bool:
    """Tell if a message has thoughts that are not in its answer."""
    thoughts = [str(message.keys[key]) for key in REASONING if message.keys.get(key)] if message.keys else []
    if "</think>" in message.text:
        thoughts.append(message.text.partition("</think>")[0].rpartition("<think>")[2])
    if not thoughts:
        return False
    said = "".join(piece if isinstance(piece, str) else piece.name for piece in answer)
    return not all(thought.strip() in said for thought in thoughts)


def _ended(turns: Sequence[WrittenTurn]) -> list[WrittenTurn]:
    """The turns with EOS behind answers that nothing ends, neither in themselves nor as the next prompt begins.

    Without it a model would never learn to stop.
    """
    ended: list[WrittenTurn] = []
    follows: Piece | None = None
    for turn in reversed(turns):
        if (turn.prompt or turn.answer) and (not turn.answer or isinstance(turn.answer[-1], str)):
            if isinstance(follows, Control):
                turn = turn._replace(remarks=turn.remarks | {"followed"})
            else:
                turn.answer.append(EOS)
        follows = next(iter((*turn.prompt, *turn.answer)), follows)
        ended.append(turn)
    return ended[::-1]


GIVEN = frozenset({"messages", "add_generation_prompt", "bos_token", "eos_token", "tools", "documents"})
"""Variables that each rendering has anyway."""
MEANT = frozenset({"tools", "documents", "tool_calls", *REASONING})
"""Keys without which a prompt is another one."""
STYLES: dict[str, WordedStyle] = {name: WordedStyle(name, wording) for name, wording in wordings.WORDINGS.items()}


ADVISED = ("chatml", "llama3", "mistral", "gemma", "zephyr", "vicuna", "alpaca")
"""Styles to take instead of one that does not fit; the first that do are advised."""


def fitting_styles(tokenizer: Vocabulary, conversations: Sequence[Conversation]) -> list[str]:
    """The names of styles that write all of these conversations with this tokenizer."""

    def fits(style: WordedStyle) -> bool:
        found = [style.turns_of(conversation) for conversation in conversations]
        pieces = {piece for turns in found if not isinstance(turns, str) for turn in turns for part in turn[:2]
                  for piece in part if isinstance(piece, Control)}  # fmt: skip
        return not any(isinstance(turns, str) for turns in found) and all(
            not piece.required or piece in (BOS, EOS) or piece.name in tokenizer.control_tokens for piece in pieces
        )

    if any(_names_beside_texts(conversation) & MEANT for conversation in conversations):
        return []
    return [name for name in ADVISED if fits(STYLES[name])]


def _names_beside_texts(conversation: Conversation) -> set[str]:
    """The names of all that a conversation has besides texts."""
    return {*conversation.variables, *(key for message in conversation.messages for key in message.keys)}


def find_style(name: str, knobs: PromptKnobs | None = None, directory: Path | None = None) -> Style:
    """The style of this name.

    Args:
        knobs: of the style "knobs".
        directory: whose chat template the style "template" is.

    Raises:
        UsageError: with the nearest name, for a name that does not exist.
        CheckpointError: if there is no chat template.
    """
    if name == TEMPLATE:
        source = find_chat_template(directory) if directory else None
        if source is None:
            raise CheckpointError(f"{directory} has no chat template. Take one of {', '.join(STYLES)}.")
        return TemplateStyle(source)
    if name == KNOBS:
        return knobs_style(knobs or PromptKnobs())
    if name not in STYLES:
        known = [*STYLES, KNOBS, TEMPLATE]
        hint = did_you_mean(name, known)
        raise UsageError(f"data.prompt {name!r} is not a prompt style.{hint} Known: {', '.join(known)}.")
    return STYLES[name]


def knobs_style(knobs: PromptKnobs) -> Style:
    """The style that text and EOS around prompt and answer make."""
    return WordedStyle(KNOBS, wordings.knobs(**asdict(knobs)), knobs)


def read_style(directory: Path) -> Style | None:
    """The style that the checkpoint or adapter in `directory` was made with, else its chat template, if it has one.

    Raises:
        CheckpointError: if prompt_style.json is damaged, or names a style that has changed since.
    """
    path = directory / FILE_NAME
    if not path.is_file():
        source = find_chat_template(directory)
        return TemplateStyle(source) if source is not None else None
    try:
        facts = read_json(path)
        name = str(facts["style"])
        knobs = PromptKnobs(**facts["knobs"]) if "knobs" in facts else None
    except (ValueError, KeyError, TypeError, AttributeError, UsageError, OverflowError):
        raise CheckpointError(f'{path} is not of the form {{"style": "alpaca"}}.') from None
    if name == TEMPLATE and isinstance(facts.get("text"), str):
        style: Style = TemplateStyle(facts["text"])
    elif name in (*STYLES, KNOBS):
        style = find_style(name, knobs)
    else:
        raise CheckpointError(f"{path}: {name!r} is not a prompt style. Known: {', '.join(STYLES)}.")
    if facts.get("sha256", style.digest) != style.digest:
        raise CheckpointError(
            f"{path}: the style {name!r} that this was trained with differs from today's (sha256 "
            f"{str(facts['sha256'])[:12]}..., now {style.digest[:12]}...). Its text is in that file."
        )
    return style


def style_json(style: Style) -> str:
    """Return the text of prompt_style.json."""
    return json.dumps(style.facts(), indent=2, ensure_ascii=False) + "\n"


def _pieces(guard: Guard, text: str) -> list[Piece]:
    return [_control(part) if is_control else part for part, is_control in guard.split(text)]


_control = cache(Control)


def _portions(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """All of them, so many at a time that the process that renders their beginnings needs little memory."""
    start, size = 0, 0
    for end, conversation in enumerate(conversations):
        own = sum(map(len, _texts([conversation]))) * (len(conversation.messages) // 2 + 1)
        if size and size + own > RENDERED_AT_ONCE:
            yield conversations[start:end]
            start, size = end, 0
        size += own
    if conversations:
        yield conversations[start:]


def _texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    """All that was said in conversations, or may be."""
    for conversation in conversations:
        yield conversation.input
        if conversation.variables:
            yield _json(conversation.variables)
        for message in conversation.messages:
            yield message.content or ""
            if message.keys:
                yield _json(message.keys)


def _json(keys: Mapping[str, Any]) -> str:
    return json.dumps(dict(keys), ensure_ascii=False)


def _variables(tokenizer: Vocabulary) -> dict[str, Any]:
    bos, eos = tokenizer.content(tokenizer.bos_id), tokenizer.content(tokenizer.eos_id)
    return {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
