"""The score in a judge's reply, in the forms that models write it."""

import re

from lit_qlora.errors import UsageError
from lit_qlora.files.reading import parse_json
from lit_qlora.prompts.answer_parts import THOUGHTS

# Every repeat has a limit, or a reply that is full of "score(" would take minutes.
KEYS = ("score", "rating", "grade")
_NAME = rf"\b(?:{'|'.join(KEYS)})\b"
_NUMBER = r"(\d{1,9}(?:[.,]\d{1,9})?)(?![\d%]|\s?[-\u2013]\s?\d)"
_VERB = r"(?:\s{0,10}\([^)]{0,100}\)|\s{1,10}(?:is|of|would be|out of \d{1,4}))?"
_BETWEEN = _VERB + r"(?:[\s:=*_\"'`\[\u2013\u2014\u2192]|-(?=\s)){0,10}"
OBJECT = re.compile(r"\{[^{}]{1,20000}+\}")
LINE = re.compile(
    rf"^[^\w\n]{{0,20}}(?:[a-z]{{1,20}}\s{{1,5}}){{0,3}}{_NAME}{_BETWEEN}{_NUMBER}"
    r"[^\w\n/]{0,10}(?:(?:/|out of|points?)[*_ \d]{0,10})?[^\w\n]{0,20}$",
    re.IGNORECASE | re.MULTILINE,
)
MENTION = re.compile(rf"{_NAME}{_BETWEEN}{_NUMBER}(?!\s{{1,5}}(?:would|means|requires))", re.IGNORECASE)
BRACKETS = re.compile(rf"\[\[\s{{0,5}}{_NUMBER}\s{{0,5}}\]\]")
SHARE = re.compile(rf"(?<![\d.,/]){_NUMBER}[\s*]{{0,5}}(?:/|out of)[\s*]{{0,5}}100?\b(?!/)", re.IGNORECASE)
ALONE = re.compile(rf"\A[\s*_`]{{0,20}}{_NUMBER}\s{{0,10}}(?:points?)?[\s*_`.]{{0,20}}\Z", re.IGNORECASE)


def read_score(reply: str) -> float | None:
    """The score in a reply, which may have a thought before it, a fence or words around it; None without one.

    An object of JSON with "score" or "rating" counts most, then a line that says the score. Then come the last mention
    of a score, [[8]], 8/10 or 8 out of 10, and last a number that is the whole reply.
    """
    reply = _behind_thought(reply)
    found = _in_objects(reply)
    for pattern in (LINE, MENTION, BRACKETS, SHARE, ALONE):
        found = found or pattern.findall(reply)
    return float(found[-1].replace(",", ".")) if found else None


def _behind_thought(reply: str) -> str:
    """The reply without a thought before it; nothing of a reply that ends within it."""
    for opens, closes in THOUGHTS:
        _, closed, said = reply.rpartition(closes)
        reply = said if closed else "" if reply.lstrip().startswith(opens) else reply
    return reply


def _in_objects(reply: str) -> list[str]:
    """The scores that objects of JSON in a reply name."""
    found = []
    for text in OBJECT.findall(reply):
        try:
            fields = parse_json(text, "the reply", UsageError)
        except UsageError:
            continue
        values = {str(name).casefold(): str(value) for name, value in fields.items()}
        numbers = (re.match(rf"\s{{0,10}}{_NUMBER}", values.get(key, "")) for key in KEYS)
        found += [number[1] for number in numbers if number]
    return found
