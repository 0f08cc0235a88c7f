"""The ids of every kind of tokenizer are those that transformers gives, for texts that are easily got wrong."""

import io
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_qlora.convert.gguf_vocabulary import CASED as CASED_LETTERS
from lit_qlora.prompts.tokenizer import Tokenizer
from tests.prompts.test_tokenizer import CORPUS, NASTY, byte_level, metaspace, prepend, write_json

transformers = pytest.importorskip("transformers")
pytest.importorskip("google.protobuf")  # transformers reads SentencePiece files with it

TEXTS = [
    *NASTY,
    "Hello world",
    " leading",
    "  two leading",
    "trailing ",
    "in  the   middle    of",
    "tab\tand\u00a0no-break",
    "▁ is a block ▁▁ and ▁word",
    "e\u0301 A\u030a combining, ﬁ ligature, ½",
    "مرحبا بالعالم",
    "\u202eright to left\u202c",
    "日本語 한국어 ไทย",
    "👍🏽🇺🇳❤️\u200d🔥",
    "\n\n\n\n",
    " \n \n",
    "def f(x):\n    return x  # comment\n",
    "0123456789 3.14e-10",
    "<|im_start|>user\nhi<|im_end|>",
    "<s><s></s>",
    "</s></s> after",
    "lo" * 3000,
    "a" + "\u0300" * 50,
]


def train(directory: Path, **options: Any) -> None:
    """A SentencePiece model of the corpus in tokenizer.model."""
    from sentencepiece import SentencePieceTrainer

    buffer = io.BytesIO()
    SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, *TEXTS[:5]]),
        model_writer=buffer,
        vocab_size=450,
        hard_vocab_limit=False,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        minloglevel=2,
        num_threads=1,
        **options,
    )
    (directory / "tokenizer.model").write_bytes(buffer.getvalue())


def as_the_hub_has_it(directory: Path, added: tuple[tuple[str, bool], ...] = ()) -> Any:
    """Transformers' tokenizer for a SentencePiece file, as the tokenizer.json beside it on the hub is made.

    transformers 5.23 itself takes a bare tokenizer.model differently in two points, for which SentencePiece and these
    files agree: it merges in the order of the pieces instead of their scores, and adds no space before a text that
    begins with one.
    """
    import tokenizers
    from tokenizers import AddedToken, models, normalizers, processors
    from transformers.convert_slow_tokenizer import SentencePieceExtractor, generate_merges

    proto = SentencePieceExtractor(str(directory / "tokenizer.model")).proto
    scores = {piece.piece: piece.score for piece in proto.pieces}
    vocab = {piece: i for i, piece in enumerate(scores)}
    steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    if proto.normalizer_spec.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap))
    if proto.trainer_spec.model_type == 1:
        model = models.Unigram(list(scores.items()), unk_id=0, byte_fallback=True)
    else:
        model = models.BPE(vocab, generate_merges(vocab, scores), unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    backend = tokenizers.Tokenizer(model)
    backend.normalizer = normalizers.Sequence(steps)
    backend.add_special_tokens([AddedToken(p.piece, normalized=False) for p in proto.pieces if p.type in (2, 3)])
    for content, special in added:
        token = AddedToken(content, normalized=False, special=special)
        (backend.add_special_tokens if special else backend.add_tokens)([token])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=backend)


def sentencepiece_bpe(directory: Path) -> Any:
    """What Llama has."""
    train(directory, model_type="bpe", normalization_rule_name="identity")
    return as_the_hub_has_it(directory)


ADDED = (("<|im_start|>", True), ("<|im_end|>", True))


def sentencepiece_with_added_tokens(directory: Path) -> Any:
    """What models have that were fine-tuned with more control tokens."""
    train(directory, model_type="bpe", normalization_rule_name="identity")
    size = Tokenizer(directory).size
    added = {str(size + i): {"content": content, "special": special} for i, (content, special) in enumerate(ADDED)}
    write_json(directory / "tokenizer_config.json", {"added_tokens_decoder": added})
    return as_the_hub_has_it(directory, ADDED)


