"""Records of judged answers: which answer to a prompt is the better one, or if an answer is good."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np

from lit_qlora.data.comparisons import CHOSEN, REJECTED
from lit_qlora.data.encode import EncodedSample, Encoder
from lit_qlora.data.examples import LOOKED_AT, NOWHERE, Example, refusal
from lit_qlora.data.formats import BESIDE, marked
from lit_qlora.data.messages import ROLES, conversation_of, names_of, system_of, text_of, variables_of
from lit_qlora.data.sources import Source, read_records
from lit_qlora.data.unread import Unread
from lit_qlora.errors import DataError, UsageError, did_you_mean
from lit_qlora.prompts.conversation import Conversation, Message
from lit_qlora.settings import DataConfig

Fields = Mapping[str, Any]
PROMPTS = ("prompt", "question", "instruction")
"""Names of the column with the prompt."""


class Judged(NamedTuple):
    """Answers to a prompt."""

    answers: tuple[Conversation, ...]
    """Each with its prompt: the chosen one and the rejected ones, or a single one."""
    good: bool | None = None
    """Of a single answer; None where answers are compared."""
    margin: float = 0.0
    """The amount by which the chosen answer is better."""
    location: str = ""


@dataclass(frozen=True)
class JudgedFormat:
    """A row of JUDGED; see data.formats.Format."""

    needs: tuple[str, ...]
    read: Callable[[Fields], Judged]
    begins: str = ""
    reads: tuple[str, ...] = (*BESIDE, "margin")
    leaves: tuple[str, ...] = ()
    gather: None = None
    chosen: bool = False


def compared(prompt: str) -> Callable[[Fields], Judged]:
    """Read a prompt and the two answers to it: texts or messages, several rejected ones as a list of these."""

    def read(record: Fields) -> Judged:
        rejected = record.get("rejected")
        several = isinstance(rejected, list) and bool(rejected) and isinstance(rejected[0], list | str)
        each = [{**record, "rejected": one} for one in rejected] if several and rejected else [record]
        chosen = answered(record, prompt, "chosen")
        return Judged((chosen, *(answered(one, prompt, "rejected") for one in each)), margin=margin_of(record))

    return read


def conversations(record: Fields) -> Judged:
    """Read two conversations with the same beginning."""
    return Judged((_whole(record, "chosen"), _whole(record, "rejected")), margin=margin_of(record))


def marked_conversations(record: Fields) -> Judged:
    """Read two conversations in texts with the marks of Anthropic's helpful and harmless dialogues."""
    sides = ("chosen", "rejected")
    return Judged(tuple(marked(side, "\n\nHuman:", "\n\nAssistant:")(record) for side in sides))


def labelled(prompt: str, answer: str) -> Callable[[Fields], Judged]:
    """Read an answer and if it is good."""

    def read(record: Fields) -> Judged:
        said = _whole(record, answer) if answer == prompt else answered(record, prompt, answer)
        return Judged((said,), good=label_of(record))

    return read


def answered(record: Fields, prompt: str, answer: str) -> Conversation:
    """The conversation of a prompt, text or messages, and an answer to it, text or messages or all of it again.

    Raises:
        DataError: if the answer repeats the conversation with another prompt.
    """
    asked, said = record.get(prompt), record.get(answer)
    if isinstance(asked, str) and isinstance(said, str):
        material = text_of(record, "input", optional=True) if prompt == "instruction" else ""
        system = system_of(record)
        opening = (Message("system", system),) if system is not None else ()
        turn = (Message("user", text_of(record, prompt)), Message("assistant", text_of(record, answer)))
        return Conversation((*opening, *turn), material, variables_of(record))
    before = asked if isinstance(asked, list) else [{"role": "user", "content": text_of(record, prompt)}]
    after = said if isinstance(said, list) else [{"role": "assistant", "content": text_of(record, answer)}]
    if not after or not _is_question(after[0]):
        return conversation_of([*before, *after], record)
    whole = conversation_of(after, record)
    texts = [message.text for message in whole.messages[:-1] if message.role == "user"]
    asks = [one for one in before if isinstance(one, dict) and _is_question(one)]
    wanted = [str(one.get("content", one.get("value"))) for one in asks]
    if not set(wanted) & set(texts):
        raise DataError(f"{answer!r} is a conversation without what {prompt!r} asks")
    return whole


def _is_question(message: Any) -> bool:
    """Tell if a message begins a conversation, so that it cannot be an answer."""
    role = str(message.get("role", message.get("from"))).lower() if isinstance(message, dict) else ""
    return ROLES.get(role) in ("user", "system", "developer")


def _whole(record: Fields, column: str) -> Conversation:
    value = record.get(column)
    if not isinstance(value, list):
        raise DataError(f"{column!r} is {'null' if value is None else type(value).__name__}, not a list of messages")
    return conversation_of(value, record)


def margin_of(record: Fields) -> float:
    """Read how much better the chosen answer is; 0 if the record does not say."""
    value = record.get("margin")
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise DataError(f"'margin' is {value!r}, not a number from 0 on")
    return float(value)


def label_of(record: Fields) -> bool:
    """Tell if an answer is good."""
    value = record.get("label")
    known = {"true": True, "false": False, "1": True, "0": False}
    found = known.get(str(value).lower())
    if found is None:
        raise DataError(f"'label' is {value!r}, neither true nor false")
    return found


