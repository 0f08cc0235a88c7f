"""The ids of every kind of tokenizer, in every style, are those of transformers for the template that is published.

Training, generation, chat, serving and lm-eval are held to the same ids.
"""

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.prompts.conversation import Conversation
from lit_qlora.prompts.published import chat_template
from lit_qlora.prompts.style import STYLES, Style, TemplateStyle, knobs_style
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import PromptKnobs
from tests.prompts.test_style import CONTROLS, TEMPLATES
from tests.prompts.test_tokenizer import byte_level, metaspace, prepend, write_json
from tests.prompts.test_tokenizer_parity import as_the_hub_has_it, train, unigram_json

transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")  # transformers reads SentencePiece files with it

KNOBS = PromptKnobs(text_system_start="S: ", text_prompt_start="Q: ", text_answer_separator="\nA: ")
STYLES_HERE: dict[str, Style] = {
    **STYLES,
    "knobs": knobs_style(KNOBS),
    **{f"template {name}": TemplateStyle("{{ bos_token }}" + source) for name, source in TEMPLATES.items()},
}
TEXTS = [
    "What is 1 plus 2?",
    " leading and trailing ",
    "two\n\nlines\t",
    "naïve ▁ <think>é</think> 日本",
    "\u00a0no-break\u2003",
    "a <think> b</think>\nc",
]
PLAIN = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)


def read_spec(directory: Path) -> dict[str, Any]:
    """A tokenizer.json without merges of line ends, which could join a prompt to its answer."""
    spec: dict[str, Any] = json.loads((directory / "tokenizer.json").read_text())
    if "merges" in spec["model"]:
        spec["model"]["merges"] = [pair for pair in spec["model"]["merges"] if "Ċ" not in "".join(pair)]
    return spec


def with_controls(
    make: Callable[[Path], None], change: Callable[[dict[str, Any]], None] | None = None, **flags: bool
) -> Callable[[Path], Any]:
    """tokenizer.json of a kind, with the control tokens of every style, and words that are no control tokens."""

    def build(directory: Path) -> Any:
        make(directory)
        spec = read_spec(directory)
        known = {token["content"] for token in spec["added_tokens"]}
        vocabulary = spec["model"]["vocab"]
        size = max(len(vocabulary), *(token["id"] + 1 for token in spec["added_tokens"]))
        new = [name for name in CONTROLS if name not in known]
        for i, name in enumerate([*new, "<think>", "</think>"]):
            is_word = "think" in name
            spec["added_tokens"].append(
                {"id": size + i, "content": name, "special": not is_word, **PLAIN, **({} if is_word else flags)}
            )
        if change:
            change(spec)
        write_json(directory / "tokenizer.json", spec)
        write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory)

    return build


def scheme(name: str) -> Callable[[dict[str, Any]], None]:
    """Set the prepend scheme of Metaspace."""

    def change(spec: dict[str, Any]) -> None:
        spec["pre_tokenizer"]["prepend_scheme"] = name

    return change


def words_that_strip(spec: dict[str, Any]) -> None:
    """Words with flags, too."""
    for token in spec["added_tokens"]:
        if "think" in token["content"]:
            token |= {"lstrip": True, "rstrip": True, "normalized": True}


def ends_are_no_control_tokens(spec: dict[str, Any]) -> None:
    """BOS and EOS without their flag."""
    for token in spec["added_tokens"]:
        token["special"] = token["special"] and token["content"] not in ("<s>", "</s>")


def beside(name: str) -> Callable[[Path], Any]:
    """Added tokens in a file beside tokenizer.json alone."""

    def build(directory: Path) -> Any:
        byte_level(directory)
        spec = read_spec(directory)
        write_json(directory / "tokenizer.json", spec)
        size = len(spec["model"]["vocab"])
        new = [control for control in CONTROLS if control != "</s>"]
        config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
        if name == "tokenizer_config.json":
            tokens = {
                str(size + i): {"content": c, "special": True, **PLAIN, "rstrip": True} for i, c in enumerate(new)
            }
            config["added_tokens_decoder"] = tokens
        elif name == "added_tokens.json":
            write_json(directory / name, {content: size + i for i, content in enumerate(new)})
            config["additional_special_tokens"] = new[1:]  # as transformers 4 writes them; they say what is special
        else:
            config.pop("bos_token")
            write_json(directory / name, {"bos_token": {"content": "<s>"}, "additional_special_tokens": new[1:]})
        write_json(directory / "tokenizer_config.json", config)
        return transformers.PreTrainedTokenizerFast.from_pretrained(directory)

    return build


