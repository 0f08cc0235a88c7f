"""A tokenizer as GGUF holds it: every token with its kind, and scores or merges to find them in a text."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_qlora.convert.ending import Ending
from lit_qlora.convert.gguf_architectures import write_otherwise
from lit_qlora.errors import CheckpointError
from lit_qlora.prompts.backends import read_pieces, read_spec
from lit_qlora.prompts.chat_template import find_chat_template
from lit_qlora.prompts.published import chat_template
from lit_qlora.prompts.tokenizer import MODELS

if TYPE_CHECKING:
    from gguf import GGUFWriter

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of tokens, in GGUF as in SentencePiece."""
NO_MERGE = "no merge"
"""llama.cpp reads no byte-level tokenizer without a merge; no text falls into parts of two and five letters."""
_DIGIT, _DIGITS = r"\p{N}", r"\p{N}{1,3}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPACES = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*" + _SPACES
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_MARKED = _ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _SPACES
_DEEPSEEK = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _SPACES
)

_SEED = _WORDS + r"\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+" + _SPACES
CASED = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373"
    "\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f"
    "\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77"
    "\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-"
    "\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-"
    "\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    "\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17"
    "\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-"
    "\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters of scripts with capitals, as a class of a pattern: those that DeepSeek V2 and DeepSeek LLM take for words."""
_IDEOGRAPHS = "[一-龥\u0800-一가-\ud7ff]+"
_DEEPSEEK_V2 = (
    r"[\r\n]",
    rf"\s?[{CASED}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    _IDEOGRAPHS,
    _DIGIT,
)
_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _IDEOGRAPHS, _DIGIT)
_PUNCTUATION = r"[\p{P}$+<=>^`|~]+"
_BEHIND = "bytes: "
"""Before a pattern: it cuts what was turned into bytes already."""


def _cased(ending: str, digits: str) -> str:
    """Words that end where a capital letter begins another."""
    first = r"[^\r\n\p{L}\p{N}]?"
    words = f"{first}{_UPPER}*{_LOWER}+{ending}|{first}{_UPPER}+{_LOWER}*{ending}"
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*{_SPACES}"


SPLITS: dict[tuple[tuple[str, ...], bool], str] = {
    ((_WORDS + _DIGITS + _REST,), True): "llama-bpe",
    ((_WORDS + _DIGITS + _REST,), False): "glm4",
    ((_WORDS + _DIGIT + _REST,), False): "qwen2",
    ((_MARKED,), False): "qwen35",
    ((_cased(_ENDINGS + "?", _DIGITS),), False): "gpt-4o",
    ((_cased("", _DIGIT),), True): "tekken",
    ((_DIGITS, "[一-龥\u3040-ゟ\u30a0-ヿ]+", _DEEPSEEK), False): "deepseek-v3",
    (_CODER, False): "deepseek-coder",
    (_DEEPSEEK_V2, False): "deepseek-llm",
    ((_SEED,), False): "seed-coder",
    ((_PUNCTUATION, _GPT2, _BEHIND + r"\p{N}+", _BEHIND + "[0-9][0-9][0-9]"), False): "falcon",
    ((_DIGIT, _GPT2), False): "starcoder",
    ((_GPT2,), False): "gpt-2",
}
"""Patterns by which a byte-level tokenizer.json cuts a text before it merges, and ignore_merges -> llama.cpp's name.

The patterns follow each other. With ignore_merges a word that is a token stays whole.
"""
_MARKS = "words with combining marks (e + \u0301, Hindi, Thai)"
LOOSE = {
    "NFC": "texts with decomposed accents (e + \u0301)",
    "gpt-4o": _MARKS,
    "tekken": _MARKS,
    "deepseek-llm": "an ideographic space behind two other spaces",
}
"""llama.cpp's name of a cut, or a change before it that llama.cpp does not make -> the texts whose tokens differ.

They are rare. NFC makes one character of e and \u0301.
"""
APART = {
    r"\d{1,3}(?=(?:\d{3})*\b)": "tiny_aya, parts two spaces before a digit, and groups the digits of 1920x otherwise",
    r"\A\p{Nd}{3}|\G\p{Nd}{3}": "afmoe, parts two spaces before a digit",
}
"""A pattern that tells a tokenizer (Command A's, Trinity's) -> llama.cpp's cut for it, and what that does otherwise."""


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in the order of their ids."""

    tokens: list[str]
    kinds: list[int]
    scores: list[float] = field(default_factory=list)
    """SentencePiece: of two pieces the one with the higher score is made first."""
    merges: list[str] = field(default_factory=list)
    """Byte-level BPE: "left right", first merge first."""
    split: str = "default"
    """Byte-level BPE: llama.cpp's name of the pattern that cuts a text before merging; "default": SentencePiece."""
    prefix: bool
    """The first word gets a space before it."""
    bos_id: int | None
    eos_id: int
    other_stops: tuple[int, ...]
    """Other tokens that end an answer; llama.cpp has two names for them, "end of turn" and "end of message"."""
    adds_bos: bool
    chat_template: str | None

    def write(self, writer: "GGUFWriter") -> None:
        """Add it to a file that has not been opened yet."""
        writer.add_tokenizer_model("gpt2" if self.split != "default" else "llama")
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        if self.split != "default":
            writer.add_token_merges(self.merges or [NO_MERGE])
        else:
            writer.add_token_scores(self.scores)
            writer.add_add_space_prefix(self.prefix)
        if self.bos_id is not None:
            writer.add_bos_token_id(self.bos_id)
        writer.add_eos_token_id(self.eos_id)
        for add, i in zip((writer.add_eot_token_id, writer.add_eom_token_id), self.other_stops, strict=False):
            add(i)
        writer.add_add_bos_token(self.adds_bos)
        writer.add_add_eos_token(False)
        if UNKNOWN in self.kinds:
            writer.add_unk_token_id(self.kinds.index(UNKNOWN))
        if self.chat_template:
            writer.add_chat_template(self.chat_template)