def sentencepiece_unigram(directory: Path) -> Any:
    """What models of many languages have, with Unicode's compatibility characters replaced."""
    train(directory, model_type="unigram", normalization_rule_name="nmt_nfkc")
    return as_the_hub_has_it(directory)


def fast(make: Callable[[Path], None]) -> Callable[[Path], Any]:
    """tokenizer.json alone."""

    def build(directory: Path) -> Any:
        make(directory)
        return transformers.PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))

    return build


def unigram_json(directory: Path) -> None:
    """A tokenizer.json with a Unigram model."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>"})


KINDS: dict[str, Callable[[Path], Any]] = {
    "SentencePiece BPE": sentencepiece_bpe,
    "SentencePiece BPE and added tokens": sentencepiece_with_added_tokens,
    "SentencePiece unigram": sentencepiece_unigram,
    "BPE, Prepend": fast(prepend),
    "BPE, Metaspace": fast(metaspace),
    "BPE, bytes": fast(byte_level),
    "unigram": fast(unigram_json),
}


@pytest.fixture(scope="module", params=KINDS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Tokenizer, Any]:
    """A tokenizer here and in transformers."""
    directory = tmp_path_factory.mktemp("tokenizer")
    theirs = KINDS[request.param](directory)
    return Tokenizer(directory), theirs


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_ids_are_those_of_transformers(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, theirs = pair
    expected = theirs(text, split_special_tokens=True)["input_ids"]
    if theirs.backend_tokenizer.model.__class__.__name__ == "Unigram":
        if any(name in text for name in ours.control_tokens):
            pytest.skip("Unigram in tokenizers makes control tokens of a text that has their names; see the next test")
        if theirs.backend_tokenizer.normalizer and text in ("\r\n\ttab", TEXTS[-1]):
            pytest.skip("tokenizers 0.23 applies SentencePiece's normalisation to whole graphemes")
    assert ours.encode(text) == expected


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:20]))
def test_no_text_holds_a_control_token(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = pair
    control = {i for content, i in ours.control_tokens.items() if content != "<unk>"}
    assert len(control) >= 1
    assert not control & set(ours.encode(text, bos=False))


def test_llama_2_itself(tmp_path: Path) -> None:
    path = os.environ.get("LIT_QLORA_LLAMA2_TOKENIZER")
    if not path:
        pytest.skip("LIT_QLORA_LLAMA2_TOKENIZER does not name the tokenizer.model of Llama 2")
    shutil.copy(path, tmp_path / "tokenizer.model")
    ours, theirs = Tokenizer(tmp_path), as_the_hub_has_it(tmp_path)
    assert (ours.size, ours.bos_id, ours.eos_id) == (32_000, 1, 2)
    assert ours.encode("Hello  world") == [1, 15043, 29871, 3186]
    for text in TEXTS:
        assert ours.encode(text) == theirs(text, split_special_tokens=True)["input_ids"], text
        assert ours.decode(ours.encode(text)) == text.replace("▁", " ")


@pytest.fixture
def with_words(tmp_path: Path) -> Tokenizer:
    """tokenizer.model with a word and two control tokens beside it, in each of the two files that can say so."""
    train(tmp_path, model_type="bpe", normalization_rule_name="identity")
    size = Tokenizer(tmp_path).size
    decoder = {
        str(size): {"content": "<think>", "special": False},
        str(size + 1): {"content": "<end>", "special": True},
    }
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": decoder, "eos_token": "<end>"})
    write_json(tmp_path / "added_tokens.json", {"<end>": size + 1, "<pad>": size + 2})
    return Tokenizer(tmp_path)


def test_tokens_beside_the_model_are_known(with_words: Tokenizer) -> None:
    size = with_words.size
    assert with_words.eos_id == size - 2
    assert with_words.control_tokens["<pad>"] == size - 1
    ids = with_words.encode("What is <think> 1 plus<think>2<end><pad>", bos=False)
    assert ids.count(size - 3) == 2
    assert not {size - 1, size - 2} & set(ids)
    assert with_words.decode(ids) == "What is <think> 1 plus<think>2<end><pad>"
    assert with_words.decode([*ids, size - 2]) == with_words.decode(ids)


def test_a_word_beside_the_model_cuts_the_text_and_nothing_is_added(with_words: Tokenizer) -> None:
    plain = with_words.encode("What is", bos=False)
    assert with_words.encode("What is<think>", bos=False) == [*plain, with_words.size - 3]
    behind = with_words.encode("What is", continuation=True)
    assert with_words.encode("<think>What is", bos=False)[1:] == behind


def test_tokenizer_json_is_read_rather_than_tokenizer_model(tmp_path: Path) -> None:
    byte_level(tmp_path)
    ids = Tokenizer(tmp_path).encode("naïve")
    train(tmp_path, model_type="bpe", normalization_rule_name="identity")
    assert Tokenizer(tmp_path).encode("naïve") == ids


def test_eos_can_stand_in_special_tokens_map_json(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": {"content": "</s>"}})
    assert Tokenizer(tmp_path).eos_id == 0


def cut(pattern: str, behavior: str = "Isolated") -> dict[str, Any]:
    """A step of a pre-tokenizer that cuts a text by a pattern."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": behavior, "invert": behavior == "Removed"}


