"""From records to examples. Every complaint names its location, and all of them come at once."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path

from lit_qlora.data.formats import Format, pick_format
from lit_qlora.data.readers import Record
from lit_qlora.data.sources import Source, read_records
from lit_qlora.data.tokenized import Tokenized
from lit_qlora.data.unread import Unread
from lit_qlora.errors import DataError
from lit_qlora.prompts.conversation import Conversation

LOOKED_AT = 1000  # records from which the format is recognised
NOWHERE = ""  # the location of an error that names its own, and behind which nothing can be read
SHOWN = 10  # complaints that a message shows; the rest are counted


@dataclass(frozen=True, slots=True)
class Example(Conversation):
    """A conversation of a data set."""

    location: str = ""
    """Its location, e.g. train.jsonl:17, for messages."""


@dataclass(frozen=True)
class Reading:
    """The content of a source."""

    examples: list[Example]
    format: str
    saw: str
    """The sign that the format was recognised by."""
    skipped: int
    """Records that could not be read and were left out."""
    unread: Unread = field(default_factory=Unread)
    """Columns that hold something and were not read."""
    tokenized: list[Tokenized] = field(default_factory=list)
    """Instead of examples: records that are token ids already."""


def read_examples(
    source: Source | Path | str,
    *,
    format: str = "auto",
    columns: str = "",
    templates: tuple[str, str] | None = None,
    skip: bool = False,
    allow: Collection[str] = (),
) -> Reading:
    """Read all examples of a source.

    Args:
        format, columns, templates: as data.format, data.columns, and both of data.template and data.answer_template.
            A data set that is known by name has its format.
        skip: leave out what is wrong instead of refusing everything.
        allow: findings that are no complaints; only "empty_answers" matters here.

    Raises:
        DataError: listing the first few things that are wrong, with their locations, and counting all.
    """
    source = source if isinstance(source, Source) else Source(str(source))
    format = source.format if format == "auto" else format
    rest = _to_the_end(read_records(source))
    first = list(islice(rest, LOOKED_AT))
    name, form, saw = pick_format(format, columns, first, templates)
    records = chain(first, rest)
    examples: list[Example] = []
    tokenized: list[Tokenized] = []
    unread = Unread(form)
    complaints: list[str] = []
    faults: set[str] = set()
    empty, unreadable = 0, False
    for location, record in form.gather(records) if form.gather else records:
        unreadable |= location == NOWHERE
        try:
            said = _conversation(record, form)
            if isinstance(said, Tokenized):
                tokenized.append(said._replace(location=location))
            else:
                if "empty_answers" not in allow and (silent := _silent_turn(said)):
                    empty += 1
                    where = f"in {form.needs[-1]!r}" if form.columns else f"of turn {silent}"
                    raise DataError(f"the answer {where} is empty")
                examples.append(Example(said.messages, said.input, said.variables, location))
            unread.look(location, record)
        except DataError as error:
            faults.add(str(error))
            complaints.append(f"{location}: {error}" if location else str(error))
    if complaints and (unreadable or not skip):
        advice = "" if unreadable else "Mend them, or leave them out with --data.on_error skip."
        if empty == len(complaints):
            advice = "--data.on_error skip leaves them out, --data.allow empty_answers learns to say nothing."
        if len(faults) == 1 and len(complaints) > 1 and not examples and not tokenized:
            complaints = [complaints[0], f"... and {len(complaints) - 1:,} more, each with this fault"]
        raise refusal(complaints, advice)
    if not examples and not tokenized:
        what = f"no samples that can be read: {complaints[0]}" if complaints else "no samples."
        raise DataError(f"{source} holds {what}")
    return Reading(examples, name, saw + source.saw(), len(complaints), unread, tokenized)


def _silent_turn(said: Conversation) -> int:
    """The number of the first answer that says and calls nothing, counted from 1; 0 if there is none."""
    for number, message in enumerate(said.answers, start=1):
        if not message.text.strip() and "tool_calls" not in message.keys:
            return number
    return 0


def _to_the_end(records: Iterable[Record]) -> Iterator[Record]:
    """The records, and as the last of them the error behind which the source cannot be read on, if there is one."""
    try:
        yield from records
    except DataError as error:
        yield NOWHERE, error


def refusal(complaints: Sequence[str], advice: str = "") -> DataError:
    """An error that shows the first complaints, a line each, and counts all."""
    more = [f"... and {len(complaints) - SHOWN:,} more"] if len(complaints) > SHOWN else []
    return DataError("\n       ".join([*complaints[:SHOWN], *more, *([advice] if advice else [])]))


def _conversation(record: object, form: Format) -> Conversation | Tokenized:
    if isinstance(record, DataError):
        raise record
    if not isinstance(record, dict):
        needs = ", ".join(form.columns or form.needs)
        raise DataError(f"expected an object with {needs}, found {type(record).__name__}")
    return form.read(record)
