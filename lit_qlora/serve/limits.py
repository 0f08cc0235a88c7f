"""Limits on the cost of one client, and the names of this machine.

Nothing here imports torch or the server's libraries.
"""

from dataclasses import dataclass
from typing import Annotated

from lit_qlora.settings import Settings
from lit_qlora.settings.limits import Count, CountOrZero, NotNegative, Positive, at_least

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine by which no other machine can reach it."""


@dataclass(frozen=True, kw_only=True)
class Limits(Settings):
    """Limits on the cost of one client."""

    slots: Count = 8
    """Answers that are made at a time; each needs room for the keys and values of a whole context."""
    context: Annotated[int, at_least(2)] | None = None
    """Most tokens of prompt and answer together; by default, and at most, what the model's context holds."""
    queue: CountOrZero = 32
    """Answers that may wait for their turn; who comes later is told to try again (429)."""
    body_bytes: Annotated[int, at_least(1024)] = 2**20
    """Largest request in bytes."""
    read_seconds: Positive = 10.0
    """Seconds that a client may take to send a request, or to read what waits for it."""
    prompt_seconds: Positive = 5.0
    """Seconds that writing a prompt may take: the chat template, which is a program, and the tokenizer."""
    answer_seconds: Positive = 600.0
    """Seconds that an answer may take, waiting included."""
    drain_seconds: NotNegative = 30.0
    """Seconds that running answers get to end after SIGTERM or Ctrl-C; a second signal ends the server at once."""
