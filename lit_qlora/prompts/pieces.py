"""The pieces of which prompts and answers are made, text and control tokens, and the ids that they become."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

from lit_qlora.errors import UsageError


@dataclass(frozen=True, slots=True)
class Control:
    """A control token, by its name; it is encoded by its id, which text never is."""

    name: str
    required: bool = True
    """False where a tokenizer without it reads the name as text."""


BOS, EOS = Control("<BOS>"), Control("<EOS>")
"""The tokenizer's own, whatever they are called; BOS stands only where the model's texts begin with one."""
Piece = str | Control


class Vocabulary(Protocol):
    """What is needed of lit_qlora.prompts.tokenizer.Tokenizer."""

    use_bos: bool
    bos_id: int | None
    eos_id: int
    control_tokens: dict[str, int]

    def encode_many(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """As lit_qlora.prompts.tokenizer.Tokenizer.encode_many."""
        ...

    def content(self, control: int | None) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.content."""
        ...


def encode_pieces(tokenizer: Vocabulary, documents: Sequence[Sequence[Sequence[Piece]]]) -> list[list[list[int]]]:
    """Ids of each part of each document; the text of a part is encoded in one go between control tokens."""
    begins: dict[str, list[int]] = {}  # texts at the beginning of a document, or after BOS
    follows: dict[str, list[int]] = {}  # all others
    plans: list[list[list[tuple[dict[str, list[int]] | None, Any]]]] = []
    resolve = cache(lambda control: _resolve(tokenizer, control))
    for parts in documents:
        at_start = True
        plan = []
        for part in parts:
            steps: list[tuple[dict[str, list[int]] | None, Any]] = []
            for piece in _joined(resolve, part):
                if isinstance(piece, str):
                    table = begins if at_start else follows
                    table.setdefault(piece, [])
                    steps.append((table, piece))
                    at_start = False
                else:
                    steps.append((None, piece))
                    at_start = at_start or piece == [tokenizer.bos_id]
            plan.append(steps)
        plans.append(plan)
    for table, continuation in ((begins, False), (follows, True)):
        for text, ids in zip(table, tokenizer.encode_many(list(table), continuation), strict=True):
            table[text] = ids
    return [[_ids(steps) for steps in plan] for plan in plans]


def _ids(steps: Iterable[tuple[dict[str, list[int]] | None, Any]]) -> list[int]:
    """The ids of texts, which stand in their tables, and of control tokens, one after the other."""
    ids: list[int] = []
    for table, piece in steps:
        ids += piece if table is None else table[piece]
    return ids


def _joined(resolve: Callable[[Control], str | list[int]], pieces: Iterable[Piece]) -> list[str | list[int]]:
    """Control tokens as ids, and the text between them in one piece."""
    joined: list[str | list[int]] = []
    for piece in pieces:
        found = piece if isinstance(piece, str) else resolve(piece)
        if isinstance(found, str) and joined and isinstance(joined[-1], str):
            joined[-1] += found
        elif found:
            joined.append(found)
    return joined


def _resolve(tokenizer: Vocabulary, control: Control) -> str | list[int]:
    """The id of a control token; its name, as text, where it is one that a tokenizer may lack."""
    if control == BOS:
        return [tokenizer.bos_id] if tokenizer.use_bos and tokenizer.bos_id is not None else []
    if control == EOS:
        return [tokenizer.eos_id]
    if control.name in tokenizer.control_tokens:
        return [tokenizer.control_tokens[control.name]]
    if control.required:
        raise UsageError(
            f"This prompt style needs the control token {control.name!r}, which the tokenizer does not have.\n"
            "Take a style without it, such as alpaca or vicuna."
        )
    return control.name


class Nameless:
    """Stands for a tokenizer where a conversation is only written, not encoded."""

    use_bos = True
    bos_id: int | None = None
    eos_id = 0
    control_tokens: dict[str, int] = {}  # noqa: RUF012 - empty for ever

    def encode_many(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """Nothing is encoded without a tokenizer."""
        raise NotImplementedError

    def content(self, control: int | None) -> str:
        """Control tokens have no names without a tokenizer."""
        return ""
