"""From examples to token ids: the structure of the style labels tokens, and long samples are cut."""

import json
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from lit_qlora.data.examples import Example, refusal
from lit_qlora.data.samples import Sample
from lit_qlora.data.tokenized import Tokenized
from lit_qlora.data.unread import Unread
from lit_qlora.prompts.conversation import Conversation, Message
from lit_qlora.prompts.style import STYLES, EncodedTurn, Style, UnwritableError
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import Overlong

Found = TypeVar("Found")
AT_ONCE = 4096  # examples that are encoded together; more is no faster and takes more memory
Fitted = tuple[Conversation, list[EncodedTurn]]
"""A conversation within the limits, and its ids."""
Fitting = Generator[Conversation, list[EncodedTurn], Fitted | None]
"""Yields each shorter conversation that it wants to have encoded."""
Splitting = Generator[Conversation, list[EncodedTurn], list[Fitted]]
"""The same for the beginnings of a conversation."""
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """Settings that make ids of examples, with the names of DataConfig."""

    max_length: int
    max_length_prompt: int | None = None
    max_length_answer: int | None = None
    overlong: Overlong = "truncate_left"
    label_cut_ends: bool = False
    mask_prompt: bool = True
    only_last_answer: bool = False
    split_rewritten: bool = True
    system: str = ""
    on_error: Literal["stop", "skip"] = "stop"


@dataclass
class Counts:
    """Counts of the examples of a source, by their fate."""

    examples: int = 0
    skipped: int = 0
    """Records that could not be read, or not be written in the style."""
    turns: int = 0
    ended: int = 0
    """Turns whose answer ends with a token that ends answers."""
    split: int = 0
    """Samples more than conversations, because the chat template rewrites what was said before."""
    untaught: int = 0
    """Answers without labels, because the chat template writes them differently once the conversation goes on."""
    light: int = 0
    """Answers whose loss is multiplied by less than 1, but by more than 0."""
    begun: int = 0
    """Answers that do not begin as the chat template asks for them."""
    rewritten: int = 0
    """Answers before which the chat template writes something else when it asks for them."""
    unthought: int = 0
    """Answers without a thought to which the chat template asks with the beginning of one."""
    thoughts: int = 0
    """Answers whose thoughts the chat template leaves out."""
    cut_prompts: int = 0
    cut_turns: int = 0
    """Turns of conversations that were left out because the whole was too long."""
    cut_answers: int = 0
    dropped: int = 0
    """Samples that were left out because they were too long."""
    masked: int = 0
    """Samples that were left out because they have no labelled token."""
    empty_prompts: int = 0
    empty_answers: int = 0
    unpaired: int = 0
    """Records of judged answers that were left out because there is nothing to compare."""
    equal: int = 0
    """Rejected answers that equal the chosen one."""
    control_characters: int = 0
    """Samples with NUL or another character that no text should hold."""
    control_tokens: int = 0
    """Samples whose text holds the name of a control token; it is encoded as text."""

    def __add__(self, other: "Counts") -> "Counts":
        """Both together."""
        mine, theirs = asdict(self), asdict(other)
        return Counts(**{name: mine[name] + theirs[name] for name in mine})


@dataclass(frozen=True)
class EncodedSample:
    """A sample, with what the audit wants to know of it."""

    sample: Sample
    length: int
    """Tokens before anything was cut."""
    digest: int
    """64 bits of a hash of all that was said."""
    joined: bool = False
    """It is of the same conversation as the sample before it."""
    example: Example | None = None
    """The example that it is of."""
    side: int = 0
    """Of a judged answer; see data.comparisons. 0 for other samples."""
    margin: float = 0.0
    """Of a chosen answer: how much better it is."""


