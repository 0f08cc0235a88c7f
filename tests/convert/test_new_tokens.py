"""Tokens are added to a base, learnt by an adapter, merged and exported, and read by transformers and PEFT."""

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from lit_qlora.checkpoint import score
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.checkpoint.identity import base_facts, identity
from lit_qlora.convert.new_tokens import PROBE, add_tokens
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError, UsageError
from lit_qlora.lora.adapter import load_adapter, read_adapter, save_adapter
from lit_qlora.lora.layer import add_lora
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.scoring import Scoring
from lit_qlora.prompts.style import STYLES
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import LoRAConfig
from tests.conftest import run_here, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import trained

CHATML = ("<|im_start|>", "<|im_end|>")
TURN = "<|im_start|>user\nWhat is 1 plus 2?<|im_end|>\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint without rows to spare. Read only."""
    folder = write_checkpoint(tmp_path_factory.mktemp("base") / "tiny", tiny_model(vocab_size=300, head_bias=False))
    write_tokenizer(folder)
    return folder


def test_new_rows_are_means_and_the_base_stays_as_it_was(base: Path, tmp_path: Path) -> None:
    before = identity(base)
    added = add_tokens(base, tmp_path / "new", CHATML, {"<|im_end|>": "</s>"})
    assert added.ids == {"<|im_start|>": 300, "<|im_end|>": 301}
    assert identity(base) == before
    old, new = load_model(base), load_model(tmp_path / "new")
    for name in ("embed", "head"):
        rows, grown = old.get_parameter(f"{name}.weight"), new.get_parameter(f"{name}.weight")
        assert torch.equal(grown[:300], rows)
        torch.testing.assert_close(grown[300], rows.mean(dim=0))
        assert torch.equal(grown[301], rows[2])


def test_texts_are_encoded_as_before_and_only_programs_write_control_tokens(base: Path, tmp_path: Path) -> None:
    add_tokens(base, tmp_path / "new", CHATML)
    old, new = Tokenizer(base), Tokenizer(tmp_path / "new")
    assert new.size == 302
    for text in (PROBE, TURN, ""):
        assert new.encode(text) == old.encode(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "new")
    assert new.encode_marked(TURN) == theirs(TURN).input_ids
    assert {300, 301} < set(new.encode_marked(TURN))


def test_words_are_found_in_every_text_and_in_answers(base: Path, tmp_path: Path) -> None:
    add_tokens(base, tmp_path / "new", ["<think>"], control=False)
    new = Tokenizer(tmp_path / "new")
    ids = new.encode("A <think> 1")
    assert 300 in ids
    assert ids == transformers.AutoTokenizer.from_pretrained(tmp_path / "new")("A <think> 1").input_ids
    assert new.decode(ids) == "A <think> 1"


@pytest.mark.parametrize("with_table", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_tokenizer_json_names_them_itself(tmp_path: Path, with_table: bool) -> None:
    from tokenizers import Tokenizer as Theirs
    from tokenizers import models

    source = write_checkpoint(tmp_path / "base", tiny_model(vocab_size=96, tied_head=True))
    theirs = Theirs(models.BPE({"</s>": 0, **{chr(i): i - 31 for i in range(32, 90)}}, []))
    theirs.add_special_tokens(["</s>"])
    theirs.save(str(source / "tokenizer.json"))
    table = {"added_tokens_decoder": {"0": {"content": "</s>", "special": True}}} if with_table else {}
    (source / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", **table}))
    added = add_tokens(source, tmp_path / "new", CHATML)
    assert added.config.vocab_size == 96  # a row to spare is taken
    assert Theirs.from_file(str(tmp_path / "new/tokenizer.json")).token_to_id("<|im_end|>") == added.ids["<|im_end|>"]
    known = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "new")
    assert known("<|im_start|>A").input_ids == Tokenizer(tmp_path / "new").encode_marked("<|im_start|>A")


def test_an_adapter_with_them_is_merged_exported_and_loaded_by_peft_on_the_resized_base(
    base: Path, tmp_path: Path
) -> None:
    ids = tuple(add_tokens(base, tmp_path / "new", CHATML).ids.values())
    config = LoRAConfig(targets=("all",), train_tokens=ids, train_head_rows=True)
    ours = trained(load_model(tmp_path / "new"), config)
    facts: dict[str, Any] = {"base": base_facts(tmp_path / "new"), "new_tokens": dict(zip(CHATML, ids, strict=True))}
    save_adapter(tmp_path / "adapter", ours, config, STYLES["chatml"], facts)
    merge_checkpoint(read_adapter(tmp_path / "adapter"), tmp_path / "new", tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "hf")
    export_hf(base, tmp_path / "hf_base")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    resized = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf_base")
    resized.resize_token_embeddings(302)
    adapted = peft.PeftModel.from_pretrained(resized, tmp_path / "adapter")
    told = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf").apply_chat_template(
        [{"role": "user", "content": "What is 1 plus 2?"}], add_generation_prompt=True, return_dict=False
    )
    tokens = torch.tensor([told])
    again = load_model(tmp_path / "new")
    add_lora(again, config)
    load_adapter(again, tmp_path / "adapter")
    with torch.no_grad():
        expected = ours(tokens)
        assert torch.equal(again.eval()(tokens), expected)
        for logits in (theirs(tokens).logits, adapted(tokens).logits):
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert theirs.generation_config.eos_token_id == [2, 301]
    assert "resize_token_embeddings(302)" in (tmp_path / "adapter/README.md").read_text()