JUDGED: dict[str, JudgedFormat] = {
    "preference": JudgedFormat(("prompt", "chosen", "rejected"), compared("prompt")),
    "preference-question": JudgedFormat(("question", "chosen", "rejected"), compared("question")),
    "preference-instruction": JudgedFormat(
        ("instruction", "chosen", "rejected"), compared("instruction"), reads=(*BESIDE, "margin", "input")
    ),
    "hh-rlhf": JudgedFormat(("chosen", "rejected"), marked_conversations, begins="Human:", reads=()),
    "preference-messages": JudgedFormat(("chosen", "rejected"), conversations),
    "kto": JudgedFormat(("prompt", "completion", "label"), labelled("prompt", "completion"), reads=BESIDE),
    "kto-messages": JudgedFormat(("messages", "label"), labelled("messages", "messages"), reads=BESIDE),
}
"""In the order in which they are tried."""


@dataclass(frozen=True)
class JudgedReading:
    """The content of a source; see data.examples.Reading."""

    judged: list[Judged]
    format: str
    saw: str
    skipped: int
    unread: Unread = field(default_factory=Unread)


def read_judged(source: Source, data: DataConfig) -> JudgedReading:
    """Read all records of judged answers of a source.

    Raises:
        DataError: listing the first few things that are wrong, with their locations, and counting all.
    """
    rest = iter(read_records(source))
    first = list(islice(_to_the_end(rest), LOOKED_AT))
    if not first:
        raise DataError(f"{source} holds no judged answers.")
    name, form = _pick(source.format if data.format == "auto" else data.format, first)
    judged: list[Judged] = []
    unread, complaints, unreadable = Unread(form), list[str](), False
    for location, record in chain(first, _to_the_end(rest)):
        unreadable |= location == NOWHERE
        try:
            judged.append(_read(record, form, "empty_answers" in data.allow)._replace(location=location))
            unread.look(location, record)
        except DataError as error:
            complaints.append(f"{location}: {error}" if location else str(error))
    if complaints and (unreadable or data.on_error == "stop"):
        raise refusal(complaints, "" if unreadable else "Mend them, or leave them out with --data.on_error skip.")
    if not judged:
        raise DataError(f"{source} holds no judged answers that can be read.")
    columns = names_of(next(record for _, record in first if isinstance(record, dict)))
    return JudgedReading(judged, name, f"columns {columns}", len(complaints), unread)


def _to_the_end(records: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The records, and as the last of them the error behind which the source cannot be read on, if there is one."""
    try:
        yield from records
    except DataError as error:
        yield NOWHERE, error


def _pick(name: str, records: Sequence[tuple[str, Any]]) -> tuple[str, JudgedFormat]:
    """The format that the settings name, or the one that the first records have."""
    if name != "auto":
        if name not in JUDGED:
            raise UsageError(
                f"data.format {name!r} is no format of judged answers.{did_you_mean(name, list(JUDGED))} "
                f"Known: {', '.join(JUDGED)}."
            )
        return name, JUDGED[name]
    dicts = [record for _, record in records if isinstance(record, dict)]
    for record in dicts:
        for known, form in JUDGED.items():
            there = all(column in record for column in form.needs)
            if there and str(record[form.needs[0]]).lstrip().startswith(form.begins):
                return known, form
    broken = next((record for _, record in records if isinstance(record, DataError)), None)
    if broken is not None and not dicts:
        raise broken
    raise DataError(
        f"{records[0][0]}: no format of judged answers has the columns "
        f"{names_of(dicts[0]) if dicts else 'nothing'}.\n"
        "Needed are prompt, chosen and rejected, or prompt, completion and label. finetune/lora.py learns from answers "
        "that nobody judged."
    )


def _read(record: Any, form: JudgedFormat, may_be_silent: bool) -> Judged:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        raise DataError(f"expected an object with {', '.join(form.needs)}, found {type(record).__name__}")
    judged = form.read(record)
    for answer in judged.answers:
        said = answer.messages[-1]
        if not may_be_silent and not said.text.strip() and "tool_calls" not in said.keys:
            raise DataError("an answer is empty")
        if any(message.weight not in (0.0, 1.0) for message in answer.answers):
            raise DataError("a message has a weight, and answers that are compared weigh alike")
    return judged


def singly(judged: Iterable[Judged]) -> list[Judged]:
    """Each answer by itself: chosen ones are good, rejected ones bad."""
    return [
        one._replace(answers=(answer,), good=not number if one.good is None else one.good, margin=0.0)
        for one in judged
        for number, answer in enumerate(one.answers)
    ]


def encode_judged(encoder: Encoder, judged: Sequence[Judged]) -> Iterator[EncodedSample]:
    """The samples of judged answers, those of a record one after the other, the chosen one first.

    The last answer of each conversation is labelled. A record loses answers that could not be encoded or equal the
    chosen one. It is left out where nothing is left to compare; the encoder counts both.
    """
    examples = [[_example(answer, one.location) for answer in one.answers] for one in judged]
    found = {id(sample.example): sample for sample in encoder.encode([one for some in examples for one in some])}
    for one, some in zip(judged, examples, strict=True):
        first, *others = (found.get(id(example)) for example in some)
        rejected = [other for other in others if first and other and not _equal(first, other)]
        encoder.counts.equal += sum(bool(first and other and _equal(first, other)) for other in others)
        if first is None or (others and not rejected):
            encoder.counts.unpaired += 1
            continue
        side = REJECTED if one.good is False else CHOSEN
        yield replace(first, joined=False, example=None, side=side, margin=one.margin)
        for other in rejected:
            yield replace(other, joined=True, example=None, side=REJECTED)


def _equal(one: EncodedSample, other: EncodedSample) -> bool:
    return np.array_equal(one.sample.tokens, other.sample.tokens)


def _example(answer: Conversation, location: str) -> Example:
    last = answer.weighing({len(answer.answers) - 1})
    return Example(last.messages, last.input, last.variables, location)