def bytes_step(**more: bool) -> dict[str, Any]:
    """The last step of a byte-level pre-tokenizer."""
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False, **more}


REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+END|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*END|"
SLASH = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = CASED.replace("END", ENDINGS + "?") + r"\p{N}{1,3}" + SLASH
CL100K = ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST
QWEN3_5 = ENDINGS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
DEEPSEEK_WORDS = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^CRLF\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[CRLF]*"""
    r"|\s*[CRLF]+|\s+(?!\S)|\s+"
).replace("CRLF", "\r\n")
SEED = ENDINGS + r"|[^CRLF\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}CRLF]+|\s*[CRLF]+|\s+(?!\S)|\s+"
SEED = SEED.replace("CRLF", "\r\n")
DIGITS = {"type": "Digits", "individual_digits": True}
IDEOGRAPHS = "[一-龥ࠀ-一가-퟿]+"
ASIAN = (
    r"(?:[\u4E00-\u9FFF\u3040-\u309F\u30A0-\u30FF\u3400-\u4DBF\uf900-\uFAFF\uFF65-\uFF9F\u2F00-\u2FDF]+"
    r"|[\u0E00-\u0E7F]+|[\u0E80-\u0EFF]+|[\u1780-\u17FF]+|[\u1000-\u109F\uAA60-\uAA7F\uA9E0-\uA9FF]+"
    r"|[\uAC00-\uD7AF\u1100-\u11FF]+)"
)
HAN = "[一-龥\u3040-ゟ\u30a0-ヿ]+"
CHAINS: dict[str, tuple[list[dict[str, Any]], bool, str | None]] = {
    "Llama 3": ([cut(CL100K), bytes_step()], True, "llama-bpe"),
    "GLM-4": ([cut(CL100K), bytes_step()], False, "glm4"),
    "Granite 4.1": ([cut(CL100K, "Removed"), bytes_step()], False, "glm4"),
    "Qwen3": ([cut(CL100K.replace("{1,3}", "")), bytes_step()], False, "qwen2"),
    "Qwen3.5": ([cut(QWEN3_5), bytes_step()], False, "qwen35"),
    "gpt-oss": ([cut(O200K), bytes_step()], False, "gpt-4o"),
    "MiniMax-M2": ([cut(O200K, "Removed"), bytes_step()], False, "gpt-4o"),
    "tekken": ([cut(CASED.replace("END", "") + r"\p{N}" + SLASH), bytes_step()], True, "tekken"),
    "DeepSeek-V3": (
        [cut(r"\p{N}{1,3}"), cut(HAN), cut(DEEPSEEK_WORDS), bytes_step()],
        False,
        "deepseek-v3",
    ),
    "DeepSeek-Coder": (
        [cut("[\r\n]"), cut(r"\s?\p{L}+"), cut(r"\s?\p{P}+"), cut(IDEOGRAPHS), DIGITS, bytes_step()],
        False,
        "deepseek-coder",
    ),
    "DeepSeek V2": (
        [
            *(cut("[\r\n]"), cut(rf"\s?[{CASED_LETTERS}]+")),
            cut("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            *(cut(r"\s+$"), cut(IDEOGRAPHS), DIGITS, bytes_step()),
        ],
        False,
        "deepseek-llm",
    ),
    "Seed-Coder, Seed-OSS": ([cut(SEED), bytes_step()], False, "seed-coder"),
    "SmolLM2, Command R": ([DIGITS, bytes_step(use_regex=True)], False, "starcoder"),
    "GPT-2": ([bytes_step(use_regex=True)], False, "gpt-2"),
    "Falcon": (
        [
            {"type": "Punctuation", "behavior": "Contiguous"},
            bytes_step(use_regex=True),
            {"type": "Digits", "individual_digits": False},
            cut("[0-9][0-9][0-9]"),
        ],
        False,
        "falcon",
    ),
    "Command A": ([cut(r"\d{1,3}(?=(?:\d{3})*\b)"), cut(O200K), bytes_step()], False, None),
    "Trinity": (
        [
            {"type": "Digits", "individual_digits": False},
            cut(r"\p{Nd}{1,510}(?=(?>\p{Nd}{510})*(?:\P{Nd}|$))|\G\p{Nd}{510}"),
            *(cut(r"\A\p{Nd}{1,2}(?=\p{Nd}{3}+\z)"), cut(r"\A\p{Nd}{3}|\G\p{Nd}{3}")),
            cut(ASIAN),
            *(cut(DEEPSEEK_WORDS), bytes_step()),
        ],
        False,
        None,
    ),
}
"""Model -> the steps that its published tokenizer.json takes before it merges, ignore_merges, and llama.cpp's name.