def read_vocabulary(directory: Path, ending: Ending, size: int) -> Vocabulary:
    """The vocabulary of a checkpoint, filled up to `size` rows of the embedding.

    Raises:
        CheckpointError: if the tokenizer is of a kind that llama.cpp does not have.
    """
    tokenizer = ending.tokenizer
    rows: dict[int, tuple[str, float, int]] = {}
    merges: list[str] = []
    split = "default"
    path = next(directory / name for name in MODELS if (directory / name).is_file())
    beside = _sentencepiece(directory)
    if beside:
        pieces = read_pieces(beside)
        if any(kind == NORMAL and score != int(score) for _, score, kind in pieces):
            raise _refused(directory, "its tokenizer is a Unigram one; llama.cpp has BPE alone for such a model")
        rows |= dict(enumerate(pieces))
    else:
        rows, merges, split = _read_bpe(read_spec(path), directory)
    for i, token in tokenizer.added_tokens.items():
        known = rows.get(i, (token.content, 0.0, NORMAL))
        kind = known[2] if known[2] in (UNKNOWN, BYTE) else CONTROL if token.special else USER_DEFINED
        rows[i] = (token.content, known[1], kind)
    # A control token without a row, such as that of an image, is written by nothing here.
    written = [i for i, (_, _, kind) in rows.items() if kind != CONTROL or i in ending.stop_ids]
    if max(written) >= size:
        raise CheckpointError(f"{directory}: the tokenizer has {max(written) + 1} tokens, the model {size} embeddings.")
    full = [rows.get(i, (f"[PAD{i}]", -1e9, UNUSED)) for i in range(size)]
    return Vocabulary(
        tokens=[content for content, _, _ in full],
        scores=[score for _, score, _ in full] if split == "default" else [],
        kinds=[kind for _, _, kind in full],
        merges=merges,
        split=split,
        prefix=tokenizer.prefixes,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        other_stops=ending.stop_ids[1:],
        adds_bos=tokenizer.use_bos,
        chat_template=(
            chat_template(ending.style, tokenizer, llama_cpp=True) if ending.style else find_chat_template(directory)
        ),
    )


