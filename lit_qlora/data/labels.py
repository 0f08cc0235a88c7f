"""The labels of texts: classes with names, or numbers."""

import math
from collections.abc import Sequence
from typing import Any

from lit_qlora.errors import DataError
from lit_qlora.model.scoring import Scoring

MOST_CLASSES = 1000
LARGEST = 1e18
"""Of the numbers to regress on; the float32 of a loss holds the square of a few more."""


def scoring_of(kind: str, labels: Sequence[Sequence[Any]]) -> Scoring:
    """The task that these labels of several sources describe.

    Classes are sorted: as numbers if all are, else as texts.

    Raises:
        DataError: if there is one class, or too many; or a label to regress on is no finite number.
    """
    if kind == "regress":
        values = {number_of(label) for some in labels for label in some}
        return Scoring("regress", values=tuple(sorted(values)))
    names = {class_of(label) for some in labels for label in some}
    numbers = all(name.lstrip("-").isdecimal() for name in names)
    classes = tuple(sorted(names, key=int) if numbers else sorted(names))
    if len(classes) < 2:
        raise DataError(f"--head classify needs two classes, and every label is {classes[0]!r}.")
    if len(classes) > MOST_CLASSES:
        raise DataError(
            f"{len(classes):,} different labels, such as {classes[0]!r} and {classes[1]!r}, are no classes.\n"
            "Take --head regress for numbers, or name the column of the classes in --data.columns."
        )
    return Scoring("classify", classes)


def class_of(label: Any) -> str:
    """The name of the class that a label names."""
    return str(label).strip() if isinstance(label, str | int) else f"{label:g}"


def number_of(label: Any) -> float:
    """The number that a label is; a DataError if it is none, or too large to be squared."""
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    except OverflowError:  # an integer of more than 308 digits
        value = LARGEST * 10
    if math.isfinite(value) and abs(value) > LARGEST:
        raise DataError(f"a label is beyond {LARGEST:g}, too large for a squared error. Scale the labels.")
    if not math.isfinite(value):
        raise DataError(f"--head regress needs numbers, and a label is {label!r}. --head classify takes names.")
    return value
