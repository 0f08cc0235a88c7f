"""Text to token ids and back: SentencePiece (tokenizer.model) and Hugging Face tokenizers (tokenizer.json)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from lit_qlora.errors import CheckpointError

FILES = (
    "tokenizer.model",
    "tokenizer.json",
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
        size: number of tokens known, which can be less than the model's vocab_size.
    """

    def __init__(self, directory: Path | str) -> None:
        directory = Path(directory)
        settings = _read_json(directory / "tokenizer_config.json")
        generation = _read_json(directory / "generation_config.json")
        self._backend: _Backend
        if (directory / "tokenizer.model").is_file():
            self._backend = _SentencePiece(directory / "tokenizer.model")
        elif (directory / "tokenizer.json").is_file():
            self._backend = _HuggingFace(directory / "tokenizer.json")
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
        adds_bos = settings.get("add_bos_token")
        self.use_bos = self.bos_id is not None and bool(self._backend.adds_bos if adds_bos is None else adds_bos)

    def encode(self, text: str, bos: bool | None = None, eos: bool = False, continuation: bool = False) -> list[int]:
        """Token ids of `text`.

        Args:
            bos: begin with BOS; by default where the model's own files do.
            eos: end with EOS.
            continuation: `text` goes on after other text, so it gets neither BOS nor the space that
                SentencePiece puts before the first word.
        """
        ids = self._continue(text) if continuation and self._backend.prefixes else self._backend.encode(text)
        if bos if bos is not None else (self.use_bos and not continuation):
            if self.bos_id is None:
                raise CheckpointError("This tokenizer has no BOS token, so bos=True cannot be honoured.")
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without control tokens and without ids that the tokenizer does not know."""
        return self._backend.decode([i for i in ids if 0 <= i < self.size])

    def _continue(self, text: str) -> list[int]:
        """Encode `text` behind a character that does not join what follows, and take that character's ids off."""
        for before in ("\n", "\x07"):
            known, ids = self._backend.encode(before), self._backend.encode(before + text)
            if known and ids[: len(known)] == known:
                return ids[len(known) :]
        return self._backend.encode(text)

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
    adds_bos: bool

    prefixes: bool
    """Whether the first word of a text gets a space before it."""

    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...
    def token_to_id(self, token: str) -> int | None: ...


class _SentencePiece:
    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        try:
            if not path.stat().st_size:  # sentencepiece takes an empty file for a vocabulary of none
                raise RuntimeError("the file is empty")
            self.processor = SentencePieceProcessor(model_file=str(path))
        except (RuntimeError, OSError) as error:
            raise CheckpointError(f"{path} is not a SentencePiece model: {error}.") from None
        self.size = self.processor.vocab_size()
        self.bos_id = self.processor.bos_id() if self.processor.bos_id() >= 0 else None
        self.eos_id = self.processor.eos_id() if self.processor.eos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        self.prefixes = True

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.processor.encode(text)
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.processor.decode(ids)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int = self.processor.piece_to_id(token)
        return found if found != self.processor.unk_id() or token == self.processor.id_to_piece(found) else None


class _HuggingFace:
    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer as Backend

        try:
            self.backend = Backend.from_file(str(path))
            spec = json.loads(path.read_text())
        except Exception as error:  # tokenizers raises plain Exception
            raise CheckpointError(f"{path} is not a tokenizer.json: {error}.") from None
        self.backend.encode_special_tokens = True  # "</s>" in a text is text
        self.backend.no_truncation()
        self.backend.no_padding()
        self.size = self.backend.get_vocab_size(with_added_tokens=True)
        self.bos_id: int | None = None  # tokenizer.json does not say; tokenizer_config.json does
        self.eos_id: int | None = None
        self.adds_bos = self._template_starts_with_control(spec.get("post_processor") or {})
        normalizer, pre_tokenizer = json.dumps(spec.get("normalizer")), json.dumps(spec.get("pre_tokenizer"))
        metaspace = "Metaspace" in pre_tokenizer and '"never"' not in pre_tokenizer
        self.prefixes = "Prepend" in normalizer or metaspace or '"add_prefix_space": true' in pre_tokenizer

    def _template_starts_with_control(self, post: dict[str, Any]) -> bool:
        parts = [post, *post.get("processors", [])]
        singles = [part.get("single") or [] for part in parts if part.get("type") == "TemplateProcessing"]
        return any(single and "SpecialToken" in single[0] for single in singles)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self.backend.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        text: str = self.backend.decode(ids, skip_special_tokens=True)
        return text

    def token_to_id(self, token: str) -> int | None:
        found: int | None = self.backend.token_to_id(token)
        return found


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        content: Any = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: expected an object, found {type(content).__name__}.")
    return content


def _as_list(value: Any) -> list[int]:
    return [] if value is None else [int(v) for v in value] if isinstance(value, list) else [int(value)]
