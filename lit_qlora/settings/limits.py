"""Limits of a setting, part of its annotation: `r: Annotated[int, at_least(1)]`, or by name, `r: Count`."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any


@dataclass(frozen=True)
class Limit:
    """A condition on a value."""

    text: str
    """Completes "must be", such as "at least 1"."""
    holds: Callable[[Any], bool]
    """True for a value within the limit; never for NaN."""


def at_least(low: float) -> Limit:
    """Value >= low."""
    return Limit(f"at least {low}", lambda value: value >= low)


def above(low: float) -> Limit:
    """Value > low."""
    return Limit(f"above {low}", lambda value: value > low)


def at_most(high: float) -> Limit:
    """Value <= high."""
    return Limit(f"at most {high}", lambda value: value <= high)


def below(high: float) -> Limit:
    """Value < high."""
    return Limit(f"below {high}", lambda value: value < high)


def _compiles(pattern: str) -> bool:
    try:
        return bool(re.compile(pattern))
    except re.error:
        return False


FINITE = Limit("finite", math.isfinite)
REGULAR_EXPRESSION = Limit("a regular expression", _compiles)

Count = Annotated[int, at_least(1)]
CountOrZero = Annotated[int, at_least(0)]
Positive = Annotated[float, above(0), FINITE]
NotNegative = Annotated[float, at_least(0), FINITE]
Share = Annotated[float, at_least(0), at_most(1)]
ShareBelowOne = Annotated[float, at_least(0), below(1)]
ShareAboveZero = Annotated[float, above(0), at_most(1)]
Seed = Annotated[int, at_least(0), below(2**32)]
SeedOrAny = Annotated[int, at_least(-1), below(2**32)]
Pattern = Annotated[str, REGULAR_EXPRESSION]
