"""Texts with the values of columns in them, such as "Describe {product}, a {category}."."""

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lit_qlora.data.messages import text_of
from lit_qlora.errors import DataError, UsageError


@dataclass(frozen=True)
class Template:
    """A text with the names of columns in braces; {{ and }} are braces."""

    parts: tuple[tuple[str, str | None], ...]
    """(text, name of the column behind it, if there is one)."""

    @staticmethod
    def parse(setting: str, text: str) -> "Template":
        """Read the text of a setting.

        Raises:
            UsageError: if it names no column, or its braces do not match.
        """
        try:
            found = [(part, name, form or kind) for part, name, form, kind in string.Formatter().parse(text)]
        except ValueError as error:
            raise UsageError(f"{setting} {text!r}: {error}. A brace that is text is written twice.") from None
        if any(name == "" or extra for _, name, extra in found):
            raise UsageError(f"{setting} {text!r}: a pair of braces holds the name of a column and nothing else.")
        if not any(name for _, name, _ in found):
            raise UsageError(f"{setting} {text!r} names no column. Write its name in braces, e.g. {{product}}.")
        return Template(tuple((part, name) for part, name, _ in found))

    @property
    def columns(self) -> list[str]:
        """The columns that it names."""
        return [name for _, name in self.parts if name]

    def fill(self, record: Mapping[str, Any]) -> str:
        """The text with the values of a record.

        Raises:
            DataError: if a column is missing, or holds neither text nor a number.
        """
        return "".join(text + (_value(record, name) if name else "") for text, name in self.parts)


def _value(record: Mapping[str, Any], column: str) -> str:
    value = record.get(column)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return text_of(record, column)
    if value != value:
        raise DataError(f"{column!r} is no number")
    return str(value)
