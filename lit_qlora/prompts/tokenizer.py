"""Text to token ids and back, by the files of a checkpoint."""

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.prompts.added_tokens import AddedToken, read_added_tokens, read_if_there, read_settings
from lit_qlora.prompts.backends import Backend, HuggingFace, SentencePiece, read_spec

MODELS = ("tokenizer.json", "tokenizer.model", "spiece.model", "tekken.json")
"""Files to read a tokenizer from, best first: tokenizer.json knows the added tokens and which are control tokens."""
FILES = (
    *MODELS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "processor_config.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
)
"""Everything a tokenizer, or a processor of images around it, may consist of.

It is copied as it is whenever a checkpoint is.
"""


class Tokenizer:
    """The tokenizer of a checkpoint directory.

    Text never becomes a control token: "</s>" in a data set is four characters, not the end of the text.

    Attributes:
        bos_id, eos_id: ids of the control tokens; bos_id is None where there is none.
        stop_ids: ids that end an answer: eos_id and those of generation_config.json, or of config.json if it has none.
        use_bos: whether this model's texts begin with BOS, as its files say.
        added_tokens: id -> token, of tokens that are found before the vocabulary's own model sees a text.
        control_tokens: content -> id of the tokens that structure a text, such as "</s>" or "<|im_end|>".
        prefixes: whether the first word of a text gets a space before it.
        begins_behind_control: whether what follows a control token gets that space, too.
        size: number of tokens known, which can be less than the model's vocab_size, or more.
        mask_id: id of the token that stands for a hidden one: unk_token, else mask_token, pad_token or EOS.
        without_embedding: ids that the model beside the tokenizer has no row for, such as those of images.
    """

    def __init__(self, directory: Path | str) -> None:
        try:
            self._read(Path(directory))
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            beside = ", ".join(name for name in FILES if name.endswith(".json") and (Path(directory) / name).is_file())
            raise CheckpointError(
                f"{directory}: one of {beside} is not of the form in which transformers writes it "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]})."
            ) from error

    def _read(self, directory: Path) -> None:
        settings, generation = read_settings(directory), read_if_there(directory / "generation_config.json")
        tokens = read_added_tokens(directory, settings)
        self._backend = self._open(directory, tokens, "added_tokens_decoder" in settings)
        self.size = self._backend.size
        self.bos_id = self._named(settings["bos_token"]) if "bos_token" in settings else self._backend.bos_id
        eos = self._named(settings["eos_token"]) if "eos_token" in settings else self._backend.eos_id
        stops = as_list(generation.get("eos_token_id"))
        stops = stops or as_list(read_if_there(directory / "config.json").get("eos_token_id"))
        if eos is None and stops:
            eos = stops[0]
        if eos is None:
            raise CheckpointError(
                f"{directory}: the tokenizer names no end-of-text token, so a model could never stop.\n"
                'Add "eos_token" to tokenizer_config.json.'
            )
        if not 0 <= eos < self.size:
            raise CheckpointError(
                f"{directory}: generation_config.json or config.json names {eos} as end of text; the tokenizer has "
                f"{self.size} tokens."
            )
        self.eos_id = eos
        if self.bos_id is None and generation.get("bos_token_id") is not None and "bos_token" not in settings:
            self.bos_id = int(generation["bos_token_id"])
        self.stop_ids = frozenset([eos, *stops])
        for control in (self.bos_id, self.eos_id):
            if control is not None:
                self._backend.make_control(control)
        self.added_tokens, self._safe = self._backend.added, self._backend.texts_are_safe
        self.control_tokens = {token.content: i for i, token in self.added_tokens.items() if token.special}
        self._control_ids = frozenset(self.control_tokens.values()) - {self._backend.unk_id}
        self.prefixes, self.begins_behind_control = self._backend.prefixes, self._backend.begins_behind_control
        rows = read_if_there(directory / "model_config.json").get("vocab_size")
        self.without_embedding = range(self.size if rows is None else int(rows), self.size)
        names = ("unk_token", "mask_token", "pad_token")
        unknown, *others = (self._named(settings.get(name)) for name in names)
        known = (unknown, self._backend.unk_id, *others)
        self.mask_id = next((i for i in known if i is not None and i not in self.without_embedding), self.eos_id)
        adds_bos = settings.get("add_bos_token")
        self.use_bos = self.bos_id is not None and bool(self._backend.adds_bos if adds_bos is None else adds_bos)

    @staticmethod
    def _open(directory: Path, tokens: list[AddedToken], overrules: bool) -> Backend:
        path = next((directory / name for name in MODELS if (directory / name).is_file()), None)
        if path is None:
            raise CheckpointError(f"{directory} has none of {', '.join(MODELS)}, so no tokenizer.")
        if path.suffix == ".model":
            return SentencePiece(path, tokens)
        return HuggingFace(path, read_spec(path), tokens, overrules)

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
        encode = self._continue if continuation and self._backend.prefixes else self._backend.encode_many
        encoded = encode(texts)
        if not self._safe:
            encoded = [
                ids if self._control_ids.isdisjoint(ids) else self._apart(text, continuation)
                for text, ids in zip(texts, encoded, strict=True)
            ]
        if self.without_embedding:
            self.require_embedding(i for ids in encoded for i in ids)
        return encoded

    def encode_marked(self, text: str, bos: bool | None = None) -> list[int]:
        """As encode, but the name of a control token in `text` is that token, as Hugging Face's tokenizers have it.

        Only for texts that a program has written, such as the rendering of a chat template: whoever types can then type
        control tokens.
        """
        begin = [self.bos_id] if (self.use_bos if bos is None else bos) and self.bos_id is not None else []
        ids = begin + self._backend.encode_marked(text)
        self.require_embedding(ids)
        return ids

    def require_embedding(self, ids: Iterable[int]) -> None:
        """Raise CheckpointError for an id that the model has no row for, naming the token."""
        if self.without_embedding and (beyond := [i for i in ids if i in self.without_embedding]):
            first = min(beyond)
            raise CheckpointError(
                f"The data, the prompt style or the chat template writes {self._backend.id_to_token(first)!r}, token "
                f"{first}; the model has {self.without_embedding.start} embeddings.\n"
                "Take that token out of them, or the tokenizer that belongs to the model."
            )

    def id_of(self, name: str) -> int | None:
        """Return the id of the token with this name, a control token or another; None if there is none."""
        return self._backend.token_to_id(name)

    def content(self, control: int | None) -> str:
        """Return the name of a control token: "</s>" for eos_id; '' for none."""
        return next((content for content, i in self.control_tokens.items() if i == control), "")

    def opening(self, text: str) -> str:
        """Return the text to put between BOS and `text`, in one text, so that `text` is encoded as a beginning."""
        if not self.prefixes or self.begins_behind_control:
            return ""
        return " " if self._backend.doubles_space or text[:1] not in (" ", "▁") else ""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without control tokens and without ids that the tokenizer does not know."""
        return self._backend.decode([i for i in ids if 0 <= i < self.size])

    def _continue(self, texts: Sequence[str]) -> list[list[int]]:
        """Encode texts behind a character that does not join what follows, and take that character's ids off."""
        results: list[list[int] | None] = [None] * len(texts)
        encode = self._backend.encode_many
        for before in ("\n", "\x07"):
            left = [i for i, ids in enumerate(results) if ids is None]
            (known,) = encode([before])
            for i, ids in zip(left, encode([before + texts[i] for i in left]), strict=True):
                if known and ids[: len(known)] == known:
                    results[i] = ids[len(known) :]
        return [encode([text])[0] if ids is None else ids for text, ids in zip(texts, results, strict=True)]

    def _apart(self, text: str, continuation: bool) -> list[int]:
        """Encode a text that spells control tokens as the characters that it is made of."""
        names = re.compile(f"(?={'|'.join(map(re.escape, self.control_tokens))})")  # also within each other
        cuts = [found.start() + 1 for found in names.finditer(text) if found.start() + 1 < len(text)]
        if not cuts and len(text) > 1:  # it has letters that a normalizer writes the name with, such as wide ones
            cuts = [len(text) // 2]
        if not cuts:
            raise CheckpointError(f"The tokenizer makes a control token of {text!r}, which is text. Leave it out.")
        first, *rest = (text[start:end] for start, end in pairwise([0, *cuts, len(text)]))
        return [i for ids in self.encode_many([first], continuation) + self.encode_many(rest, True) for i in ids]

    def _named(self, token: Any) -> int | None:
        """The id of a token that settings name."""
        return None if token is None else self._backend.token_to_id(AddedToken.parse(token).content)


def as_list(value: Any) -> list[int]:
    """Ids as generation_config.json has them: none, one, or a list."""
    return [] if value is None else [int(v) for v in value] if isinstance(value, list) else [int(value)]
