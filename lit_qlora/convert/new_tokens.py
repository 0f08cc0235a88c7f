"""New tokens for a base, which itself stays as it is: a checkpoint beside it with more rows and another tokenizer."""

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, cat

from lit_qlora.checkpoint import checkpoint
from lit_qlora.checkpoint.packed import PACKED, PackedWeights
from lit_qlora.checkpoint.score import read as read_head
from lit_qlora.convert.ending import read_ending
from lit_qlora.convert.hub import SOURCE
from lit_qlora.convert.to_hugging_face import name_tokenizer
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.files import atomic
from lit_qlora.files.reading import read_json
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts import tokenizer as tokenizers
from lit_qlora.prompts.added_tokens import NEW_TOKENS, read_if_there, read_new_tokens
from lit_qlora.prompts.style import FILE_NAME as STYLE_FILE
from lit_qlora.prompts.tokenizer import Tokenizer

GROWN = ("embed.weight", "head.weight", "head.bias")
"""Tensors with a row or an element for each token."""
PROBE = "The quick brown fox: 1234567890, \u00e9\u4f60\n\tif (x) { return y; }"


@dataclass(frozen=True, kw_only=True)
class NewTokens:
    """Tokens that were added.

    Attributes:
        ids: name -> id.
        config: of the model with them.
    """

    ids: dict[str, int]
    config: ModelConfig


def add_tokens(
    checkpoint_dir: Path,
    out_dir: Path,
    names: Sequence[str],
    like: Mapping[str, str] | None = None,
    control: bool = True,
) -> NewTokens:
    """Write the checkpoint of a base with new tokens, whole or not at all.

    Rows that a base has to spare are used first. A new row is the mean of all known tokens' rows (Hewitt 2021), or of
    the rows of a text.

    Args:
        like: new token -> that text, which may name control tokens.
        control: text never becomes one of them; otherwise they are words that texts may spell.

    Raises:
        UsageError: for a name that is a token already, is given twice or is empty, a text for another token, or an
            `out_dir` that has something in it.
        CheckpointError: if the checkpoint is damaged, or cannot take tokens.
        ResourceError: if there is not enough room.
    """
    config, known, like = ModelConfig.load(checkpoint_dir), Tokenizer(checkpoint_dir), dict(like or {})
    _check_names(known, names, like)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UsageError(f"{out_dir} has something in it. Give --out_dir a new name, or remove it.")
    if read_head(checkpoint_dir) is not None:
        raise CheckpointError(
            f"{checkpoint_dir} has a head that reads labels, which knows no new tokens.\n"
            "Add them to the base that it was merged from, and train there."
        )
    weights = checkpoint.open_weights(checkpoint_dir)
    weights = weights.stored if isinstance(weights, PackedWeights) else weights
    if config.per_layer_size or "head" + PACKED in weights.specs:
        what = "an embedding for each block" if config.per_layer_size else "a head in 4 bits"
        raise CheckpointError(f"{config.name} has {what}, which cannot take new tokens.")
    ids = {name: known.size + i for i, name in enumerate(names)}
    grown = replace(config, vocab_size=max(config.vocab_size, known.size + len(ids)))
    sources = {i: _ids(known, like[name]) if name in like else [] for name, i in ids.items()}
    seen = min(known.size, config.vocab_size)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights.specs:
            tensor = weights.read(name)
            yield name, _grow(tensor, sources, seen, grown.vocab_size) if name in GROWN else tensor

    specs = {
        name: spec.new_empty(grown.vocab_size, *spec.shape[1:]) if name in GROWN else spec
        for name, spec in weights.specs.items()
    }
    with atomic.writing(out_dir), atomic.temporary_directory(out_dir) as folder:
        for file in (*tokenizers.FILES, "config.json", SOURCE, STYLE_FILE):
            if (checkpoint_dir / file).is_file():
                shutil.copyfile(checkpoint_dir / file, folder / file)
        kept = [path for path in [checkpoint_dir / checkpoint.KEPT] if path.is_file()]
        checkpoint.save_weights(folder, grown, specs, tensors(), also=kept)
        _write_names(folder, ids, control)
        name_tokenizer(folder, read_ending(folder), config.family)
        _write(folder / NEW_TOKENS, {"tokens": read_new_tokens(checkpoint_dir) | ids})
        _read_back(folder, known, ids, control)
        atomic.publish(folder, out_dir)
    return NewTokens(ids=ids, config=grown)


