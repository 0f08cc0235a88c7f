"""The libraries that encode: SentencePiece for its own files, Hugging Face's tokenizers for all others."""

import base64
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from math import prod
from pathlib import Path
from threading import Thread
from typing import Any, Protocol

from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import read_json
from lit_qlora.prompts.added_tokens import SPACE, AddedToken


class Backend(Protocol):
    """The source of a tokenizer, behind one interface.

    Attributes:
        size: number of tokens known.
        added: id -> token, of control tokens and others that are found before the vocabulary's own model sees a text.
        prefixes: true if the first word of a text gets a space before it.
        begins_behind_control: true if a text directly behind a control token is encoded as if it stood alone; else it
            gets no space.
        doubles_space: true if that space is put before a text that begins with one, too.
        texts_are_safe: true if encode_many never makes a control token of a text by itself.
    """

    size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool
    prefixes: bool
    begins_behind_control: bool
    doubles_space: bool

    @property
    def added(self) -> dict[int, AddedToken]:
        """See the class."""
        ...

    @property
    def texts_are_safe(self) -> bool:
        """See the class."""
        ...

    def make_control(self, token: int) -> None:
        """Make a control token of one that files do not call so."""
        ...

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts without control tokens."""
        ...

    def encode_marked(self, text: str) -> list[int]:
        """Encode a text whose names of control tokens are control tokens."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text without control tokens."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """The id of a token by its name."""
        ...

    def id_to_token(self, token: int) -> str:
        """The name of a token by its id."""
        ...


class SentencePiece:
    """tokenizer.model or spiece.model, and the tokens that files beside it add."""

    def __init__(self, path: Path, tokens: Sequence[AddedToken]) -> None:
        self.processor = read_processor(path)
        pieces: int = self.processor.vocab_size()
        self.beside = self._place(tokens, pieces)
        self.size = max([pieces, *(i + 1 for i in self.beside)])
        own = {self.processor.id_to_piece(i): i for i in range(pieces) if self.processor.is_control(i)}
        flags = {token.content: token for token in reversed(tokens)}
        controls = {i: flags.get(name, AddedToken(content=name)) for name, i in own.items() if i not in self.beside}
        self.added: dict[int, AddedToken] = {}
        self._know(controls | self.beside)
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_id = self.processor.eos_id() if self.processor.eos_id() >= 0 else None
        self.unk_id: int | None = self.processor.unk_id()
        self.adds_bos = self.bos_id is not None
        self.prefixes = self.processor.encode("a", out_type=str)[0].startswith("▁")
        self.begins_behind_control = False
        self.doubles_space = True
        self.texts_are_safe = False  # symbols that whoever trained the model defined are found in every text

    def _know(self, added: Mapping[int, AddedToken]) -> None:
        self.added |= added
        self.words = _finder(token for token in self.added.values() if not token.special)
        self.marks = _finder(self.added.values())
        self.ids = {token.content: i for i, token in self.added.items()}

    def make_control(self, token: int) -> None:
        """See Backend."""
        known = self.added.get(token) or AddedToken(content=self.id_to_token(token))
        self._know({token: replace(known, special=True)})

    def _place(self, tokens: Sequence[AddedToken], pieces: int) -> dict[int, AddedToken]:
        """The tokens that are no pieces, by their ids; one that names none gets the next."""
        found: dict[int, AddedToken] = {}
        names = {self.processor.id_to_piece(i) for i in range(pieces)}
        for token in tokens:
            if token.content not in names:
                names.add(token.content)
                found[max([pieces - 1, *found]) + 1 if token.id is None else token.id] = token
        return found

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """See Backend."""
        ids: list[list[int]] = self.processor.encode(list(texts), num_threads=os.cpu_count() if len(texts) > 1 else 1)
        if not self.words:
            return ids
        return [
            self._encode_with(self.words, text) if self.words.search(text) else of_text
            for text, of_text in zip(texts, ids, strict=True)
        ]

    def encode_marked(self, text: str) -> list[int]:
        """See Backend."""
        return self._encode_with(self.marks, text) if self.marks else self.processor.encode(text)

    def _encode_with(self, marks: re.Pattern[str], text: str) -> list[int]:
        """Ids of a text with tokens in it that are cut out; what follows one is not a beginning."""
        ids: list[int] = []
        at = 0
        while found := marks.search(text, at):
            token = self.added[self.ids[found[0]]]
            before = text[at : found.start()]
            ids += self._encode_between(before.rstrip(SPACE) if token.lstrip else before, first=not ids)
            ids.append(self.ids[found[0]])
            at = _behind_space(text, found.end()) if token.rstrip else found.end()
        return ids + self._encode_between(text[at:], first=not ids)

    def _encode_between(self, text: str, first: bool) -> list[int]:
        if not text:
            return []
        for before in ("\n", "\x07") if self.prefixes and not first else ():
            known, ids = self.processor.encode([before, before + text])
            if ids[: len(known)] == known:
                return list(ids[len(known) :])
        return list(self.processor.encode(text))

    def decode(self, ids: list[int]) -> str:
        """See Backend."""
        text = ""
        for is_beside, run in groupby(ids, key=self.beside.__contains__):
            part = list(run)
            if is_beside:
                text += "".join(self.added[i].content for i in part if not self.added[i].special)
            else:
                # SentencePiece takes the space off the first word, which is right only where the text begins.
                inner = bool(text) and self.prefixes and self.processor.id_to_piece(part[0]).startswith("▁")
                text += " " * inner + self.processor.decode(part)
        return text

    def token_to_id(self, token: str) -> int | None:
        """See Backend."""
        if token in self.ids:
            return self.ids[token]
        found: int = self.processor.piece_to_id(token)
        return found if found != self.processor.unk_id() or token == self.processor.id_to_piece(found) else None

    def id_to_token(self, token: int) -> str:
        """See Backend."""
        return self.added[token].content if token in self.added else str(self.processor.id_to_piece(token))