def differences(directory: Path) -> list[str]:
    """Texts that llama.cpp cuts into other tokens than the tokenizer of a checkpoint that can be exported."""
    if _sentencepiece(directory):
        return []
    spec = read_spec(next(directory / name for name in MODELS if (directory / name).is_file()))
    return [LOOSE[name] for name in (*_changes(spec), _read_bpe(spec, directory)[2]) if name in LOOSE]


def _refused(directory: Path, why: str) -> CheckpointError:
    """The error of a tokenizer that llama.cpp does not have."""
    return CheckpointError(f"{directory}: {why}.\n{write_otherwise()}")


def _sentencepiece(directory: Path) -> Path | None:
    """The SentencePiece file of a checkpoint, which has the scores that a tokenizer.json lacks; None without one."""
    return next(
        (directory / name for name in ("tokenizer.model", "spiece.model") if (directory / name).is_file()), None
    )


def _read_bpe(spec: dict[str, Any], directory: Path) -> tuple[dict[int, tuple[str, float, int]], list[str], str]:
    """Rows, merges and the name of the split, of a tokenizer.json."""
    model = spec["model"]
    if model["type"] != "BPE":
        kind = model["type"]
        raise _refused(directory, f"its tokenizer is a {kind} one; llama.cpp has BPE alone for such a model")
    pairs = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    if model.get("byte_fallback"):
        made: dict[str, int] = {}
        for rank, pair in enumerate(pairs):
            made.setdefault("".join(pair), rank)
        unknown = model.get("unk_token")
        rows = {}
        for piece, i in model["vocab"].items():
            is_byte = len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">")
            kind = BYTE if is_byte else UNKNOWN if piece == unknown else NORMAL
            rows[i] = (piece, -float(made.get(piece, len(pairs))), kind)
        return rows, [], "default"
    cuts = _cuts(spec.get("pre_tokenizer") or {})
    split = SPLITS.get((cuts, bool(model.get("ignore_merges"))))
    if split is None:
        why = next(
            (f"llama.cpp's cut for it, {APART[cut]}" for cut in cuts if cut in APART), "llama.cpp has none like it"
        )
        raise _refused(directory, f"no GGUF for the way its tokenizer cuts texts: {why}")
    if other := ", ".join(change for change in _changes(spec) if change not in LOOSE):
        raise _refused(directory, f"its tokenizer changes texts ({other}) before it cuts them; llama.cpp does not")
    # GGUF puts a space between the two parts, so one inside a part is written as the character 256 further on.
    merges = [" ".join(part.replace(" ", "\u0120") for part in pair) for pair in pairs]
    return {i: (piece, 0.0, NORMAL) for piece, i in model["vocab"].items()}, merges, split


def _changes(spec: dict[str, Any]) -> list[str]:
    """The kinds of steps that change a text before a tokenizer.json cuts it."""
    step = spec.get("normalizer") or {"type": "Sequence"}
    return [part["type"] for part in step.get("normalizers", [] if step["type"] == "Sequence" else [step])]


def _cuts(step: dict[str, Any]) -> tuple[str, ...]:
    """The patterns by which a byte-level pre-tokenizer cuts a text, in their order; () for one of another kind."""
    steps = step.get("pretokenizers", [step])
    cuts = tuple(_cut(part) for part in steps)
    end = next((i for i, part in enumerate(steps, 1) if part.get("type") == "ByteLevel"), 0)
    if not end or None in cuts:
        return ()
    return (*filter(None, cuts[:end]), *(f"{_BEHIND}{pattern}" for pattern in cuts[end:]))


def _cut(step: dict[str, Any]) -> str | None:
    """The pattern of one step, "" for one that cuts nothing, None for one that has no pattern."""
    kind = step.get("type")
    if kind == "ByteLevel":
        return None if step.get("add_prefix_space") else _GPT2 if step.get("use_regex", True) else ""
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits") else r"\p{N}+"
    if kind == "Punctuation":
        return _PUNCTUATION if step.get("behavior") == "Contiguous" else None
    ways = (step.get("behavior"), bool(step.get("invert")))
    pattern = step.get("pattern", {}).get("Regex")
    if kind != "Split" or pattern is None or ways not in (("Isolated", False), ("Removed", True)):
        return None
    return str(pattern).replace("\r", r"\r").replace("\n", r"\n")