def sentencepiece(directory: Path) -> Any:
    """tokenizer.model with added_tokens.json; transformers reads the tokenizer.json that new conversions make of it."""
    from tokenizers import pre_tokenizers

    train(directory, model_type="bpe", normalization_rule_name="identity")
    names = [name for name in CONTROLS if name not in ("<s>", "</s>")]
    size = Tokenizer(directory).size
    write_json(directory / "added_tokens.json", {name: size + i for i, name in enumerate(names)})
    theirs = as_the_hub_has_it(directory, tuple((name, True) for name in names))
    theirs.backend_tokenizer.normalizer = None
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    theirs.bos_token, theirs.eos_token = "<s>", "</s>"
    return theirs


def tekken(directory: Path) -> Any:
    """Mistral's own file."""
    from transformers.integrations.mistral.tokenizer import convert_tekken_tokenizer

    words = [bytes([i]) for i in range(256)] + [text.encode() for text in ("he", "in", " w", "th", "the", " is", "us")]
    specials = ["<unk>", "<s>", "</s>", *(name for name in CONTROLS if name not in ("<s>", "</s>"))]
    content = {
        "config": {
            "pattern": r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            "default_vocab_size": 280 + len(words) - 2,  # the last two words are padding
            "default_num_special_tokens": 280,
        },
        "vocab": [
            {"rank": i, "token_bytes": base64.b64encode(word).decode(), "token_str": None}
            for i, word in enumerate(words)
        ],
        "special_tokens": [{"rank": i, "token_str": name, "is_control": True} for i, name in enumerate(specials)],
    }
    write_json(directory / "tekken.json", content)
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return convert_tekken_tokenizer(str(directory / "tekken.json"))


KINDS: dict[str, Callable[[Path], Any]] = {
    "bytes": with_controls(byte_level),
    "bytes, rstrip": with_controls(byte_level, rstrip=True),
    "bytes, lstrip": with_controls(byte_level, lstrip=True),
    "bytes, single word": with_controls(byte_level, single_word=True),
    "bytes, normalized": with_controls(byte_level, words_that_strip, normalized=True, rstrip=True),
    "bytes, space": with_controls(lambda directory: byte_level(directory, add_prefix_space=True), lstrip=True),
    "bytes, ends are words": with_controls(byte_level, ends_are_no_control_tokens),
    "Prepend": with_controls(prepend),
    "Prepend, rstrip": with_controls(prepend, rstrip=True, lstrip=True),
    "Metaspace, always": with_controls(metaspace, scheme("always"), rstrip=True),
    "Metaspace, first": with_controls(metaspace, scheme("first")),
    "Metaspace, first, lstrip": with_controls(metaspace, scheme("first"), lstrip=True),
    "Metaspace, never": with_controls(metaspace, scheme("never")),
    "unigram": with_controls(unigram_json, scheme("always")),
    "unigram, first": with_controls(unigram_json, scheme("first"), rstrip=True),
    "tokens in tokenizer_config.json": beside("tokenizer_config.json"),
    "tokens in added_tokens.json": beside("added_tokens.json"),
    "tokens in special_tokens_map.json": beside("special_tokens_map.json"),
    "SentencePiece": sentencepiece,
    "tekken": tekken,
}


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer here and in transformers."""
    directory = tmp_path_factory.mktemp("tokenizer")
    theirs = KINDS[request.param](directory)
    return Tokenizer(directory), theirs


@pytest.mark.parametrize(
    ("pair", "name"),
    [
        pytest.param(kind, name, marks=[pytest.mark.slow] if (i + j) % 2 else [])
        for i, kind in enumerate(KINDS)
        for j, name in enumerate(STYLES_HERE)
    ],
    indirect=["pair"],
)
def test_ids_are_those_of_transformers_for_the_published_template(pair: tuple[Tokenizer, Any], name: str) -> None:
    ours, theirs = pair
    style = STYLES_HERE[name]
    theirs.chat_template = chat_template(style, ours)
    for text in TEXTS:
        for system in (None, "", "Be kind."):
            if system is not None and "gemma" in name:
                continue  # its template has no words for one
            turns = [(text, "A fox."), (f"And {text}", "I ran.")]
            turns = turns[1:] if name == "text" else turns  # nothing parts what it writes
            said = Conversation.of(*turns, system=system)
            messages = [{"role": message.role, "content": message.content} for message in said.messages]
            expected = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=False)
            prompt = style.encode_prompt(ours, said.prompt)
            assert prompt == expected
            (trained,) = style.encode_many(ours, [said])
            assert [i for turn in trained for part in turn[:2] for i in part][: len(prompt)] == expected
            if not isinstance(style, TemplateStyle):  # whose text is the template's own
                assert ours.encode_marked(style.as_text(ours, messages[:-1]), bos=False) == expected
