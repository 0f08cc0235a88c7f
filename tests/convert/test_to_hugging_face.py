"""What we write for Hugging Face is what Hugging Face wrote: every tensor, every file, and the logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from lit_qlora.checkpoint import shards
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint, find_weights
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError, ResourceError, UsageError
from lit_qlora.lora.adapter import read_adapter
from lit_qlora.lora.merge import merge_checkpoint
from lit_qlora.model.config import ModelConfig
from lit_qlora.prompts.tokenizer import Tokenizer
from lit_qlora.settings import LoRAConfig
from tests.conftest import ROOT, load_script, tiny_model, write_checkpoint, write_tokenizer
from tests.lora.test_adapter import save, trained
from tests.reference import EVERY_CASE, hugging_face_model

transformers = pytest.importorskip("transformers")
TOKENS = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(0))
DEMO = ROOT / "checkpoints/lit-qlora/tiny-world"


@pytest.mark.parametrize("case", EVERY_CASE)
def test_what_comes_from_the_hub_goes_back_bit_equal_and_computes_the_same(case: str, tmp_path: Path) -> None:
    theirs = hugging_face_model(tmp_path / "hub", case)
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", limit=40_000)
    one, other = find_weights(tmp_path / "hub"), find_weights(tmp_path / "back")
    assert len(other.paths) > 1
    assert one.specs.keys() == other.specs.keys()
    assert all(torch.equal(one.read(name), other.read(name)) for name in one.specs)
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "back", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    with torch.no_grad():
        expected = theirs(TOKENS).logits
    # Equal weights at other addresses can be multiplied in another order.
    torch.testing.assert_close(back(TOKENS).logits, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_layers_that_predict_further_tokens_come_back_though_ours_has_no_use_for_them(tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "hub", "deepseek_v3")
    weights = load_file(tmp_path / "hub/model.safetensors")
    last = {name: tensor for name, tensor in weights.items() if ".layers.1." in name}
    further = {name.replace(".layers.1.", ".layers.2."): tensor + 1 for name, tensor in last.items()}
    further["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    save_file(weights | further, tmp_path / "hub/model.safetensors", {"format": "pt"})
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    back = load_file(tmp_path / "back/model.safetensors")
    assert back.keys() == (weights | further).keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in (weights | further).items())


def test_the_demo_model_becomes_a_folder_that_transformers_reads(tmp_path: Path) -> None:
    export_hf(DEMO, tmp_path / "demo")
    back, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "demo", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    tokens = torch.randint(0, 1280, (2, 11))
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, load_model(DEMO)(tokens), rtol=1e-4, atol=1e-4)
    assert (back.generation_config.bos_token_id, back.generation_config.eos_token_id) == (1, 2)
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "demo" / name).read_bytes() == (DEMO / name).read_bytes()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "demo")
    for text in ("Q: What does the fox eat?\nA:", "two  spaces", "naïve 漢字 😀\n\n"):
        assert tokenizer(text)["input_ids"] == Tokenizer(DEMO).encode(text)


@pytest.mark.parametrize(
    "settings",
    [
        None,
        {"eos_token": "</s>"},
        {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>"},
        {"tokenizer_class": "LlamaTokenizer", "add_bos_token": False},
    ],
    ids=str,
)
def test_a_tokenizer_model_is_read_by_transformers_as_it_is_here(
    settings: dict[str, object] | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path / "ours", tiny_model())
    write_tokenizer(tmp_path / "ours")
    if settings:
        (tmp_path / "ours/tokenizer_config.json").write_text(json.dumps(settings))
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs"), Tokenizer(tmp_path / "ours")
    for text in ("Hello world", "Q: What is 1 plus 2?\nA:", "two  spaces\n\n"):
        assert theirs(text)["input_ids"] == ours.encode(text)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    if settings:
        return
    (tmp_path / "theirs/tokenizer_config.json").unlink()  # transformers would mend it one day, and this end
    alone = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    assert alone("Hello world")["input_ids"] != ours.encode("Hello world")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tied_head": True},
        {"rope_scaling": "linear", "rope_factor": 4.0},
        {"rope_scaling": "llama3", "rope_factor": 8.0, "rope_original_block_size": 16},
        {"family": "mistral", "sliding_window": 8},
        {"family": "qwen2", "qkv_bias": True},
        {
            "family": "gpt_neox",
            "n_kv_head": 4,
            "norm": "layer",
            "ffn": "gelu",
            "qkv_bias": True,
            "projection_bias": True,
            "mlp_bias": True,
            "parallel_residual": True,
            "rope_fraction": 0.25,
        },
    ],
    ids=str,
)
def test_a_checkpoint_that_never_had_a_config_json_gets_one(changes: dict[str, object], tmp_path: Path) -> None:
    model = tiny_model(**changes)
    write_checkpoint(tmp_path / "ours", model)
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = model(TOKENS)
        torch.testing.assert_close(back(TOKENS).logits, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert json.loads((tmp_path / "theirs/config.json").read_text())["architectures"] == [type(back).__name__]


def test_what_a_config_json_cannot_say_is_refused_by_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "ours", tiny_model(norm="layer"))
    with pytest.raises(CheckpointError, match=r"would say norm 'rms' instead of 'layer', so this model cannot be"):
        export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_a_config_json_of_another_model_is_refused(tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "hub", "llama-gqa")
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "hub")
    theirs = json.loads((tmp_path / "hub/config.json").read_text())
    (tmp_path / "hub/config.json").write_text(json.dumps({**theirs, "rms_norm_eps": 0.5}))
    with pytest.raises(CheckpointError, match=r"config.json(.|\n)* norm_eps 0.5 instead of"):
        export_hf(tmp_path / "hub", tmp_path / "theirs")


def test_a_new_dtype_and_a_head_of_its_own_are_put_right_in_config_json(tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "hub", "llama-tied")
    convert_hf_checkpoint(tmp_path / "hub", tmp_path / "ours", dtype="bf16")
    config = LoRAConfig(targets=("head",))
    save(tmp_path / "final", trained(load_model(tmp_path / "ours"), config), config, tmp_path / "ours")
    merge_checkpoint(read_adapter(tmp_path / "final"), tmp_path / "ours", tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "theirs")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype="auto")
    assert back.dtype == torch.bfloat16
    assert not torch.equal(back.lm_head.weight, back.model.embed_tokens.weight)
    with torch.no_grad():
        expected = load_model(tmp_path / "merged")(TOKENS)
        torch.testing.assert_close(back.float()(TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def front_matter(folder: Path) -> dict[str, object]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


def test_the_model_card_says_what_the_model_is_made_of(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", tiny_model())
    write_tokenizer(base)
    (base / "source.json").write_text(json.dumps({"repo_id": "org/model", "commit": "abc123"}))
    export_hf(base, tmp_path / "theirs")
    assert front_matter(tmp_path / "theirs") == {
        "base_model": "org/model",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["lit_qlora", "llama"],
    }
    assert "commit abc123" in (tmp_path / "theirs/README.md").read_text()
    model = trained(load_model(base), LoRAConfig())
    save(tmp_path / "final", model, LoRAConfig(), base)
    merge_checkpoint(read_adapter(tmp_path / "final"), base, tmp_path / "merged")
    export_hf(tmp_path / "merged", tmp_path / "card")
    assert front_matter(tmp_path / "card")["base_model"] == "test/tiny"
    assert front_matter(tmp_path / "card")["tags"] == ["lit_qlora", "llama", "lora"]


def test_tokenizer_files_and_chat_template_come_along_byte_for_byte(tmp_path: Path, tiny_checkpoint: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "ours")
    files = {
        "tokenizer.model": (tiny_checkpoint / "tokenizer.model").read_bytes(),
        "tokenizer_config.json": b'{"tokenizer_class": "LlamaTokenizer", "add_bos_token":   true}',
        "special_tokens_map.json": b"{ }\n\n",
        "added_tokens.json": b"{}",
        "chat_template.jinja": "{{ messages }} é\r\n".encode(),
        "generation_config.json": b'{"eos_token_id": [2, 5] }',
    }
    for name, content in files.items():
        (tmp_path / "ours" / name).write_bytes(content)
    export_hf(tmp_path / "ours", tmp_path / "theirs")
    assert {name: (tmp_path / "theirs" / name).read_bytes() for name in files} == files


def test_the_ids_that_end_an_answer_are_told_where_no_file_came_along(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_hf(tiny_checkpoint, tmp_path / "theirs")
    assert json.loads((tmp_path / "theirs/generation_config.json").read_text()) == {
        "bos_token_id": 1,
        "eos_token_id": 2,
    }


def test_nothing_is_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    export_hf(tiny_checkpoint, tmp_path / "theirs")
    with pytest.raises(UsageError, match="has something in it"):
        export_hf(tiny_checkpoint, tmp_path / "theirs")
    with pytest.raises(UsageError, match="has something in it"):
        export_hf(tiny_checkpoint, tiny_checkpoint)


def test_a_failure_leaves_nothing(tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(ResourceError, match=r"Cannot write .*theirs: No space left on device"):
        export_hf(tiny_checkpoint, tmp_path / "theirs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0.0, -1.0, float("nan"), float("inf")])
def test_a_size_that_no_file_can_have_is_refused(size: float) -> None:
    with pytest.raises(UsageError, match="shard_gb must be above 0 and finite"):
        load_script("scripts/convert_lit_checkpoint.py").ExportConfig(
            checkpoint_dir=Path("a"), out_dir=Path("b"), shard_gb=size
        )


def test_the_command_exports_and_says_what_came_out(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("scripts/convert_lit_checkpoint.py")
    out = tmp_path / "theirs"
    script.main(script.ExportConfig(checkpoint_dir=tiny_checkpoint, out_dir=out, shard_gb=1e-4))
    assert capsys.readouterr().out == f"exported test/tiny (llama, 115,008 parameters): {out}\n"
    assert len(load_file(out / "model-00001-of-00005.safetensors")) >= 1
    convert_hf_checkpoint(out, tmp_path / "back", name="test/tiny")
    assert ModelConfig.load(tmp_path / "back") == ModelConfig.load(tiny_checkpoint)
