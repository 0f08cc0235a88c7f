"""Contents of data that nobody reads: a note, or a reason to stop where they would have meant something."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

SHOWN = 60  # characters of a value that a message shows
GOOD_ONES = "Keep the records whose answers are good, and leave the column out"
TEMPLATE = "Take --data.prompt template with a checkpoint whose chat template writes it"
ADVICE: dict[str, str] = {
    **dict.fromkeys(("label", "labels", "score", "scores", "rating", "reward", "rejected", "chosen"), GOOD_ONES),
    **dict.fromkeys(("tools", "functions", "tool_calls", "function_call", "documents"), TEMPLATE),
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), f"{TEMPLATE}, or put it into the answer"),
    **dict.fromkeys(
        ("train", "training", "weight", "weights", "loss_mask"),
        "Say it of single answers, as weight (0 to 1) or train in the messages of assistants",
    ),
    **dict.fromkeys(
        ("images", "image", "audio", "audios", "video", "videos"), "A model that reads text learns from text"
    ),
    **dict.fromkeys(
        ("system", "system_prompt", "history", "input", "context"),
        "Name it in --data.columns, or write it into the prompt",
    ),
    "chat_template_kwargs": TEMPLATE,
}
"""Names that are known to mean something -> the advice where nobody reads them."""


class Form(Protocol):
    """The part of a format of records that says which columns it reads; see data.formats.Format."""

    @property
    def needs(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def reads(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def leaves(self) -> Sequence[str]: ...  # noqa: D102
    @property
    def chosen(self) -> bool: ...  # noqa: D102
    @property
    def gather(self) -> Any: ...  # noqa: D102


class Unread:
    """Columns and keys of messages that hold something and are not read.

    Attributes:
        found: name -> how often, the first location, and what it holds there.
        ignored: the names among them that are left out on purpose.
    """

    def __init__(self, form: Form | None = None) -> None:
        self.found: dict[str, tuple[int, str, str]] = {}
        self.ignored: set[str] = set()
        # A format whose records are gathered from several, or that the settings describe, says itself what it reads.
        self._form = None if form is None or form.gather else form
        self._reads = frozenset((*form.needs, *form.reads)) if form else frozenset()

    def look(self, location: str, record: Mapping[str, Any]) -> None:
        """Take the columns of a record that its format does not read."""
        if self._form is None:
            return
        for name in record.keys() - self._reads:
            if self.add(str(name), location, record[name]) and (self._form.chosen or name in self._form.leaves):
                self.ignored.add(str(name))

    def add(self, name: str, location: str, value: Any) -> bool:
        """Take something that is not read, and tell if it holds anything."""
        if value in (None, "", [], {}):
            return False
        count, first, sample = self.found.get(name, (0, location, ""))
        self.found[name] = (count + 1, first, sample or _shown(value))
        return True

    def joined(self, other: "Unread") -> "Unread":
        """Join the findings of both."""
        joined = Unread()
        joined.found = self.found | other.found
        joined.ignored = self.ignored | other.ignored
        return joined

    def facts(self) -> dict[str, Any]:
        """Return the facts for the cache."""
        return {"found": {name: list(entry) for name, entry in self.found.items()}, "ignored": sorted(self.ignored)}

    @staticmethod
    def of(facts: Mapping[str, Any]) -> "Unread":
        """Restore the findings from the facts of the cache."""
        unread = Unread()
        unread.found = {name: tuple(entry) for name, entry in facts["found"].items()}
        unread.ignored = set(facts["ignored"])
        return unread

    def red(self) -> list[str]:
        """Return the reasons to stop: unread names that are known to mean something."""
        return [
            f"{location}: {name!r} ({sample}) is not read, here and in {count - 1:,} other records. {ADVICE[name]}"
            for name, (count, location, sample) in sorted(self.found.items())
            if name in ADVICE and name not in self.ignored
        ]

    def names(self, allowed: bool = False) -> list[str]:
        """Return the unread names that are no reason to stop."""
        return sorted(name for name in self.found if allowed or name not in ADVICE or name in self.ignored)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
