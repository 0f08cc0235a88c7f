"""From records to examples. Every complaint names its place, and all of them come at once."""

from collections.abc import Collection
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

from lit_qlora.data.formats import pick_format
from lit_qlora.data.sources import Source, read_records
from lit_qlora.errors import DataError
from lit_qlora.prompts import Conversation

LOOKED_AT = 1000  # records from which the format is recognised
SHOWN = 10  # complaints that a message shows; the rest are counted


@dataclass(frozen=True, slots=True)
class Example(Conversation):
    """A conversation of a data set."""

    place: str = ""
    """Where it stands, e.g. train.jsonl:17, for messages."""


@dataclass(frozen=True)
class Reading:
    """What a source holds."""

    examples: list[Example]
    format: str
    saw: str
    """By what the format was recognised."""
    skipped: int
    """Records that could not be read and were left out."""


def read_examples(
    source: Source | Path | str,
    *,
    format: str = "auto",
    columns: str = "",
    skip: bool = False,
    allow: Collection[str] = (),
) -> Reading:
    """All examples of a source.

    Args:
        format, columns: as data.format and data.columns.
        skip: leave out what is wrong instead of refusing everything.
        allow: findings that are no complaints, of which this concerns "empty_answers".

    Raises:
        DataError: listing the first few things that are wrong, with their places, and counting all.
    """
    source = source if isinstance(source, Source) else Source(str(source))
    records = iter(read_records(source))
    first = list(islice(records, LOOKED_AT))
    name, form, saw = pick_format(format, columns, first)
    records = chain(first, records)
    examples: list[Example] = []
    complaints: list[str] = []
    empty = 0
    for place, record in form.gather(records) if form.gather else records:
        try:
            if isinstance(record, DataError):
                raise record
            if not isinstance(record, dict):
                needs = ", ".join(form.columns or form.needs)
                raise DataError(f"expected an object with {needs}, found {type(record).__name__}")
            said = form.read(record)
            silent = next((i for i, turn in enumerate(said.turns, start=1) if not turn.answer.strip()), None)
            if silent and "empty_answers" not in allow:
                empty += 1
                where = f"in {form.needs[-1]!r}" if form.columns else f"of turn {silent}"
                raise DataError(f"the answer {where} is empty")
            examples.append(Example(said.turns, said.input, said.system, place))
        except DataError as error:
            complaints.append(f"{place}: {error}")
    if complaints and not skip:
        more = [f"... and {len(complaints) - SHOWN} more"] if len(complaints) > SHOWN else []
        if empty == len(complaints):
            more.append("--data.on_error skip leaves them out, --data.allow empty_answers learns to say nothing.")
        raise DataError("\n       ".join(complaints[:SHOWN] + more))
    if not examples:
        what = f"no samples that can be read: {complaints[0]}" if complaints else "no samples."
        raise DataError(f"{source} holds {what}")
    return Reading(examples, name, saw, len(complaints))
