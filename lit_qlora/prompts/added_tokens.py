"""Tokens that files beside a vocabulary add to it, in the order in which transformers 5 adds them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_qlora.errors import CheckpointError
from lit_qlora.files.reading import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Keys of settings whose value is a control token."""
SPACE = "\t\n\v\f\r \u0085\u00a0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""The characters that lstrip and rstrip take for white space; str.strip takes more."""


NEW_TOKENS = "new_tokens.json"
"""The tokens that scripts/add_tokens.py gave a checkpoint, whose rows nobody has trained yet."""
MOST_IDS = 2**24
"""Ids that tokens may have are below."""


@dataclass(frozen=True, kw_only=True)
class AddedToken:
    """A token that is found in a text before the vocabulary's own model sees it."""

    content: str
    id: int | None = None
    """None: the next that is free."""
    special: bool = True
    """A control token, which is never made of text."""
    lstrip: bool = False
    """It swallows the white space before it."""
    rstrip: bool = False
    """It swallows the white space behind it."""
    single_word: bool = False
    """It is found only where no letter or digit touches it."""
    normalized: bool = False
    """It is looked for in the normalised text."""

    def __post_init__(self) -> None:
        """Check the id, which a file gives."""
        if self.id is not None and not 0 <= self.id < MOST_IDS:
            raise ValueError(f"{self.content!r} cannot be token {self.id}")

    @classmethod
    def parse(cls, token: Any, id: int | None = None, special: bool | None = None) -> "AddedToken":
        """A token as files spell it: its name, or a table; `special` overrules the table."""
        facts = {"content": token} if isinstance(token, str) else dict(token)
        is_special = bool(facts.get("special", isinstance(token, str)) if special is None else special)
        content = facts["content"]
        if not isinstance(content, str):
            raise TypeError(f"the content of a token is {content!r}")
        flags = {name: bool(facts.get(name)) for name in ("lstrip", "rstrip", "single_word")}
        normalized = bool(facts.get("normalized", not is_special))
        return cls(content=content, id=id, special=is_special, normalized=normalized, **flags)


def read_settings(directory: Path) -> dict[str, Any]:
    """Return the settings of tokenizer_config.json and special_tokens_map.json together.

    The map is the older file. It counts more, unless the configuration has the table of tokens that replaced it.
    """
    config, older = (read_if_there(directory / name) for name in ("tokenizer_config.json", "special_tokens_map.json"))
    return older | config if "added_tokens_decoder" in config else config | older


def read_added_tokens(directory: Path, settings: Mapping[str, Any]) -> list[AddedToken]:
    """The tokens that files beside a vocabulary add to it; some may be in it already.

    A name can come again with other flags, and without an id; then the first counts.
    """
    table = settings.get("added_tokens_decoder") or {}
    listed = {str(token["content"]): AddedToken.parse(token, int(i)) for i, token in table.items()}
    for content, i in read_if_there(directory / "added_tokens.json").items():
        # The older file does not say which are control tokens: all are, since text must never become one.
        listed.setdefault(content, AddedToken(content=content, id=int(i)))
    return [*sorted(listed.values(), key=lambda token: token.id or 0), *_named(settings)]


def read_new_tokens(directory: Path) -> dict[str, int]:
    """Return the tokens of NEW_TOKENS, name -> id; {} where there is no such file.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = directory / NEW_TOKENS
    tokens = read_if_there(path).get("tokens", {})
    if not isinstance(tokens, dict) or not all(type(i) is int for i in tokens.values()):
        raise CheckpointError(f"{path} is damaged: its tokens have no ids.")
    return tokens


def _named(settings: Mapping[str, Any]) -> Iterator[AddedToken]:
    """The control tokens that settings name, by their role or in a list."""
    extra = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    roles = [key for key in settings if key.endswith("_token") and key not in NAMED]
    values = [settings.get(key) for key in (*NAMED, *roles)]
    for value in [*values, *(extra.values() if isinstance(extra, dict) else extra)]:
        if isinstance(value, str | dict):
            yield AddedToken.parse(value, special=True)


def read_if_there(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    return dict(read_json(path)) if path.is_file() else {}
