"""How a conversation becomes ids: each turn a prompt, which is given, and an answer, which the model learns to say.

A style writes a conversation as pieces, text and control tokens, and knows from its own structure which of them are
the answer. Training, generation, chat and evaluation all encode through it, so their ids are the same. The style that
an adapter was trained with travels with it, and with the merged checkpoint, in prompt_style.json.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from lit_qlora.errors import CheckpointError, UsageError, did_you_mean
from lit_qlora.prompts import wordings
from lit_qlora.prompts.chat_template import Guard, Renderer, Stages, find_chat_template
from lit_qlora.prompts.pieces import BOS, EOS, Control, Nameless, Piece, Vocabulary, as_one_text, encode_pieces
from lit_qlora.prompts.wordings import Wording
from lit_qlora.settings import PromptKnobs

FILE_NAME = "prompt_style.json"
TEMPLATE = "template"
"""The name of the style that is the tokenizer's own chat template."""
KNOBS = "knobs"
"""The name of the style that PromptKnobs describe."""
RENDERED_AT_ONCE = 2**23  # characters; one may take twelve bytes in JSON, and several copies are made


class Turn(NamedTuple):
    """A prompt and its answer."""

    prompt: str
    answer: str = ""
    trained: bool = True
    """Whether the answer is learnt."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One turn or several."""

    turns: tuple[Turn, ...]
    input: str = ""
    """What the first turn is about, for styles that keep the two apart."""
    system: str = ""
    """What the model is told before all."""

    @property
    def instruction(self) -> str:
        """The first prompt."""
        return self.turns[0].prompt

    @property
    def output(self) -> str:
        """The last answer."""
        return self.turns[-1].answer


DIFFERENTLY = "differently once the conversation goes on"  # as lit_qlora.prompts.template_worker says it
Written = list[tuple[list[Piece], list[Piece]]]
"""(prompt, answer) of each turn, in pieces."""
EncodedTurn = tuple[list[int], list[int]]
"""Ids of a prompt and of its answer."""


