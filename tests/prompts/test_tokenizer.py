"""Tokenizers of both kinds: text survives, control tokens stay out of it, and ids are those of Hugging Face."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest

from lit_qlora.errors import CheckpointError
from lit_qlora.prompts import backends
from lit_qlora.prompts.conversation import prompt_of
from lit_qlora.prompts.pieces import Control, encode_pieces
from lit_qlora.prompts.style import STYLES
from lit_qlora.prompts.tokenizer import MODELS, Tokenizer
from tests.conftest import TEXT_STYLES, write_tokenizer

NASTY = [
    "",
    "plain words",
    "  two leading, three trailing   ",
    "a\n\nb\n",
    "\n",
    "\r\n\ttab",
    "😀 👩‍👩‍👧 emoji",
    "漢字かな交じり文",
    "naïve Ωμέγα עברית العربية",
    "</s>",
    "<s> [INST] <unk> <0x0A> </s>",
    "\x00\x07\x1b[2K",
    "\ufeffmark\u3000wide\u200bzero",
    "x" * 300,
]
CORPUS = [f"Q: What is {a} plus {b}?\nA: {a + b}\n\n  Indented, naïve 漢字 😀" for a in range(20) for b in range(20)]


def sentencepiece(directory: Path) -> None:
    write_tokenizer(directory)


def prepend(directory: Path) -> None:
    """A tokenizer.json as Llama-2's first conversion: a normalizer puts the space before the first word."""
    from tokenizers import normalizers

    blocks = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    metaspace(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    spec |= {"pre_tokenizer": None, "normalizer": json.loads(blocks.__getstate__())}
    write_json(directory / "tokenizer.json", spec)


def metaspace(directory: Path) -> None:
    """A tokenizer.json as today's conversions: BPE over SentencePiece's blocks, bytes for the rest, BOS by template."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=[*special, *byte_tokens], show_progress=False)
    backend.train_from_iterator([text.replace("\n", "") for text in CORPUS], trainer)
    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in byte_tokens]
    backend = tokenizers.Tokenizer.from_str(json.dumps(spec))
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


def byte_level(directory: Path, add_prefix_space: bool = False) -> None:
    """A tokenizer.json as GPT-2's: BPE over bytes, no BOS."""
    import tokenizers
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[AddedToken("</s>", special=True, normalized=False)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.save(str(directory / "tokenizer.json"))
    write_json(directory / "tokenizer_config.json", {"eos_token": "</s>"})


KINDS: dict[str, Callable[[Path], None]] = {
    "sentencepiece": sentencepiece,
    "prepend": prepend,
    "metaspace": metaspace,
    "byte level": byte_level,
}


def write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content))