def read_processor(path: Path) -> Any:
    """The SentencePiece model in a file. Raises CheckpointError if it is none."""
    from sentencepiece import SentencePieceProcessor

    try:
        if not path.stat().st_size:  # sentencepiece takes an empty file for a vocabulary of none
            raise RuntimeError("the file is empty")
        return SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}.") from None


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Piece, score and kind of each token of a SentencePiece file; its own numbers for the kinds, 1 being normal."""
    sp = read_processor(path)
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    return [
        (sp.id_to_piece(i), sp.get_score(i), next((kind for holds, kind in kinds if holds(i)), 1))
        for i in range(sp.vocab_size())
    ]


def _finder(tokens: Iterable[AddedToken]) -> re.Pattern[str] | None:
    """Finds the names of `tokens`, the longest where several begin together.

    White space that they swallow is no part of it: looking for any amount of it would take the square of a text's
    length.
    """
    patterns = []
    for token in sorted(tokens, key=lambda token: len(token.content), reverse=True):
        name = re.escape(token.content)
        patterns += [rf"(?<!\w){name}(?!\w)" if token.single_word else name] if name else []
    return re.compile("|".join(patterns)) if patterns else None


def _behind_space(text: str, at: int) -> int:
    """Position behind the white space at a position."""
    space = re.compile(f"[{SPACE}]*").match(text, at)
    assert space  # it may be none
    return space.end()


MOST_GROWTH = 128
"""Characters that a tokenizer.json may make of one before it encodes; the normal forms of Unicode make up to 18."""
PROBES = ("a", "A", "1", " ", ".", "\n", "\u00e9", "\u4e2d", "aA", "a1", "a ", " .")
"""Texts that a pattern meets again and again."""
PROBE_LENGTH = 1000
PROBE_SECONDS = 10.0


class HuggingFace:
    """A tokenizer.json, and the tokens that files beside it add.

    Args:
        spec: the file's content.
        tokens: what the file says of a token counts more than these, unless `overrules`.

    Raises:
        CheckpointError: if it is none, or its patterns need time or memory without bound.
    """

    def __init__(self, path: Path, spec: Mapping[str, Any], tokens: Sequence[AddedToken], overrules: bool) -> None:
        from tokenizers import Tokenizer

        self.path = path
        with _library(f"{path} is not a tokenizer.json"):
            made = Tokenizer.from_file(str(path)) if path.name == "tokenizer.json" else _build(spec)
        if (growth := max(_growth(spec.get("normalizer")), _growth(spec.get("decoder")))) > MOST_GROWTH:
            raise CheckpointError(
                f"{path} is refused: its normalizer or its decoder can make {growth:,} characters of one, more than "
                f"{MOST_GROWTH}."
            )
        self.backend: Any = made
        self.backend.encode_special_tokens = True  # "</s>" in a text is text
        self._add(tokens, overrules, path)
        # A model can find in a text what it has in its own vocabulary: Unigram any piece, BPE what merges lead to.
        merges = spec["model"].get("merges", [])
        self._reached = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges}
        self._is_bpe = spec["model"]["type"] == "BPE"
        unknown = spec["model"].get("unk_token")
        self.unk_id: int | None = self.token_to_id(unknown) if unknown else spec["model"].get("unk_id")
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size: int = self.backend.get_vocab_size(with_added_tokens=True)
        opening = _template_opening(spec.get("post_processor") or {})
        self.bos_id = self.token_to_id(opening) if opening else None  # tokenizer_config.json may say otherwise
        self.eos_id: int | None = None
        self.adds_bos = opening is not None
        scheme = _prefix_scheme(spec)
        self.prefixes = scheme != "never"
        self.begins_behind_control = scheme == "always"
        self.doubles_space = False
        self._probe()

    def _probe(self) -> None:
        """Encode texts on which a pattern that goes back too often never comes to an end.

        The library cannot be stopped, but left behind in a thread of its own.
        """
        texts = [(probe * PROBE_LENGTH)[:PROBE_LENGTH] + "!" for probe in PROBES]
        panics: list[str] = []
        thread = Thread(target=self._encode_probes, args=(texts, panics), daemon=True)
        thread.start()
        thread.join(PROBE_SECONDS)
        if thread.is_alive():
            raise CheckpointError(
                f"{self.path} is refused: it takes more than {PROBE_SECONDS:.0f} s for {PROBE_LENGTH:,} letters."
            )
        if panics:
            raise CheckpointError(f"{self.path} is refused: it fails on {PROBE_LENGTH:,} letters: {panics[0]}.")

    def _encode_probes(self, texts: list[str], panics: list[str]) -> None:
        try:
            self.backend.encode_batch_fast(texts)
        except BaseException as error:  # a letter that the vocabulary lacks is no fault until a text has it
            panics.extend([str(error)] if _is_panic(error) else [])

    @property
    def added(self) -> dict[int, AddedToken]:
        """See Backend."""
        found = sorted(self.backend.get_added_tokens_decoder().items())
        return {i: AddedToken(content=token.content, id=i, **_flags(token)) for i, token in found}

    @property
    def texts_are_safe(self) -> bool:
        """See Backend."""
        names = {token.content for token in self.added.values() if token.special}
        return self._is_bpe and names.isdisjoint(self._reached)

    def make_control(self, token: int) -> None:
        """See Backend."""
        known = self.added.get(token) or AddedToken(content=self.id_to_token(token), special=False)
        if not known.special:
            self._know(replace(known, special=True))

    def _know(self, token: AddedToken) -> None:
        from tokenizers import AddedToken as Theirs

        with _library(f"{self.path} takes no other token"):
            self.backend.add_tokens([Theirs(token.content, **_flags(token))])

    def _add(self, tokens: Sequence[AddedToken], overrules: bool, path: Path) -> None:
        """Add what the file lacks."""
        known = {token.content: token for token in self.added.values()}
        for token in tokens:
            old = known.get(token.content)
            if old is None or (overrules and token.id is not None and _flags(token) != _flags(old)):
                self._know(token)
                known[token.content] = token
            at = self.backend.token_to_id(token.content)
            if token.id not in (None, at):
                raise CheckpointError(
                    f"{path.parent}: tokenizer_config.json or added_tokens.json says that {token.content!r} is token "
                    f"{token.id}; with {path.name} it is {at}. Mend the one that is wrong."
                )

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        """See Backend."""
        with _library(f"{self.path} cannot encode a text"):
            return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str) -> list[int]:
        """See Backend."""
        self.backend.encode_special_tokens = False
        try:
            with _library(f"{self.path} cannot encode a text"):
                ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True
        return ids

    def decode(self, ids: list[int]) -> str:
        """See Backend."""
        with _library(f"{self.path} cannot decode ids"):
            text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def token_to_id(self, token: str) -> int | None:
        """See Backend."""
        found: int | None = self.backend.token_to_id(token)
        return found

    def id_to_token(self, token: int) -> str:
        """See Backend."""
        return str(self.backend.id_to_token(token))


FLAGS = ("lstrip", "rstrip", "single_word", "normalized")


def _flags(token: Any) -> dict[str, bool]:
    """Return the flags by which a token of this package, or of the library, is found."""
    return {name: getattr(token, name) for name in ("special", *FLAGS)}


@contextmanager
def _library(trouble: str) -> Iterator[None]:
    """Turn what the tokenizers library raises into a CheckpointError: plain Exception, and panics that are none.

    A pattern that goes back too often is such a panic, and so is a field that contradicts another.
    """
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not _is_panic(error):
            raise
        raise CheckpointError(f"{trouble}: {str(error).partition(chr(10))[0]}.") from None


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"  # which the library does not export


def _growth(step: Mapping[str, Any] | None) -> int:
    """Characters that a normalizer or a decoder can make of one."""
    if step is None:
        return 1
    inner = step.get("normalizers") or step.get("decoders")
    if inner is not None:
        return prod(map(_growth, inner))
    if step["type"] == "Replace":
        text = step["pattern"].get("String")  # else it is a pattern that can match nothing at all, everywhere
        return -(-len(step["content"]) // max(1, len(text))) or 1 if text is not None else len(step["content"]) + 1
    if step["type"] == "Prepend":
        return len(step["prepend"]) or 1
    if step["type"] == "Precompiled":  # a table: its length, an index, and the texts that it puts in
        table = base64.b64decode(step["precompiled_charsmap"] or "")
        texts = table[4 + int.from_bytes(table[:4], "little") :]
        return max(len(text.decode(errors="replace")) for text in texts.split(b"\0")) or 1
    return 4 if step["type"] == "ByteLevel" else 1


def read_spec(path: Path) -> dict[str, Any]:
    """Return the content of a tokenizer.json, or of the tokenizer.json that a tekken.json amounts to.

    Raises:
        CheckpointError: if it is neither.
    """
    try:
        spec: dict[str, Any] = read_json(path)
        return spec if path.name == "tokenizer.json" else _from_tekken(spec)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} is not a {path.name}: {type(error).__name__}: {error}.") from None


def _build(spec: Mapping[str, Any]) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(spec))


def _template_opening(post: Mapping[str, Any]) -> str | None:
    """The control token that the post-processor puts before a text."""
    parts = [post, *post.get("processors", [])]
    singles = [part.get("single") or [{}] for part in parts if part.get("type") == "TemplateProcessing"]
    return next((single[0]["SpecialToken"]["id"] for single in singles if "SpecialToken" in single[0]), None)


def _prefix_scheme(spec: Mapping[str, Any]) -> str:
    """Tell if texts between added tokens get a space before them: "always", the "first" of a document, or "never"."""
    for step in _steps(spec.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend":
            return "always"
    for step in _steps(spec.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] in ("Metaspace", "ByteLevel"):
            scheme: str | None = step.get("prepend_scheme")
            return scheme or ("always" if step.get("add_prefix_space") else "never")
    return "never"


def _steps(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """A step, or the steps of a sequence."""
    return [] if step is None else [part for inner in step.get(key, ()) for part in _steps(inner, key)] or [step]


def _from_tekken(tekken: Mapping[str, Any]) -> dict[str, Any]:
    """A tokenizer.json for Mistral's tekken.json: control tokens first, then byte sequences in the order of merging."""
    config, named = tekken["config"], tekken.get("special_tokens")
    if named is None:
        raise ValueError("it is of the first version, which does not name its control tokens; take the tokenizer.json")
    specials = [token["token_str"] for token in sorted(named, key=lambda token: int(token["rank"]))]
    if [int(token["rank"]) for token in sorted(named, key=lambda token: int(token["rank"]))] != [*range(len(specials))]:
        raise ValueError("the ranks of its control tokens have gaps")
    count = config.get("default_num_special_tokens") or len(specials)
    if count > MOST_SPECIALS:
        raise ValueError(f"default_num_special_tokens is {count}, and {MOST_SPECIALS:,} are the most that are read")
    specials += [f"<SPECIAL_{i}>" for i in range(len(specials), count)]
    size = config.get("default_vocab_size")
    words = [base64.b64decode(token["token_bytes"]) for token in tekken["vocab"]][: size and size - count]
    ranks = {word: rank for rank, word in enumerate(words)}
    sizes = {len(word) for word in ranks}
    letters = _byte_letters()

    def spell(word: bytes) -> str:
        return "".join(map(letters.__getitem__, word))

    merges = []
    for word in words:
        at = [i for i in sizes if 0 < i < len(word) and len(word) - i in sizes]  # few, however long a word is
        halves = [(word[:i], word[i:]) for i in at]
        halves = [pair for pair in halves if pair[0] in ranks and pair[1] in ranks]
        merges += [[spell(a), spell(b)] for a, b in sorted(halves, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    off = dict.fromkeys(FLAGS, False)
    cut = {"type": "Split", "pattern": {"Regex": config["pattern"]}, "behavior": "Isolated", "invert": False}
    as_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    opening = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": name, "special": True, **off} for i, name in enumerate(specials)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [cut, as_bytes]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": opening,
            "pair": opening,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [specials.index("<s>")], "tokens": ["<s>"]}},
        },
        "decoder": as_bytes,
        "model": {
            "type": "BPE",
            "ignore_merges": True,
            "vocab": {name: i for i, name in enumerate([*specials, *map(spell, words)])},
            "merges": merges,
        },
    }  # fmt: skip


MOST_SPECIALS = 100_000
"""Control tokens of a tekken.json; Mistral's have 1,000."""


def _byte_letters() -> list[str]:
    """The letter that byte-level tokenizers write for each byte: itself if it can be seen, else one from 256 on."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(byte if byte in seen else next(hidden)) for byte in range(256)]