Source: the patterns in their tokenizer.json, as a public census of them has them.
"""
DIFFICULT = [
    *TEXTS[:-2],
    "They'LL've 'S CamelCase HTTPServer getURLForID ÜberMensch МоскваГород",
    "$1,234,567.89 1 12 123 1234 12345 ١٢٣٤ ½ Ⅷ",
    "漢字カタカナ한국어 ไทย हिन्दी नमस्ते e\u0301 a\u0308b İstanbul ǅ ʰ",
    "a/b\\c//d\n//e --flag=1 {x:[1,2]}; #!@%^&*\r\n\r\n",
]


def of_chain(directory: Path, steps: list[dict[str, Any]], ignore_merges: bool) -> None:
    """A byte-level tokenizer.json with these steps, trained on difficult texts."""
    import tokenizers
    from tokenizers import AddedToken, pre_tokenizers, trainers

    pre = {"type": "Sequence", "pretokenizers": steps}
    model = {"type": "BPE", "vocab": {}, "merges": [], "ignore_merges": ignore_merges}
    spec = {"version": "1.0", "pre_tokenizer": pre, "decoder": bytes_step(), "model": model}
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    trainer = trainers.BpeTrainer(
        vocab_size=1200,
        special_tokens=[AddedToken("</s>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*CORPUS, *DIFFICULT * 3], trainer)
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>"})


@pytest.mark.slow
@pytest.mark.parametrize("model", CHAINS)
def test_ids_are_those_of_transformers_however_a_text_is_cut(model: str, tmp_path: Path) -> None:
    steps, ignore_merges, _ = CHAINS[model]
    of_chain(tmp_path, steps, ignore_merges)
    ours, theirs = Tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    letters, draw = "".join(DIFFICULT), random.Random(0)
    for text in [*DIFFICULT, *("".join(draw.choices(letters, k=80)) for _ in range(200))]:
        ids = ours.encode(text, bos=False)
        assert ids == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert ours.decode(ids) == text
