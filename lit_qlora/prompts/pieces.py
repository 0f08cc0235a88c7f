"""The pieces of prompts and answers, text and control tokens, and the ids that they become."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol
from unicodedata import category

from lit_qlora.commands import spell
from lit_qlora.errors import UsageError
from lit_qlora.prompts.added_tokens import SPACE, AddedToken


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
    """The part of lit_qlora.prompts.tokenizer.Tokenizer that is needed here."""

    use_bos: bool
    bos_id: int | None
    eos_id: int
    added_tokens: dict[int, AddedToken]
    control_tokens: dict[str, int]
    begins_behind_control: bool

    def encode_many(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """As lit_qlora.prompts.tokenizer.Tokenizer.encode_many."""
        ...

    def content(self, control: int | None) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.content."""
        ...

    def opening(self, text: str) -> str:
        """As lit_qlora.prompts.tokenizer.Tokenizer.opening."""
        ...

    def require_embedding(self, ids: Iterable[int]) -> None:
        """As lit_qlora.prompts.tokenizer.Tokenizer.require_embedding."""
        ...


class _Section:
    """Text, or a control token by its id, in a part of a document.

    Attributes:
        opens: it is the BOS of a style, behind which a text is a beginning.
        table: where the ids of the text will stand.
    """

    __slots__ = ("content", "opens", "part", "table")
    table: dict[str, list[int]]

    def __init__(self, part: int, content: str | int, opens: bool = False) -> None:
        self.part, self.content, self.opens = part, content, opens


def encode_pieces(tokenizer: Vocabulary, documents: Sequence[Sequence[Sequence[Piece]]]) -> list[list[list[int]]]:
    """Ids of each part of each document; the text of a part is encoded in one go between control tokens.

    They are those of Hugging Face's tokenizers for the whole text, but that text never becomes a control token.
    """
    alone: dict[str, list[int]] = {}  # texts that are encoded as if nothing stood before them
    behind: dict[str, list[int]] = {}  # all others
    choosy = {i: token for i, token in tokenizer.added_tokens.items() if token.special and _touches_text(token)}
    resolve = cache(lambda control: resolve_control(tokenizer, control))
    plans = []
    for parts in documents:
        sections = _joined(resolve, parts)
        if choosy:
            sections = _stripped(_words_only(sections, choosy, tokenizer.added_tokens), choosy)
        begins = True
        for section in sections:
            if isinstance(section.content, str):
                section.table = alone if begins else behind
                section.table[section.content] = []
                begins = False
            else:
                begins = section.opens or tokenizer.begins_behind_control
        plans.append((len(parts), sections))
    for table, continuation in ((alone, False), (behind, True)):
        for text, ids in zip(table, tokenizer.encode_many(list(table), continuation), strict=True):
            table[text] = ids
    return [_ids(count, sections) for count, sections in plans]


def _ids(count: int, sections: Iterable[_Section]) -> list[list[int]]:
    """The ids of each part: of texts, which stand in their tables, and of control tokens."""
    parts: list[list[int]] = [[] for _ in range(count)]
    for section in sections:
        content = section.content
        if isinstance(content, str):
            parts[section.part] += section.table[content]
        else:
            parts[section.part].append(content)
    return parts


def _joined(resolve: Callable[[Control], str | int | None], parts: Iterable[Iterable[Piece]]) -> list[_Section]:
    """Control tokens as ids, and the text between them in one section."""
    joined: list[_Section] = []
    for part, pieces in enumerate(parts):
        text = ""
        for piece in pieces:
            found = piece if isinstance(piece, str) else resolve(piece)
            if isinstance(found, str):
                text += found
            elif found is not None:
                if text:
                    joined.append(_Section(part, text))
                    text = ""
                joined.append(_Section(part, found, piece is BOS))
        if text:
            joined.append(_Section(part, text))
    return joined


def _merged(sections: Iterable[_Section]) -> list[_Section]:
    """Neighbouring texts of a part as one."""
    merged: list[_Section] = []
    for section in sections:
        last = merged[-1] if merged else None
        if last and last.part == section.part and isinstance(last.content, str) and isinstance(section.content, str):
            last.content += section.content
        else:
            merged.append(section)
    return merged


