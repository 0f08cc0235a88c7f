"""The identity of a tokenizer: a hash of all that decides the ids of a text."""

import json
from pathlib import Path

from lit_qlora.files.hashing import hash_file, hash_text
from lit_qlora.prompts.added_tokens import read_if_there, read_settings
from lit_qlora.prompts.tokenizer import MODELS

LISTS = ("added_tokens_decoder", "extra_special_tokens", "additional_special_tokens")


def fingerprint(directory: Path) -> str | None:
    """sha256 of the vocabulary's file and of the tokens that files beside it add or name; None without a vocabulary.

    Chat templates and settings of sampling do not count.

    Raises:
        CheckpointError: if a file is no JSON.
    """
    vocabulary = next((directory / name for name in MODELS if (directory / name).is_file()), None)
    if vocabulary is None:
        return None
    generation, config = (read_if_there(directory / name) for name in ("generation_config.json", "config.json"))
    facts = {
        "vocabulary": hash_file(vocabulary),
        "settings": {k: v for k, v in read_settings(directory).items() if k in LISTS or k.endswith("_token")},
        "added": read_if_there(directory / "added_tokens.json"),
        "bos": generation.get("bos_token_id"),
        "eos": generation.get("eos_token_id") or config.get("eos_token_id"),
    }
    return hash_text(json.dumps(facts, sort_keys=True))
