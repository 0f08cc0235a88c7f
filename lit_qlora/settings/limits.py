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


def is_pattern(pattern: str) -> bool:
    """Tell if a text is a regular expression that looks at a path in few steps, whoever wrote it.

    It has at most MOST_REPEATS repeats and as many groups, and no group that repeats has a repeat in it: `(a+)+!` tries
    each way to cut a path into parts.
    """
    try:
        re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return False
    repeats = groups = 0
    repeated, closed = [False], False
    """Whether each group that is open has a repeat in it, and whether a group has just been closed that had."""
    for part in _PARTS.findall(pattern):
        is_repeat = part in ("*", "+", "?") or (len(part) > 2 and part.startswith("{"))
        if is_repeat and closed:
            return False
        repeats, groups = repeats + is_repeat, groups + part.startswith("(")
        repeated[-1] |= is_repeat
        closed = False
        if part.startswith("("):
            repeated.append(False)
        elif part == ")":
            closed = repeated.pop()
            repeated[-1] |= closed
    return repeats <= MOST_REPEATS and groups <= MOST_REPEATS


MOST_REPEATS = 5
_PARTS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\(\?|\{\d*,\d*\}|.", re.DOTALL)
"""Escapes, sets of letters, openings of groups and other letters of a regular expression."""
FINITE = Limit("finite", math.isfinite)
REGULAR_EXPRESSION = Limit("a regular expression of few repeats", is_pattern)

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