class Encoder:
    """Encodes examples in one style, under one set of limits; counts as it goes."""

    def __init__(self, tokenizer: Tokenizer, style: Style, encoding: Encoding) -> None:
        self.tokenizer, self.style, self.encoding = tokenizer, style, encoding
        self.counts, self.unread = Counts(), Unread()
        self.stops = style.stop_ids(tokenizer) | {tokenizer.eos_id}
        self.limited = encoding.max_length_prompt is not None or encoding.max_length_answer is not None
        names = "|".join(re.escape(name) for name in tokenizer.control_tokens if name)
        self.names = re.compile(names or "(?!)")

    def encode(self, examples: Sequence[Example]) -> Iterator[EncodedSample]:
        """The samples of these examples, in their order; some examples make none, a long raw text several.

        Raises:
            DataError: if examples are too long and data.overlong is "error", or if the style cannot write some of them.
            CheckpointError: if it cannot write any.
        """
        complaints: list[str] = []
        advice: dict[str, None] = {}  # an ordered set
        before: Example | None = None  # that the last sample is of
        for start in range(0, len(examples), AT_ONCE):
            some = examples[start : start + AT_ONCE]
            said: list[Conversation] = [self._with_system(self._readable(example)) for example in some]
            try:
                encoded = self._encoded(said)
            except UnwritableError as failure:
                if len(failure.reasons) == len(some) and not start:
                    raise  # it is not the data that is wrong
                if self.encoding.on_error == "stop":
                    complaints += [f"{some[i].location}: {why}" for i, why in failure.reasons.items()]
                    advice[f"{failure.advice} Or leave these out with --data.on_error skip."] = None
                self.counts.skipped += len(failure.reasons)
                some = [example for i, example in enumerate(some) if i not in failure.reasons]
                said = [one for i, one in enumerate(said) if i not in failure.reasons]
                encoded = self._encoded(said)
            for one in said if not complaints else ():
                self._count(one)
            some, said, encoded = self._each_as_asked(some, said, encoded)
            lengths = [_length(turns) for turns in encoded]
            long = {i for i, turns in enumerate(encoded) if self._too_long(said[i], turns, lengths[i])}
            fitted: dict[int, Fitted | None] = {}
            if self.encoding.overlong == "error":
                complaints += [f"{some[i].location}: {_length(encoded[i]):,} tokens do not fit" for i in sorted(long)]
                if long:
                    raised = "Raise the limits, or let --data.overlong cut or drop what is too long."
                    advice[f"data.max_length is {self.encoding.max_length}. {raised}"] = None
            elif self.encoding.overlong != "drop":
                fitted = self._side_by_side({i: self._fit(said[i], encoded[i]) for i in long})
            for i, turns in enumerate(encoded if not complaints else ()):
                found = fitted.get(i) if i in long else (said[i], turns)
                if found is None:
                    self.counts.dropped += 1
                elif lengths[i] > self.encoding.max_length and self._is_raw(said[i]):
                    for piece in self._pieces(turns[0]):
                        yield EncodedSample(piece, len(piece.tokens), _hash(piece.tokens.tobytes()))
                elif (sample := self._sample(*found)).labelled:
                    yield EncodedSample(sample, lengths[i], _hash(_said(said[i])), some[i] is before, some[i])
                    before = some[i]
                else:
                    self.counts.masked += 1
        if complaints:
            raise refusal(complaints, "\n       ".join(advice))

    def take(self, rows: Sequence[Tokenized]) -> Iterator[EncodedSample]:
        """The samples of records that are token ids already; what is too long is left out, for nothing can be cut.

        Raises:
            DataError: if there are ids that the tokenizer does not have, or data.overlong is "error" and some are long.
        """
        complaints = []
        for sample, location in rows:
            tokens, count = sample.tokens, len(sample.tokens)
            if not 0 <= tokens.min() <= tokens.max() < self.tokenizer.size:
                wrong = next(int(token) for token in tokens if not 0 <= token < self.tokenizer.size)
                complaints.append(f"{location}: 'input_ids' has {wrong}, the tokenizer {self.tokenizer.size} tokens")
            elif count > self.encoding.max_length and self.encoding.overlong == "error":
                complaints.append(f"{location}: {count:,} tokens do not fit into {self.encoding.max_length}")
            self.counts.examples += 1
            if count > self.encoding.max_length:
                self.counts.dropped += 1
            elif not sample.labelled:
                self.counts.masked += 1
            else:
                self.counts.turns += 1
                self.counts.ended += int(tokens[np.flatnonzero(sample.trained)[-1]]) in self.stops
                yield EncodedSample(sample, count, _hash(tokens.tobytes()))
        if complaints:
            raise refusal(complaints)

    def _readable(self, example: Example) -> Example:
        """The example without what the style does not write, which is remembered."""
        found = self.style.unread(example)
        for name, value in found.items():
            self.unread.add(name, example.location, value)
        return example.without(found) if found else example

    def _with_system(self, example: Example) -> Conversation:
        if not self.encoding.system or example.system is not None or self._is_raw(example):
            return example
        return replace(example, messages=(Message("system", self.encoding.system), *example.messages))

    def _is_raw(self, said: Conversation) -> bool:
        """Tell if this is a text without a prompt, which is not the same as a prompt that is empty."""
        return len(said.messages) == 2 and not said.messages[0].text and not said.input and self.style == STYLES["text"]

    def _count(self, said: Conversation) -> None:
        counts = self.counts
        counts.examples += 1
        texts = [said.input]
        unasked = unanswered = False
        for role, content, keys, _ in said.messages:
            texts.append(content or "")
            if not texts[-1].strip():
                unasked |= role == "user"
                unanswered |= role == "assistant" and "tool_calls" not in keys
        counts.empty_prompts += unasked and not said.input.strip() and not self._is_raw(said)
        counts.empty_answers += unanswered
        counts.control_characters += any(map(CONTROL.search, texts))
        counts.control_tokens += any(map(self.names.search, texts))

    def _sample(self, said: Conversation, turns: list[EncodedTurn]) -> Sample:
        tokens: list[int] = []
        trained = np.zeros(_length(turns), np.bool_)  # in half the time of np.full
        if not self.encoding.mask_prompt:
            trained[:] = True
        light: list[tuple[slice, float]] = []  # what weighs less than 1
        hides = False  # whether the next prompt holds an answer that is not labelled
        for i, (message, turn) in enumerate(zip(said.answers, turns, strict=True)):
            prompt, answer, remarks = turn
            learn = message.weight > 0 and (i == len(turns) - 1 or not self.encoding.only_last_answer)
            if not prompt and not answer:  # it is part of the last prompt
                self.counts.untaught += learn and self.encoding.mask_prompt
                hides |= not learn
                continue
            if hides:
                trained[len(tokens) : len(tokens) + len(prompt)] = False
            tokens += [*prompt, *answer]
            here = slice(len(tokens) - len(answer), len(tokens))
            trained[here] = learn
            if "cut" in remarks and answer[-1] in self.stops and not self.encoding.label_cut_ends:
                trained[here.stop - 1] = False  # the answer went on
            if learn and message.weight < 1:
                light.append((here, message.weight))
                self.counts.light += 1
            if not learn and len(said.answers) > 1:
                continue
            self.counts.turns += 1
            self.counts.ended += bool(answer) and (answer[-1] in self.stops or "followed" in remarks)
            if remarks:
                self.counts.unthought += "unthought" in remarks
                self.counts.begun += "begun" in remarks
                self.counts.rewritten += "rewritten" in remarks
                self.counts.thoughts += "thoughts" in remarks
        trained[:1] = False  # nothing predicts the first token
        return Sample(np.array(tokens, np.int32), trained, _weights(trained, light) if light else None)

    @property
    def _as_asked(self) -> bool:
        """True if answers are labelled behind the prompts that ask for them, not as parts of a whole."""
        return self.encoding.split_rewritten and self.encoding.mask_prompt

    def _encoded(self, said: Sequence[Conversation]) -> list[list[EncodedTurn]]:
        return self.style.encode_many(self.tokenizer, said, self._as_asked)

    def _each_as_asked(
        self, some: Sequence[Example], said: Sequence[Conversation], encoded: Sequence[list[EncodedTurn]]
    ) -> tuple[Sequence[Example], list[Conversation], list[list[EncodedTurn]]]:
        """The same, with as many samples of a conversation as it takes to learn each answer behind its own prompt."""
        split = self._as_asked and not self.encoding.only_last_answer
        parts = self._side_by_side(
            {
                i: self._split(said[i], turns)
                for i, turns in enumerate(encoded)
                if split and any(map(_moved, turns[:-1]))
            }
        )
        self.counts.split += sum(len(found) - 1 for found in parts.values())
        whole = [
            (some[i], *one) for i, pair in enumerate(zip(said, encoded, strict=True)) for one in parts.get(i, [pair])
        ]
        examples, conversations, turns = zip(*whole, strict=True) if whole else ((), (), ())
        return examples, list(conversations), list(turns)

    def _split(self, said: Conversation, turns: list[EncodedTurn]) -> Splitting:
        """The fewest beginnings of a conversation that hold each answer as it is asked for, each labelled once."""
        whole = (said, turns)
        left = {i for i, message in enumerate(said.answers) if message.weight > 0}
        parts: list[Fitted] = []
        while left:
            here = left - {i for i, turn in enumerate(turns[:-1]) if _moved(turn)}
            if here:
                parts.append((said.weighing(here), turns))
            left -= here
            if left:
                said = said.up_to_answer(max(left))
                turns = yield said
        return parts[::-1] or [whole]

    def _too_long(self, said: Conversation, turns: list[EncodedTurn], length: int) -> bool:
        """Tell if something has to go; a raw text is taken to pieces instead."""
        if length > self.encoding.max_length:
            return not self._is_raw(said)
        return self.limited and any(map(self._exceeds, turns))

    def _exceeds(self, turn: EncodedTurn) -> bool:
        prompt, answer = self._limits()
        return (prompt is not None and len(turn[0]) > prompt) or (answer is not None and len(turn[1]) > answer)

    def _history_exceeds(self, turns: list[EncodedTurn]) -> bool:
        """Tell if the last prompt is too long, and the turns before it are part of it."""
        return not any(turns[0]) and len(turns[-1][0]) > (self._limits()[0] or self.encoding.max_length)

    def _limits(self) -> tuple[int | None, int | None]:
        return self.encoding.max_length_prompt, self.encoding.max_length_answer

    def _pieces(self, turn: EncodedTurn) -> list[Sample]:
        """Raw text in pieces; each begins with the last token of the one before, so that every token is labelled."""
        ids, size = turn[0] + turn[1], self.encoding.max_length
        parts = [ids[at : at + size] for at in range(0, len(ids) - 1, size - 1)]
        self.counts.turns += 1
        self.counts.ended += ids[-1] in self.stops
        return [Sample.of(part, 1) for part in parts]

    # Samples that are too long. First whole turns go, then words of the prompt, then the end of the answer.

    def _fit(self, said: Conversation, turns: list[EncodedTurn]) -> Fitting:
        """The conversation within the limits, or None where nothing of its prompt would be left."""
        limits = self.encoding
        left = limits.overlong == "truncate_left"
        while len(turns) > 1 and (_length(turns) > limits.max_length or self._history_exceeds(turns)):
            said = (said.without_first_turns() if left else None) or said.without_last_turn()
            self.counts.cut_turns += len(turns) - len(said.answers)
            turns = yield said
        cut = False
        for i in range(len(turns)):
            room = self._room(turns, i)
            while len(turns[i].prompt) > room:
                shorter = self._shorten(said, i, len(turns[i].prompt) - room, left)
                if shorter is None:
                    return None
                said, cut = shorter, True
                turns = yield said
        self.counts.cut_prompts += cut
        fitted = [self._cut_answer(turn, self._answer_room(turns, i)) for i, turn in enumerate(turns)]
        self.counts.cut_answers += any(len(new[1]) < len(old[1]) for new, old in zip(fitted, turns, strict=True))
        return said, fitted

    def _side_by_side(
        self, fittings: Mapping[int, Generator[Conversation, list[EncodedTurn], Found]]
    ) -> dict[int, Found]:
        """Run all to their ends in rounds. Each round encodes at once all conversations that they ask for."""
        results: dict[int, Found] = {}
        answers: dict[int, Any] = dict.fromkeys(fittings)  # None begins
        while answers:
            wanted: dict[int, Conversation] = {}
            for i, answer in answers.items():
                try:
                    wanted[i] = fittings[i].send(answer)
                except StopIteration as end:
                    results[i] = end.value
            encoded = self._encoded(list(wanted.values())) if wanted else []
            answers = dict(zip(wanted, encoded, strict=True))
        return results

    def _room(self, turns: list[EncodedTurn], i: int) -> int:
        """Count the tokens that prompt `i` may have. It gives way to the answer, but only down to half of the whole."""
        limit, answer_limit = self._limits()
        room = limit or self.encoding.max_length
        if len(turns) == 1:
            answer = min(len(turns[0][1]), answer_limit or len(turns[0][1]))
            room = min(room, max(self.encoding.max_length - answer, self.encoding.max_length // 2))
        return room

    def _answer_room(self, turns: list[EncodedTurn], i: int) -> int:
        limit = self.encoding.max_length_answer or self.encoding.max_length
        return limit if len(turns) > 1 else min(limit, self.encoding.max_length - len(turns[0][0]))

    def _cut_answer(self, turn: EncodedTurn, room: int) -> EncodedTurn:
        """The turn whose answer has lost its end, but not the token that ends it."""
        answer = turn.answer
        if len(answer) <= room:
            return turn
        cut = [*answer[: room - 1], answer[-1]] if answer[-1] in self.stops else answer[:room]
        return turn._replace(answer=cut, remarks=turn.remarks | {"cut"})

    def _shorten(self, said: Conversation, i: int, excess: int, left: bool) -> Conversation | None:
        """The conversation with at least one token less of the longest text in prompt `i`, or of the input."""
        at = said.longest_of_prompt(i)
        message = said.messages[at]
        of_input = i == 0 and len(said.input) > len(message.text)
        text = said.input if of_input else message.text
        ids = self.tokenizer.encode(text, bos=False)
        while ids and (keep := len(ids) - excess) > 0:
            shorter = self.tokenizer.decode(ids[-keep:] if left else ids[:keep]).strip("\ufffd")
            if not shorter.strip():
                break
            if len(shorter) < len(text):
                if of_input:
                    return replace(said, input=shorter)
                before, after = said.messages[:at], said.messages[at + 1 :]
                return replace(said, messages=(*before, message._replace(content=shorter), *after))
            excess += 1
        if of_input and message.text.strip():
            return replace(said, input="")
        return None


def _moved(turn: EncodedTurn) -> bool:
    """Tell if an answer stands behind another prompt than it is asked with, or is part of the next prompt."""
    return "elsewhere" in turn.remarks or not (turn.prompt or turn.answer)


def _length(turns: Sequence[EncodedTurn]) -> int:
    length = 0
    for prompt, answer, _ in turns:  # in half the time of a sum
        length += len(prompt) + len(answer)
    return length


def _weights(trained: npt.NDArray[np.bool_], light: Sequence[tuple[slice, float]]) -> npt.NDArray[np.float32]:
    """Return the weight of each token: 1 if it is labelled, less in answers that weigh less, else 0."""
    weights = trained.astype(np.float32)
    for here, weight in light:
        weights[here] *= weight
    return weights


def _hash(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _said(said: Conversation) -> bytes:
    texts = [said.input, *(text for message in said.messages for text in (message.role, message.content or ""))]
    if not said.plain:
        texts.append(json.dumps([dict(said.variables), [dict(message.keys) for message in said.messages]], default=str))
    return "\0".join(texts).encode("utf-8", "surrogatepass")
