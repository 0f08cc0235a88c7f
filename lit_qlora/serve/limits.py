"""What one client may cost, and who is let in. Nothing here imports torch or the server's libraries."""

from dataclasses import dataclass

from lit_qlora.settings import check

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Names of this machine by which no other machine can reach it."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one client may cost."""

    slots: int = 8
    """Answers that are made at a time; each needs room for the keys and values of a whole context."""
    context: int | None = None
    """Most tokens of prompt and answer together; by default, and at most, what the model's context holds."""
    queue: int = 32
    """Answers that may wait for their turn; who comes later is told to try again (429)."""
    body_bytes: int = 2**20
    """Largest request in bytes."""
    read_seconds: float = 10.0
    """Seconds that a client may take to send a request."""
    prompt_seconds: float = 5.0
    """Seconds that writing a prompt may take: the chat template, which is a program, and the tokenizer."""
    answer_seconds: float = 600.0
    """Seconds that an answer may take, waiting included."""
    drain_seconds: float = 30.0
    """Seconds that running answers get to end after SIGTERM or Ctrl-C; a second signal ends the server at once."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        check(self.slots >= 1, f"slots must be at least 1, got {self.slots}.")
        check(self.context is None or self.context >= 2, f"context must be at least 2 tokens, got {self.context}.")
        check(self.queue >= 0, f"queue must not be negative, got {self.queue}.")
        check(self.body_bytes >= 1024, f"body_bytes must be at least 1024, got {self.body_bytes}.")
        check(self.read_seconds > 0, f"read_seconds must be above 0, got {self.read_seconds}.")
        check(self.prompt_seconds > 0, f"prompt_seconds must be above 0, got {self.prompt_seconds}.")
        check(self.drain_seconds >= 0, f"drain_seconds must not be negative, got {self.drain_seconds}.")
        check(self.answer_seconds > 0, f"answer_seconds must be above 0, got {self.answer_seconds}.")
