"""Conversion is strict, takes shards, and never holds more than a tensor."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.families.unpacking import read_state
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf
from lit_qlora.errors import CheckpointError
from lit_qlora.model.config import ModelConfig
from tests.conftest import load_script
from tests.reference import hugging_face_model, transformers


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small Llama as Hugging Face writes it."""
    hugging_face_model(tmp_path / "org" / "model", "llama-gqa")
    return tmp_path / "org" / "model"


def test_shards_make_the_same_checkpoint_as_one_file(folder: Path, tmp_path: Path) -> None:
    hugging_face_model(tmp_path / "sharded", "llama-gqa", shards="40KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 2
    convert_hf_checkpoint(folder, tmp_path / "a", name="x")
    convert_hf_checkpoint(tmp_path / "sharded", tmp_path / "b", name="x")
    one, other = load_file(tmp_path / "a/lit_model.safetensors"), load_file(tmp_path / "b/lit_model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_converting_in_place_keeps_the_original(folder: Path) -> None:
    convert_hf_checkpoint(folder, folder)
    assert {"config.json", "model.safetensors", "model_config.json", "lit_model.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    assert ModelConfig.load(folder).name == "org/model"


def test_dtype_is_kept_unless_asked_for(folder: Path, tmp_path: Path) -> None:
    convert_hf_checkpoint(folder, tmp_path / "kept")
    convert_hf_checkpoint(folder, tmp_path / "bf16", dtype="bf16")
    kept, bf16 = (load_file(tmp_path / name / "lit_model.safetensors") for name in ("kept", "bf16"))
    assert {tensor.dtype for tensor in kept.values()} == {torch.float32}
    assert all(torch.equal(bf16[name], kept[name].bfloat16()) for name in kept)


def test_every_tensor_without_a_rule_is_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    extra = {f"model.layers.{i}.self_attn.q_norm.weight": torch.ones(1) for i in range(2)}
    save_file(weights | extra, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"2 tensors have no rule(.|\n)*layers.0.*q_norm(.|\n)*layers.1.*q_norm"):
        convert_hf_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_missing_and_a_misshapen_weight_are_both_named(folder: Path, tmp_path: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.norm.weight"]
    weights["model.layers.1.mlp.up_proj.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"blocks.1.mlp.up.weight has shape \(3, 3\)(.|\n)*norm.weight is missing"
    ):
        convert_hf_checkpoint(folder, tmp_path / "out")


@pytest.mark.parametrize("target", ["../../etc/passwd", "/etc/passwd", "sub/x.safetensors"])
def test_an_index_that_points_outside_its_folder_is_refused(folder: Path, target: str) -> None:
    index = {"weight_map": {"model.norm.weight": target}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="points outside its folder"):
        convert_hf_checkpoint(folder, folder)


def test_absent_shards_are_named(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00002.safetensors"}}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names 1 files that are absent: model-00002.safetensors"):
        convert_hf_checkpoint(folder, folder)


def test_the_command_converts_and_says_what_came_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = load_script("scripts/convert_hf_checkpoint.py")
    script.main(script.ConvertConfig(checkpoint_dir=folder))
    assert "converted org/model (llama, 80,192 parameters)" in capsys.readouterr().out
    assert load_model(folder).config.n_kv_head == 2


@pytest.mark.slow
@pytest.mark.parametrize("action", ["convert", "quantize"])
def test_host_memory_holds_about_one_tensor(action: str, tmp_path: Path) -> None:
    """A model of 8 equal layers, 0.9 GB in float32, whose largest tensor has 32 MB."""
    torch.manual_seed(0)
    shape = {"hidden_size": 1024, "intermediate_size": 8192, "num_attention_heads": 8, "num_key_value_heads": 1}
    config = {"model_type": "llama", "num_hidden_layers": 8, "vocab_size": 512, "hidden_act": "silu", **shape}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kv = 128
    weights = {"model.embed_tokens.weight": torch.randn(512, 1024), "model.norm.weight": torch.ones(1024)}
    weights["lm_head.weight"] = torch.randn(512, 1024)
    for i in range(8):
        layer = f"model.layers.{i}"
        weights |= {f"{layer}.{n}.weight": torch.ones(1024) for n in ("input_layernorm", "post_attention_layernorm")}
        weights |= {f"{layer}.self_attn.{n}_proj.weight": torch.randn(1024, 1024) for n in "qo"}
        weights |= {f"{layer}.self_attn.{n}_proj.weight": torch.randn(kv, 1024) for n in "kv"}
        weights |= {f"{layer}.mlp.{n}_proj.weight": torch.randn(8192, 1024) for n in ("gate", "up")}
        weights |= {f"{layer}.mlp.down_proj.weight": torch.randn(1024, 8192)}
    save_file(weights, tmp_path / "model.safetensors")
    size = sum(tensor.numel() * 4 for tensor in weights.values())
    if action == "quantize":
        convert_hf_checkpoint(tmp_path, tmp_path)
    work = {
        "convert": f"convert_hf_checkpoint(Path({str(tmp_path)!r}), Path({str(tmp_path / 'out')!r}))",
        "quantize": f"load_model({str(tmp_path)!r}, quantize='bnb.nf4')",
    }[action]
    program = f"""
import threading, time
from pathlib import Path
from typing import Any
import bitsandbytes.functional
from lit_qlora.checkpoint.checkpoint import load_model
from lit_qlora.convert.families.unpacking import read_state
from lit_qlora.convert.from_hugging_face import convert_hf_checkpoint
from lit_qlora.convert.to_hugging_face import export_hf
page = 4096
resident = lambda: int(open('/proc/self/statm').read().split()[1]) * page
before = peak = resident()
def watch():
    global peak
    while True:
        peak = max(peak, resident())
        time.sleep(0.001)
threading.Thread(target=watch, daemon=True).start()
{work}
print(peak - before)
"""
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    largest, kept = 8192 * 1024 * 4, size / 4 * 4.5 / 8 if action == "quantize" else 0
    # The quantised model, the tensor in hand, and what bitsandbytes needs to quantise it on a CPU: 2.7 times as much.
    assert int(out) < kept + 7 * largest < size / 2


@pytest.mark.parametrize("case", ["llama-tied", "gemma2"])
def test_a_head_beside_the_embedding_is_kept_if_its_values_are_others(case: str, tmp_path: Path) -> None:
    hugging_face_model(tmp_path, case)
    weights = load_file(tmp_path / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    save_file(weights | {"lm_head.weight": embedding.clone()}, tmp_path / "model.safetensors", {"format": "pt"})
    assert convert_hf_checkpoint(tmp_path, tmp_path / "same").tied_head
    other = embedding + torch.randn(embedding.shape, generator=torch.Generator().manual_seed(0))
    save_file(weights | {"lm_head.weight": other}, tmp_path / "model.safetensors", {"format": "pt"})
    assert not convert_hf_checkpoint(tmp_path, tmp_path / "own").tied_head
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    export_hf(tmp_path / "own", tmp_path / "out")
    back = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        expected = theirs(tokens).logits
        torch.testing.assert_close(load_model(tmp_path / "own")(tokens), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(back(tokens).logits, expected)


STATE = {"shape": [4, 8], "dtype": "bfloat16", "blocksize": 64, "nested_blocksize": 256, "nested_offset": 0.5}


@pytest.mark.parametrize(
    "change",
    [{"shape": 5}, {"shape": [-1]}, {"blocksize": 0}, {"blocksize": "x"}, {"dtype": "load"}, {"nested_offset": None}],
    ids=str,
)
def test_a_description_of_a_4_bit_weight_that_describes_none_is_refused(change: dict[str, Any]) -> None:
    def packed(state: Any) -> torch.Tensor:
        return torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)

    assert read_state(packed(STATE), "x") == STATE
    for tensor in (packed(STATE | change), packed([STATE]), torch.zeros(3)):
        with pytest.raises(CheckpointError, match=r"^x"):
            read_state(tensor, "x")