def _check_names(known: Tokenizer, names: Sequence[str], like: Mapping[str, str]) -> None:
    """Raise UsageError for names that cannot be new tokens, or texts that belong to none."""
    for text in (*names, *like.values()):
        if len(text) != len(text.encode(errors="ignore").decode()):
            raise UsageError(f"tokens: {text!a} holds what is no character.")
    for name in names:
        if not name.strip():
            raise UsageError("tokens: a token needs a name.")
        if (found := known.id_of(name)) is not None:
            raise UsageError(f"tokens: {name!r} is token {found} already. --lora.train_tokens {found} trains it.")
    if len(set(names)) < len(names):
        raise UsageError(f"tokens: a name is given twice: {', '.join(names)}.")
    if strange := sorted(set(like) - set(names)):
        raise UsageError(f"like: {strange[0]!r} is none of the new tokens: {', '.join(names)}.")
    if empty := [name for name, text in like.items() if not _ids(known, text)]:
        raise UsageError(f"like.{empty[0]} has no text to begin from.")


def _ids(known: Tokenizer, text: str) -> list[int]:
    """The tokens of a text, which may name control tokens."""
    return known.encode_marked(text, bos=False)


def _grow(tensor: Tensor, sources: Mapping[int, list[int]], seen: int, size: int) -> Tensor:
    """`tensor` (V, ...) with `size` rows; new ones are means of `sources`, of the first `seen` rows where empty."""
    grown = cat([tensor, tensor.new_zeros(max(0, size - len(tensor)), *tensor.shape[1:])])
    mean = tensor[:seen].float().mean(dim=0)
    for i, rows in sources.items():
        grown[i] = tensor[rows].float().mean(dim=0) if rows else mean
    return grown


def _write_names(folder: Path, ids: Mapping[str, int], control: bool) -> None:
    """Name the tokens in the files of the tokenizer, where transformers and llama.cpp look for them.

    Raises:
        CheckpointError: for a tokenizer that has no place for them.
    """
    vocabulary = next(name for name in tokenizers.MODELS if (folder / name).is_file())
    if vocabulary == "tekken.json":
        raise CheckpointError("A tekken.json has no place for new tokens. Take one of those that it has in reserve.")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokens = {i: {"content": name, **flags, "special": control} for name, i in ids.items()}
    path = folder / "tokenizer_config.json"
    settings, older = read_if_there(path), read_if_there(folder / "special_tokens_map.json")
    if vocabulary == "tokenizer.json":
        spec = read_json(folder / vocabulary)
        spec["added_tokens"] = [*spec.get("added_tokens", []), *({"id": i, **token} for i, token in tokens.items())]
        _write(folder / vocabulary, spec)
    elif "added_tokens_decoder" not in settings:
        settings |= {**older, "added_tokens_decoder": {}}  # a table of tokens counts more than the older file
    if "added_tokens_decoder" in settings:
        settings["added_tokens_decoder"] |= {str(i): token for i, token in tokens.items()}
        _write(path, settings)


def _read_back(folder: Path, known: Tokenizer, ids: Mapping[str, int], control: bool) -> None:
    """Raise CheckpointError unless the files name the new tokens, and texts have the ids that they had."""
    back = Tokenizer(folder)
    as_text = back.encode_marked if control else back.encode
    read = {name: (as_text(name, bos=False), name in back.control_tokens) for name in ids}
    wrong = [name for name, i in ids.items() if read[name] != ([i], control)]
    if wrong or back.encode(PROBE) != known.encode(PROBE):
        what = f"reads {wrong[0]!r} as something else" if wrong else "reads texts otherwise"
        raise CheckpointError(f"The tokenizer with new tokens {what}, so they cannot be added to this one.")


def _write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
