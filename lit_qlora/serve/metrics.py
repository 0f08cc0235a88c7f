"""Counts of the server's work, in Prometheus' text format.

https://github.com/prometheus/docs/blob/main/docs/instrumenting/exposition_formats.md
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


@dataclass
class Metrics:
    """Counts since the start; changed in the event loop's thread alone."""

    requests: Counter[int] = field(default_factory=Counter)
    """Requests for answers, by the status they ended with."""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    seconds: float = 0.0
    """Seconds from request to answer, over all answered requests."""

    def count(self, status: int, seconds: float, usage: Mapping[str, int]) -> None:
        """Add a request that ended with `status` after `seconds`, and the tokens it used."""
        self.requests[status] += 1
        self.seconds += seconds
        self.prompt_tokens += usage.get("prompt_tokens", 0)
        self.answer_tokens += usage.get("completion_tokens", 0)

    def text(self, running: int, waiting: int) -> str:
        """The exposition.

        Args:
            running: answers that are being made.
            waiting: answers in the queue.
        """
        answered = sum(self.requests.values())
        families: list[tuple[str, str, str, list[tuple[str, float]]]] = [
            (
                "requests_total",
                "counter",
                "Requests for answers, by HTTP status.",
                [(f'{{status="{status}"}}', count) for status, count in sorted(self.requests.items())],
            ),
            ("prompt_tokens_total", "counter", "Tokens of prompts.", [("", self.prompt_tokens)]),
            ("answer_tokens_total", "counter", "Tokens of answers.", [("", self.answer_tokens)]),
            ("running_answers", "gauge", "Answers that are being made.", [("", running)]),
            ("waiting_answers", "gauge", "Answers in the queue.", [("", waiting)]),
            (
                "request_seconds",
                "summary",
                "Seconds from request to answer.",
                [("_sum", round(self.seconds, 6)), ("_count", answered)],
            ),
        ]
        lines = []
        for name, kind, explanation, samples in families:
            lines += [f"# HELP lit_qlora_{name} {explanation}", f"# TYPE lit_qlora_{name} {kind}"]
            lines += [f"lit_qlora_{name}{label} {value}" for label, value in samples]
        return "\n".join(lines) + "\n"