def _touches_text(token: AddedToken) -> bool:
    return token.lstrip or token.rstrip or token.single_word


def _words_only(
    sections: list[_Section], choosy: Mapping[int, AddedToken], added: Mapping[int, AddedToken]
) -> list[_Section]:
    """A token that is a word of its own is text where a letter or digit touches it."""

    def spell(section: _Section) -> str:
        return section.content if isinstance(section.content, str) else added[section.content].content

    for i, section in enumerate(sections):
        token = choosy.get(section.content) if isinstance(section.content, int) else None
        if token and token.single_word:
            before = spell(sections[i - 1])[-1:] if i else ""
            behind = spell(sections[i + 1])[:1] if i + 1 < len(sections) else ""
            if _in_word(before) or _in_word(behind):
                section.content = token.content
    return _merged(sections)


def _in_word(letter: str) -> bool:
    """Tell if a character is part of a word: a letter, a mark, a digit, or a joiner of two words."""
    kind = category(letter) if letter else ""
    return kind[:1] in ("L", "M") or kind in ("Nd", "Nl", "Pc") or letter in ("\u200c", "\u200d")


def _stripped(sections: Iterable[_Section], choosy: Mapping[int, AddedToken]) -> list[_Section]:
    """The sections without the white space that control tokens swallow."""
    kept: list[_Section] = []
    swallows = False  # what comes next
    for section in sections:
        if isinstance(section.content, str):
            section.content = section.content.lstrip(SPACE) if swallows else section.content
            if section.content:
                kept.append(section)
                swallows = False
            continue
        token = choosy.get(section.content)
        while token and token.lstrip and kept and isinstance(kept[-1].content, str):
            kept[-1].content = kept[-1].content.rstrip(SPACE)
            if kept[-1].content:
                break
            kept.pop()
        kept.append(section)
        swallows = bool(token and token.rstrip)
    return kept


def resolve_control(tokenizer: Vocabulary, control: Control) -> str | int | None:
    """The id of a control token; its name, as text, where it is one that a tokenizer may lack."""
    if control == BOS:
        return tokenizer.bos_id if tokenizer.use_bos else None
    found = tokenizer.eos_id if control == EOS else tokenizer.control_tokens.get(control.name)
    if found is not None:
        tokenizer.require_embedding([found])
        return found
    if control.required:
        raise UsageError(
            f"This prompt style needs the control token {control.name!r}, which the tokenizer does not have.\n"
            f"Add it: {spell('scripts/add_tokens.py')}. Or take a style without it, such as alpaca or vicuna."
        )
    return control.name


def as_one_text(tokenizer: Vocabulary, pieces: Iterable[Piece]) -> str:
    """The pieces as one text with control tokens by their names; encoded with them it becomes the same ids."""
    text, opened = "", False
    for piece in pieces:
        found = piece if isinstance(piece, str) else resolve_control(tokenizer, piece)
        if isinstance(found, str):
            text += (tokenizer.opening(found) if opened and found else "") + found
        else:
            text += tokenizer.content(found)
        opened = (piece == BOS and found is not None) or (opened and found == "")
    return text


class Nameless:
    """Stands for a tokenizer where a conversation is only written, not encoded."""

    use_bos = True
    bos_id: int | None = None
    eos_id = 0
    added_tokens: dict[int, AddedToken] = {}  # noqa: RUF012 - empty for ever
    control_tokens: dict[str, int] = {}  # noqa: RUF012 - empty for ever
    begins_behind_control = False

    def encode_many(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """Nothing is encoded without a tokenizer."""
        raise NotImplementedError

    def content(self, control: int | None) -> str:
        """Control tokens have no names without a tokenizer."""
        return ""

    def opening(self, text: str) -> str:
        """Nothing is encoded without a tokenizer."""
        return ""

    def require_embedding(self, ids: Iterable[int]) -> None:
        """Nothing is encoded without a tokenizer."""
