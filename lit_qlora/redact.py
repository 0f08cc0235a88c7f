"""No secret in a message: every command prints its errors through `scrub`.

A secret is known by where it stands (a flag, a variable of the environment, a config file) or by its shape.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import pairwise

HIDDEN = "[hidden]"
LEAST = 6
"""Characters of a value that is taken for a secret by its name; shorter ones would be found in innocent words."""
_NAME = r"(?:\w*_)?(?:token|api_?key|secret|password|passwd|credentials?)"
_FLAG = re.compile(rf"--(?:\w+\.)*{_NAME}(?:=(?P<value>.*))?", re.IGNORECASE | re.DOTALL)
_VARIABLE = re.compile(_NAME, re.IGNORECASE)
_LINE = re.compile(rf"^[ \t]*[\"']?{_NAME}[\"']?\s*:\s*(?P<value>\S.*)$", re.IGNORECASE | re.MULTILINE)
_SHAPES = re.compile(
    r"\b(?-i:hf|api_org)_[A-Za-z0-9]{8,}"  # Hugging Face; HF_ENDPOINT is a variable
    r"|\bsk-[\w-]{8,}"  # OpenAI and others
    r"|\b(?:gh[pousr]|github_pat)_\w{8,}|\bglpat-[\w-]{8,}"  # GitHub, GitLab
    r"|\bAKIA[A-Z0-9]{12,}"  # AWS
    r"|\bxox[abprs]-[\w-]{8,}"  # Slack
    r"|\beyJ[\w-]{8,}\.[\w-]+\.[\w-]+"  # a JSON web token
    r"|(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"  # user:password@ in a URL
    rf"|(?<=[?&])(?:{_NAME})=[^&\s\"']+"
    r"|(?<=\bbearer )[^\s\"']{6,}",
    re.IGNORECASE,
)


def scrub(text: str, argv: Sequence[str] = (), environment: Mapping[str, str] | None = None) -> str:
    """`text` with [hidden] in place of each secret.

    Args:
        argv: flags of the command; what stands behind one such as --access_token is a secret.
        environment: variables; the value of one such as HF_TOKEN is a secret.
    """
    known = {*_of_flags(argv), *_of_variables(environment or {}), *_of_configs(argv)}
    for secret in sorted(known, key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)


def _of_flags(argv: Sequence[str]) -> Iterator[str]:
    for word, following in pairwise([*argv, ""]):
        if found := _FLAG.fullmatch(word):
            # '--access_token= hf_...', with a slip of a space, is a flag without a value and a word of its own.
            for value in (found["value"], "" if following.startswith("--") else following):
                if value and (value == found["value"] or not found["value"]):
                    yield from _spellings(value)


def _of_variables(environment: Mapping[str, str]) -> Iterator[str]:
    for name, value in environment.items():
        if _VARIABLE.fullmatch(name) and len(value) >= LEAST:
            yield from _spellings(value)


def _of_configs(argv: Sequence[str]) -> Iterator[str]:
    for word, following in pairwise([*argv, ""]):
        if word == "--config" or word.startswith("--config="):
            text = word.removeprefix("--config").removeprefix("=") or following
            with suppress(OSError):  # a file that cannot be read tells nothing
                if os.path.isfile(text):
                    with open(text, "rb") as file:
                        text = file.read(2**20).decode(errors="replace")
            for found in _LINE.finditer(text):
                yield from _spellings(found["value"].strip().strip("\"'"))


def _spellings(value: str) -> Iterator[str]:
    """The value as it stands, and as repr and ascii write it."""
    if len(value) >= LEAST:
        yield from {value, repr(value)[1:-1], ascii(value)[1:-1], value.strip()}
