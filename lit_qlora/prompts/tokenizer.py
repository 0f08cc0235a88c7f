"""Text to token ids and back: SentencePiece (tokenizer.model) and Hugging Face tokenizers (tokenizer.json)."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, Protocol

from lit_qlora.errors import CheckpointError

MODELS = ("tokenizer.json", "tokenizer.model")
"""What a tokenizer can be read from, best first: tokenizer.json knows the added tokens and which are control tokens."""
FILES = (
    *MODELS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
)
"""Everything a tokenizer may consist of; copied as it is whenever a checkpoint is."""


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Text never becomes a control token: "</s>" in a data set is four characters, not the end of the text.

    Attributes:
        bos_id, eos_id: ids of the control tokens; bos_id is None where there is none.
        stop_ids: ids that end an answer (eos_id and what generation_config.json adds to it).
        use_bos: whether this model's texts begin with BOS, as its files say.
        control_tokens: content -> id of the tokens that structure a text, such as "</s>" or "<|im_end|>".
        prefixes: whether the first word of a text gets a space before it.
        size: number of tokens known, which can be less than the model's vocab_size.
    """

    def __init__(self, directory: Path | str) -> None:
        try:
            self._read(Path(directory))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            beside = ", ".join(name for name in FILES if name.endswith(".json") and (Path(directory) / name).is_file())
            raise CheckpointError(
                f"{directory}: one of {beside} is not of the form in which transformers writes it "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})."
            ) from error

    def _read(self, directory: Path) -> None:
        settings = _read_json(directory / "special_tokens_map.json") | _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")
        self._backend: _Backend
        if (directory / "tokenizer.json").is_file():
            self._backend = _HuggingFace(directory / "tokenizer.json")
        elif (directory / "tokenizer.model").is_file():
            self._backend = _SentencePiece(directory / "tokenizer.model", _added_tokens(directory, settings))
        else:
            raise CheckpointError(f"{directory} has neither tokenizer.model nor tokenizer.json, so no tokenizer.")
        self.size = self._backend.size

        self.bos_id = self._control(settings.get("bos_token")) if "bos_token" in settings else self._backend.bos_id
        eos = self._control(settings.get("eos_token")) if "eos_token" in settings else self._backend.eos_id
        stops = _as_list(generation.get("eos_token_id"))
        if eos is None and stops:
            eos = stops[0]
        if eos is None:
            raise CheckpointError(
                f"{directory}: the tokenizer names no end-of-text token, so a model could never stop.\n"
                'Add "eos_token" to tokenizer_config.json.'
            )
        if not 0 <= eos < self.size:
            raise CheckpointError(
                f"{directory}: generation_config.json names {eos} as end of text; the tokenizer has {self.size} tokens."
            )
        self.eos_id = eos
        if self.bos_id is None and generation.get("bos_token_id") is not None and "bos_token" not in settings:
            self.bos_id = int(generation["bos_token_id"])
        self.stop_ids = frozenset([eos, *stops])
        added = settings.get("added_tokens_decoder") or {}
        self.control_tokens = self._backend.control_tokens() | {
            token["content"]: int(i) for i, token in added.items() if token.get("special") and int(i) < self.size
        }
        self._control_ids = frozenset(self.control_tokens.values()) - {self._backend.unk_id}
        adds_bos = settings.get("add_bos_token")
        self.prefixes = self._backend.prefixes
        self.use_bos = self.bos_id is not None and bool(self._backend.adds_bos if adds_bos is None else adds_bos)

    def encode(self, text: str, bos: bool | None = None, eos: bool = False, continuation: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            bos: begin with BOS; by default where the model's own files do.
            eos: end with EOS.
            continuation: `text` goes on after other text, so it gets neither BOS nor the space that
                SentencePiece puts before the first word.
        """
        (ids,) = self.encode_many([text], continuation)
        if bos if bos is not None else (self.use_bos and not continuation):
            if self.bos_id is None:
                raise CheckpointError("This tokenizer has no BOS token, so bos=True cannot be honoured.")
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    def encode_many(self, texts: Sequence[str], continuation: bool = False) -> list[list[int]]:
        """As encode, without BOS and EOS, for many texts at once, which is several times as fast."""
        if continuation and self._backend.prefixes:
            return self._continue(texts)
        encoded = self._backend.encode_many(texts)
        if self._backend.texts_are_safe:
            return encoded
        return [
            ids if self._control_ids.isdisjoint(ids) else self._apart(text)
            for text, ids in zip(texts, encoded, strict=True)
        ]

    def encode_marked(self, text: str, bos: bool | None = None) -> list[int]:
        """As encode, but the name of a control token in `text` is that token, as Hugging Face's tokenizers have it.

        Only for texts that a program has written, such as the rendering of a chat template: whoever types can then type
        control tokens.
        """
        begin = [self.bos_id] if (self.use_bos if bos is None else bos) and self.bos_id is not None else []
        return begin + self._backend.encode_marked(text, self.control_tokens)

    def content(self, control: int | None) -> str:
        """What a control token is called: "</s>" for eos_id; '' for none."""
        return next((content for content, i in self.control_tokens.items() if i == control), "")

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without control tokens and without ids that the tokenizer does not know."""
        return self._backend.decode([i for i in ids if 0 <= i < self.size])

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts behind a character that does not join what follows, and take that character's ids off."""
        results: list[list[int] | None] = [None] * len(texts)
        for before in ("\n", "\x07"):
            left = [i for i, ids in enumerate(results) if ids is None]
            (known,) = self.encode_many([before])
            for i, ids in zip(left, self.encode_many([before + texts[i] for i in left]), strict=True):
                if known and ids[: len(known)] == known:
                    results[i] = ids[len(known) :]
        return [self.encode_many([text])[0] if ids is None else ids for text, ids in zip(texts, results, strict=True)]

    def _apart(self, text: str) -> list[int]:
        """Encode a text that holds the names of control tokens as the characters that they are."""
        names = re.compile("|".join(map(re.escape, self.control_tokens)))
        cuts = [0, *(found.start() + 1 for found in names.finditer(text)), len(text)]
        parts = [text[start:end] for start, end in pairwise(cuts)]
        return [i for n, part in enumerate(parts) for i in self.encode_many([part], continuation=n > 0)[0]]

    def _control(self, token: Any) -> int | None:
        if token is None:
            return None
        content = token["content"] if isinstance(token, dict) else token
        found = self._backend.token_to_id(content)
        if found is None:
            raise CheckpointError(
                f"tokenizer_config.json names the control token {content!r}, which the tokenizer does not know."
            )
        return found


class _Backend(Protocol):
    size: int
    bos_id: int | None
    eos_id: int | None
    unk_id: int | None
    adds_bos: bool

    prefixes: bool
    """Whether the first word of a text gets a space before it."""
    texts_are_safe: bool
    """Whether encode_many never makes a control token of a text by itself."""

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_marked(self, text: str, control: Mapping[str, int]) -> list[int]: ...
    def control_tokens(self) -> dict[str, int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...


@dataclass(frozen=True, kw_only=True)
class _AddedToken:
    """A token that stands in a file beside the model."""

    id: int
    content: str
    control: bool
    """It is never made of text."""


class _SentencePiece:
    def __init__(self, path: Path, added: Sequence[_AddedToken]) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not path.stat().st_size:  # sentencepiece takes an empty file for a vocabulary of none
                raise RuntimeError("the file is empty")
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is not a SentencePiece model: {error}.") from None
        pieces: int = self.processor.vocab_size()
        self.added = {token.id: token for token in added if token.id >= pieces}
        self.size = max([pieces, *(i + 1 for i in self.added)])
        words = {token.content: i for i, token in self.added.items() if not token.control}
        self.words = _any_of(words) if words else None
        self.word_ids = words
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_id = self.processor.eos_id() if self.processor.eos_id() >= 0 else None
        self.unk_id: int | None = self.processor.unk_id()
        self.adds_bos = self.bos_id is not None
        self.prefixes = self.processor.encode("a", out_type=str)[0].startswith("▁")
        self.texts_are_safe = False  # symbols that whoever trained the model defined are found in every text

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        ids: list[list[int]] = self.processor.encode(list(texts), num_threads=os.cpu_count() if len(texts) > 1 else 1)
        if self.words:
            ids = [self._encode_with_words(t) if self.words.search(t) else i for t, i in zip(texts, ids, strict=True)]
        return ids

    def encode_marked(self, text: str, control: Mapping[str, int]) -> list[int]:
        marks = {**control, **self.word_ids}
        return self._encode_with(_any_of(marks), marks, text)

    def _encode_with_words(self, text: str) -> list[int]:
        assert self.words
        return self._encode_with(self.words, self.word_ids, text)

    def _encode_with(self, marks: re.Pattern[str], known: Mapping[str, int], text: str) -> list[int]:
        """Ids of a text with tokens in it that are cut out; what follows one is not a beginning."""
        ids: list[int] = []
        for part in filter(None, marks.split(text)):
            if part in known:
                ids.append(known[part])
            elif ids and self.prefixes:
                behind = self.processor.encode(f"\n{part}")
                ids += behind[len(self.processor.encode("\n")) :]
            else:
                ids += self.processor.encode(part)
        return ids

    def control_tokens(self) -> dict[str, int]:
        pieces = range(self.processor.vocab_size())
        own = {self.processor.id_to_piece(i): i for i in pieces if self.processor.is_control(i)}
        return own | {token.content: i for i, token in self.added.items() if token.control}

    def decode(self, ids: list[int]) -> str:
        text = ""
        for is_added, run in groupby(ids, key=self.added.__contains__):
            part = list(run)
            if is_added:
                text += "".join(self.added[i].content for i in part if not self.added[i].control)
            else:
                # SentencePiece takes the space off the first word, which is right only where the text begins.
                inner = bool(text) and self.prefixes and self.processor.id_to_piece(part[0]).startswith("▁")
                text += " " * inner + self.processor.decode(part)
        return text

    def token_to_id(self, token: str) -> int | None:
        for i, added in self.added.items():
            if added.content == token:
                return i
        found: int = self.processor.piece_to_id(token)
        return found if found != self.processor.unk_id() or token == self.processor.id_to_piece(found) else None


def read_pieces(path: Path) -> list[tuple[str, float, int]]:
    """Piece, score and kind of each token of a SentencePiece file; its own numbers for the kinds, 1 being normal."""
    sp = _SentencePiece(path, []).processor
    kinds = ((sp.is_unknown, 2), (sp.is_control, 3), (sp.is_unused, 5), (sp.is_byte, 6))
    return [
        (sp.id_to_piece(i), sp.get_score(i), next((kind for holds, kind in kinds if holds(i)), 1))
        for i in range(sp.vocab_size())
    ]


def _added_tokens(directory: Path, settings: Mapping[str, Any]) -> list[_AddedToken]:
    """What tokenizer_config.json and added_tokens.json add to tokenizer.model.

    The older added_tokens.json does not say which are control tokens: all are, since text must never become one.
    """
    known = {
        int(i): _AddedToken(id=int(i), content=str(token["content"]), control=bool(token.get("special")))
        for i, token in (settings.get("added_tokens_decoder") or {}).items()
    }
    for content, i in _read_json(directory / "added_tokens.json").items():
        known.setdefault(int(i), _AddedToken(id=int(i), content=content, control=True))
    return list(known.values())


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_file(str(path))
            spec = json.loads(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}.") from None
        self.backend.encode_special_tokens = True  # "</s>" in a text is text
        self.added = {token["content"]: int(token["id"]) for token in spec.get("added_tokens", []) if token["special"]}
        # A model can find in a text what it has in its own vocabulary: Unigram any piece, BPE what merges lead to.
        merges = spec["model"].get("merges", [])
        reached = {"".join(pair.split(" ") if isinstance(pair, str) else pair) for pair in merges}
        self.texts_are_safe = spec["model"]["type"] == "BPE" and reached.isdisjoint(self.added)
        unknown = spec["model"].get("unk_token")
        self.unk_id: int | None = self.token_to_id(unknown) if unknown else spec["model"].get("unk_id")
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = self.backend.get_vocab_size(with_added_tokens=True)
        opening = self._template_opening(spec.get("post_processor") or {})
        self.bos_id = self.token_to_id(opening) if opening else None  # tokenizer_config.json may say otherwise
        self.eos_id: int | None = None
        self.adds_bos = opening is not None
        normalizer, pre_tokenizer = json.dumps(spec.get("normalizer")), json.dumps(spec.get("pre_tokenizer"))
        metaspace = "Metaspace" in pre_tokenizer and '"never"' not in pre_tokenizer
        self.prefixes = "Prepend" in normalizer or metaspace or '"add_prefix_space": true' in pre_tokenizer

    def _template_opening(self, post: dict[str, Any]) -> str | None:
        """The control token that the post-processor puts before a text."""
        parts = [post, *post.get("processors", [])]
        singles = [part.get("single") or [{}] for part in parts if part.get("type") == "TemplateProcessing"]
        return next((single[0]["SpecialToken"]["id"] for single in singles if "SpecialToken" in single[0]), None)

    def encode_many(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_marked(self, text: str, control: Mapping[str, int]) -> list[int]:
        self.backend.encode_special_tokens = False
        try:
            ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True
        return ids

    def control_tokens(self) -> dict[str, int]:
        return self.added

    def decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found


def _any_of(names: Iterable[str]) -> re.Pattern[str]:
    """Finds any of `names`, the longest where several begin at the same place."""
    return re.compile(f"({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(content).__name__}.")
    return content


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [int(v) for v in value] if isinstance(value, list) else [int(value)]