@pytest.mark.parametrize(
    ("names", "like", "message"),
    [
        (["</s>"], {}, "'</s>' is token 2 already"),
        (["<a>", "<a>"], {}, "given twice"),
        ([" "], {}, "needs a name"),
        (["a\udcff"], {}, "no character"),
        (["<a>"], {"<b>": "x"}, "'<b>' is none of the new tokens"),
        (["<a>"], {"<a>": ""}, "no text to begin from"),
    ],
)
def test_what_cannot_be_added_is_named(
    base: Path, tmp_path: Path, names: list[str], like: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        add_tokens(base, tmp_path / "new", names, like)
    assert not (tmp_path / "new").exists()


def test_a_vocabulary_without_a_place_for_them_is_refused(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    config = json.loads((tmp_path / "base/model_config.json").read_text())
    config |= {"per_layer_size": 4, "per_layer_vocab": 300}
    (tmp_path / "base/model_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="an embedding for each block, which cannot take new tokens"):
        add_tokens(tmp_path / "base", tmp_path / "new", CHATML)


def test_a_base_with_a_head_that_reads_labels_takes_none(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "base")
    score.write(tmp_path / "base", torch.zeros(2, 32), Scoring("classify", ("a", "b")))
    with pytest.raises(CheckpointError, match="has a head that reads labels"):
        add_tokens(tmp_path / "base", tmp_path / "new", CHATML)


@pytest.mark.slow
def test_a_run_on_them_says_what_does_not_learn_and_leaves_the_tokenizer_in_the_adapter(
    base: Path, examples_file: Path, tmp_path: Path
) -> None:
    add_tokens(base, tmp_path / "new", CHATML)
    data = ("--data.path", examples_file, "--data.prompt", "chatml", "--train.max_steps", 2, "--data.max_length", 90)
    flags = ("--checkpoint_dir", tmp_path / "new", *data, "--out_dir", tmp_path / "out")
    said = run_here("finetune/lora.py", *flags, "--dry_run", "true").stdout
    learn = ("--lora.train_tokens", "[300,301]", "--lora.train_head_rows", "true")
    assert f"new tokens of the base are not all learnt: {' '.join(learn)}" in said
    done = run_here("finetune/lora.py", *flags, *learn)
    assert done.returncode == 0, done.stderr
    assert "not all learnt" not in done.stdout
    final = tmp_path / "out/final"
    assert transformers.AutoTokenizer.from_pretrained(final)(TURN).input_ids == Tokenizer(final).encode_marked(TURN)
    assert "`<\\|im_start\\|>`, `<\\|im_end\\|>`" in (final / "README.md").read_text()
    wrong = run_here("scripts/generate.py", "--lora_path", final, "--checkpoint_dir", base, "--prompt", "Hi")
    assert "That has new tokens: python scripts/add_tokens.py makes it" in wrong.stderr


def test_the_command_prints_ids_and_the_flags_that_train_them(base: Path, tmp_path: Path) -> None:
    flags = ("--checkpoint_dir", base, "--tokens", "[<|im_start|>,<|im_end|>]", "--like", "{<|im_end|>: </s>}")
    done = run_here("scripts/add_tokens.py", *flags, "--out_dir", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert "301 <|im_end|>   control token, begins like '</s>'" in done.stdout
    assert "--lora.train_tokens [300,301] --lora.train_head_rows true" in done.stdout