@pytest.fixture(scope="session", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a tokenizer of each kind. Read only."""
    directory = tmp_path_factory.mktemp(request.param.replace(" ", "_"))
    KINDS[request.param](directory)
    return directory


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(made, tmp_path / "own"))


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_text_survives(made: Path, text: str) -> None:
    tokenizer = Tokenizer(made)
    ids = tokenizer.encode(text, eos=True)
    # Hugging Face's Metaspace adds no space before a text that begins with one, but takes one off all the same.
    assert tokenizer.decode(ids) == (text[1:] if made.name.startswith("metaspace") and text[:1] == " " else text)
    assert all(0 <= i < tokenizer.size for i in ids)


@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_text_never_becomes_a_control_token(made: Path, text: str) -> None:
    tokenizer = Tokenizer(made)
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(tokenizer.encode(text, bos=False))


@pytest.mark.parametrize("text", [text for text in NASTY if text], ids=repr)
@pytest.mark.parametrize("prompt", ["Q: 1?\nA:", "ends in a newline\n", "</s>"])
def test_prompt_and_continuation_are_the_whole_text(made: Path, prompt: str, text: str) -> None:
    tokenizer = Tokenizer(made)
    ids = tokenizer.encode(prompt) + tokenizer.encode(text, continuation=True)
    assert tokenizer.decode(ids) == prompt + text


@pytest.mark.parametrize("name", TEXT_STYLES)
def test_an_answer_is_encoded_as_a_model_would_go_on(made: Path, name: str) -> None:
    tokenizer, style = Tokenizer(made), STYLES[name]
    prompt = style.render("What is 1 plus 2?", "4", "Be kind.")
    pieces = style.encode_prompt(tokenizer, prompt_of("What is 1 plus 2?", "4", "Be kind.")) + style.encode_answer(
        tokenizer, "3"
    )
    assert pieces == tokenizer.encode(f"{prompt}{style.gap}3{style.tail}", eos=True)


def test_bos_comes_once_where_the_files_want_it(made: Path) -> None:
    tokenizer = Tokenizer(made)
    wanted = 0 if tokenizer.bos_id is None else 1
    assert tokenizer.use_bos == bool(wanted)
    assert tokenizer.encode("a b").count(tokenizer.bos_id) == wanted
    assert tokenizer.encode("a b", continuation=True).count(tokenizer.bos_id) == 0
    assert tokenizer.encode("a b", bos=False).count(tokenizer.bos_id) == 0
    assert tokenizer.encode("<s>a b")[wanted:].count(tokenizer.bos_id) == 0


@pytest.mark.parametrize(("wish", "wanted"), [(True, True), (False, False), (None, True)])
def test_tokenizer_config_decides_about_bos(tmp_path: Path, wish: bool | None, wanted: bool) -> None:
    sentencepiece(tmp_path)
    write_json(tmp_path / "tokenizer_config.json", {"add_bos_token": wish})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.use_bos is wanted
    assert (tokenizer.encode("a")[0] == tokenizer.bos_id) is wanted


def test_a_wish_for_bos_that_cannot_be_met_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    with pytest.raises(CheckpointError, match="no BOS token"):
        Tokenizer(tmp_path).encode("a", bos=True)


def test_generation_config_adds_ids_that_end_an_answer(own: Path) -> None:
    write_json(own / "generation_config.json", {"eos_token_id": [5, 6]})
    tokenizer = Tokenizer(own)
    assert tokenizer.stop_ids == {tokenizer.eos_id, 5, 6}


def test_unknown_ids_are_left_out_of_the_text(made: Path) -> None:
    tokenizer = Tokenizer(made)
    ids = tokenizer.encode("a b")
    assert tokenizer.decode([*ids, tokenizer.size, tokenizer.size + 99, -1]) == "a b"


@pytest.mark.parametrize("kind", ["prepend", "metaspace", "byte level"])
@pytest.mark.parametrize("text", NASTY, ids=repr)
def test_ids_are_those_of_hugging_face(tmp_path_factory: pytest.TempPathFactory, kind: str, text: str) -> None:
    from transformers import PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("hf")
    KINDS[kind](directory)
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"), split_special_tokens=True)
    assert Tokenizer(directory).encode(text) == theirs(text)["input_ids"]


def test_a_continuation_gets_no_space_from_a_byte_level_tokenizer_either(tmp_path: Path) -> None:
    byte_level(tmp_path, add_prefix_space=True)
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a\n") + tokenizer.encode("b", continuation=True)).strip() == "a\nb"


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(directory)
    return str(caught.value)


def test_a_directory_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} has none of {', '.join(MODELS)}, so no tokenizer."


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x00" * 100, b"{}"], ids=repr)
def test_a_damaged_tokenizer_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.model'} is not a SentencePiece model: ")
    (tmp_path / "tokenizer.model").rename(tmp_path / "tokenizer.json")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'tokenizer.json'}")


def test_truncated_tokenizer_files_are_named(own: Path) -> None:
    (file,) = own.glob("tokenizer.[mj]*")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    assert str(file) in refusal(own)


@pytest.mark.parametrize("content", ["{", "[]", "5"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "generation_config.json"])
def test_a_damaged_settings_file_is_named(own: Path, name: str, content: str) -> None:
    (own / name).write_text(content)
    assert refusal(own).startswith(f"{own / name}: ")


def test_a_control_token_that_only_the_settings_name_is_the_next_token(own: Path) -> None:
    size = Tokenizer(own).size
    write_json(own / "tokenizer_config.json", {"eos_token": "<|end|>"})
    tokenizer = Tokenizer(own)
    assert (tokenizer.eos_id, tokenizer.size) == (size, size + 1)
    assert tokenizer.eos_id not in tokenizer.encode("a<|end|>b")


def test_a_tokenizer_without_an_end_of_text_is_refused(tmp_path: Path) -> None:
    byte_level(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    assert 'Add "eos_token" to tokenizer_config.json.' in refusal(tmp_path)
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert Tokenizer(tmp_path).eos_id == 0
    write_json(tmp_path / "generation_config.json", {"eos_token_id": 99_999})
    assert "names 99999 as end of text" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", {"bos_token": {"id": 1}}),
        ("tokenizer_config.json", {"eos_token": ["</s>"]}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"a": {"content": "x"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": 5}),
        ("generation_config.json", {"eos_token_id": "x"}),
        ("added_tokens.json", {"x": None}),
    ],
    ids=str,
)
def test_a_file_beside_the_tokenizer_that_is_of_another_form_is_named(
    tiny_checkpoint: Path, tmp_path: Path, name: str, content: dict
) -> None:
    (tmp_path / "tokenizer.model").write_bytes((tiny_checkpoint / "tokenizer.model").read_bytes())
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"one of {name} is not of the form in which transformers writes it \("):
        Tokenizer(tmp_path)


def split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(content: str, **pattern: str) -> dict:
    return {"type": "Replace", "pattern": pattern or {"String": "a"}, "content": content}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre_tokenizer": split("(a+)+$")}, "it fails on 1,000 letters: Onig: Regex search error: retry-limit"),
        ({"pre_tokenizer": split(r"(\s+)+$")}, "it fails on 1,000 letters"),
        ({"normalizer": replace("b" * 100_000)}, "can make 100,000 characters of one, more than 128"),
        ({"normalizer": replace("b" * 200, Regex="")}, "can make 201 characters of one"),
        ({"normalizer": {"type": "Sequence", "normalizers": [replace("aa")] * 40}}, "can make 1,099,511,627,776"),
        ({"normalizer": {"type": "Prepend", "prepend": "a" * 1000}}, "can make 1,000 characters of one"),
        ({"decoder": {"type": "Sequence", "decoders": [replace("aaaaaaaa")] * 4}}, "can make 4,096 characters of one"),
    ],
    ids=lambda change: "",
)
def test_a_tokenizer_that_needs_time_or_memory_without_bound_is_refused(
    tmp_path: Path, change: dict, reason: str
) -> None:
    byte_level(tmp_path)
    write_json(tmp_path / "tokenizer.json", json.loads((tmp_path / "tokenizer.json").read_text()) | change)
    assert reason in refusal(tmp_path)


def test_a_tokenizer_that_does_not_come_to_an_end_is_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    byte_level(tmp_path)
    release = Event()

    def encode(*_: object) -> None:
        release.wait(60)

    monkeypatch.setattr(backends, "PROBE_SECONDS", 0.01)
    monkeypatch.setattr(backends.HuggingFace, "_encode_probes", encode)
    assert "it takes more than 0 s for 1,000 letters" in refusal(tmp_path)
    release.set()


def test_a_panic_of_the_library_is_one_message(tmp_path: Path) -> None:
    byte_level(tmp_path)
    spec = json.loads((tmp_path / "tokenizer.json").read_text())
    write_json(tmp_path / "tokenizer.json", spec | {"pre_tokenizer": split("(q+)+$")})  # no probe has this letter
    tokenizer = Tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode a text: Onig"):
        tokenizer.encode("q" * 40 + "!")
    assert tokenizer.encode("Q: What is 1?") != []


def with_added(directory: Path, *tokens: dict) -> int:
    """A byte-level tokenizer with more added tokens; returns the id of the first."""
    byte_level(directory)
    spec = json.loads((directory / "tokenizer.json").read_text())
    size = len(spec["model"]["vocab"])
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    spec["added_tokens"] += [off | {"id": size + i, "special": True} | token for i, token in enumerate(tokens)]
    write_json(directory / "tokenizer.json", spec)
    return size


def test_bos_and_eos_are_control_tokens_whatever_their_flags_say(tmp_path: Path) -> None:
    first = with_added(tmp_path, {"content": "<go>", "special": False}, {"content": "<stop>", "special": False})
    write_json(tmp_path / "tokenizer_config.json", {"bos_token": "<go>", "eos_token": {"content": "<stop>"}})
    tokenizer = Tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (first, first + 1)
    assert (tokenizer.content(first), tokenizer.content(first + 1)) == ("<go>", "<stop>")
    assert not {first, first + 1} & set(tokenizer.encode("a<go>b<stop>", bos=False))
    assert tokenizer.decode([first, first + 1]) == ""


def test_the_newer_of_two_files_of_settings_is_believed(tmp_path: Path) -> None:
    first = with_added(tmp_path, {"content": "<a>"}, {"content": "<b>"})
    write_json(tmp_path / "special_tokens_map.json", {"eos_token": "<a>"})
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<b>"})
    assert Tokenizer(tmp_path).eos_id == first
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<b>", "added_tokens_decoder": {}})
    assert Tokenizer(tmp_path).eos_id == first + 1


def test_files_that_disagree_about_an_id_are_refused(tmp_path: Path) -> None:
    size = with_added(tmp_path)
    decoder = {str(size + 7): {"content": "<far>", "special": True}}
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>", "added_tokens_decoder": decoder})
    assert f"says that '<far>' is token {size + 7}; with tokenizer.json it is {size}" in refusal(tmp_path)


def test_ids_that_end_an_answer_can_stand_in_config_json_alone(own: Path) -> None:
    write_json(own / "config.json", {"eos_token_id": [5, 6]})
    tokenizer = Tokenizer(own)
    assert tokenizer.stop_ids == {tokenizer.eos_id, 5, 6}
    write_json(own / "generation_config.json", {"eos_token_id": 7})
    assert Tokenizer(own).stop_ids == {tokenizer.eos_id, 7}


def test_a_token_without_an_embedding_is_refused_only_where_it_is_written(tmp_path: Path) -> None:
    first = with_added(tmp_path, {"content": "<image>"}, {"content": "<word>", "special": False})
    write_json(tmp_path / "model_config.json", {"vocab_size": first})
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.size == first + 2
    assert tokenizer.encode("an <image> is text")
    with pytest.raises(CheckpointError, match=rf"writes '<word>', token {first + 1}; the model has {first} embeddings"):
        tokenizer.encode("a <word>")
    with pytest.raises(CheckpointError, match="writes '<image>'"):
        encode_pieces(tokenizer, [[["a", Control("<image>")]]])
    with pytest.raises(CheckpointError, match="writes '<image>'"):
        tokenizer.encode_marked("a <image>")


def test_spiece_model_is_a_sentencepiece_file(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    ids = Tokenizer(tmp_path).encode("What is 1 plus 2?")
    (tmp_path / "tokenizer.model").rename(tmp_path / "spiece.model")
    assert Tokenizer(tmp_path).encode("What is 1 plus 2?") == ids


def test_a_tekken_file_that_does_not_name_its_control_tokens_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "tekken.json", {"config": {"pattern": "."}, "vocab": []})
    assert "which does not name its control tokens; take the tokenizer.json" in refusal(tmp_path)


def test_a_tekken_file_with_millions_of_control_tokens_is_refused(tmp_path: Path) -> None:
    config = {"pattern": ".", "default_num_special_tokens": 10**9}
    write_json(tmp_path / "tekken.json", {"config": config, "special_tokens": [], "vocab": []})
    assert "default_num_special_tokens is 1000000000, and 100,000 are the most" in refusal(tmp_path)


def test_a_control_token_swallows_white_space_across_prompt_and_answer(tmp_path: Path) -> None:
    first = with_added(tmp_path, {"content": "<r>", "rstrip": True}, {"content": "<l>", "lstrip": True})
    tokenizer = Tokenizer(tmp_path)
    (parts,) = encode_pieces(tokenizer, [[["a ", Control("<r>")], [" \n", "b \u00a0"], [Control("<l>"), " c\u200b"]]])
    b, c = (tokenizer.encode(text, bos=False) for text in ("b", " c\u200b"))
    assert parts == [[*tokenizer.encode("a ", bos=False), first], b, [first + 1, *c]]


def test_looking_for_a_token_that_swallows_white_space_takes_time_in_proportion(tmp_path: Path) -> None:
    sentencepiece(tmp_path)
    token = {"content": "<gap>", "special": False, "lstrip": True, "rstrip": True}
    write_json(tmp_path / "tokenizer_config.json", {"added_tokens_decoder": {"300": token}})
    tokenizer = Tokenizer(tmp_path)
    gap, spaces = "<gap>", " " * 500_000
    assert tokenizer.encode(f"a{spaces}{gap}{spaces}b") == tokenizer.encode(f"a{gap}b")
    assert tokenizer.encode(f"a{gap}{gap}\u00a0") == [*tokenizer.encode("a"), 300, 300]
    assert 300 not in tokenizer.encode(spaces)


@pytest.mark.parametrize("number", [-1, 2**24, 2**63])
def test_a_token_of_an_impossible_id_is_refused(tmp_path: Path, number: int) -> None:
    sentencepiece(tmp_path)
    write_json(tmp_path / "added_tokens.json", {"<far>": number})
    write_json(tmp_path / "model_config.json", {"vocab_size": 300})
    assert f"'<far>' cannot be token {number}" in refusal(tmp_path)


def spells_control_tokens(directory: Path, *names: str) -> Tokenizer:
    """A tokenizer that finds control tokens in texts, also where they are written with wide letters."""
    letters = [[letter, -3.0] for letter in dict.fromkeys("▁" + "".join(names)) if [letter] != list(names)]
    model = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], *([name, -1.0] for name in names), *letters]}
    off = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = [off | {"id": i, "content": name, "special": True} for i, name in enumerate(names, 1)]
    spec = {"version": "1.0", "added_tokens": added, "normalizer": {"type": "NFKC"}, "model": model}
    write_json(directory / "tokenizer.json", spec | {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁"}})
    write_json(directory / "tokenizer_config.json", {"eos_token": names[0]})
    return Tokenizer(directory)


WIDE = "\uff1c/s\uff1e"


@pytest.mark.parametrize("text", ["</s>", WIDE, f"s{WIDE}s</s>", WIDE * 50, "<ss>", "</s" * 9 + "s>s>"])
def test_no_spelling_of_a_control_token_makes_one_of_a_text(tmp_path: Path, text: str) -> None:
    tokenizer = spells_control_tokens(tmp_path, "</s>", "<s", "s>s>")
    for continuation in (False, True):
        ids = tokenizer.encode(text, continuation=continuation)
        assert not set(tokenizer.control_tokens.values()) & set(ids)
        assert len(ids) >= len(text)


def test_a_letter_that_is_a_control_token_is_refused_in_a_text(tmp_path: Path) -> None:
    tokenizer = spells_control_tokens(tmp_path, "x")
    with pytest.raises(CheckpointError, match="makes a control token of '\uff58', which is text"):
        tokenizer.encode("\uff58", continuation=True)


def test_a_hidden_token_is_the_unknown_one_else_mask_else_padding_else_the_end(tmp_path: Path) -> None:
    vocabulary = {name: i for i, name in enumerate(["a", "</s>", "<pad>", "<mask>", "<unk>"])}
    model = {"type": "BPE", "vocab": vocabulary, "merges": []}
    write_json(tmp_path / "tokenizer.json", {"version": "1.0", "added_tokens": [], "model": model})
    names = {"eos_token": "</s>"}
    for name, token in (
        ("eos_token", "</s>"),
        ("pad_token", "<pad>"),
        ("mask_token", "<mask>"),
        ("unk_token", "<unk>"),
    ):
        names[name] = token
        write_json(tmp_path / "tokenizer_config.json", names)
        assert Tokenizer(tmp_path).mask_id == vocabulary[token]
    write_json(tmp_path / "model_config.json", {"vocab_size": 4})
    assert Tokenizer(tmp_path).mask_id == vocabulary["<mask>"]  # the model has no embedding of <unk>