class UnwritableError(CheckpointError):
    """A style cannot write some of the conversations that it was given."""

    def __init__(self, reasons: Mapping[int, str]) -> None:
        self.reasons = reasons
        """For each of them, by its number."""
        reason = next(iter(reasons.values()))
        super().__init__(f"The chat template fails: {reason}.\nGive another --data.prompt, such as chatml or alpaca.")


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
    def write(self, tokenizer: Vocabulary, conversations: Sequence[Conversation]) -> list[Written]:
        """Each conversation in pieces; an answer ends with what ends it."""

    @abstractmethod
    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[Piece]:
        """All that the model answers the last prompt to; the last answer is not looked at."""

    @property
    @abstractmethod
    def text(self) -> str:
        """The style as a text, of which any change is a change of the style."""

    @property
    def digest(self) -> str:
        """Sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def facts(self) -> dict[str, Any]:
        """What prompt_style.json holds."""
        return {"style": self.name, "text": self.text, "sha256": self.digest}

    def encode_many(self, tokenizer: Vocabulary, conversations: Sequence[Conversation]) -> list[list[EncodedTurn]]:
        """Ids of each turn of each conversation."""
        written = self.write(tokenizer, conversations)
        encoded = encode_pieces(tokenizer, [[part for turn in turns for part in turn] for turns in written])
        return [list(zip(parts[::2], parts[1::2], strict=True)) for parts in encoded]

    def encode_prompt(
        self,
        tokenizer: Vocabulary,
        instruction: str,
        input: str = "",
        system: str = "",
        history: Sequence[Turn] = (),
    ) -> list[int]:
        """Ids of all that the model answers to, with BOS where the model uses it."""
        conversation = Conversation((*history, Turn(instruction)), input, system)
        return encode_pieces(tokenizer, [[self.write_prompt(tokenizer, conversation)]])[0][0]

    def encode_answer(self, tokenizer: Vocabulary, answer: str) -> list[int]:
        """Ids of the answer with the token that ends it; what the model learns to say."""
        return self.encode_many(tokenizer, [Conversation((Turn("a", answer),))])[0][0][1]

    def stop_ids(self, tokenizer: Vocabulary) -> frozenset[int]:
        """Ids that end an answer in this style."""
        last = self.encode_answer(tokenizer, "a")[-1]
        return frozenset({last} & {tokenizer.eos_id, *tokenizer.control_tokens.values()})

    def render(self, instruction: str, input: str = "", system: str = "") -> str:
        """The prompt as a person reads it, control tokens by their names."""
        pieces = self.write_prompt(Nameless(), Conversation((Turn(instruction),), input, system))
        return "".join(piece if isinstance(piece, str) else "" if piece == BOS else piece.name for piece in pieces)

    def as_text(self, tokenizer: Vocabulary, messages: Sequence[Mapping[str, str]]) -> str:
        """Messages as one text, behind which the model goes on; control tokens by their names.

        For programs that know texts only, such as lm-eval: in it nothing tells control tokens from what users typed.

        Args:
            messages: {"role": ..., "content": ...} of a system, if there is one, then of user and assistant in turn; if
                an assistant is the last, what it says goes on.

        Raises:
            UsageError: if they come in another order.
        """
        spoken = [message["content"] for message in messages]
        roles = [message["role"] for message in messages]
        system = spoken.pop(0) if roles[:1] == ["system"] else ""
        if roles[bool(system) :] != ["user" if i % 2 == 0 else "assistant" for i in range(len(spoken))] or not spoken:
            raise UsageError(f"The style {self.name} has no words for messages of {', '.join(roles) or 'nobody'}.")
        turns = tuple(Turn(*pair) for pair in zip_longest(spoken[::2], spoken[1::2], fillvalue=""))
        begun = self.gap + spoken[-1] if len(spoken) % 2 == 0 else ""
        pieces = self.write_prompt(tokenizer, Conversation(turns, system=system))
        return as_one_text(tokenizer, pieces) + begun

    def said(self, text: str) -> str:
        """What was said in a decoded answer: `text` without gap and tail."""
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

    def write(self, tokenizer: Vocabulary, conversations: Sequence[Conversation]) -> list[Written]:
        """See Style."""
        return [
            [(self._prompt(conversation, i), self._answer(turn.answer)) for i, turn in enumerate(conversation.turns)]
            for conversation in conversations
        ]

    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[Piece]:
        """See Style."""
        last = len(conversation.turns) - 1
        before = [
            piece
            for i, turn in enumerate(conversation.turns[:-1])
            for piece in (*self._prompt(conversation, i), *self._answer(turn.answer))
        ]
        return [*before, *self._prompt(conversation, last)]

    @property
    def text(self) -> str:
        """See Style."""
        two = (Turn("{instruction}", "{answer}"), Turn("{instruction}", "{answer}"))
        whole, bare = Conversation(two, "{input}", "{system}"), Conversation(two[:1])
        lines = []
        for written in self.write(Nameless(), [whole, bare]):
            pieces = [piece for turn in written for part in turn for piece in part]
            lines.append("".join(piece if isinstance(piece, str) else piece.name for piece in pieces))
        return "\n\n\n".join(lines)

    def facts(self) -> dict[str, Any]:
        """See Style."""
        return super().facts() | ({"knobs": asdict(self.knobs)} if self.knobs else {})

    def _prompt(self, conversation: Conversation, i: int) -> list[Piece]:
        first = i == 0
        ask, input, system = conversation.turns[i].prompt, conversation.input, conversation.system
        return list(self.wording.prompt(ask, input if first else "", system if first else "", first))

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

    @property
    def text(self) -> str:
        """See Style."""
        return self.source

    def write(self, tokenizer: Vocabulary, conversations: Sequence[Conversation]) -> list[Written]:
        """See Style.

        Each turn is rendered with and without its answer; the answer is what the second text has more, up to the last
        control token, which ends it. A template may write turns differently once the conversation goes on, as those
        do that leave out earlier thoughts. Then all but the last answer is part of the last prompt, which is what the
        model will read, and the turns before are empty.

        Raises:
            CheckpointError: if the template cannot be run.
            UnwritableError: if it refuses conversations, leaves out an answer, or writes the beginning of an answer
                differently once it goes on, so that what is prompt and what is answer cannot be told.
        """
        variables = _variables(tokenizer)
        if not self._renderer or self._renderer[0].variables != variables:
            self._renderer[:] = [Renderer(self.source, variables)]
        written: list[Written] = []
        reasons: dict[int, str] = {}
        for some in _portions(conversations):
            guard = Guard(tokenizer.control_tokens, _texts(some))
            for conversation, texts in zip(some, self._render([_stages(one, guard) for one in some]), strict=True):
                turns = texts if isinstance(texts, str) else self._turns(guard, texts, conversation)
                if isinstance(turns, str):
                    reasons[len(written)] = turns
                    turns = []
                written.append(turns)
        if reasons:
            raise UnwritableError(reasons)
        return written

    def write_prompt(self, tokenizer: Vocabulary, conversation: Conversation) -> list[Piece]:
        """See Style."""
        # The last prompt is written as training writes it, with some answer behind it, which is then left out.
        *history, last = conversation.turns
        answered = replace(conversation, turns=(*history, last._replace(answer="a")))
        *before, (prompt, _) = self.write(tokenizer, [answered])[0]
        return [*(piece for turn in before for part in turn for piece in part), *prompt]

    def _render(self, conversations: Sequence[Stages]) -> list[list[str] | str]:
        """What each stage adds, or only the last two where an earlier one is written differently later; or why not."""
        added = self._renderer[0].render_stages(conversations)
        again = [i for i, found in enumerate(added) if isinstance(found, str) and DIFFERENTLY in found]
        ends = [(messages, stages[-2:]) for messages, stages in map(conversations.__getitem__, again)]
        for i, found in zip(again, self._renderer[0].render_stages(ends) if ends else (), strict=True):
            added[i] = added[i] if isinstance(found, str) else found
        return added

    def _turns(self, guard: Guard, texts: Sequence[str], conversation: Conversation) -> Written | str:
        """Prompt and answer of each turn, or why that cannot be told; `texts` are both of each of the last turns."""
        first = len(conversation.turns) - len(texts) // 2
        turns: Written = [([], []) for _ in range(first)]
        rest = ""
        for asked, answered, turn in zip(texts[::2], texts[1::2], conversation.turns[first:], strict=True):
            prompt, answer = _pieces(guard, rest + asked), _pieces(guard, answered)
            rest = answer.pop() if answer and isinstance(answer[-1], str) and not answer[-1].strip() else ""  # type: ignore[assignment]
            if turn.answer.strip() and not any(isinstance(piece, str) and piece.strip() for piece in answer):
                return f"it leaves out the answer of turn {len(turns) + 1}"
            if not answer or isinstance(answer[-1], str):  # nothing ends it, so the model would never learn to stop
                answer.append(EOS)
            turns.append((prompt, answer))
        return turns


STYLES: dict[str, WordedStyle] = {name: WordedStyle(name, wording) for name, wording in wordings.WORDINGS.items()}


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
        facts = json.loads(path.read_text(encoding="utf-8"))
        name = str(facts["style"])
        knobs = PromptKnobs(**facts["knobs"]) if "knobs" in facts else None
        if knobs and any(type(value) is not type(getattr(PromptKnobs, name)) for name, value in asdict(knobs).items()):
            raise TypeError
    except (ValueError, KeyError, TypeError, UsageError):
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
    """What prompt_style.json holds."""
    return json.dumps(style.facts(), indent=2, ensure_ascii=False) + "\n"


def _pieces(guard: Guard, text: str) -> list[Piece]:
    return [_control(part) if is_control else part for part, is_control in guard.split(text)]


_control = cache(Control)


def _stages(conversation: Conversation, guard: Guard) -> Stages:
    """The conversation as a template wants it, up to each prompt and up to its answer."""
    messages = [{"role": "system", "content": guard.guard(conversation.system)}] if conversation.system else []
    stages: list[tuple[int, bool]] = []
    for i, turn in enumerate(conversation.turns):
        asked = wordings.with_input(turn.prompt, conversation.input if i == 0 else "")
        messages.append({"role": "user", "content": guard.guard(asked)})
        stages.append((len(messages), True))
        messages.append({"role": "assistant", "content": guard.guard(turn.answer)})
        stages.append((len(messages), False))
    return messages, stages


def _portions(conversations: Sequence[Conversation]) -> Iterator[Sequence[Conversation]]:
    """All of them, so many at a time that the process that renders their beginnings needs little memory."""
    start, size = 0, 0
    for end, conversation in enumerate(conversations):
        own = sum(map(len, _texts([conversation]))) * (len(conversation.turns) + 1)
        if size and size + own > RENDERED_AT_ONCE:
            yield conversations[start:end]
            start, size = end, 0
        size += own
    if conversations:
        yield conversations[start:]


def _texts(conversations: Iterable[Conversation]) -> Iterable[str]:
    for conversation in conversations:
        yield conversation.input
        yield conversation.system
        for turn in conversation.turns:
            yield turn.prompt
            yield turn.answer


def _variables(tokenizer: Vocabulary) -> dict[str, Any]:
    bos, eos = tokenizer.content(tokenizer.bos_id), tokenizer.content(tokenizer.eos_id)
    return {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
